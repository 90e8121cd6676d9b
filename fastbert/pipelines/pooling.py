"""Pooling, and the modules of a pipeline after it, compute sentence vectors from token vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert import ops
from fastbert.ops import packing
from fastbert.pipelines.modules import Normalize, apply
from fastbert.pipelines.pipeline import POOLING_MODES, Pipeline


def sentence_vectors(
    pipeline: Pipeline,
    hidden: Tensor,
    batch: packing.PackedBatch,
    *,
    n_prompt_tokens: int = 0,
    normalize: bool = False,
    truncate_dim: int | None = None,
) -> Tensor:
    """Returns the vectors of a packed batch: hidden (T, H) -> (B, dim), in float32 at least.

    n_prompt_tokens: tokens at the start of each text that are left out. normalize: whether to normalise even if no
    module does so, after the cut to truncate_dim.
    """
    pooling, tail = pipeline.pooling, pipeline.tail
    assert pooling is not None, "a pipeline with a head has no vectors"
    cu_seqlens = batch.cu_seqlens
    if n_prompt_tokens:
        lengths = (batch.cu_seqlens_cpu.diff() - n_prompt_tokens).clamp(min=0)
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        cu_seqlens = packing.to_device(offsets, hidden.device)
        hidden = hidden[batch.position_ids >= n_prompt_tokens]
    if normalize and truncate_dim is None:
        tail, normalize = (*tail, Normalize()), False
    # The weights of a weighted mean count from the prompt's first token, so they cannot be fused with the
    # normalisation.
    reweighted = n_prompt_tokens > 0 and "weightedmean" in pooling.modes
    fused = len(pooling.modes) == 1 and bool(tail) and isinstance(tail[0], Normalize) and not reweighted
    dtype, policy = torch.promote_types(hidden.dtype, torch.float32), pipeline.model.policy
    pooled = [
        ops.pool(hidden, cu_seqlens, POOLING_MODES[mode], normalize=fused, out_dtype=dtype, policy=policy)
        for mode in pooling.modes
    ]
    if reweighted:
        # For n tokens after p tokens of the prompt, the weights are p + 1, p + 2, ..., which sum to n (p + (n + 1) /
        # 2).
        half = (cu_seqlens.diff().to(dtype)[:, None] + 1) / 2
        mean = ops.pool(hidden, cu_seqlens, "mean", out_dtype=dtype, policy=policy)
        for place, mode in enumerate(pooling.modes):
            if mode == "weightedmean":
                pooled[place] = (n_prompt_tokens * mean + half * pooled[place]) / (n_prompt_tokens + half)
    vectors = pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=1)
    for module in tail[1:] if fused else tail:
        vectors = apply(module, vectors, policy)
    if truncate_dim is not None:
        vectors = vectors[:, :truncate_dim]
    return apply(Normalize(), vectors, policy) if normalize else vectors


def vectors_of_padded(pipeline: Pipeline, hidden: Tensor, mask: Tensor | None, n_prompt_tokens: int) -> Tensor:
    """Returns the vectors of a padded batch: hidden (B, S, H), mask (B, S) or None -> (B, dim)."""
    mask = torch.ones(hidden.shape[:2], dtype=torch.int64, device=hidden.device) if mask is None else mask
    batch = packing.from_lengths((mask != 0).sum(1).tolist(), hidden.device)
    return sentence_vectors(pipeline, hidden[mask != 0], batch, n_prompt_tokens=n_prompt_tokens)
