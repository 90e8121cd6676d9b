"""The model suite goes from token ids to hidden states, over the workloads (a) to (e) of workloads.py.

Weights are random, so that nothing has to be fetched: speed does not depend on them. On a GPU `torch.compile` tunes for
minutes, so it meets fastbert in a separate case, unless the run is a long one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import workloads
from peers_model import Hidden, ModelTask, model_peers
from suites import Built, Case, LeftOut, Work
from workloads import Workload

import models
from fastbert.bench.devices import fast_at_bfloat16
from fastbert.bench.engines import EAGER, SDPA, Compiled
from fastbert.bench.peers import OURS, Peer

SUITE = "model"
FEW_DOCUMENTS = 2048  # of workload (d) in a short run: tokens a second are the same, the time is a quarter
POSITIONS = 1024  # of BERT-base, for the longest of workload (c)
ONLY_EAGER = ("mpnet", "deberta-v2")  # models of transformers
ALL, WITHOUT_COMPILED, ONLY_COMPILED = "all", "without compiled", "only compiled"


@dataclass(frozen=True)
class Plan:
    """A Plan is one case. weight: its share of the time, relative to the others."""

    model: str
    workload: Workload
    dtype: str
    weight: float = 1.0
    peers: str = WITHOUT_COMPILED


def cases(device_type: str, *, long: bool = False) -> list[Case]:
    """Returns the cases for "cuda" or "cpu", the most important first.

    long: the run has time for all 8,192 documents of workload (d), and for torch.compile in every case on a GPU.
    """
    plans = cuda_plans(8192 if long else FEW_DOCUMENTS) if device_type == "cuda" else cpu_plans()
    if long:
        plans = [Plan(p.model, p.workload, p.dtype, p.weight, ALL) for p in plans if p.peers != ONLY_COMPILED]
    return [
        Case(
            SUITE,
            plan.workload.name + (", compiled" if plan.peers == ONLY_COMPILED else ""),
            plan.model,
            plan.dtype,
            device_type,
            ("model",),
            functools.partial(build, plan),
            weight=plan.weight,
        )
        for plan in plans
    ]


def cuda_plans(n_documents: int) -> list[Plan]:
    """Returns the plans for a GPU, the most important for a short run first. n_documents: of workload (d)."""
    bf16 = "bfloat16"
    squad, mixed, fixed = workloads.squad(), workloads.mixed(), workloads.fixed
    documents = [workloads.documents(variable, n_documents) for variable in (False, True)]
    plans = [
        Plan("BERT-base", fixed(512, 32), bf16),
        Plan("BERT-base", fixed(128, 32), bf16),
        Plan("BERT-base", mixed, bf16),
        Plan("BERT-large", squad, bf16, 3.0),
        *(Plan("BERT-base", workload, bf16, 2.0) for workload in documents),
        Plan("BERT-base", fixed(128, 1), bf16),
        Plan("MiniLM", mixed, bf16),
        Plan("BERT-base", fixed(128, 32), bf16, 4.0, ONLY_COMPILED),
        Plan("BERT-base", fixed(512, 32), "float16"),
        Plan("BERT-base", fixed(128, 32), "float32"),
    ]
    grid = [fixed(length, size) for size in workloads.FIXED_BATCHES for length in workloads.FIXED_LENGTHS]
    rest = [("BERT-base", workloads.byte_transformer(longest)) for longest in workloads.BYTE_TRANSFORMER_LONGEST]
    rest += [(model, workload) for model in ("BERT-base", "BERT-large", "MiniLM") for workload in grid]
    done = {(plan.model, plan.workload.name, plan.dtype) for plan in plans}
    return plans + [Plan(model, w, bf16) for model, w in rest if (model, w.name, bf16) not in done]


def cpu_plans() -> list[Plan]:
    """Returns the plans for a CPU, small enough that every competitor of every case runs within minutes on two cores.

    torch.compile takes part if all lengths are equal. For variable lengths it compiles for half a minute a case.
    """
    fixed, squad, fp32, bf16 = workloads.fixed, workloads.squad, "float32", "bfloat16"
    documents = [workloads.documents(variable, n=4, batch_size=4) for variable in (False, True)]
    plans = [
        Plan("MiniLM", fixed(128, 8), fp32, peers=ALL),
        Plan("MiniLM", squad(8), fp32),
        Plan("BERT-base", squad(3), fp32, 2.0),
        Plan("MiniLM", workloads.mixed(13), fp32),
        Plan("MiniLM", fixed(128, 1), fp32, 0.5),
        *(Plan("MiniLM", workload, fp32) for workload in documents),
        Plan("BERT-base", fixed(128, 1), fp32, peers=ALL),
        Plan("ModernBERT-base", squad(3), fp32),
        Plan("MPNet-base", squad(3), fp32),
        Plan("ModernBERT-base", fixed(1024, 1), fp32),
        Plan("DeBERTa-v3-base", squad(3), fp32),
    ]
    if fast_at_bfloat16(torch.device("cpu")):
        plans[3:3] = [Plan("MiniLM", fixed(128, 8), bf16, peers=ALL), Plan("BERT-base", squad(3), bf16, 2.0)]
    return plans


def build(plan: Plan, device: torch.device, peers_of: Callable[[ModelTask], Sequence[Hidden]] = model_peers) -> Built:
    """Builds the contest of one plan. peers_of: the competitors."""
    workload = plan.workload
    longest = max(workload.lengths)
    short = longest > models.CONFIGS[plan.model].max_position_embeddings
    positions = {"max_position_embeddings": POSITIONS} if short else {}
    folder = models.random_folder(plan.model, **positions)
    task = ModelTask(folder, workload.batches(), dtype=plan.dtype, device=device)
    peers: list[Peer] = []
    for peer in peers_of(task):
        is_compiled = isinstance(peer.engine, Compiled)
        if plan.peers == ONLY_COMPILED and not (is_compiled or peer.name in (OURS, EAGER)):
            continue
        if plan.peers == WITHOUT_COMPILED and is_compiled:
            peers.append(LeftOut(peer.name, "left to other cases, because it takes long to compile"))
        elif isinstance(peer.engine, SDPA) and task.source.config.model_type in ONLY_EAGER:
            peers.append(LeftOut(peer.name, f"transformers' {task.source.config.model_type} has eager attention alone"))
        else:
            peers.append(peer)
    work = Work(models.flops(task.source.config, workload.lengths))
    extra = {
        "length": longest,
        "batch": workload.batch_size or len(workload.lengths),
        "flops_per_token": work.flops / workload.tokens,
        "description": workload.description,
        "padding_waste_of_workload": workload.padding_waste(),
    }
    timing = {"warmup": 1}
    return Built(peers, EAGER, task.reference(), workload.tokens, len(workload.lengths), work, extra, timing)
