"""This module holds the findings of `verify` as data, and describes their problems.

Every class describes its problem as text, and has the share of its bound that it uses.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from fastbert.diagnostics.verify.bounds import ENOUGH_TEXTS, LEAST_COSINE, LEAST_SPEARMAN
from fastbert.diagnostics.verify.gradient_findings import GradientsReport
from fastbert.pages.document import NO_VALUE, Line, Table

HEADS = (
    "output",
    "error",
    "eager's error",
    "error ÷ eager's",
    "bound on the error",
    "part alone: error ÷ eager's",
    "cosine of the worst token",
    "cosine of the worst text",
    "verdict",
)


@dataclass(frozen=True)
class WeightReport:
    """A `WeightReport` is about a parameter that is not finite."""

    name: str
    n_nan: int
    n_inf: int
    n_values: int

    def __str__(self) -> str:
        counts = [f"{n} {kind}" for n, kind in ((self.n_nan, "NaN"), (self.n_inf, "infinite")) if n]
        return f"{self.name}: {' and '.join(counts)} of {self.n_values} values"


@dataclass(frozen=True)
class ErrorReport:
    """An `ErrorReport` holds the error of one output of the model against the float64 reference.

    error, eager_error: RMS of the difference over RMS of the reference, of the model and of plain PyTorch in its dtype.
    bound: the largest allowed error. worst_text: the index of the text that uses the largest share of its own bound,
    with its error and its bound. A value that is not finite is NaN.
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
        """Returns the error divided by plain PyTorch's error; NaN if that is zero or not finite."""
        return self.error / self.eager_error if self.eager_error else math.nan

    @property
    def share_of_bound(self) -> float:
        """Returns the error over its bound, or the worst text's if it is larger; infinite if not finite."""
        pairs = (self.error, self.bound), (self.worst_text_error, self.worst_text_bound)
        return max(error / bound for error, bound in pairs) if self.finite else math.inf

    @property
    def problem(self) -> str | None:
        """Returns a text that describes the problem, or None."""
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
    """A `StateReport` compares the output of one part of the model with the float64 reference up to this part.

    alone: the error that this part adds. For it the reference and plain PyTorch get the part's own input. It is None
    for the embeddings, which have no part before them, and in 8 bits. A head with few numbers for each text is checked
    only alone: its bound here is infinite. worst_token_cosine: the least cosine of a token to the reference. Sentence
    cosines compare the means over the tokens of each text: for the worst text, at the 1st percentile and at the median.
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
    def share_of_bound(self) -> float:
        """Returns the largest share of a bound, of the whole or of this part alone."""
        alone = 0.0 if self.alone is None else self.alone.share_of_bound
        return max(super().share_of_bound, alone)

    @property
    def problem(self) -> str | None:
        whole = super().problem
        if whole is None and self.alone is not None and self.alone.problem is not None:
            return f"alone, on its own input: {self.alone.problem}"
        return whole


@dataclass(frozen=True)
class VectorReport:
    """A `VectorReport` compares the texts' vectors with the float64 reference's, for the model and for plain PyTorch.

    Plain PyTorch's values have names eager_... . what: "encode's" for a SentenceEncoder, else the mean of a text's last
    hidden states. cosine: the worst, the 1st and the 10th percentile and the median over texts. The neighbours of a
    text are the other texts, ordered by cosine to it. spearman: the mean rank correlation of the neighbours with the
    reference's. same_nearest: the share of texts with the same nearest neighbour. same_nearest_10: the share of the ten
    nearest that are the same. These three are NaN for fewer than three texts.
    """

    what: str
    n_texts: int
    n_compared: int  # the texts that are compared by neighbours
    cosine: tuple[float, float, float, float]
    eager_cosine: tuple[float, float, float, float]
    spearman: float
    eager_spearman: float
    same_nearest: float
    eager_same_nearest: float
    same_nearest_10: float
    eager_same_nearest_10: float

    def table(self) -> Table:
        """Returns the model's values beside plain PyTorch's."""
        title = f"Vectors of {self.n_texts} texts ({self.what})"
        return Table(title, ("measure", "the model's", "eager's"), tuple(self._lines()))

    def _lines(self) -> Iterator[Line]:
        names = "worst", "1st percentile", "10th percentile", "median"
        for name, ours, eager in zip(names, self.cosine, self.eager_cosine, strict=True):
            yield Line(f"cosine to the reference, {name}", (f"{ours:.7f}", f"{eager:.7f}"))
        if self.n_compared >= 3:
            yield Line("Spearman of neighbours", (f"{self.spearman:.5f}", f"{self.eager_spearman:.5f}"))
            yield Line("same nearest neighbour", (f"{self.same_nearest:.2%}", f"{self.eager_same_nearest:.2%}"))
            same = f"{self.same_nearest_10:.2%}", f"{self.eager_same_nearest_10:.2%}"
            yield Line("same among the ten nearest", same)


@dataclass(frozen=True)
class QuantizedReport:
    """A `QuantizedReport` measures the error of 8 bits: vectors of the model against the float64 reference's.

    A vector is the mean of the last hidden states of a text. cosine_p1: the cosine of the two, at the 1st percentile of
    the texts. spearman: as in VectorReport.
    """

    precision: str
    n_texts: int
    cosine_p1: float
    spearman: float

    @property
    def problem(self) -> str | None:
        """Returns a text that describes the problem, or None."""
        cosine_ok, order_ok = self.cosine_p1 >= LEAST_COSINE, self.spearman >= LEAST_SPEARMAN
        if self.n_texts < ENOUGH_TEXTS or (cosine_ok and order_ok):
            return None
        return f"{self}; expected at least {LEAST_COSINE} and {LEAST_SPEARMAN}"

    def __str__(self) -> str:
        figures = f"cosine at the 1st percentile {self.cosine_p1:.5f}, Spearman of neighbours {self.spearman:.5f}"
        few = f" (few texts: no bound below {ENOUGH_TEXTS})" if self.n_texts < ENOUGH_TEXTS else ""
        return f"{self.precision} over {self.n_texts} texts: {figures}{few}"


@dataclass(frozen=True)
class Findings:
    """A `Findings` holds all results of `verify` for one model on some texts.

    weights: parameters that are not finite; if there are any, the model did not run and `states` is empty. states: the
    embeddings, each layer, the pooler if there is one, and the ends after them. vectors: cosines and neighbours of the
    texts. quantized: for a model that runs in 8 bits. last: the last hidden state from a call that requests no others;
    such a call runs as a CUDA graph, or on a CPU in one call. gradients: the report on gradients, if it was requested.
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
    gradients: GradientsReport | None = None

    @property
    def ok(self) -> bool:
        right = not self.weights and all(state.ok for state in self.outputs) and not self.quantized_problems
        return right and not self.gradient_problems

    def __bool__(self) -> bool:
        return self.ok

    @property
    def outputs(self) -> list[StateReport]:
        """Returns the states, and the last hidden state from its separate run."""
        return [*self.states, *([] if self.last is None else [self.last])]

    @property
    def quantized_problems(self) -> list[str]:
        """Returns the problem with 8 bits, if there is one."""
        problem = None if self.quantized is None else self.quantized.problem
        return [] if problem is None else [problem]

    @property
    def gradient_problems(self) -> list[str]:
        """Returns the problem with gradients, if there is one."""
        problem = None if self.gradients is None else self.gradients.problem
        return [] if problem is None else [problem]

    @property
    def problems(self) -> list[str]:
        """Returns texts that describe the problems: NaN in weights, or the first wrong part and gradient."""
        wrong = [f"{state.name} is the first wrong output: {state.problem}" for state in self.outputs if not state.ok]
        return [*map(str, self.weights), *wrong[:1], *self.quantized_problems, *self.gradient_problems]

    def table(self) -> Table:
        """Returns the errors and cosines of all outputs, one line for each."""
        return Table(f"Outputs of {self.heading()}", HEADS, tuple(map(_line, self.outputs)))

    def heading(self) -> str:
        """Returns the model and how it ran, as text."""
        return f"{self.model} on {self.device}, {self.dtype}, backend {self.backend!r}"

    def verdict(self) -> str:
        """Returns the number of texts and tokens, and whether all is well, as text."""
        return f"{self.counts()}: {'ok' if self.ok else 'FAILED'}"

    def counts(self) -> str:
        """Returns the number of texts and tokens, as text."""
        pairs = (self.n_texts, "text"), (self.n_tokens, "token")
        return ", ".join(f"{n} {noun}{'s' if n != 1 else ''}" for n, noun in pairs)


def _line(state: StateReport) -> Line:
    errors = f"{state.error:.3g}", f"{state.eager_error:.3g}", _ratio(state), f"{state.bound:.3g}"
    alone = NO_VALUE if state.alone is None else _ratio(state.alone)
    cosines = f"{state.worst_token_cosine:.7f}", f"{state.worst_sentence_cosine:.7f}"
    verdict, tone = ("ok", "") if state.ok else ("FAILED", "bad")
    return Line(state.name, (*errors, alone, *cosines, verdict), tone=tone)


def _ratio(errors: ErrorReport) -> str:
    return format(errors.times_eager, ".2f") if math.isfinite(errors.times_eager) else NO_VALUE
