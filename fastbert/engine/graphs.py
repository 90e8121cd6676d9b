"""CUDA graphs of the encoder by token count, so that a short batch costs its kernels and not their launches.

README.md of this package says what a graph reads, what ends it, and how threads and streams share it.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastbert.engine import capture
from fastbert.engine.buckets import bucket_of
from fastbert.engine.capture import Capturer, Replayable
from fastbert.engine.events import count_capture
from fastbert.engine.interface import PackedInputs
from fastbert.engine.state import switches as _switches
from fastbert.ops import BackendError, Policy, attention_plan, packing
from fastbert.ops.attention_plan import Kind
from fastbert.ops.packing import PackedBatch

logger = logging.getLogger("fastbert")

MAX_GRAPHS = 128
REMEMBERED = 16  # forms of batches in a bucket


class _Buffers:
    """The static memory of the buckets of one octave, up to `capacity` rows."""

    def __init__(self, capacity: int, n_words: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.words = torch.zeros(n_words, dtype=torch.int64, device=device)  # as _Layout says
        self.out = torch.zeros(capacity, hidden_size, dtype=dtype, device=device)


class _Layout:
    """Where the static memory holds what a bucket's graph reads, in words of 8 bytes.

    input_ids, token_type_ids and position_ids, (T',) each; the number and the rows of the batch (`embedding.Notes`);
    the integers of attention, as StaticPlan says. What the host knows is at the end, so that one copy brings it.
    """

    def __init__(self, bucket: int, shape: Shape, kind: Kind) -> None:
        self.bucket = bucket
        self.plan = attention_plan.StaticPlan(bucket, shape.dtype, shape.head_size, shape.device, shape.policy, kind)
        self.start_of_plan = 3 * bucket + 2
        self.n_words = self.start_of_plan + -(-self.plan.n_integers // 2)
        self._remembered: OrderedDict[bytes, np.ndarray] = OrderedDict()

    def of_lengths(self, batch: PackedBatch) -> np.ndarray | None:
        """Returns all that follows from a batch's lengths: the words after the token types; None where it does not fit.

        It is kept for the lengths that came last, since many programs run batches of a few forms.
        """
        key = batch.cu_seqlens_cpu.numpy().tobytes()
        words = self._remembered.get(key)
        if words is None:
            words = np.zeros(self.n_words - 2 * self.bucket, np.int64)
            if not self.plan.write(batch, words[self.bucket + 2 :].view(np.int32)):
                return None
            words[: batch.n_tokens] = packing.count_positions(batch.cu_seqlens_cpu.numpy())
            if len(self._remembered) >= REMEMBERED:
                self._remembered.popitem(last=False)
            self._remembered[key] = words
        return words

    def ids(self, words: Tensor) -> Tensor:
        """Returns (3, T'), a view of the static memory or of a copy of it."""
        return words[: 3 * self.bucket].view(3, self.bucket)

    def batch(self, words: Tensor) -> Tensor:
        """Returns (2,)."""
        return words[3 * self.bucket : self.start_of_plan]

    def integers(self, words: Tensor) -> Tensor:
        """Returns (n_integers,) int32."""
        return words[self.start_of_plan : self.n_words].view(torch.int32)


@dataclass
class _Graph:
    """A captured graph, and where it reads a batch."""

    replayable: Replayable
    layout: _Layout
    buffers: _Buffers
    words: Tensor  # (n_words,), the part of the static memory that is this bucket's
    ids: Tensor  # (3, T')
    out: Tensor  # (T', H)
    noted: bool


@dataclass(frozen=True)
class Shape:
    """The properties that all graphs of a model share. notes: whether kernels note ids beyond their table."""

    device: torch.device
    dtype: torch.dtype
    hidden_size: int
    head_size: int
    policy: Policy
    notes: bool = False


# (inputs, batch, where the graph finds the number and the rows of its batch) -> the last hidden state, (rows, H)
Forward = Callable[[PackedInputs, PackedBatch, Tensor], Tensor]


class Graphs:
    """The graphs of one model on one device. `enabled` is the user's switch.

    trusted: whether the last batch was run with everything as it was when the graphs were captured. The next one may
    then be launched first, and looked at while the GPU works: `replay`.
    """

    def __init__(self) -> None:
        self.enabled = True
        self.lock = threading.RLock()
        self.limit = MAX_GRAPHS
        self._capturer: Capturer | None = None
        self.clear()

    def clear(self) -> None:
        """Forgets everything that was captured; the next use captures again, also after a warm-up."""
        with self.lock:
            if self._capturer is not None:
                self._capturer.finish()
            self.frozen = False
            self.trusted = False
            self._graphs: OrderedDict[Any, _Graph] = OrderedDict()
            self._buffers: dict[int, _Buffers] = {}
            self._capturer = None
            self._shape: Shape | None = None
            self._state: Any = None
            self._switches: Any = None
            self._held: list[Tensor] = []
            self._failed = False

    def thaw(self) -> None:
        """Captures again at first use, also where that failed before."""
        with self.lock:
            self.frozen = self._failed = False

    def freeze(self) -> None:
        """No captures any more: a bucket without a graph takes the plain path. Ends with the graphs, in `clear`."""
        with self.lock:
            self.frozen = True

    def __len__(self) -> int:
        return len(self._graphs)

    @property
    def shape(self) -> Shape | None:
        """What the graphs share; None before the first one."""
        return self._shape

    @property
    def notes(self) -> bool:
        """Tells whether kernels in the graphs note ids beyond their table."""
        return self._shape is not None and self._shape.notes

    def captured(self) -> tuple[int, ...]:
        """The buckets for which there is a graph."""
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
        unchanged: Callable[[Shape, Any], bool],
    ) -> Tensor | None:
        """Launches the batch's graph, and then asks whether it was the right one: the last hidden state, or None.

        What was launched reads memory that is held, and writes to static memory alone, so that it does no harm where
        the answer is no. unchanged: (shape, state) -> whether a model in them is this one. number: of the batch.
        """
        bucket = bucket_of(batch.n_tokens)
        if bucket is None or batch.batch_size > bucket:
            return None
        with self.lock:
            shape, state, switches = self._shape, self._state, self._switches
            if shape is None or not self.trusted:
                return None
            kind = attention_plan.kind_of(batch, bucket, shape.dtype, shape.head_size, shape.policy)
            key = bucket, kind, switches
            graph = self._graphs.get(key)
            if graph is None:
                return None
            out = self._launch(graph, batch, inputs, number)
        if out is None:
            return None
        if switches == _switches() and unchanged(shape, state):
            self._used(key)
            return out
        self.trusted = False
        return None

    def _used(self, key: Any) -> None:
        """Notes that this graph was used last."""
        with self.lock:
            if key in self._graphs:
                self._graphs.move_to_end(key)

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
        """The last hidden state, (T, H), of a batch of 1 to LARGEST tokens; None where it must take the plain path.

        inputs: ids, each (T,). state: what the graphs depend on besides the shape; where it differs from the last time,
        they are dropped. held: the tensors outside of static memory that the graphs read, in that state.
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
            kind = attention_plan.kind_of(batch, bucket, shape.dtype, shape.head_size, shape.policy)
            key = bucket, kind, _switches()
            graph = self._graphs.get(key)
            if self._failed or self._capturer is None or (graph is None and self.frozen):
                return None
            if graph is None:
                if not _Layout(bucket, shape, kind).plan.fits(batch):
                    return None
                if not self._held:
                    self._held = held()
                if not self._capture(forward, key, batch, shape):
                    return None
                graph = self._graphs[key]
            out = self._launch(graph, batch, inputs, number)
            if out is not None:
                self._used(key)
                self._switches, self.trusted = key[2], True
            return out

    def _launch(self, graph: _Graph, batch: PackedBatch, inputs: PackedInputs, number: int) -> Tensor | None:
        """Fills the static memory, launches the graph and a copy of its result; None where the batch does not fit."""
        filled = _on_the_host(graph.layout, batch, inputs, number)
        if filled is None:
            return None
        assert self._capturer is not None
        buffers = graph.buffers
        self._capturer.begin((buffers.words, buffers.out))
        try:
            _fill(graph, filled, batch.n_tokens)
            graph.replayable.replay()
            return graph.out[: batch.n_tokens].clone()
        finally:
            self._capturer.end()

    def _buffers_of(self, capacity: int, shape: Shape) -> _Buffers:
        """Returns the static memory of the buckets up to `capacity`, made at the first use."""
        if capacity not in self._buffers:
            kinds = attention_plan.kinds(shape.dtype, shape.head_size, shape.device, shape.policy)
            n_words = max(_Layout(capacity, shape, kind).n_words for kind in kinds)
            with torch.inference_mode(False):  # or nobody could write to them outside of inference mode
                self._buffers[capacity] = _Buffers(capacity, n_words, shape.hidden_size, shape.dtype, shape.device)
        return self._buffers[capacity]

    def _capture(self, forward: Forward, key: tuple[int, Kind, Any], batch: PackedBatch, shape: Shape) -> bool:
        """Captures the bucket's graph; False if it cannot be done."""
        assert self._capturer is not None
        bucket, kind, switches = key
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
                layout = _Layout(size, shape, kind)
                self._graphs[size, kind, switches] = self._capture_one(forward, buffers, layout, batch, shape)
        except BackendError:  # a strict policy's, which the plain path would raise as well
            raise
        except RuntimeError as error:
            self._failed, self.trusted = True, False
            self._graphs.clear()
            logger.warning(
                "CUDA graphs: capturing one of %d tokens failed, so kernels are launched one by one from now on: %s",
                bucket, error,
            )  # fmt: skip
            return False
        finally:
            self._capturer.end()
        while len(self._graphs) > self.limit:
            self._graphs.popitem(last=False)
        return True

    def _capture_one(
        self, forward: Forward, buffers: _Buffers, layout: _Layout, batch: PackedBatch, shape: Shape
    ) -> _Graph:
        assert self._capturer is not None
        bucket = layout.bucket
        ids, out = layout.ids(buffers.words), buffers.out[:bucket]
        cu_seqlens, plan = layout.plan.split(layout.integers(buffers.words))
        inputs = PackedInputs(*ids)
        static = PackedBatch(
            cu_seqlens=cu_seqlens,
            cu_seqlens_cpu=batch.cu_seqlens_cpu,  # which the kernels never look at
            position_ids=ids[2],
            batch_size=bucket,
            padded_length=bucket,
        )
        static = attention_plan.with_plan(static, shape.dtype, shape.head_size, shape.policy, plan)

        def function() -> None:
            out.copy_(forward(inputs, static, layout.batch(buffers.words)))

        capturer = self._capturer
        replayable = count_capture(lambda: capturer.capture(function))
        return _Graph(replayable, layout, buffers, buffers.words[: layout.n_words], ids, out, shape.notes)


def _on_the_host(layout: _Layout, batch: PackedBatch, inputs: PackedInputs, number: int) -> _Filled | None:
    """Returns the static memory as the host fills it, and the ids that it leaves to the device.

    Returns None where the batch does not fit.
    """
    n_tokens, bucket = batch.n_tokens, layout.bucket
    words = torch.empty(layout.n_words, dtype=torch.int64, device="cpu", pin_memory=packing.pins(batch.device))
    numbers = words.numpy()
    lengths = layout.of_lengths(batch)
    if lengths is None:
        return None
    numbers[2 * bucket :] = lengths
    numbers[3 * bucket], numbers[3 * bucket + 1] = number, n_tokens
    input_ids, token_type_ids, position_ids, _ = inputs
    left: list[tuple[int, Tensor]] = []
    if position_ids is not None and position_ids is not batch.__dict__.get("position_ids"):
        _put(numbers, left, bucket, 2, position_ids)
    elif not batch.counted:
        columns = batch.host_columns
        _put(numbers, left, bucket, 2, batch.position_ids if columns is None else torch.from_numpy(columns))
    if token_type_ids is None:
        numbers[bucket : 2 * bucket] = 0
    else:
        _put(numbers, left, bucket, 1, token_type_ids)
    if input_ids is not None:
        _put(numbers, left, bucket, 0, input_ids)
    # Where ids are on the device, the copy from the host begins after them.
    from_device = {row for row, _ in left}
    start = next(row for row in range(4) if row not in from_device) * bucket
    return words, start, left


# The memory on the host, its first word that is copied, and (row, ids) on the device.
_Filled = tuple[Tensor, int, "list[tuple[int, Tensor]]"]


def _put(numbers: np.ndarray, left: list[tuple[int, Tensor]], bucket: int, row: int, ids: Tensor) -> None:
    """Puts ids that are on the host into their row, and others on the list."""
    if packing.on_host(ids.device):
        n_tokens = ids.shape[0]
        numbers[row * bucket : row * bucket + n_tokens] = ids.numpy()
        numbers[row * bucket + n_tokens : (row + 1) * bucket] = 0
    else:
        left.append((row, ids))


def _fill(graph: _Graph, filled: _Filled, n_tokens: int) -> None:
    """Writes a batch where its graph reads it, on the current stream: in one copy, and one for ids on the device."""
    words, start, left = filled
    graph.words[start:].copy_(words[start:], non_blocking=True)
    for row, ids in left:
        graph.ids[row, :n_tokens].copy_(ids)
        if not graph.noted:  # else the kernel does not look at rows of padding
            graph.ids[row, n_tokens:].zero_()
