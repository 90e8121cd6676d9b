"""The train suite times one optimiser step, and its forward and backward separately: AdamW, dropout, float32 weights.

It runs float32, and bfloat16 by autocast; batches with half padding, and with equal lengths. Pre-training is a step of
the loop of `fastbert pretrain` on synthetic shards. On a GPU there are also losses over tokens with equal lengths, and
attention alone. Weights are random. Every competitor's gradients are compared with float64 before it is timed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import train_attention
import train_pretraining
import workloads
from laps import BACKWARD, FORWARD, RATE, STEP, TOKENS, Bar
from peers_train import (
    CLASSES,
    PRETRAINING,
    SDPA,
    WORDS,
    Accelerated,
    Compiled,
    Eager,
    FastBert32,
    Flattened,
    Trained,
    TrainTask,
    train_peers,
)
from suites import LONG_MINUTES, Built, Case, LeftOut, Work
from train_pretraining import PretrainTask, pretrain_peers
from workloads import Workload

import models
from fastbert.bench.devices import fast_at_bfloat16
from fastbert.bench.peers import OURS, Peer

SUITE = "train"
BF16, FP32 = "bfloat16", "float32"
OBJECTIVES = {CLASSES: "", WORDS: "MLM, ", PRETRAINING: "MLM + NSP, "}  # names of workloads begin so
ATTENTION = (12, 64)  # heads of BERT-base, and their size
BASE_SCALE = 2.0  # the time of a case of BERT-base on a CPU, relative to MiniLM's longest
SLOW = {"rounds": 3, "min_rounds": 2}  # of cases whose steps take seconds
# The goals of a step. docs and results report the reached values.
CPU_BARS = {True: 2.2, False: 1.25}  # in float32, over transformers with SDPA; True: half of the batch is padding
CPU_BAR_BF16 = 1.8  # over our own float32
GPU_BARS = ((Compiled.name, 2.0), (SDPA.name, 2.0), (Flattened.name, 1.2))
BARS_TOKENS = {("BERT-large", PRETRAINING): 270e3, ("BERT-base", WORDS): 700e3}
PRETRAIN_BARS_TOKENS = {"BERT-large": 270e3, "BERT-base": 700e3}  # the second is MLM alone, which is less work
PRETRAIN_CPU_BAR = 2.2  # in float32, over transformers with SDPA
BAR_ATTENTION = 215.0  # TFLOP/s


@dataclass(frozen=True)
class Plan:
    """A Plan is one case. weight: its share of the time. compiled: there is time for torch.compile. slow: steps take
    seconds.
    """

    model: str
    workload: Workload
    dtype: str
    objective: str = CLASSES
    weight: float = 1.0
    compiled: bool = False
    slow: bool = False

    @property
    def name(self) -> str:
        return OBJECTIVES[self.objective] + self.workload.name


@dataclass(frozen=True)
class PretrainPlan:
    """A PretrainPlan is one case of pre-training. tokens: of a step, at most. weight, compiled: as in Plan."""

    model: str
    max_length: int
    tokens: int
    dtype: str
    weight: float = 1.0
    compiled: bool = False

    @property
    def name(self) -> str:
        return f"pretrain S{self.max_length}, {self.tokens:,} tokens"


def cases(device_type: str, *, long: bool = False) -> list[Case]:
    """Returns the cases for "cuda" or "cpu", the most important first. long: the run has time for torch.compile."""
    plans = cuda_plans() if device_type == "cuda" else cpu_plans()
    made = [_case(dataclasses.replace(plan, compiled=long and not plan.slow), device_type) for plan in plans]
    pretraining = [
        _pretrain_case(dataclasses.replace(plan, compiled=long), device_type) for plan in pretrain_plans(device_type)
    ]
    if device_type == "cuda":
        return [_attention_case(), *pretraining, *made]
    first = [case for case in made if not case.late]
    return [*first, *pretraining, *made[len(first) :]]


def _case(plan: Plan, device_type: str) -> Case:
    return Case(
        SUITE, plan.name, plan.model, plan.dtype, device_type, ("model",), functools.partial(build, plan),
        setting=STEP, weight=plan.weight, scale=BASE_SCALE if plan.slow else None, late=plan.slow,
    )  # fmt: skip


def _pretrain_case(plan: PretrainPlan, device_type: str) -> Case:
    return Case(
        SUITE, plan.name, plan.model, plan.dtype, device_type, ("model",), functools.partial(build_pretraining, plan),
        setting=STEP, weight=plan.weight,
    )  # fmt: skip


def _attention_case() -> Case:
    workload = workloads.fixed(512, 128)

    def made(device: torch.device) -> Built:
        built = train_attention.build(*ATTENTION, workload.lengths, torch.bfloat16, device)
        return dataclasses.replace(built, bars=(Bar(OURS, BAR_ATTENTION, RATE),))

    name = f"attention, {workload.name}"
    return Case(SUITE, name, "BERT-base", BF16, "cuda", ("attention",), made, setting=STEP, weight=0.5)


def cuda_plans() -> list[Plan]:
    """Returns the plans for a GPU, the most important for a short run first."""
    fixed, half_padded = workloads.fixed, workloads.half_padded
    return [
        Plan("BERT-base", half_padded(512, 32), BF16),
        Plan("BERT-large", fixed(512, 32), BF16, PRETRAINING),
        Plan("BERT-base", fixed(512, 32), BF16, WORDS),
        Plan("BERT-large", half_padded(512, 32), BF16),
        Plan("BERT-base", fixed(128, 128), BF16),
        Plan("MiniLM", half_padded(128, 128), BF16),
        Plan("BERT-large", fixed(512, 32), BF16),
        Plan("BERT-base", half_padded(512, 32), FP32),
    ]


def cpu_plans() -> list[Plan]:
    """Returns the plans for a CPU. There a step of BERT-base takes seconds, so it comes after all suites."""
    fixed, half_padded = workloads.fixed, workloads.half_padded
    dtypes = cpu_dtypes()
    minilm = [Plan("MiniLM", workload(128, 16), dtype) for dtype in dtypes for workload in (half_padded, fixed)]
    base = [Plan("BERT-base", make(128, 4), dtype, slow=True) for dtype in dtypes for make in (half_padded, fixed)]
    return minilm + base


def pretrain_plans(device_type: str) -> list[PretrainPlan]:
    """Returns the plans of pre-training: a whole batch of `fastbert pretrain` on a GPU, half of one on a CPU."""
    if device_type == "cuda":
        return [
            PretrainPlan(model, 512, 16_384, BF16, weight)
            for model, weight in (("BERT-large", 2.0), ("BERT-base", 1.5))
        ]
    return [PretrainPlan("MiniLM", 128, 2_048, dtype) for dtype in cpu_dtypes()]


def cpu_dtypes() -> list[str]:
    return [FP32, BF16] if fast_at_bfloat16(torch.device("cpu")) else [FP32]


def build_pretraining(plan: PretrainPlan, device: torch.device) -> Built:
    """Builds the contest of a step of pre-training."""
    task = PretrainTask(plan.model, plan.max_length, plan.tokens, getattr(torch, plan.dtype), device)
    peers = [_if_compiled(peer, plan.compiled) for peer in pretrain_peers(task)]
    timing = {"warmup": 1} | (SLOW if device.type == "cpu" else {})
    return dataclasses.replace(
        train_pretraining.build(task, peers), timing=timing, bars=pretrain_bars(plan, device.type)
    )


def pretrain_bars(plan: PretrainPlan, device_type: str) -> tuple[Bar, ...]:
    """Returns the goals of a step of `fastbert pretrain`."""
    if device_type == "cuda":
        tokens = PRETRAIN_BARS_TOKENS.get(plan.model)
        over = [Bar(OURS, least, other) for other, least in GPU_BARS]
        return (*over, *([] if tokens is None else [Bar(OURS, tokens, TOKENS)]))
    if plan.dtype == FP32:
        return (Bar(OURS, PRETRAIN_CPU_BAR, SDPA.name),)
    return (Bar(OURS, CPU_BAR_BF16, FastBert32.name),)


def _if_compiled(peer: Trained, has_time: bool, reason: str = f"needs a run of {LONG_MINUTES:g} minutes") -> Peer:
    return LeftOut(peer.name, reason) if isinstance(peer, Compiled) and not has_time else peer


def build(plan: Plan, device: torch.device, peers_of: Callable[[TrainTask], Sequence[Trained]] = train_peers) -> Built:
    """Builds the contest of one plan. peers_of: the competitors."""
    workload = plan.workload
    task = TrainTask(plan.model, workload.lengths, getattr(torch, plan.dtype), device, plan.objective)
    reasons = ["takes too long to compile here"] if plan.slow else []
    peers = [_if_compiled(peer, plan.compiled, *reasons) for peer in peers_of(task)]
    forward = models.flops(task.config, workload.lengths)
    extra = {
        "length": max(workload.lengths),
        "batch": len(workload.lengths),
        "description": workload.description,
        "padding_waste_of_workload": workload.padding_waste(),
    }
    timing = {"warmup": 1} | (SLOW if plan.slow else {})
    # Each product of the forward pass has two in the backward pass.
    laps = {FORWARD: Work(forward), BACKWARD: Work(2 * forward)}
    return Built(
        peers, Eager.name, task.reference(), workload.tokens, len(workload.lengths), Work(3 * forward), extra, timing,
        laps, bars_of(plan, device.type),
    )  # fmt: skip


def bars_of(plan: Plan, device_type: str) -> tuple[Bar, ...]:
    """Returns the goals of our own model and of an accelerated one."""
    both = OURS, Accelerated.name
    if device_type == "cuda":
        tokens = BARS_TOKENS.get((plan.model, plan.objective))
        over = [Bar(name, least, other) for other, least in GPU_BARS for name in both if plan.dtype == BF16]
        return (*over, *([] if tokens is None else [Bar(OURS, tokens, TOKENS)]))
    if plan.dtype == FP32:
        varied = len(set(plan.workload.lengths)) > 1
        return tuple(Bar(name, CPU_BARS[varied], SDPA.name) for name in both)
    return tuple(Bar(name, CPU_BAR_BF16, FastBert32.name) for name in both)
