"""The tests of checkpoints share small models and states, and a comparison of them."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

TINY = transformers.BertConfig(
    vocab_size=101,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=37,
    max_position_embeddings=40,
)


def random_mlm():
    """A small BertForMaskedLM of transformers with distinct numbers in every parameter."""
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(TINY).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def six_tensors():
    """A state of six tensors of four dtypes, 20 to 160 bytes each."""
    torch.manual_seed(0)
    return {
        "embeddings.word_embeddings.weight": torch.randn(5, 8),
        "a.bias": torch.randn(5),
        "b.weight": torch.randn(4, 4, dtype=torch.bfloat16),
        "c.weight": torch.randn(4, 4, dtype=torch.float16),
        "d.weight": torch.randn(2, 4, dtype=torch.float64),
        "e.empty": torch.empty(0, 3),
    }


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name
        assert ours[name].device.type == "cpu" and not ours[name].requires_grad, name


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
