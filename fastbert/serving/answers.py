"""Answers in OpenAI's form, of the server and of Ray Serve alike."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from typing import Any

import numpy as np


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
            {"object": "embedding", "index": i, "embedding": encoded(vector) if as_base64 else vector.tolist()}
            for i, vector in enumerate(vectors)
        ],
        "model": model,
        "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens},
        "truncated": n_truncated,
    }
