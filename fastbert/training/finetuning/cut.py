"""This module counts, from the features of a run, the texts that were truncated or split into windows."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

logger = logging.getLogger("fastbert")


def full_lengths(features: Sequence[Mapping[str, Any]]) -> list[int]:
    """Returns the number of tokens of each input before truncation or windows; windows of one record are one input."""
    lengths: list[int] = []
    record = None
    for feature in features:
        if "record" in feature and feature["record"] == record:
            continue
        record = feature.get("record")
        full = feature["full_length"]
        lengths += full if isinstance(full, list) else [full]
    return lengths


def what_was_cut(features: Sequence[Mapping[str, Any]], limit: int, windows: bool) -> dict[str, int]:
    """Returns the number of inputs with more than `limit` tokens, and further counts, by name.

    windows: whether these inputs were split into windows, so that nothing was lost; otherwise their ends were cut off.
    """
    lengths = full_lengths(features)
    too_long = [length for length in lengths if length > limit]
    if windows:
        return {"texts": len(lengths), "texts in windows": len(too_long), "windows": len(features)}
    lost = sum(too_long) - limit * len(too_long)
    return {"texts": len(lengths), "texts cut": len(too_long), "tokens": sum(lengths), "tokens cut": lost}


def warn_of_cut(source: str, cut: Mapping[str, int], limit: int) -> None:
    """Warns of texts whose ends are not read. source: "train" or "eval"."""
    if cut.get("texts cut"):
        logger.warning(
            "%s: %d of %d texts have more than %d tokens and are cut; %d of all %d tokens are not read",
            source, cut["texts cut"], cut["texts"], limit, cut["tokens cut"], cut["tokens"],
        )  # fmt: skip
