"""The harness shows a planted sleep as the ratio it should be, and catches a planted wrong output."""

from __future__ import annotations

import json
import subprocess
import time

import pytest
import torch

from fastbert.bench import measure, results
from fastbert.bench.measure import Timing
from fastbert.bench.peers import OURS, Peer, contest
from fastbert.bench.results import FAILED, MISSING, OK, WRONG, Results, Row, environment

CPU = torch.device("cpu")


class Sleeper(Peer):
    """A peer that sleeps, and returns the reference times a factor."""

    def __init__(self, name, seconds=0.002, factor=1.0, missing=None, fail_in=None):
        self.name, self.seconds, self.factor, self.missing, self.fail_in = name, seconds, factor, missing, fail_in
        self.runs = []

    def obstacle(self):
        return self.missing

    def prepare(self):
        if self.fail_in == "prepare":
            raise RuntimeError("planted in prepare\nwith a second line")

    def run(self, i):
        self.runs.append(i)
        if self.fail_in == "run":
            raise RuntimeError("planted in run")
        time.sleep(self.seconds)

    def output(self):
        return torch.arange(1.0, 9.0) * self.factor


def hold(*peers, **timing):
    def row(peer):
        return Row("test", "sleep", peer.name, "float32")

    reference = torch.arange(1.0, 9.0, dtype=torch.float64)
    rows = contest(peers, row, reference, device=CPU, eager=peers[1].name, **{"rounds": 7, "tokens": 100, **timing})
    return {each.competitor: each for each in rows}


def test_planted_sleep_shows_as_its_ratio():
    """Catches a harness that times something else than the run, or divides the wrong way round."""
    rows = hold(Sleeper(OURS, 0.004), Sleeper("eager", 0.012), Sleeper("half", 0.002))
    assert 2.6 < rows["eager"].speedup < 3.2 and rows["eager"].speedup_low <= rows["eager"].speedup
    assert rows["eager"].speedup <= rows["eager"].speedup_high
    assert 0.4 < rows["half"].speedup < 0.65
    assert rows[OURS].speedup is None and 0.004 <= rows[OURS].seconds < 0.006
    assert rows["eager"].tokens_per_second == pytest.approx(100 / rows["eager"].seconds)


def test_planted_wrong_output_is_caught():
    """Catches a fast peer that computes something else and is given a speed."""
    wrong = Sleeper("wrong", factor=1.02)
    rows = hold(Sleeper(OURS), Sleeper("eager"), wrong)
    assert rows["wrong"].status == WRONG and rows["wrong"].detail == "error 0.02 above the bound 0.01"
    assert rows["wrong"].seconds is None and wrong.runs == []
    assert rows[OURS].status == rows["eager"].status == OK


def test_fastbert_is_held_to_the_policy():
    """Catches a bound for fastbert that is as loose as that for its peers."""
    rows = hold(Sleeper(OURS, factor=1.001), Sleeper("eager", factor=1.0005))
    assert rows[OURS].status == WRONG and rows["eager"].status == OK
    rows = hold(Sleeper(OURS, factor=1.0006), Sleeper("eager", factor=1.0005))
    assert rows[OURS].status == OK


def test_nan_is_wrong():
    """Catches an output of NaN that no comparison rejects."""
    rows = hold(Sleeper(OURS), Sleeper("eager"), Sleeper("nan", factor=float("nan")))
    assert rows["nan"].status == WRONG


@pytest.mark.parametrize("where", ["prepare", "run"])
def test_failure_shows_as_such(where):
    """Catches a peer that raises and takes the others with it, or leaves a blank."""
    rows = hold(Sleeper(OURS), Sleeper("eager"), Sleeper("broken", fail_in=where))
    assert rows["broken"].status == FAILED and rows["broken"].detail == f"RuntimeError: planted in {where}"
    assert rows["broken"].seconds is None
    assert rows["eager"].speedup is not None


def test_missing_peer_says_why():
    """Catches a peer that is not installed left out of the table."""
    rows = hold(Sleeper(OURS), Sleeper("eager"), Sleeper("absent", missing="the package absent is not installed"))
    assert (rows["absent"].status, rows["absent"].detail) == (MISSING, "the package absent is not installed")


def test_wrong_fastbert_compares_with_nobody():
    """Catches a speed-up of fastbert over others although its own output was wrong."""
    rows = hold(Sleeper(OURS, factor=2.0), Sleeper("eager"))
    assert rows[OURS].status == WRONG and rows["eager"].seconds is not None and rows["eager"].speedup is None


def test_rounds_are_interleaved_and_inputs_rotate():
    """Catches competitors timed one after the other, or always on the same input."""
    order = []
    runs = {name: lambda i, name=name: order.append((name, i)) for name in "ab"}
    timings = measure.interleave(runs, device=CPU, rounds=4, warmup=0)
    assert [name for name, _ in order] == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert [i for name, i in order if name == "a"] == [0, 1, 2, 3]
    assert all(len(t.samples) == 4 for t in timings.values())


def test_time_limit_keeps_the_least_rounds():
    """Catches a limit that is ignored, or that leaves a single sample."""
    timings = measure.interleave(
        {"a": lambda i: time.sleep(0.01)}, device=CPU, rounds=50, max_seconds=0.0, min_rounds=3
    )
    assert len(timings["a"].samples) == 3


def test_short_runs_are_repeated():
    """Catches a run that is too short for the clock."""
    count = []
    timings = measure.interleave({"a": count.append}, device=CPU, rounds=3, warmup=1, min_sample_seconds=1e-3)
    assert len(count) > 100 and timings["a"].median < 1e-4


def test_statistics():
    """Catches percentiles, spread or intervals computed from the wrong end."""
    timing = Timing(tuple(float(i) for i in range(1, 101)))
    assert timing.median == 50.5 and timing.percentile(95) == 95.0 and timing.percentile(100) == 100.0
    assert timing.percentile(1) == 1.0 and timing.spread == pytest.approx(0.49, abs=0.01)
    ratio = measure.speedup(Timing((1.0, 2.0, 4.0)), Timing((2.0, 4.0, 8.0)))
    assert (ratio.value, ratio.low, ratio.high) == (2.0, 2.0, 2.0)
    assert measure.geometric_mean([1.0, 4.0]) == pytest.approx(2.0)


def test_results_round_trip(tmp_path):
    """Catches a field lost on the way to the file, or NaN that is not JSON."""
    saved = Results(environment(CPU), [Row("s", "w", "c", "float32", error=float("nan"), extra={"a": 1})], {"x": 2.0})
    saved.save(tmp_path / "r.json")
    back = Results.load(tmp_path / "r.json")
    assert back.environment == saved.environment and back.ceilings == saved.ceilings
    assert back.rows == [Row("s", "w", "c", "float32", error=None, extra={"a": 1})]


def test_environment_names_the_machine():
    """Catches a result that nobody can place: without device, versions, commit or date."""
    facts = environment(CPU)
    assert (
        facts["device"] and facts["packages"]["torch"] == torch.__version__.split("+")[0] or facts["packages"]["torch"]
    )
    assert facts["date"].endswith("UTC") and facts["threads"] >= 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"kind": "fastbert benchmark", "version": 1, "rows": [', "not a readable result file"),
        ("[]", "not a result file of fastbert's benchmarks"),
        ('{"kind": "other"}', "not a result file of fastbert's benchmarks"),
        ('{"kind": "fastbert benchmark", "version": 99}', "a result file of version 99, but this version"),
        ('{"kind": "fastbert benchmark", "version": 1}', "a result file with missing or unknown fields"),
    ],
)
def test_bad_result_file_is_refused_by_name(content, message, tmp_path):
    """Catches a result file of another version, or one that is cut short, read by half."""
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"bad.json: {message}"):
        Results.load(path)


def test_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    """Catches half a result file under the final name."""
    path = tmp_path / "r.json"
    Results({}, []).save(path)
    before = path.read_text()
    monkeypatch.setattr(json, "dumps", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Results({}, [Row("s", "w", "c", "d")]).save(path)
    assert path.read_text() == before


def test_commit_of_the_sources(tmp_path, monkeypatch):
    """Catches sources called changed because a run wrote over committed results, or a change that is hidden."""

    def git(*args):
        who = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        done = subprocess.run(["git", "-C", str(tmp_path), *who, *args], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    source = tmp_path / "fastbert" / "bench" / "results.py"
    result = tmp_path / "benchmarks" / "results" / "r.json"
    for path in (source, result, tmp_path / "setup.py"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("1")
    git("init", "--quiet")
    git("add", "--all")
    git("commit", "--quiet", "--message", "m")
    monkeypatch.setattr(results, "__file__", str(source))
    name = git("rev-parse", "--short=10", "HEAD")
    result.write_text("2")
    (tmp_path / "new.txt").write_text("not of the sources yet")
    assert results.commit() == name
    source.write_text("2")
    assert results.commit() == f"{name}-dirty"
