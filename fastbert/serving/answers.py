"""Answers in OpenAI's form, of the server and of Ray Serve alike."""

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

    orjson writes the same numbers as Python's own module in a tenth of the time, and is taken where it is installed.
    """
    if orjson is not None:
        return orjson.dumps(answer, option=orjson.OPT_NON_STR_KEYS | orjson.OPT_SERIALIZE_NUMPY)
    options: dict[str, Any] = {"ensure_ascii": False, "allow_nan": False, "separators": (",", ":")}
    return json.dumps(answer, default=np.ndarray.tolist, **options).encode("utf-8")


def dump_in_pieces(answer: Any) -> bytes:
    """Does what `dump` does, item by item: the event loop has to wait for an item, and not for all of them."""
    if isinstance(answer, dict):
        return b"{%b}" % b",".join(dump(str(key)) + b":" + dump_in_pieces(value) for key, value in answer.items())
    return b"[%b]" % b",".join(map(dump, answer)) if isinstance(answer, list) else dump(answer)


def numbers(vector: np.ndarray) -> np.ndarray:
    """Returns an array of which `dump` writes every number in full, as Python would: float64.

    A reader that takes the numbers for float64 so has those of the model.
    """
    return np.ascontiguousarray(vector, np.float64)


def encoded(vector: np.ndarray) -> str:
    """Returns a vector as base64 of its float32 numbers, the lowest byte first."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")


def embeddings(
    model: str, vectors: Iterable[np.ndarray], n_tokens: int, n_truncated: int, as_base64: bool
) -> dict[str, Any]:
    """Returns what `/v1/embeddings` answers, and how many texts were truncated. vectors: (dim,) float32 each."""
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
