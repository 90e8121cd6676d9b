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

import torch
from torch import Tensor

from fastbert.engine import capture
from fastbert.engine.buckets import bucket_of
from fastbert.engine.capture import Capturer, Replayable
from fastbert.engine.events import count_capture
from fastbert.engine.interface import PackedInputs
from fastbert.ops import BackendError, Policy, attention_plan
from fastbert.ops.packing import PackedBatch

logger = logging.getLogger("fastbert")

MAX_GRAPHS = 128


class _Buffers:
    """The static memory of the buckets of one octave, up to `capacity` rows."""

    def __init__(
        self, capacity: int, n_integers: int, hidden_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.integers = torch.zeros(n_integers, dtype=torch.int32, device=device)  # attention's, as StaticPlan says
        self.ids = torch.zeros(3, capacity, dtype=torch.int64, device=device)  # input_ids, token_type_ids, position_ids
        self.out = torch.zeros(capacity, hidden_size, dtype=dtype, device=device)


@dataclass(frozen=True)
class Shape:
    """The properties that all graphs of a model share."""

    device: torch.device
    dtype: torch.dtype
    hidden_size: int
    head_size: int
    policy: Policy


# (inputs, batch) -> the last hidden state, (rows, H)
Forward = Callable[[PackedInputs, PackedBatch], Tensor]


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
        inputs: PackedInputs,
        shape: Shape,
        state: Callable[[], Any],
    ) -> Tensor | None:
        """The last hidden state, (T, H), of a batch of 1 to LARGEST tokens; None where it must take the plain path.

        inputs: ids, each (T,). state: what the graphs depend on besides the shape;
        where it differs from the last time, they are dropped.
        """
        bucket = bucket_of(batch.n_tokens)
        if bucket is None or batch.batch_size > bucket:
            return None
        with self.lock:
            current = state()
            if shape != self._shape or current != self._state:
                if self._shape is not None:
                    self.clear()
                self._shape, self._state = shape, current
            if self._capturer is None:
                self._capturer = capture.capturer(shape.device)
            key = bucket, _switches()
            missing = key not in self._graphs
            if self._failed or self._capturer is None or (missing and self.frozen):
                return None
            integers = _integers(batch, bucket, shape)
            if integers is None:
                return None
            capacity = 1 << (bucket - 1).bit_length()
            buffers = self._buffers.get(capacity)
            if buffers is None:
                buffers = self._buffers[capacity] = self._make_buffers(capacity, shape)
            self._capturer.begin((buffers.integers, buffers.ids, buffers.out))
            try:
                if missing and not self._capture(forward, buffers, bucket, batch, shape):
                    return None
                _fill(buffers, bucket, integers, batch, inputs)
                self._graphs.move_to_end(key)
                self._graphs[key].replay()
                return buffers.out[: batch.n_tokens].clone()
            finally:
                self._capturer.end()

    @staticmethod
    def _make_buffers(capacity: int, shape: Shape) -> _Buffers:
        with torch.inference_mode(False):  # or nobody could write to them outside of inference mode
            n_integers = _static_plan(capacity, shape).n_integers
            return _Buffers(capacity, n_integers, shape.hidden_size, shape.dtype, shape.device)

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
        assert self._capturer is not None
        cu_seqlens, plan = _static_plan(bucket, shape).split(buffers.integers)
        inputs = PackedInputs(*(row[:bucket] for row in buffers.ids))
        static = PackedBatch(
            cu_seqlens=cu_seqlens,
            cu_seqlens_cpu=batch.cu_seqlens_cpu,  # which the kernels never look at
            position_ids=inputs.position_ids,
            batch_size=bucket,
            padded_length=bucket,
        )
        static = attention_plan.with_plan(static, shape.dtype, shape.head_size, shape.policy, plan)

        def function() -> None:
            buffers.out[:bucket].copy_(forward(inputs, static))

        capturer = self._capturer
        return count_capture(lambda: capturer.capture(function))


def _static_plan(bucket: int, shape: Shape) -> attention_plan.StaticPlan:
    return attention_plan.StaticPlan(bucket, shape.dtype, shape.head_size, shape.device, shape.policy)


def _integers(batch: PackedBatch, bucket: int, shape: Shape) -> Tensor | None:
    """The integers of attention for the bucket, in memory of the host that a GPU reads; None where they do not fit."""
    plan = _static_plan(bucket, shape)
    pinned = shape.device.type == "cuda"
    integers = torch.zeros(plan.n_integers, dtype=torch.int32, device="cpu", pin_memory=pinned)
    return integers if plan.write(batch, integers.numpy()) else None


def _fill(
    buffers: _Buffers,
    bucket: int,
    integers: Tensor,
    batch: PackedBatch,
    inputs: PackedInputs,
) -> None:
    """Writes a batch where the bucket's graph reads it, on the current stream."""
    n_tokens = batch.n_tokens
    buffers.integers[: integers.shape[0]].copy_(integers, non_blocking=True)
    for row, values in zip(buffers.ids, inputs[:3], strict=True):
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
