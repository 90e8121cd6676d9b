"""CUDA graphs of the encoder by token count, so that a short batch costs its kernels and not their launches.

A layer is seven kernels of a few microseconds each on a short batch, and the host needs longer than that to
launch one. A CUDA graph launches all of them at once, but replays what was captured: the same kernels, at the
same shapes, on the same memory. Therefore:

Buckets. A batch of T tokens runs in T' >= T rows, T' the next of `BUCKETS`: steps of 32 up to 1,024, then a
sixteenth of the power of two below, up to 16,384; above 512 rows, less than 1/16 of them are padding. Rows of
padding have id, position and segment 0. Nothing of theirs reaches another row, since attention reads rows through
the work list alone and everything else works row by row. They are never returned.

With or without. Below the largest bucket the plain path runs in T' rows as well: the same kernels at the same
shapes, so results with graphs and without are the same to the bit. Above it, both run in exactly T rows, and
without a graph.

Static memory. A graph reads ids, cu_seqlens, seq_ids and the work list of attention in buffers that all buckets of
one octave share, and leaves its result in one. The work list has as many tiles as T' tokens can ever need
(fastbert_kernels.attention.max_tiles), the rest of them empty; in batch-invariant mode there is a second one, for short
texts. What does not fit, more than T' sequences (empty ones, then) or more tiles, takes the plain path. The result is
copied out before anybody else may replay: what a caller holds is his. Intermediate memory comes from one pool that all
graphs of a model share, for no two of them run at a time.

What ends a graph. It reads weights at their addresses, and some that are derived from them: the fused QKV matrix, or
8-bit weights (fastbert.ops.derived). Before each replay the addresses and PyTorch's counts of writes are compared
(`Watch`): where one differs, all graphs are dropped, and captured again when they are next needed; so they are by
train(), to() and another policy or precision. Hooks, adapters, patched forwards, training mode, gradients, autocast,
torch.compile and dispatch modes such as FlopCounterMode take the plain path, in exactly T rows.

How many. `MAX_GRAPHS` for a model; beyond, the one that was not used for longest goes. A bucket is captured at its
first use. `fastbert.warmup` captures ahead, and from then on no batch makes a capture: one whose bucket has no
graph takes the plain path.

Threads and streams. A lock is held from the writing of the inputs to the launch of the copy of the result, all of
which happen on the caller's current stream; a caller on another stream first waits, on the device, for that copy.
Captures are one at a time in the process; CUDA does not let another thread synchronise the whole device during one,
so a program of several threads had better warm up before it starts them.

`Capturer` is all that knows of CUDA. In tests another stands for it, which runs the function again instead.
"""

from __future__ import annotations

import bisect
import functools
import logging
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import chain, repeat
from operator import attrgetter, contains, itemgetter
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fastbert.ops import BackendError, Policy, attention, tracing
from fastbert.ops.derived import Derived
from fastbert.ops.packing import PackedBatch
from fastbert.ops.silent_writes import Writes

logger = logging.getLogger("fastbert")

LARGEST = 16384
MAX_GRAPHS = 128


def _bucket_sizes() -> tuple[int, ...]:
    sizes, size = [], 0
    while size < LARGEST:
        octave = 1 << (size.bit_length() - 1) if size else 1  # the largest power of two <= size
        size += max(32, octave // 16)
        sizes.append(size)
    return tuple(sizes)


BUCKETS = _bucket_sizes()


def bucket_of(n_tokens: int) -> int | None:
    """The rows in which a batch of n_tokens runs: the next of BUCKETS, None above the largest and for 0."""
    if not 0 < n_tokens <= LARGEST:
        return None
    return BUCKETS[bisect.bisect_left(BUCKETS, n_tokens)]


@dataclass(frozen=True)
class CompileEvents:
    """What has stalled a launch in this process so far, or, as the difference of two, in between.

    compilations: Triton kernels of this library compiled. loads: those found compiled in Triton's cache on disk, and
    loaded. captures: CUDA graphs captured. tunings: block sizes measured.
    """

    compilations: int = 0
    loads: int = 0
    captures: int = 0
    tunings: int = 0

    @property
    def total(self) -> int:
        return self.compilations + self.loads + self.captures + self.tunings

    def __sub__(self, earlier: CompileEvents) -> CompileEvents:
        return CompileEvents(*(getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)))


_captures = 0
# One capture at a time in a process: torch.cuda.graph. Captures are also counted under it.
_capturing = threading.Lock()


def compile_events() -> CompileEvents:
    """Counts of compilations, loads of compiled kernels, captures and tunings since the process started.

    After `fastbert.warmup(model)` no batch of any lengths adds to them. Imports no compiler.
    """
    kernels = sys.modules.get("fastbert_kernels.events")  # without it, no kernel was launched
    return CompileEvents(captures=_captures, **(kernels.counts() if kernels is not None else {}))


class Replayable(Protocol):
    def replay(self) -> None: ...


class Capturer(Protocol):
    """The device's side of graphs. `function` works on static memory alone, and returns nothing."""

    def begin(self, memory: Sequence[Tensor]) -> None:
        """Makes the current stream wait for the last `end`; it is about to use the static memory."""

    def end(self) -> None:
        """Marks where the current stream is done with the static memory."""

    def finish(self) -> None:
        """Waits, on the host, for the last `end`: what was captured may go."""

    def capture(self, function: Callable[[], None]) -> Replayable:
        """Captures what the function launches; whether it also runs is open. Errors are RuntimeErrors."""


class _Streams:
    """The streams of one GPU on which this process captures: one to run on before, and one for each living capturer.

    cuBLAS keeps a workspace of up to 32 MiB for every stream it ever saw, and graphs that were captured on a stream
    write to that stream's workspace when they run. So streams are used again, which bounds the memory, and no two
    living capturers have the same one, since their graphs may run at the same time.
    """

    def __init__(self) -> None:
        self.aside = torch.cuda.Stream()
        self.known = [self.aside]
        self.free: list[tuple[torch.cuda.Stream, torch.cuda.Event | None]] = []

    def take(self) -> tuple[torch.cuda.Stream, torch.cuda.Event | None]:
        """A stream for captures, and when the graphs that were captured on it before have run."""
        if self.free:
            return self.free.pop()
        for _ in range(64):  # PyTorch has 32, and gives them out again from the first
            stream = torch.cuda.Stream()
            if stream not in self.known:
                self.known.append(stream)
                return stream, None
        raise RuntimeError(f"each of the {len(self.known)} streams of this GPU is taken by the graphs of another model")


@functools.cache
def _streams(device: int, make: type) -> _Streams:
    """Those of the current device, whose index `device` is. make: torch.cuda.Stream, for which another may stand."""
    return _Streams()


class CudaCapturer:
    """Captures as PyTorch's notes on CUDA semantics say: first run on a side stream, then captured on another.

    The pool of memory is the capturer's own, since graphs that share one must not run at the same time. Streams are
    those of the process, see `_Streams`; the one for captures goes back when the capturer does.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._last: tuple[torch.cuda.Stream, torch.cuda.Event] | None = None
        self._streams: _Streams | None = None
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None

    def __del__(self) -> None:
        if self._streams is not None and self._stream is not None:
            self._streams.free.append((self._stream, None if self._last is None else self._last[1]))

    def begin(self, memory: Sequence[Tensor]) -> None:
        stream = torch.cuda.current_stream(self.device)
        if self._last is not None and self._last[0] != stream:
            stream.wait_event(self._last[1])
        for tensor in memory:
            tensor.record_stream(stream)  # should the model go while this stream still works

    def end(self) -> None:
        stream = torch.cuda.current_stream(self.device)
        event = torch.cuda.Event() if self._last is None else self._last[1]
        event.record(stream)
        self._last = stream, event

    def finish(self) -> None:
        if self._last is not None:
            self._last[1].synchronize()

    def capture(self, function: Callable[[], None]) -> Replayable:
        with torch.cuda.device(self.device):
            before = torch.cuda.current_stream()
            if self._streams is None:
                index = self.device.index if self.device.index is not None else torch.cuda.current_device()
                self._streams = _streams(index, torch.cuda.Stream)
            if self._stream is None:
                self._stream, others_last = self._streams.take()
                self._pool = torch.cuda.graph_pool_handle()
                if others_last is not None:
                    before.wait_event(others_last)
            aside, capturing = self._streams.aside, self._stream
            try:
                # Whatever is made at a first use (modules, handles, workspaces) is made here, outside of the capture.
                aside.wait_stream(before)
                with torch.cuda.stream(aside):
                    function()
                before.wait_stream(aside)
                graph = torch.cuda.CUDAGraph()
                # The stream is always the same, as a shared pool wants it. Other threads may allocate meanwhile.
                with torch.cuda.graph(graph, self._pool, capturing, capture_error_mode="thread_local"):
                    function()
            finally:
                torch.cuda.set_stream(before)  # a capture that fails leaves its own stream current
        return graph


def capturer(device: torch.device) -> Capturer | None:
    """What captures graphs on this device, None where nothing does. There, batches are not padded to buckets either."""
    return CudaCapturer(device) if device.type == "cuda" and torch.version.hip is None else None


class Watch:
    """Whether modules are as they were: children, hooks, forwards, mode; and where their parameters lie.

    Looked at before every replay, so it keeps the dictionaries that hold these things, and asks no module.
    """

    def __init__(self, roots: Iterable[nn.Module], kinds: Collection[type[nn.Module]]) -> None:
        modules = [module for root in roots for module in root.modules()]
        self._children = [module._modules for module in modules if module._modules]
        self._children_before = [dict(children) for children in self._children]
        self._parameters = tuple(module._parameters for module in modules if module._parameters)
        self._dicts = tuple(module.__dict__ for module in modules)
        self._deriving: tuple[Any, ...] = tuple(
            module for module in modules if isinstance(module.__dict__.get("derived"), Derived)
        )
        self._hooks = tuple(
            hooks
            for module in modules
            for hooks in (
                module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
            )
        )  # fmt: skip
        self._modules, self._kinds = modules, list(map(type, modules))
        self._norms = tuple(module.__dict__ for module in modules if isinstance(module, nn.LayerNorm))
        self._known = all(kind in kinds for kind in self._kinds)
        self._writes: tuple[Any, Writes] | None = None
        self._n_silent_writes = 0

    def same_modules(self) -> bool:
        """Whether no module was replaced, added, removed or made one of another class."""
        return self._children == self._children_before and list(map(type, self._modules)) == self._kinds

    def plain(self) -> bool:
        """Whether every module is of a known kind and in eval mode, and nobody listens to or patches one."""
        return (
            self._known
            and not any(self._hooks)
            and not any(map(itemgetter("training"), self._dicts))
            and not any(map(contains, self._dicts, repeat("forward")))
        )

    def kinds(self) -> set[type]:
        """The types of all parameters."""
        return set(map(type, chain.from_iterable(map(dict.values, self._parameters))))

    def changes(self) -> list[int]:
        """How often what the modules derive from their weights has changed, or was asked to."""
        return [module.__dict__["derived"].changes for module in self._deriving]

    def look_again(self) -> None:
        """Makes what the modules derive from their weights anew when it is next used."""
        for module in self._deriving:
            module.__dict__["derived"].look_again()

    def derived(self) -> list[tuple[int, ...]]:
        """Where that is, up to date, of every module that has a `derived`."""
        return [module.derived_addresses() for module in self._deriving]

    def state(self) -> tuple[list[int], list[int], list[float]]:
        """Where every parameter is, and how often it was written to, as far as PyTorch counts that; the norms' eps."""
        found: list[Any] = list(chain.from_iterable(map(dict.values, self._parameters)))
        try:
            versions = list(map(attrgetter("_version"), found))
        except (RuntimeError, AttributeError):  # inference tensors have none, and a parameter may be None
            found = [p for p in found if p is not None]
            versions = [-1 if p.is_inference() else p._version for p in found]
        return list(map(Tensor.data_ptr, found)), versions, list(map(itemgetter("eps"), self._norms))

    def silent_writes(self, state: tuple[list[Any], ...]) -> int:
        """How often parameters were seen to have been written to without PyTorch's count. state: what `state` gives.

        On a GPU this waits for it.
        """
        kept = self._writes
        parameters = [p for p in chain.from_iterable(map(dict.values, self._parameters)) if p is not None]
        if kept is None or kept[0] != state or not kept[1].none_since(parameters):
            self._n_silent_writes += kept is not None and kept[0] == state
            self._writes = state, Writes(parameters)
        return self._n_silent_writes


class _Buffers:
    """The static memory of the buckets of one octave, up to `capacity` rows."""

    def __init__(self, capacity: int, n_tiles: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
        # Integers of attention, in one copy from the host: work lists, seq_ids and cu_seqlens, each 16-byte aligned.
        self.integers = torch.zeros(4 * n_tiles + 2 * capacity + 1, dtype=torch.int32, device=device)
        self.ids = torch.zeros(3, capacity, dtype=torch.int64, device=device)  # of words, segments and positions
        self.out = torch.zeros(capacity, hidden_size, dtype=dtype, device=device)

    def views(self, bucket: int, n_tiles: int) -> tuple[Tensor, Tensor, Tensor]:
        """Work lists (W, 4), one after the other, seq_ids (T',) and cu_seqlens (T' + 1,) of a bucket."""
        parts = self.integers[: 4 * n_tiles + 2 * bucket + 1].split([4 * n_tiles, bucket, bucket + 1])
        return parts[0].view(n_tiles, 4), parts[1], parts[2]


@dataclass(frozen=True)
class Shape:
    """What a model's graphs have in common."""

    device: torch.device
    dtype: torch.dtype
    hidden_size: int
    head_size: int
    policy: Policy


# (input_ids, token_type_ids, position_ids, batch) -> the last hidden state, (rows, H)
Forward = Callable[[Tensor, Tensor, Tensor, PackedBatch], Tensor]


class Graphs:
    """The graphs of one model on one device. `enabled` is the user's switch."""

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
            self._graphs: OrderedDict[Any, Replayable] = OrderedDict()
            self._buffers: dict[int, _Buffers] = {}
            self._capturer = None
            self._shape: Shape | None = None
            self._state: Any = None
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

    def captured(self) -> tuple[int, ...]:
        """The buckets for which there is a graph."""
        with self.lock:
            return tuple(sorted({bucket for bucket, _ in self._graphs}))

    def __getstate__(self) -> dict[str, Any]:
        return {"enabled": self.enabled, "limit": self.limit}  # a copy of a model captures graphs of its own

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.__dict__.update(state)

    def run(
        self,
        forward: Forward,
        batch: PackedBatch,
        ids: tuple[Tensor, Tensor | None, Tensor],
        shape: Shape,
        state: Callable[[], Any],
    ) -> Tensor | None:
        """The last hidden state, (T, H), of a batch of 1 to LARGEST tokens; None where it must take the plain path.

        ids: words, segments (None: 0) and positions, each (T,). state: what the graphs depend on besides the shape;
        where it differs from the last time, they are dropped.
        """
        bucket = bucket_of(batch.n_tokens)
        if bucket is None or batch.batch_size > bucket:
            return None
        with self.lock:
            found = state()
            if shape != self._shape or found != self._state:
                if self._shape is not None:
                    self.clear()
                self._shape, self._state = shape, found
            if self._capturer is None:
                self._capturer = capturer(shape.device)
            key = bucket, _switches()
            missing = key not in self._graphs
            if self._failed or self._capturer is None or (missing and self.frozen):
                return None
            tiles = _tiles(batch, bucket, shape)
            if tiles is None:
                return None
            capacity = 1 << (bucket - 1).bit_length()
            buffers = self._buffers.get(capacity)
            if buffers is None:
                buffers = self._buffers[capacity] = self._make_buffers(capacity, shape)
            self._capturer.begin((buffers.integers, buffers.ids, buffers.out))
            try:
                if missing and not self._capture(forward, buffers, bucket, batch, shape):
                    return None
                _fill(buffers, bucket, tiles, batch, ids)
                self._graphs.move_to_end(key)
                self._graphs[key].replay()
                return buffers.out[: batch.n_tokens].clone()
            finally:
                self._capturer.end()

    @staticmethod
    def _make_buffers(capacity: int, shape: Shape) -> _Buffers:
        with torch.inference_mode(False):  # or nobody could write to them outside of inference mode
            return _Buffers(capacity, sum(_max_tiles(capacity, shape)), shape.hidden_size, shape.dtype, shape.device)

    def _capture(self, forward: Forward, buffers: _Buffers, bucket: int, batch: PackedBatch, shape: Shape) -> bool:
        """Captures the bucket's graph; False if it cannot be done."""
        capacity = buffers.out.shape[0]
        # A capture may run what it captures, at shapes whose views lie elsewhere: on no tiles and on ids that are 0.
        buffers.integers.zero_()
        buffers.ids.zero_()
        # An octave's largest graph comes first: the others then find its intermediate memory in the pool, where each
        # that is larger than those before it would else need new memory, and leave theirs to nobody.
        missing = [size for size in dict.fromkeys((capacity, bucket)) if (size, _switches()) not in self._graphs]
        try:
            for size in missing:
                self._graphs[size, _switches()] = self._capture_one(forward, buffers, size, batch, shape)
        except BackendError:  # a strict policy's, which the plain path would raise as well
            raise
        except RuntimeError as error:
            self._failed = True
            self._graphs.clear()
            logger.warning(
                "CUDA graphs: capturing one of %d tokens failed, so kernels are launched one by one from now on: %s",
                bucket, error,
            )  # fmt: skip
            return False
        while len(self._graphs) > self.limit:
            self._graphs.popitem(last=False)
        return True

    def _capture_one(
        self, forward: Forward, buffers: _Buffers, bucket: int, batch: PackedBatch, shape: Shape
    ) -> Replayable:
        global _captures
        assert self._capturer is not None
        n_tiles = _max_tiles(bucket, shape)
        work_lists, seq_ids, cu_seqlens = buffers.views(bucket, sum(n_tiles))
        work_list, *short_lists = work_lists.split(n_tiles)
        words, segments, positions = (row[:bucket] for row in buffers.ids)
        static = PackedBatch(
            cu_seqlens=cu_seqlens,
            cu_seqlens_cpu=batch.cu_seqlens_cpu,  # which the kernels never look at
            position_ids=positions,
            batch_size=bucket,
            padded_length=bucket,
        )
        plan = seq_ids, work_list, short_lists[0] if short_lists else None
        static = attention.with_plan(static, shape.dtype, shape.head_size, shape.policy, plan)

        def function() -> None:
            buffers.out[:bucket].copy_(forward(words, segments, positions, static))

        with _capturing:
            graph = self._capturer.capture(function)
            _captures += 1
        return graph


def _max_tiles(bucket: int, shape: Shape) -> list[int]:
    """The lengths of the bucket's static work lists: one, or two where short sequences have their own."""
    lengths = attention.max_tiles(bucket, shape.dtype, shape.head_size, shape.device, shape.policy)
    return [length for length in lengths if length is not None]


def _tiles(batch: PackedBatch, bucket: int, shape: Shape) -> Tensor | None:
    """The batch's work lists, each filled up to its static length, (W, 4) on the CPU; None where one is too long."""
    lists = attention.host_work_lists(batch, shape.dtype, shape.head_size, shape.policy)
    n_tiles = _max_tiles(bucket, shape)
    out, start = torch.zeros(sum(n_tiles), 4, dtype=torch.int32, device="cpu"), 0
    for tiles, length in zip([tiles for tiles in lists if tiles is not None], n_tiles, strict=True):
        if tiles.shape[0] > length:  # of neighbours that do not share tiles
            return None
        out[start : start + tiles.shape[0]] = tiles
        start += length
    return out


def _fill(
    buffers: _Buffers,
    bucket: int,
    tiles: Tensor,
    batch: PackedBatch,
    ids: tuple[Tensor, Tensor | None, Tensor],
) -> None:
    """Writes a batch where the bucket's graph reads it, on the current stream."""
    n_tokens, n_seqs, n_tiles = batch.n_tokens, batch.batch_size, tiles.shape[0]
    n_integers = 4 * n_tiles + bucket + n_seqs + 1
    integers = torch.zeros(n_integers, dtype=torch.int32, device="cpu", pin_memory=buffers.integers.is_cuda)
    offsets = batch.cu_seqlens_cpu.numpy()
    work_lists, seq_ids, cu_seqlens = np.split(integers.numpy(), [4 * n_tiles, 4 * n_tiles + bucket])
    work_lists[:] = tiles.numpy().ravel()
    seq_ids[:n_tokens] = np.repeat(np.arange(n_seqs, dtype=np.int32), np.diff(offsets))
    cu_seqlens[:] = offsets
    buffers.integers[:n_integers].copy_(integers, non_blocking=True)
    for row, values in zip(buffers.ids, ids, strict=True):
        if values is None:
            row[:bucket].zero_()
        else:
            row[:n_tokens].copy_(values)
    buffers.ids[:, n_tokens:bucket].zero_()


def _switches() -> tuple[Any, ...]:
    """PyTorch's switches that change which kernels run."""
    from fastbert_kernels import launch

    matmul = torch.backends.cuda.matmul
    return (
        launch.dot_precision(torch.float32),
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_reduced_precision_reduction,
    )


def plainly(
    forward: Callable[[Tensor, Tensor, Tensor, PackedBatch], Any],
    batch: PackedBatch,
    ids: tuple[Tensor, Tensor | None, Tensor],
    shape: Shape,
) -> Any:
    """`forward` on the rows of the batch's bucket, as a graph would run it; the rows of padding are still there."""
    bucket = bucket_of(batch.n_tokens)
    assert bucket is not None
    words, segments, positions = (torch.zeros(bucket, dtype=torch.int64, device=shape.device) for _ in range(3))
    for row, values in zip((words, segments, positions), ids, strict=True):
        if values is not None:
            row[: batch.n_tokens].copy_(values)
    padded = attention.in_more_rows(batch, positions, shape.dtype, shape.head_size, shape.policy)
    return forward(words, segments, positions, padded)


def observed(device: torch.device) -> str | None:
    """Why the operations must run one by one: somebody watches them (`tracing.observed`), or captures a graph."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "another CUDA graph is being captured"
    return tracing.observed()
