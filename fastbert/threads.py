"""The number of threads follows what a container may use, and not how many processors the machine has.

PyTorch, OpenMP and the tokenizers count processors. A quota of a container (`docker run --cpus 2`) takes none away, it
stops a process that has used up its share: with a thread for each processor of the machine, most of them wait.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CGROUPS, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
TOKENIZER_VARIABLE = "RAYON_NUM_THREADS"  # read once, by the tokenizers' thread pool


@dataclass(frozen=True)
class Limit:
    """The processors that this process may use, and what decided it.

    n_processors: at least 1. reason: in words, as `fastbert info` shows it.
    """

    n_processors: int
    reason: str


def processor_limit(cgroups: Path = CGROUPS, own: Path = OWN_CGROUP) -> Limit:
    """Returns the smallest of three limits: the machine's processors, the set of them that is allowed, and the quota.

    A quota counts in whole processors, at least one: threads that wait for each other all wait for the one that has
    been stopped. cgroups, own: where the system says it.
    """
    machine = os.cpu_count() or 1
    limits = [Limit(machine, f"the machine has {machine}")]
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else machine
    limits.append(Limit(allowed, f"the set of allowed processors has {allowed}"))
    quotas = list(_quotas(cgroups, own))
    if quotas:
        quota, path = min(quotas)
        file = path.encode("utf-8", "replace").decode("utf-8")  # names that are no UTF-8 can be printed
        limits.append(Limit(max(1, int(min(quota, machine))), f"the container's quota is {quota:.4g} ({file})"))
    return min(limits, key=lambda limit: limit.n_processors)  # of equal ones the first


def set_threads(n: int | None = None) -> Limit:
    """Sets the threads of PyTorch and of the C++ kernels, and those of the tokenizers if none has run yet.

    n: how many; by default as many as PyTorch takes, but no more than `processor_limit` and OMP_NUM_THREADS allow.
    Returns how many there are and why. Raises ValueError for less than 1.
    """
    import torch

    if n is not None:
        if n < 1:
            raise ValueError(f"threads: got {n}, expected at least 1")
        limit = Limit(n, "as asked for")
    else:
        present, limit = torch.get_num_threads(), processor_limit()
        if present <= limit.n_processors:
            by_variable = "OMP_NUM_THREADS" in os.environ
            limit = Limit(present, "OMP_NUM_THREADS" if by_variable else f"PyTorch's choice; {limit.reason}")
    if torch.get_num_threads() != limit.n_processors:
        torch.set_num_threads(limit.n_processors)
    if n is not None:
        os.environ[TOKENIZER_VARIABLE] = str(n)
    else:
        os.environ.setdefault(TOKENIZER_VARIABLE, str(limit.n_processors))
    return limit


def _quotas(cgroups: Path, own: Path) -> Iterator[tuple[float, str]]:
    """Yields quotas in processors with the file of each, of version 1 and 2, of this group and of those above it."""
    try:
        lines = own.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            for folder in _up(cgroups, path):
                yield from _version_2(folder / "cpu.max")
        elif "cpu" in controllers.split(","):
            for mount in dict.fromkeys((controllers, "cpu", "cpu,cpuacct")):
                for folder in _up(cgroups / mount, path):
                    yield from _version_1(folder)


def _up(root: Path, path: str) -> Iterator[Path]:
    """Yields the folder of a group and those above it, up to the root, which is all that a container may see."""
    parts = [part for part in path.split("/") if part not in ("", "..")]
    for length in range(len(parts), -1, -1):
        yield root.joinpath(*parts[:length])


def _version_2(file: Path) -> Iterator[tuple[float, str]]:
    try:
        quota, period = file.read_text(encoding="utf-8").split()[:2]
        if quota != "max" and float(period) > 0:
            yield float(quota) / float(period), str(file)
    except (OSError, ValueError):
        return


def _version_1(folder: Path) -> Iterator[tuple[float, str]]:
    file = folder / "cpu.cfs_quota_us"
    try:
        quota = float(file.read_text(encoding="utf-8"))
        period = float((folder / "cpu.cfs_period_us").read_text(encoding="utf-8"))
        if quota > 0 and period > 0:  # -1 is no quota
            yield quota / period, str(file)
    except (OSError, ValueError):
        return
