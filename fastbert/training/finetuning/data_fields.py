"""The fields of settings that say what data, model and folder a run has are brought to one form here."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any


def settle_data(settings: Any) -> None:
    """Makes str of paths and a dict of `columns`, in the fields of a frozen record of settings.

    Its `train`, `eval` and, if it has one, `preserve` are paths or iterables of dicts; all but `train` may be None.
    `model` and `output` are paths. Raises TypeError or ValueError, with the name of the field, for anything else.
    """
    for name in ("train", "eval", "preserve"):
        value = getattr(settings, name, None)
        if isinstance(value, os.PathLike):
            object.__setattr__(settings, name, os.fspath(value))
        elif not isinstance(value, Iterable) and not (name != "train" and value is None):
            raise TypeError(f"{name}: expected a path or an iterable of dicts, got {type(value).__name__}")
    for name in ("model", "output"):
        object.__setattr__(settings, name, os.fspath(getattr(settings, name)))
    object.__setattr__(settings, "columns", _columns(settings.columns))


def _columns(columns: Any) -> dict[str, str]:
    """Returns columns as a dict. From a command line they come as "text=review"."""
    if isinstance(columns, Mapping):
        return {str(ours): str(theirs) for ours, theirs in columns.items()}
    mapping = {}
    for pair in columns:
        ours, equals, theirs = str(pair).partition("=")
        if not (ours and equals and theirs):
            raise ValueError(f"columns: expected NAME=COLUMN, got {pair!r}")
        if ours in mapping:
            raise ValueError(f"columns: {ours} is named twice")
        mapping[ours] = theirs
    return mapping
