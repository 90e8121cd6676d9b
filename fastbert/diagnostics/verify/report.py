"""What `verify` found, and how it reads as text and as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# Against eager's error over all texts. One short text rounds only a few times, and its error scatters more.
FACTOR, FACTOR_OF_ONE_TEXT = 1.25, 4.0
# Of vectors, a row a text: over a dozen texts, chance alone makes of 1.15 times eager's error before them 1.3.
FACTOR_OF_VECTORS = 2.0
# Of a part alone, in 16 bits, in 32, and where it gives one row a text: the fewer the roundings, the more the order of
# the sums shows. There is no floor but where eager makes no error to speak of.
FACTOR_ALONE_16, FACTOR_ALONE_32, FACTOR_ALONE_FEW = 1.5, 2.0, 3.0
# Eager in float64 is the reference itself, and gives no bound.
BOUND_IN_FLOAT64 = 1e-10
# Where eager overflows: the relative error sqrt(2 * (1 - cosine)) at a cosine of 0.999.
BOUND_WITHOUT_EAGER = 0.0447
# Of an 8-bit model: cosine to the reference at the 1st percentile, and rank correlation of neighbours. They are held
# against it from this many texts on: among few, a pair that changes places weighs too much.
LEAST_COSINE, LEAST_SPEARMAN, ENOUGH_TEXTS = 0.998, 0.999, 1000


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
class ErrorReport:
    """The error of what a part of the model gives, beside the float64 reference.

    error, eager_error: RMS of the difference over RMS of the reference, of the model and of plain PyTorch in its dtype;
    bound: what error may be. The text that comes nearest to its own bound: worst_text, its index, and its error and
    bound. Not finite: NaN.
    """

    finite: bool
    error: float
    eager_error: float
    bound: float
    worst_text: int
    worst_text_error: float
    worst_text_bound: float

    @property
    def times_eager(self) -> float:
        """The error in units of plain PyTorch's own; NaN where that is zero or not finite."""
        return self.error / self.eager_error if self.eager_error else math.nan

    @property
    def problem(self) -> str | None:
        """What is wrong, in words, or None."""
        if not self.finite:
            return f"its output is not finite (text {self.worst_text})"
        if self.error > self.bound:
            return f"error {self.error:.3g}, {_times(self.times_eager)}bound {self.bound:.3g}"
        if self.worst_text_error > self.worst_text_bound:
            text = f"text {self.worst_text}"
            return f"error {self.worst_text_error:.3g} for {text} alone, bound {self.worst_text_bound:.3g}"
        return None


def _times(times: float) -> str:
    return f"{times:.3g} times plain PyTorch's, " if math.isfinite(times) else ""


@dataclass(frozen=True)
class StateReport(ErrorReport):
    """The output of one part of the model, beside the float64 reference of all that leads to it.

    A head that gives a handful of numbers a text is judged alone: its bound here is infinite.
    alone: the error that this part adds: of what it makes of the input that it had, against what the reference and
    plain PyTorch make of the same input. None for the embeddings, which have no part before them, and in 8 bits.
    Cosines to the reference: the worst of any token; of texts, the mean over their tokens, the worst, the 1st
    percentile and the median.
    """

    name: str = ""
    worst_token_cosine: float = math.nan
    worst_sentence_cosine: float = math.nan
    sentence_cosine_p1: float = math.nan
    sentence_cosine_p50: float = math.nan
    alone: ErrorReport | None = None

    @property
    def ok(self) -> bool:
        return self.problem is None

    @property
    def problem(self) -> str | None:
        whole = super().problem
        if whole is None and self.alone is not None and self.alone.problem is not None:
            return f"given the input that it had, {self.alone.problem}"
        return whole


@dataclass(frozen=True)
class VectorReport:
    """The vectors of the texts beside those of the float64 reference, and plain PyTorch's beside them (eager_...).

    what: "encode's" of a SentenceEncoder, else the mean of a text's last hidden states. cosine: the worst, the 1st and
    the 10th percentile and the median over texts. Neighbours are the other texts by cosine, with either kind of
    vectors: spearman, the mean rank correlation; same_nearest, the share of texts whose nearest neighbour is the same;
    same_nearest_10, how many of the ten nearest are. They are NaN for fewer than three texts.
    """

    what: str
    n_texts: int
    n_compared: int  # of them, for neighbours
    cosine: tuple[float, float, float, float]
    eager_cosine: tuple[float, float, float, float]
    spearman: float
    eager_spearman: float
    same_nearest: float
    eager_same_nearest: float
    same_nearest_10: float
    eager_same_nearest_10: float

    def lines(self) -> Iterator[tuple[str, str, str]]:
        """(what, ours, plain PyTorch's) for a table."""
        names = "worst", "1st percentile", "10th percentile", "median"
        for name, ours, eager in zip(names, self.cosine, self.eager_cosine, strict=True):
            yield f"cosine to the reference, {name}", f"{ours:.7f}", f"{eager:.7f}"
        if self.n_compared >= 3:
            yield "Spearman of neighbours", f"{self.spearman:.5f}", f"{self.eager_spearman:.5f}"
            yield "same nearest neighbour", f"{self.same_nearest:.2%}", f"{self.eager_same_nearest:.2%}"
            yield "same among the ten nearest", f"{self.same_nearest_10:.2%}", f"{self.eager_same_nearest_10:.2%}"


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
    states: the embeddings, each layer, the pooler if there is one, and what a SentenceEncoder makes of them.
    vectors: cosines and neighbours of the texts. quantized: of a model that runs in 8 bits. last: the last hidden state
    where nobody asks for the others, which then runs by a CUDA graph, or on a CPU in one call.
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
    vectors: VectorReport | None = None
    last: StateReport | None = None

    @property
    def ok(self) -> bool:
        return not self.weights and all(state.ok for state in self._all) and not self._too_coarse

    @property
    def _all(self) -> list[StateReport]:
        return [*self.states, *([] if self.last is None else [self.last])]

    @property
    def _too_coarse(self) -> list[str]:
        problem = None if self.quantized is None else self.quantized.problem
        return [] if problem is None else [problem]

    def __bool__(self) -> bool:
        return self.ok

    @property
    def problems(self) -> list[str]:
        """What is wrong, in words: every parameter that is not finite, or the first part of the model that is off."""
        wrong = [f"{state.name} is the first that is wrong: {state.problem}" for state in self._all if not state.ok]
        return [*map(str, self.weights), *wrong[:1], *self._too_coarse]

    def to_dict(self) -> dict[str, Any]:
        """The same as dicts, lists, strings, numbers and None (for NaN and infinity), for JSON."""
        values = _for_json(dataclasses.asdict(self))
        given_states = values["states"] + ([] if self.last is None else [values["last"]])
        for given, state in zip(given_states, self._all, strict=True):
            given |= {"ok": state.ok, "problem": state.problem, "times_eager": _for_json(state.times_eager)}
            if state.alone is not None:
                given["alone"]["times_eager"] = _for_json(state.alone.times_eager)
        return {"ok": self.ok, "problems": self.problems, **values}

    def to_html(self) -> str:
        """A page of its own with the tables and, where matplotlib is installed, figures."""
        from fastbert.diagnostics.verify.page import page

        return page(self)

    def table(self) -> list[tuple[str, ...]]:
        """The states, a line each, the heading first."""
        heading = "output", "error", "eager's", "times", "bound", "alone, times", "worst token cosine"
        lines: list[tuple[str, ...]] = [(*heading, "worst sentence cosine", "")]
        for s in self._all:
            alone = "" if s.alone is None else _figure(s.alone.times_eager, ".2f")
            lines.append(
                (
                    s.name,
                    f"{s.error:.3g}",
                    f"{s.eager_error:.3g}",
                    _figure(s.times_eager, ".2f"),
                    f"{s.bound:.3g}",
                    alone,
                    f"{s.worst_token_cosine:.7f}",
                    f"{s.worst_sentence_cosine:.7f}",
                    "ok" if s.ok else "FAILED",
                )  # fmt: skip
            )
        return lines

    def heading(self) -> str:
        return f"{self.model} on {self.device}, {self.dtype}, backend {self.backend!r}"

    def verdict(self) -> str:
        return f"{self.n_texts} texts, {self.n_tokens} tokens: {'ok' if self.ok else 'FAILED'}"

    def __str__(self) -> str:
        body = ["", *aligned(self.table()), ""] if self.states else [""]
        if self.vectors is not None:
            what = f"vectors of {self.vectors.n_texts} texts, {self.vectors.what}"
            body += [*aligned([(what, "the model", "eager"), *self.vectors.lines()]), ""]
        figures = [] if self.quantized is None or self._too_coarse else [str(self.quantized)]
        return "\n".join([self.heading(), *body, self.verdict(), *self.problems, *figures, *self.notes])


def aligned(table: list[tuple[str, ...]]) -> list[str]:
    """The lines of a table, with its columns under each other."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    cells = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in table]
    return ["  ".join(line).rstrip() for line in cells]


def _figure(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else ""


def _for_json(value: Any) -> Any:
    """Tuples as lists, and None for NaN and infinity."""
    if isinstance(value, dict):
        return {name: _for_json(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_for_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
