"""This module runs the model, the float64 reference and plain PyTorch on the same tokens, for `verify`.

B sequences of n tokens, S the longest, H hidden, L layers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastbert import reference
from fastbert.diagnostics.verify.bounds import FACTOR, FACTOR_ALONE_16, FACTOR_ALONE_32, FACTOR_ALONE_FEW
from fastbert.diagnostics.verify.eager import eager_bert, eager_layer, eager_pooler
from fastbert.diagnostics.verify.ends import End
from fastbert.diagnostics.verify.findings import QuantizedReport, StateReport, VectorReport
from fastbert.diagnostics.verify.measures import error_report, measure, state_report, vector_report
from fastbert.diagnostics.verify.rows import Row, chunks, padded
from fastbert.engine import Block, quantized
from fastbert.models.encoder import EncoderModel
from fastbert.models.inputs import Inputs
from fastbert.ops import Policy

# The most texts of one run. The model's are in the user's order, so that lengths mix; the reference's are sorted.
MODEL_ROWS, MODEL_TOKENS = 64, 8192
REFERENCE_ROWS, REFERENCE_TOKENS = 16, 1024
# The most tokens of one run if a head gives a number for every token of the vocabulary.
DECODER_TOKENS = 1024

Parts = list[Any]  # for each state a tensor of every text: (n, H), or (1, ...) for the pooled output and vectors


@dataclass
class Comparison:
    """A `Comparison` holds the reports of one comparison, as in `Findings`."""

    states: tuple[StateReport, ...]
    vectors: VectorReport | None = None
    quantized: QuantizedReport | None = None
    last: StateReport | None = None


@torch.no_grad()
def compare(
    bert: EncoderModel, rows: list[Row], prefix: str, ends: Sequence[End] = (), model: Any = None
) -> Comparison:
    """Runs the model, the reference and eager, and compares every state, the pooled output and the ends.

    model: the model of `ends`, by default the encoder.
    """
    in_8_bits = bert.precision is not None and _runs_in_8_bits(bert)
    n_layers = len(bert.encoder.in_order)
    names = [f"{prefix}embeddings", *(f"{prefix}encoder.layer.{i}" for i in range(n_layers))]
    names += [f"{prefix}pooler"] * (bert.pooler is not None) + [end.name for end in ends]
    whole, alone = (torch.zeros(len(names), len(rows), 5, dtype=torch.float64, device="cpu") for _ in range(2))
    last = torch.zeros(len(rows), 5, dtype=torch.float64, device="cpu")
    vectors: list[list[Any]] = [[None] * len(rows) for _ in range(3)]  # fastbert's, the reference's, eager's
    from_encode = bool(ends) and ends[-1].is_vectors
    parameters = dict(bert.named_parameters())
    on_cpu = {name: parameter.cpu() for name, parameter in parameters.items()}
    blocks: list[Block] = []
    blocks_on_cpu: list[Block] = []
    modes = {module: module.training for module in (model or bert).modules()}
    max_tokens = DECODER_TOKENS if any(end.name.endswith("cls.predictions") for end in ends) else MODEL_TOKENS
    try:
        for module in modes:  # eval() would renew fused weights, but `verify` must detect outdated ones
            module.training = False
        for chunk in chunks(range(len(rows)), rows, MODEL_ROWS, max_tokens):
            texts = [rows[i] for i in chunk]
            ours, direct = _run(bert, texts, ends), _run_directly(bert, texts)
            emulated = _run_emulation(bert, texts, ends) if in_8_bits else []
            by_length = sorted(range(len(chunk)), key=lambda j: len(texts[j][0]))
            for group in chunks(by_length, texts, REFERENCE_ROWS, REFERENCE_TOKENS):
                sizes = [len(texts[j][0]) for j in group]
                inputs = padded([texts[j] for j in group])
                exact = _reference(on_cpu, bert, inputs, sizes, ends)
                if not blocks:  # the reference has refused adapters, which have no blocks
                    blocks = list(bert.blocks())
                    blocks_on_cpu = [block.mapped(Tensor.cpu) for block in blocks]
                if in_8_bits:
                    plain = [[state[j] for j in group] for state in emulated]
                else:
                    on_device = tuple(x.to(bert.device) for x in inputs)
                    plain = _with_ends(eager_bert(parameters, blocks, bert.config, *on_device), sizes, bert, ends)
                mine = [[state[j] for j in group] for state in ours]
                places = [chunk[j] for j in group]
                for s, (a, b, c) in enumerate(zip(mine, plain, exact, strict=True)):
                    for place, *parts in zip(places, a, b, c, strict=True):
                        whole[s, place] = measure(*parts)
                for place, j, b, c in zip(places, group, plain[n_layers], exact[n_layers], strict=True):
                    last[place] = measure(direct[j], b, c)
                if not in_8_bits:
                    weights = (parameters, blocks), (on_cpu, blocks_on_cpu)
                    _measure_alone(alone, places, bert, weights, inputs[1], mine, ends)
                for k, parts_of_texts in enumerate((mine, exact, plain)):
                    sources = parts_of_texts[-1 if from_encode else n_layers]
                    for place, state in zip(places, sources, strict=True):
                        vectors[k][place] = state.double().sum(0).cpu() / max(len(state), 1)
    finally:
        for module, mode in modes.items():
            module.training = mode
    states = tuple(_judged(names, whole, alone, s, bert, ends, in_8_bits) for s in range(len(names)))
    vectors_report = _vectors(vectors, "encode's" if from_encode else "the mean of the last hidden states")
    price = None
    if in_8_bits:
        figures = (math.nan, math.nan)
        if vectors_report is not None:
            figures = vectors_report.cosine[1], vectors_report.spearman
        price = QuantizedReport(bert.precision or "", len(rows), *figures)
    last_error = error_report(last, bert.dtype)
    last_report = state_report("the last hidden state, as it runs by itself", last, last_error, None)
    return Comparison(states, vectors_report, price, last_report)


def _vectors(vectors: list[list[Tensor]], source: str) -> VectorReport | None:
    """Returns the report of the texts' vectors, or None if one is not finite.

    vectors: fastbert's, the reference's, eager's.
    """
    stacked = [torch.stack(kind) for kind in vectors]
    finite = all(bool(kind.isfinite().all()) for kind in stacked)
    return vector_report(source, *stacked) if finite else None


def _judged(
    names: Sequence[str], whole: Tensor, alone: Tensor, s: int, bert: EncoderModel, ends: Sequence[End], in_8_bits: bool
) -> StateReport:
    """Returns the report of state s, with the bounds for its kind."""
    end = ends[s - len(names)] if s >= len(names) - len(ends) else None
    few = end is not None and end.few is not None
    if end is not None:
        factor, factor_alone = end.factor(whole.shape[1]), max(FACTOR_ALONE_FEW, end.factor(whole.shape[1]))
    else:
        factor, factor_alone = FACTOR, FACTOR_ALONE_32 if bert.dtype.itemsize > 2 else FACTOR_ALONE_16
        if s > len(bert.encoder.in_order):
            factor_alone = FACTOR_ALONE_FEW
    errors = error_report(whole[s], bert.dtype, factor=factor, each_text=not few)
    if few:  # eager's error varies by chance from 1/30 to 30 times fastbert's: only the part alone counts
        errors = dataclasses.replace(errors, bound=math.inf)
    errors_alone = None
    if s > 0 and not in_8_bits:
        errors_alone = error_report(alone[s], bert.dtype, factor_alone, each_text=not few)
    return state_report(names[s], whole[s], errors, errors_alone)


def _runs_in_8_bits(bert: EncoderModel) -> bool:
    """Tells whether a model with a precision runs in 8 bits, and not unquantised as a fallback."""
    decision = quantized.decide(bert, bert.policy, bert.device, bert.dtype)
    return decision.backend != quantized.UNQUANTISED


def _run(bert: EncoderModel, rows: list[Row], ends: Sequence[End]) -> Parts:
    """Returns the model's hidden states, then its pooled output, then its ends."""
    input_ids, mask, token_type_ids = (x.to(bert.device) for x in padded(rows))
    encoded = bert.encode(Inputs(input_ids, mask, token_type_ids, output_attentions=False, output_hidden_states=True))
    sizes = [len(row) for row, _ in rows]
    states: Parts = [state.split(sizes) for state in encoded.hidden_states or ()]
    pooled = bert.pool(encoded)
    if pooled is not None:
        states.append(pooled.split(1))
    for end in ends:
        output = end.run(encoded)
        states.append(output.split(sizes if end.tokens and not end.is_vectors else 1))
    return states


def _run_directly(bert: EncoderModel, rows: list[Row]) -> list[Tensor]:
    """Returns only the last hidden state, computed in one call or by a CUDA graph."""
    input_ids, mask, token_type_ids = (x.to(bert.device) for x in padded(rows))
    encoded = bert.encode(Inputs(input_ids, mask, token_type_ids, output_attentions=False, output_hidden_states=False))
    return list(encoded.last_hidden_state.split([len(row) for row, _ in rows]))


def _run_emulation(bert: EncoderModel, rows: list[Row], ends: Sequence[End]) -> Parts:
    """Does the same as `_run` with the emulation of the quantisation in plain PyTorch, from newly quantised weights."""
    policy, weights = bert.policy, bert.engine.eight_bit.weights
    bert.policy, bert.engine.eight_bit.weights = Policy("torch"), quantized.QuantizedWeights()
    try:
        return _run(bert, rows, ends)
    finally:
        bert.policy, bert.engine.eight_bit.weights = policy, weights


def _reference(
    parameters: Mapping[str, Tensor],
    bert: EncoderModel,
    inputs: tuple[Tensor, ...],
    sizes: list[int],
    ends: Sequence[End],
) -> Parts:
    """Does the same as `_run` with the reference in float64."""
    try:
        exact = reference.encode(parameters, bert.config, *inputs, output_attentions=False)
    except KeyError as error:
        hint = "adapters have to be merged into the weights first"
        raise ValueError(f"model: expected a parameter {error.args[0]}; {hint}") from error
    pooled = () if exact.pooler_output is None else (exact.pooler_output[:, None],)
    return _with_ends([*exact.hidden_states, *pooled], sizes, bert, ends)


def _with_ends(states: list[Tensor], sizes: list[int], bert: EncoderModel, ends: Sequence[End]) -> Parts:
    """Splits padded states, (B, S, H), and the pooled output into texts, and appends the ends."""
    n_states = len(bert.encoder.in_order) + 1
    parts: Parts = [[row[:n] for row, n in zip(state, sizes, strict=True)] for state in states[:n_states]]
    parts += [list(state) for state in states[n_states:]]
    return parts + [end.parts(parts[n_states - 1 if end.tokens else n_states]) for end in ends]


def _measure_alone(
    measures: Tensor, places: list[int], bert: EncoderModel, weights: tuple[Any, ...], mask: Tensor,
    ours: Parts, ends: Sequence[End],
) -> None:  # fmt: skip
    """Compares every part except the embeddings with eager and the reference, on the part's own input."""
    n_layers = len(bert.encoder.in_order)
    sizes = [len(part) for part in ours[0]]
    for s in range(1, len(ours)):
        end = ends[s - len(ours)] if s >= len(ours) - len(ends) else None
        source = min(s - 1, n_layers) if end is None else n_layers if end.tokens else n_layers + 1
        before = ours[source]
        if not all(bool(part.isfinite().all()) for part in before):
            continue  # this part does not cause results that follow from NaN
        if end is not None:
            outputs = [end.parts(before), end.parts([part.double() for part in before])]
        else:
            x = _stack(before, mask.shape[1])
            runs = (x, weights[0], mask.to(x.device)), (x.cpu().double(), weights[1], mask)
            if s <= n_layers:
                layers = [eager_layer(blocks[s - 1], y, m) for y, (_, blocks), m in runs]
                outputs = [[row[:n] for row, n in zip(state, sizes, strict=True)] for state in layers]
            else:
                outputs = [list(eager_pooler(parameters, y, m)) for y, (parameters, _), m in runs]
        for place, *parts in zip(places, ours[s], *outputs, strict=True):
            measures[s, place] = measure(*parts)


def _stack(parts: list[Tensor], length: int) -> Tensor:
    """Stacks parts, (n, H) each -> (B, length, H), with zeros at padding."""
    out = parts[0].new_zeros(len(parts), length, parts[0].shape[1])
    for row, part in zip(out, parts, strict=True):
        row[: len(part)] = part
    return out
