"""Kernels note what the host would otherwise wait to see: ids beyond their table, and weights that were written to.

The runner of a batch sets the place with `noting`; the operations of the same thread get it from `current`.
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
    """Tells whether a look at the device's numbers waits for it, and its kernels can note them for the host instead."""
    return device.type == "cuda"


def current() -> Notes | None:
    """Returns where the kernels of this thread note ids beyond their table; None where ids were checked before."""
    return getattr(_here, "notes", None)


@contextmanager
def noting(notes: Notes | None) -> Iterator[None]:
    """Lets the kernels that are launched inside note what they see."""
    before = current()
    _here.notes = notes
    try:
        yield
    finally:
        _here.notes = before
