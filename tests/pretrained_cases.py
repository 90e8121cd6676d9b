"""The tests of from_pretrained share checkpoints on disk and a comparison with transformers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastbert
from model_cases import (
    assert_close,
    make_batch,
    run,
)

WEIGHTS = "model.safetensors"


def our_class(name: str) -> Any:
    return getattr(fastbert, name)


def their_class(name: str) -> Any:
    return getattr(transformers, name)


def outputs(model: Any, name: str) -> list[Tensor]:
    """The model's outputs on one unpadded batch."""
    return list(run(model, make_batch("none", name)).values())


def assert_same_outputs(mine: Any, other: Any, name: str, bound: float = 1e-10) -> None:
    pairs = list(zip(outputs(mine, name), outputs(other, name), strict=True))
    assert pairs
    for i, (value, expected) in enumerate(pairs):
        assert_close(f"[{i}]", value, expected, bound)


def assert_same_state(mine: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert set(mine) == set(other)
    for name, tensor in other.items():
        assert mine[name].dtype == tensor.dtype and torch.equal(mine[name], tensor), name


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "fastbert" and r.levelno >= logging.WARNING]


def edit_weights(folder: Path, *, drop: tuple[str, ...] = (), **tensors: Tensor) -> None:
    state = {n: t for n, t in load_file(folder / WEIGHTS).items() if not n.startswith(drop or "\0")}
    state.update({n.replace("__", "."): t for n, t in tensors.items()})
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
