"""The tests of verify share small models and faults to plant in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastbert import BertConfig, ops

IDS = [[2, 17, 33, 3], [2, 3], [2, *range(20, 36), 3], [2, 50, 3]]


def config(**changes: Any) -> BertConfig:
    sizes: dict[str, Any] = {
        "vocab_size": 101,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 56,
        "max_position_embeddings": 300,
        "initializer_range": 0.2,
    }
    return BertConfig(**{**sizes, **changes})


def wrong_in_layer(monkeypatch: pytest.MonkeyPatch, layer: int, n_layers: int, change: Callable[[Tensor], Any]) -> None:
    """Lets `change` work on the result of the attention of one layer, in place."""
    calls = []
    right = ops.varlen_attention

    def wrong(*args: Any, **kwargs: Any) -> Tensor:
        out = right(*args, **kwargs)
        calls.append(None)
        if (len(calls) - 1) % n_layers == layer:
            change(out)
        return out

    monkeypatch.setattr(ops, "varlen_attention", wrong)


def off_by(relative: float, out: Tensor) -> Tensor:
    """The tensor with noise of that share of its RMS."""
    noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out)
    return out + relative * out.float().square().mean().sqrt().to(out.dtype) * noise
