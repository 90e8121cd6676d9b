"""Each function does to the modules of a live BertModel what some user does."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_cases import attention_of, output_of


class Scaled(nn.Linear):
    """A linear with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x)


class OfBatches(nn.Linear):
    """A linear that takes (B, S, K) alone."""

    def forward(self, x: Tensor) -> Tensor:
        batch_size, length, _ = x.shape
        return super().forward(x).view(batch_size, length, -1)


class Mixing(nn.Linear):
    """A linear that mixes the tokens of a text."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.1 * x.mean(-2, keepdim=True))


class Packed(nn.Module):
    """A module whose weight is 8-bit integers of another shape, beside scales."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.shape = weight.shape
        self.weight = nn.Parameter((weight / scale).round().to(torch.int8).view(-1, 1), requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.view(self.shape).to(x.dtype) * self.scale, self.bias)


class PackedLinear(nn.Linear):
    """A linear with such a weight, as bitsandbytes has it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.view(self.out_features, self.in_features).to(x.dtype) * self.scale, self.bias)


class Wrapper(nn.Module):
    """A module around a layer, as FSDP and others put one."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def layer_norm_of_another_class(model: Any) -> None:
    output_of(model).LayerNorm = nn.RMSNorm(model.config.hidden_size, eps=1e-5)


def layer_norm_is_identity(model: Any) -> None:
    output_of(model).LayerNorm = nn.Identity()


def quantised_dynamically(model: Any) -> None:
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)


def packed_module(model: Any) -> None:
    for layer in model.encoder.layer:
        layer.attention.self.query = Packed(layer.attention.self.query)
        layer.intermediate.dense = Packed(layer.intermediate.dense)


def packed_linear(model: Any) -> None:
    packed = Packed(output_of(model).dense)
    linear = output_of(model).dense
    linear.__class__ = PackedLinear
    linear.weight = packed.weight
    linear.register_buffer("scale", packed.scale)


def subclass_with_a_forward(model: Any) -> None:
    attention_of(model).value.__class__ = Scaled


def forward_of_batches(model: Any) -> None:
    attention_of(model).value.__class__ = OfBatches


def forward_that_mixes(model: Any) -> None:
    output_of(model).dense.__class__ = Mixing


def patched_forward(model: Any) -> None:
    linear = output_of(model).dense
    linear.forward = types.MethodType(lambda self, x: F.linear(x, 2 * self.weight, self.bias), linear)


def patched_attention(model: Any) -> None:
    attention = attention_of(model)
    before = attention.forward
    attention.forward = lambda *args, **kwargs: tuple(2 * t if t is not None else t for t in before(*args, **kwargs))


def hook_on_all_modules(model: Any) -> Any:
    def double(module: nn.Module, args: Any, output: Any) -> Any:
        return 2 * output if type(module) is nn.Linear else None

    return torch.nn.modules.module.register_module_forward_hook(double).remove


def hook_that_changes(model: Any) -> None:
    output_of(model).dense.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def query_is_key(model: Any) -> None:
    attention_of(model).key = attention_of(model).query


def one_layer_for_all(model: Any) -> None:
    model.encoder.layer[1] = model.encoder.layer[0]


def shared_linears_and_norms(model: Any) -> None:
    output_of(model, 1).LayerNorm = output_of(model, 0).LayerNorm
    output_of(model, 1).dense = output_of(model, 0).dense
    model.encoder.layer[0].attention.output.LayerNorm = output_of(model, 0).LayerNorm


def linear_is_identity(model: Any) -> None:
    model.encoder.layer[0].attention.output.dense = nn.Identity()


def dropout_is_identity(model: Any) -> None:
    output_of(model).dropout = nn.Identity()


def pooler_is_identity(model: Any) -> None:
    model.pooler = nn.Identity()


def pooler_is_none(model: Any) -> None:
    model.pooler = None


def pooler_is_deleted(model: Any) -> None:
    del model.pooler


def dropout_is_deleted(model: Any) -> None:
    del output_of(model).dropout


def attention_of_another_class(model: Any) -> None:
    model.encoder.layer[0].attention = Wrapper(model.encoder.layer[0].attention)


def wrapped_layer(model: Any) -> None:
    model.encoder.layer[0] = Wrapper(model.encoder.layer[0])


def wrapped_linear(model: Any) -> None:
    output_of(model).dense = nn.Sequential(output_of(model).dense, nn.Identity())


def fewer_layers(model: Any) -> None:
    model.encoder.layer = model.encoder.layer[:1]


def layers_in_a_sequential(model: Any) -> None:
    model.encoder.layer = nn.Sequential(*model.encoder.layer)


def lazy_linear(model: Any) -> None:
    before = output_of(model).dense
    lazy = nn.LazyLinear(before.out_features)
    output_of(model).dense = lazy
    torch.manual_seed(0)


def other_eps(model: Any) -> None:
    output_of(model).LayerNorm.eps = 0.5


def other_eps_everywhere(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 0.5


def other_number_of_heads(model: Any) -> None:
    for layer in model.encoder.layer:
        attention = layer.attention.self
        attention.num_attention_heads *= 2
        attention.attention_head_size //= 2


def other_scaling(model: Any) -> None:
    attention_of(model).scaling = 1.0


def causal_attention(model: Any) -> None:
    model.config._attn_implementation = "sdpa"
    attention_of(model).is_causal = True


def other_activation(model: Any) -> None:
    model.encoder.layer[0].intermediate.intermediate_act_fn = nn.ReLU()


def other_function_of_an_activation(model: Any) -> None:
    model.encoder.layer[0].intermediate.intermediate_act_fn.act = F.relu


def other_activation_of_the_pooler(model: Any) -> None:
    model.pooler.activation = nn.ReLU()


def chunked_feed_forward(model: Any) -> None:
    for layer in model.encoder.layer:
        layer.chunk_size_feed_forward = 1


def attention_of_the_user(model: Any) -> None:
    from transformers import AttentionInterface

    def sharper(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float = 1.0, **kwargs: Any) -> Any:
        out = F.scaled_dot_product_attention(query, key, value, mask, scale=2 * scaling)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("sharper", sharper)
    model.config._attn_implementation = "sharper"


def scripted_linear(model: Any) -> None:
    output_of(model).dense = torch.jit.script(output_of(model).dense)


def traced_linear(model: Any) -> None:
    width = model.config.intermediate_size
    output_of(model).dense = torch.jit.trace(output_of(model).dense, torch.zeros(2, 3, width))


def compiled_linear(model: Any) -> None:
    output_of(model).dense = torch.compile(output_of(model).dense, backend="eager")


def compiled_in_place(model: Any) -> None:
    output_of(model).dense.compile(backend="eager")
    model.encoder.layer[0].compile(backend="eager")


def compiled_layer(model: Any) -> None:
    model.encoder.layer[0] = torch.compile(model.encoder.layer[0], backend="eager")


def word_embeddings_of_the_user(model: Any) -> None:
    class Doubled(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return 2 * super().forward(ids)

    model.embeddings.word_embeddings.__class__ = Doubled


def word_embeddings_in_a_sequence(model: Any) -> None:
    class Shifted(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) + super().forward(ids.roll(1, -1))

    model.embeddings.word_embeddings.__class__ = Shifted


def other_decoder_flag(model: Any) -> None:
    model.config.is_decoder = True


def config_says_otherwise(model: Any) -> None:
    model.config.num_attention_heads *= 2
    model.config.hidden_act = "relu"
    model.config.layer_norm_eps = 0.5


def user_raises_in_a_module(model: Any) -> None:
    class Refusing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("the user's own")

    output_of(model).dense.__class__ = Refusing
