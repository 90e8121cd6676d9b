"""Is it right on my data: a model beside the float64 reference and plain PyTorch, on the same tokens.

B sequences of n tokens, S the longest, H hidden, N heads, D head size.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import os
import sys
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert import checkpoint, quantized, reference
from fastbert.config import BertConfig
from fastbert.explain import backbone, find_model, float32_precision, prefix_of
from fastbert.model import BertModel
from fastbert.ops import Policy
from fastbert.tokenizer import Tokenizer

__all__ = ["DEFAULT_TEXTS", "QuantizedReport", "Report", "StateReport", "WeightReport", "verify"]

# Of the texts that run together: the model's in the order given, so that lengths mix; the reference's by length.
MODEL_ROWS, MODEL_TOKENS = 64, 8192
REFERENCE_ROWS, REFERENCE_TOKENS = 16, 1024

# Against eager's error over all texts. One short text rounds only a few times, and its error scatters more.
FACTOR, FACTOR_OF_ONE_TEXT = 1.25, 4.0
# Eager in float64 is the reference itself, and gives no bound.
BOUND_IN_FLOAT64 = 1e-10
# Where eager overflows: the relative error sqrt(2 * (1 - cosine)) at a cosine of 0.999.
BOUND_WITHOUT_EAGER = 0.0447
# Of an 8-bit model: cosine to the reference at the 1st percentile, and rank correlation of neighbours. They are held
# against it from this many texts on: among few, a pair that changes places weighs too much.
LEAST_COSINE, LEAST_SPEARMAN, ENOUGH_TEXTS = 0.998, 0.999, 1000

DEFAULT_TEXTS = (
    "",
    "Yes.",
    "The cat sat on the mat.",
    "Where does the night train to Lisbon stop?",
    "In 1969 two people walked on the Moon, 384,400 km from home, while a third waited in orbit.",
    "def area(radius):\n    return 3.14159 * radius ** 2",
    "한국어 문장도 똑같이 정확해야 합니다.",
    "Ein Übermaß an Regen; ça suffit! ¿Mañana otra vez? — Да, конечно.",
    "Return the item at the given index, or the default if the index is out of range. Negative indices count from the "
    "end, as they do for lists; an index that is not an integer raises TypeError.",
    "antidisestablishmentarianism " * 3 + "\N{GRINNING FACE} \N{SNOWMAN}",
    "To be, or not to be, that is the question: Whether 'tis nobler in the mind to suffer The slings and arrows of "
    "outrageous fortune, Or to take arms against a sea of troubles And by opposing end them.",
    "The river rose through the night, and by morning the lower fields lay under water from the mill to the bridge. "
    * 12,
)
# Lengths in tokens where there is no tokenizer.
_LENGTHS = (1, 2, 3, 5, 16, 17, 31, 33, 64, 65, 120, 250)


@dataclass(frozen=True)
class WeightReport:
    """A parameter that is not finite."""

    name: str
    n_nan: int
    n_inf: int
    n_values: int

    def __str__(self) -> str:
        found = [f"{n} {what}" for n, what in ((self.n_nan, "NaN"), (self.n_inf, "infinite")) if n]
        return f"{self.name}: {' and '.join(found)} of {self.n_values} values"


@dataclass(frozen=True)
class StateReport:
    """The output of one part of the model, beside the float64 reference.

    error, eager_error: RMS of the difference over RMS of the reference, of the model and of plain PyTorch in its dtype;
    bound: what error may be. The text that comes nearest to its own bound: worst_text, its index, and its error and
    bound. Cosines to the reference: the worst of any token, and of any text's mean over its tokens. Not finite: NaN.
    """

    name: str
    finite: bool
    error: float
    eager_error: float
    bound: float
    worst_text: int
    worst_text_error: float
    worst_text_bound: float
    worst_token_cosine: float
    worst_sentence_cosine: float

    @property
    def ok(self) -> bool:
        return self.finite and self.error <= self.bound and self.worst_text_error <= self.worst_text_bound

    @property
    def problem(self) -> str | None:
        """What is wrong, in words, or None."""
        if not self.finite:
            return f"its output is not finite (text {self.worst_text})"
        if self.error > self.bound:
            return f"error {self.error:.3g}, bound {self.bound:.3g}"
        if self.worst_text_error > self.worst_text_bound:
            text = f"text {self.worst_text}"
            return f"error {self.worst_text_error:.3g} for {text} alone, bound {self.worst_text_bound:.3g}"
        return None


@dataclass(frozen=True)
class QuantizedReport:
    """What 8 bits cost a text's vector, the mean of its tokens' last hidden states, beside the float64 reference.

    cosine_p1: the cosine of the two, at the 1st percentile of the texts. spearman: for each text, the rank correlation
    of the others ordered by cosine to it, with either kind of vectors; the mean over texts, NaN for fewer than three.
    """

    precision: str
    n_texts: int
    cosine_p1: float
    spearman: float

    @property
    def problem(self) -> str | None:
        """What is wrong, in words, or None."""
        cosine_ok, order_ok = self.cosine_p1 >= LEAST_COSINE, self.spearman >= LEAST_SPEARMAN
        if self.n_texts < ENOUGH_TEXTS or (cosine_ok and order_ok):
            return None
        return f"{self}; expected at least {LEAST_COSINE} and {LEAST_SPEARMAN}"

    def __str__(self) -> str:
        figures = f"cosine at the 1st percentile {self.cosine_p1:.5f}, Spearman of neighbours {self.spearman:.5f}"
        few = f" (few texts: no bound below {ENOUGH_TEXTS})" if self.n_texts < ENOUGH_TEXTS else ""
        return f"{self.precision} over {self.n_texts} texts: {figures}{few}"


@dataclass(frozen=True)
class Report:
    """What `verify` found. `bool(report)` and `report.ok` say whether all is well, `str(report)` is a table.

    weights: parameters that are not finite; where there are any, nothing was run and `states` is empty.
    states: the embeddings, each layer, and the pooler if there is one. quantized: of a model that runs in 8 bits.
    """

    model: str
    device: str
    dtype: str
    backend: str
    n_texts: int
    n_tokens: int
    weights: tuple[WeightReport, ...]
    states: tuple[StateReport, ...]
    notes: tuple[str, ...] = ()
    quantized: QuantizedReport | None = None

    @property
    def ok(self) -> bool:
        return not self.weights and all(state.ok for state in self.states) and not self._too_coarse

    @property
    def _too_coarse(self) -> list[str]:
        problem = None if self.quantized is None else self.quantized.problem
        return [] if problem is None else [problem]

    def __bool__(self) -> bool:
        return self.ok

    @property
    def problems(self) -> list[str]:
        """What is wrong, in words: every parameter that is not finite, or the first part of the model that is off."""
        wrong = [f"{state.name} is the first that is wrong: {state.problem}" for state in self.states if not state.ok]
        return [*map(str, self.weights), *wrong[:1], *self._too_coarse]

    def to_dict(self) -> dict[str, Any]:
        """The same as dicts, lists, strings, numbers and None (for NaN and infinity), for JSON."""
        states = []
        for state in self.states:
            given = dataclasses.asdict(state).items()
            finite = {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in given}
            states.append(finite | {"ok": state.ok})
        lists = {"weights": [dataclasses.asdict(weight) for weight in self.weights], "notes": list(self.notes)}
        values = dataclasses.asdict(self)
        if self.quantized is not None and math.isnan(self.quantized.spearman):
            values["quantized"]["spearman"] = None
        return {"ok": self.ok, "problems": self.problems, **values, **lists, "states": states}

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "FAILED"
        head = f"{self.model} on {self.device}, {self.dtype}, backend {self.backend!r}"
        table = [("output", "error", "eager's", "bound", "worst token cosine", "worst sentence cosine", "")]
        for s in self.states:
            numbers = f"{s.error:.3g}", f"{s.eager_error:.3g}", f"{s.bound:.3g}"
            cosines = f"{s.worst_token_cosine:.7f}", f"{s.worst_sentence_cosine:.7f}"
            table.append((s.name, *numbers, *cosines, "ok" if s.ok else "FAILED"))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
        body = ["", *(line.rstrip() for line in lines), ""] if self.states else [""]
        counts = f"{self.n_texts} texts, {self.n_tokens} tokens: {verdict}"
        figures = [] if self.quantized is None or self._too_coarse else [str(self.quantized)]
        return "\n".join([head, *body, counts, *self.problems, *figures, *self.notes])


def verify(
    model_or_path: Any,
    texts: Iterable[str] | Iterable[Sequence[int]] | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    backend: str | None = None,
    strict: bool | None = None,
) -> Report:
    """Checks a model on your texts: its weights are finite, and every layer is as accurate as plain PyTorch.

    model_or_path: a BertModel, a model with a head (of which the encoder is run, and all weights are looked at) or a
    SentenceEncoder; or a folder or hub id to load, with the last four arguments as for `BertModel.from_pretrained`.
    texts: strings, or lists of token ids; a dozen built-in texts by default, and random ids where there is no
    tokenizer. Texts longer than the model's positions are cut, and the report says so. tokenizer: by default that of
    the folder or of the SentenceEncoder.

    For every hidden state and the pooled output, error = RMS of (ours - float64 reference) over RMS of the reference.
    It may be 1.25 times the error of plain PyTorch in the model's dtype plus half an ulp, and for a single text 4 times
    that. Nothing about the model changes; it runs in eval mode, whatever its mode is. Of a model that runs in 8 bits
    (precision="fp8" or "int8"), plain PyTorch is the emulation of the same quantisation, and `quantized` says what that
    costs: it is a problem below a cosine of 0.998 or a Spearman of 0.999, from 1,000 texts on.

    Raises TypeError or ValueError for arguments that do not fit, IndexError for token ids outside the vocabulary, what
    `from_pretrained` raises for a path, and BackendError under strict. Errors of the model itself raise nothing: they
    are in the report.
    """
    notes: list[str] = []
    model, name, tokenizer = _model_of(model_or_path, tokenizer, dtype, device, backend, strict)
    bert = backbone(find_model(model))
    if isinstance(model, nn.Module) and bert not in model.modules():  # an accelerated model of another library
        model = bert
    if bert.device.type == "meta":
        raise ValueError("model: its parameters are on 'meta', where they have no values")
    rows = _rows(texts, tokenizer, bert, notes)
    weights = tuple(_bad_weights(model))
    states: tuple[StateReport, ...] = ()
    in_8_bits = None
    if not weights:
        states, in_8_bits = _states(bert, rows, prefix_of(bert, model))
        if any(math.isnan(state.eager_error) for state in states):
            notes.append(f"plain PyTorch is not finite in {bert.dtype}; the bound there is {BOUND_WITHOUT_EAGER}")
    if bert.dtype == torch.float32 and bert.device.type == "cuda":
        notes.append(f"float32 multiplies in {float32_precision()}, the model and plain PyTorch: PyTorch's own switch")
    return Report(
        name, str(bert.device), str(bert.dtype).removeprefix("torch."), bert.policy.backend, len(rows),
        sum(len(ids) for ids, _ in rows), weights, states, tuple(notes), in_8_bits,
    )  # fmt: skip


def _model_of(
    given: Any, tokenizer: Tokenizer | None, dtype: Any, device: Any, backend: Any, strict: Any
) -> tuple[nn.Module, str, Tokenizer | None]:
    """The model, its name for the report, and its tokenizer."""
    overrides = {"dtype": dtype, "device": device, "backend": backend, "strict": strict}
    overrides = {name: value for name, value in overrides.items() if value is not None}
    if not isinstance(given, (str, os.PathLike)):
        if overrides:
            raise ValueError(f"{', '.join(overrides)}: expected only with a path, got a loaded {type(given).__name__}")
        return given, type(given).__name__, getattr(given, "tokenizer", None) if tokenizer is None else tokenizer
    folder = _transformer_folder(checkpoint.resolve(given))
    model = BertModel.from_pretrained(folder, **overrides)
    if tokenizer is None and any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        tokenizer = Tokenizer.from_pretrained(folder)
    return model, os.fspath(given), tokenizer


def _transformer_folder(folder: Path) -> Path:
    """Where the weights are: the folder itself, or in a sentence-transformers folder that of its first module."""
    file = folder / "modules.json"
    if not file.is_file():
        return folder
    try:
        modules = json.loads(file.read_text(encoding="utf-8"))
        return folder / min(modules, key=lambda module: module["idx"])["path"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file}: expected a list of modules with idx and path: {error!r}") from error


Row = tuple[Tensor, Tensor]  # ids and segment ids of one text, (n,) int64 on the CPU


def _rows(texts: Any, tokenizer: Tokenizer | None, bert: BertModel, notes: list[str]) -> list[Row]:
    n_positions = bert.embeddings.position_embeddings.num_embeddings
    if texts is None and tokenizer is None:
        notes.append("no tokenizer: random token ids instead of texts")
        return _random_rows(bert, n_positions)
    given = list(DEFAULT_TEXTS if texts is None else [texts] if isinstance(texts, str) else texts)
    if not given:
        raise ValueError("texts: expected at least one")
    if not all(isinstance(text, str) for text in given):
        return [(ids, torch.zeros_like(ids)) for ids in map(_ids_of, given)]
    if tokenizer is None:
        raise ValueError("tokenizer: needed for texts; pass tokenizer=, or texts as lists of token ids")
    limit = min(n_positions, tokenizer.model_max_length or n_positions)
    packed = tokenizer.encode_packed(given, max_length=limit, warn=False)
    if packed.n_truncated:
        notes.append(f"{packed.n_truncated} texts were cut to {limit} tokens, by {packed.n_truncated_tokens} in all")
    sizes = packed.cu_seqlens.diff().tolist()
    return list(zip(packed.input_ids.split(sizes), packed.token_type_ids.split(sizes), strict=True))


def _ids_of(item: Any) -> Tensor:
    if isinstance(item, str):
        raise TypeError("texts: expected strings or lists of token ids, got both")
    ids = torch.as_tensor(item)
    if ids.dim() != 1 or (ids.numel() and (ids.is_floating_point() or ids.dtype == torch.bool)):
        raise TypeError(f"texts: expected strings or lists of token ids, got {ids.dtype} of shape {tuple(ids.shape)}")
    return ids.to("cpu", torch.int64)


def _random_rows(bert: BertModel, n_positions: int) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    n_ids, n_types = bert.config.vocab_size, bert.config.type_vocab_size
    rows = []
    for n in (min(length, n_positions) for length in _LENGTHS):
        ids = torch.randint(n_ids, (n,), generator=generator)
        rows.append((ids, (torch.arange(n) >= n / 2).long().clamp(max=n_types - 1)))
    return rows


def _bad_weights(model: nn.Module) -> Iterator[WeightReport]:
    for name, parameter in model.named_parameters():
        n_nan, n_inf = int(parameter.isnan().sum()), int(parameter.isinf().sum())
        if n_nan or n_inf:
            yield WeightReport(name, n_nan, n_inf, parameter.numel())


@torch.no_grad()
def _states(bert: BertModel, rows: list[Row], prefix: str) -> tuple[tuple[StateReport, ...], QuantizedReport | None]:
    """Runs the model, the reference and eager, and compares every hidden state and the pooled output."""
    in_8_bits = bert.precision is not None and _runs_in_8_bits(bert)
    vectors = torch.zeros(2, len(rows), bert.config.hidden_size, dtype=torch.float64)  # ours and the reference's
    n_layers = len(bert.encoder.layer)
    names = [f"{prefix}embeddings", *(f"{prefix}encoder.layer.{i}" for i in range(n_layers)), f"{prefix}pooler"]
    measures = torch.zeros(len(names), len(rows), 5, dtype=torch.float64)
    parameters = dict(bert.named_parameters())
    on_cpu = {name: parameter.cpu() for name, parameter in parameters.items()}
    modes = {module: module.training for module in bert.modules()}
    try:
        for module in modes:  # not eval(), which renews fused weights that this is to find out of date
            module.training = False
        for chunk in _chunks(range(len(rows)), rows, MODEL_ROWS, MODEL_TOKENS):
            ours = _run(bert, [rows[i] for i in chunk])
            emulated = _run_emulation(bert, [rows[i] for i in chunk]) if in_8_bits else []
            for i, last in zip(chunk, ours[n_layers], strict=True):
                vectors[0, i] = last.double().sum(0).cpu() / max(len(last), 1)
            by_length = sorted(range(len(chunk)), key=lambda j: len(rows[chunk[j]][0]))
            for group in _chunks(by_length, [rows[i] for i in chunk], REFERENCE_ROWS, REFERENCE_TOKENS):
                inputs = _padded([rows[chunk[j]] for j in group])
                try:
                    exact = reference.bert(on_cpu, bert.config, *inputs, output_attentions=False)
                except KeyError as error:
                    hint = "adapters have to be merged into the weights first"
                    raise ValueError(f"model: expected a parameter {error.args[0]}; {hint}") from error
                eager = [] if in_8_bits else _eager(parameters, bert.config, *(x.to(bert.device) for x in inputs))
                pooled = () if exact.pooler_output is None else (exact.pooler_output[:, None],)
                for state, expected in enumerate((*exact.hidden_states, *pooled)):
                    for place, j in enumerate(group):
                        n = ours[state][j].shape[0]
                        plain = emulated[state][j] if in_8_bits else eager[state][place, :n]
                        measures[state, chunk[j]] = _measure(ours[state][j], plain, expected[place, :n])
                        if state == n_layers:
                            vectors[1, chunk[j]] = expected[place, :n].sum(0) / max(n, 1)
    finally:
        for module, mode in modes.items():
            module.training = mode
    present = names if bert.pooler is not None else names[:-1]
    states = tuple(_report(name, measure, bert.dtype) for name, measure in zip(present, measures, strict=False))
    return states, _quantized_report(bert.precision or "", *vectors) if in_8_bits else None


def _runs_in_8_bits(bert: BertModel) -> bool:
    """Whether a model with a precision takes the 8-bit path, and not the unquantised one that it falls back to."""
    decision = quantized.decide(bert, bert.policy, bert.device, bert.dtype)
    return decision.backend != quantized.UNQUANTISED


def _run_emulation(bert: BertModel, rows: list[Row]) -> list[tuple[Tensor, ...]]:
    """`_run` of the same quantisation in plain PyTorch, with weights quantised anew."""
    policy, weights = bert.policy, bert.quantized_weights
    bert.policy, bert.quantized_weights = Policy("torch"), quantized.QuantizedWeights()
    try:
        return _run(bert, rows)
    finally:
        bert.policy, bert.quantized_weights = policy, weights


def _quantized_report(precision: str, ours: Tensor, exact: Tensor) -> QuantizedReport:
    """ours, exact: (texts, H) float64."""
    n = len(ours)
    spearman = math.nan
    if n >= 3:
        others = ~torch.eye(n, dtype=torch.bool)
        ranks = []
        for vectors in (ours, exact):
            unit = F.normalize(vectors, dim=1)
            cosines = (unit @ unit.T)[others].view(n, n - 1)
            ranks.append(cosines.argsort(stable=True, dim=1).argsort(1).double() - (n - 2) / 2)
        spearman = float(F.cosine_similarity(ranks[0], ranks[1], dim=1).mean())
    return QuantizedReport(precision, n, float(_cosine(ours, exact).quantile(0.01)), spearman)


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


def _run(bert: BertModel, rows: list[Row]) -> list[tuple[Tensor, ...]]:
    """The model's hidden states, then its pooled output: of each the part of every text, (n, H), the pooled (1, H)."""
    ids, mask, kinds = (x.to(bert.device) for x in _padded(rows))
    encoded = bert.encode(ids, mask, kinds, output_attentions=False, output_hidden_states=True)
    sizes = [len(row) for row, _ in rows]
    states = [state.split(sizes) for state in encoded.hidden_states or ()]
    pooled = bert.pool(encoded)
    return states if pooled is None else [*states, pooled.split(1)]


def _eager(parameters: Mapping[str, Tensor], config: BertConfig, ids: Tensor, mask: Tensor, kinds: Tensor) -> Any:
    """BERT in plain PyTorch, padded and op by op in the parameters' dtype, as one would write it without this library.

    It is not `reference.bert` in that dtype, which rounds inside its ops too: in bf16 its error is 1.6 times as large.
    Gives the L + 1 hidden states, (B, S, H), without meaning at padding, then the pooled output, (B, 1, H).
    """

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, parameters[f"{name}.weight"], parameters[f"{name}.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        weight, bias = parameters[f"{name}.LayerNorm.weight"], parameters[f"{name}.LayerNorm.bias"]
        return F.layer_norm(x, (config.hidden_size,), weight, bias, config.layer_norm_eps)

    activation = reference.ACTIVATIONS[config.hidden_act]
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    tables = [parameters[f"embeddings.{what}_embeddings.weight"] for what in ("word", "token_type", "position")]
    x = F.embedding(ids, tables[0]) + F.embedding(kinds, tables[1]) + tables[2][: ids.shape[1]]
    states = [norm("embeddings", x)]
    away = (mask == 0)[:, None, None, :]  # (B, 1, 1, S)
    for i in range(config.num_hidden_layers):
        x, at = states[-1], f"encoder.layer.{i}"
        q, k, v = (
            linear(f"{at}.attention.self.{name}", x).unflatten(-1, (config.num_attention_heads, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )  # (B, N, S, D)
        scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(away, torch.finfo(x.dtype).min)
        context = (torch.softmax(scores, dim=-1) @ v).transpose(1, 2).flatten(2)  # (B, S, H)
        x = norm(f"{at}.attention.output", linear(f"{at}.attention.output.dense", context) + x)
        inner = linear(f"{at}.intermediate.dense", x)  # (B, S, I)
        inner = F.relu(inner) if activation == "relu" else F.gelu(inner, approximate=approximate)
        states.append(norm(f"{at}.output", linear(f"{at}.output.dense", inner) + x))
    if "pooler.dense.weight" in parameters:
        first = states[-1][:, :1] * mask[:, :1, None].to(x.dtype)  # zeros in a row without tokens
        states.append(torch.tanh(linear("pooler.dense", first)))
    return states


def _measure(ours: Tensor, eager: Tensor, exact: Tensor) -> Tensor:
    """Of one text, (n, H): squared errors of ours and eager's, square of the reference, worst cosines. (5,)"""
    ours, eager = ours.cpu().double(), eager.cpu().double()
    if ours.shape[0] == 0:
        return torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    squares = [(x - y).square().sum() for x, y in ((ours, exact), (eager, exact), (exact, torch.zeros_like(exact)))]
    return torch.stack([*squares, _cosine(ours, exact).amin(), _cosine(ours.mean(0), exact.mean(0))])


def _cosine(x: Tensor, y: Tensor) -> Tensor:
    """Along the last dimension; 1 where both are zero."""
    return torch.where((x == y).all(-1), 1.0, F.cosine_similarity(x, y, dim=-1))


def _report(name: str, measures: Tensor, dtype: torch.dtype) -> StateReport:
    """measures: (texts, 5), as _measure gives them."""
    finite = bool(measures[:, 0].isfinite().all())
    errors, eager_errors = _relative(measures[:, 0], measures[:, 2]), _relative(measures[:, 1], measures[:, 2])
    totals = measures[:, :3].sum(0)
    error, eager_error = float(_relative(totals[0], totals[2])), float(_relative(totals[1], totals[2]))
    floor = 0.5 * torch.finfo(dtype).eps
    if dtype == torch.float64:
        bound = BOUND_IN_FLOAT64
    elif math.isfinite(eager_error):
        bound = FACTOR * eager_error + floor
    else:
        bound, eager_error = BOUND_WITHOUT_EAGER, math.nan
    own = FACTOR * eager_errors.nan_to_num(0.0, posinf=0.0) + floor
    bounds = FACTOR_OF_ONE_TEXT * own.clamp(min=bound)
    worst = int((errors / bounds).nan_to_num(torch.inf).argmax())
    cosines = measures[:, 3:].amin(0).tolist()
    return StateReport(
        name=name,
        finite=finite,
        error=error,
        eager_error=eager_error,
        bound=bound,
        worst_text=worst,
        worst_text_error=float(errors[worst]),
        worst_text_bound=float(bounds[worst]),
        worst_token_cosine=cosines[0],
        worst_sentence_cosine=cosines[1],
    )


def _relative(squared_error: Tensor, square: Tensor) -> Tensor:
    """RMS error over RMS; over 1 where the reference is zero."""
    return (squared_error / torch.where(square == 0, 1.0, square)).sqrt()


# `fastbert.verify` is a public function and this module: importing the module binds its name in the package.
class _CallableModule(types.ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Report:
        return verify(*args, **kwargs)


__signature__ = inspect.signature(verify)
sys.modules[__name__].__class__ = _CallableModule
