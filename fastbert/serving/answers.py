"""This module writes answers in OpenAI's format, for the server and for Ray Serve."""

from __future__ import annotations

import base64
import importlib
import json
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import numpy as np

orjson: Any = None
with suppress(ImportError):
    orjson = importlib.import_module("orjson")


def dump(answer: Any) -> bytes:
    """Returns an answer as JSON in UTF-8. Its numbers are finite, and its arrays are those of `numbers`.

    orjson writes the same numbers as Python's json module in a tenth of the time. It is used if it is installed.
    """
    if orjson is not None:
        return orjson.dumps(answer, option=orjson.OPT_NON_STR_KEYS | orjson.OPT_SERIALIZE_NUMPY)
    options: dict[str, Any] = {"ensure_ascii": False, "allow_nan": False, "separators": (",", ":")}
    return json.dumps(answer, default=np.ndarray.tolist, **options).encode("utf-8")


def dump_in_pieces(answer: Any) -> bytes:
    """Does what `dump` does, item by item, so that the event loop waits only for one item at a time."""
    if isinstance(answer, dict):
        return b"{%b}" % b",".join(dump(str(key)) + b":" + dump_in_pieces(value) for key, value in answer.items())
    return b"[%b]" % b",".join(map(dump, answer)) if isinstance(answer, list) else dump(answer)


def numbers(vector: np.ndarray) -> np.ndarray:
    """Returns the vector as float64, so that `dump` writes every number in full, as Python does.

    A client that reads float64 numbers then has the model's numbers.
    """
    return np.ascontiguousarray(vector, np.float64)


def encoded(vector: np.ndarray) -> str:
    """Returns a vector as base64 of its float32 numbers, in little-endian order."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")


def embeddings(
    model: str, vectors: Iterable[np.ndarray], n_tokens: int, n_truncated: int, as_base64: bool
) -> dict[str, Any]:
    """Returns the answer of `/v1/embeddings`, with the number of truncated texts. vectors: (dim,) float32 each."""
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": i, "embedding": encoded(vector) if as_base64 else numbers(vector)}
            for i, vector in enumerate(vectors)
        ],
        "model": model,
        "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens},
        "truncated": n_truncated,
    }
