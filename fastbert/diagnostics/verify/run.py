"""The runs behind `verify`: the model, the float64 reference and plain PyTorch on the same tokens, and their errors.

B sequences of n tokens, S the longest, H hidden, N heads, D head size, L layers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import reference
from fastbert.checkpoint.activations import ACTIVATIONS, activate
from fastbert.checkpoint.config import BertConfig
from fastbert.diagnostics.verify.ends import End
from fastbert.diagnostics.verify.report import (
    BOUND_IN_FLOAT64,
    BOUND_WITHOUT_EAGER,
    FACTOR,
    FACTOR_ALONE_16,
    FACTOR_ALONE_32,
    FACTOR_ALONE_FEW,
    FACTOR_OF_ONE_TEXT,
    ErrorReport,
    QuantizedReport,
    StateReport,
    VectorReport,
)
from fastbert.engine import quantized
from fastbert.models.bert import BertModel
from fastbert.models.inputs import Inputs
from fastbert.ops import Policy

# Of the texts that run together: the model's in the order given, so that lengths mix; the reference's by length.
MODEL_ROWS, MODEL_TOKENS = 64, 8192
REFERENCE_ROWS, REFERENCE_TOKENS = 16, 1024
# Where a head gives a number for every token of the vocabulary.
DECODER_TOKENS = 1024
# Texts whose neighbours are compared: every text with every other.
MOST_COMPARED = 2000

Row = tuple[Tensor, Tensor]  # ids and segment ids of one text, (n,) int64 on the CPU
Parts = list[Any]  # of each state the part of every text, (n, H); of the pooled output and of vectors (1, ...)


@dataclass
class Findings:
    states: tuple[StateReport, ...]
    vectors: VectorReport | None = None
    quantized: QuantizedReport | None = None
    last: StateReport | None = None


@torch.no_grad()
def compare(bert: BertModel, rows: list[Row], prefix: str, ends: Sequence[End] = (), model: Any = None) -> Findings:
    """Runs the model, the reference and eager, and compares every state, the pooled output and what follows.

    model: that `ends` belong to, the encoder by default.
    """
    in_8_bits = bert.precision is not None and _runs_in_8_bits(bert)
    n_layers = len(bert.encoder.layer)
    names = [f"{prefix}embeddings", *(f"{prefix}encoder.layer.{i}" for i in range(n_layers))]
    names += [f"{prefix}pooler"] * (bert.pooler is not None) + [end.name for end in ends]
    measures, alone = (torch.zeros(len(names), len(rows), 5, dtype=torch.float64, device="cpu") for _ in range(2))
    as_it_runs = torch.zeros(len(rows), 5, dtype=torch.float64, device="cpu")
    vectors: list[list[Any]] = [[None] * len(rows) for _ in range(3)]  # ours, the reference's, eager's
    of_encoder = bool(ends) and ends[-1].is_vectors
    parameters = dict(bert.named_parameters())
    on_cpu = {name: parameter.cpu() for name, parameter in parameters.items()}
    modes = {module: module.training for module in (model or bert).modules()}
    at_once = DECODER_TOKENS if any(end.name.endswith("cls.predictions") for end in ends) else MODEL_TOKENS
    try:
        for module in modes:  # not eval(), which renews fused weights that this is to find out of date
            module.training = False
        for chunk in _chunks(range(len(rows)), rows, MODEL_ROWS, at_once):
            given = [rows[i] for i in chunk]
            ours, direct = _run(bert, given, ends), _run_directly(bert, given)
            emulated = _run_emulation(bert, given, ends) if in_8_bits else []
            by_length = sorted(range(len(chunk)), key=lambda j: len(given[j][0]))
            for group in _chunks(by_length, given, REFERENCE_ROWS, REFERENCE_TOKENS):
                sizes = [len(given[j][0]) for j in group]
                inputs = _padded([given[j] for j in group])
                exact = _reference(on_cpu, bert, inputs, sizes, ends)
                if in_8_bits:
                    plain = [[state[j] for j in group] for state in emulated]
                else:
                    on_device = tuple(x.to(bert.device) for x in inputs)
                    plain = _finished(_eager(parameters, bert.config, *on_device), sizes, bert, ends)
                mine = [[state[j] for j in group] for state in ours]
                places = [chunk[j] for j in group]
                for s, (a, b, c) in enumerate(zip(mine, plain, exact, strict=True)):
                    for place, *parts in zip(places, a, b, c, strict=True):
                        measures[s, place] = _measure(*parts)
                for place, j, b, c in zip(places, group, plain[n_layers], exact[n_layers], strict=True):
                    as_it_runs[place] = _measure(direct[j], b, c)
                if not in_8_bits:
                    _measure_alone(alone, places, bert, (parameters, on_cpu), inputs[1], mine, ends)
                for k, states in enumerate((mine, exact, plain)):
                    for place, state in zip(places, states[-1] if of_encoder else states[n_layers], strict=True):
                        vectors[k][place] = state.double().sum(0).cpu() / max(len(state), 1)
    finally:
        for module, mode in modes.items():
            module.training = mode
    found = [_judged(names, measures, alone, s, bert, ends, in_8_bits) for s in range(len(names))]
    stacked = [torch.stack(kind) for kind in vectors]
    what = "encode's" if of_encoder else "the mean of the last hidden states"
    finite = all(bool(kind.isfinite().all()) for kind in stacked)
    compared = _vector_report(what, *stacked) if finite else None
    coarse = None
    if in_8_bits:
        figures = (math.nan, math.nan) if compared is None else (compared.cosine[1], compared.spearman)
        coarse = QuantizedReport(bert.precision or "", len(rows), *figures)
    direct_error = _errors(as_it_runs, bert.dtype)
    last = _report("the last hidden state, as it runs by itself", as_it_runs, direct_error, None)
    return Findings(tuple(found), compared, coarse, last)


def _judged(
    names: Sequence[str], measures: Tensor, alone: Tensor, s: int, bert: BertModel, ends: Sequence[End], in_8_bits: bool
) -> StateReport:
    """The report of state s, with the bounds that hold for what it is."""
    end = ends[s - len(names)] if s >= len(names) - len(ends) else None
    few = end is not None and end.few is not None
    if end is not None:
        factor, factor_alone = end.factor(measures.shape[1]), max(FACTOR_ALONE_FEW, end.factor(measures.shape[1]))
    else:
        factor, factor_alone = FACTOR, FACTOR_ALONE_32 if bert.dtype.itemsize > 2 else FACTOR_ALONE_16
        if s > len(bert.encoder.layer):
            factor_alone = FACTOR_ALONE_FEW
    whole = _errors(measures[s], bert.dtype, factor=factor, each_text=not few)
    if few:  # by chance plain PyTorch's error is a thirtieth of ours as well as thirty times it: only alone it tells
        whole = dataclasses.replace(whole, bound=math.inf)
    by_itself = None
    if s > 0 and not in_8_bits:
        by_itself = _errors(alone[s], bert.dtype, factor_alone, each_text=not few)
    return _report(names[s], measures[s], whole, by_itself)


def _runs_in_8_bits(bert: BertModel) -> bool:
    """Whether a model with a precision takes the 8-bit path, and not the unquantised one that it falls back to."""
    decision = quantized.decide(bert, bert.policy, bert.device, bert.dtype)
    return decision.backend != quantized.UNQUANTISED


def _run(bert: BertModel, rows: list[Row], ends: Sequence[End]) -> Parts:
    """The model's hidden states, then its pooled output, then what follows."""
    ids, mask, kinds = (x.to(bert.device) for x in _padded(rows))
    encoded = bert.encode(Inputs(ids, mask, kinds, output_attentions=False, output_hidden_states=True))
    sizes = [len(row) for row, _ in rows]
    states: Parts = [state.split(sizes) for state in encoded.hidden_states or ()]
    pooled = bert.pool(encoded)
    if pooled is not None:
        states.append(pooled.split(1))
    for end in ends:
        made = end.run(encoded)
        states.append(made.split(sizes if end.tokens and not end.is_vectors else 1))
    return states


def _run_directly(bert: BertModel, rows: list[Row]) -> list[Tensor]:
    """The last hidden state as it is computed where nobody asks for the others: in one call, or by a CUDA graph."""
    ids, mask, kinds = (x.to(bert.device) for x in _padded(rows))
    encoded = bert.encode(Inputs(ids, mask, kinds, output_attentions=False, output_hidden_states=False))
    return list(encoded.last_hidden_state.split([len(row) for row, _ in rows]))


def _run_emulation(bert: BertModel, rows: list[Row], ends: Sequence[End]) -> Parts:
    """`_run` of the same quantisation in plain PyTorch, with weights quantised anew."""
    policy, weights = bert.policy, bert.engine.eight_bit.weights
    bert.policy, bert.engine.eight_bit.weights = Policy("torch"), quantized.QuantizedWeights()
    try:
        return _run(bert, rows, ends)
    finally:
        bert.policy, bert.engine.eight_bit.weights = policy, weights


def _reference(
    parameters: Mapping[str, Tensor], bert: BertModel, inputs: tuple[Tensor, ...], sizes: list[int], ends: Sequence[End]
) -> Parts:
    """The same in float64."""
    try:
        exact = reference.bert(parameters, bert.config, *inputs, output_attentions=False)
    except KeyError as error:
        hint = "adapters have to be merged into the weights first"
        raise ValueError(f"model: expected a parameter {error.args[0]}; {hint}") from error
    pooled = () if exact.pooler_output is None else (exact.pooler_output[:, None],)
    return _finished([*exact.hidden_states, *pooled], sizes, bert, ends)


def _finished(states: list[Tensor], sizes: list[int], bert: BertModel, ends: Sequence[End]) -> Parts:
    """Padded states (B, S, H) and the pooled output -> the parts of the texts, with what follows at the end."""
    n_states = len(bert.encoder.layer) + 1
    parts: Parts = [[row[:n] for row, n in zip(state, sizes, strict=True)] for state in states[:n_states]]
    parts += [list(state) for state in states[n_states:]]
    return parts + [end.parts(parts[n_states - 1 if end.tokens else n_states]) for end in ends]


def _measure_alone(
    measures: Tensor, places: list[int], bert: BertModel, weights: tuple[Mapping[str, Tensor], ...], mask: Tensor,
    ours: Parts, ends: Sequence[End],
) -> None:  # fmt: skip
    """Of every part but the embeddings, what it makes of the input it had, beside eager and the reference."""
    config, n_layers = bert.config, len(bert.encoder.layer)
    sizes = [len(part) for part in ours[0]]
    for s in range(1, len(ours)):
        end = ends[s - len(ours)] if s >= len(ours) - len(ends) else None
        takes = min(s - 1, n_layers) if end is None else n_layers if end.tokens else n_layers + 1
        before = ours[takes]
        if not all(bool(part.isfinite().all()) for part in before):
            continue  # what follows from NaN is not this part's doing
        if end is not None:
            made = [end.parts(before), end.parts([part.double() for part in before])]
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
    ids, mask, kinds = (torch.zeros(len(rows), length, dtype=torch.int64, device="cpu") for _ in range(3))
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
    table = "embeddings.{}_embeddings.weight".format
    x = F.embedding(ids, parameters[table("word")])
    if table("token_type") in parameters:
        x = x + F.embedding(kinds, parameters[table("token_type")])
    positions = reference.default_positions(config, ids, ids.shape, ids.device)
    x = _eager_norm(parameters, config, "embeddings", x + F.embedding(positions, parameters[table("position")]))
    projected = "embeddings_project.weight" in parameters
    states = [_eager_linear(parameters, "embeddings_project", x) if projected else x]
    for i in range(config.num_hidden_layers):
        states.append(_eager_layer(parameters, config, i, states[-1], mask))
    if "pooler.dense.weight" in parameters:
        states.append(_eager_pooler(parameters, states[-1], mask))
    return states


def _eager_linear(parameters: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, parameters[f"{name}.weight"].to(x.dtype), parameters[f"{name}.bias"].to(x.dtype))


def _eager_norm(parameters: Mapping[str, Tensor], config: BertConfig, name: str, x: Tensor) -> Tensor:
    weight, bias = (parameters[f"{name}.LayerNorm.{what}"].to(x.dtype) for what in ("weight", "bias"))
    return F.layer_norm(x, x.shape[-1:], weight, bias, config.layer_norm_eps)


def _eager_layer(parameters: Mapping[str, Tensor], config: BertConfig, i: int, x: Tensor, mask: Tensor) -> Tensor:
    """Layer i on (B, S, H), in the dtype of x. mask: (B, S), 0 at padding."""
    activation = ACTIVATIONS[config.hidden_act]
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
    inner = activate(inner, activation)
    return _eager_norm(parameters, config, f"{at}.output", _eager_linear(parameters, f"{at}.output.dense", inner) + x)


def _eager_pooler(parameters: Mapping[str, Tensor], x: Tensor, mask: Tensor) -> Tensor:
    """(B, S, H) -> (B, 1, H)."""
    first = x[:, :1] * mask[:, :1, None].to(x.dtype)  # zeros in a row without tokens
    return torch.tanh(_eager_linear(parameters, "pooler.dense", first))


def _measure(ours: Tensor, eager: Tensor, exact: Tensor) -> Tensor:
    """Of one text, (n, H): squared errors of ours and eager's, square of the reference, worst cosines. (5,)"""
    ours, eager, exact = (x.cpu().double() for x in (ours, eager, exact))
    if ours.shape[0] == 0:
        return torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0], dtype=torch.float64, device="cpu")
    squares = [(x - y).square().sum() for x, y in ((ours, exact), (eager, exact), (exact, torch.zeros_like(exact)))]
    return torch.stack([*squares, _cosine(ours, exact).amin(), _cosine(ours.mean(0), exact.mean(0))])


def _cosine(x: Tensor, y: Tensor) -> Tensor:
    """Along the last dimension; 1 where both are zero."""
    return torch.where((x == y).all(-1), 1.0, F.cosine_similarity(x, y, dim=-1))


def _errors(
    measures: Tensor, dtype: torch.dtype, alone: float | None = None, factor: float = FACTOR, each_text: bool = True
) -> ErrorReport:
    """measures: (texts, 5), as _measure gives them.

    factor: how many times eager's error the model may have, a floor apart; alone: the same of a part alone. each_text:
    whether every text has a bound of its own; a few numbers, near zero perhaps, say too little for that.
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
    bounds = FACTOR_OF_ONE_TEXT * own.clamp(min=bound) if each_text else torch.full_like(errors, math.inf)
    worst = int((errors / bounds if each_text else errors).nan_to_num(torch.inf).argmax())
    finite = bool(measures[:, 0].isfinite().all())
    return ErrorReport(finite, error, eager_error, bound, worst, float(errors[worst]), float(bounds[worst]))


def _report(name: str, measures: Tensor, whole: ErrorReport, alone: ErrorReport | None) -> StateReport:
    token, sentence = measures[:, 3].amin(), measures[:, 4]
    p1, p50 = sentence.quantile(torch.tensor([0.01, 0.5], dtype=torch.float64, device="cpu")).tolist()
    cosines = dict(zip(_COSINES, (float(token), float(sentence.amin()), p1, p50), strict=True))
    return StateReport(**vars(whole), name=name, **cosines, alone=alone)


_COSINES = "worst_token_cosine", "worst_sentence_cosine", "sentence_cosine_p1", "sentence_cosine_p50"


def _relative(squared_error: Tensor, square: Tensor) -> Tensor:
    """RMS error over RMS; over 1 where the reference is zero."""
    return (squared_error / torch.where(square == 0, 1.0, square)).sqrt()


def _vector_report(what: str, ours: Tensor, exact: Tensor, eager: Tensor) -> VectorReport:
    """ours, exact, eager: (texts, dim) float64."""
    at = torch.tensor([0.0, 0.01, 0.1, 0.5], dtype=torch.float64, device="cpu")
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
