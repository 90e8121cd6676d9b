"""The tests of fine-tuning share a tiny random encoder with a vocabulary of a few words, and toy problems."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

GOOD, BAD = ["great", "lovely", "fine", "happy", "bright"], ["awful", "sad", "poor", "dark", "broken"]
OTHERS = ["the", "a", "film", "day", "room", "was", "is", "very", "and", "?", ".", "yes", "no"]
WORDS = [*GOOD, *BAD, *OTHERS]
FAST = {
    "learning_rate": 5e-3, "batch_size": 16, "epochs": 2, "precision": "fp32", "dropout": 0.0, "progress": False,
    "device": "cpu",
}  # fmt: skip


def save_encoder(folder: Path, positions: int = 64) -> str:
    """Writes a random BERT of two layers, without a head, and its tokenizer; returns the folder."""
    import torch
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    transformers.BertTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=positions, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    return str(folder)


def sentence(words: list[str], draw: random.Random) -> str:
    """A text of a few words, of which some are of these."""
    chosen = draw.choices(words, k=draw.randint(2, 4)) + draw.choices(OTHERS, k=draw.randint(1, 8))
    draw.shuffle(chosen)
    return " ".join(chosen)


def moods(n: int = 96, seed: int = 0) -> list[dict[str, Any]]:
    """Texts that are told apart by their words, with the labels "good" and "bad"."""
    draw = random.Random(seed)
    labels = [draw.choice(["good", "bad"]) for _ in range(n)]
    return [{"text": sentence(GOOD if label == "good" else BAD, draw), "label": label} for label in labels]


def losses(result: Any) -> list[float]:
    """The losses of training that the Trainer has logged."""
    return [entry["loss"] for entry in result.history if "loss" in entry]
