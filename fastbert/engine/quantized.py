"""The encoder of a BertModel on 8-bit operands, for `precision="fp8"` and `precision="int8"`.

Linears multiply 8-bit activations by 8-bit weights; attention's own products, LayerNorm and the residual stay in the
model's dtype. Every operand is quantised by the kernel that makes it. T tokens, H hidden.

fp8 needs a GPU of compute capability 8.9 or newer, int8 one of 8.0, or a CPU with AVX-512 VNNI
(fastbert.engine.cpu_encoder, which quantises its own way). Where there are no 8-bit kernels (other CPUs, an older GPU,
sizes or an activation that they do not take, an adapter or a hook inside) the unquantised path runs: it is logged once,
`explain` shows it, and under strict=True it raises BackendError. backend="torch" instead emulates the same quantisation
in plain PyTorch, on any device. The parameters are kept, with the 8-bit weights beside them.

int8 is the more exact of the two: benchmarks/NOTES.md has the figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastbert import ops
from fastbert.ops import BackendError, Policy, dispatch, tracing
from fastbert.ops.derived import Derived
from fastbert.ops.dispatch import Decision
from fastbert.ops.packing import PackedBatch
from fastbert.ops.quantized import Quantized
from fastbert.ops.tracing import untraced

if TYPE_CHECKING:
    from fastbert.models.bert import BertLayer, BertModel

OP = "8-bit encoder"
# What a Decision calls the unquantised path.
UNQUANTISED = "unquantised"


class QuantizedWeights(Derived):
    """8-bit weights derived from linears, kept until a parameter changes."""

    def of(self, precision: str, name: str, linears: Sequence[nn.Linear], rotated: bool) -> tuple[Quantized, Tensor]:
        """The linears as one: their weights one above the other, with a scale a row, and their biases.

        name: what they are kept under. rotated: whether their input is.
        """
        data, scale, bias = self._tensors(precision, name, linears, rotated)
        return Quantized(data, scale, data.shape[1]), bias

    def addresses_of(self, precision: str, name: str, linears: Sequence[nn.Linear], rotated: bool) -> tuple[int, ...]:
        """Where data, scales and biases are, up to date; nowhere if they are made on every call."""
        return self.addresses(name, self._tensors(precision, name, linears, rotated))

    def _tensors(self, precision: str, name: str, linears: Sequence[nn.Linear], rotated: bool) -> tuple[Tensor, ...]:
        weights: list[Tensor] = [linear.weight for linear in linears]
        biases: list[Tensor] = [linear.bias for linear in linears]

        def make() -> tuple[Tensor, ...]:
            weight = ops.quantized.quantize_weight(torch.cat(weights), precision, rotated=rotated)
            return weight.data, weight.scale, torch.cat(biases)

        return self.get(name, weights + biases, make, (precision, rotated))


def layers_of(model: BertModel) -> list[BertLayer]:
    """The encoder's layers, with the type that a ModuleList does not keep."""
    layers: Any = model.encoder.layer
    return list(layers)


def decide(
    model: BertModel,
    policy: Policy,
    device: torch.device,
    dtype: torch.dtype,
    arch: int | None = None,
    transformed: str | None = None,
) -> Decision:
    """What would run the encoder in its precision: "triton", "cpu", "torch" (the emulation) or "unquantised", and why.

    The emulation, in plain PyTorch, is what backend="torch" asks for: it shows on any device what the kernels would
    give. Where there is no 8-bit kernel, any other backend takes the unquantised path, which is faster there and more
    exact. arch: that of a GPU which need not be there. transformed: what `tracing.transformed` says of the inputs.
    """
    precision = model.precision
    assert precision is not None
    config, layers = model.config, layers_of(model)
    activation = layers[0].intermediate.activation
    sizes = config.hidden_size, config.intermediate_size, config.head_size
    why_not = ops.quantized.obstacle(*sizes, activation, dtype, device) or _altered(model)
    if why_not is None and policy.backend != "torch":
        why_not = ops.quantized.device_obstacle(precision, device, arch)
    if why_not is None and policy.batch_invariant and (device.type != "cpu" or policy.backend == "triton"):
        why_not = "batch_invariant: of the 8-bit kernels, only those in C++ for CPUs promise it"
    why_not = why_not or transformed or tracing.transformed()
    if why_not is not None:
        return Decision(OP, UNQUANTISED, why_not)
    if arch is not None and policy.backend in ("auto", "triton"):
        return Decision(OP, "triton")
    decision = dispatch.decide(OP, policy, device, None)
    if decision.backend == "triton" or policy.backend == "torch":
        return Decision(OP, decision.backend)
    if precision == "int8" and decision.backend == "cpu":
        why_not = model.int8_obstacle(device, dtype)
        return Decision(OP, UNQUANTISED, why_not) if why_not else Decision(OP, "cpu", decision.reason)
    reason = decision.reason or f"there are no 8-bit kernels for backend {decision.backend!r} on {device.type!r}"
    return Decision(OP, UNQUANTISED, reason)


@untraced
def choose(model: BertModel, transformed: str | None = None) -> str:
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


def _altered(model: BertModel) -> str | None:
    """Which part of the encoder is an adapter or has hooks, so that its parameters cannot stand for it, or None."""
    from fastbert.models.bert import is_bare

    if model.embeddings_project is not None:
        return "the embeddings are projected, and there is no 8-bit kernel for that"
    for name in ("embeddings", "encoder"):
        module = getattr(model, name)
        if not is_bare(module, type(module)):
            return f"{name} has hooks"
    for i, layer in enumerate(layers_of(model)):
        if not _is_own(layer):
            return f"a part of encoder.layer.{i} is an adapter, has hooks or has no bias"
    return None


def _is_own(module: nn.Module) -> bool:
    """Whether a module of the encoder is as it was made.

    It reads the dictionaries of modules, since it runs for every batch and a module's attributes are slow.
    """
    from fastbert.models.bert import ENCODER_MODULES, is_bare

    if type(module) not in ENCODER_MODULES or not is_bare(module, type(module)):
        return False
    children: Any = module._modules.values()
    for child in children:
        kind = type(child)
        if kind is nn.Linear:
            if not is_bare(child, nn.Linear) or child._parameters["bias"] is None:
                return False
        elif kind in (nn.LayerNorm, nn.Dropout):
            if not is_bare(child, kind):
                return False
        elif not _is_own(child):
            return False
    return True


@untraced
def encode(
    model: BertModel,
    backend: str,
    batch: PackedBatch,
    input_ids: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor,
    inputs_embeds: Tensor | None,
    keep_states: bool = False,
) -> list[Tensor]:
    """As BertEncoder after BertEmbeddings: the L + 1 hidden states, each (T, H), or the last. backend: of `choose`."""
    policy, precision = Policy(backend, strict=True), model.precision
    assert precision is not None
    weights, layers = model.quantized_weights, layers_of(model)
    _refuse_gradients(model, inputs_embeds)
    operands = model.embeddings.operands(input_ids, inputs_embeds, model.policy)
    words: list[Any] = [operands[0], token_type_ids, position_ids, *operands[1:], precision]
    x, q = ops.quantized.embedding_layer_norm(*words, policy=policy)
    states = [x]
    for i, layer in enumerate(layers):
        part, add, up, down = layer.attention.self, layer.attention.output, layer.intermediate, layer.output
        of_qkv, of_out, of_up, of_down = (weights.of(precision, *which) for which in _linears(i, layer, precision))
        weight, bias = of_qkv
        qkv = ops.quantized.linear(q, weight, bias, x.dtype, policy=policy)
        context = ops.quantized.varlen_attention(qkv, batch, part.num_heads, precision, policy=policy)
        weight, bias = of_out
        y = ops.quantized.linear(context, weight, None, x.dtype, policy=policy)
        after = add.LayerNorm.weight, add.LayerNorm.bias, add.LayerNorm.eps
        x, q = ops.quantized.bias_residual_layer_norm(y, bias, x, *after, precision, policy=policy)
        weight, bias = of_up
        inner = ops.quantized.linear_quantized(q, weight, bias, up.activation, policy=policy)
        weight, bias = of_down
        y = ops.quantized.linear(inner, weight, None, x.dtype, policy=policy)
        after = down.LayerNorm.weight, down.LayerNorm.bias, down.LayerNorm.eps
        if i + 1 < len(layers):
            x, q = ops.quantized.bias_residual_layer_norm(y, bias, x, *after, precision, policy=policy)
        else:  # nobody multiplies it in 8 bits
            x = ops.bias_residual_layer_norm(y, bias, x, *after, policy=policy)
        states = [*states, x] if keep_states else [x]
    return states


def _linears(i: int, layer: BertLayer, precision: str) -> list[tuple[str, tuple[nn.Linear, ...], bool]]:
    """The four products of a layer: a name, the linears that are multiplied as one, whether their input is rotated."""
    part, turned = layer.attention.self, precision == "int8"
    return [
        (f"{i}.qkv", (part.query, part.key, part.value), turned),
        (f"{i}.out", (layer.attention.output.dense,), False),
        (f"{i}.up", (layer.intermediate.dense,), turned),
        (f"{i}.down", (layer.output.dense,), False),
    ]


@untraced
def addresses(model: BertModel) -> list[tuple[int, ...]]:
    """Where the 8-bit weights of every layer are kept, up to date: what a CUDA graph of the model reads."""
    weights, precision = model.quantized_weights, model.precision
    assert precision is not None
    return [
        weights.addresses_of(precision, *which)
        for i, layer in enumerate(layers_of(model))
        for which in _linears(i, layer, precision)
    ]


def _refuse_gradients(model: BertModel, inputs_embeds: Tensor | None) -> None:
    if not torch.is_grad_enabled():
        return
    given = [] if inputs_embeds is None else [inputs_embeds]
    if any(t.requires_grad for t in (*given, *model.parameters())):
        wanted = f"precision={model.precision!r} is for inference and has no gradient"
        raise RuntimeError(f"{wanted}: use torch.no_grad(), or requires_grad_(False)")
