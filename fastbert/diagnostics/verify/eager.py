"""BERT in plain PyTorch, beside which `verify` puts the model.

It is padded and runs op by op in the dtype of its parameters, as one would write it without this library.
B sequences, S the longest, H hidden, N heads, D head size, L layers, I intermediate.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import reference
from fastbert.checkpoint.activations import ACTIVATIONS, activate
from fastbert.checkpoint.config import BertConfig


def eager_bert(
    parameters: Mapping[str, Tensor], config: BertConfig, input_ids: Tensor, mask: Tensor, token_type_ids: Tensor
) -> list[Tensor]:
    """The L + 1 hidden states, (B, S, H), then the pooled output, (B, 1, H), in the dtype of the parameters.

    Hidden states at padding have no meaning. This is not `reference.bert` in that dtype, which rounds inside its ops
    too: in bf16 its error is 1.6 times as large.
    """
    table = "embeddings.{}_embeddings.weight".format
    x = F.embedding(input_ids, parameters[table("word")])
    if table("token_type") in parameters:
        x = x + F.embedding(token_type_ids, parameters[table("token_type")])
    positions = reference.default_positions(config, input_ids, input_ids.shape, input_ids.device)
    x = _norm(parameters, config, "embeddings", x + F.embedding(positions, parameters[table("position")]))
    projected = "embeddings_project.weight" in parameters
    states = [_linear(parameters, "embeddings_project", x) if projected else x]
    for i in range(config.num_hidden_layers):
        states.append(eager_layer(parameters, config, i, states[-1], mask))
    if "pooler.dense.weight" in parameters:
        states.append(eager_pooler(parameters, states[-1], mask))
    return states


def _linear(parameters: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, parameters[f"{name}.weight"].to(x.dtype), parameters[f"{name}.bias"].to(x.dtype))


def _norm(parameters: Mapping[str, Tensor], config: BertConfig, name: str, x: Tensor) -> Tensor:
    weight, bias = (parameters[f"{name}.LayerNorm.{suffix}"].to(x.dtype) for suffix in ("weight", "bias"))
    return F.layer_norm(x, x.shape[-1:], weight, bias, config.layer_norm_eps)


def eager_layer(parameters: Mapping[str, Tensor], config: BertConfig, i: int, x: Tensor, mask: Tensor) -> Tensor:
    """The output of layer i for x, (B, S, H), in the dtype of x. mask: (B, S), 0 at padding."""
    activation = ACTIVATIONS[config.hidden_act]
    layer = f"encoder.layer.{i}"
    q, k, v = (
        _linear(parameters, f"{layer}.attention.self.{name}", x)
        .unflatten(-1, (config.num_attention_heads, -1))
        .transpose(1, 2)
        for name in ("query", "key", "value")
    )  # (B, N, S, D)
    padding = (mask == 0)[:, None, None, :]  # (B, 1, 1, S)
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(padding, torch.finfo(x.dtype).min)
    context = (torch.softmax(scores, dim=-1) @ v).transpose(1, 2).flatten(2)  # (B, S, H)
    out = f"{layer}.attention.output"
    x = _norm(parameters, config, out, _linear(parameters, f"{out}.dense", context) + x)
    inner = _linear(parameters, f"{layer}.intermediate.dense", x)  # (B, S, I)
    inner = activate(inner, activation)
    return _norm(parameters, config, f"{layer}.output", _linear(parameters, f"{layer}.output.dense", inner) + x)


def eager_pooler(parameters: Mapping[str, Tensor], x: Tensor, mask: Tensor) -> Tensor:
    """The pooled output: (B, S, H) -> (B, 1, H)."""
    first = x[:, :1] * mask[:, :1, None].to(x.dtype)  # zeros in a row without tokens
    return torch.tanh(_linear(parameters, "pooler.dense", first))
