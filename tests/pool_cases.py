"""The tests of pools give their processes work that fails, as models do not, and look whether processes are gone."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Unpicklable(Exception):
    """An Unpicklable cannot be sent to another process."""

    def __init__(self, lock: Any) -> None:
        super().__init__("it holds a lock")
        self.lock = lock


class Chores:
    """Chores are work that needs no model: each job is the name of something to do, with an argument."""

    def __init__(self, fails_at_start: bool = False) -> None:
        self.fails_at_start, self.weights = fails_at_start, torch.arange(5.0)

    def to(self, device: torch.device) -> None:
        if self.fails_at_start:
            raise MemoryError("no room for the weights")

    def __call__(self, job: tuple[str, Any]) -> Any:
        name, value = job
        return getattr(self, name)(value)

    def double(self, value: Tensor) -> Any:
        return {"twice": (2 * value, [value.bfloat16()]), "weights": self.weights, "process": os.getpid()}

    def divide(self, value: int) -> int:
        return 1 // value

    def lock(self, value: None) -> None:
        raise Unpicklable(threading.Lock())

    def die(self, value: int) -> None:
        os.kill(os.getpid(), value)

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class Owner:
    """An Owner stands for the model that a pool belongs to."""


def is_gone(pid: int) -> bool:
    """Tells whether a process has ended; one that nobody has waited for yet has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_until_gone(pids: list[int], seconds: float = 20.0) -> bool:
    """Waits until processes have ended, and kills what is left."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if all(map(is_gone, pids)):
            return True
        time.sleep(0.02)
    for pid in pids:
        if not is_gone(pid):
            os.kill(pid, signal.SIGKILL)
    return False
