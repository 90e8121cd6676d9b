"""Kernels record ids beyond their table and changed weights in notes, so that the host does not wait for them.

The runner of a batch sets the notes with `noting`. The operations of the same thread get them from `current`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from fastbert_kernels.embedding import Notes

_here = threading.local()


def possible_on(device: torch.device) -> bool:
    """Tells whether the host waits to read the device's numbers, and kernels can record notes instead."""
    return device.type == "cuda"


def current() -> Notes | None:
    """Returns the notes for kernels of this thread, or None if the ids were checked before."""
    return getattr(_here, "notes", None)


@contextmanager
def noting(notes: Notes | None) -> Iterator[None]:
    """Lets the kernels that are launched inside this context record in the notes."""
    before = current()
    _here.notes = notes
    try:
        yield
    finally:
        _here.notes = before
