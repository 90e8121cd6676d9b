"""Each function does to the weights of a live BertModel what some user does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from model_cases import attention_of, output_of


class Tagged(Tensor):
    """A subclass of tensors that changes nothing."""


def no_query_bias(model: Any) -> None:
    attention_of(model).query.bias = None


def no_key_bias_in_the_last_layer(model: Any) -> None:
    attention_of(model, -1).key.bias = None


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
    output_of(model).dense.bias = None
    model.encoder.layer[1].attention.output.dense.bias = None


def no_bias_in_pooler(model: Any) -> None:
    model.pooler.dense.bias = None


def no_bias_anywhere(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.LayerNorm)):
            module.bias = None


def layer_norm_without_bias(model: Any) -> None:
    output_of(model).LayerNorm.bias = None


def layer_norm_without_anything(model: Any) -> None:
    norm = output_of(model).LayerNorm
    output_of(model).LayerNorm = nn.LayerNorm(norm.normalized_shape, norm.eps, elementwise_affine=False)


def embedding_norm_without_weight(model: Any) -> None:
    model.embeddings.LayerNorm.weight = None


def weight_norm(model: Any) -> None:
    parametrizations.weight_norm(attention_of(model).query)
    with torch.no_grad():
        attention_of(model).query.parametrizations.weight.original0.mul_(1.5)


def spectral_norm(model: Any) -> None:
    parametrizations.spectral_norm(output_of(model).dense)


def orthogonal(model: Any) -> None:
    parametrizations.orthogonal(attention_of(model).value)


def parametrized_bias(model: Any) -> None:
    nn.utils.parametrize.register_parametrization(attention_of(model).key, "bias", nn.Tanh())


def parametrized_norm(model: Any) -> None:
    nn.utils.parametrize.register_parametrization(output_of(model).LayerNorm, "weight", nn.Tanh())


def parametrized_words(model: Any) -> None:
    nn.utils.parametrize.register_parametrization(model.embeddings.word_embeddings, "weight", nn.Tanh())


def parametrized_positions(model: Any) -> None:
    nn.utils.parametrize.register_parametrization(model.embeddings.position_embeddings, "weight", nn.Tanh())


def old_weight_norm(model: Any) -> None:
    nn.utils.weight_norm(attention_of(model).query)


def old_spectral_norm(model: Any) -> None:
    nn.utils.spectral_norm(attention_of(model).query)
    attention_of(model).query.eval()


def pruned(model: Any) -> None:
    prune.l1_unstructured(output_of(model).dense, "weight", amount=0.5)


def pruned_for_good(model: Any) -> None:
    prune.random_unstructured(attention_of(model).key, "weight", amount=0.5)
    prune.remove(attention_of(model).key, "weight")


def half_a_layer(model: Any) -> None:
    output_of(model).dense.half()


def shared_parameters(model: Any) -> None:
    attention_of(model, 1).query.weight = attention_of(model, 0).key.weight


def weight_is_a_plain_tensor(model: Any) -> None:
    linear = output_of(model).dense
    weight = linear.weight.detach() * 1.5
    del linear.weight
    linear.weight = weight


def weight_is_a_buffer(model: Any) -> None:
    linear = attention_of(model).query
    weight = linear.weight.detach() * 1.5
    del linear.weight
    linear.register_buffer("weight", weight)


def bias_is_deleted(model: Any) -> None:
    del output_of(model).dense.bias


def weight_is_none(model: Any) -> None:
    output_of(model).dense.weight = None


def tensor_subclass(model: Any) -> None:
    linear = output_of(model).dense
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Tagged))


def weights_not_contiguous(model: Any) -> None:
    for linear in (attention_of(model).query, output_of(model).dense):
        linear.weight = nn.Parameter(linear.weight.detach().t().contiguous().t())


def weights_with_gaps(model: Any) -> None:
    linear = output_of(model).dense
    wide = linear.weight.new_zeros(linear.weight.shape[0], 2 * linear.weight.shape[1])
    wide[:, ::2] = linear.weight.detach()
    linear.weight = nn.Parameter(wide[:, ::2])


def weights_made_in_inference_mode(model: Any) -> None:
    with torch.inference_mode():
        for module in (attention_of(model).query, output_of(model).dense, output_of(model).LayerNorm):
            module.weight = nn.Parameter(module.weight * 1.5, requires_grad=False)


def sparse_weight(model: Any) -> None:
    linear = output_of(model).dense
    linear.weight = nn.Parameter(linear.weight.detach().to_sparse_csr(), requires_grad=False)


def embeddings_with_max_norm(model: Any) -> None:
    model.embeddings.word_embeddings.max_norm = 1.0


def more_words_than_it_says(model: Any) -> None:
    words = model.embeddings.word_embeddings
    words.weight = nn.Parameter(torch.cat([words.weight.detach(), words.weight.new_ones(5, words.embedding_dim)]))
    words.num_embeddings = 2


def frozen(model: Any) -> None:
    model.requires_grad_(False)


def on_the_meta_device(model: Any) -> None:
    model.to("meta")


def partly_on_the_meta_device(model: Any) -> None:
    output_of(model).dense.to("meta")


def offloaded(model: Any) -> None:
    from accelerate import cpu_offload

    cpu_offload(model, execution_device=torch.device("cpu"))


def offloaded_in_part(model: Any) -> None:
    from accelerate import cpu_offload

    cpu_offload(model.encoder.layer[0], execution_device=torch.device("cpu"))


def offloaded_linear_with_hook(model: Any) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    hook = AlignDevicesHook(execution_device="cpu", offload=True)
    add_hook_to_module(output_of(model).dense, hook)


def default_types_are_ones(model: Any) -> None:
    model.embeddings.token_type_ids.fill_(1)


def dtype_of_the_embeddings(model: Any) -> None:
    model.embeddings.word_embeddings.half()


def parameters_of_integers(model: Any) -> None:
    with torch.no_grad():
        output_of(model).dense.bias = nn.Parameter(torch.ones(model.config.hidden_size).long(), requires_grad=False)
