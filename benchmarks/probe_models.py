"""The probe measures whole models in these sections: latency, the host's time, throughput, time by kernel."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import suite_kernels
import torch
from suites import tidy
from torch import Tensor

import models
from fastbert import BertConfig, BertModel, reference
from fastbert.bench.measure import rms_error
from fastbert.engine import buckets
from fastbert.ops import packing

if TYPE_CHECKING:
    from probe_pieces import Probe

BF16 = torch.bfloat16
DEPENDENT = "graphs, dependent launches"
SHORT = 512  # tokens of a batch that is also measured with dependent launches, at most
FIRST = 600  # tokens of the first sequences of a batch, which are compared with float64
TINY = BertConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128, vocab_size=200)
Case = tuple[str, str | None, list[int]]  # model, precision, lengths


def model_cases(tiny: bool) -> list[Case]:
    """Returns the cases, (model, precision, lengths), the most informative first."""
    if tiny:
        return [("BERT-base", None, [9, 4]), ("MiniLM", "fp8", [9, 4]), ("BERT-large", "int8", [5])]
    squad = list(suite_kernels.lengths_of("squad", 160_000))
    plain = [
        ("BERT-base", [512] * 32), ("BERT-base", [128] * 32), ("BERT-base", [128]), ("BERT-base", [16]),
        ("MiniLM", [128] * 128), ("MiniLM", [16]), ("BERT-large", squad), ("BERT-large", [512] * 32),
    ]  # fmt: skip
    eight = [
        (model, precision, lengths)
        for precision in ("fp8", "int8")
        for model, lengths in (("BERT-large", squad), ("BERT-large", [512] * 32), ("BERT-base", [512] * 32))
    ]
    return [(model, None, lengths) for model, lengths in plain] + eight


def model_of(probe: Probe, name: str, precision: str | None) -> Any:
    """Returns a BertModel in bf16: MiniLM with its weights if they exist, else random weights with sharper queries and
    keys.
    """
    settings: dict[str, Any] = {"backend": "triton", "strict": True, "precision": precision}
    folder = probe.model or models.minilm_folder()
    if name == "MiniLM" and folder is not None and not probe.tiny:
        model = BertModel.from_pretrained(folder, dtype=BF16, device=probe.device, **settings)
        return model.eval().requires_grad_(False)
    config = TINY if probe.tiny else models.CONFIGS[name]
    with torch.device(probe.device):
        model = BertModel(config, add_pooling_layer=False, **settings)
    for layer in model.encoder.layer:
        for linear in (layer.attention.self.query, layer.attention.self.key):
            linear.weight.data.mul_(models.SHARPER)
    return model.to(BF16).eval().requires_grad_(False)


def first_of(lengths: list[int]) -> list[int]:
    """Returns the first sequences, at least one, that have FIRST tokens together."""
    taken: list[int] = []
    for length in lengths:
        taken.append(length)
        if sum(taken) >= FIRST:
            break
    return taken


def exact_states(model: Any, ids: Tensor, lengths: list[int]) -> Tensor:
    """Returns the last hidden states of sequences one after the other, (T', H) float64, from the model's weights."""
    params = {name: p.double() for name, p in model.named_parameters()}
    states = [
        reference.bert(params, model.config, part[None], output_attentions=False).last_hidden_state[0]
        for part in ids[: sum(lengths)].split(lengths)
    ]
    return torch.cat(states)


def measure_models(probe: Probe) -> None:
    """Measures latency with checks, the host's time, and throughput without checks, with graphs and without."""
    cases = model_cases(probe.tiny)
    for name, precision in dict.fromkeys((name, precision) for name, precision, _ in cases):
        batches = [lengths for other, wanted, lengths in cases if (other, wanted) == (name, precision)]
        probe.attempt(name, "load", partial(measure_model, probe, name, precision, batches), precision or "bfloat16")
        tidy(probe.device)


def measure_model(probe: Probe, name: str, precision: str | None, batches: list[list[int]]) -> None:
    model = model_of(probe, name, precision)
    for lengths in batches:
        what = batch_name(name, lengths)
        for label, with_graphs in (("graphs", True), (DEPENDENT, True), ("plain", False)):
            largest = SHORT if label == DEPENDENT else buckets.LARGEST
            if not with_graphs or sum(lengths) <= largest:
                piece = partial(timed, probe, model, lengths, with_graphs, what, label)
                probe.attempt(what, label, piece, precision or "bfloat16")


@contextmanager
def launched_as(model: Any, label: str) -> Iterator[None]:
    """Launches kernels dependently inside if the label says so, with graphs captured in the same way."""
    from fastbert_kernels import dependent

    if label != DEPENDENT:
        yield
        return
    dependent.use(True)
    model.engine.graphs.clear()
    try:
        yield
    finally:
        dependent.use(None)
        model.engine.graphs.clear()


def batch_name(model: str, lengths: list[int]) -> str:
    return f"{model}, {len(lengths)} texts, {sum(lengths)} tokens"


@torch.inference_mode()
def timed(probe: Probe, model: Any, lengths: list[int], with_graphs: bool, what: str, label: str) -> None:
    """Adds one row for a model on one batch."""
    with launched_as(model, label):
        timed_so(probe, model, lengths, with_graphs, what, label)


def timed_so(probe: Probe, model: Any, lengths: list[int], with_graphs: bool, what: str, label: str) -> None:
    model.cuda_graphs = with_graphs
    n = sum(lengths)
    ids = torch.randint(0, model.config.vocab_size, (n,), device=probe.device)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    first = first_of(lengths)

    def checked() -> Tensor:
        return model.forward_packed(ids, cu_seqlens)

    def unchecked() -> None:
        model.encode_packed(packing.from_lengths(lengths, probe.device), ids, check=False)

    error = rms_error(checked()[: sum(first)], exact_states(model, ids, first))
    for _ in range(1 if probe.tiny else 3):
        checked(), unchecked()
    latencies, hosts = [], []
    for _ in range(1 if probe.tiny else 10):
        probe.wait()
        started = time.perf_counter()
        checked()
        probe.wait()
        latencies.append(time.perf_counter() - started)
        started = time.perf_counter()
        unchecked()
        hosts.append(time.perf_counter() - started)
    probe.wait()
    count = 1 if probe.tiny else 20 if n < 50_000 else 4
    started = time.perf_counter()
    for _ in range(count):
        unchecked()
    probe.wait()
    each = (time.perf_counter() - started) / count
    probe.add(
        what, label, model.precision or "bfloat16", seconds=each, tokens=n, tokens_per_second=n / each, error=error,
        latency_us=1e6 * statistics.median(latencies), host_us=1e6 * statistics.median(hosts),
        graphs=len(model.engine.graphs),
    )  # fmt: skip


def measure_profile(probe: Probe) -> None:
    """Measures the time on the device by kernel, without graphs, which hide names."""
    wanted = [case for case in model_cases(probe.tiny) if case[0] != "MiniLM" and case[2] != [16]]
    for name, precision, lengths in wanted[:1] if probe.tiny else wanted:
        piece = partial(profiled, probe, name, precision, lengths)
        probe.attempt(batch_name(name, lengths), "profile", piece, precision or "bfloat16")
        tidy(probe.device)


@torch.inference_mode()
def profiled(probe: Probe, name: str, precision: str | None, lengths: list[int]) -> None:
    """Adds a row for each of the ten slowest kernels."""
    from torch.profiler import ProfilerActivity, profile

    activity = ProfilerActivity.CUDA if probe.on_gpu else ProfilerActivity.CPU
    kind = torch.autograd.DeviceType.CUDA if probe.on_gpu else torch.autograd.DeviceType.CPU
    model = model_of(probe, name, precision)
    model.cuda_graphs = False
    ids = torch.randint(0, model.config.vocab_size, (sum(lengths),), device=probe.device)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    for _ in range(2):
        model.forward_packed(ids, cu_seqlens)
    probe.wait()
    with profile(activities=[activity]) as profiler:
        model.forward_packed(ids, cu_seqlens)
        probe.wait()
    times_by_kernel: dict[str, list[float]] = {}
    for event in profiler.events():
        if event.device_type == kind:
            times_by_kernel.setdefault(event.name[:60], []).append(event.time_range.elapsed_us())
    total = sum(map(sum, times_by_kernel.values()))
    for kernel, times in sorted(times_by_kernel.items(), key=lambda item: -sum(item[1]))[:10]:
        share = {"seconds": sum(times) / 1e6, "calls": len(times), "share": sum(times) / total}
        probe.add(batch_name(name, lengths), kernel, precision or "bfloat16", **share)
