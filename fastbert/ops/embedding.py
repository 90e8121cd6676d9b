"""This module holds the embedding operation: token + position + segment embedding, LayerNorm, dropout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from fastbert.ops import dispatch, noting, recording, tracing
from fastbert.ops import dropout as masks
from fastbert.ops.dispatch import AUTO, Policy
from fastbert.ops.dropout import Drop, mask_of, probability_of
from fastbert.ops.library import register
from fastbert.ops.tracing import untraced
from fastbert.ops.training import choose
from fastbert.ops.training.embedding import embedding
from fastbert.ops.training.kernels import EmbeddingSettings
from fastbert.ops.training.plain import sum_of_rows
from fastbert_kernels import cpu

KERNELS = {
    "triton": "fastbert_kernels.embedding",
    "torch": "torch.nn.functional.embedding, add, torch.nn.functional.layer_norm",
}


def _eager(
    input_ids: torch.Tensor | None,
    token_type_ids: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    word: torch.Tensor,
    token_type: torch.Tensor | None,
    position: torch.Tensor | None,
    weight: torch.Tensor,
    ln_bias: torch.Tensor | None,
    eps: float,
    padding_idx: int | None,
) -> torch.Tensor:
    settings = EmbeddingSettings(input_ids, token_type_ids, position_ids, eps, padding_idx, None)
    x = sum_of_rows(word, token_type, position, settings)
    return F.layer_norm(x, (tracing.length_of(weight),), weight, ln_bias, eps)


def _kernel(
    input_ids: torch.Tensor | None,
    token_type_ids: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    word: torch.Tensor,
    token_type: torch.Tensor | None,
    position: torch.Tensor | None,
    weight: torch.Tensor,
    ln_bias: torch.Tensor | None,
    eps: float,
    padding_idx: int | None,
    quantized: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    from fastbert_kernels.embedding import embedding_layer_norm_forward

    word = word if word.stride(-1) == 1 else word.contiguous()
    token_type, position = (t if t is None or t.stride(-1) == 1 else t.contiguous() for t in (token_type, position))
    if input_ids is None and word.data_ptr() % 16:
        # The width of the loads decides the order of LayerNorm's sums. It must not depend on where the rows begin.
        word = word.clone()
    return embedding_layer_norm_forward(
        None if input_ids is None else input_ids.contiguous(),
        None if token_type_ids is None else token_type_ids.contiguous(),
        None if position_ids is None else position_ids.contiguous(),
        word,
        token_type,
        position,
        weight,
        ln_bias,
        eps,
        quantized,
        noting.current(),
    )


register(
    "embedding_layer_norm(Tensor? input_ids, Tensor? token_type_ids, Tensor? position_ids, Tensor word, "
    "Tensor? token_type, Tensor? position, Tensor weight, Tensor? ln_bias, float eps, int? padding_idx) -> Tensor",
    kernel=_kernel,
    eager=_eager,
    fake=lambda input_ids, token_type_ids, position_ids, word, *rest: word.new_empty(
        (word if input_ids is None else input_ids).shape[0], word.shape[1]
    ),
)


def triton_obstacle(hidden_size: int, *tensors: torch.Tensor | None) -> str | None:
    """Tells why the triton backend cannot run this call, or returns None."""
    return dispatch.dtype_obstacle(*tensors) or dispatch.hidden_size_obstacle(hidden_size)


def embedding_layer_norm(
    input_ids: torch.Tensor | None,
    token_type_ids: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    word: torch.Tensor,
    token_type: torch.Tensor | None,
    position: torch.Tensor | None,
    weight: torch.Tensor,
    ln_bias: torch.Tensor | None,
    eps: float,
    *,
    inputs_embeds: torch.Tensor | None = None,
    padding_idx: int | None = None,
    dropout: Drop = None,
    policy: Policy = AUTO,
) -> torch.Tensor:
    """Computes dropout(LayerNorm(word[input_ids] + token_type[token_type_ids] + position[position_ids])).

    Ids: (T,), int32 or int64. Either `check_ids` has compared them with the tables, or the kernel checks them (inside
    of `noting`). Tables: word (V, H), token_type (types, H), position (P, H); weight, ln_bias: (H,). inputs_embeds, (T,
    H), replaces word[input_ids] if input_ids is None. token_type and token_type_ids, position and position_ids, and
    ln_bias may be None: then this term is missing. padding_idx: the id whose row of word gets no gradient. Returns (T,
    H) in the tables' dtype.
    """
    hidden_size, dropout_p = word.shape[1], probability_of(dropout)
    if (token_type is None) != (token_type_ids is None):
        raise ValueError("token_type, token_type_ids: expected both or neither")
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("input_ids, inputs_embeds: expected exactly one of the two")
    if (position is None) != (position_ids is None):
        raise ValueError("position, position_ids: expected both or neither")
    first: Any = next(t for t in (position_ids, input_ids, inputs_embeds) if t is not None)
    n_tokens = first.shape[0]
    if inputs_embeds is not None and tracing.differ(inputs_embeds.shape, (n_tokens, hidden_size)):
        shape, expected = tuple(inputs_embeds.shape), (n_tokens, hidden_size)
        raise ValueError(f"inputs_embeds: expected shape {expected}, got {shape}")
    words = word if inputs_embeds is None else inputs_embeds
    trained = choose.wanted(policy, dropout, words, token_type, position, weight, ln_bias)
    trained = trained and all(p is None or p.dtype == words.dtype for p in (position, weight, ln_bias))
    if trained:
        obstacle = choose.triton_obstacle(words.dtype, hidden_size=hidden_size)
    else:
        obstacle = triton_obstacle(hidden_size, words, token_type, position, weight, ln_bias)
    run = _eager
    backend = dispatch.choose("embedding", policy.backend, policy.strict, words.device, obstacle)
    if backend == "triton":
        run = torch.ops.fastbert.embedding_layer_norm
    else:  # PyTorch on CPUs computes each row alone: see layer_norm
        dispatch.check_invariant("embedding", policy, backend, dispatch.training_obstacle(dropout_p))
    shape = n_tokens, hidden_size
    if recording.on and recording.note("embedding", backend, None, shape, words.dtype):
        return words.new_zeros(shape)
    trained = trained and not (backend == "cpu" and position is None)  # the C++ kernel reads a table of positions
    kernels = choose.kernels_of(backend, words.dtype, hidden_size=hidden_size) if trained else None
    if kernels is not None:
        ids: list[Any] = [
            None if t is None else t.long().contiguous() for t in (input_ids, token_type_ids, position_ids)
        ]
        ln_bias = torch.zeros_like(weight) if ln_bias is None else ln_bias
        settings = EmbeddingSettings(ids[0], ids[1], ids[2], eps, padding_idx, mask_of(dropout))
        tables: list[Any] = [
            t if t is None or t.stride(-1) == 1 else t.contiguous() for t in (words, token_type, position)
        ]
        return embedding(tables[0], tables[1], tables[2], weight, ln_bias, settings, kernels)
    out = run(input_ids, token_type_ids, position_ids, words, token_type, position, weight, ln_bias, eps, padding_idx)
    return masks.apply(out, dropout)


def seen_within(ids: Sequence[torch.Tensor | None], sizes: Sequence[int]) -> bool:
    """Tells whether the C++ kernel for CPUs has found all ids inside tables of these sizes.

    If it returns False, `check_ids` decides.
    """
    if tracing.observed(*ids) is not None or cpu.obstacle() is not None:
        return False
    return all(map(_is_seen_within, ids, sizes))


def _is_seen_within(ids: torch.Tensor | None, size: int) -> bool:
    if ids is None:
        return True
    return ids.is_cpu and ids.dtype is torch.int64 and ids.is_contiguous() and not cpu.ids_outside(ids, size)


@untraced
def check_ids(**ids: tuple[torch.Tensor | None, int]) -> None:
    """Raises IndexError if an id is outside its table; name=(ids, table size). One read checks all.

    Raises TypeError for ids that are not integers. An exported, traced or transformed program does not check values.
    """
    tensors = []
    for name, (tensor, _) in ids.items():
        if tensor is not None:
            if tensor.dtype not in (torch.int64, torch.int32):
                raise TypeError(f"{name}: expected dtype int64 or int32, got {tensor.dtype}")
            tensors.append(tensor)
    if torch.compiler.is_exporting():
        return
    if seen_within(tensors, [size for tensor, size in ids.values() if tensor is not None]):
        return
    if tracing.transformed(*tensors) is not None:
        return
    present = {name: (tensor, size) for name, (tensor, size) in ids.items() if tensor is not None and tensor.numel()}
    if not present:
        return
    bounds = torch.stack([end.long() for t, _ in present.values() for end in t.aminmax()]).tolist()
    for i, (name, (_, size)) in enumerate(present.items()):
        low, high = bounds[2 * i], bounds[2 * i + 1]
        if low < 0 or high >= size:
            raise IndexError(f"{name}: expected values from 0 to {size - 1}, got {low if low < 0 else high}")
