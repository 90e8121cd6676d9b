"""The tests of accelerate share random models and a check against what a model gives restored."""

from __future__ import annotations

import copy
from typing import Any

import torch

import fastbert
from fastbert.adapters import counts
from model_cases import assert_close, in_dtype, make_batch, run, theirs, valid_of

ROWS = valid_of(make_batch("right")["attention_mask"])


def accelerated(name: str = "BertModel", dtype: torch.dtype = torch.float64) -> Any:
    """A random tiny model that is accelerated and has run once, so that all that is kept is there."""
    model = fastbert.accelerate(in_dtype(theirs(name), dtype))
    run(model, make_batch())
    return model


def check(model: Any, expected: int | dict[str, int], bound: float = 1e-10) -> None:
    """The model gives what it would give restored; expected: how many calls ran here, or all counts."""
    output = run(model, make_batch("right"))[0]
    before = counts(model)
    restored = run(fastbert.restore(copy.deepcopy(model)), make_batch("right"))[0]
    if output.shape[:2] == ROWS.shape:
        output, restored = output[ROWS], restored[ROWS]
    assert_close("accelerated and restored", output, restored, bound)
    assert before == ({"fastbert": expected} if isinstance(expected, int) else expected)


def with_first_column(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with a token in the first column of every text, without which the original forward runs."""
    mask = batch["attention_mask"]
    if mask is not None:
        batch["attention_mask"] = mask.index_fill(1, torch.tensor([0]), 1)
    return batch
