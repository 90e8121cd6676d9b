"""The README holds the figures of the newest results."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bench_cases import BROKEN, contest, results
from fastbert.bench.results import FAILED, Row

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))  # where the project's own benchmarks import each other from
import readme_figures  # noqa: E402
import report as page  # noqa: E402


def test_readme_is_what_the_committed_results_give():
    """Catches figures in the README that were edited by hand, or that are older than the results."""
    committed = {folder: page.load(folder) for folder in readme_figures.committed(page.RESULTS)}
    assert readme_figures.written(ROOT / "README.md") == readme_figures.section(committed), (
        "run `python benchmarks/report.py --readme`"
    )


def test_readme_section():
    """Catches a device that was not measured left out, older results shown, or the strongest peer left unnamed."""
    assert readme_figures.section({}) == "**GPU**: not measured yet.\n\n**CPU**: not measured yet."
    old = results(contest(ratios={"eager": 9.0}), date="2025-01-01 00:00 UTC")
    kernels = contest("kernels", ratios={"eager": 7.0})
    new = results(contest(ratios={"eager": 2.0, "flash": 1.5}, broken=BROKEN), kernels)
    text = readme_figures.section({Path("x/b-old"): old, Path("x/a-new"): new})
    assert "**GPU: Planted H100, 2026-02-01, commit 0123456789**" in text and "**CPU**: not measured yet." in text
    assert "| model · bf16 | 1.02 M | 1.50×: flash | 1.75× |" in text
    assert "compiled (1 failed of 1), cuDNN (1 wrong of 1), OpenVINO (1 missing of 1)" in text
    assert "9.00" not in text and "7.00" not in text and "(benchmarks/results/a-new/)" in text


def test_readme_does_not_compare_fastbert_with_itself():
    """Catches fastbert in 8 bits named as the fastest peer of fastbert in 16."""
    alone = readme_figures.section({Path("x"): results(contest(ratios={"eager": 2.0}))})
    ratios = {"eager": 2.0, "fastbert int8": 0.6, "fastbert fp8": 0.5}
    assert readme_figures.section({Path("x"): results(contest(ratios=ratios))}) == alone


def test_readme_section_with_fastbert_failing():
    """Catches a workload that fastbert failed and that is dropped from the count."""
    failed = [Row("model", "S512 b8", "fastbert", "bfloat16", FAILED, "planted")]
    text = readme_figures.section({Path("x"): results(contest(), failed)})
    assert "| model · bf16 | 1.02 M; 1 failed | 2.00×: eager (1 of 2 workloads) | 2.00× |" in text
    text = readme_figures.section({Path("x"): results(failed)})
    assert "| model · bf16 | 1 failed | no ratio | no ratio |" in text


def test_readme_is_rewritten_between_the_markers(tmp_path):
    """Catches text around the figures that is lost, or a README without markers that is silently left as it is."""
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{readme_figures.START}{readme_figures.END}\nafter\n")
    for text in ("one", "two"):
        readme_figures.rewrite(readme, text)
        assert readme_figures.written(readme) == text
    assert readme.read_text() == f"before\n{readme_figures.START}\ntwo\n{readme_figures.END}\nafter\n"
    readme.write_text("no markers")
    with pytest.raises(ValueError, match=r"README.md: expected <!-- benchmarks:start -->"):
        readme_figures.rewrite(readme, "three")
    assert readme.read_text() == "no markers"
