"""`Processes` describes the processes of a run, one or those that torchrun started, and wraps the model for them.

Data about a step (counts, a request to stop) is exchanged through gloo on the host, so that no process waits for a GPU.
Gradients are exchanged through NCCL on GPUs and through gloo on CPUs.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

TIMEOUT = timedelta(minutes=30)


def n_processes() -> int:
    """Returns the number of processes that torchrun has started, or 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


@dataclass(frozen=True)
class Processes:
    """A `Processes` describes the position of this process in a run.

    rank: the rank of this process, from 0 to n - 1. local_rank: its rank on its machine. device: the device on which it
    computes.
    """

    rank: int
    n: int
    local_rank: int
    device: torch.device

    @classmethod
    def start(cls, device: str | None = None) -> Processes:
        """Joins the processes that torchrun's environment variables describe; without them, the process runs alone.

        device: by default GPU `local_rank` if a GPU is available, else the CPU.
        """
        rank, n = int(os.environ.get("RANK", 0)), n_processes()
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if device is None:
            device = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
        place = torch.device(device)
        if place.type == "cuda":
            torch.cuda.set_device(place)
        if "RANK" in os.environ and not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=TIMEOUT, **_own_store(rank, n))
        return cls(rank, n, local_rank, place)

    @property
    def is_first(self) -> bool:
        """Tells whether this process writes files and prints messages."""
        return self.rank == 0

    @property
    def grouped(self) -> bool:
        """Tells whether there is a process group, even a group of one process."""
        return dist.is_initialized()

    def sum(self, values: Sequence[int]) -> list[int]:
        """Returns the sums of host integers over all processes."""
        if self.n == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def sum_tensor(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over all processes, in place."""
        if self.n > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Returns the values of all processes, on each process."""
        if self.n == 1:
            return [value]
        values: list[Any] = [None] * self.n
        dist.all_gather_object(values, value)
        return values

    def check_equal(self, name: str, value: Any) -> None:
        """Raises ValueError on every process if the value differs between processes."""
        values = self.gather(value)
        if any(other != values[0] for other in values):
            listed = ", ".join(f"rank {rank}: {other}" for rank, other in enumerate(values))
            raise ValueError(f"{name}: the processes differ: {listed}")

    def wait(self) -> None:
        """Waits until all processes call it."""
        if self.n > 1:
            dist.barrier() if self.device.type == "cpu" else dist.barrier(device_ids=[self.device.index or 0])

    def wrap(
        self, objective: nn.Module, *, n_accumulated: int = 1, fsdp: bool = False, bf16: bool = False
    ) -> nn.Module:
        """Returns the module that averages gradients over the processes.

        n_accumulated: the number of batches per process in each step. fsdp: also shard the parameters and the
        optimiser's state.
        """
        if fsdp:
            return shard(objective, bf16)
        if self.n == 1:
            return objective
        # A module without buffers broadcasts nothing in a forward pass.
        assert not list(objective.buffers())
        return nn.parallel.DistributedDataParallel(
            objective,
            device_ids=[self.device.index or 0] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            static_graph=n_accumulated == 1,  # PyTorch forbids no_sync in the first pass of a static graph
        )

    def close(self) -> None:
        """Leaves the process group."""
        leave()


def leave() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _own_store(rank: int, n: int) -> dict[str, Any]:
    """Returns the arguments of a store in which no process finds the address of a dead process.

    When torchrun restarts the processes, it keeps its store, with the entries of the dead processes. On one machine the
    number of restarts distinguishes the attempts. On several machines this number differs between machines, so they use
    PyTorch's default store.
    """
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT")
    if restarts is None or os.environ.get("GROUP_WORLD_SIZE") != "1":
        return {}
    store, *_ = next(rendezvous("env://", timeout=TIMEOUT))
    return {"store": dist.PrefixStore(f"attempt {restarts}", store), "rank": rank, "world_size": n}


@contextlib.contextmanager
def accumulating(module: Any, *, is_last: bool) -> Iterator[None]:
    """Keeps gradients on this process during the passes inside, except the last of a step, which averages them."""
    if isinstance(module, nn.parallel.DistributedDataParallel) and not is_last:
        with module.no_sync():
            yield
        return
    if hasattr(module, "set_requires_gradient_sync"):  # FSDP2
        module.set_requires_gradient_sync(is_last)
    yield


def shard(objective: nn.Module, bf16: bool) -> nn.Module:
    """Shards each layer with FSDP2, and then the rest of the model, which contains the tied embedding."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    precision = MixedPrecisionPolicy(reduce_dtype=torch.float32) if bf16 else MixedPrecisionPolicy()
    model: Any = objective
    for layer in model.model.bert.encoder.layer:
        fully_shard(layer, mp_policy=precision)
    fully_shard(objective, mp_policy=precision)
    return objective


def is_sharded(model: nn.Module) -> bool:
    """Tells whether the model was sharded by `shard`: its parameters are DTensors."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())
