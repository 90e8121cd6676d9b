"""This module holds the report of `verify`: its findings as text, as JSON and as a page."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from fastbert.diagnostics.verify.findings import Findings
from fastbert.diagnostics.verify.page import report_page
from fastbert.pages import html
from fastbert.pages.terminal import plain_table


@dataclass(frozen=True)
class Report(Findings):
    """A `Report` holds the findings of `verify`. `bool(report)` and `report.ok` tell whether all is well.

    `str(report)` is a table.
    """

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as dicts, lists, strings, numbers and None (for NaN and infinity), for JSON."""
        values = _for_json(dataclasses.asdict(self))
        states = values["states"] + ([] if self.last is None else [values["last"]])
        for entry, state in zip(states, self.outputs, strict=True):
            entry |= {"ok": state.ok, "problem": state.problem, "times_eager": _for_json(state.times_eager)}
            if state.alone is not None:
                entry["alone"]["times_eager"] = _for_json(state.alone.times_eager)
        if self.gradients is not None:
            for kind in ("parameters", "parts"):
                for entry, report in zip(values["gradients"][kind], getattr(self.gradients, kind), strict=True):
                    entry |= {"ok": report.ok, "times_eager": _for_json(report.times_eager)}
            worst = self.gradients.worst_part.name, self.gradients.worst_parameter.name
            values["gradients"] |= {"worst_part": worst[0], "worst_parameter": worst[1]}
        return {"ok": self.ok, "problems": self.problems, **values}

    def to_html(self) -> str:
        """Returns the report as a page: the verdict, tables and, if matplotlib is installed, figures."""
        return html.render(report_page(self))

    def __str__(self) -> str:
        tables = [self.table()] if self.states else []
        if self.vectors is not None:
            tables.append(self.vectors.table())
        costs = [] if self.quantized is None or self.quantized_problems else [str(self.quantized)]
        if self.gradients is not None:
            tables.append(self.gradients.table())
            costs.append(self.gradients.worst())
        summary = [self.verdict(), *self.problems, *costs, *self.notes]
        if not tables:
            summary = [self.heading(), *summary]
        return "\n\n".join([*map(plain_table, tables), "\n".join(summary)])


def _for_json(value: Any) -> Any:
    """Returns the value with lists for tuples, and None for NaN and infinity."""
    if isinstance(value, dict):
        return {name: _for_json(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_for_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
