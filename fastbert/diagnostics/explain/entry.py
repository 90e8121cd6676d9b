"""`explain` reports for each operation its backend, kernel, block sizes and fallback reason.

No kernel runs on data. The model's own code runs once on stand-ins, and its operations record their decisions.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from fastbert import adapters
from fastbert.diagnostics.explain import above, training
from fastbert.diagnostics.explain import costs as explain_costs
from fastbert.diagnostics.explain import notes as explain_notes
from fastbert.diagnostics.explain.dry_run import Question
from fastbert.diagnostics.explain.model import backbone, find_model, float32_precision, prefix_of
from fastbert.diagnostics.explain.report import BatchReport, OpReport, Report
from fastbert.diagnostics.explain.rows import rows_that_run
from fastbert.models.pretrained import resolve_dtype
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
    """Tells which backend and kernel would run each operation of the model, with which block sizes, and why.

    model: a BertModel, a model with a head, a SentenceEncoder, a module that wraps one, or an accelerated model of
    another library (the report describes its encoder and counts its calls). The report is for the model's present
    device, dtype, backend, strict and training mode, and for the present autocast. The keywords replace the first four.
    arch: the compute capability of any GPU as one integer, 90 for 9.0; the machine does not need it.

    batch: a batch whose cost the report adds: its tokens, those of a padded batch, estimated FLOPs and bytes in all and
    for each operation (`fastbert.diagnostics.explain.costs` describes the counts). It is texts, for a SentenceEncoder
    or with a tokenizer; lists of token ids; lengths in tokens; a (B, S) tensor of ids, alone or in a tuple with its
    mask; or a dict with attention_mask or input_ids.

    Raises TypeError for another model or batch, and ValueError for a missing device or an unknown argument. A fallback
    neither raises nor logs here: with strict=True, `raises` of its row says that a call would raise.
    """
    try:
        inner = find_model(model)
    except adapters.Unsupported:
        return _unfollowed(model)
    outer = model if inner in adapters.modules(model) else inner  # for an accelerated model, its fastbert encoder
    wanted = inner.policy
    policy = Policy(
        wanted.backend if backend is None else backend,
        wanted.strict if strict is None else strict,
        wanted.batch_invariant,
    )
    where = _device(inner.device if device is None and arch is None else torch.device(device or "cuda"), arch)
    cast = None if dtype is None else resolve_dtype(dtype, inner.config, {})
    question = Question(inner, outer, policy, where, cast, arch)
    eight_bit = above.eight_bit_decision(backbone(inner), policy, where, question.dtype, arch)
    rows = tuple(rows_that_run(question, eight_bit))
    costs = None
    if batch is not None:
        as_it_is = all(asked is None for asked in (device, cast, backend, arch))
        itemsize = question.dtype.itemsize
        rows, costs = explain_costs.with_costs(rows, batch, model, backbone(inner), itemsize, as_it_is, tokenizer)
        costs = dataclasses.replace(costs, kept_bytes=training.kept_by_a_batch(question, costs.n_tokens))
    notes = [*explain_notes.notes_of(question, eight_bit, rows)]
    if outer is not model:
        notes += adapters.notes(model)
    return Report(
        model=type(model).__name__,
        device=str(where) if arch is None else f"{where} of compute capability {arch / 10}",
        dtype=str(question.dtype).removeprefix("torch."),
        backend=policy.backend,
        strict=policy.strict,
        rows=rows,
        notes=tuple(notes),
        batch_invariant=policy.batch_invariant,
        precision=inner.precision,
        batch=costs,
        calls=adapters.counts(model),
    )


def _unfollowed(model: Any) -> Report:
    """Reports on an accelerated model for which the original code always runs."""
    parameter = next(p for module in adapters.modules(model) for p in module.parameters())
    where, dtype = str(parameter.device), str(parameter.dtype).removeprefix("torch.")
    notes, name = tuple(adapters.notes(model)), type(model).__name__
    return Report(name, where, dtype, "none", False, (), notes, calls=adapters.counts(model))


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
        raise ValueError("device: the model is on 'meta', where no kernel runs; pass device= or arch=")
    return device
