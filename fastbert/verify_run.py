"""The runs behind `verify`: the model, the float64 reference and plain PyTorch on the same tokens, and their errors.

B sequences of n tokens, S the longest, H hidden, N heads, D head size, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import quantized, reference
from fastbert.config import BertConfig
from fastbert.model import BertModel
from fastbert.ops import Policy
from fastbert.sentence import SentenceEncoder
from fastbert.sentence_layout import POOLING_MODES
from fastbert.sentence_run import Request, Run
from fastbert.verify_report import (
    BOUND_IN_FLOAT64,
    BOUND_WITHOUT_EAGER,
    FACTOR,
    FACTOR_ALONE_16,
    FACTOR_ALONE_32,
    FACTOR_ALONE_FEW,
    FACTOR_OF_ONE_TEXT,
    FACTOR_OF_VECTORS,
    ErrorReport,
    QuantizedReport,
    StateReport,
    VectorReport,
)

# Of the texts that run together: the model's in the order given, so that lengths mix; the reference's by length.
MODEL_ROWS, MODEL_TOKENS = 64, 8192
REFERENCE_ROWS, REFERENCE_TOKENS = 16, 1024
# Texts whose neighbours are compared: every text with every other.
MOST_COMPARED = 2000

Row = tuple[Tensor, Tensor]  # ids and segment ids of one text, (n,) int64 on the CPU
Parts = list[Any]  # of each state the part of every text, (n, H); of the pooled output and of vectors (1, ...)


@dataclass
class Findings:
    states: tuple[StateReport, ...]
    vectors: VectorReport | None = None
    quantized: QuantizedReport | None = None


@torch.no_grad()
def compare(bert: BertModel, rows: list[Row], prefix: str, encoder: SentenceEncoder | None = None) -> Findings:
    """Runs the model, the reference and eager, and compares every state, the pooled output and an encoder's vectors."""
    in_8_bits = bert.precision is not None and _runs_in_8_bits(bert)
    n_layers = len(bert.encoder.layer)
    names = [f"{prefix}embeddings", *(f"{prefix}encoder.layer.{i}" for i in range(n_layers))]
    names += [f"{prefix}pooler"] * (bert.pooler is not None) + ["vectors"] * (encoder is not None)
    measures, alone = (torch.zeros(len(names), len(rows), 5, dtype=torch.float64) for _ in range(2))
    vectors: list[list[Any]] = [[None] * len(rows) for _ in range(3)]  # ours, the reference's, eager's
    parameters = dict(bert.named_parameters())
    on_cpu = {name: parameter.cpu() for name, parameter in parameters.items()}
    modes = {module: module.training for module in (encoder or bert).modules()}
    try:
        for module in modes:  # not eval(), which renews fused weights that this is to find out of date
            module.training = False
        for chunk in _chunks(range(len(rows)), rows, MODEL_ROWS, MODEL_TOKENS):
            given = [rows[i] for i in chunk]
            ours = _run(bert, given, encoder)
            emulated = _run_emulation(bert, given, encoder) if in_8_bits else []
            by_length = sorted(range(len(chunk)), key=lambda j: len(given[j][0]))
            for group in _chunks(by_length, given, REFERENCE_ROWS, REFERENCE_TOKENS):
                sizes = [len(given[j][0]) for j in group]
                inputs = _padded([given[j] for j in group])
                exact = _reference(on_cpu, bert, inputs, sizes, encoder)
                if in_8_bits:
                    plain = [[state[j] for j in group] for state in emulated]
                else:
                    on_device = tuple(x.to(bert.device) for x in inputs)
                    plain = _finished(_eager(parameters, bert.config, *on_device), sizes, bert, encoder)
                mine = [[state[j] for j in group] for state in ours]
                places = [chunk[j] for j in group]
                for s, (a, b, c) in enumerate(zip(mine, plain, exact, strict=True)):
                    for place, *parts in zip(places, a, b, c, strict=True):
                        measures[s, place] = _measure(*parts)
                if not in_8_bits:
                    _measure_alone(alone, places, bert, (parameters, on_cpu), inputs[1], mine, encoder)
                for k, states in enumerate((mine, exact, plain)):
                    for place, state in zip(places, states[-1] if encoder else states[n_layers], strict=True):
                        vectors[k][place] = state.double().sum(0).cpu() / max(len(state), 1)
    finally:
        for module, mode in modes.items():
            module.training = mode
    found = []
    for s, name in enumerate(names):
        factor = FACTOR_ALONE_FEW if s > n_layers else FACTOR_ALONE_32 if bert.dtype.itemsize > 2 else FACTOR_ALONE_16
        by_itself = None if in_8_bits or s == 0 else _errors(alone[s], bert.dtype, factor)
        whole = _errors(measures[s], bert.dtype, factor=FACTOR_OF_VECTORS if name == "vectors" else FACTOR)
        found.append(_report(name, measures[s], whole, by_itself))
    stacked = [torch.stack(kind) for kind in vectors]
    what = "encode's" if encoder else "the mean of the last hidden states"
    finite = all(bool(kind.isfinite().all()) for kind in stacked)
    compared = _vector_report(what, *stacked) if finite else None
    coarse = None
    if in_8_bits:
        figures = (math.nan, math.nan) if compared is None else (compared.cosine[1], compared.spearman)
        coarse = QuantizedReport(bert.precision or "", len(rows), *figures)
    return Findings(tuple(found), compared, coarse)


def _runs_in_8_bits(bert: BertModel) -> bool:
    """Whether a model with a precision takes the 8-bit path, and not the unquantised one that it falls back to."""
    decision = quantized.decide(bert, bert.policy, bert.device, bert.dtype)
    return decision.backend != quantized.UNQUANTISED


def _run(bert: BertModel, rows: list[Row], encoder: SentenceEncoder | None) -> Parts:
    """The model's hidden states, then its pooled output, then the vectors."""
    ids, mask, kinds = (x.to(bert.device) for x in _padded(rows))
    encoded = bert.encode(ids, mask, kinds, output_attentions=False, output_hidden_states=True)
    sizes = [len(row) for row, _ in rows]
    states: Parts = [state.split(sizes) for state in encoded.hidden_states or ()]
    pooled = bert.pool(encoded)
    if pooled is not None:
        states.append(pooled.split(1))
    if encoder is not None:
        states.append(Run(encoder, Request())._pool(encoded.last_hidden_state, encoded.batch).split(1))
    return states


def _run_emulation(bert: BertModel, rows: list[Row], encoder: SentenceEncoder | None) -> Parts:
    """`_run` of the same quantisation in plain PyTorch, with weights quantised anew."""
    policy, weights = bert.policy, bert.quantized_weights
    bert.policy, bert.quantized_weights = Policy("torch"), quantized.QuantizedWeights()
    try:
        return _run(bert, rows, encoder)
    finally:
        bert.policy, bert.quantized_weights = policy, weights


def _reference(
    parameters: Mapping[str, Tensor], bert: BertModel, inputs: tuple[Tensor, ...], sizes: list[int],
    encoder: SentenceEncoder | None,
) -> Parts:  # fmt: skip
    """The same in float64."""
    try:
        exact = reference.bert(parameters, bert.config, *inputs, output_attentions=False)
    except KeyError as error:
        hint = "adapters have to be merged into the weights first"
        raise ValueError(f"model: expected a parameter {error.args[0]}; {hint}") from error
    pooled = () if exact.pooler_output is None else (exact.pooler_output[:, None],)
    return _finished([*exact.hidden_states, *pooled], sizes, bert, encoder)


def _finished(states: list[Tensor], sizes: list[int], bert: BertModel, encoder: SentenceEncoder | None) -> Parts:
    """Padded states (B, S, H) and the pooled output -> the parts of the texts, with the vectors at the end."""
    n_states = len(bert.encoder.layer) + 1
    parts: Parts = [[row[:n] for row, n in zip(state, sizes, strict=True)] for state in states[:n_states]]
    parts += [list(state) for state in states[n_states:]]
    if encoder is not None:
        parts.append(_vectors(encoder, parts[n_states - 1]))
    return parts


def _vectors(encoder: SentenceEncoder, tokens: list[Tensor]) -> list[Tensor]:
    """What the encoder makes of the last hidden states of texts, (n, H) each, in plain PyTorch: (1, dim) each."""
    hidden = torch.cat(tokens)
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    cu_seqlens = torch.tensor([0, *(len(part) for part in tokens)]).cumsum(0)
    modes = [POOLING_MODES[mode] for mode in encoder.pooling.modes]
    x = torch.cat([reference.pool(hidden, cu_seqlens, mode) for mode in modes], dim=1)
    for module in encoder.tail:
        x = module(x)
    return list(x[:, : encoder.truncate_dim].split(1))


def _measure_alone(
    measures: Tensor, places: list[int], bert: BertModel, weights: tuple[Mapping[str, Tensor], ...], mask: Tensor,
    ours: Parts, encoder: SentenceEncoder | None,
) -> None:  # fmt: skip
    """Of every part but the embeddings, what it makes of the input it had, beside eager and the reference."""
    config, n_layers = bert.config, len(bert.encoder.layer)
    sizes = [len(part) for part in ours[0]]
    for s in range(1, len(ours)):
        before = ours[min(s - 1, n_layers)]
        if not all(bool(part.isfinite().all()) for part in before):
            continue  # what follows from NaN is not this part's doing
        if s > n_layers and encoder is not None and s == len(ours) - 1:
            made = [
                _vectors(encoder, [part.to(bert.device, dtype) for part in before]) for dtype in (None, torch.double)
            ]
        else:
            x = _stack(before, mask.shape[1])
            kinds = (x, weights[0], mask.to(x.device)), (x.cpu().double(), weights[1], mask)
            if s <= n_layers:
                results = [_eager_layer(w, config, s - 1, y, m) for y, w, m in kinds]
                made = [[row[:n] for row, n in zip(result, sizes, strict=True)] for result in results]
            else:
                made = [list(_eager_pooler(w, y, m)) for y, w, m in kinds]
        for place, *parts in zip(places, ours[s], *made, strict=True):
            measures[s, place] = _measure(*parts)


def _stack(parts: list[Tensor], length: int) -> Tensor:
    """(n, H) each -> (B, length, H), zeros at padding."""
    out = parts[0].new_zeros(len(parts), length, parts[0].shape[1])
    for row, part in zip(out, parts, strict=True):
        row[: len(part)] = part
    return out


def _chunks(order: Iterable[int], rows: list[Row], max_rows: int, max_tokens: int) -> Iterator[list[int]]:
    """The order, cut into pieces of at most max_rows rows and max_tokens padded tokens, but at least one row."""
    chunk: list[int] = []
    longest = 0
    for i in order:
        longest = max(longest, len(rows[i][0]))
        if chunk and (len(chunk) == max_rows or longest * (len(chunk) + 1) > max_tokens):
            yield chunk
            chunk, longest = [], len(rows[i][0])
        chunk.append(i)
    if chunk:
        yield chunk


def _padded(rows: list[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """ids, mask and segment ids, (B, S) on the CPU, padded on the right with zeros; S is at least 1."""
    length = max(1, *(len(ids) for ids, _ in rows))
    ids, mask, kinds = (torch.zeros(len(rows), length, dtype=torch.int64) for _ in range(3))
    for b, (row, segments) in enumerate(rows):
        ids[b, : len(row)], mask[b, : len(row)], kinds[b, : len(row)] = row, 1, segments
    return ids, mask, kinds


def _eager(
    parameters: Mapping[str, Tensor], config: BertConfig, ids: Tensor, mask: Tensor, kinds: Tensor
) -> list[Tensor]:
    """BERT in plain PyTorch, padded and op by op in the parameters' dtype, as one would write it without this library.

    It is not `reference.bert` in that dtype, which rounds inside its ops too: in bf16 its error is 1.6 times as large.
    Gives the L + 1 hidden states, (B, S, H), without meaning at padding, then the pooled output, (B, 1, H).
    """
    tables = [parameters[f"embeddings.{what}_embeddings.weight"] for what in ("word", "token_type", "position")]
    x = F.embedding(ids, tables[0]) + F.embedding(kinds, tables[1]) + tables[2][: ids.shape[1]]
    states = [_eager_norm(parameters, config, "embeddings", x)]
    for i in range(config.num_hidden_layers):
        states.append(_eager_layer(parameters, config, i, states[-1], mask))
    if "pooler.dense.weight" in parameters:
        states.append(_eager_pooler(parameters, states[-1], mask))
    return states


def _eager_linear(parameters: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, parameters[f"{name}.weight"].to(x.dtype), parameters[f"{name}.bias"].to(x.dtype))


def _eager_norm(parameters: Mapping[str, Tensor], config: BertConfig, name: str, x: Tensor) -> Tensor:
    weight, bias = (parameters[f"{name}.LayerNorm.{what}"].to(x.dtype) for what in ("weight", "bias"))
    return F.layer_norm(x, (config.hidden_size,), weight, bias, config.layer_norm_eps)


def _eager_layer(parameters: Mapping[str, Tensor], config: BertConfig, i: int, x: Tensor, mask: Tensor) -> Tensor:
    """Layer i on (B, S, H), in the dtype of x. mask: (B, S), 0 at padding."""
    activation = reference.ACTIVATIONS[config.hidden_act]
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    at = f"encoder.layer.{i}"
    q, k, v = (
        _eager_linear(parameters, f"{at}.attention.self.{name}", x)
        .unflatten(-1, (config.num_attention_heads, -1))
        .transpose(1, 2)
        for name in ("query", "key", "value")
    )  # (B, N, S, D)
    away = (mask == 0)[:, None, None, :]  # (B, 1, 1, S)
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(away, torch.finfo(x.dtype).min)
    context = (torch.softmax(scores, dim=-1) @ v).transpose(1, 2).flatten(2)  # (B, S, H)
    out = f"{at}.attention.output"
    x = _eager_norm(parameters, config, out, _eager_linear(parameters, f"{out}.dense", context) + x)
    inner = _eager_linear(parameters, f"{at}.intermediate.dense", x)  # (B, S, I)
    inner = F.relu(inner) if activation == "relu" else F.gelu(inner, approximate=approximate)
    return _eager_norm(parameters, config, f"{at}.output", _eager_linear(parameters, f"{at}.output.dense", inner) + x)


def _eager_pooler(parameters: Mapping[str, Tensor], x: Tensor, mask: Tensor) -> Tensor:
    """(B, S, H) -> (B, 1, H)."""
    first = x[:, :1] * mask[:, :1, None].to(x.dtype)  # zeros in a row without tokens
    return torch.tanh(_eager_linear(parameters, "pooler.dense", first))


def _measure(ours: Tensor, eager: Tensor, exact: Tensor) -> Tensor:
    """Of one text, (n, H): squared errors of ours and eager's, square of the reference, worst cosines. (5,)"""
    ours, eager, exact = (x.cpu().double() for x in (ours, eager, exact))
    if ours.shape[0] == 0:
        return torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    squares = [(x - y).square().sum() for x, y in ((ours, exact), (eager, exact), (exact, torch.zeros_like(exact)))]
    return torch.stack([*squares, _cosine(ours, exact).amin(), _cosine(ours.mean(0), exact.mean(0))])


def _cosine(x: Tensor, y: Tensor) -> Tensor:
    """Along the last dimension; 1 where both are zero."""
    return torch.where((x == y).all(-1), 1.0, F.cosine_similarity(x, y, dim=-1))


def _errors(measures: Tensor, dtype: torch.dtype, alone: float | None = None, factor: float = FACTOR) -> ErrorReport:
    """measures: (texts, 5), as _measure gives them.

    factor: how many times eager's error the model may have, a floor apart; alone: the same of a part alone.
    """
    errors, eager_errors = _relative(measures[:, 0], measures[:, 2]), _relative(measures[:, 1], measures[:, 2])
    totals = measures[:, :3].sum(0)
    error, eager_error = float(_relative(totals[0], totals[2])), float(_relative(totals[1], totals[2]))
    floor = 0.5 * torch.finfo(dtype).eps
    if dtype == torch.float64:
        bound = BOUND_IN_FLOAT64
    elif math.isfinite(eager_error):
        bound = factor * eager_error + floor if alone is None else max(alone * eager_error, floor)
    else:
        bound, eager_error = BOUND_WITHOUT_EAGER, math.nan
    own = (alone or factor) * eager_errors.nan_to_num(0.0, posinf=0.0) + floor
    bounds = FACTOR_OF_ONE_TEXT * own.clamp(min=bound)
    worst = int((errors / bounds).nan_to_num(torch.inf).argmax())
    finite = bool(measures[:, 0].isfinite().all())
    return ErrorReport(finite, error, eager_error, bound, worst, float(errors[worst]), float(bounds[worst]))


def _report(name: str, measures: Tensor, whole: ErrorReport, alone: ErrorReport | None) -> StateReport:
    token, sentence = measures[:, 3].amin(), measures[:, 4]
    p1, p50 = sentence.quantile(torch.tensor([0.01, 0.5], dtype=torch.float64)).tolist()
    cosines = dict(zip(_COSINES, (float(token), float(sentence.amin()), p1, p50), strict=True))
    return StateReport(**vars(whole), name=name, **cosines, alone=alone)


_COSINES = "worst_token_cosine", "worst_sentence_cosine", "sentence_cosine_p1", "sentence_cosine_p50"


def _relative(squared_error: Tensor, square: Tensor) -> Tensor:
    """RMS error over RMS; over 1 where the reference is zero."""
    return (squared_error / torch.where(square == 0, 1.0, square)).sqrt()


def _vector_report(what: str, ours: Tensor, exact: Tensor, eager: Tensor) -> VectorReport:
    """ours, exact, eager: (texts, dim) float64."""
    at = torch.tensor([0.0, 0.01, 0.1, 0.5], dtype=torch.float64)
    cosines = [tuple(_cosine(x, exact).quantile(at).tolist()) for x in (ours, eager)]
    n = len(exact)
    chosen = torch.linspace(0, n - 1, min(n, MOST_COMPARED)).round().long()
    expected = _neighbours(exact[chosen])
    (a, b, c), (d, e, f) = (_agreement(_neighbours(x[chosen]), expected) for x in (ours, eager))
    return VectorReport(what, n, len(chosen), cosines[0], cosines[1], a, d, b, e, c, f)


def _neighbours(vectors: Tensor) -> Tensor:
    """(n, dim) -> (n, n - 1): the others of each text, the one of least cosine first."""
    n = len(vectors)
    unit = F.normalize(vectors, dim=1)
    others = ~torch.eye(n, dtype=torch.bool)
    return (unit @ unit.T)[others].view(n, n - 1).argsort(stable=True, dim=1)


def _agreement(ours: Tensor, exact: Tensor) -> tuple[float, float, float]:
    """Of two orders of neighbours: rank correlation, share of the same nearest one, share of the ten nearest."""
    n = len(ours)
    if n < 3:
        return math.nan, math.nan, math.nan
    ranks = [order.argsort(1).double() - (n - 2) / 2 for order in (ours, exact)]
    spearman = float(F.cosine_similarity(ranks[0], ranks[1], dim=1).mean())
    same = float((ours[:, -1] == exact[:, -1]).double().mean())
    near = min(10, n - 1)
    shared = (ours[:, -near:, None] == exact[:, None, -near:]).any(2).double().mean()
    return spearman, same, float(shared)
