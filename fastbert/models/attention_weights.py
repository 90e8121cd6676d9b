"""Plain PyTorch computes attention weights on request (`output_attentions`), since fused kernels keep none."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor, nn

from fastbert import ops, reference
from fastbert.engine.launched import ATTENTIONS
from fastbert.engine.listeners import listened
from fastbert.models import hooks
from fastbert.models.encoded import Encoded
from fastbert.models.inputs import Inputs
from fastbert.ops import disentangled, packing
from fastbert.ops.disentangled import Positions
from fastbert.ops.packing import PackedBatch
from fastbert.ops.position_bias import expand
from fastbert.ops.window import near

logger = logging.getLogger("fastbert")

PLAN = ATTENTIONS


def attend(
    qkv: Tensor,
    batch: PackedBatch,
    num_heads: int,
    dropout_p: float,
    position_bias: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    positions: Positions | None = None,
) -> Tensor:
    """Computes attention in plain PyTorch, (T, 3H) -> (T, H), and adds its weights (B, N, S, S) to the batch's.

    The weights are zeros at rows of padding. position_bias: (N, 2R + 1); window and scale as in `ops.varlen_attention`,
    and positions as in `ops.disentangled_attention`.
    """
    view = hooks.padded_view(batch)
    q, k, v = packing.pad(qkv, view).unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, N, S, D)
    token = packing.pad(torch.ones_like(qkv[:, 0], dtype=torch.bool), view)  # (B, S)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = (q @ k.transpose(-1, -2)) * scale
    columns, seen = torch.arange(batch.padded_length, device=qkv.device), token[:, None, None]
    if position_bias is not None:
        scores = scores + expand(position_bias, columns).to(scores.dtype)
    if positions is not None:
        scores = scores + disentangled.bias(q, k, positions, columns, scale)
    if window is not None:
        seen = seen & near(columns, columns, window)
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1) * token[:, None, :, None]
    batch.plan(PLAN, list).append(weights)
    kept = nn.functional.dropout(weights, dropout_p)
    return packing.pack((kept @ v).transpose(1, 2).flatten(2), view)


def accept_reference(policy: ops.Policy) -> None:
    """Raises BackendError if only a fused kernel may run; else logs once that plain PyTorch runs."""
    reason = "fused attention does not store the probabilities"
    if policy.strict:
        raise ops.BackendError(
            f"output_attentions: the backend {policy.backend!r} cannot give them, and strict=True: {reason}"
        )
    _log_reference(policy.backend, reason)


@functools.cache
def _log_reference(backend: str, reason: str) -> None:
    logger.warning("output_attentions: backend %r falls back to 'reference': %s", backend, reason)


def is_altered(model: Any) -> bool:
    """Tells whether a module of the encoder is an adapter or has hooks, so that its parameters alone do not describe
    it.
    """
    parts: Any = model.embeddings, model.embeddings_project, model.encoder
    modules = (module for part in parts if part is not None for module in part.modules())
    return any(type(module) not in model.own_modules or listened(module) for module in modules)


def encode_by_reference(model: Any, batch: PackedBatch, inputs: Inputs, keep_states: bool) -> Encoded:
    """Runs the encoder by the reference on padded inputs, in the model's dtype."""
    config = model.config
    if model.training and (config.hidden_dropout_prob or config.attention_probs_dropout_prob):
        logger.warning("output_attentions takes the reference path, which applies no dropout")
    result = reference.encode(
        dict(model.named_parameters(remove_duplicate=False)), config, *inputs.tensors(), dtype=model.dtype
    )
    states = [packing.pack(state, batch) for state in result.hidden_states]
    return Encoded(batch, states[-1], states if keep_states else None, result.attentions)
