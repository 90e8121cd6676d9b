"""The tests of the command line share tiny models and helpers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fastbert import (
    BertForMaskedLM,
    BertForNextSentencePrediction,
    BertForSequenceClassification,
    BertModel,
    SentenceEncoder,
)
from fastbert.cli.main import main
from fastbert.pipelines.modules import Normalize
from helpers import tiny_bert

TEXTS = ["a river is wide", "", "small boats cross the river", "fish", "a river is wide and slow", "Fish!"]


def save_models(folder: Path) -> SimpleNamespace:
    """The folders of tiny random models: a sentence encoder and three heads."""
    torch.manual_seed(0)
    texts = [*TEXTS, "query: boats"] * 3
    config, tokenizer = tiny_bert(texts, 90, num_hidden_layers=1, max_position_embeddings=24)
    SentenceEncoder(BertModel(config), tokenizer, "mean", [Normalize()], prompts={"query": "query: "}).save_pretrained(
        folder / "sentence"
    )
    config.id2label = {0: "bad", 1: "fair", 2: "good"}
    for name, cls in (
        ("mlm", BertForMaskedLM),
        ("nsp", BertForNextSentencePrediction),
        ("classifier", BertForSequenceClassification),
    ):
        cls(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return SimpleNamespace(**{path.name: str(path) for path in folder.iterdir()})


def encode(models: SimpleNamespace, texts: list[str], **arguments: Any) -> np.ndarray:
    return SentenceEncoder.from_pretrained(models.sentence, device="cpu").encode(texts, **arguments)


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that a failing command leaves on standard error."""
    assert main([*argv, "--device", "cpu"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("fastbert: error: ") and err.count("\n") == 1, err
    return err.removeprefix("fastbert: error: ").rstrip("\n")
