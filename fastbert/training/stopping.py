"""A run that receives SIGTERM or SIGINT completes its step, saves, and ends."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType
from typing import Any

logger = logging.getLogger("fastbert")

SIGNALS = signal.SIGTERM, signal.SIGINT


class StopSignals:
    """A `StopSignals` records a signal in a `with` statement; a second SIGINT raises KeyboardInterrupt at once.

    number: the first received signal, or None. Outside the main thread Python delivers no signals, so none is recorded.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def __call__(self) -> bool:
        """Tells whether a stop of the run was requested."""
        return self.number is not None

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = self.number or number
        logger.warning("%s: the run ends after this step and saves", signal.Signals(number).name)
