"""Two processes train one model by DistributedDataParallel, each on a half of the batch, over gloo."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from train_cases import accelerated_copy, labelled, loss_of, original

N_PROCESSES = 2
Gradients = dict[str, "Tensor | None"]


class Case(NamedTuple):
    """What is trained, and how it is wrapped."""

    name: str = "BertForSequenceClassification"
    dtype: torch.dtype = torch.float64
    accelerated: bool = True
    checkpointing: bool = False
    frozen: bool = False  # The embeddings and the first layer.
    wrapper: tuple[tuple[str, bool], ...] = ()  # Arguments of DistributedDataParallel.


def model_of(case: Case) -> Any:
    model = original("bert", case.name, case.dtype)
    if case.frozen:
        model.base_model.embeddings.requires_grad_(False)
        model.base_model.encoder.layer[0].requires_grad_(False)
    if case.checkpointing:
        model.gradient_checkpointing_enable()
    return accelerated_copy(model) if case.accelerated else model


def loss(model: Any, batch: dict[str, Any]) -> Tensor:
    """The mean over texts; of the token states alone where there is no head, so that the pooler is unused."""
    if "labels" in batch:
        return loss_of(model, batch)
    hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
    return ((hidden * mask).pow(3).sum(1) / mask.sum(1)).mean()


def rows(case: Case, rank: int, n_processes: int) -> dict[str, Any]:
    """The share of a process. One token of each text is masked, so that the mean of the means is the mean."""
    batch = labelled("bert", case.name)
    if case.name == "BertForMaskedLM":
        batch["labels"][:, 1:] = -100
    return {key: value.chunk(n_processes)[rank] for key, value in batch.items()}


def gradients(case: Case, rank: int, n_processes: int, n_steps: int = 2) -> tuple[Gradients, str]:
    """The gradients of the last step, and the error that ended the steps, or ""."""
    model = model_of(case)
    wrapped = DistributedDataParallel(model, **dict(case.wrapper)) if n_processes > 1 else model
    batch = rows(case, rank, n_processes)
    error = ""
    try:
        for _ in range(n_steps):
            model.zero_grad()
            loss(wrapped, batch).backward()
    except RuntimeError as raised:
        error = str(raised).splitlines()[0]
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}, error


def _work(rank: int, cases: list[Case], folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=N_PROCESSES)
    try:
        results = [gradients(case, rank, N_PROCESSES) for case in cases]
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def in_processes(cases: list[Case], folder: Path) -> list[list[tuple[Gradients, str]]]:
    """Runs each case in two processes. Returns the results of each case, by process."""
    torch.multiprocessing.start_processes(_work, (cases, str(folder)), N_PROCESSES, start_method="spawn")
    results = [torch.load(folder / f"{rank}.pt") for rank in range(N_PROCESSES)]
    return list(map(list, zip(*results, strict=True)))
