"""This module runs a whole encoder in one call of the C++ kernels."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fastbert_kernels.cpu import library
from fastbert_kernels.cpu.int8 import Int8Weight
from fastbert_kernels.cpu.operations import ACTIVATIONS

MAX_HIDDEN = 4096
ROWS_BESIDE = 256  # of convolution.h


class EncoderTables(NamedTuple):
    """`EncoderTables` hold the embeddings of an encoder in the order in which the C++ kernel reads them."""

    words: torch.Tensor
    token_types: torch.Tensor | None  # None for an encoder without token types.
    positions: torch.Tensor | None  # None for one whose embeddings have no positions.
    norm_weight: torch.Tensor
    norm_bias: torch.Tensor


class LayerTraits(NamedTuple):
    """`LayerTraits` are the features of a layer beyond its weights, in the order in which the C++ kernels read them."""

    position_bias: torch.Tensor | None = None  # The table of a `PositionBias`; for a window it is `window_bias`.
    window: int = -1  # The number of tokens that attention reaches on either side; -1 for all.
    angles: int = -1  # The number of its tables of cosines and sines for the rotation; -1 for none.
    pre_norm: bool = False  # Whether the norms are on the input of each part.
    distance_keys: torch.Tensor | None = None  # Of disentangled attention, (2R, H), contiguous; None without the term.
    distance_queries: torch.Tensor | None = None

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Returns the tensors that have the dtype of the model."""
        return [tensor for tensor in (self.distance_keys, self.distance_queries) if tensor is not None]

    @property
    def pointers(self) -> tuple[int | None, ...]:
        """Returns addresses and numbers."""
        table = self.position_bias
        radius = 0 if table is None else table.shape[1] // 2
        apart = map(library.address, (self.distance_keys, self.distance_queries))
        return library.address(table), radius, self.window, self.angles, int(self.pre_norm), *apart


class EncoderConvolution(NamedTuple):
    """An `EncoderConvolution` is beside the first layer: LayerNorm(y + activation(convolution of the input))."""

    weight: torch.Tensor  # (H, size * H), packed: in the dtype of the model, and for 8-bit encoders in float32.
    bias: torch.Tensor  # (H,) in the same dtype.
    norm_weight: torch.Tensor
    norm_bias: torch.Tensor
    size: int  # Columns, an odd number.
    activation: str


class _Common(ctypes.Structure):
    """The `Common` of encoder.h."""

    _fields_ = (
        ("scale", ctypes.c_float), ("rows_of", ctypes.c_void_p), ("radius", ctypes.c_int64),
        ("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("norm_weight", ctypes.c_void_p),
        ("norm_bias", ctypes.c_void_p), ("size", ctypes.c_int64), ("activation", ctypes.c_int64),
    )  # fmt: skip


class EncoderLayer(NamedTuple):
    """An `EncoderLayer` is a layer in the order in which the C++ kernel reads it. None stands for a missing part."""

    qkv: torch.Tensor  # A packed weight, as are out, up, down and gate.
    qkv_bias: torch.Tensor | None
    out: torch.Tensor
    out_bias: torch.Tensor | None
    attention_norm_weight: torch.Tensor | None
    attention_norm_bias: torch.Tensor | None
    up: torch.Tensor
    up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None
    output_norm_weight: torch.Tensor
    output_norm_bias: torch.Tensor
    gate: torch.Tensor | None = None  # The factor of the activation.
    gate_bias: torch.Tensor | None = None
    last_norm_weight: torch.Tensor | None = None  # Of the layer's output.
    last_norm_bias: torch.Tensor | None = None
    traits: LayerTraits = LayerTraits()

    @property
    def pointers(self) -> tuple[int | None, ...]:
        """Returns the values that the kernel reads, in order."""
        *tensors, traits = self
        return *map(library.address, tensors), *traits.pointers


class Int8EncoderLayer(NamedTuple):
    """An `Int8EncoderLayer` is a layer in the order in which the 8-bit C++ kernel reads it."""

    qkv: Int8Weight  # Rotated, as are out, up and gate.
    out: Int8Weight
    attention_norm_weight: torch.Tensor | None
    attention_norm_bias: torch.Tensor | None
    up: Int8Weight
    down: Int8Weight
    output_norm_weight: torch.Tensor
    output_norm_bias: torch.Tensor
    gate: Int8Weight | None = None
    last_norm_weight: torch.Tensor | None = None
    last_norm_bias: torch.Tensor | None = None
    traits: LayerTraits = LayerTraits()

    @property
    def pointers(self) -> tuple[int | None, ...]:
        """Returns the values that the kernel reads, in order."""
        tensors: list[torch.Tensor | None] = []
        for name, item in zip(self._fields, self[:-1], strict=False):
            if isinstance(item, Int8Weight):
                tensors += item.packed, item.columns
            else:
                tensors += (None, None) if name == "gate" else (item,)
        return *map(library.address, tensors), *self.traits.pointers


def _array(pointers: list[int | None]) -> Any:
    return (ctypes.c_void_p * len(pointers))(*pointers)


@dataclass(frozen=True)
class _Encoder:
    """An `_Encoder` holds the weights and sizes of an encoder, and their addresses."""

    embeddings: EncoderTables | tuple[()]  # () if the caller computes the embeddings.
    layers: tuple[Any, ...]  # EncoderLayers or Int8EncoderLayers. All tensors are contiguous.
    hidden_size: int
    intermediate_size: int
    num_heads: int
    activation: str
    eps: float
    angles: tuple[tuple[float, float], ...] = ()  # The base and the factor of each of the layers' rotation angles.
    scale: float = 0.0  # Of attention's scores, 0 for 1 / sqrt(D).
    rows_of: torch.Tensor | None = None  # (2M + 1,) int32: that of `disentangled_attention_forward`, for all layers.
    convolution: EncoderConvolution | None = None  # Beside the first layer.

    @functools.cached_property
    def addresses(self) -> tuple[Any, ...]:
        """Returns the addresses of the embeddings, of the layers' tensors one after the other, and of the rest."""
        arrays = [*map(library.address, self.embeddings)], [p for layer in self.layers for p in layer.pointers]
        rows_of, convolution = self.rows_of, self.convolution
        common = _Common(self.scale, library.address(rows_of), 0 if rows_of is None else rows_of.shape[0] // 2)
        if convolution is not None:
            *tensors, common.size, activation = convolution
            common.weight, common.bias, common.norm_weight, common.norm_bias = map(library.address, tensors)
            common.activation = ACTIVATIONS[activation]
        return *map(_array, arrays), ctypes.pointer(common)

    @functools.cached_property
    def settings(self) -> tuple[Any, ...]:
        """Returns the arguments after the number of rows in a call of the kernel."""
        sizes = self.hidden_size, self.intermediate_size, self.num_heads, len(self.layers)
        return *sizes, ACTIVATIONS[self.activation], self.eps


@dataclass(frozen=True)
class Encoder(_Encoder):
    """An `Encoder` holds weights of one dtype that `multiplies`, in the form that `encoder_forward` reads.

    hidden_size is at most MAX_HIDDEN, and the head size is a multiple of 16.
    """

    @functools.cached_property
    def dtype(self) -> torch.dtype:
        """Returns the dtype of the weights."""
        return self.layers[0].qkv.dtype

    def workspace_size(self, n_tokens: int) -> int:
        """Counts the elements that `encoder_forward` needs in addition to its output."""
        size, convolution = n_tokens * (5 * self.hidden_size + self.intermediate_size), self.convolution
        if convolution is None:
            return size
        room = min(n_tokens, ROWS_BESIDE) * convolution.size * self.hidden_size
        return n_tokens * self.hidden_size + max(size, room)


def encoder_forward(
    encoder: Encoder,
    ids: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor] | None,
    x: torch.Tensor,
    cu_seqlens_cpu: torch.Tensor,
    workspace: torch.Tensor,
    columns: torch.Tensor | None = None,
    angles: Sequence[torch.Tensor] = (),
) -> torch.Tensor:
    """Runs embeddings and layers over packed tokens, writes the result to x, (T, H), and returns x.

    ids: input ids, token type ids (or None) and position ids, (T,) int64, contiguous and within their tables. None if x
    holds the embeddings. cu_seqlens_cpu: (B + 1,) int32. columns: those of a `PositionBias`; disentangled attention and
    the convolution use them as well. workspace: as many elements as workspace_size says, of x's dtype. angles: the
    cosines and the sines of the rows for each of encoder.angles, (T, D / 2) float32, contiguous.
    """
    embeddings, layers, common = encoder.addresses
    offsets, n_rows = cu_seqlens_cpu.contiguous(), x.shape[0]
    pointers = map(library.address, (None, None, None) if ids is None else ids)
    status = library.function("encode", x.dtype)(
        *pointers, embeddings, offsets.data_ptr(), offsets.shape[0] - 1, layers, x.data_ptr(), workspace.data_ptr(),
        n_rows, *encoder.settings, (ctypes.c_void_p * len(angles))(*map(torch.Tensor.data_ptr, angles)),
        None if columns is None else columns.data_ptr(), common,
    )  # fmt: skip
    library.check(status, n_rows)
    return x


@dataclass(frozen=True)
class Int8Encoder(_Encoder):
    """An `Int8Encoder` holds weights in the form that `encoder_int8_forward` reads.

    Hidden and intermediate size are multiples of 32.
    """

    def workspace_size(self, n_tokens: int, dtype: torch.dtype) -> int:
        """Counts the bytes that `encoder_int8_forward` needs in addition to its output, with the present number of
        threads.
        """
        function = getattr(library.load()[0], f"fastbert_encode_int8_{str(dtype).removeprefix('torch.')}_bytes")
        conv_size = 0 if self.convolution is None else self.convolution.size
        return function(n_tokens, self.hidden_size, self.intermediate_size, conv_size)


def encoder_int8_forward(
    encoder: Int8Encoder,
    ids: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor] | None,
    states: torch.Tensor,
    cu_seqlens_cpu: torch.Tensor,
    workspace: torch.Tensor,
    columns: torch.Tensor | None = None,
    angles: Sequence[torch.Tensor] = (),
) -> torch.Tensor:
    """Does the same as `encoder_forward` in 8 bits, writes hidden states to `states`, and returns it.

    states: contiguous, (1, T, H) for the last hidden state, or (L + 1, T, H) for all. If ids is None, states[0] holds
    the embeddings. workspace: uint8, as many as workspace_size says.
    """
    embeddings, layers, common = encoder.addresses
    offsets = cu_seqlens_cpu.contiguous()
    pointers = map(library.address, (None, None, None) if ids is None else ids)
    status = library.function("encode_int8", states.dtype)(
        *pointers, embeddings, offsets.data_ptr(), len(offsets) - 1, layers, states.data_ptr(),
        0 if len(states) == 1 else states.stride(0), workspace.data_ptr(), workspace.numel(), states.shape[1],
        *encoder.settings, (ctypes.c_void_p * len(angles))(*map(torch.Tensor.data_ptr, angles)),
        None if columns is None else columns.data_ptr(), common,
    )  # fmt: skip
    library.check(status, states.shape[1])
    return states
