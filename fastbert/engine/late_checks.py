"""This module holds checks whose results the host reads at the next batch, so that it does not wait for a GPU.

Kernels write to four words in shared memory (`fastbert_kernels.embedding.Notes`). The words are never reset: the host
compares them with the last values, so that no note is lost.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastbert.ops import packing, silent_writes

if TYPE_CHECKING:
    from fastbert.engine.snapshot import ModuleSnapshot
    from fastbert_kernels.embedding import Notes

logger = logging.getLogger("fastbert")

NAMES = "input_ids", "token_type_ids", "position_ids"  # what the first words are about
WEIGHTS = 3  # the last word is about them
_LEAST, _MOST = -(1 << 31), (1 << 31) - 1
# A kernel may still write to the words of a model that has gone.
_kept: list[Tensor] = []


class Note(NamedTuple):
    """A `Note` is a kernel's finding: the word, the number of the batch, and the id."""

    word: int
    batch: int
    value: int


class LateChecks:
    """A `LateChecks` holds the findings of one model's kernels. strict: whether each call waits for its own checks.

    active: whether a kernel has ever run with checks.
    """

    def __init__(self, strict: bool = False) -> None:
        self.strict, self.active = strict, False
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._device: torch.device | None = None
        self._words: Any = None  # (4,) int64, a view of the pinned tensor
        self._seen = [0] * 4
        self._tensors: tuple[Tensor, Tensor] | None = None  # the words; what kernels outside of graphs read as `batch`

    def next_number(self) -> int:
        """Counts a batch."""
        return next(self._numbers)

    def notes(self, device: torch.device, number: int, batch: Tensor | None = None) -> Notes:
        """Returns the arguments with which a kernel records findings about a batch.

        batch: (2,) int64 on the device, with the number and the rows for a graph.
        """
        from fastbert_kernels.embedding import Notes

        if self._tensors is None or self._device != device:
            with self._lock, torch.inference_mode(False):
                words = torch.zeros(4, dtype=torch.int64, device="cpu", pin_memory=packing.pins(device))
                every_row = packing.to_device(torch.tensor([0, _MOST], dtype=torch.int64, device="cpu"), device)
                _kept.append(words)
                self._tensors, self._device = (words, every_row), device
                self._words, self._seen, self.active = words.numpy(), [0] * 4, True
        words, every_row = self._tensors
        return Notes(words, every_row if batch is None else batch, number)

    def news(self) -> list[Note]:
        """Returns the findings since the last call, without a wait for running kernels."""
        if self._words is None or self._words.tolist() == self._seen:
            return []
        with self._lock:
            now = self._words.tolist()
            news = [(i, word) for i, (word, before) in enumerate(zip(now, self._seen, strict=True)) if word != before]
            self._seen = now
        return [Note(i, word >> 32, ((word & 0xFFFFFFFF) ^ (1 << 31)) - (1 << 31)) for i, word in news]

    def settle(
        self, snapshot: ModuleSnapshot | None, table_sizes: Callable[[], tuple[int, ...]], renew: Callable[[], None]
    ) -> None:
        """Raises the known errors of earlier batches, after an update of derived tensors if weights have changed.

        snapshot: that of the model, None before the first. renew: makes derived tensors again.
        """
        news = self.news()
        stepped = snapshot is not None and snapshot.stepped()
        if not news and not stepped:
            return
        written = [note.batch for note in news if note.word == WEIGHTS]
        if stepped or written:
            renew()
        if written:
            silent_writes.note_seen()
            logger.warning(
                "weights were written to without PyTorch's count (through .data, say) before batch %d of the model, "
                "which may have run with what was derived from them earlier: call eval() after such a write",
                written[0],
            )
        for note in news:
            if note.word != WEIGHTS:
                raise error_of(note, table_sizes()[note.word])


def error_of(note: Note, size: int) -> IndexError:
    """Returns the error that the call would have raised with a wait. size: the number of rows in the table."""
    more = {_MOST: " or more", _LEAST: " or less"}.get(note.value, "")
    return IndexError(
        f"{NAMES[note.word]}: expected values from 0 to {size - 1}, got {note.value}{more} "
        f"in an earlier call, batch {note.batch} of this model"
    )
