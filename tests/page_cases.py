"""Made-up results of benchmarks and findings of verify, for the tests of pages."""

from __future__ import annotations

import math
from dataclasses import replace

from fastbert.bench.results import FAILED, OK, WRONG, Results, Row
from fastbert.diagnostics.verify.findings import ErrorReport, StateReport, VectorReport, WeightReport
from fastbert.diagnostics.verify.report import Report

ENVIRONMENT = {"device": "Planted H100", "date": "2026-02-01 12:30 UTC", "commit": "0123456789", "python": "3.12"}


def row(workload: str, competitor: str, speedup: float | None = None, status: str = OK, detail: str = "") -> Row:
    """One competitor; speedup: of fastbert over it, with an interval of 5 % either way."""
    made = Row("model", workload, competitor, "float32", status, detail)
    if status == OK:
        made.seconds, made.tokens_per_second, made.rounds = 0.001 * (speedup or 1.0), 1e6 / (speedup or 1.0), 5
    if speedup is not None:
        made.speedup, made.speedup_low, made.speedup_high = speedup, 0.95 * speedup, 1.05 * speedup
    return made


def results(*rows: Row) -> Results:
    return Results(dict(ENVIRONMENT), list(rows), {"copy GB/s": 71.1}, {"a note": "of the run"})


def good_results() -> Results:
    """Two workloads: fastbert is faster in one and slower in the other."""
    rows = [row("squad", "fastbert"), row("squad", "eager", 4.0), row("squad", "ONNX", 2.0)]
    return results(*rows, row("S128", "fastbert"), row("S128", "eager", 3.0), row("S128", "ONNX", 0.5))


def failing_results() -> Results:
    """fastbert is wrong in one workload and failed in another of three."""
    rows = [row("squad", "fastbert"), row("squad", "eager", 4.0)]
    rows += [row("S128", "fastbert", status=WRONG, detail="error 1 above the bound 0.1"), row("S128", "eager")]
    return results(*rows, row("S512", "fastbert", status=FAILED, detail="<planted>"), row("S512", "eager"))


def errors(share: float = 0.5, *, finite: bool = True) -> ErrorReport:
    """An error that is that share of its bound."""
    return ErrorReport(finite, 2e-3 * share, 1e-3, 2e-3, 0, 1e-3 * share, 1e-2)


def state(name: str, share: float = 0.5, alone: float | None = 0.5, *, finite: bool = True) -> StateReport:
    fields = vars(errors(share, finite=finite))
    return StateReport(
        **fields, name=name, worst_token_cosine=0.999, worst_sentence_cosine=0.9995, sentence_cosine_p1=0.9996,
        sentence_cosine_p50=0.9999, alone=None if alone is None else errors(alone),
    )  # fmt: skip


def report(*states: StateReport, **changes: object) -> Report:
    """A report on four texts; without states, one in which all is well."""
    states = states or (state("embeddings", alone=None), state("encoder.layer.0"), state("<pooler>"))
    cosines = (0.999, 0.9991, 0.9992, 0.9999)
    vectors = VectorReport("encode's", 4, 4, cosines, cosines, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    whole = Report("BertModel", "cpu", "float32", "auto", 4, 27, (), states, ("a note",), None, vectors, None)
    return replace(whole, **changes)  # type: ignore[arg-type]


def wrong_report() -> Report:
    """One of three outputs misses its bound."""
    return report(state("embeddings", alone=None), state("encoder.layer.0", 1.5), state("pooler"))


def report_of_bad_weights() -> Report:
    return report(weights=(WeightReport("pooler.dense.weight", 3, 0, 99),), states=(), vectors=None)


def report_not_finite() -> Report:
    nan = replace(errors(finite=False), error=math.nan, worst_text_error=math.nan)
    fields = {**vars(state("encoder.layer.0")), **vars(nan)}
    return report(state("embeddings", alone=None), StateReport(**fields))
