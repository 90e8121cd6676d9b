"""This module holds three arithmetics of an encoder: by modules, in one C++ call, and in one 8-bit C++ call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastbert import ops
from fastbert.engine import cpu_encoder, quantized
from fastbert.engine.block import feature_obstacles
from fastbert.engine.cpu_encoder import CpuEncoder
from fastbert.engine.interface import PackedInputs
from fastbert.engine.launched import LaunchedLayers
from fastbert.engine.state import GRADIENTS, EncoderState, first_parameter
from fastbert.ops import tracing
from fastbert.ops.packing import PackedBatch
from fastbert.ops.tracing import untraced
from fastbert_kernels import cpu

# What layers may have beyond BERT's in the C++ kernels.
FEATURES = frozenset(("pre_norm", "gate", "rotary", "position_bias", "window", "scale", "distances", "convolution"))


class Modules:
    """This arithmetic calls the modules of the model, one operation after the other. It runs every model.

    If the result is the same, it launches the layers' kernels without a call of their modules.
    """

    name = "operation by operation"

    def __init__(self) -> None:
        self.launched = LaunchedLayers()

    def obstacles(self, model: Any, n_tokens: int | None, keep_states: bool, embedded: bool) -> Iterator[str]:
        return iter(())

    def prepare(self, model: Any) -> None:
        """Does nothing: each operation makes its derived tensors when it first runs."""

    def run(self, model: Any, batch: PackedBatch, inputs: PackedInputs, keep_states: bool) -> list[Tensor]:
        if batch.valid is None:
            ops.prepare_attention(batch, model.dtype, model.config.head_size, model.policy)
        if batch.valid is not None or torch.compiler.is_compiling():
            return model.run_layers(model.embed(inputs, batch), batch, keep_states)
        try:
            x = model.embed(inputs, batch)
            states = self.launched.run(model, x, batch, keep_states)
            return model.run_layers(x, batch, keep_states) if states is None else states
        except RuntimeError as error:
            model.blame_dtypes(error)
            raise


class _InOneCall:
    """This is the base of the two C++ encoders, which read packed weights instead of calling the modules of a model."""

    int8: bool

    def __init__(self, state: EncoderState, encoder: CpuEncoder) -> None:
        self.state, self.encoder = state, encoder

    def unseen_obstacles(self, model: Any, device: torch.device) -> Iterator[str]:
        """Yields every reason why one call would give another visible result than the modules."""
        if torch.is_autocast_enabled("cpu"):
            yield "autocast is on"
        state, plain = self.state, True
        for obstacle in state.obstacles(model, device):
            plain = False
            yield obstacle
        if not plain:
            return
        if not state.plain_parameters():
            yield "a parameter is not a plain tensor"
        features = state.layer_features(model) if state.features is None else state.features
        if features and not FEATURES.issuperset(features):
            yield from feature_obstacles(features, FEATURES, "the C++ encoder")
        activation = self.state.beside
        if activation is not None and activation not in cpu.ACTIVATIONS:
            yield f"there is no C++ kernel for {activation!r}, the activation of a layer's convolution"

    def prepare(self, model: Any) -> None:
        if self.state.plain_modules(model):
            self.weights(model)

    def weights(self, model: Any) -> Any:
        """Returns the weights packed for the C++ kernels, packed again after a change; None if that is impossible.

        The embeddings are among them unless the model projects them.
        """
        snapshot = self.state.snapshot
        assert snapshot is not None
        if self.state.features is None:
            self.state.layer_features(model)
        state = snapshot.state()
        n_silent_writes = snapshot.silent_writes(state)
        int8 = self.int8

        def renewed() -> Any:
            snapshot.derived_addresses()  # which is a change, too
            return int8, state, n_silent_writes, snapshot.changes()

        def pack() -> Any:
            tables = None if self.state.projects else model.tables(None)[1]
            return cpu_encoder.pack_encoder(tables, list(model.blocks()), model.config, int8)

        return self.encoder.weights((int8, state, n_silent_writes, snapshot.changes()), renewed, pack)


class OneCall(_InOneCall):
    """This arithmetic runs the whole encoder in one call of a C++ kernel, on CPUs, for inference."""

    name = "one C++ call"
    int8 = False

    def obstacles(self, model: Any, n_tokens: int | None, keep_states: bool, embedded: bool) -> Iterator[str]:
        parameter = first_parameter(model)
        dtype, device, config = parameter.dtype, parameter.device, model.config
        possible = True
        for obstacle in cpu_encoder.obstacles(config, dtype, model.policy, device):
            possible = False
            yield obstacle
        if not possible:
            return
        if keep_states:
            yield "the call requests the hidden states of all layers"
        if embedded:
            yield "the inputs are embeddings"
        choosy = not model.policy.batch_invariant  # that takes the same code for any number of rows
        if choosy and n_tokens is not None and not cpu_encoder.takes_rows(n_tokens, dtype, config.hidden_size):
            yield f"{n_tokens} tokens run faster operation by operation"
        if model.precision is not None:
            decision = quantized.decide(model, model.policy, device, dtype)
            if decision.backend != quantized.UNQUANTISED:
                yield f"precision={model.precision!r}"
        if torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters()):
            yield GRADIENTS
        yield from self.unseen_obstacles(model, device)

    def run(self, model: Any, batch: PackedBatch, inputs: PackedInputs, keep_states: bool) -> list[Tensor] | None:
        try:
            weights = self.weights(model)
        except RuntimeError as error:
            model.blame_dtypes(error)
            raise
        if weights is None:
            return None
        x = model.embed(inputs, batch) if self.state.projects else None
        return [self.encoder.run(weights, batch, inputs, x)]


class Int8Call(_InOneCall):
    """This arithmetic runs the encoder in one C++ call with 8-bit operands, on CPUs, for precision="int8"."""

    name = "one C++ call in int8"
    int8 = True

    def obstacles(self, model: Any, n_tokens: int | None, keep_states: bool, embedded: bool) -> Iterator[str]:
        if model.precision is None:
            yield "no precision is set"
            return
        decision = quantized.decide(model, model.policy, model.device, model.dtype)
        if decision.backend == quantized.UNQUANTISED:
            yield str(decision.reason)
        elif decision.backend != "cpu":
            yield f"the backend is {decision.backend!r}"

    def kernel_obstacles(self, model: Any, device: torch.device, dtype: torch.dtype) -> Iterator[str]:
        """Yields every reason why the 8-bit C++ kernels do not run the encoder on this device, in this dtype."""
        if torch.compiler.is_compiling():
            yield str(tracing.observed())
            return
        possible = True
        for obstacle in cpu_encoder.int8_obstacles(model.config, dtype):
            possible = False
            yield obstacle
        if not possible or model.device != device or model.dtype != dtype:
            return
        for obstacle in self.unseen_obstacles(model, device):
            possible = False
            yield obstacle
        if possible and self.weights(model) is None:
            yield "the parameters have several dtypes or are not contiguous, or the LayerNorms differ in eps"

    @untraced
    def run(self, model: Any, batch: PackedBatch, inputs: PackedInputs, keep_states: bool) -> list[Tensor]:
        quantized.refuse_gradients(model, inputs.inputs_embeds)
        embeds = inputs.input_ids is None or self.state.projects
        x = model.embed(inputs, batch) if embeds else None
        return self.encoder.run_int8(self.weights(model), batch, inputs, x, model.dtype, keep_states)
