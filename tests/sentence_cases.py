"""The tests of SentenceEncoder share texts and tiny checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastbert import BertModel
from helpers import tiny_bert

TEXTS = [
    "the river is wide and slow",
    "a",
    "",
    "small boats cross the river every morning, and in the evening they come back full of fish",
    "the river is wide and slow, and small boats cross it",
    "Fish!",
    "  every   evening ",
    "boats boats boats boats boats boats",
]


def tiny(folder: Path, *, lowercase: bool = True, seed: int = 0) -> Path:
    """A plain BERT checkpoint with random weights and a vocabulary of its own: hidden 32, two layers."""
    torch.manual_seed(seed)
    config, tokenizer = tiny_bert([*TEXTS, "A River Is Wide", "query: passage: "] * 3, 150, lowercase=lowercase)
    tokenizer.save_pretrained(folder)
    BertModel(config).save_pretrained(folder)
    return folder


def theirs(folder: Path) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu", local_files_only=True)


def assert_close(ours: Any, expected: Any, tolerance: float = 2e-6) -> None:
    """Largest difference against the largest value: fp32 sums of a few thousand terms, in another order."""
    ours, expected = np.asarray(ours), np.asarray(expected)
    assert ours.shape == expected.shape
    if ours.size:
        assert np.abs(ours - expected).max() <= tolerance * max(np.abs(expected).max(), 1.0)
