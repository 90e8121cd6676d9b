"""The encoder of a BertModel on 8-bit operands, for `precision="fp8"` and `precision="int8"`.

Linears multiply 8-bit activations by 8-bit weights; attention's own products, LayerNorm and the residual stay in the
model's dtype. Every operand is quantised by the kernel that makes it. T tokens, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastbert import ops
from fastbert.ops import BackendError, Policy, dispatch
from fastbert.ops.dispatch import Decision
from fastbert.ops.quantized import Quantized
from fastbert.tracing import untraced
from fastbert.varlen import PackedBatch

if TYPE_CHECKING:
    from fastbert.model import BertLayer, BertModel

OP = "8-bit encoder"
# What a Decision calls the unquantised path.
UNQUANTISED = "unquantised"


class QuantizedWeights:
    """8-bit weights derived from parameters, kept until one of these changes, as BertSelfAttention.fused_qkv does.

    PyTorch keeps no count of writes through `.data`: after those, train() or eval() makes this look again.
    """

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Any, Any, Quantized]] = {}

    def clear(self) -> None:
        self._kept.clear()

    def get(self, name: str, parameters: list[Tensor], precision: str, *, rotated: bool) -> Quantized:
        """The parameters, one above the other, with a scale a row. name: what they are kept under."""

        def make() -> Quantized:
            weight = parameters[0] if len(parameters) == 1 else torch.cat(parameters)
            return ops.quantized.quantize_weight(weight, precision, rotated=rotated)

        if torch.compiler.is_compiling() or any(p.is_inference() for p in parameters):
            return make()
        state = precision, [(p.data_ptr(), p._version, p.dtype, p.device) for p in parameters]
        kept = self._kept.get(name)
        if kept is None or kept[0] != state:
            with torch.inference_mode(False), torch.no_grad():
                # The aliases keep a replaced parameter's memory from its successor, which would then look the same.
                kept = self._kept[name] = state, [p.detach() for p in parameters], make()
        return kept[2]

    def __reduce__(self) -> Any:
        return QuantizedWeights, ()


def layers_of(model: BertModel) -> list[BertLayer]:
    """The encoder's layers, with the type that a ModuleList does not keep."""
    layers: Any = model.encoder.layer
    return list(layers)


def decide(
    model: BertModel, policy: Policy, device: torch.device, dtype: torch.dtype, arch: int | None = None
) -> Decision:
    """What would run the encoder in its precision: "triton", "torch" (the emulation) or "unquantised", and why.

    The emulation, in plain PyTorch, is what backend="torch" asks for: it shows on any device what the kernels would
    give. Where there is no 8-bit kernel, any other backend takes the unquantised path, which is faster there and more
    exact. arch: that of a GPU which need not be there.
    """
    precision = model.precision
    assert precision is not None
    config, layers = model.config, layers_of(model)
    activation = layers[0].intermediate.activation
    sizes = config.hidden_size, config.intermediate_size, config.head_size
    why_not = ops.quantized.obstacle(*sizes, activation, dtype, device) or _altered(model)
    if why_not is None and policy.backend != "torch":
        why_not = ops.quantized.device_obstacle(precision, device, arch)
    if why_not is not None:
        return Decision(OP, UNQUANTISED, why_not)
    if arch is not None and policy.backend in ("auto", "triton"):
        return Decision(OP, "triton")
    decision = dispatch.decide(OP, policy, device, None)
    if decision.backend == "triton" or policy.backend == "torch":
        return Decision(OP, decision.backend)
    reason = decision.reason or f"there are no 8-bit kernels for backend {decision.backend!r} on {device.type!r}"
    return Decision(OP, UNQUANTISED, reason)


def choose(model: BertModel) -> str:
    """`decide` for the model as it is, with the fallback logged once, or raised as BackendError under strict."""
    if model.training:
        raise RuntimeError(f"precision={model.precision!r} is for inference: call eval() before the model")
    policy = model.policy
    decision = decide(model, policy, model.device, model.dtype)
    if decision.reason is not None:
        if policy.strict:
            wanted = f"precision={model.precision!r}: the backend {policy.backend!r} cannot run it, and strict=True"
            raise BackendError(f"{wanted}: {decision.reason}")
        dispatch._log_once(OP, f"{policy.backend}, {model.precision}", decision.backend, decision.reason)
    return decision.backend


def _altered(model: BertModel) -> str | None:
    """Which part of the encoder is an adapter or has hooks, so that its parameters cannot stand for it, or None."""
    from fastbert.model import is_bare, is_plain

    for i, layer in enumerate(layers_of(model)):
        attention, up, down = layer.attention, layer.intermediate, layer.output
        part = attention.self
        linears = part.query, part.key, part.value, attention.output.dense, up.dense, down.dense
        blocks = layer, attention, part, attention.output, up, down
        if not (all(map(is_plain, linears)) and all(is_bare(m, type(m)) for m in blocks)):
            return f"a part of encoder.layer.{i} is an adapter, has hooks or has no bias"
    for name in ("embeddings", "encoder"):
        module = getattr(model, name)
        if not is_bare(module, type(module)):
            return f"{name} has hooks"
    return None


@untraced
def encode(
    model: BertModel,
    backend: str,
    batch: PackedBatch,
    input_ids: Tensor | None,
    token_type_ids: Tensor,
    position_ids: Tensor,
    inputs_embeds: Tensor | None,
) -> list[Tensor]:
    """As BertEncoder after BertEmbeddings: the L + 1 hidden states, each (T, H). backend: what `choose` gave."""
    policy, precision = Policy(backend, strict=True), model.precision
    assert precision is not None
    weights: Callable[..., Quantized] = model.quantized_weights.get
    layers = layers_of(model)
    operands = model.embeddings.operands(input_ids, inputs_embeds)
    words: list[Any] = [operands[0], token_type_ids, position_ids, *operands[1:], precision]
    x, q = ops.quantized.embedding_layer_norm(*words, policy=policy)
    states = [x]
    for i, layer in enumerate(layers):
        part, rotated = layer.attention.self, precision == "int8"
        projections: list[nn.Linear] = [part.query, part.key, part.value]
        weight = weights(f"{i}.qkv", [p.weight for p in projections], precision, rotated=rotated)
        qkv = ops.quantized.linear(q, weight, torch.cat([p.bias for p in projections]), x.dtype, policy=policy)
        context = ops.quantized.varlen_attention(qkv, batch, part.num_heads, precision, policy=policy)
        dense, norm = layer.attention.output.dense, layer.attention.output.LayerNorm
        y = ops.quantized.linear(
            context, weights(f"{i}.out", [dense.weight], precision, rotated=False), None, x.dtype, policy=policy
        )
        after = norm.weight, norm.bias, norm.eps
        x, q = ops.quantized.bias_residual_layer_norm(y, dense.bias, x, *after, precision, policy=policy)
        up, dense, norm = layer.intermediate, layer.output.dense, layer.output.LayerNorm
        weight = weights(f"{i}.up", [up.dense.weight], precision, rotated=rotated)
        inner = ops.quantized.linear_quantized(q, weight, up.dense.bias, up.activation, policy=policy)
        y = ops.quantized.linear(
            inner, weights(f"{i}.down", [dense.weight], precision, rotated=False), None, x.dtype, policy=policy
        )
        after = norm.weight, norm.bias, norm.eps
        if i + 1 < len(layers):
            x, q = ops.quantized.bias_residual_layer_norm(y, dense.bias, x, *after, precision, policy=policy)
        else:  # nobody multiplies it in 8 bits
            x = ops.bias_residual_layer_norm(y, dense.bias, x, *after, policy=policy)
        states.append(x)
    return states
