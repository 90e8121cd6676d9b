"""This module holds the state of an accelerated module: options, counts, and objects from its first call."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from typing import Any

from torch import nn

from fastbert.adapters.covered import COVERED, Mapping
from fastbert.adapters.live_encoder import LiveEncoder
from fastbert.engine import Options
from fastbert.ops import BackendError

logger = logging.getLogger("fastbert")

STATE = "_fastbert"  # The key of the state in the __dict__ of an accelerated module.
OURS = "fastbert"  # The count of calls that ran here.


class AcceleratedState:
    """An `AcceleratedState` holds the options of an accelerated module, and counts its calls.

    subject: the name of the counted method.
    """

    def __init__(self, options: Options, subject: str) -> None:
        self.options, self.subject = options, subject
        self.counts: Counter[str] = Counter()

    def forget(self) -> None:
        """Drops the objects made from the modules. The next call makes them again."""

    def decline(self, reason: str, error: Exception | None = None) -> None:
        """Counts a call of the original code, and logs each reason once, with the error that led to it.

        Raises BackendError under strict.
        """
        if self.options.strict:
            raise BackendError(f"accelerate: {self.subject} needs the original code, but strict=True: {reason}")
        if reason not in self.counts:
            logger.warning("accelerate: %s runs by the original code: %s", self.subject, reason, exc_info=error)
        self.counts[reason] += 1


class EncoderState(AcceleratedState):
    """An `EncoderState` belongs to an accelerated encoder, and keeps fastbert's encoder on its modules.

    A copy, and an unpickled object, have only the arguments. padding_reader: a module around the encoder whose results
    depend on rows of padding, which are zeros in fastbert.
    """

    def __init__(self, options: Options, mapping: Mapping, padding_reader: str | None = None) -> None:
        super().__init__(options, f"{mapping.model}.forward")
        self.mapping, self.padding_reader = mapping, padding_reader
        self._encoder: LiveEncoder | None = None
        self._stale = False
        self.settled = False  # True while a caller calls eval() of a model that is in eval mode.
        self._lock = threading.RLock()

    def __reduce__(self) -> Any:
        return _fresh_state, (self.options, self.mapping.module, self.padding_reader)

    def __deepcopy__(self, memo: Any) -> EncoderState:
        return EncoderState(self.options, self.mapping, self.padding_reader)

    def forget(self) -> None:
        """Drops the objects made from the modules. The next call makes them again."""
        self._encoder = None

    def invalidate(self) -> None:
        """Lets the next call make derived tensors again."""
        self._stale = self._stale or not self.settled

    def encoder(self, live: nn.Module) -> LiveEncoder:
        """Returns fastbert's encoder on the present live model. Raises Unsupported."""
        encoder = self._encoder
        if encoder is None or not encoder.is_current() or self._stale or not encoder.modes.unchanged():
            with self._lock:
                encoder = self._encoder
                if encoder is None or not encoder.is_current():
                    encoder = self._encoder = LiveEncoder(live, self.mapping, self.options)
                    self._stale = True
                elif not encoder.modes.unchanged():
                    encoder.modes.follow()
                if self._stale:
                    encoder.invalidate()
                self._stale = False
        return encoder


def _fresh_state(options: Options, module: str, padding_reader: str | None = None) -> EncoderState:
    mapping = next(mapping for mapping in COVERED if mapping.module == module)
    return EncoderState(options, mapping, padding_reader)
