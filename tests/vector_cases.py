"""The tests of training embeddings and cross-encoders share a tiny model without dropout, and toy pairs to learn."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastbert import BertModel
from fastbert.cli import finetune_vectors
from helpers import tiny_bert

N_WORDS = 12
LEFT = [f"{a}{b}" for a in ("ba", "de", "fi") for b in ("lo", "mu", "na", "ri")]
RIGHT = [f"{a}{b}" for a in ("go", "hu", "ki") for b in ("sa", "te", "vo", "zu")]
PAIRS = [
    {"anchor": f"{LEFT[i]} {LEFT[j]}", "positive": f"{RIGHT[i]} {RIGHT[j]}"}
    for i in range(N_WORDS) for j in range(i + 1, N_WORDS) if (i + j) % 3
]  # fmt: skip
# Pairs that belong together, and pairs that do not.
SCORED = [
    {"sentence1": pair["anchor"], "sentence2": PAIRS[(k + shift) % len(PAIRS)]["positive"], "score": float(not shift)}
    for k, pair in enumerate(PAIRS) for shift in (0, 5)
]  # fmt: skip
# Texts of four classes, each told by the one word that it shares with no other class.
CLASSES = [
    {"text": f"{LEFT[k]} {RIGHT[i]} {RIGHT[(i + k + 3) % N_WORDS]}", "label": f"class {k}"}
    for k in range(4) for i in range(N_WORDS)
]  # fmt: skip
COMMON: dict[str, Any] = {
    "device": "cpu", "precision": "fp32", "progress": False, "batch_size": 16, "mini_batch_size": 6,
    "learning_rate": 3e-3, "log_every": 1, "weight_decay": 0.0,
}  # fmt: skip


def save_encoder(folder: Path, hidden: int = 32, seed: int = 0) -> str:
    """Writes a plain encoder with random weights, one layer and no dropout, and returns its folder."""
    torch.manual_seed(seed)
    config, tokenizer = tiny_bert(
        [*LEFT, *RIGHT, "query: document: "] * 3, 200, hidden_size=hidden, num_hidden_layers=1,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    BertModel(config).save_pretrained(folder)
    return str(folder)


def reset_precision() -> None:
    """Lets a trainer know nothing of the precision that one before it had."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def command(argv: list[str]) -> None:
    """Runs a subcommand of `fastbert finetune` that `finetune_vectors` adds."""
    parser = argparse.ArgumentParser()
    finetune_vectors.add(parser.add_subparsers())
    args = parser.parse_args(argv)
    args.run(args)


class Fixed:
    """An encoder that knows the vectors of its texts."""

    def __init__(self, vectors: dict[str, np.ndarray]) -> None:
        self.vectors = vectors

    def encode_query(self, texts: list[str]) -> np.ndarray:
        return np.array([self.vectors[text] for text in texts])

    encode_document = encode_query
