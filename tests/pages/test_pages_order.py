"""Both kinds of page: the verdict first, the method and the environment last, one stylesheet, heads that speak."""

from __future__ import annotations

import html
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fastbert.bench.report import render_terminal, write_report
from fastbert.bench.results import Results
from fastbert.bench.tables import contests
from fastbert.diagnostics.verify.report import Report
from fastbert.pages.html import STYLESHEET
from page_cases import failing_results, good_results, report, report_not_finite, report_of_bad_weights, wrong_report

ONE_HEAD = re.compile(r'<th scope="col">(.*?)</th>')
HEADS_OF_VERIFY = [
    "output", "error", "eager&#x27;s error", "error ÷ eager&#x27;s", "bound on the error",
    "part alone: error ÷ eager&#x27;s", "cosine of the worst token", "cosine of the worst text", "verdict",
]  # fmt: skip
TEXTS = "4 texts, 27 tokens"
HEADS_OF_BENCH = ["workload", "fastbert&#x27;s speed", "faster than eager", "faster than ONNX"]


def bench_page(tmp_path: Path, results: Results, suffix: str = ".html") -> str:
    path = tmp_path / f"page{suffix}"
    write_report(results, path, title="a <title>")
    return path.read_text(encoding="utf-8")


@pytest.fixture(params=["bench", "bench of failures", "verify", "verify of a wrong model", "verify of bad weights"])
def page(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    pages: dict[str, Callable[[], str]] = {
        "bench": lambda: bench_page(tmp_path, good_results()),
        "bench of failures": lambda: bench_page(tmp_path, failing_results()),
        "verify": lambda: report().to_html(),
        "verify of a wrong model": lambda: wrong_report().to_html(),
        "verify of bad weights": lambda: report_of_bad_weights().to_html(),
    }
    return pages[request.param]()


def test_verdict_comes_before_everything_else(page: str) -> None:
    """Catches a table, a figure or the method above the verdict."""
    verdict = page.index('<section class="verdict')
    sentence = page.index('<p class="sentence">')
    assert verdict < sentence
    for other in ("<table", "<svg", "<h2", "<details", '<figure class="plot"', '<figure class="picture"'):
        assert page.find(other) == -1 or page.index(other) > sentence, other
    assert page.count('<p class="sentence">') == 1


def test_method_and_environment_come_last(page: str) -> None:
    """Catches a section, a table or a figure of results below the method."""
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings[-2:] == ["Method", "Environment"]
    method, environment = page.index('<section class="method">'), page.index('<section class="environment">')
    assert method < environment
    for block in ("<svg", '<figure class="picture"', "<details"):
        assert page.rfind(block) < method, block
    assert page[method:].count("<table>") == 0  # tables of facts alone, which have the class prose


def test_pages_share_one_stylesheet_and_need_nothing_else(page: str) -> None:
    """Catches a second stylesheet, a script, or a resource from outside."""
    assert re.findall(r"<style>(.*?)</style>", page, flags=re.S)[0] == STYLESHEET
    assert "http" not in page and "<script" not in page and "@import" not in page and "<link" not in page
    assert not re.search(r'\b(src|href)="(?!#)', page)


def test_stylesheet_knows_dark_narrow_and_printed_pages() -> None:
    """Catches a page that stays white in the dark, overflows a telephone, or prints folded and cut off."""
    for rule in ("prefers-color-scheme: dark", "max-width: 44rem", "@media print", "details::details-content"):
        assert rule in STYLESHEET
    assert "@media screen and (prefers-color-scheme: dark)" in STYLESHEET, "paper is white"


def test_heads_of_verify() -> None:
    """Catches a head that does not say what its column holds, as `times` did not."""
    page = report().to_html()
    assert ONE_HEAD.findall(page)[: len(HEADS_OF_VERIFY)] == HEADS_OF_VERIFY
    assert ONE_HEAD.findall(page)[len(HEADS_OF_VERIFY) :][:3] == ["measure", "the model&#x27;s", "eager&#x27;s"]
    assert all(head.strip() for head in ONE_HEAD.findall(page))


def test_heads_of_bench(tmp_path: Path) -> None:
    """Catches an empty head, or one that does not say what its column holds."""
    heads = ONE_HEAD.findall(bench_page(tmp_path, good_results()))
    assert heads[: len(HEADS_OF_BENCH)] == HEADS_OF_BENCH
    assert "time ÷ fastbert&#x27;s [95 % interval]" in heads and "valid tokens/s" in heads
    assert all(head.strip() for head in heads)


def test_the_terminal_has_the_heads_of_the_page() -> None:
    """Catches a printed report whose heads differ from those of the page."""
    printed = words_of_heads(str(report()))
    for head in report().table().header:
        assert set(head.split()) <= printed, head
    printed = words_of_heads(render_terminal(good_results(), width=200))
    for head in ("fastbert's speed", "faster than eager", "time ÷ fastbert's [95 % interval]", "valid tokens/s"):
        assert set(head.split()) <= printed, head


def words_of_heads(text: str) -> set[str]:
    return set(text.split())


@pytest.mark.parametrize(
    ("findings", "sentence"),
    [
        (
            report(),
            "The model is as accurate as plain PyTorch: on 4 texts, 27 tokens, all 3 outputs keep their bounds.",
        ),
        (wrong_report(), f"The model is wrong: on {TEXTS}, 1 of 3 outputs misses its bound."),
        (report_not_finite(), f"The model is wrong: on {TEXTS}, 1 of 2 outputs misses its bound."),
        (report_of_bad_weights(), "1 parameter of the model is not finite, so nothing was run."),
    ],
    ids=["right", "wrong", "not finite", "bad weights"],
)
def test_first_sentence_of_verify(findings: Report, sentence: str) -> None:
    """Catches a page of a wrong model that opens with anything else."""
    page = findings.to_html()
    word = "ok" if findings.ok else "FAILED"
    assert f'<p class="sentence"><span class="word">{word}</span>{sentence}</p>' in page
    assert f'<section class="verdict {"good" if findings.ok else "bad"}">' in page
    for problem in findings.problems:
        assert page.index(html.escape(problem)) < page.index("<h2")


def test_first_sentence_of_failing_benchmarks(tmp_path: Path) -> None:
    """Catches a page that opens with speed-ups where fastbert itself was wrong."""
    page = bench_page(tmp_path, failing_results())
    assert '<p class="sentence">fastbert gave wrong output in 1 and failed in 1 of 3 workloads.' in page
    assert '<section class="verdict bad">' in page
    for reason in ("error 1 above the bound 0.1", "&lt;planted&gt;"):
        assert page.index(reason) < page.index("<h2")
    assert ">fastbert wrong<" in page and ">fastbert failed<" in page
    assert "gave wrong output in 1" in render_terminal(failing_results(), width=100).splitlines()[-2]


def test_pages_escape_what_they_are_told(tmp_path: Path) -> None:
    """Catches a name that becomes a tag."""
    assert "<pooler>" not in report().to_html() and "&lt;pooler&gt;" in report().to_html()
    page = bench_page(tmp_path, failing_results())
    assert "a &lt;title&gt;" in page and "<planted>" not in page and "<title>a <" not in page


def test_notes_stand_beside_the_verdict() -> None:
    """Catches a report that hides below its tables that texts were cut."""
    page = report().to_html()
    assert page.index('<p class="note">a note</p>') < page.index("<h2")


def test_markdown_has_the_same_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a Markdown page with the method or a table above the verdict."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = bench_page(tmp_path, good_results(), ".md")
    order = [
        "# a ",
        "Planted H100",
        "**fastbert is faster",
        "matplotlib is not installed",
        "## Suite model",
        "| workload",
    ]
    places = [text.index(part) for part in [*order, "## Method", "bootstrap", "## Environment", "copy GB/s"]]
    assert places == sorted(places)


@pytest.mark.parametrize("make", [good_results, failing_results])
def test_every_contest_is_in_the_picture(make: Callable[[], Results], tmp_path: Path) -> None:
    """Catches a workload that the picture leaves out."""
    page = bench_page(tmp_path, make())
    names = re.findall(r'<span class="name">(.*?)</span>', page)
    assert names == [f"model · {contest.label}" for contest in contests(make().rows)]
