"""The parts of pages: pictures, tables on a terminal, the verdict on benchmarks."""

from __future__ import annotations

import importlib.util
import re
import sys

import pytest

from fastbert.bench.results import Results
from fastbert.bench.verdict import MOST_BARS, verdict
from fastbert.pages.document import Line, Page, Picture, Table, Verdict
from fastbert.pages.figures import BLUE, ORANGE, Bar
from fastbert.pages.html import render
from fastbert.pages.terminal import plain_table
from page_cases import errors, good_results, report, report_not_finite, results, row, state, wrong_report

TABLE = Table("title", ("name", "error ÷ eager's", "b"), (Line("one", ("1.00", "2")), Line("two", ("10.00", "3"))))


def drawn(*bars: Bar | str, log: bool = False) -> list[tuple[float, float]]:
    """Reads where each bar begins and how long it is, in per cent of the track."""
    picture = Picture("p", "title", tuple("abcdefgh"[: len(bars)]), bars, "line", "foot", log)
    page = render(Page("title", "subject", Verdict("Sentence.", True, picture=picture), (), (), ()))
    marks = re.findall(r'class="bar" style="left: ([\d.]+)%; width: ([\d.]+)%', page)
    return [(float(left), float(width)) for left, width in marks]


def line_place(page: str) -> float:
    return float(re.findall(r'class="line" style="left: ([\d.]+)%', page)[0])


def test_bars_have_the_length_of_their_values() -> None:
    """Catches a bar twice as long as it should be, and one that leaves its track."""
    (one, two, clipped) = drawn(Bar(0.5, "", BLUE), Bar(1.0, "", BLUE), Bar(400.0, "", ORANGE))
    assert one[0] == two[0] == clipped[0] == 0
    assert two[1] == pytest.approx(2 * one[1], abs=0.1) and clipped[1] == 100


def test_bars_of_ratios_start_at_one() -> None:
    """Catches a slowdown that points the same way as a speed-up, or looks smaller than one of the same size."""
    (faster, slower, level) = drawn(Bar(2.0, "", BLUE), Bar(0.5, "", ORANGE), Bar(1.0, "", BLUE), log=True)
    assert faster[1] > 40 and faster[1] == pytest.approx(slower[1], abs=0.1)
    assert slower[0] + slower[1] == pytest.approx(faster[0], abs=0.1) and level == (faster[0], 0)


def test_share_of_the_bound_agrees_with_the_verdict() -> None:
    """Catches a bar that ends before the bound of an output that failed, or beyond that of one that is right."""
    assert errors(0.99).share_of_bound == pytest.approx(0.99) and errors(0.99).problem is None
    for wrong in (state("a", 1.01), state("a", 0.5, 1.01)):
        assert wrong.share_of_bound == pytest.approx(1.01) and not wrong.ok
    assert errors(20).share_of_bound == 20
    page = wrong_report().to_html()
    lengths = [float(width) for width in re.findall(r'class="bar" style="left: 0.00%; width: ([\d.]+)%', page)]
    assert [length > line_place(page) for length in lengths] == [False, True, False]
    assert [label for label in ("50 %", "150 %") if f">{label}<" in page] == ["50 %", "150 %"]


def test_output_that_is_not_finite_has_no_bar() -> None:
    """Catches a crash, or a bar of no length, for NaN."""
    page = report_not_finite().to_html()
    assert '<span class="value"><span class="status">not finite</span></span>' in page
    assert page.count('class="bar"') == 1


def test_picture_needs_no_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a verdict without its picture where matplotlib is not installed."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = report().to_html()
    assert page.count('class="bar"') == 3 and "<svg" not in page
    assert page.index("matplotlib is not installed") < page.index("<h2")


def test_heads_are_wrapped_to_their_columns() -> None:
    """Catches a head that makes a column of figures far wider than they are, or that stands beside its column."""
    lines = plain_table(TABLE).splitlines()
    assert lines == ["title", "      error ÷", "name  eager's  b", "one      1.00  2", "two     10.00  3"]


def test_a_table_too_wide_goes_on_below() -> None:
    """Catches a column that is lost, or a line that a narrow terminal breaks."""
    text = plain_table(TABLE, 14)
    assert max(map(len, text.splitlines())) <= 14 and text.count("two") == 2
    reason = Table("t", TABLE.header, (Line("one", (), "failed", "a reason " * 9),))
    assert max(map(len, plain_table(reason, 44).splitlines())) <= 44
    assert plain_table(reason).splitlines()[-1].startswith("one   failed: a reason a reason")


def test_verdict_counts_workloads() -> None:
    """Catches a slower or an undecided workload that counts as faster, and a mean over something else."""
    rows = [row("a", "fastbert"), row("a", "eager", 8.0), row("b", "fastbert"), row("b", "eager", 1.01)]
    rows += [row("c", "fastbert"), row("c", "eager", 0.5)]
    found = verdict(results(*rows))
    assert found.sentence == (
        "fastbert is faster than the fastest other competitor in 1 of 3 workloads, level with it in 1 and slower in 1. "
        "It is 1.59 times as fast (geometric mean; 0.50× to 8.00×)."
    )
    assert found.good and found.picture is not None and len(found.picture.bars) == 3
    assert not verdict(results(row("c", "fastbert"), row("c", "eager", 0.5))).good
    one = verdict(good_results())
    assert "faster than the fastest other competitor in 1 of 2 workloads and slower in 1." in one.sentence


def test_fastbert_is_no_other_of_itself() -> None:
    """Catches fastbert in 8 bits as the fastest other of fastbert in 16."""
    rows = [row("a", "fastbert"), row("a", "fastbert int8", 0.5), row("a", "eager", 2.0)]
    found = verdict(results(*rows))
    assert "in 1 of 1 workload. It is 2.00 times as fast." in found.sentence
    assert found.picture is not None and found.picture.remarks == ("eager",)
    assert [bar.label for bar in found.picture.bars if isinstance(bar, Bar)] == ["2.00×"]


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([], "There are no rows."),
        ([row("a", "eager")], "fastbert did not take part."),
        ([row("a", "fastbert")], "No other competitor was timed beside fastbert, so there is no ratio."),
    ],
    ids=["no rows", "no fastbert", "no other"],
)
def test_verdict_on_what_allows_none(rows: list, sentence: str) -> None:
    """Catches a crash, or praise, where there is nothing to compare."""
    found = verdict(Results({}, rows))
    assert found.sentence == sentence and found.picture is None
    assert found.good == (bool(rows) and rows[0].competitor == "fastbert")


def test_many_workloads_share_bars() -> None:
    """Catches a picture that is longer than a screen."""
    rows = [r for i in range(2 * MOST_BARS) for r in (row(f"w{i}", "fastbert"), row(f"w{i}", "eager", 2.0))]
    picture = verdict(results(*rows)).picture
    assert picture is not None and picture.names == ("model · fp32",) and "geometric means" in picture.title
    assert [bar.label for bar in picture.bars if isinstance(bar, Bar)] == ["2.00×"]
    assert picture.remarks == (f"in {2 * MOST_BARS} workloads",)


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="figures need matplotlib (extra 'bench')")
def test_picture_as_a_figure() -> None:
    """Catches a picture that Markdown cannot show, or that does not say where it was measured."""
    picture = verdict(good_results()).picture
    assert picture is not None
    plot = picture.plot("times as fast", "Planted H100")
    assert plot is not None and "Planted H100" in plot.svg() and "fp32: ONNX" in plot.svg()
    assert verdict(results(row("a", "fastbert"))).picture is None
