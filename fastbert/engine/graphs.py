"""This module keeps CUDA graphs of the encoder by token count, so that a short batch needs a single launch.

README.md of this package describes the memory of a graph, when it is dropped, and its use by threads and streams.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastbert.engine import capture
from fastbert.engine.buckets import bucket_of
from fastbert.engine.capture import Capturer, Replayable
from fastbert.engine.events import count_capture
from fastbert.engine.interface import PackedInputs
from fastbert.engine.layer_forms import OUTPUT
from fastbert.engine.state import switches as _switches
from fastbert.engine.static_memory import COLUMNS, Buffers, Filled, Layout, Shape, fill_on_host
from fastbert.ops import BackendError, attention_plan, masked, static_plan
from fastbert.ops.packing import PackedBatch
from fastbert.ops.static_plan import Kind

logger = logging.getLogger("fastbert")

MAX_GRAPHS = 450  # of every bucket each kind of batch
MAX_FORMS = 1024  # of batches whose graph is known
MAX_RESULTS = 64  # numbers of rows of a graph, of which all but the largest buckets have fewer


@dataclass
class _Graph:
    """A `_Graph` is a captured graph and the memory from which it reads a batch."""

    replayable: Replayable
    layout: Layout
    buffers: Buffers
    words: Tensor  # (n_words,), the part of the static memory that is this bucket's
    ids: Tensor  # (3, T')
    out: Tensor  # (T', H)
    noted: bool
    columns: Tensor | None  # (T',) int32, where layers read them
    results: dict[int, Tensor] = field(default_factory=dict)  # the first rows of out, by their number

    def result(self, n_tokens: int) -> Tensor:
        """Returns the first rows of out, as a view that is kept, because making one takes longer than finding it."""
        rows = self.results.get(n_tokens)
        if rows is None:
            if len(self.results) >= MAX_RESULTS:
                self.results.clear()
            rows = self.results[n_tokens] = self.out[:n_tokens]
        return rows


# (inputs, batch, where the graph finds the number and the rows of its batch) -> the last hidden state, (rows, H)
Forward = Callable[[PackedInputs, PackedBatch, Tensor], Tensor]


class Graphs:
    """A `Graphs` holds the graphs of one model on one device. `enabled` is the user's switch.

    trusted: whether the last batch found no change since the capture. Then `replay` may launch the next batch first,
    and compare while the GPU works.
    """

    def __init__(self) -> None:
        self.enabled = True
        self.lock = threading.RLock()
        self.limit = MAX_GRAPHS
        self.ahead = False  # whether a bucket is captured for every kind of batch at once
        self._capturer: Capturer | None = None
        self.clear()

    def clear(self) -> None:
        """Drops all captured graphs; the next use captures again, also after a warm-up."""
        with self.lock:
            if self._capturer is not None:
                self._capturer.finish()
            self.frozen = False
            self.trusted = False
            self._graphs: OrderedDict[Any, _Graph] = OrderedDict()
            self._buffers: dict[int, Buffers] = {}
            self._capturer = None
            self._shape: Shape | None = None
            self._state: Any = None
            self._switches: Any = None
            self._held: list[Tensor] = []
            self._keys: dict[Any, Any] = {}  # by the form of a batch: the key of its graph, and what that depends on
            self._last_used: Any = None  # the key of the last graph
            self._seen: Any = None  # what `unchanged` of `replay` last returned
            self._failed = False

    def thaw(self) -> None:
        """Allows captures at first use, also after a failed capture, for every kind of batch in the bucket."""
        with self.lock:
            self.frozen = self._failed = False
            self.ahead = True

    def freeze(self) -> None:
        """Forbids captures until `clear`: a bucket without a graph takes the plain path."""
        with self.lock:
            self.frozen, self.ahead = True, False

    def __len__(self) -> int:
        return len(self._graphs)

    @property
    def shape(self) -> Shape | None:
        """Returns the properties that all graphs share; None before the first graph."""
        return self._shape

    @property
    def notes(self) -> bool:
        """Tells whether kernels in the graphs check ids."""
        return self._shape is not None and self._shape.notes

    def captured(self) -> tuple[int, ...]:
        """Returns the buckets with a graph."""
        with self.lock:
            return tuple(sorted({bucket for bucket, *_ in self._graphs}))

    def __getstate__(self) -> dict[str, Any]:
        return {"enabled": self.enabled, "limit": self.limit}  # a copy of a model captures graphs of its own

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.__dict__.update(state)

    def replay(
        self,
        batch: PackedBatch,
        inputs: PackedInputs,
        number: int,
        unchanged: Callable[[Shape, Any, Any], Any],
    ) -> Tensor | None:
        """Launches the batch's graph, then compares the state; returns the last hidden state, or None after a change.

        The graph reads memory that is held, and writes only to static memory, so an outdated launch does no harm.
        unchanged: (shape, state, its last result for them or None) -> None after a change. number: that of the batch.
        """
        with self.lock:
            shape, state, switches, seen = self._shape, self._state, self._switches, self._seen
            if shape is None or not self.trusted:
                return None
            key = self._key_of(batch, shape, switches)
            graph = self._graphs.get(key)
            if graph is None:
                return None
            out = self._launch(graph, batch, inputs, number)
        if out is None:
            return None
        if switches == _switches() and (now := unchanged(shape, state, seen)) is not None:
            if now is not seen or key is not self._last_used:
                self._used(key, now)
            return out
        self.trusted = False
        return None

    def _key_of(self, batch: PackedBatch, shape: Shape, switches: Any) -> Any:
        """Returns the key of the batch's graph, which may not exist yet; None if the batch cannot have a graph.

        It is kept for the last forms of batches.
        """
        form, circumstances = batch.form, attention_plan.circumstances()
        known = self._keys.get(form)
        if known is not None and known[0] == circumstances and known[1][2] == switches:
            return known[1]
        bucket = bucket_of(batch.n_tokens)
        if bucket is None or batch.batch_size > bucket:
            return None
        key = bucket, static_plan.kind_of(batch, bucket, shape.dtype, shape.head_size, shape.policy), switches
        if len(self._keys) >= MAX_FORMS:
            self._keys.clear()
        self._keys[form] = circumstances, key
        return key

    def _used(self, key: Any, seen: Any) -> None:
        """Records that this graph was used last, and the state after its launch."""
        with self.lock:
            if key in self._graphs:
                self._graphs.move_to_end(key)
                self._seen, self._last_used = seen, key

    def run(
        self,
        forward: Forward,
        batch: PackedBatch,
        inputs: PackedInputs,
        shape: Shape,
        state: Callable[[], Any],
        held: Callable[[], list[Tensor]],
        number: int = 0,
    ) -> Tensor | None:
        """Returns the last hidden state, (T, H), of a batch of 1 to LARGEST tokens; None for the plain path.

        inputs: ids, each (T,). state: the state that the graphs depend on, without the shape; if it has changed, they
        are dropped. held: the tensors outside of static memory that the graphs read in that state.
        """
        bucket = bucket_of(batch.n_tokens)
        if bucket is None or batch.batch_size > bucket:
            return None
        with self.lock:
            current = state()
            if shape != self._shape or current != self._state:
                if self._shape is not None:
                    self.clear()
                self._shape = shape
            self._state = current
            if self._capturer is None:
                self._capturer = capture.capturer(shape.device)
            kind = static_plan.kind_of(batch, bucket, shape.dtype, shape.head_size, shape.policy)
            key = bucket, kind, _switches()
            graph = self._graphs.get(key)
            if self._failed or self._capturer is None or (graph is None and self.frozen):
                return None
            if graph is None:
                if not Layout(bucket, shape, kind).plan.fits(batch):
                    return None
                if not self._held:
                    self._held = held()
                if not self._capture(forward, key, batch, shape):
                    return None
                graph = self._graphs[key]
            if self.ahead:
                sizes = shape.dtype, shape.head_size, shape.device, shape.policy, _holes_ahead(bucket, shape)
                for other in static_plan.kinds_in(bucket, *sizes):
                    missing = (bucket, other, key[2]) not in self._graphs
                    if missing and not self._capture(forward, (bucket, other, key[2]), batch, shape):
                        return None
            out = self._launch(graph, batch, inputs, number)
            if out is not None:
                self._used(key, self._seen)
                self._switches, self.trusted = key[2], True
            return out

    def _launch(self, graph: _Graph, batch: PackedBatch, inputs: PackedInputs, number: int) -> Tensor | None:
        """Fills the static memory, launches the graph and a copy of its result; None if the batch does not fit."""
        filled = None
        if batch.mask is None:
            filled = fill_on_host(graph.layout, batch, inputs, number)
            if filled is None:
                return None
        elif not graph.layout.plan.fits(batch):
            return None
        assert self._capturer is not None
        buffers = graph.buffers
        self._capturer.begin((buffers.words, buffers.out))
        try:
            if filled is None:
                graph.layout.unpack(graph.words, batch, inputs, number)
            else:
                _fill(graph, filled, batch.n_tokens)
            graph.replayable.replay()
            return graph.result(batch.n_tokens).clone()
        finally:
            self._capturer.end()

    def _buffers_of(self, capacity: int, shape: Shape) -> Buffers:
        """Returns the static memory of the buckets up to `capacity`, made at the first use."""
        if capacity not in self._buffers:
            sizes = shape.dtype, shape.head_size, shape.device, shape.policy
            kinds = static_plan.kinds(*sizes, shape.distances)
            n_words = max(Layout(capacity, shape, kind).n_words for kind in kinds)
            with torch.inference_mode(False):  # or nobody could write to them outside of inference mode
                self._buffers[capacity] = Buffers(capacity, n_words, shape.hidden_size, shape.dtype, shape.device)
        return self._buffers[capacity]

    def _capture(self, forward: Forward, key: tuple[int, Kind, Any], batch: PackedBatch, shape: Shape) -> bool:
        """Captures the bucket's graph; False if it cannot be done."""
        assert self._capturer is not None
        bucket, kind, switches = key
        self._last_used = None
        capacity = 1 << (bucket - 1).bit_length()
        buffers = self._buffers_of(capacity, shape)
        self._capturer.begin((buffers.words, buffers.out))
        # A capture may run what it captures, at shapes whose views lie elsewhere: on no tiles and on ids that are 0.
        buffers.words.zero_()
        # An octave's largest graph comes first: the others then find its intermediate memory in the pool, where each
        # that is larger than those before it would else need new memory, and leave theirs to nobody.
        missing = [size for size in dict.fromkeys((capacity, bucket)) if (size, kind, switches) not in self._graphs]
        try:
            for size in missing:
                layout = Layout(size, shape, kind)
                self._graphs[size, kind, switches] = self._capture_one(forward, buffers, layout, batch, shape)
        except BackendError:  # a strict policy's, which the plain path would raise as well
            raise
        except RuntimeError as error:
            self._failed, self.trusted = True, False
            self._graphs.clear()
            logger.warning(
                "CUDA graphs: the capture of %d tokens failed; kernels are launched one by one from now on: %s",
                bucket, error,
            )  # fmt: skip
            return False
        finally:
            self._capturer.end()
        while len(self._graphs) > self.limit:
            self._graphs.popitem(last=False)
        return True

    def _capture_one(
        self, forward: Forward, buffers: Buffers, layout: Layout, batch: PackedBatch, shape: Shape
    ) -> _Graph:
        assert self._capturer is not None
        bucket = layout.bucket
        out = buffers.out[:bucket]
        inputs, static = layout.static_batch(buffers.words)
        static.plan(OUTPUT, lambda: out)
        plans = static.plans()

        def function() -> None:
            # What is made of lengths and columns on the device is made anew each time, so that the graph makes it too.
            static.set_plans(plans)
            last = forward(inputs, static, layout.batch(buffers.words))
            if last is not out:  # where the last kernel does not write there
                out.copy_(last)

        capturer = self._capturer
        replayable = count_capture(lambda: capturer.capture(function))
        words = buffers.words[: layout.n_words]
        return _Graph(replayable, layout, buffers, words, layout.ids(words), out, shape.notes, static.columns)


def _holes_ahead(bucket: int, shape: Shape) -> bool:
    """Tells whether to capture graphs with columns ahead, for batches whose lengths may stay on the device."""
    return shape.distances and bucket <= masked.MOST_PLACES


def _fill(graph: _Graph, filled: Filled, n_tokens: int) -> None:
    """Writes a batch into its graph's memory, on the current stream: one copy, and one for ids on the device."""
    words, start, left = filled
    if start == 0:
        graph.words.copy_(words, non_blocking=True)
    else:
        graph.words[start:].copy_(words[start:], non_blocking=True)
    for row, ids in left:
        if row == COLUMNS:
            assert graph.columns is not None
            graph.columns[:n_tokens].copy_(ids)
            continue
        graph.ids[row, :n_tokens].copy_(ids)
        if not graph.noted:  # else the kernel does not look at rows of padding
            graph.ids[row, n_tokens:].zero_()
