"""Fixtures of checkpoints: a model of transformers, and a few tensors."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from checkpoint_cases import random_mlm, six_tensors


@pytest.fixture(scope="module")
def mlm() -> Any:
    """A tiny BertForMaskedLM of transformers with random weights."""
    return random_mlm()


@pytest.fixture
def state() -> dict[str, Tensor]:
    """A state dict of six tensors."""
    return six_tensors()
