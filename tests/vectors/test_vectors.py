"""Vectors in fewer bits have the numbers of sentence-transformers, from the same ranges."""

from __future__ import annotations

import importlib.metadata
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers.util import quantize_embeddings as theirs

import fastbert
from fastbert import SentenceEncoder
from fastbert.vectors.quantize import quantize_embeddings
from helpers import tiny_bert

NEEDS_6 = pytest.mark.skipif(
    int(importlib.metadata.version("sentence-transformers").split(".")[0]) < 6,
    reason="what is compared is as in sentence-transformers 6",
)
PRECISIONS = ("int8", "uint8", "binary", "ubinary", "float32")


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@NEEDS_6
@pytest.mark.parametrize("kind", ["array", "float64", "tensor", "list", "list of tensors", "fortran"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_numbers_of_sentence_transformers(precision: str, kind: str) -> None:
    """Catches a number, dtype or shape that differs from theirs: from the vectors, from ranges, from calibration."""
    vectors: Any = random(120, 13)
    vectors[:, 4] = 0.5  # a dimension without a range
    make: dict[str, Any] = {
        "array": lambda x: x, "float64": lambda x: x.astype(np.float64), "tensor": torch.from_numpy, "list": list,
        "list of tensors": lambda x: list(torch.from_numpy(x)), "fortran": np.asfortranarray,
    }  # fmt: skip
    embeddings, calibration = make[kind](vectors), 2 * random(50, 13, seed=1)
    ranges = np.stack([calibration.min(0), calibration.max(0)])
    for arguments in ({}, {"ranges": ranges}, {"calibration_embeddings": calibration}):
        ours, expected = (
            quantize_embeddings(embeddings, precision, **arguments),
            theirs(embeddings, precision, **arguments),
        )
        assert ours.dtype == expected.dtype and np.array_equal(ours, expected)


@pytest.mark.parametrize("precision", ["int8", "uint8"])
def test_ranges_of_few_vectors(precision: str, caplog: pytest.LogCaptureFixture) -> None:
    """Catches the warning missing below a hundred vectors or there with ranges, and a range of a single vector."""
    with caplog.at_level(logging.WARNING, "fastbert"):
        quantize_embeddings(random(99, 5), precision)
    assert "takes its ranges from 99 vectors alone" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "fastbert"):
        quantize_embeddings(random(100, 5), precision)
        one = quantize_embeddings(random(5), precision, ranges=[[-3.0] * 5, [3.0] * 5])
        assert quantize_embeddings(random(0, 5), precision).shape == (0, 5)
    assert not caplog.records
    assert np.array_equal(one, theirs(random(5), precision, ranges=np.array([[-3.0] * 5, [3.0] * 5])))
    for alone in (random(5), random(1, 5)):
        with pytest.raises(ValueError, match="there is one alone: pass ranges or calibration_embeddings"):
            quantize_embeddings(alone, precision)


def test_what_cannot_be_quantised() -> None:
    """Catches NaN that turns into a number, whole numbers quantised again, and ranges that do not fit."""
    broken = random(120, 5)
    broken[3, 2] = np.nan
    for precision in PRECISIONS[:4]:
        with pytest.raises(ValueError, match="embeddings: expected numbers, got NaN"):
            quantize_embeddings(broken, precision)
    with pytest.raises(TypeError, match="embeddings: expected floating-point vectors, got int8"):
        quantize_embeddings(np.zeros((3, 4), np.int8), "int8")
    with pytest.raises(ValueError, match="precision: got 'int4'"):
        quantize_embeddings(random(3, 4), "int4")
    with pytest.raises(ValueError, match=r"ranges: expected shape \(2, 4\), .* got \(2, 3\)"):
        quantize_embeddings(random(3, 4), "int8", ranges=random(2, 3))
    with pytest.raises(ValueError, match="ranges: expected numbers, got NaN"):
        quantize_embeddings(random(3, 5), "int8", ranges=broken[2:4])
    with pytest.raises(ValueError, match=r"calibration_embeddings: expected shape \(m, 4\)"):
        quantize_embeddings(random(3, 4), "int8", calibration_embeddings=random(4))


@pytest.fixture(scope="module")
def encoder() -> SentenceEncoder:
    texts = [f"{a} {b}" for a in ("river", "boat", "fish", "old") for b in ("wide", "slow", "small", "new", "red")]
    config, tokenizer = tiny_bert(texts, 80)
    return SentenceEncoder(fastbert.BertModel(config), tokenizer, "mean")


@NEEDS_6
@pytest.mark.parametrize("precision", ["int8", "uint8"])
def test_encode(encoder: SentenceEncoder, precision: str, tmp_path: Path) -> None:
    """Catches `encode` in 8 bits unlike SentenceTransformer.encode, or ranges that do not reach the quantisation."""
    from sentence_transformers import SentenceTransformer

    encoder.save_pretrained(tmp_path)
    other = SentenceTransformer(str(tmp_path), device="cpu", local_files_only=True)
    texts = [f"{a} {b} {c}" for a in ("river", "boat") for b in ("wide", "slow", "red") for c in ("fish", "old", "new")]
    ours, expected = encoder.encode(texts, precision=precision), other.encode(texts, precision=precision)
    assert ours.dtype == expected.dtype
    # A float32 difference in the last bit may fall on the other side of a step.
    assert np.abs(ours.astype(int) - expected.astype(int)).max() <= 1
    assert (ours != expected).mean() < 0.01
    packed = encoder.encode(texts, precision=precision, convert_to_tensor=True)
    assert isinstance(packed, torch.Tensor) and np.array_equal(packed.numpy(), ours)

    floats = encoder.encode(texts, normalize_embeddings=True, truncate_dim=8)
    ranges = np.stack([floats.min(0), floats.max(0)])
    for options in ({"ranges": ranges}, {"calibration_embeddings": floats}):
        arguments: dict[str, Any] = {"precision": precision, "normalize_embeddings": True, "truncate_dim": 8, **options}
        alone = np.stack([encoder.encode(text, **arguments) for text in texts])
        assert np.abs(alone.astype(int) - quantize_embeddings(floats, precision, ranges=ranges)).max() <= 1
    assert encoder.encode([], precision=precision).shape == (0,)
    with pytest.raises(ValueError, match="there is one alone"):
        encoder.encode("river", precision=precision)
