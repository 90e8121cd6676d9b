"""This module brings the settings for data, model and folders of a run to one form."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any


def settle_data(settings: Any) -> None:
    """Converts paths to str and `columns` to a dict, in the fields of a frozen dataclass of settings.

    Its `train`, `eval` and, if it exists, `preserve` are paths or iterables of dicts; all but `train` may be None.
    `model` and `output` are paths. Raises TypeError or ValueError, with the name of the field, for any other value.
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
    """Returns columns as a dict. On a command line they have the form "text=review"."""
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
