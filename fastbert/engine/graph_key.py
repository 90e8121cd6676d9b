"""The key of a model's CUDA graphs is the state that they depend on; it is compared after each launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastbert.engine.interface import EncoderModel
from fastbert.engine.listeners import everywhere
from fastbert.engine.snapshot import ModuleSnapshot
from fastbert.engine.state import EncoderState, first_parameter, roots_of
from fastbert.engine.static_memory import Shape
from fastbert.ops import silent_writes
from fastbert.ops.derived import Derived

# How many records are made for one key. One that says no again and again where nothing has changed only costs.
MAX_RECORDS = 8


class Seen(NamedTuple):
    """A `Seen` is the state at the last comparison by `GraphKey.unchanged`. objects: a `cpu.ObjectRecord`, or None."""

    objects: Any
    n_made: int
    state: Any
    shape: Shape
    snapshot: ModuleSnapshot
    parameter: Tensor
    policy: Any
    precision: Any


class GraphKey:
    """A `GraphKey` keeps the state that the graphs of one model depend on, and tells whether it has changed.

    eight_bit: the 8-bit weights derived from the model's.
    """

    def __init__(self, state: EncoderState, eight_bit: Derived) -> None:
        self._state, self._eight_bit = state, eight_bit
        self._key: tuple[Any, Any] = (None, None)

    def now(self, model: EncoderModel, eight_bit_addresses: Callable[[EncoderModel], Any]) -> Any:
        """Returns the state of a graph: the addresses of weights and derived tensors, and the counts of writes.

        eight_bit_addresses: returns the addresses of the current 8-bit weights, or None if the model has none.
        """
        # Read before the addresses are: what changes meanwhile is looked at the next time.
        key = self._read(model)
        while key != self._key[0]:
            snapshot = self._state.snapshot
            assert snapshot is not None
            eight_bit = eight_bit_addresses(model)
            derived = snapshot.derived_addresses() if eight_bit is None else eight_bit
            self._key = key, (key[0], derived)
            key = self._read(model)  # to derive is a change, too
        return self._key[1]

    def unchanged(self, model: EncoderModel, shape: Shape, state: Any, seen: Seen | None) -> Seen | None:
        """Tells whether the state is the same as when graphs of this shape were captured and `now` was `state`.

        Returns None after a change, otherwise the argument `seen` of the next call: a record of all objects, which
        answers most calls. If the record differs, or there is none, Python compares everything.
        """
        if (
            seen is None
            or seen.state is not state
            or seen.shape is not shape
            or seen.snapshot is not self._state.snapshot
        ):
            seen = None
        elif seen.objects is not None and self._holds(model, seen):
            return seen
        # The record is made before the comparison, so that one of them notices what changes between the two.
        seen = self._look(model, shape, state, seen)
        return seen if self._same(model, shape, state) else None

    def _holds(self, model: EncoderModel, seen: Seen) -> bool:
        """Tells whether the record of objects is unchanged, without a comparison in Python."""
        attributes, parameter, shape = model.__dict__, seen.parameter, seen.shape
        return (
            seen.objects.holds()
            and attributes["policy"] is seen.policy
            and attributes["precision"] is seen.precision
            and not attributes["_parameters"]
            and roots_of(model) == seen.snapshot.roots
            and parameter.dtype is shape.dtype
            and parameter.device == shape.device
            and not torch.is_autocast_enabled(shape.device_type)
            and not attributes.get("_is_replica", False)
            and not everywhere()
            and self._key[1] is seen.state
            and (shape.waits or seen.snapshot.silent_writes(self._key[0][0][0]) == self._key[0][1])
        )

    def _look(self, model: EncoderModel, shape: Shape, state: Any, before: Seen | None) -> Seen:
        """Returns the present state. before: a record of the same state and shape that differed."""
        snapshot = self._state.snapshot
        assert snapshot is not None
        if before is not None and (before.objects is None or before.n_made == MAX_RECORDS):
            return before
        objects = snapshot.record([(self._eight_bit.__dict__, "changes")])
        n_made = 1 if before is None else before.n_made + 1
        policy, precision = model.policy, model.precision
        return Seen(objects, n_made, state, shape, snapshot, first_parameter(model), policy, precision)

    def _same(self, model: EncoderModel, shape: Shape, state: Any) -> bool:
        """Does the comparison of `unchanged` in Python."""
        parameter, snapshot = first_parameter(model), self._state.snapshot
        same = (
            parameter.device == shape.device
            and parameter.dtype == shape.dtype
            and (model.policy is shape.policy or model.policy == shape.policy)
            and not torch.is_autocast_enabled(shape.device.type)
            and not model.__dict__.get("_is_replica", False)
            and snapshot is not None
            and roots_of(model) == snapshot.roots
            and snapshot.same_modules()
            and snapshot.plain()
            and not everywhere()
        )
        key = self._key
        return same and self._read(model) == key[0] and key[1] is state

    def _read(self, model: EncoderModel) -> Any:
        """Returns the addresses and numbers that a graph reads, for a comparison."""
        snapshot = self._state.snapshot
        assert snapshot is not None
        state = snapshot.state(), model.precision
        n_silent_writes = self._silent_writes(snapshot, first_parameter(model), state[0])
        return state, n_silent_writes, snapshot.changes(), self._eight_bit.changes

    @staticmethod
    def _silent_writes(snapshot: ModuleSnapshot, parameter: Tensor, state: tuple[list[Any], ...]) -> int:
        # Where a look waits they are followed by `Engine.follow_weights`, or noted by kernels.
        return 0 if silent_writes.waits(parameter.device) else snapshot.silent_writes(state)
