"""This module holds the findings of `verify` about gradients as data, and describes their problems."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastbert.pages.document import NO_VALUE, Line, Table

ALL = "all parameters"
HEADS = ("error", "eager's error", "error ÷ eager's", "bound on the error", "verdict")


@dataclass(frozen=True)
class GradientReport:
    """A `GradientReport` compares the gradients of one parameter or part with float64 autograd of the reference.

    part: the part of the model. error, eager_error: RMS of the difference over RMS of the reference's gradient, of the
    model and of plain PyTorch in its dtype. A gradient that is zero but for rounding has its error over the RMS of its
    part. bound: the largest allowed error. missing: whether the model gave no gradient though there should be one. A
    value that is not finite is NaN.
    """

    name: str
    part: str
    n_values: int
    finite: bool
    error: float
    eager_error: float
    bound: float
    missing: bool = False

    @property
    def ok(self) -> bool:
        return self.problem is None

    @property
    def times_eager(self) -> float:
        """Returns the error divided by plain PyTorch's error; NaN if that is zero or not finite."""
        return self.error / self.eager_error if self.eager_error else math.nan

    @property
    def share_of_bound(self) -> float:
        """Returns the error over its bound; infinite if it is not finite."""
        return self.error / self.bound if self.finite else math.inf

    @property
    def problem(self) -> str | None:
        """Returns a text that describes the problem, or None."""
        if not self.finite:
            return "it is not finite"
        if self.error <= self.bound:
            return None
        if self.missing:
            return "the model gives it no gradient"
        times = f"{self.times_eager:.3g} times plain PyTorch's, " if math.isfinite(self.times_eager) else ""
        return f"error {self.error:.3g}, {times}bound {self.bound:.3g}"

    def line(self) -> Line:
        ratio = f"{self.times_eager:.2f}" if math.isfinite(self.times_eager) else NO_VALUE
        cells = f"{self.error:.3g}", f"{self.eager_error:.3g}", ratio, f"{self.bound:.3g}"
        verdict, tone = ("ok", "") if self.ok else ("FAILED", "bad")
        return Line(self.name, (*cells, verdict), tone=tone)


@dataclass(frozen=True)
class GradientsReport:
    """A `GradientsReport` holds the reports on each parameter, on each part, and on all gradients together.

    parameters, parts: in the order of the backward pass. n_steps: the number of compared forward and backward passes.
    """

    parameters: tuple[GradientReport, ...]
    parts: tuple[GradientReport, ...]
    whole: GradientReport
    n_steps: int

    @property
    def ok(self) -> bool:
        return self.problem is None

    @property
    def worst_parameter(self) -> GradientReport:
        return max(self.parameters, key=lambda report: report.share_of_bound)

    @property
    def worst_part(self) -> GradientReport:
        """Returns the part that uses the largest share of its bound."""
        shares = self.shares()
        return max(self.parts, key=lambda part: shares[part.name])

    def shares(self) -> dict[str, float]:
        """Returns each part's largest share of a bound, of all its gradients or of one parameter's."""
        shares = {part.name: part.share_of_bound for part in self.parts}
        for report in self.parameters:
            shares[report.part] = max(shares[report.part], report.share_of_bound)
        return shares

    @property
    def problem(self) -> str | None:
        """Returns a text that names the first wrong gradient in the backward pass, or None if all are right."""
        wrong = next((report for report in (*self.parameters, *self.parts, self.whole) if not report.ok), None)
        if wrong is None:
            return None
        return f"the gradient of {wrong.name} is the first wrong gradient of the backward pass: {wrong.problem}"

    def worst(self) -> str:
        """Returns the worst part and the worst parameter, as text."""
        part, parameter = self.worst_part, self.worst_parameter
        share = f"{parameter.share_of_bound:.2g} of its bound" if parameter.finite else "not finite"
        return f"gradients: the worst part is {part.name}, the worst parameter {parameter.name}: {share}"

    def table(self) -> Table:
        """Returns the errors of the parts of the model, one line for each."""
        steps = "1 step" if self.n_steps == 1 else f"{self.n_steps} steps"
        lines = tuple(report.line() for report in (*self.parts, self.whole))
        return Table(f"Gradients of {steps}", ("part", *HEADS), lines)

    def table_of_parameters(self) -> Table:
        """Returns the errors of all parameters, one line for each."""
        lines = tuple(report.line() for report in self.parameters)
        return Table("Gradients of all parameters", ("parameter", *HEADS), lines)
