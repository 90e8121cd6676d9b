"""Things that users do to the modules of a live BertModel: each function does one to the model that it is given."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune


def _attention(model: Any, i: int = 0) -> Any:
    return model.encoder.layer[i].attention.self


def _output(model: Any, i: int = 0) -> Any:
    return model.encoder.layer[i].output


class Scaled(nn.Linear):
    """A linear with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x)


class OfBatches(nn.Linear):
    """One that takes (B, S, K) alone."""

    def forward(self, x: Tensor) -> Tensor:
        batch_size, length, _ = x.shape
        return super().forward(x).view(batch_size, length, -1)


class Mixing(nn.Linear):
    """One that mixes the tokens of a text."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.1 * x.mean(-2, keepdim=True))


class Packed(nn.Module):
    """One whose weight is 8-bit integers of another shape, beside scales."""

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
    """The same as a linear, as bitsandbytes has it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.view(self.out_features, self.in_features).to(x.dtype) * self.scale, self.bias)


class Wrapper(nn.Module):
    """Around a layer, as FSDP and others put one."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class Tagged(Tensor):
    """A subclass of tensors that changes nothing."""


def no_query_bias(model: Any) -> None:
    _attention(model).query.bias = None


def no_key_bias_in_the_last_layer(model: Any) -> None:
    _attention(model, -1).key.bias = None


def no_biases_in_attention(model: Any) -> None:
    for layer in model.encoder.layer:
        for part in (layer.attention.self.query, layer.attention.self.key, layer.attention.self.value):
            part.bias = None


def linears_made_without_bias(model: Any) -> None:
    for layer in model.encoder.layer:
        bare = nn.Linear(layer.intermediate.dense.in_features, layer.intermediate.dense.out_features, bias=False)
        bare.weight = layer.intermediate.dense.weight
        layer.intermediate.dense = bare


def no_bias_in_intermediate(model: Any) -> None:
    model.encoder.layer[0].intermediate.dense.bias = None


def no_bias_in_outputs(model: Any) -> None:
    _output(model).dense.bias = None
    model.encoder.layer[1].attention.output.dense.bias = None


def no_bias_in_pooler(model: Any) -> None:
    model.pooler.dense.bias = None


def no_bias_anywhere(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.LayerNorm)):
            module.bias = None


def layer_norm_without_bias(model: Any) -> None:
    _output(model).LayerNorm.bias = None


def layer_norm_without_anything(model: Any) -> None:
    norm = _output(model).LayerNorm
    _output(model).LayerNorm = nn.LayerNorm(norm.normalized_shape, norm.eps, elementwise_affine=False)


def embedding_norm_without_weight(model: Any) -> None:
    model.embeddings.LayerNorm.weight = None


def layer_norm_of_another_class(model: Any) -> None:
    _output(model).LayerNorm = nn.RMSNorm(model.config.hidden_size, eps=1e-5)


def layer_norm_is_identity(model: Any) -> None:
    _output(model).LayerNorm = nn.Identity()


def weight_norm(model: Any) -> None:
    parametrizations.weight_norm(_attention(model).query)
    with torch.no_grad():
        _attention(model).query.parametrizations.weight.original0.mul_(1.5)


def spectral_norm(model: Any) -> None:
    parametrizations.spectral_norm(_output(model).dense)


def orthogonal(model: Any) -> None:
    parametrizations.orthogonal(_attention(model).value)


def parametrized_bias(model: Any) -> None:
    nn.utils.parametrize.register_parametrization(_attention(model).key, "bias", nn.Tanh())


def parametrized_norm(model: Any) -> None:
    nn.utils.parametrize.register_parametrization(_output(model).LayerNorm, "weight", nn.Tanh())


def parametrized_words(model: Any) -> None:
    nn.utils.parametrize.register_parametrization(model.embeddings.word_embeddings, "weight", nn.Tanh())


def parametrized_positions(model: Any) -> None:
    nn.utils.parametrize.register_parametrization(model.embeddings.position_embeddings, "weight", nn.Tanh())


def old_weight_norm(model: Any) -> None:
    nn.utils.weight_norm(_attention(model).query)


def old_spectral_norm(model: Any) -> None:
    nn.utils.spectral_norm(_attention(model).query)
    _attention(model).query.eval()


def pruned(model: Any) -> None:
    prune.l1_unstructured(_output(model).dense, "weight", amount=0.5)


def pruned_for_good(model: Any) -> None:
    prune.random_unstructured(_attention(model).key, "weight", amount=0.5)
    prune.remove(_attention(model).key, "weight")


def quantised_dynamically(model: Any) -> None:
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)


def packed_module(model: Any) -> None:
    for layer in model.encoder.layer:
        layer.attention.self.query = Packed(layer.attention.self.query)
        layer.intermediate.dense = Packed(layer.intermediate.dense)


def packed_linear(model: Any) -> None:
    packed = Packed(_output(model).dense)
    linear = _output(model).dense
    linear.__class__ = PackedLinear
    linear.weight = packed.weight
    linear.register_buffer("scale", packed.scale)


def half_a_layer(model: Any) -> None:
    _output(model).dense.half()


def subclass_with_a_forward(model: Any) -> None:
    _attention(model).value.__class__ = Scaled


def forward_of_batches(model: Any) -> None:
    _attention(model).value.__class__ = OfBatches


def forward_that_mixes(model: Any) -> None:
    _output(model).dense.__class__ = Mixing


def patched_forward(model: Any) -> None:
    linear = _output(model).dense
    linear.forward = types.MethodType(lambda self, x: F.linear(x, 2 * self.weight, self.bias), linear)


def patched_attention(model: Any) -> None:
    attention = _attention(model)
    before = attention.forward
    attention.forward = lambda *args, **kwargs: tuple(2 * t if t is not None else t for t in before(*args, **kwargs))


def hook_on_all_modules(model: Any) -> Any:
    def double(module: nn.Module, args: Any, output: Any) -> Any:
        return 2 * output if type(module) is nn.Linear else None

    return torch.nn.modules.module.register_module_forward_hook(double).remove


def hook_that_changes(model: Any) -> None:
    _output(model).dense.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def query_is_key(model: Any) -> None:
    _attention(model).key = _attention(model).query


def one_layer_for_all(model: Any) -> None:
    model.encoder.layer[1] = model.encoder.layer[0]


def shared_linears_and_norms(model: Any) -> None:
    _output(model, 1).LayerNorm = _output(model, 0).LayerNorm
    _output(model, 1).dense = _output(model, 0).dense
    model.encoder.layer[0].attention.output.LayerNorm = _output(model, 0).LayerNorm


def shared_parameters(model: Any) -> None:
    _attention(model, 1).query.weight = _attention(model, 0).key.weight


def linear_is_identity(model: Any) -> None:
    model.encoder.layer[0].attention.output.dense = nn.Identity()


def dropout_is_identity(model: Any) -> None:
    _output(model).dropout = nn.Identity()


def pooler_is_identity(model: Any) -> None:
    model.pooler = nn.Identity()


def pooler_is_none(model: Any) -> None:
    model.pooler = None


def pooler_is_deleted(model: Any) -> None:
    del model.pooler


def dropout_is_deleted(model: Any) -> None:
    del _output(model).dropout


def attention_of_another_class(model: Any) -> None:
    model.encoder.layer[0].attention = Wrapper(model.encoder.layer[0].attention)


def wrapped_layer(model: Any) -> None:
    model.encoder.layer[0] = Wrapper(model.encoder.layer[0])


def wrapped_linear(model: Any) -> None:
    _output(model).dense = nn.Sequential(_output(model).dense, nn.Identity())


def fewer_layers(model: Any) -> None:
    model.encoder.layer = model.encoder.layer[:1]


def layers_in_a_sequential(model: Any) -> None:
    model.encoder.layer = nn.Sequential(*model.encoder.layer)


def lazy_linear(model: Any) -> None:
    before = _output(model).dense
    lazy = nn.LazyLinear(before.out_features)
    _output(model).dense = lazy
    torch.manual_seed(0)


def weight_is_a_plain_tensor(model: Any) -> None:
    linear = _output(model).dense
    weight = linear.weight.detach() * 1.5
    del linear.weight
    linear.weight = weight


def weight_is_a_buffer(model: Any) -> None:
    linear = _attention(model).query
    weight = linear.weight.detach() * 1.5
    del linear.weight
    linear.register_buffer("weight", weight)


def bias_is_deleted(model: Any) -> None:
    del _output(model).dense.bias


def weight_is_none(model: Any) -> None:
    _output(model).dense.weight = None


def tensor_subclass(model: Any) -> None:
    linear = _output(model).dense
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Tagged))


def weights_not_contiguous(model: Any) -> None:
    for linear in (_attention(model).query, _output(model).dense):
        linear.weight = nn.Parameter(linear.weight.detach().t().contiguous().t())


def weights_with_gaps(model: Any) -> None:
    linear = _output(model).dense
    wide = linear.weight.new_zeros(linear.weight.shape[0], 2 * linear.weight.shape[1])
    wide[:, ::2] = linear.weight.detach()
    linear.weight = nn.Parameter(wide[:, ::2])


def weights_made_in_inference_mode(model: Any) -> None:
    with torch.inference_mode():
        for module in (_attention(model).query, _output(model).dense, _output(model).LayerNorm):
            module.weight = nn.Parameter(module.weight * 1.5, requires_grad=False)


def sparse_weight(model: Any) -> None:
    linear = _output(model).dense
    linear.weight = nn.Parameter(linear.weight.detach().to_sparse_csr(), requires_grad=False)


def other_eps(model: Any) -> None:
    _output(model).LayerNorm.eps = 0.5


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
    _attention(model).scaling = 1.0


def causal_attention(model: Any) -> None:
    model.config._attn_implementation = "sdpa"
    _attention(model).is_causal = True


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
    _output(model).dense = torch.jit.script(_output(model).dense)


def traced_linear(model: Any) -> None:
    width = model.config.intermediate_size
    _output(model).dense = torch.jit.trace(_output(model).dense, torch.zeros(2, 3, width))


def compiled_linear(model: Any) -> None:
    _output(model).dense = torch.compile(_output(model).dense, backend="eager")


def compiled_in_place(model: Any) -> None:
    _output(model).dense.compile(backend="eager")
    model.encoder.layer[0].compile(backend="eager")


def compiled_layer(model: Any) -> None:
    model.encoder.layer[0] = torch.compile(model.encoder.layer[0], backend="eager")


def embeddings_with_max_norm(model: Any) -> None:
    model.embeddings.word_embeddings.max_norm = 1.0


def more_words_than_it_says(model: Any) -> None:
    words = model.embeddings.word_embeddings
    words.weight = nn.Parameter(torch.cat([words.weight.detach(), words.weight.new_ones(5, words.embedding_dim)]))
    words.num_embeddings = 2


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


def frozen(model: Any) -> None:
    model.requires_grad_(False)


def on_the_meta_device(model: Any) -> None:
    model.to("meta")


def partly_on_the_meta_device(model: Any) -> None:
    _output(model).dense.to("meta")


def offloaded(model: Any) -> None:
    from accelerate import cpu_offload

    cpu_offload(model, execution_device=torch.device("cpu"))


def offloaded_in_part(model: Any) -> None:
    from accelerate import cpu_offload

    cpu_offload(model.encoder.layer[0], execution_device=torch.device("cpu"))


def offloaded_linear_with_hook(model: Any) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    hook = AlignDevicesHook(execution_device="cpu", offload=True)
    add_hook_to_module(_output(model).dense, hook)


def other_decoder_flag(model: Any) -> None:
    model.config.is_decoder = True


def config_says_otherwise(model: Any) -> None:
    model.config.num_attention_heads *= 2
    model.config.hidden_act = "relu"
    model.config.layer_norm_eps = 0.5


def default_types_are_ones(model: Any) -> None:
    model.embeddings.token_type_ids.fill_(1)


def dtype_of_the_embeddings(model: Any) -> None:
    model.embeddings.word_embeddings.half()


def parameters_of_integers(model: Any) -> None:
    with torch.no_grad():
        _output(model).dense.bias = nn.Parameter(torch.ones(model.config.hidden_size).long(), requires_grad=False)


def user_raises_in_a_module(model: Any) -> None:
    class Refusing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("the user's own")

    _output(model).dense.__class__ = Refusing


ODD = [
    value
    for name, value in list(globals().items())
    if isinstance(value, types.FunctionType) and value.__module__ == __name__ and not name.startswith("_")
]
