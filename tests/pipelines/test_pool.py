"""A pool of processes: errors come back, a killed process is noticed, and none is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastbert.pipelines import pool as pools
from fastbert.pipelines.pool import Pool, RemoteTraceback, WorkerDied, as_devices, default_devices, shares
from fastbert.threads import Limit
from helpers import source_env
from pool_cases import Chores, Owner, Unpicklable, wait_until_gone

OWNER = Owner()


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(["cpu", "cpu"], Chores(), OWNER) as pool:
        yield pool


def test_values_come_back(pool: Pool) -> None:
    """Catches a tensor that changes its dtype or shape on the way, weights that are not there, and a lost job."""
    x = torch.rand(3, 4)
    answers = [future.result() for future in [pool.submit(("double", x)) for _ in range(40)]]
    for answer in answers:
        twice, [narrow] = answer["twice"]
        assert torch.equal(twice, 2 * x) and torch.equal(narrow, x.bfloat16()) and narrow.dtype == torch.bfloat16
        assert torch.equal(answer["weights"], torch.arange(5.0))
    assert {answer["process"] for answer in answers} == {process.pid for process in pool["processes"]}


def test_a_script_without_the_line_that_guards_it() -> None:
    """Catches an error that does not say what a script lacks whose processes run it once more."""
    crew = pools._Crew([torch.device("cpu")])
    crew.processes.append(SimpleNamespace(join=lambda seconds: None, exitcode=1, pid=5))
    error = str(crew._died(0, starting=True))
    assert error.startswith("pool: process 0 of 1 (cpu, pid 5) ended with exit code 1; a script that starts")
    assert "must be a file, and needs the line `if __name__ == '__main__':`" in error


def test_large_messages_pass_each_other(pool: Pool) -> None:
    """Catches a pool that hangs: a job and a result that wait for one another, each larger than a pipe holds."""
    x = torch.rand(700, 1000)
    for answer in [future.result(timeout=60) for future in [pool.submit(("double", x)) for _ in range(12)]]:
        assert torch.equal(answer["twice"][0], 2 * x)


def test_errors_come_back(pool: Pool) -> None:
    """Catches an error that loses its type or its traceback, one that cannot be sent, and a pool that is done for."""
    good = pool.submit(("divide", 1))
    with pytest.raises(ZeroDivisionError) as caught:
        pool.submit(("divide", 0)).result()
    assert isinstance(caught.value.__cause__, RemoteTraceback)
    assert "return 1 // value" in str(caught.value.__cause__) and "pool_cases.py" in str(caught.value.__cause__)
    with pytest.raises(RuntimeError, match="pool: a process on cpu failed") as other:
        pool.submit(("lock", None)).result()
    assert "it holds a lock" in str(other.value.__cause__) and Unpicklable.__name__ in str(other.value.__cause__)
    assert good.result() == pool.submit(("divide", 1)).result() == 1


def test_a_killed_process_is_named() -> None:
    """Catches a caller that waits for ever, jobs of the dead process or of the queue that are never answered, and a
    broken pool that takes more."""
    pool = Pool(["cpu"], Chores(), OWNER).start()
    pids = [process.pid for process in pool["processes"]]
    futures: list[Future[Any]] = [pool.submit(("die", signal.SIGKILL))]
    with pytest.raises(WorkerDied, match=r"pool: process 0 of 1 \(cpu, pid \d+\) was ended by SIGKILL; stop the pool"):
        futures += [pool.submit(("sleep", 60.0)) for _ in range(6)]
        futures[-1].result(timeout=60)
    for future in futures:
        with pytest.raises(WorkerDied, match="SIGKILL"):
            future.result(timeout=60)
    with pytest.raises(WorkerDied, match="SIGKILL"):
        pool.submit(("divide", 1))
    pool.stop()
    pool.stop()
    assert wait_until_gone(pids)


def test_stop_ends_what_runs() -> None:
    """Catches `stop` that waits for work to end, and a caller who is never told."""
    with Pool(["cpu"], Chores(), OWNER) as pool:
        pids = [process.pid for process in pool["processes"]]
        futures = [pool.submit(("sleep", 600.0)) for _ in range(3)]
    for future in futures:
        with pytest.raises(WorkerDied):
            future.result(timeout=60)
    assert wait_until_gone(pids)


def test_a_process_that_cannot_start() -> None:
    """Catches an error of loading that hangs the caller or leaves processes, and weights that cannot be sent."""
    pool = Pool(["cpu"], Chores(fails_at_start=True), OWNER)
    with pytest.raises(MemoryError, match="no room for the weights") as caught:
        pool.start()
    assert "pool_cases.py" in str(caught.value.__cause__)
    work: Any = lambda job: job  # noqa: E731
    with pytest.raises(TypeError, match="pool: the model cannot be pickled for other processes"):
        Pool(["cpu"], work, OWNER).start()


SCRIPT = """
import os, signal, sys
from fastbert.pipelines.pool import Pool
from pool_cases import Chores, Owner
if __name__ == "__main__":
    owner = Owner()
    pool = Pool(["cpu"], Chores(), owner).start()
    pool.submit(("sleep", float(sys.argv[2])))
    print(*(process.pid for process in pool["processes"]), flush=True)
    if sys.argv[1] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("end", "seconds"), [("exits", 600.0), ("killed", 0.1)])
def test_no_process_is_left(tmp_path: Path, end: str, seconds: float) -> None:
    """Catches processes that outlive a program that forgot `stop`, or one that was killed."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    path = os.pathsep.join([source_env()["PYTHONPATH"], str(Path(__file__).resolve().parents[1])])
    done = subprocess.run(
        [sys.executable, str(script), end, str(seconds)],
        env=source_env(PYTHONPATH=path), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == (0 if end == "exits" else -signal.SIGKILL), done.stderr
    assert wait_until_gone([int(pid) for pid in done.stdout.split()])


@pytest.mark.parametrize(
    ("threads", "limit", "allowed", "n", "expected"),
    [
        (4, 4, 4, 2, [(2, {0, 1}), (2, {2, 3})]),
        (5, 8, 8, 2, [(3, {0, 1, 2}), (2, {3, 4})]),
        (8, 3, 8, 2, [(2, None), (1, None)]),  # a quota of time: nobody knows which processors are free
        (1, 4, 4, 2, [(1, {0}), (1, {1})]),
        (2, 2, 2, 4, [(1, None)] * 4),  # more processes than processors
    ],
)
def test_shares(
    monkeypatch: pytest.MonkeyPatch, threads: int, limit: int, allowed: int, n: int, expected: list[Any]
) -> None:
    """Catches threads beyond what the machine or the container allows, and two processes on one processor."""
    monkeypatch.setattr(pools, "processor_limit", lambda: Limit(limit, "a test"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(allowed)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert shares(n) == expected


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a list of no devices, a name in the place of a list, GPUs beside CPUs, and a GPU that is not there."""
    assert as_devices("device", ("cpu", torch.device("cpu"))) == [torch.device("cpu")] * 2
    for devices in ([], "cpu", None):
        with pytest.raises(ValueError, match="device: got .*, expected a list of at least one device"):
            as_devices("device", devices)
    with pytest.raises(ValueError, match=r"device: got \['cpu', 'cuda:0'\], expected devices of one type"):
        as_devices("device", ["cpu", "cuda:0"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert default_devices() == ["cpu"] * 4
    with pytest.raises(ValueError, match="device: got 'cuda:1', expected one of the 0 GPUs"):
        Pool(["cuda:1"], Chores(), OWNER)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert default_devices() == ["cuda:0", "cuda:1"]
    assert as_devices("device", ["cuda", "cuda:1"]) == [torch.device("cuda"), torch.device("cuda:1")]
    with pytest.raises(ValueError, match="device: got 'cuda:2', expected one of the 2 GPUs"):
        as_devices("device", ["cuda:0", "cuda:2"])
    pool = Pool(["cpu"], Chores(), OWNER)
    with pytest.raises(KeyError, match="has only the key 'processes'"):
        pool["input"]
    pool.stop()
    with pytest.raises(ValueError, match="pool: got 'a stopped one'"):
        pool.start()
