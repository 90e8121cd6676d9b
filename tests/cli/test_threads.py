"""Threads follow what a container may use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastbert import threads


def group(tmp_path: Path, own: str, **files: str) -> threads.Limit:
    """The limit under a system that says these things. files: path with __ for / -> content."""
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "own").write_text(own)
    for name, content in files.items():
        file = tmp_path / "cgroup" / name.replace("__", "/").replace("_DOT_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    return threads.processor_limit(tmp_path / "cgroup", tmp_path / "own")


@pytest.fixture(autouse=True)
def sixteen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine has sixteen processors, of which twelve are allowed."""
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))


@pytest.mark.parametrize(("content", "expected"), [("250000 100000", 2), ("50000 100000", 1), ("max 100000", 12)])
def test_version_2(tmp_path: Path, content: str, expected: int) -> None:
    """Catches a quota of cgroup v2 that is not read, or read as more than its whole processors."""
    assert group(tmp_path, "0::/\n", cpu_DOT_max=content).n_processors == expected


def test_version_2_of_a_group_above(tmp_path: Path) -> None:
    """Catches a quota of a pod that its container does not repeat."""
    limit = group(tmp_path, "0::/pod/box\n", pod__box__cpu_DOT_max="max 100000", pod__cpu_DOT_max="300000 100000")
    assert limit.n_processors == 3 and "pod/cpu.max" in limit.reason and "quota is 3" in limit.reason


@pytest.mark.parametrize(("quota", "expected"), [("400000", 4), ("-1", 12)])
def test_version_1(tmp_path: Path, quota: str, expected: int) -> None:
    """Catches a quota of cgroup v1 that is not read, as a container sees it at the root of the mount."""
    own = "12:memory:/docker/x\n4:cpu,cpuacct:/docker/x\n0::/\n"
    files = {"cpu,cpuacct__cpu_DOT_cfs_quota_us": quota, "cpu,cpuacct__cpu_DOT_cfs_period_us": "100000"}
    assert group(tmp_path, own, **files).n_processors == expected


def test_without_groups(tmp_path: Path) -> None:
    """Catches a failure on a system without cgroups, or with files that hold something else."""
    assert (
        threads.processor_limit(tmp_path / "none", tmp_path / "none").reason == "the set of allowed processors has 12"
    )
    assert group(tmp_path, "0::/\nnonsense\n", cpu_DOT_max="what").n_processors == 12


def test_odd_groups(tmp_path: Path) -> None:
    """Catches names of groups that are no UTF-8, a quota beyond all numbers, and a hierarchy of both versions."""
    both = "4:cpuacct,cpu:/a\n1:name=systemd:/a\n0::/a\n"
    files = {"cpu__a__cpu_DOT_cfs_quota_us": "250000", "cpu__a__cpu_DOT_cfs_period_us": "100000"}
    assert group(tmp_path / "both", both, **files).n_processors == 2
    assert group(tmp_path / "large", "0::/\n", cpu_DOT_max="9" * 400 + " 1").n_processors == 12
    limit = group(tmp_path / "zero", "0::/../../x (deleted)\n", cpu_DOT_max="100000 0", x__cpu_DOT_max="")
    assert limit.n_processors == 12
    (tmp_path / "own").write_bytes(b"0::/caf\xe9\n")
    folder = tmp_path / "cgroup" / os.fsdecode(b"caf\xe9")
    folder.mkdir(parents=True)
    (folder / "cpu.max").write_text("300000 100000")
    limit = threads.processor_limit(tmp_path / "cgroup", tmp_path / "own")
    assert limit.n_processors == 3 and limit.reason.isprintable()


def run(code: str, **variables: str) -> str:
    unwanted = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", threads.TOKENIZER_VARIABLE)
    environment = {key: value for key, value in os.environ.items() if key not in unwanted}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment | variables, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_threads_are_set() -> None:
    """Catches threads of PyTorch or of the tokenizers that do not follow, and a user's own number that is undone."""
    code = (
        "import os, torch; from fastbert import threads; torch.set_num_threads(8);"
        "threads.processor_limit = lambda: threads.Limit(3, 'a quota');"
        "limit = threads.set_threads({n});"
        "print(torch.get_num_threads(), os.environ['RAYON_NUM_THREADS'], limit.reason)"
    )
    assert run(code.format(n="")) == "3 3 a quota"
    assert run(code.format(n="5")) == "5 5 as asked for"
    assert run(code.format(n=""), RAYON_NUM_THREADS="2") == "3 2 a quota"
    fewer = code.replace("set_num_threads(8)", "set_num_threads(1)")
    assert run(fewer.format(n="")) == "1 1 PyTorch's choice; a quota"
    assert run(fewer.format(n=""), OMP_NUM_THREADS="1") == "1 1 OMP_NUM_THREADS"


def test_less_than_one_thread_is_refused() -> None:
    """Catches a number that PyTorch would refuse with its own words."""
    with pytest.raises(ValueError, match="threads: got 0, expected at least 1"):
        threads.set_threads(0)


def test_info_tells_what_decided(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches `fastbert info` that is silent about the limit, and --threads that changes nothing."""
    import torch

    from fastbert.cli.main import main

    present = torch.get_num_threads()
    monkeypatch.setenv(threads.TOKENIZER_VARIABLE, "1")
    try:
        assert main(["info", "--threads", "2"]) == 0
        assert "cpu, 2 threads (as asked for)" in capsys.readouterr().out and torch.get_num_threads() == 2
        monkeypatch.setattr(threads, "processor_limit", lambda: threads.Limit(1, "the container's quota is 1.5 (x)"))
        assert main(["info"]) == 0
        assert "cpu, 1 threads (the container's quota is 1.5 (x))" in capsys.readouterr().out
        assert main(["info", "--threads", "0"]) == 1
        assert "threads: got 0, expected at least 1" in capsys.readouterr().err
    finally:
        torch.set_num_threads(present)
