"""This module writes a report's notes on precision, hooks, launches, CUDA graphs and calls of the encoder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from fastbert.diagnostics.explain import above, training
from fastbert.diagnostics.explain.dry_run import Question
from fastbert.diagnostics.explain.model import backbone, float32_precision
from fastbert.diagnostics.explain.report import OpReport
from fastbert.engine.listeners import names_of_listened
from fastbert.models.pretrained import listed
from fastbert.ops import masked
from fastbert.ops.dispatch import Decision


def notes_of(question: Question, eight_bit: Decision | None, rows: Iterable[OpReport]) -> Iterator[str]:
    """Yields the notes of a report. eight_bit: the result of `eight_bit_decision`."""
    model, policy, device = question.model, question.policy, question.device
    if eight_bit is not None and eight_bit.reason is not None:
        unquantised = above.is_unquantised(eight_bit)
        instead = "falls back to the unquantised path" if unquantised else "falls back to the C++ kernels for CPUs"
        instead = "running raises BackendError" if policy.strict else instead
        yield f"precision {model.precision!r}: {instead}: {eight_bit.reason}"
    if model.precision is not None and model.training:
        yield f"precision {model.precision!r} is for inference: running in training mode raises RuntimeError"
    if model.config.extra.get("output_attentions"):
        instead = "running raises BackendError" if policy.strict else "the slow reference path runs instead"
        yield f"config.output_attentions is set, and fused attention does not store the probabilities: {instead}"
    names = list(names_of_listened(model))
    if names:
        cost = "rows are padded for them and packed again, which takes time, and no operations are fused there"
        yield f"{listed(names)} has hooks or a forward of its own: {cost}"
    if (sharing := backbone(model).encoder.sharing) is not None:
        yield sharing
    yield from training.notes(question)
    yield from _launches(question, rows)
    if device.type == "cpu":
        yield _one_call(question, eight_bit)
    if policy.batch_invariant and device.type == "cpu" and policy.backend != "triton":
        yield "batch_invariant on a CPU is for inference: with gradients running raises BackendError"
    if question.dtype == torch.float32 and device.type == "cuda":
        yield f"float32 multiplies in {float32_precision()}: PyTorch's own switch"
    if model.dtype_choice is not None and question.cast is None and question.dtype == model.dtype_choice[0]:
        yield model.dtype_choice[1]


def _launches(question: Question, rows: Iterable[OpReport]) -> Iterator[str]:
    """Counts the kernels that the encoder launches. cuBLAS adds another launch if it splits a GEMM along K."""
    layers: Any = backbone(question.model).encoder.in_order
    in_layers, others = 0, 0
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
    yield f"launches: {in_layers / len(layers):.3g} kernels a layer, {in_layers + others} from ids to last hidden state"
    if question.device.type == "cuda":
        obstacles = "; ".join(above.graph_obstacles(backbone(question.model), question.device))
        inside = f"a batch of up to {above.largest_graph()} tokens is one launch, without gradients"
        yield f"CUDA graphs: {f'none: {obstacles}' if obstacles else inside}"
        obstacles = "; ".join(above.mask_obstacles(backbone(question.model), question.device))
        inside = f"up to {masked.MOST_PLACES} places are packed there, and the lengths of more waited for"
        yield f"masks on the GPU: {f'the host waits for their lengths: {obstacles}' if obstacles else inside}"


def _one_call(question: Question, eight_bit: Decision | None) -> str:
    """Tells whether the encoder's operations on a CPU run in one call."""
    obstacles = ""
    if eight_bit is None or eight_bit.backend != "cpu":
        bert = backbone(question.model)
        obstacles = "; ".join(above.one_call_obstacles(bert, question.policy, question.device, question.dtype))
    inside = "without gradients, the encoder's operations run in one call of fastbert_kernels.cpu"
    return f"one call: {f'no: {obstacles}' if obstacles else inside}"
