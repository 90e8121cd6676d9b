"""The report in a terminal shows every number and every reason, on made-up results."""

from __future__ import annotations

import re

import pytest

from bench_cases import BROKEN, contest, environment, line_of, results
from fastbert.bench import tables
from fastbert.bench.report import render_terminal
from fastbert.bench.results import FAILED, WRONG, Results, Row


def test_terminal_shows_numbers_and_reasons():
    """Catches a column that is lost, or a competitor that did not run left blank, at zero, or without its reason."""
    rows = contest(ratios={"eager": 1.84, "flash": 0.8}, broken=BROKEN, model="BERT-base", padding_waste=0.25)
    rows[0].peak_bytes = 3 * 2**30
    text = render_terminal(results(rows), width=200)
    assert text.startswith("Planted H100, 2026-02-01, commit 0123456789\n")
    assert "not installed: openvino" in text and "copy GB/s 3012" in text
    assert "model: BERT-base · S128 b8 · bf16" in text
    ours = line_of(text, "fastbert")
    for cell in ("1.02 M", "8.00 k", "1.00 ms ± 0.5 %", "0.003 (≤ 0.004)", "3.00 GiB", "25 %"):
        assert cell in ours
    assert "1.84× [1.75 to 1.93]" in line_of(text, "eager") and "0.80× [0.76 to 0.84]" in line_of(text, "flash")
    for name, (status, detail) in BROKEN.items():
        assert re.fullmatch(rf"{name} +{re.escape(f'{status}: {detail}')}", line_of(text, name))


def test_terminal_keeps_to_its_width():
    """Catches lines that a narrow terminal breaks, or columns that are dropped to fit."""
    rows = contest(broken=BROKEN, model="BERT-base", padding_waste=0.25, prepare_seconds=1.0, cold_start_seconds=2.0)
    text = render_terminal(results(rows), width=80)
    assert max(map(len, text.splitlines())) <= 80
    for heading in ("tokens/s", "time", "fastbert is faster", "error (bound)", "padding", "prepare", "cold start"):
        assert heading in text
    assert text.count("RuntimeError") == 1


def test_no_speedup_where_fastbert_is_wrong():
    """Catches speed-ups, or blanks, in a contest that fastbert itself did not finish."""
    rows = contest()
    rows[0] = Row("model", "S128 b8", "fastbert", "bfloat16", WRONG, "error 1 above the bound 0.1")
    rows[1].speedup = None
    text = render_terminal(results(rows), width=160)
    assert "no ratio" in line_of(text, "eager") and "fastbert is wrong here, so there are no speed-ups." in text


def test_case_that_failed_as_a_whole():
    """Catches a table without columns when the only row is a failure."""
    rows = [Row("model", "S128 b8", "fastbert", "bfloat16", FAILED, "not timed: its tests failed")]
    assert "failed: not timed: its tests failed" in render_terminal(results(rows), width=100)


def test_same_peers_in_another_dtype_are_another_contest():
    """Catches rows of two contests in one table, or a peer whose own dtype is hidden."""
    first, second = contest(ratios={"eager": 2.0, "int8": 1.5}), contest(ratios={"eager": 3.0}, dtype="float32")
    first[2].dtype = "int8"
    contests = tables.contests(first + second)
    assert [(c.dtype, len(c.rows)) for c in contests] == [("bfloat16", 3), ("float32", 2)]
    assert contests[0].name_of(first[2]) == "int8 (int8)" and contests[0].name_of(first[1]) == "eager"


def test_summary_holds_means_per_setting_and_every_reason():
    """Catches a mean over throughput and latency together, or a failed peer that counts as if it had run."""
    rows = contest("text", "a", {"eager": 2.0}, setting="throughput", broken=["compiled"])
    rows += contest("text", "b", {"eager": 8.0, "compiled": 3.0}, setting="throughput")
    rows += contest("text", "a", {"eager": 5.0}, setting="latency", broken=["compiled"])
    text = render_terminal(results(rows), width=160, summary_only=True)
    assert line_of(text, "geometric mean, throughput").split()[-5:] == ["4.00×", "3.00×", "(1", "of", "2)"]
    assert "geometric mean, latency" not in text and "\ncompetitor" not in text
    assert "compiled failed, 2 of 3: RuntimeError: <planted> & | failure" in text


@pytest.mark.parametrize(
    ("form", "value", "text"),
    [
        (tables.digits, 999.7, "1000"),
        (tables.digits, 1.2345, "1.23"),
        (tables.digits, 0.0, "0"),
        (tables.si, 1_234_567, "1.23 M"),
        (tables.si, 999_700, "1.00 M"),
        (tables.duration, 0.0009999, "1.00 ms"),
        (tables.duration, 57e-6, "57.0 µs"),
        (tables.times, 0.804, "0.80×"),
        (tables.times, 123.4, "123×"),
        (tables.percent, 0.0213, "2.1 %"),
        (tables.memory, 1536 * 2**20, "1.50 GiB"),
    ],
)
def test_forms_of_numbers(form, value, text):
    """Catches a unit off by a factor, or 1,000 k where 1 M is meant."""
    assert form(value) == text


def test_ceiling_that_could_not_be_measured():
    """Catches a crash on a ceiling that is not a number, which a result file holds as null."""
    unmeasured = Results(environment(), contest(), {"copy GB/s": None})
    assert "copy GB/s unknown" in render_terminal(unmeasured, width=160)


def test_percentiles_need_rounds():
    """Catches a 99th percentile of three rounds, or none where latency was asked for."""
    assert "p95" not in render_terminal(results(contest()), width=200)
    assert "1.00 ms / 1.01 ms / 1.01 ms" in render_terminal(results(contest(setting="latency")), width=200)
