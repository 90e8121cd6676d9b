"""A report on a model in training mode tells how its layers train, and what they keep for the backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastbert
from fastbert import BertConfig, BertModel
from fastbert.bench.memory import saved_for_backward

LENGTHS = [30, 40, 128]


def make(**changes: Any) -> BertModel:
    settings = {
        "vocab_size": 50,
        "hidden_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 512,
    }
    return BertModel(BertConfig(**(settings | changes))).train()


def kept_by_running(model: BertModel) -> int:
    """Bytes that the layers really keep, each storage once, without parameters."""
    lengths = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    ids = torch.ones(198, dtype=torch.int64)
    return saved_for_backward(lambda: model.forward_packed(ids, lengths), model.parameters())


@pytest.mark.parametrize("autocast", [False, True])
def test_bytes_are_those_that_are_kept(autocast: bool) -> None:
    """Catches a count that is not what the layers keep: all but the embeddings' share, which is small."""
    model = make()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        report, kept = fastbert.explain(model, LENGTHS), kept_by_running(model)
    assert report.batch is not None and report.batch.kept_bytes is not None
    embeddings = 198 * (2 * 4 * 128 + 4 * 4)
    assert report.batch.kept_bytes <= kept <= report.batch.kept_bytes + 2 * embeddings
    assert f"{(48 if not autocast else 24) + 0.2:.1f}"[:2] in next(
        n for n in report.notes if n.startswith("training: each")
    )


def test_obstacles_are_named() -> None:
    """Catches a model that trains operation by operation without a reason, or numbers for one that does not train."""
    model = make()
    model.encoder.layer[0].register_forward_hook(lambda *_: None)
    report = fastbert.explain(model, LENGTHS)
    assert "training: operation by operation: a module of the encoder is an adapter, or has hooks" in str(report)
    assert report.batch is not None and report.batch.kept_bytes is None
    assert fastbert.explain(make().eval(), LENGTHS).batch.kept_bytes is None  # type: ignore[union-attr]
    assert not any(note.startswith("training") for note in fastbert.explain(make().eval()).notes)
    assert "there are no Triton kernels for torch.float64" in str(fastbert.explain(make(), arch=90, dtype="float64"))


def test_checkpoints_keep_less() -> None:
    """Catches a report that does not know of gradient checkpointing."""
    model = make()
    before = fastbert.explain(model, LENGTHS).batch
    model.gradient_checkpointing_enable()
    report = fastbert.explain(model, LENGTHS)
    assert before is not None and report.batch is not None
    assert report.batch.kept_bytes < before.kept_bytes / 2  # type: ignore[operator]
    assert "with gradient checkpointing" in str(report)
