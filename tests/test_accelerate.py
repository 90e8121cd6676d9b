"""accelerate and restore on live models of transformers: same object, same outputs, weights shared, what is not known
left to the original forward and counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fastbert
from fastbert.adapters import counts
from helpers import assert_as_accurate

TEXTS = ["hello world", "a much longer text with more words in it than the first one", "hi"]


@pytest.fixture(scope="module")
def batch(minilm: Path) -> dict[str, torch.Tensor]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    return dict(tokenizer(TEXTS, padding=True, return_tensors="pt"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_real_weights_in_three_lines(minilm: Path, batch: dict[str, Any], dtype: torch.dtype) -> None:
    """Catches a new user's first three lines failing, or giving other numbers than before."""
    model = transformers.AutoModel.from_pretrained(minilm).eval()
    with torch.no_grad():
        reference = model.double()(**batch).last_hidden_state
        eager = model.to(dtype)(**batch).last_hidden_state

    model = fastbert.accelerate(model)
    with torch.no_grad():
        output = model(**batch)

    real = batch["attention_mask"].bool()
    assert_as_accurate("last_hidden_state", output.last_hidden_state[real], eager[real], reference[real])
    assert not output.last_hidden_state[~real].any()
    assert counts(model) == {"fastbert": 1}
