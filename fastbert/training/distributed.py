"""`Processes` knows the processes of a run: one, or those that torchrun started. It wraps the model for them.

What processes tell one another about a step (counts, a wish to stop) goes through gloo on the host, so that nobody
waits for a GPU. Gradients go through NCCL on GPUs and gloo on CPUs.
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
    """Returns the number of processes that torchrun has started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


@dataclass(frozen=True)
class Processes:
    """rank: of this process, from 0 to n - 1. local_rank: on its machine. device: where it computes."""

    rank: int
    n: int
    local_rank: int
    device: torch.device

    @classmethod
    def start(cls, device: str | None = None) -> Processes:
        """Joins the processes that torchrun's environment names; without it the process is alone.

        device: by default GPU `local_rank` where there is one, else the CPU.
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
        """Tells whether this process writes files and speaks to the user."""
        return self.rank == 0

    @property
    def grouped(self) -> bool:
        """Tells whether there is a group of processes, be it of one."""
        return dist.is_initialized()

    def sum(self, values: Sequence[int]) -> list[int]:
        """Returns the sums over all processes of integers of the host."""
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
        """Returns the value of each process, on all of them."""
        if self.n == 1:
            return [value]
        values: list[Any] = [None] * self.n
        dist.all_gather_object(values, value)
        return values

    def check_equal(self, name: str, value: Any) -> None:
        """Raises ValueError on every process where the processes differ in a value."""
        values = self.gather(value)
        if any(other != values[0] for other in values):
            listed = ", ".join(f"rank {rank}: {other}" for rank, other in enumerate(values))
            raise ValueError(f"{name}: the processes differ: {listed}")

    def wait(self) -> None:
        """Waits until all processes are here."""
        if self.n > 1:
            dist.barrier() if self.device.type == "cpu" else dist.barrier(device_ids=[self.device.index or 0])

    def wrap(
        self, objective: nn.Module, *, n_accumulated: int = 1, fsdp: bool = False, bf16: bool = False
    ) -> nn.Module:
        """Returns the module that averages gradients over processes.

        n_accumulated: batches of a process in each step. fsdp: shard parameters and the optimiser's state, too.
        """
        if fsdp:
            return shard(objective, bf16)
        if self.n == 1:
            return objective
        # Without buffers nothing is broadcast in a forward pass.
        assert not list(objective.buffers())
        return nn.parallel.DistributedDataParallel(
            objective,
            device_ids=[self.device.index or 0] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            static_graph=n_accumulated == 1,  # PyTorch takes no no_sync in the first pass of a static graph
        )

    def close(self) -> None:
        """Leaves the group."""
        leave()


def leave() -> None:
    """Leaves the group of processes, where there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _own_store(rank: int, n: int) -> dict[str, Any]:
    """Gives the arguments of a store in which no process finds the address of one that has died.

    torchrun keeps its store when it starts the processes again, with what the dead ones wrote. On one machine the
    number of restarts tells the attempts apart. On several it differs among machines, and their store is PyTorch's own.
    """
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT")
    if restarts is None or os.environ.get("GROUP_WORLD_SIZE") != "1":
        return {}
    store, *_ = next(rendezvous("env://", timeout=TIMEOUT))
    return {"store": dist.PrefixStore(f"attempt {restarts}", store), "rank": rank, "world_size": n}


@contextlib.contextmanager
def accumulating(module: Any, *, is_last: bool) -> Iterator[None]:
    """Keeps gradients on this process for the passes inside, but for the last of a step, which averages them."""
    if isinstance(module, nn.parallel.DistributedDataParallel) and not is_last:
        with module.no_sync():
            yield
        return
    if hasattr(module, "set_requires_gradient_sync"):  # FSDP2
        module.set_requires_gradient_sync(is_last)
    yield


def shard(objective: nn.Module, bf16: bool) -> nn.Module:
    """Shards the layers and then the rest, with the tied embedding in it, by FSDP2."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    precision = MixedPrecisionPolicy(reduce_dtype=torch.float32) if bf16 else MixedPrecisionPolicy()
    model: Any = objective
    for layer in model.model.bert.encoder.layer:
        fully_shard(layer, mp_policy=precision)
    fully_shard(objective, mp_policy=precision)
    return objective


def is_sharded(model: nn.Module) -> bool:
    """Tells whether `shard` has been here: the parameters are DTensors."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())
