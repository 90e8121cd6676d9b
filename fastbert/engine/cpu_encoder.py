"""This module runs a model's encoder in one call of a C++ kernel, on CPUs, for inference.

A short text takes more time in Python than in the kernels: about a hundred operations are checked and dispatched, and
each allocates memory. If a call needs no gradients, adapters, hooks and hidden states of single layers, `CpuEncoder`
runs the encoder in one call. Otherwise the model runs operation by operation.

With precision="int8" its linears multiply 8-bit operands, on processors with AVX-512 VNNI. Weights have a scale for
each output channel, and rows have a scale and an offset. This path also returns the hidden states of all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastbert import ops
from fastbert.engine.block import Block, Convolution, EmbeddingTables, Norm
from fastbert.engine.interface import PackedInputs
from fastbert.ops import attention, dispatch, packed_linear
from fastbert.ops.disentangled import rows_of_distances
from fastbert.ops.packing import PackedBatch
from fastbert.ops.rotary import kept, tables_of
from fastbert_kernels import cpu

CPU = torch.device("cpu")
# A processor with matrix units runs more bfloat16 rows than these faster in oneDNN.
ROWS_WITHOUT_AMX = 64
# In float32 F.linear is the more exact one on up to three rows (packed_linear.LEAST_ROWS), below this hidden size by
# more than the numerical policy allows.
EXACT_FROM = 320
# Workspaces kept for the next batch: memory that is new to the process costs a page fault every 4 KiB.
MOST_KEPT, LARGEST_KEPT = 2, 64 * 2**20  # how many, bytes


def obstacles(config: Any, dtype: torch.dtype, policy: ops.Policy, device: torch.device) -> Iterator[str]:
    """Yields every reason why all models of this configuration run operation by operation on this device."""
    if device.type != "cpu":
        yield f"the model is on {device}"
        return
    backend = dispatch.decide("linear", policy, device, None).backend
    if backend != "cpu":
        yield f"the backend is {backend!r}"
        return
    if not cpu.multiplies(dtype):
        yield cpu.obstacle() or f"the C++ kernels do not multiply {dtype} on this processor"
    if config.hidden_size > cpu.MAX_HIDDEN:
        yield f"hidden size {config.hidden_size} is above {cpu.MAX_HIDDEN}"
    if dtype == torch.bfloat16 and config.intermediate_size % 2:  # which is multiplied in pairs
        yield f"intermediate size {config.intermediate_size} is odd"
    if ops.ACTIVATIONS.get(config.hidden_act) not in cpu.ACTIVATIONS:
        yield f"there is no C++ kernel for {config.hidden_act!r}"
    obstacle = attention.cpu_obstacle(config.head_size, torch.empty(0, dtype=dtype, device="cpu"))
    if obstacle is not None:
        yield obstacle


def bfloat16_obstacle() -> str | None:
    """Tells why this processor does not multiply bfloat16 faster than float32, or returns None if it does.

    Matrix units are faster, with oneDNN. The speed of the instruction in the C++ kernels is measured.
    """
    if cpu.has_amx() and packed_linear.packing_obstacle(torch.bfloat16) is None:
        return None
    rate = cpu.bfloat16_rate()
    if rate is None:
        return cpu.obstacle() or "this processor does not multiply bfloat16 in hardware"
    return None if rate > 1.0 else f"this processor multiplies bfloat16 at {rate:.1f} times the rate of float32"


def invariant_obstacle(config: Any, dtype: torch.dtype) -> str | None:
    """Tells why models of this configuration are not batch-invariant on this CPU, or returns None."""
    for size in {config.embedding_width, config.hidden_size, config.intermediate_size}:
        obstacle = packed_linear.product_obstacle(dtype, size)
        if obstacle is not None:
            return obstacle
    return attention.cpu_obstacle(config.head_size, torch.empty(0, dtype=dtype, device="cpu"))


def choose_cpu_dtype(model: Any, asked: Any) -> None:
    """Casts a float32 model to bfloat16 for inference with dtype="auto", on a CPU that is faster in bfloat16.

    Only text encoders call this, because a model for training or saving keeps the dtype of its files.
    """
    policy = model.policy
    if asked != "auto" or model.dtype != torch.float32 or model.device.type != "cpu":
        return
    if policy.backend not in ("auto", "cpu") or model.precision is not None:
        return
    if policy.batch_invariant and invariant_obstacle(model.config, torch.bfloat16) is not None:
        return
    if (obstacle := bfloat16_obstacle()) is not None:
        model.dtype_choice = torch.float32, f"dtype='auto' kept float32: {obstacle}"
        return
    model.to(torch.bfloat16)
    reason = "dtype='auto' selected bfloat16, which this processor multiplies faster than float32"
    model.dtype_choice = torch.bfloat16, f"{reason}; dtype='float32' keeps float32"


def int8_obstacles(config: Any, dtype: torch.dtype) -> Iterator[str]:
    """Yields every reason why all models of this configuration have no 8-bit kernels on this CPU.

    fastbert.ops.quantized yields the reasons about sizes.
    """
    int8_obstacle = cpu.int8_obstacle()
    if int8_obstacle is not None:
        yield int8_obstacle
    elif dtype not in (torch.float32, torch.bfloat16):
        yield f"the C++ kernels do not multiply 8-bit operands for models in {dtype}"
    if ops.ACTIVATIONS.get(config.hidden_act) not in cpu.ACTIVATIONS:
        yield f"there is no C++ kernel for {config.hidden_act!r}"
    obstacle = attention.cpu_obstacle(config.head_size, torch.empty(0, dtype=dtype, device="cpu"))
    if obstacle is not None:
        yield obstacle


def takes_rows(n_rows: int, dtype: torch.dtype, hidden_size: int) -> bool:
    """Tells whether one call is the fastest way for this number of rows."""
    if n_rows == 0:
        return False
    if dtype == torch.float32 and n_rows < packed_linear.LEAST_ROWS and hidden_size < EXACT_FROM:
        return False
    return not (dtype == torch.bfloat16 and n_rows > ROWS_WITHOUT_AMX and cpu.has_amx())


class CpuEncoder:
    """A `CpuEncoder` holds the packed weights of the kernel, kept until their key changes, and workspaces."""

    def __init__(self) -> None:
        self._kept: tuple[Any, Any] = (None, None)
        self._workspaces: list[Tensor] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"_kept": (None, None), "_workspaces": []}

    def clear(self) -> None:
        """Drops the weights and workspaces; the weights are packed again at their next use."""
        self._kept = (None, None)
        self._workspaces = []

    def weights(self, key: Any, renewed: Callable[[], Any], make: Callable[[], Any]) -> Any:
        """Returns the result of `make` from the last change of the key. renewed: returns the key for it."""
        kept = self._kept
        if kept[0] != key:
            kept = self._kept = renewed(), make()
        return kept[1]

    def run(self, weights: cpu.Encoder, batch: PackedBatch, inputs: PackedInputs, x: Tensor | None = None) -> Tensor:
        """Ids, (T,) int64 within their tables, or the embeddings x, (T, H) -> the last hidden state, (T, H).

        x is written to.
        """
        dtype, ids = weights.dtype, None
        if x is None:
            ids = _contiguous(inputs)
            x = torch.empty(batch.n_tokens, weights.hidden_size, dtype=dtype, device="cpu")
        x, angles = x.contiguous(), _angles(weights, inputs) if weights.angles else ()
        workspace = self._take(weights.workspace_size(batch.n_tokens), dtype)
        cpu.encoder_forward(weights, ids, x, batch.cu_seqlens_cpu, workspace, batch.columns, angles)
        self._keep(workspace)
        return x

    def run_int8(
        self,
        weights: cpu.Int8Encoder,
        batch: PackedBatch,
        inputs: PackedInputs,
        x: Tensor | None,
        dtype: torch.dtype,
        keep_states: bool,
    ) -> list[Tensor]:
        """Ids or embeddings as for `run` -> the last hidden state (T, H) as a list, or all L + 1 of them."""
        n_states = len(weights.layers) + 1 if keep_states else 1
        states = torch.empty(n_states, batch.n_tokens, weights.hidden_size, dtype=dtype, device="cpu")
        ids, angles = None, _angles(weights, inputs) if weights.angles else ()
        if x is None:
            ids = _contiguous(inputs)
        else:
            states[0] = x
        workspace = self._take(weights.workspace_size(batch.n_tokens, dtype), torch.uint8)
        cpu.encoder_int8_forward(weights, ids, states, batch.cu_seqlens_cpu, workspace, batch.columns, angles)
        self._keep(workspace)
        return list(states)

    def _take(self, size: int, dtype: torch.dtype) -> Tensor:
        try:
            workspace = self._workspaces.pop()  # another thread may have taken it
        except IndexError:
            workspace = torch.empty(0, dtype=dtype, device="cpu")
        if workspace.numel() < size or workspace.dtype != dtype:
            workspace = torch.empty(size, dtype=dtype, device="cpu")
        return workspace

    def _keep(self, workspace: Tensor) -> None:
        if len(self._workspaces) < MOST_KEPT and workspace.nbytes <= LARGEST_KEPT:
            self._workspaces.append(workspace)


def _contiguous(inputs: PackedInputs) -> tuple[Tensor, Tensor | None, Tensor]:
    input_ids, token_type_ids, position_ids, _ = inputs
    assert input_ids is not None
    token_type_ids = None if token_type_ids is None else token_type_ids.contiguous()
    return input_ids.contiguous(), token_type_ids, position_ids.contiguous()


def _identity(layer: cpu.EncoderLayer) -> tuple[Any, ...]:
    """Returns an identity that is equal for two layers with the same weights and settings."""
    *tensors, traits = layer
    return *map(id, tensors), *(id(each) if isinstance(each, Tensor) else each for each in traits)


def _angles(weights: cpu.Encoder | cpu.Int8Encoder, inputs: PackedInputs) -> list[Tensor]:
    """Returns the cosines and sines of the rows for each kind of rotary angles, (T, D / 2) float32."""
    head_size = weights.hidden_size // weights.num_heads
    tables: list[Tensor] = []
    for base, factor in weights.angles:
        tables += tables_of(inputs.position_ids, kept(head_size, base, factor, CPU))
    return tables


def pack_encoder(
    tables: EmbeddingTables | None, blocks: list[Block], config: Any, int8: bool = False
) -> cpu.Encoder | cpu.Int8Encoder | None:
    """Packs the weights for the C++ kernels; returns None if they are not contiguous, of one dtype, and on the CPU.

    tables: None if the modules compute the embeddings. int8: whether the linears' weights are in 8 bits.
    """
    if not blocks or not _fits(blocks):
        return None
    norms = [n for block in blocks for n in (block.attention_norm, block.output_norm, block.last_norm) if n is not None]
    beside = blocks[0].convolution
    if beside is not None:
        norms.append(beside.norm)
    embeddings: cpu.EncoderTables | tuple[()] = ()
    if tables is not None:
        norms.insert(0, tables.norm)
        embeddings = cpu.EncoderTables(
            tables.words, tables.token_types, tables.positions, *_filled(tables.norm, tables.words)
        )
    angles = list(dict.fromkeys(angle for block in blocks if (angle := _angle(block)) is not None))
    layers = [_layer(block, angles) for block in blocks]
    convolution = None if beside is None else _convolution(beside)
    parts: list[Any] = [embeddings, *(layer[:-1] for layer in layers), *(layer.traits.tensors for layer in layers)]
    parts.append(() if convolution is None else convolution[:-2])
    tensors: list[Tensor] = [t for part in parts for t in part if t is not None]
    dtype = tensors[0].dtype
    if any(t.dtype != dtype or t.device.type != "cpu" or not t.is_contiguous() for t in tensors):
        return None
    if any(t.is_inference() for t in tensors) or len({norm.eps for norm in norms}) > 1:
        return None
    packs: dict[Any, Any] = {}  # What layers share is packed once.
    for layer in layers:
        if (key := _identity(layer)) not in packs:
            packs[key] = _in_8_bits(layer) if int8 else _packed(layer)
    return (cpu.Int8Encoder if int8 else cpu.Encoder)(
        embeddings=cpu.EncoderTables(*(None if t is None else t.detach() for t in embeddings)) if embeddings else (),  # type: ignore[arg-type]
        layers=tuple(packs[_identity(layer)] for layer in layers),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_attention_heads,
        activation=blocks[0].activation,
        eps=norms[0].eps,
        angles=tuple(angles),
        scale=blocks[0].scale or 0.0,
        rows_of=_rows_of(blocks),
        convolution=None if convolution is None else _packed_convolution(convolution, int8),
    )


def _fits(blocks: list[Block]) -> bool:
    """Tells whether the kernels support these layers together: one window, no position bias in it, one scale."""
    windows = {block.window for block in blocks if block.window is not None}
    both = any(block.window is not None and block.position_bias is not None for block in blocks)
    norms = all(block.pre_norm or (block.attention_norm is not None and block.last_norm is None) for block in blocks)
    alone = all(block.convolution is None for block in blocks[1:]) and len({block.scale for block in blocks}) == 1
    beside = blocks[0].convolution is None or not any(block.pre_norm for block in blocks)
    return len(windows) <= 1 and not both and norms and alone and beside and len(_buckets(blocks)) <= 1


def _buckets(blocks: list[Block]) -> set[tuple[int, int]]:
    return {block.distances.buckets for block in blocks if block.distances is not None}


def _rows_of(blocks: list[Block]) -> Tensor | None:
    """Returns the rows of distances for disentangled attention, which all layers share."""
    buckets = _buckets(blocks)
    if not buckets:
        return None
    return torch.tensor(rows_of_distances(*buckets.pop()), dtype=torch.int32, device="cpu")


def _convolution(beside: Convolution) -> cpu.EncoderConvolution:
    """Returns the convolution's tensors, with its weight as that of a matrix product."""
    product = beside.product()
    assert product.bias is not None
    norm = _filled(beside.norm, beside.weight[:, 0, 0])
    return cpu.EncoderConvolution(product.weight, product.bias, *norm, beside.weight.shape[-1], beside.activation)


def _packed_convolution(convolution: cpu.EncoderConvolution, int8: bool) -> cpu.EncoderConvolution:
    weight, bias, norm_weight, norm_bias = (tensor.detach() for tensor in convolution[:-2])
    if int8:  # its product is in float32
        with torch.inference_mode(False), torch.no_grad():
            packed, bias = cpu.pack_weight(weight.float()), bias.float()
    else:
        packed = packed_linear.packed_by_kernel(convolution.weight)
    return cpu.EncoderConvolution(packed, bias, norm_weight, norm_bias, *convolution[-2:])


def _filled(norm: Norm, like: Tensor) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False), torch.no_grad():  # or they would be inference tensors
        return norm.filled(like)


def _angle(block: Block) -> tuple[float, float] | None:
    return None if block.rotary is None else (block.rotary, block.position_factor)


def _layer(block: Block, angles: list[tuple[float, float]]) -> cpu.EncoderLayer:
    """Returns the tensors of a layer in the order of the kernel."""
    qkv, out, up, down = block.fuse_qkv(), block.out, block.up, block.down
    gate = (None, None) if block.gate is None else (block.gate.weight, block.gate.bias)
    attention_norm, last_norm = (
        (None, None) if norm is None else _filled(norm, out.weight) for norm in (block.attention_norm, block.last_norm)
    )
    angle, bias, distances = _angle(block), block.position_bias, block.distances
    positions = None if distances is None else distances.project()
    table = None if bias is None else cpu.PositionBias.of(bias, None).table
    traits = cpu.LayerTraits(
        cpu.window_bias(block.num_heads, block.window) if block.window is not None else table,
        -1 if block.window is None else block.window,
        -1 if angle is None else angles.index(angle),
        block.pre_norm,
        *(None if t is None else t.detach() for t in (() if positions is None else positions[:2])),
    )
    tensors: Any = (
        qkv.weight, qkv.bias, out.weight, out.bias, *attention_norm, up.weight, up.bias, down.weight, down.bias,
        *_filled(block.output_norm, out.weight), *gate, *last_norm, traits,
    )  # fmt: skip
    return cpu.EncoderLayer(*tensors)


def _detached(layer: cpu.EncoderLayer) -> cpu.EncoderLayer:
    return cpu.EncoderLayer(*(t.detach() if isinstance(t, Tensor) else t for t in layer))  # type: ignore[arg-type]


def _packed(layer: cpu.EncoderLayer) -> cpu.EncoderLayer:
    pack = packed_linear.packed_by_kernel  # kept beside the parameter itself
    gate = None if layer.gate is None else pack(layer.gate)
    detached = _detached(layer)
    return detached._replace(
        qkv=pack(layer.qkv), out=pack(layer.out), up=pack(layer.up), down=pack(layer.down), gate=gate
    )


def _in_8_bits(layer: cpu.EncoderLayer) -> cpu.Int8EncoderLayer:
    def pack(weight: Tensor, bias: Tensor | None, rotated: bool) -> cpu.Int8Weight:
        q = ops.quantized.quantize_weight(weight, "int8", rotated=rotated)
        return cpu.pack_int8(q.data, q.scale[:, 0], None if bias is None else bias.float())

    with torch.inference_mode(False), torch.no_grad():
        layer = _detached(layer)
        return cpu.Int8EncoderLayer(
            qkv=pack(layer.qkv, layer.qkv_bias, True),
            out=pack(layer.out, layer.out_bias, True),
            attention_norm_weight=layer.attention_norm_weight,
            attention_norm_bias=layer.attention_norm_bias,
            up=pack(layer.up, layer.up_bias, True),
            down=pack(layer.down, layer.down_bias, False),  # the rows of an activation are not rotated
            output_norm_weight=layer.output_norm_weight,
            output_norm_bias=layer.output_norm_bias,
            gate=None if layer.gate is None else pack(layer.gate, layer.gate_bias, True),
            last_norm_weight=layer.last_norm_weight,
            last_norm_bias=layer.last_norm_bias,
            traits=layer.traits,
        )
