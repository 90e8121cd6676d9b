"""Quantised vectors have fewer bits for each number."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastbert.checks import one_of

logger = logging.getLogger("fastbert")

PRECISIONS = ("float32", "int8", "uint8", "binary", "ubinary")
ENOUGH = 100  # vectors from which ranges are taken without a warning


def quantize_embeddings(
    embeddings: Any, precision: str, ranges: Any = None, calibration_embeddings: Any = None
) -> np.ndarray:
    """Quantises vectors. Arguments and results are those of sentence-transformers' function.

    embeddings: (n, dim) or (dim,) floats, as an array, a tensor or a list of vectors. precision "int8", "uint8": each
    dimension in 256 steps between its least and its greatest value, (n, dim). These values come from ranges, (2, dim),
    or from calibration_embeddings, (m, dim), or from the vectors themselves, with a warning if there are few. Vectors
    of two calls can be compared only if both calls have the same ranges. precision "binary", "ubinary": signs, 8 to a
    byte, as int8 or uint8, (n, ceil(dim / 8)). precision "float32": unchanged.

    Raises TypeError for vectors of whole numbers. Raises ValueError for another precision, for NaN, for ranges of
    another shape, and for a single vector without ranges.
    """
    one_of("precision", precision, *PRECISIONS)
    vectors = as_floats("embeddings", embeddings)
    if precision == "float32":
        return vectors.astype(np.float32, copy=False)
    if np.isnan(vectors).any():
        raise ValueError("embeddings: expected numbers, got NaN, which no whole number stands for")
    if precision.endswith("binary"):
        bits = np.packbits(vectors > 0, axis=-1)
        return bits if precision == "ubinary" else (bits.astype(np.int16) - 128).astype(np.int8)
    start, step = steps_of(_ranges(vectors, precision, ranges, calibration_embeddings), vectors.shape[-1])
    levels = np.clip(np.floor((vectors - start) / step), 0, 255)
    return levels.astype(np.uint8) if precision == "uint8" else (levels - 128).astype(np.int8)


def _ranges(vectors: np.ndarray, precision: str, ranges: Any, calibration: Any) -> Any:
    """Returns the least and the greatest value of each dimension, (2, dim)."""
    if ranges is not None:
        return ranges
    sample = vectors if calibration is None else as_floats("calibration_embeddings", calibration)
    if calibration is None:
        if vectors.ndim == 1 or len(vectors) == 1:
            raise ValueError(
                f"precision: {precision!r} takes ranges from the vectors, and there is one alone: pass ranges or "
                "calibration_embeddings"
            )
        if 0 < len(vectors) < ENOUGH:
            logger.warning(
                "precision %r takes its ranges from %d vectors alone: more, ranges or calibration_embeddings make it "
                "stable", precision, len(vectors),
            )  # fmt: skip
    if sample.ndim != 2 or (len(sample) == 0 and len(vectors)):
        raise ValueError(f"calibration_embeddings: expected shape (m, {vectors.shape[-1]}), got {sample.shape}")
    if len(sample) == 0:
        return np.zeros((2, sample.shape[1]), np.float32)
    return np.vstack((sample.min(axis=0), sample.max(axis=0)))


def steps_of(ranges: Any, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the start and the width of the 256 steps of each dimension: (2, dim) -> (dim,) float32."""
    ranges = np.asarray(as_floats("ranges", ranges), dtype=np.float32)
    if ranges.shape != (2, dim):
        raise ValueError(f"ranges: expected shape (2, {dim}), least and greatest values, got {ranges.shape}")
    if np.isnan(ranges).any():
        raise ValueError("ranges: expected numbers, got NaN")
    step = (ranges[1] - ranges[0]) / 255
    return ranges[0], np.where(step == 0, np.float32(1), step)


def as_floats(name: str, vectors: Any) -> np.ndarray:
    """Returns an array, a tensor or a list of either as an array of float32, or of float64 for a float64 input."""
    if isinstance(vectors, (list, tuple)) and vectors and isinstance(vectors[0], Tensor):
        vectors = torch.stack(list(vectors))
    if isinstance(vectors, Tensor):
        vectors = vectors.detach().cpu()
        vectors = (vectors.float() if vectors.dtype == torch.bfloat16 else vectors).numpy()
    array = np.asarray(vectors)
    if array.dtype.kind in "iub" and array.size:
        raise TypeError(f"{name}: expected floating-point vectors, got {array.dtype}")
    return array if array.dtype == np.float64 else array.astype(np.float32, copy=False)
