"""A damaged or unsupported checkpoint gets an error that names what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import fastbert
from fastbert.checkpoint.config import HIDDEN_ACTS
from helpers import exactly
from model_cases import (
    MODELS,
    theirs,
)

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint, to be damaged."""
    theirs().save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_no_such_folder(tmp_path: Path) -> None:
    """Catches a mistyped path sent to the hub, or an error that does not name it."""
    with pytest.raises(FileNotFoundError, match=r"nowhere.*: no such folder, and it is not a hub id"):
        fastbert.BertModel.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("name", MODELS)
def test_missing_weights_file(name: str, folder: Path) -> None:
    """Catches a model of fresh weights for a folder that holds a config alone."""
    (folder / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=exactly(f"no weights in {folder}: looked for {LOOKED_FOR}")):
        getattr(fastbert, name).from_pretrained(folder)


LOOKED_FOR = "model.safetensors.index.json, model.safetensors, pytorch_model.bin.index.json, pytorch_model.bin"


def test_missing_config_file(folder: Path) -> None:
    """Catches weights without a config that are taken for BERT-base."""
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=exactly(f"{folder / 'config.json'} not found")):
        fastbert.BertModel.from_pretrained(folder)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_weights_file(keep: int, folder: Path) -> None:
    """Catches a download that broke off and that is read as far as it goes."""
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:keep])
    with pytest.raises(ValueError, match=rf"^{folder / WEIGHTS} is truncated or not a safetensors file"):
        fastbert.BertModel.from_pretrained(folder)


def edit(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.parametrize(
    ("settings", "lines"),
    [
        (
            {"vocab_size": 102},
            [
                "  embeddings.word_embeddings.weight: came (101, 32), expected (102, 32)",
                "vocab_size: the checkpoint has 101, the model 102",
            ],
        ),
        (
            {"max_position_embeddings": 50},
            ["max_position_embeddings: the checkpoint has 40, the model 50"],
        ),
        (
            {"intermediate_size": 36},
            ["  encoder.layer.0.intermediate.dense.weight: came (37, 32), expected (36, 32)"],
        ),
        ({"hidden_size": 34}, ["  encoder.layer.0.attention.self.query.weight: came (32, 32), expected (34, 34)"]),
    ],
)
def test_wrong_shape_for_the_config(settings: dict[str, int], lines: list[str], folder: Path) -> None:
    """Catches weights cut or filled up to the config's shape, or an error that does not name the tensor."""
    edit(folder, **settings)
    with pytest.raises(
        ValueError, match=r"tensor\(s\) of the checkpoint do not have the shape that the model expects:"
    ) as e:
        fastbert.BertModel.from_pretrained(folder)
    for line in lines:
        assert line in str(e.value).splitlines()


def test_more_layers_than_the_checkpoint_has(folder: Path) -> None:
    """Catches layers of random numbers on top of trained ones."""
    edit(folder, num_hidden_layers=3)
    with pytest.raises(
        ValueError, match=r"the checkpoint lacks encoder\.layer\.2\.attention\.self\.query\.weight, .* more"
    ):
        fastbert.BertModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"model_type": "funnel"},
            "model_type: got 'funnel', expected one of albert, bert, camembert, deberta-v2, distilbert, electra, gte, "
            "jina_bert_code, jina_bert_v2, modernbert, mpnet, nomic_bert, roberta, xlm-roberta",
        ),
        (
            {"position_embedding_type": "relative_key"},
            "position_embedding_type: got 'relative_key', but only 'absolute' is supported",
        ),
        ({"is_decoder": True}, "is_decoder: got True, but decoder mode is not supported"),
        ({"add_cross_attention": True}, "add_cross_attention: got True, but cross-attention is not supported"),
        ({"hidden_act": "xielu"}, f"hidden_act: got 'xielu', expected one of {', '.join(HIDDEN_ACTS)}"),
        ({"num_attention_heads": 5}, "hidden_size: got 32, expected a multiple of num_attention_heads (5)"),
        ({"hidden_size": 0}, "hidden_size: got 0, expected a positive whole number"),
    ],
)
def test_unsupported_config(settings: dict[str, Any], message: str, folder: Path) -> None:
    """Catches a model that is not BERT, or a BERT that we do not compute, that loads as something else."""
    edit(folder, **settings)
    with pytest.raises(ValueError, match=exactly(f"{folder / 'config.json'}: {message}")):
        fastbert.BertModel.from_pretrained(folder)


def test_unknown_backend(folder: Path) -> None:
    """Catches a misspelt backend taken for "auto"."""
    message = exactly("backend: expected one of auto, triton, cpu, torch, got 'cuda'")
    with pytest.raises(ValueError, match=message):
        fastbert.BertModel.from_pretrained(folder, backend="cuda")
    with pytest.raises(ValueError, match=message):
        fastbert.BertModel(fastbert.BertConfig(), backend="cuda")
