"""Batches without rows, columns or tokens run and train."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastbert
from helpers import cu_seqlens_of
from model_cases import (
    BATCH,
    LENGTH,
    MODELS,
    make_batch,
    run,
    theirs,
    twin,
)


@pytest.mark.parametrize("backend", ["cpu", "torch", "triton"])
@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (3, 0), (0, 0)])
@pytest.mark.parametrize("name", MODELS)
def test_empty_batch(name: str, rows: int, columns: int, backend: str, device: torch.device) -> None:
    """Catches a crash or NaN on a batch without rows or columns, with a mask or without."""
    at = torch.device("cpu") if backend == "cpu" else device
    ours = twin(theirs(name), torch.float32, backend, at)
    shape = (rows, 2, columns) if name == "BertForMultipleChoice" else (rows, columns)
    ids = torch.zeros(shape, dtype=torch.long)
    one = run(ours, make_batch("none", name), output_hidden_states=True)
    for mask in (None, torch.zeros(shape, dtype=torch.long)):
        batch = {"input_ids": ids, "attention_mask": mask, "token_type_ids": ids}
        output = run(ours, batch, output_hidden_states=True)
        assert list(output.keys()) == list(one.keys())
        for key, value in one.items():
            if key == "hidden_states":
                n = 2 * rows if name == "BertForMultipleChoice" else rows
                assert [tuple(state.shape) for state in output[key]] == [(n, columns, 32)] * 3
                continue
            per_token = value.shape[:2] == (BATCH, LENGTH)
            expected = (rows, columns, *value.shape[2:]) if per_token else (rows, *value.shape[1:])
            assert tuple(output[key].shape) == expected, key
            assert output[key].isfinite().all()


def test_empty_batch_on_the_reference_path() -> None:
    """Catches a crash with output_attentions on a batch without rows or columns."""
    ours = twin(theirs(), strict=False)
    for rows, columns in ((0, 5), (3, 0)):
        output = run(ours, {"input_ids": torch.zeros(rows, columns, dtype=torch.long)}, output_attentions=True)
        assert output.last_hidden_state.shape == (rows, columns, 32)
        assert [tuple(a.shape) for a in output.attentions] == [(rows, 2, columns, columns)] * 2


def test_empty_batch_trains() -> None:
    """Catches a backward pass that crashes, or gives NaN, where a batch turned out empty."""
    ours = twin(theirs()).train()
    for module in ours.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ours(torch.zeros(0, 5, dtype=torch.long)).last_hidden_state.sum().backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in ours.parameters())


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_empty_packed_input(backend: str, device: torch.device) -> None:
    """Catches a crash on no sequences, or on sequences without tokens."""
    ours = twin(theirs(), torch.float32, backend, device if backend == "triton" else "cpu")
    ids = torch.ones(0, dtype=torch.long, device=ours.device)
    for lengths in ([], [0], [0, 0, 0]):
        output = ours.forward_packed(ids, cu_seqlens_of(lengths, ours.device))
        assert output.shape == (0, 32) and output.dtype == torch.float32


TEXTS: dict[str, dict[str, Any]] = {
    "mpnet": {"pad_token_id": 1},
    "modernbert": {"pad_token_id": 0, "local_attention": 4},
    "gte": {},
    "nomic_bert": {},
    "jina_bert_v2": {},
    "albert": {"embedding_size": 20},
    "deberta-v2": {"relative_attention": True, "pos_att_type": "p2c|c2p", "position_buckets": 8,
                   "max_relative_positions": 16, "conv_kernel_size": 3},
}  # fmt: skip


@pytest.mark.parametrize("model_type", TEXTS)
def test_families_without_tokens(model_type: str) -> None:
    """Catches a layer of a family, as DeBERTa's convolution, that crashes without rows, columns or tokens."""
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2,
             "intermediate_size": 37, "max_position_embeddings": 40}  # fmt: skip
    config = fastbert.BertConfig.from_dict({**sizes, **TEXTS[model_type], "model_type": model_type})
    model = fastbert.BertModel(config, backend="cpu").eval()
    for rows, columns in ((0, 5), (3, 0), (2, 5)):
        batch = {name: torch.zeros(rows, columns, dtype=torch.long) for name in ("input_ids", "attention_mask")}
        for options in ({}, {"output_attentions": True}):
            output = run(model, batch, **options)
            assert output[0].shape == (rows, columns, 32) and (output[0] == 0).all()
        assert model.train()(**batch).last_hidden_state.shape == (rows, columns, 32)
        model.eval()
    for lengths in ([], [0, 0]):
        assert model.forward_packed(torch.zeros(0, dtype=torch.long), cu_seqlens_of(lengths)).shape == (0, 32)
