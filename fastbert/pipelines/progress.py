"""A call shows its progress as a bar on request."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

logger = logging.getLogger("fastbert")

Progress = Callable[[int], Any]  # called with the number of texts of each finished batch


def progress_bar(show: bool | None, total: int | None) -> AbstractContextManager[Progress | None]:
    """Gives a bar that counts texts, or None for no bar. If `show` is None, the bar is shown with the logger "fastbert"
    at INFO.
    """
    if show is None:
        show = logger.getEffectiveLevel() in (logging.INFO, logging.DEBUG)
    return _shown_progress_bar(total) if show else nullcontext()


@contextmanager
def _shown_progress_bar(total: int | None) -> Iterator[Progress]:
    from tqdm import tqdm

    with tqdm(total=total, desc="Encoding", unit="text") as bar:
        yield bar.update
