"""The engine of a model decides how each batch runs, and is the only interface between the model and the arithmetics.

It makes two choices for a batch. The arithmetic computes the hidden states: operation by operation, in 8 bits, or in
one call of a C++ kernel. The launch runs the arithmetic: in the rows of the tokens, in more rows, or as a CUDA graph.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastbert import ops
from fastbert.engine import capture, cpu_encoder, masks, quantized
from fastbert.engine.arithmetic import Int8Call, Modules, OneCall
from fastbert.engine.buckets import BUCKETS, LARGEST, bucket_of
from fastbert.engine.cpu_encoder import CpuEncoder
from fastbert.engine.graph_key import GraphKey
from fastbert.engine.graphs import Graphs
from fastbert.engine.interface import Arithmetic, EncoderModel, PackedInputs
from fastbert.engine.late_checks import LateChecks
from fastbert.engine.listeners import observer_obstacle
from fastbert.engine.quantized import UNQUANTISED, EightBit
from fastbert.engine.rows import as_int64, in_bucket_rows, on_device
from fastbert.engine.state import GRADIENTS, TRAINING, EncoderState, first_parameter
from fastbert.engine.static_memory import Shape
from fastbert.engine.training import Training
from fastbert.ops import attention, dispatch, noting, packing, silent_writes, tracing
from fastbert.ops.packing import PackedBatch


class Engine:
    """An `Engine` runs one model's encoder, and keeps the state for this. The model is an argument of each call.

    state: the last seen state of the model's modules and weights. graphs: its CUDA graphs. eight_bit, cpu_encoder: the
    derived weights for these two. checks: the results of kernels' checks of earlier batches.
    """

    def __init__(self) -> None:
        self.state = EncoderState()
        self.graphs = Graphs()
        self.cpu_encoder = CpuEncoder()
        self.eight_bit = EightBit()
        self.one_call = OneCall(self.state, self.cpu_encoder)
        self.int8_call = Int8Call(self.state, self.cpu_encoder)
        self.modules = Modules()
        self.training = Training(self.state)
        self.checks = LateChecks()
        self._graph_key = GraphKey(self.state, self.eight_bit.weights)

    def __getstate__(self) -> dict[str, Any]:
        return {"graphs": self.graphs, "strict": self.checks.strict}  # a copy derives and captures for itself

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.graphs, self.checks.strict = state["graphs"], state["strict"]

    # Running

    def run(
        self,
        model: EncoderModel,
        batch: PackedBatch,
        inputs: PackedInputs,
        keep_states: bool = False,
        check: bool = True,
    ) -> list[Tensor]:
        """Runs the encoder on a packed batch.

        Returns the last hidden state (T, H) as a list, or all L + 1 of them. check: whether ids on the device must be
        compared with their tables. A precision that cannot run is logged once, or raises BackendError under a strict
        policy. An error of an earlier batch is also raised here.
        """
        if torch.compiler.is_compiling():
            return self._run_checked(model, batch, inputs, keep_states, None, check, compiling=True)
        if self.checks.active:
            self.settle(model)
        if self.graphs.trusted and not keep_states and inputs.input_ids is not None and self.unwatched(model):
            noted = self.graphs.notes
            if check and not noted:
                self._check_and_wait(model, batch, inputs)
            check, number = check and noted, self.checks.next_number() if noted else 0
            last = self.graphs.replay(batch, inputs, number, functools.partial(self._graph_key.unchanged, model))
            if last is not None:
                return [last]
        if not noting.possible_on(batch.device) or not self.defers(model):
            return self._run_checked(model, batch, inputs, keep_states, None, check)
        notes = self.checks.notes(batch.device, self.checks.next_number())
        with noting.noting(notes):
            return self._run_checked(model, batch, inputs, keep_states, notes, False)

    def _run_checked(
        self,
        model: EncoderModel,
        batch: PackedBatch,
        inputs: PackedInputs,
        keep_states: bool,
        notes: Any,
        check: bool,
        compiling: bool = False,
    ) -> list[Tensor]:
        """Chooses the arithmetic and the launch. notes: the memory for the results of kernels' checks, or None."""
        if check and batch.mask is None:
            self._check_and_wait(model, batch, inputs)
        embedded, n_tokens = inputs.input_ids is None, batch.n_tokens
        if not embedded and not compiling and bucket_of(n_tokens) is not None:
            possible = capture.capturer(batch.device) is not None and (batch.mask is None or notes is not None)
            if possible and next(self._state_obstacles(model, batch.device), None) is None:
                return self._run_in_bucket(model, batch, inputs, keep_states, notes)
        if batch.mask is not None:
            return self._run_checked(model, batch, masks.wait(batch, inputs), keep_states, notes, check)
        inputs = as_int64(model, batch, inputs)
        arithmetic = self.choose_arithmetic(model, n_tokens, keep_states, embedded)
        if arithmetic in (self.modules, self.eight_bit) and not silent_writes.waits(model.device):
            self._renew_written(model)  # before an operation has run on old weights; one call looks by itself
        states = None if arithmetic is self.modules else arithmetic.run(model, batch, inputs, keep_states)
        if states is None:
            states = self._run_in_packed_rows(model, batch, inputs, keep_states)
        if notes is not None:
            self._look(model, notes)
        return states

    def run_traced(
        self, model: EncoderModel, batch: PackedBatch, inputs: PackedInputs, keep_states: bool, transformed: str
    ) -> list[Tensor]:
        """Runs the encoder on all B * S rows of a `packing.in_place` batch, whose values may not be read.

        transformed: the name of the tracer or transform; because of it, the encoder runs in the model's dtype.
        """
        if model.precision is not None:
            quantized.choose(model, transformed)  # which logs that, or raises
        return self.modules.run(model, batch, as_int64(model, batch, inputs), keep_states)

    # The arithmetic

    def choose_arithmetic(
        self, model: EncoderModel, n_tokens: int | None = None, keep_states: bool = False, embedded: bool = False
    ) -> Arithmetic:
        """Chooses the arithmetic of a batch; n_tokens is None for a batch of any size."""
        if model.precision is not None:
            backend = quantized.choose(model)
            if backend == "cpu":
                return self.int8_call
            if backend != UNQUANTISED:
                return self.eight_bit
        if torch.compiler.is_compiling():
            return self.modules
        asked = n_tokens, keep_states, embedded
        may_train = torch.is_grad_enabled() or model.training
        if may_train and next(self.training.obstacles(model, *asked), None) is None:
            return self.training
        if next(self.one_call.obstacles(model, *asked), None) is None:
            return self.one_call
        return self.modules

    def one_call_obstacles(
        self, model: EncoderModel, policy: ops.Policy, device: torch.device, dtype: torch.dtype
    ) -> Iterator[str]:
        """Yields every reason why the encoder does not run in one call of a C++ kernel, under these settings."""
        obstacles = list(cpu_encoder.obstacles(model.config, dtype, policy, device))
        yield from obstacles
        if not obstacles and model.device == device and model.dtype == dtype:
            yield from self.one_call.obstacles(model, None, False, False)

    def arithmetic_obstacles(self, model: EncoderModel, n_tokens: int | None = None) -> dict[str, list[str]]:
        """Returns every arithmetic by name, in the order of preference, with every reason why it would not run."""
        preferred: tuple[Arithmetic, ...] = self.int8_call, self.eight_bit, self.training, self.one_call, self.modules
        return {each.name: list(each.obstacles(model, n_tokens, False, False)) for each in preferred}

    # The launch

    def bucket_obstacles(self, model: EncoderModel) -> Iterator[str]:
        """Yields every reason why no batch runs in the rows of a bucket at present, with or without a CUDA graph."""
        device = model.device
        if capture.capturer(device) is None:
            yield f"there are no CUDA graphs on {device}"
        else:
            yield from self._state_obstacles(model, device)

    def _state_obstacles(self, model: EncoderModel, device: torch.device) -> Iterator[str]:
        """Yields the obstacles on a device with CUDA graphs."""
        if torch.is_grad_enabled():
            yield GRADIENTS
        if model.training:
            yield TRAINING
        yield from self.state.obstacles(model, device)
        obstacle = attention.triton_obstacle(model.config.head_size, torch.empty(0, dtype=model.dtype, device=device))
        decision = dispatch.decide("attention", model.policy, device, obstacle)
        if decision.backend != "triton":
            yield f"the backend of attention is {decision.backend!r}"

    def graph_obstacles(self, model: EncoderModel, device: torch.device | None = None) -> Iterator[str]:
        """Yields every reason why no batch runs as a CUDA graph; for another device than the model's, some of them."""
        if device is None or device == model.device:
            yield from self.bucket_obstacles(model)
        elif model.training:
            yield TRAINING
        if not self.graphs.enabled:
            yield "the model's cuda_graphs is False"

    def rows_of(self, model: EncoderModel, n_tokens: int) -> int:
        """Returns the number of rows that the encoder computes for a number of tokens, with rows of padding."""
        if self.packs_weights(model):
            return ops.packed_linear.rows_for(n_tokens, model.dtype)
        if model.device.type == "cuda" and next(self.bucket_obstacles(model), None) is None:
            return bucket_of(n_tokens) or n_tokens
        return n_tokens

    def packs_weights(self, model: EncoderModel) -> bool:
        """Tells whether linears have packed weights, and computing rows of padding has no visible effect."""
        if model.device.type != "cpu" or torch.is_grad_enabled() or tracing.observed() is not None:
            return False
        decision = dispatch.decide("linear", model.policy, model.device, None)
        usable = decision.backend == "cpu" and ops.packed_linear.packing_obstacle(model.dtype) is None
        return usable and self.state.plain_modules(model) and self.state.plain_parameters()

    def _run_in_packed_rows(
        self, model: EncoderModel, batch: PackedBatch, inputs: PackedInputs, keep_states: bool
    ) -> list[Tensor]:
        """Runs operation by operation, in the number of rows that oneDNN's packed linears need."""
        n_tokens = n_rows = batch.n_tokens
        if not model.policy.batch_invariant and self.packs_weights(model):  # which takes no oneDNN
            n_rows = ops.packed_linear.rows_for(n_tokens, model.dtype)
        if n_rows == n_tokens:
            return self.modules.run(model, batch, inputs, keep_states)
        inputs = PackedInputs(*(packing.pad_rows(x, n_rows) for x in inputs))
        batch = batch.in_rows(inputs.position_ids, {})
        return [state[:n_tokens] for state in self.modules.run(model, batch, inputs, keep_states)]

    def _run_in_bucket(
        self, model: EncoderModel, batch: PackedBatch, inputs: PackedInputs, keep_states: bool, notes: Any
    ) -> list[Tensor]:
        """Runs in the rows of the batch's bucket: as a CUDA graph, or with the same kernels launched one by one."""
        shape = self._shape(model, batch.device, notes is not None)
        if self.graphs.enabled and not keep_states:

            def encode_last(inputs: PackedInputs, static: PackedBatch, of_batch: Tensor) -> Tensor:
                in_graph = None if notes is None else self.checks.notes(batch.device, 0, of_batch)
                with noting.noting(in_graph):
                    last = self.operations(model).run(model, static, inputs, False)[-1]
                self._look(model, in_graph)
                return last

            key = functools.partial(self.graph_key, model)
            held = functools.partial(self._held, model)
            number = 0 if notes is None else notes.number
            last = self.graphs.run(encode_last, batch, inputs, shape, key, held, number)
            if last is not None:  # None where it does not fit
                return [last]
        n_tokens = batch.n_tokens
        inputs, batch = in_bucket_rows(batch, on_device(batch, inputs), shape)
        states = [state[:n_tokens] for state in self.operations(model).run(model, batch, inputs, keep_states)]
        self._look(model, notes)
        return states

    @staticmethod
    def _shape(model: EncoderModel, device: torch.device, notes: bool) -> Shape:
        config, distances = model.config, model.counts_distances
        return Shape(device, model.dtype, config.hidden_size, config.head_size, model.policy, notes, distances)

    def _held(self, model: EncoderModel) -> list[Tensor]:
        """Returns the tensors that a graph of the model's kernels reads, so that they live as long as the graph."""
        parts = [model.embeddings, model.encoder]
        parameters = [p for part in parts for p in part.parameters() if p.layout == torch.strided]
        snapshot = self.state.snapshot
        assert snapshot is not None
        return [*(p.detach() for p in parameters), *snapshot.derived_tensors(), *self.eight_bit.weights.tensors()]

    # What is looked at while the GPU works, or by its kernels

    def unwatched(self, model: EncoderModel) -> bool:
        """Tells whether no gradients are needed and no mode observes the operations, so that a graph may run."""
        if torch.is_grad_enabled() or model.training:
            return False
        shape = self.graphs.shape
        return shape is not None and observer_obstacle(shape.device) is None

    def defers(self, model: EncoderModel) -> bool:
        """Tells whether kernels check ids and weights, so that no call waits for a check."""
        if self.checks.strict or torch.is_grad_enabled() or model.training:
            return False
        device = first_parameter(model).device
        return noting.possible_on(device) and observer_obstacle(device) is None and model.kernels_note_ids()

    def _check_and_wait(self, model: EncoderModel, batch: PackedBatch, inputs: PackedInputs) -> None:
        """Checks ids on the device, and weights, now. On a GPU the host waits for it."""
        model.check_ids_on_device(batch, inputs)
        self.follow_weights(model)

    def settle(self, model: EncoderModel) -> None:
        """Raises the known errors of earlier batches, and updates derived tensors after a write to weights."""
        self.checks.settle(self.state.snapshot, model.table_sizes, self._renew_late)

    def _renew_late(self) -> None:
        """Makes the derived tensors again after a write to the weights."""
        self.graphs.trusted = False
        if self.state.snapshot is not None:
            self.state.snapshot.renew_late()
        self.eight_bit.weights.invalidate()

    def _look(self, model: EncoderModel, notes: Any) -> None:
        """Launches a check of the weights, unless they were already checked with a wait."""
        if notes is not None:
            self.state.plain_modules(model)  # which sees to the snapshot
            assert self.state.snapshot is not None
            self.state.snapshot.late_samples().look(notes)

    def operations(self, model: EncoderModel) -> EightBit | Modules:
        """Returns the arithmetic whose kernels a graph can launch: in 8 bits, or module by module."""
        in_8_bits = model.precision is not None and quantized.choose(model) != UNQUANTISED
        return self.eight_bit if in_8_bits else self.modules

    # What is kept

    def prepare(self, model: EncoderModel, max_tokens: int) -> tuple[tuple[int, ...], list[str]]:
        """Prepares for batches of up to max_tokens: makes derived tensors, compiles kernels, captures CUDA graphs.

        Returns the buckets with a graph, and every reason if there is none.
        """
        obstacles = list(self.graph_obstacles(model))
        self.choose_arithmetic(model).prepare(model)
        if obstacles:
            for size in (BUCKETS[0], LARGEST)[: 2 if model.device.type == "cuda" else 1]:  # each has tiles of its own
                model.run_padding(min(max_tokens, size))
        else:
            self.graphs.thaw()
            largest = bucket_of(min(max_tokens, LARGEST))
            for bucket in (size for size in reversed(BUCKETS) if largest is not None and size <= largest):
                model.run_padding(bucket)  # the largest first: the others then find its memory in the pool
            self.graphs.freeze()
            if not self.graphs.captured():
                obstacles = ["a capture failed; the log has the reason"]
        if model.device.type == "cuda" and max_tokens > LARGEST:
            model.run_padding(max_tokens)
        return self.graphs.captured() if not obstacles else (), obstacles

    def graph_key(self, model: EncoderModel) -> Any:
        """Returns the state that a CUDA graph depends on: see `GraphKey.now`."""
        return self._graph_key.now(model, self._eight_bit_addresses)

    def _eight_bit_addresses(self, model: EncoderModel) -> Any:
        """Returns the addresses of the current 8-bit weights; None if the model runs without them."""
        return self.eight_bit.addresses(model) if self.operations(model) is self.eight_bit else None

    def follow_weights(self, model: EncoderModel) -> None:
        """Updates derived tensors if weights were written to without PyTorch's count.

        On a GPU this waits for the device, so callers with many batches call it once. On a CPU `run` checks weights.
        """
        if silent_writes.waits(model.device) and not self.defers(model):
            self._renew_written(model)

    def _renew_written(self, model: EncoderModel) -> None:
        if self.state.written_silently(model):
            self.eight_bit.weights.invalidate()

    def set_training(self, training: bool) -> None:
        """Drops the tensors kept for the other mode, and in eval mode checks the weights again."""
        self.cpu_encoder.clear()
        self.graphs.trusted = False
        if training:
            self.eight_bit.weights.clear()
            self.modules.launched.clear()
            self.graphs.clear()
        else:
            self.eight_bit.weights.invalidate()
