"""This module runs an encoder on 8-bit operands, for `precision="fp8"` and `precision="int8"`.

Linears multiply 8-bit activations by 8-bit weights. The products of attention, LayerNorm and the residual stay in the
model's dtype. The kernel that computes an operand also quantises it. T tokens, H hidden.

fp8 needs a GPU of compute capability 8.9 or newer; int8 needs a GPU of 8.0 or newer, or a CPU with AVX-512 VNNI
(fastbert.engine.cpu_encoder, with another quantisation). The unquantised path runs if there is no 8-bit kernel: on
other CPUs, on an older GPU, for unsupported sizes or activations, or with an adapter or a hook inside. This is logged
once, `explain` shows it, and with strict=True it raises BackendError. backend="torch" emulates the same quantisation in
plain PyTorch, on any device. The model keeps its parameters in addition to the 8-bit weights.

int8 is more exact than fp8: benchmarks/NOTES.md has the numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastbert import ops
from fastbert.engine import eight_bit_layers, emulated
from fastbert.engine.block import Block, Linear, feature_obstacles, features_of
from fastbert.engine.eight_bit_layers import EightBitLayers
from fastbert.engine.interface import EncoderModel, PackedInputs
from fastbert.engine.listeners import is_bare
from fastbert.ops import BackendError, Policy, dispatch, gelu, tracing
from fastbert.ops.angles import rotations_of
from fastbert.ops.derived import Derived
from fastbert.ops.dispatch import Decision
from fastbert.ops.gated import activation_obstacle as gate_obstacle
from fastbert.ops.packing import PackedBatch
from fastbert.ops.quantized import Quantized
from fastbert.ops.tracing import untraced

OP = "8-bit encoder"
# What a Decision calls the unquantised path.
UNQUANTISED = "unquantised"
# What layers may have beyond BERT's where plain PyTorch runs the operations of the kernels one by one, too.
_BY_OPERATIONS = frozenset(("position_bias",))


class QuantizedWeights(Derived):
    """This class holds 8-bit weights derived from linears, kept until a parameter changes."""

    def of(self, precision: str, name: str, linears: Sequence[Linear], rotated: bool) -> tuple[Quantized, Tensor]:
        """Returns the linears as one: joined weights with a scale for each row, and joined biases, zeros if missing.

        name: the name under which they are kept. rotated: whether their input is rotated.
        """
        data, scale, bias = self._tensors(precision, name, linears, rotated)
        return Quantized(data, scale, data.shape[1]), bias

    def addresses_of(self, precision: str, name: str, linears: Sequence[Linear], rotated: bool) -> tuple[int, ...]:
        """Returns the addresses of the current data, scales and biases; nothing if they are not kept."""
        return self.addresses(name, self._tensors(precision, name, linears, rotated))

    def _tensors(self, precision: str, name: str, linears: Sequence[Linear], rotated: bool) -> tuple[Tensor, ...]:
        weights: list[Tensor] = [linear.weight for linear in linears]
        biases = [linear.bias for linear in linears if linear.bias is not None]

        def make() -> tuple[Tensor, ...]:
            weight = ops.quantized.quantize_weight(torch.cat(weights), precision, rotated=rotated)
            filled = [each.weight.new_zeros(len(each.weight)) if each.bias is None else each.bias for each in linears]
            return weight.data, weight.scale, torch.cat(filled)

        return self.get(name, weights + biases, make, (precision, rotated))


def decide(
    model: EncoderModel,
    policy: Policy,
    device: torch.device,
    dtype: torch.dtype,
    arch: int | None = None,
    transformed: str | None = None,
) -> Decision:
    """Decides which code runs the encoder's precision: "triton", "cpu", "torch" (the emulation) or "unquantised".

    backend="torch" selects the emulation in plain PyTorch, which shows the results of the kernels on any device. If
    there is no 8-bit kernel, any other backend runs the unquantised path, which is faster and more exact than the
    emulation. arch: the compute capability of any GPU. transformed: the result of `tracing.transformed` for the inputs.
    """
    precision = model.precision
    assert precision is not None
    config = model.config
    on_triton = policy.backend == "triton" or (policy.backend == "auto" and device.type != "cpu")
    sizes = config.hidden_size, config.intermediate_size, config.head_size
    obstacles = [ops.quantized.model_obstacle(*sizes, "none", dtype, device), _altered(model)]
    if obstacles[1] is None and on_triton:  # those of the C++ kernels are named below
        obstacles += _block_obstacles(model)
    elif obstacles[1] is None and policy.backend == "torch":
        obstacles.append(_feature_obstacle(list(model.blocks()), emulated.FEATURES))
    if policy.backend != "torch":
        obstacles.append(ops.quantized.device_obstacle(precision, device, arch))
    if policy.batch_invariant and (device.type != "cpu" or policy.backend == "triton"):
        obstacles.append("batch_invariant: only the C++ kernels for CPUs support it in 8 bits")
    obstacles.append(transformed or tracing.transformed())
    reasons = [obstacle for obstacle in obstacles if obstacle is not None]
    if reasons:
        return Decision(OP, UNQUANTISED, "; ".join(reasons))
    elsewhere = arch is not None and policy.backend in ("auto", "triton")
    decision = Decision(OP, "triton") if elsewhere else dispatch.decide(OP, policy, device, None)
    if decision.backend == "triton" or policy.backend == "torch":
        return Decision(OP, decision.backend)
    if precision == "int8" and decision.backend == "cpu":
        reasons = list(model.engine.int8_call.kernel_obstacles(model, device, dtype))
        return Decision(OP, UNQUANTISED, "; ".join(reasons)) if reasons else Decision(OP, "cpu", decision.reason)
    reason = decision.reason or f"there are no 8-bit kernels for backend {decision.backend!r} on {device.type!r}"
    return Decision(OP, UNQUANTISED, reason)


@untraced
def choose(model: EncoderModel, transformed: str | None = None) -> str:
    """`decide` for the model as it is, with the fallback logged once, or raised as BackendError under strict."""
    if model.training:
        raise RuntimeError(f"precision={model.precision!r} is for inference: call eval() before the model")
    policy = model.policy
    decision = decide(model, policy, model.device, model.dtype, transformed=transformed)
    if decision.reason is not None:
        if policy.strict:
            wanted = f"precision={model.precision!r}: the backend {policy.backend!r} cannot run it, and strict=True"
            raise BackendError(f"{wanted}: {decision.reason}")
        dispatch._log_once(OP, f"{policy.backend}, {model.precision}", decision.backend, decision.reason)
    return decision.backend


def _altered(model: EncoderModel) -> str | None:
    """Names a part of the encoder that must be called, because of an adapter or a hook; or returns None."""
    for name in ("embeddings", "encoder"):
        module = getattr(model, name)
        if not is_bare(module, type(module)):
            return f"{name} has hooks"
    for i, layer in enumerate(model.encoder.layer):
        if not _is_own(layer, model.own_modules):
            return f"a part of encoder.layer.{i} is an adapter, has hooks or has no bias"
    beside = model.encoder._modules.get("conv")
    if beside is not None and not _is_own(beside, model.own_modules):
        return "a part of encoder.conv is an adapter, has hooks or has no bias"
    biased = not getattr(model.embeddings, "without_bias", False)
    for name, part in model.embeddings._modules.items():  # words alone may be of a module's own
        if name != "word_embeddings" and part is not None and not _is_own_leaf(part, biased):
            return f"embeddings.{name} is an adapter, has hooks or has no bias"
    return None


def _is_own(module: nn.Module, own_modules: frozenset[type[nn.Module]]) -> bool:
    """Tells whether a module of the encoder is unchanged since it was made.

    It reads the dictionaries of modules, because it runs for every batch and a module's attributes are slow.
    """
    if type(module) not in own_modules or not is_bare(module, type(module)):
        return False
    children: Any = module._modules.values()
    biased = not getattr(module, "without_bias", False)
    for child in children:
        if type(child) in _LEAVES:
            if not _is_own_leaf(child, biased):
                return False
        elif not _is_own(child, own_modules):
            return False
    return True


def _feature_obstacle(blocks: list[Block], supported: frozenset[str]) -> str | None:
    return next(feature_obstacles(features_of(blocks), supported, "the 8-bit encoder"), None)


def _block_obstacles(model: EncoderModel) -> list[str | None]:
    """Yields the features and activations of the layers that the Triton kernels do not support."""
    blocks = list(model.blocks())
    activations = {(block.activation, block.gate is not None) for block in blocks}
    return [
        _feature_obstacle(blocks, eight_bit_layers.FEATURES),
        *(gate_obstacle(name) if gated else gelu.activation_obstacle(name) for name, gated in sorted(activations)),
        *(gelu.activation_obstacle(block.convolution.activation) for block in blocks if block.convolution is not None),
    ]


_LEAVES = frozenset((nn.Linear, nn.LayerNorm, nn.Dropout, nn.Embedding, nn.Identity))


def _is_own_leaf(module: nn.Module, biased: bool = True) -> bool:
    kind = type(module)
    if kind not in _LEAVES or not is_bare(module, kind):
        return False
    if kind is not nn.Linear and kind is not nn.LayerNorm:
        return True
    parameters = module._parameters  # compared by identity: a tensor's own comparison would cost a launch
    return parameters["weight"] is not None and (parameters["bias"] is not None or not biased)


class EightBit:
    """This arithmetic runs precision="fp8" and "int8" operation by operation: in Triton kernels, or their emulation."""

    name = OP

    def __init__(self) -> None:
        self.weights = QuantizedWeights()

    def obstacles(self, model: Any, n_tokens: int | None, keep_states: bool, embedded: bool) -> Iterator[str]:
        if model.precision is None:
            yield "no precision is set"
            return
        decision = decide(model, model.policy, model.device, model.dtype)
        if decision.backend == UNQUANTISED:
            yield str(decision.reason)
        elif decision.backend == "cpu":
            yield "the C++ kernels run this precision in one call"

    def prepare(self, model: Any) -> None:
        self.addresses(model)

    @untraced
    def run(self, model: Any, batch: PackedBatch, inputs: PackedInputs, keep_states: bool) -> list[Tensor]:
        backend = "torch" if model.policy.backend == "torch" else "triton"
        policy, precision, weights = Policy(backend, strict=True), model.precision, self.weights
        refuse_gradients(model, inputs.inputs_embeds)
        ops.prepare_attention(batch, model.dtype, model.config.head_size, model.policy)
        blocks: list[Block] = list(model.blocks())

        def weight_of(i: int, name: str) -> tuple[Quantized, Tensor]:
            return weights.of(precision, *_linears(_place(model, i), blocks[i], precision)[name])

        features = features_of(blocks)
        if backend == "torch" and not _BY_OPERATIONS.issuperset(features):
            x = model.embed(inputs, batch)
            return emulated.run_layers(blocks, x, batch, inputs.position_ids, weight_of, precision, keep_states)
        if "rotary" in features:
            rotations_of(batch).renew(inputs.position_ids)
        layers = EightBitLayers(blocks, batch, weight_of, precision, policy)
        return layers.run(*self._embed(model, batch, inputs, features, policy), keep_states)

    def _embed(
        self, model: Any, batch: PackedBatch, inputs: PackedInputs, features: list[str], policy: Policy
    ) -> tuple[Tensor, Quantized]:
        """Returns the input of the first layer, (T, H), and the same in 8 bits."""
        precision = model.precision
        if model.embeddings_project is not None or "scale" in features:  # DeBERTa's embeddings have steps of their own
            x = model.embed(inputs, batch)
            return x, ops.quantized_parts.rows(x, precision, rotated=precision == "int8", policy=policy)
        input_ids, tables = model.tables(inputs)
        norm = tables.norm
        return ops.quantized.embedding_layer_norm(
            input_ids, inputs.token_type_ids, inputs.position_ids, tables.words, tables.token_types, tables.positions,
            norm.weight, norm.bias, norm.eps, precision, policy=policy,
        )  # fmt: skip

    @untraced
    def addresses(self, model: EncoderModel) -> list[tuple[int, ...]]:
        """Returns the addresses of the current 8-bit weights and other derived tensors that a CUDA graph reads."""
        precision = model.precision
        assert precision is not None
        blocks = list(model.blocks())
        beside: list[Tensor | None] = [block.position_bias for block in blocks]
        beside += [part for block in blocks if block.distances is not None for part in block.distances.project()[:2]]
        beside += [block.convolution.product().weight for block in blocks if block.convolution is not None]
        of_weights = [
            self.weights.addresses_of(precision, *which)
            for i, block in enumerate(blocks)
            for which in _linears(_place(model, i), block, precision).values()
        ]
        return [*of_weights, tuple(tensor.data_ptr() for tensor in beside if tensor is not None)]


def _place(model: EncoderModel, i: int) -> int:
    """Returns the index of layer i's weights in the stored sets."""
    order = model.encoder.order
    return i if order is None else order[i]


def _linears(i: int, block: Block, precision: str) -> dict[str, tuple[str, tuple[Linear, ...], bool]]:
    """Yields the four products of a layer: the name, the linears, and whether their input is rotated."""
    rotated = {"qkv", "up"} if precision == "int8" else set()
    return {name: (f"{i}.{name}", linears, name in rotated) for name, linears in block.products().items()}


def refuse_gradients(model: EncoderModel, inputs_embeds: Tensor | None) -> None:
    """Raises RuntimeError if a call needs gradients of an 8-bit encoder."""
    if not torch.is_grad_enabled():
        return
    embeds = [] if inputs_embeds is None else [inputs_embeds]
    if any(t.requires_grad for t in (*embeds, *model.parameters())):
        wanted = f"precision={model.precision!r} is for inference and has no gradient"
        raise RuntimeError(f"{wanted}: use torch.no_grad(), or requires_grad_(False)")
