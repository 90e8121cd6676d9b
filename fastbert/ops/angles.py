"""This module makes the angles of a batch's rows once a forward pass, for all layers with rotary positions."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastbert.checkpoint.rotary import RotaryLayer
from fastbert.ops.packed_batch import PackedBatch
from fastbert.ops.rotary import rotations

PLAN = "rotary positions"


class Rotations:
    """A `Rotations` holds the cosines and sines of a batch's rows, for each base of its layers."""

    def __init__(self, position_ids: Tensor) -> None:
        self.position_ids = position_ids
        self._tables: dict[Any, tuple[Tensor, Tensor]] = {}

    def of(self, layer: RotaryLayer, head_size: int) -> tuple[Tensor, Tensor]:
        """Returns cosines and sines for a layer's base and factor, (T, D / 2) float32 each."""
        return self.tables(head_size, layer.base, layer.factor)

    def tables(self, head_size: int, base: float, factor: float) -> tuple[Tensor, Tensor]:
        """Returns cosines and sines for a base and a factor, (T, D / 2) float32 each."""
        key = head_size, base, factor
        if key not in self._tables:
            self._tables[key] = rotations(self.position_ids, *key)
        return self._tables[key]

    def renew(self, position_ids: Tensor) -> None:
        """Takes the positions of a forward pass, which then computes its tables. A CUDA graph computes them, too."""
        self.position_ids, self._tables = position_ids, {}


def rotations_of(batch: PackedBatch) -> Rotations:
    """Returns the rotations of a batch. They follow its columns if no other positions are set."""
    rotations: Rotations = batch.plan(PLAN, lambda: Rotations(batch.position_ids))
    return rotations
