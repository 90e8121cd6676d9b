"""New results are compared with a baseline, on made-up results."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import pytest

from bench_cases import contest, line_of, results
from fastbert.bench.results import FAILED, MISSING, WRONG

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))  # where the project's own benchmarks import each other from
import baseline  # noqa: E402
import compare  # noqa: E402


def verdicts(before, after, **options):
    changes = compare.compare(results(*before), results(*after), **options)
    return {f"{change.key[2]} {change.competitor}": change.verdict for change in changes}


def test_slower_ratio_is_a_regression():
    """Catches a fall beyond threshold and intervals that goes unnoticed, or a slower machine taken for a slower us."""
    before = [contest(workload="a", ratios={"eager": 2.0, "flash": 1.0})]
    after = [contest(workload="a", ratios={"eager": 1.7, "flash": 1.3}, ours=0.5)]
    assert verdicts(before, after) == {"a fastbert": "same", "a eager": "slower", "a flash": "faster"}


@pytest.mark.parametrize(("ratio", "threshold"), [(1.85, 0.05), (1.7, 0.2), (2.0, 0.1)])
def test_within_interval_or_threshold_is_none(ratio, threshold):
    """Catches noise reported as a regression: intervals that overlap, or a fall below the threshold."""
    verdict_of = verdicts([contest()], [contest(ratios={"eager": ratio})], threshold=threshold)
    assert verdict_of["S128 b8 eager"] == "same"


@pytest.mark.parametrize(
    ("competitor", "status", "verdict"),
    [
        ("eager", FAILED, "broken"),
        ("eager", WRONG, "broken"),
        ("eager", MISSING, "not compared"),
        ("fastbert", WRONG, "broken"),
        ("fastbert", MISSING, "broken"),
    ],
)
def test_what_no_longer_runs(competitor, status, verdict):
    """Catches a broken competitor that passes as one of the same speed, or a missing package blamed on fastbert."""
    after = contest()
    for row in after:
        if row.competitor == competitor or competitor == "fastbert":
            row.speedup = None
        if row.competitor == competitor:
            row.status, row.detail = status, "planted"
    verdict_of = verdicts([contest()], [after])
    assert verdict_of[f"S128 b8 {competitor}"] == verdict
    assert competitor == "eager" or verdict_of["S128 b8 eager"] == "no ratio"


def test_dtypes_models_and_settings_are_compared_each_with_itself():
    """Catches a ratio in bf16 compared with one in fp32, or with that of another model."""
    one, two = contest(ratios={"eager": 4.0}), contest(ratios={"eager": 2.0}, dtype="float32")
    three = contest(ratios={"eager": 1.0}, model="MiniLM", setting="latency")
    assert set(verdicts([one, two, three], [three, two, one]).values()) == {"same"}
    assert set(verdicts([one], [two]).values()) == {"not compared"}


def test_exit_codes(tmp_path, capsys):
    """Catches a regression that lets a build pass, or a comparison across device types that says nothing."""
    paths = {name: tmp_path / f"{name}.json" for name in ("base", "slow", "cpu", "other")}
    results(contest()).save(paths["base"])
    results(contest(ratios={"eager": 1.0})).save(paths["slow"])
    results(contest(), kind="cpu", device="Xeon").save(paths["cpu"])
    results(contest(suite="text")).save(paths["other"])

    def run(name, *options):
        code = compare.main([str(paths["base"]), str(paths[name]), *options])
        return code, capsys.readouterr()

    code, said = run("base")
    assert code == 0 and "0 regressions" in said.out
    code, said = run("slow")
    assert code == 1 and "1 regression\n" in said.out and "-50.0 %" in said.out
    assert "2.00× [1.90 to 2.10]" in line_of(said.out, "slower")
    assert run("slow", "--threshold", "0.6")[0] == 0
    code, said = run("cpu")
    assert code == 2 and "device type cuda and the new results of cpu" in said.err
    code, said = run("cpu", "--force")
    assert code == 0 and "device: Planted H100, now Xeon" in said.out
    code, said = run("other")
    assert code == 2 and "no contest in common" in said.err


def test_baseline_is_the_newest_committed_one_of_the_device(tmp_path, monkeypatch, capsys):
    """Catches results compared with themselves, with another machine's, with older ones than need be, or not at all."""
    folder = tmp_path / "results"
    slow, fast = contest(ratios={"eager": 1.0}), contest(ratios={"eager": 3.0})
    results(slow, date="2026-01-01 00:00 UTC").save(folder / "old" / "model.json")
    results(contest(), date="2026-01-02 00:00 UTC").save(folder / "day" / "model.json")
    results(fast, date="2026-01-03 00:00 UTC", device="Another").save(folder / "another" / "model.json")
    monkeypatch.setattr(compare, "committed", functools.partial(baseline.committed, results=folder))

    def run():
        return compare.main([str(folder / "day")]), capsys.readouterr()

    code, said = run()
    assert code == 2 and "could not be read from git" in said.err
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "results"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    code, said = run()  # unchanged since it was committed, so that the one before counts
    assert code == 0 and "old as committed" in said.out and "+100.0 %" in said.out
    results(slow, date="2026-01-02 09:00 UTC").save(folder / "day" / "model.json")
    code, said = run()  # written anew on the same day
    assert code == 1 and "day as committed" in said.out and "1 regression" in said.out
    results(slow, date="2026-01-04 00:00 UTC", device="A third").save(folder / "day" / "model.json")
    code, said = run()
    assert code == 2 and "no committed results of 'A third'" in said.err
