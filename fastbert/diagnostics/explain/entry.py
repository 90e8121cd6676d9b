"""What would run, and why: for every operation of a model its backend, kernel, block sizes and fallback reason.

Nothing runs on data. `explain` asks the same questions that the operations ask when they run.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from fastbert import adapters
from fastbert.diagnostics.explain import costs as explain_costs
from fastbert.diagnostics.explain.costs import BatchReport
from fastbert.diagnostics.explain.operations import Explainer, backbone, find_model, float32_precision, prefix_of
from fastbert.diagnostics.explain.report import OpReport, Report
from fastbert.engine import buckets, quantized
from fastbert.engine.listeners import names_of_listened
from fastbert.models.pretrained import PreTrainedModel, listed, resolve_dtype
from fastbert.ops import Policy
from fastbert.text.tokenizer import Tokenizer

__all__ = [
    "BatchReport",
    "OpReport",
    "Report",
    "backbone",
    "explain",
    "find_model",
    "float32_precision",
    "prefix_of",
]


def explain(
    model: Any,
    batch: Any = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    backend: str | None = None,
    strict: bool | None = None,
    arch: int | None = None,
    tokenizer: Tokenizer | None = None,
) -> Report:
    """Which backend and kernel would run each operation of the model, with which block sizes, and why.

    model: a BertModel, a model with a head, a SentenceEncoder, a module that wraps one, or an accelerated model of
    another library, of which the report has the encoder and the counts of calls. Its device, dtype, backend,
    strictness and training mode count, and autocast where it is on; the keywords ask what would be if the first four
    were others. arch: compute capability of a GPU as one integer, 90 for 9.0, which need not be there.

    batch: what a batch of yours costs, too: its tokens beside those of a padded one, estimated FLOPs and bytes in all
    and of each operation (`fastbert.diagnostics.explain.costs` says how they are counted). Texts, for a SentenceEncoder
    or with a tokenizer; lists of token ids; lengths in tokens; a (B, S) tensor of ids, alone or in a tuple with its
    mask; a dict with attention_mask or input_ids.

    Raises TypeError for what is no such model or batch, ValueError for a device that is not there or an argument that
    is none.
    Neither raises nor logs because of a fallback: under strict, `raises` of its row says that running would.
    """
    try:
        inner = find_model(model)
    except adapters.Unsupported:
        return _unfollowed(model)
    given = model if inner in adapters.modules(model) else inner  # of an accelerated model, its encoder on our side
    wanted = inner.policy
    policy = Policy(
        wanted.backend if backend is None else backend,
        wanted.strict if strict is None else strict,
        wanted.batch_invariant,
    )
    where = _device(inner.device if device is None and arch is None else torch.device(device or "cuda"), arch)
    cast = None if dtype is None else resolve_dtype(dtype, inner.config, {})
    explainer = Explainer(inner, policy, where, cast, arch)
    rows = tuple(explainer.rows(given))
    dtype = inner.dtype if cast is None else cast
    costs = None
    if batch is not None:
        here = all(asked is None for asked in (device, cast, backend, arch))
        rows, costs = explain_costs.with_costs(
            rows, batch, model, backbone(inner), dtype.itemsize, here, tokenizer
        )  # fmt: skip
    notes = []
    if explainer.eight_bit is not None and explainer.eight_bit.reason is not None:
        unquantised = explainer.eight_bit.backend == quantized.UNQUANTISED
        instead = "falls back to the unquantised path" if unquantised else "falls back to the C++ kernels for CPUs"
        instead = "running raises BackendError" if policy.strict else instead
        notes.append(f"precision {inner.precision!r}: {instead}: {explainer.eight_bit.reason}")
    if inner.precision is not None and inner.training:
        notes.append(f"precision {inner.precision!r} is for inference: running in training mode raises RuntimeError")
    if inner.config.extra.get("output_attentions"):
        instead = "running raises BackendError" if policy.strict else "the slow reference path runs instead"
        notes.append(f"config.output_attentions is set, and fused attention keeps no probabilities: {instead}")
    listened = list(names_of_listened(inner))
    if listened:
        cost = "rows are padded for them and packed again, which costs time, and nothing is fused there"
        notes.append(f"{listed(listened)} has hooks or a forward of its own: {cost}")
    notes += _launch_notes(rows, inner, where)
    in_int8 = explainer.eight_bit is not None and explainer.eight_bit.backend == "cpu"
    notes += _one_call(inner, policy, where, dtype, in_int8)
    if policy.batch_invariant and where.type == "cpu" and policy.backend != "triton":
        notes.append("batch_invariant on a CPU is for inference: with gradients running raises BackendError")
    if dtype == torch.float32 and where.type == "cuda":
        notes.append(f"float32 multiplies in {float32_precision()}: PyTorch's own switch")
    if inner.dtype_choice is not None and cast is None:
        notes.append(inner.dtype_choice)
    calls = adapters.counts(model)
    if given is not model:
        notes += adapters.notes(model)
    return Report(
        model=type(model).__name__,
        device=str(where) if arch is None else f"{where} of compute capability {arch / 10}",
        dtype=str(dtype).removeprefix("torch."),
        backend=policy.backend,
        strict=policy.strict,
        rows=rows,
        notes=tuple(notes),
        batch_invariant=policy.batch_invariant,
        precision=inner.precision,
        batch=costs,
        calls=calls,
    )


def _unfollowed(model: Any) -> Report:
    """Of an accelerated model that always runs as before."""
    parameter = next(p for module in adapters.modules(model) for p in module.parameters())
    where, dtype = str(parameter.device), str(parameter.dtype).removeprefix("torch.")
    notes, name = tuple(adapters.notes(model)), type(model).__name__
    return Report(name, where, dtype, "none", False, (), notes, calls=adapters.counts(model))


def _launch_notes(rows: Iterable[OpReport], model: PreTrainedModel, device: torch.device) -> Iterator[str]:
    """How many kernels the encoder launches, and whether as one. Where cuBLAS splits a GEMM along K it adds another."""
    n_layers, in_layers, others = model.config.num_hidden_layers, 0, 0
    for row in rows:
        _, in_layer, name = row.module.partition("encoder.layer.")
        if not in_layer and row.op != "embedding" and not row.module.endswith("embeddings_project"):
            continue
        if row.launches is None:
            return
        if in_layer:
            first, _, last = name.partition(".")[0].partition("-")
            in_layers += row.launches * (int(last or first) - int(first) + 1)
        else:
            others += row.launches
    yield f"launches: {in_layers / n_layers:.3g} kernels a layer, {in_layers + others} from ids to last hidden state"
    if device.type != "cuda":
        return
    with torch.no_grad():
        bert = backbone(model)
        obstacles = "; ".join(bert.engine.graph_obstacles(bert, device))
    inside = f"a batch of up to {buckets.LARGEST} tokens is one launch, without gradients"
    yield f"CUDA graphs: {f'none: {obstacles}' if obstacles else inside}"


def _one_call(
    model: PreTrainedModel, policy: Policy, device: torch.device, dtype: torch.dtype, in_int8: bool
) -> Iterator[str]:
    """Whether the encoder's operations on a CPU run in one call. in_int8: as precision="int8" runs there."""
    if device.type != "cpu":
        return
    bert = backbone(model)
    with torch.no_grad():
        obstacles = "" if in_int8 else "; ".join(bert.engine.one_call_obstacles(bert, policy, device, dtype))
    inside = "without gradients, the encoder's operations run in one call of fastbert_kernels.cpu"
    yield f"one call: {f'no: {obstacles}' if obstacles else inside}"


def _device(device: torch.device, arch: int | None) -> torch.device:
    if arch is not None:
        if isinstance(arch, bool) or not isinstance(arch, int) or not 30 <= arch < 1000:
            raise ValueError(f"arch: expected a compute capability as one integer, 90 for 9.0, got {arch!r}")
        if device.type != "cuda":
            raise ValueError(f"arch: asks about an NVIDIA GPU, but device is {str(device)!r}")
    elif device.type == "cuda":
        n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= n_gpus:
            hint = "arch=90, for example, asks about one that is not there"
            raise ValueError(f"device: got {str(device)!r}, but there are {n_gpus} GPUs; {hint}")
    elif device.type == "meta":
        raise ValueError("device: the model is on 'meta', where nothing runs; pass device= or arch=")
    return device


# `fastbert.explain` is a public function and this module: importing the module binds its name in the package.
class _CallableModule(types.ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Report:
        return explain(*args, **kwargs)


__signature__ = inspect.signature(explain)
sys.modules[__name__].__class__ = _CallableModule
