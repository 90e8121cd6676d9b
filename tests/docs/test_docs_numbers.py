"""The numbers of docs/numbers.md and the chart of the README are what the committed results give."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastbert.bench.measure import Ratio, Timing
from fastbert.bench.results import FAILED, MISSING, WRONG, Results, Row

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))  # where the project's own benchmarks import each other from

import readme_chart  # noqa: E402
import readme_figures  # noqa: E402
import report  # noqa: E402

BROKEN = {"compiled": FAILED, "cuDNN": WRONG, "OpenVINO": MISSING}
COMMAND = "run `python benchmarks/report.py --readme`"


def contest(suite="model", workload="S128 b8", ratios=None, *, dtype="bfloat16", broken=(), **extra):
    """fastbert's row, one a peer with the ratio that it should show, and those that did not run."""
    rows = [Row(suite, workload, "fastbert", dtype, extra=dict(extra))]
    for name, ratio in (ratios or {"eager": 2.0}).items():
        rows.append(Row(suite, workload, name, dtype, extra=dict(extra)).compared(Ratio(ratio, ratio, ratio)))
    for row in rows:
        row.timed(Timing((0.001 * (row.speedup or 1.0),) * 3), tokens=1024, items=8)
    return rows + [Row(suite, workload, name, dtype, BROKEN[name], "planted", extra=dict(extra)) for name in broken]


def results(*contests, date="2026-02-01 12:30 UTC", kind="cuda"):
    environment = {"device": "Planted H100", "device_type": kind, "date": date, "commit": "0123456789", "packages": {}}
    return Results(environment, [row for rows in contests for row in rows])


def committed():
    return {folder: report.load(folder) for folder in readme_figures.committed(report.RESULTS)}


def texts_of(svg):
    """What a reader of the picture sees written."""
    return [html.unescape(text) for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg)]


def test_table_is_what_the_committed_results_give():
    """Catches numbers in docs/numbers.md that were edited by hand, or that are older than the results."""
    assert readme_figures.written(ROOT / "docs" / "numbers.md") == readme_figures.section(committed()), COMMAND


def test_caption_and_chart_are_what_the_committed_results_give():
    """Catches a caption of the README, or a chart, that shows other numbers than the results."""
    headline = readme_chart.headline(committed())
    assert headline is not None
    assert readme_figures.written(ROOT / "README.md") == headline.caption(), COMMAND
    drawn = (ROOT / readme_chart.CHART).read_text(encoding="utf-8")
    (data,) = re.findall(r"<desc>(.*?)</desc>", drawn, re.DOTALL)
    assert html.unescape(data).splitlines() == headline.lines(), COMMAND
    for line in headline.lines():  # and the picture itself, not only the text that comes with it
        competitor, _, speed = line.rpartition(": ")
        assert competitor in texts_of(drawn) and speed.removesuffix(" tokens/s") in texts_of(drawn), COMMAND


def test_chart_that_is_drawn_anew_has_the_words_and_numbers_of_the_committed_one():
    """Catches a chart that was drawn by other code than the command's, where that can draw."""
    pytest.importorskip("matplotlib", reason="figures need matplotlib, which comes with the extra 'bench'")
    headline = readme_chart.headline(committed())
    drawn = (ROOT / readme_chart.CHART).read_text(encoding="utf-8")
    assert texts_of(headline.svg()) == texts_of(drawn)


def test_headline_is_the_newest_contest_of_throughput():
    """Catches a chart of an older machine, of latency or of another suite, and one that leaves out a faster peer."""
    assert readme_chart.headline({}) is None
    text = {"suite": "text", "setting": "throughput", "model": "MiniLM"}
    old = results(contest(ratios={"eager": 9.0}, **text), date="2025-01-01 00:00 UTC")
    latency = contest("text", setting="latency", ratios={"eager": 7.0})
    new = results(
        contest(ratios={"eager": 5.0}),
        latency,
        contest(ratios={"slow": 2.0, "fast": 0.5, "fastbert int8": 0.4}, **text),
    )
    newest = results(contest(), date="2026-03-01 00:00 UTC")
    headline = readme_chart.headline({Path("a"): newest, Path("b"): new, Path("c"): old})
    lines = [
        "fastbert int8: 2.56 M tokens/s",
        "fast: 2.05 M tokens/s",
        "fastbert: 1.02 M tokens/s",
        "slow: 512 k tokens/s",
    ]
    assert headline.lines() == lines
    caption = headline.caption()
    assert "0.50× as many as the fastest other, fast." in caption and "Planted H100, 2026-02-01" in caption
    assert all(line in caption for line in lines)


def test_section():
    """Catches a device that was not measured left out, older results shown, or the strongest peer left unnamed."""
    assert readme_figures.section({}) == "**GPU**: not measured yet.\n\n**CPU**: not measured yet."
    old = results(contest(ratios={"eager": 9.0}), date="2025-01-01 00:00 UTC")
    kernels = contest("kernels", ratios={"eager": 7.0})
    new = results(contest(ratios={"eager": 2.0, "flash": 1.5}, broken=BROKEN), kernels)
    text = readme_figures.section({Path("x/b-old"): old, Path("x/a-new"): new})
    assert "**GPU: Planted H100, 2026-02-01, commit 0123456789**" in text and "**CPU**: not measured yet." in text
    assert "| model · bf16 | 1.02 M | 1.50×: flash | 1.75× |" in text
    assert "compiled (1 failed of 1), cuDNN (1 wrong of 1), OpenVINO (1 missing of 1)" in text
    assert "9.00" not in text and "7.00" not in text and "(../benchmarks/results/a-new/)" in text


def test_section_does_not_compare_fastbert_with_itself():
    """Catches fastbert in 8 bits as the fastest peer of fastbert in 16."""
    alone = readme_figures.section({Path("x"): results(contest(ratios={"eager": 2.0}))})
    ratios = {"eager": 2.0, "fastbert int8": 0.6, "fastbert fp8": 0.5}
    assert readme_figures.section({Path("x"): results(contest(ratios=ratios))}) == alone


def test_section_with_fastbert_failing():
    """Catches a workload that fastbert failed dropped from the count."""
    failed = [Row("model", "S512 b8", "fastbert", "bfloat16", FAILED, "planted")]
    text = readme_figures.section({Path("x"): results(contest(), failed)})
    assert "| model · bf16 | 1.02 M; 1 failed | 2.00×: eager (1 of 2 workloads) | 2.00× |" in text
    text = readme_figures.section({Path("x"): results(failed)})
    assert "| model · bf16 | 1 failed | no ratio | no ratio |" in text


def test_folders_inside_a_folder_of_results_are_left_out(tmp_path):
    """Catches results of fine-tuning, which have another form, read as results of a suite."""
    for name in ("one/text.json", "two/text.json", "two/finetuning/results.json"):
        (tmp_path / "results" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "results" / name).write_text("{}")
    folders = [tmp_path / "results" / "one", tmp_path / "results" / "two"]
    assert readme_figures.committed(tmp_path / "results") == folders
    for args in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", "-C", str(tmp_path), *args], check=True)
    assert readme_figures.committed(tmp_path / "results") == folders


def test_page_is_rewritten_between_the_markers(tmp_path):
    """Catches text around the numbers that gets lost, and a page without markers that is silently left as it is."""
    page = tmp_path / "numbers.md"
    page.write_text(f"before\n{readme_figures.START}{readme_figures.END}\nafter\n")
    for text in ("one", "two"):
        readme_figures.rewrite(page, text)
        assert readme_figures.written(page) == text
    assert page.read_text() == f"before\n{readme_figures.START}\ntwo\n{readme_figures.END}\nafter\n"
    page.write_text("no markers")
    with pytest.raises(ValueError, match=r"numbers.md: expected <!-- benchmarks:start -->"):
        readme_figures.rewrite(page, "three")
    assert page.read_text() == "no markers"


def test_command_writes_table_chart_and_caption(tmp_path):
    """Catches a file that the command forgets."""
    pytest.importorskip("matplotlib", reason="figures need matplotlib, which comes with the extra 'bench'")
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/numbers.md"):
        (tmp_path / name).write_text(f"{readme_figures.START}{readme_figures.END}\n")
    folders = {tmp_path / "x": results(contest("text", setting="throughput", model="MiniLM"))}
    written = report.write_readme(tmp_path, folders)
    assert {path.relative_to(tmp_path).as_posix() for path in written} == {
        "README.md",
        "docs/numbers.md",
        "docs/speed.svg",
    }
    assert "fastbert: 1.02 M tokens/s" in (tmp_path / "README.md").read_text()
    assert "fastbert: 1.02 M tokens/s" in (tmp_path / "docs" / "speed.svg").read_text()
    assert "1.02 M" in (tmp_path / "docs" / "numbers.md").read_text()
