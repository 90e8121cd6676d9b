"""This module has kernels that sum token, position and segment embeddings, then apply LayerNorm, in one pass.

    out[t] = LayerNorm(word[input_ids[t]] + token_type[token_type_ids[t]] + position[position_ids[t]])
    for training: dropout of the result

Ids: (T,), int32 or int64. Tables: word (V, H), position (P, H), token_type (2, H); weight, ln_bias (H,); fp32 / bf16 /
fp16; out (T, H). Without input_ids, word = inputs_embeds, (T, H), holds the rows directly. Without a token_type table
(as in DistilBERT) its term and its ids are left out. The same holds without a position table (ModernBERT, Nomic and GTE
rotate queries and keys instead). ln_bias may be None. Arithmetic in float32, one rounding. Bytes moved: T * H elements
read (the small tables stay in cache), T * H written. A row's bits do not depend on the batch, as in layer_norm.py: its
sum is elementwise, and its LayerNorm is over a whole row.

Either the caller checks ids on the host before, or it passes `Notes`. With notes, the kernel replaces an id outside of
the table by the nearest row, and records the id. A word of the notes, int64, is 0, or holds the number of a batch in
its upper 32 bits and an outside id, cut to int32, in its lower ones. There is one word for input_ids, one for
token_type_ids and one for position_ids. They are in pinned memory, which the host reads without waiting.

For training, a separate kernel saves the data of the backward pass, as in layer_norm.py: the sum, rounded to the dtype
C of products, and the mean and 1 / sqrt(var + eps) of each row. If the tables are float32 and C is not, it can return
out in both dtypes. The backward pass is that of layer_norm_backward.py, then embedding_backward.py.

Source: Devlin et al., "BERT", 2018, arXiv:1810.04805, figure 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl

from fastbert_kernels import configs, launch, masks
from fastbert_kernels import dropout as drawing
from fastbert_kernels.jit import jit
from fastbert_kernels.layer_norm import drop_columns, load_bias, normalize_rows, quantize_normalized
from fastbert_kernels.masks import Dropout

# A caller's ids may start anywhere in memory, so there is no kernel specialised on their alignment.
IDS = ("input_ids_ptr", "token_type_ids_ptr", "position_ids_ptr")


@dataclass(frozen=True)
class Notes:
    """A `Notes` holds the memory in which a kernel records ids outside of their table, and the number of the batch.

    words: (4,) int64, visible to the kernel and the host; `samples.py` uses the fourth. batch: (2,) int64 on the
    device: a number that is added to `number`, and the number of rows of the batch; ids of later rows are not read, and
    count as 0. number: the number of the batch, from 1 on.
    """

    words: torch.Tensor
    batch: torch.Tensor
    number: int


@jit
def _within(ids, size, mask, word_ptr, number):
    """Moves ids, int64, into [0, size), and writes one that was outside, with the number of its batch, to the word."""
    outside = mask & ((ids < 0) | (ids >= size))
    low = tl.minimum(tl.maximum(ids, -2147483648), 2147483647) & 4294967295
    tl.store(word_ptr + tl.zeros_like(ids), (number << 32) | low, mask=outside)
    return tl.minimum(tl.maximum(ids, 0), size - 1)


@jit
def _summed_rows(
    input_ids_ptr,
    token_type_ids_ptr,
    position_ids_ptr,
    word_ptr,
    token_type_ptr,
    position_ptr,
    row_offs,
    row_mask,
    col_offs,
    mask,
    word_row_stride,
    token_type_row_stride,
    position_row_stride,
    words_ptr,
    number,
    n_words,
    n_token_types,
    n_positions,
    HAS_INPUT_IDS: tl.constexpr,
    HAS_TOKEN_TYPES: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    NOTED: tl.constexpr,
):
    """The sum of the tables' rows for the tokens row_offs, in float32; 0 outside of the mask.

    row_mask: where ids are read; they are 0 elsewhere.
    """
    if HAS_INPUT_IDS:
        word_rows = tl.load(input_ids_ptr + row_offs, mask=row_mask, other=0).to(tl.int64)
        if NOTED:
            word_rows = _within(word_rows, n_words, row_mask, words_ptr, number)
    else:
        word_rows = row_offs
    if HAS_POSITIONS:
        position_rows = tl.load(position_ids_ptr + row_offs, mask=row_mask, other=0).to(tl.int64)
        if NOTED:
            position_rows = _within(position_rows, n_positions, row_mask, words_ptr + 2, number)
        position_offs = position_rows[:, None] * position_row_stride + col_offs[None, :]

    word_offs = word_rows[:, None] * word_row_stride + col_offs[None, :]
    x = tl.load(word_ptr + word_offs, mask=mask, other=0.0).to(tl.float32)
    if HAS_TOKEN_TYPES:
        token_type_rows = tl.load(token_type_ids_ptr + row_offs, mask=row_mask, other=0).to(tl.int64)
        if NOTED:
            token_type_rows = _within(token_type_rows, n_token_types, row_mask, words_ptr + 1, number)
        token_type_offs = token_type_rows[:, None] * token_type_row_stride + col_offs[None, :]
        x += tl.load(token_type_ptr + token_type_offs, mask=mask, other=0.0).to(tl.float32)
    if HAS_POSITIONS:
        x += tl.load(position_ptr + position_offs, mask=mask, other=0.0).to(tl.float32)
    return x


@jit(do_not_specialize=["n_rows", "number"], do_not_specialize_on_alignment=IDS)
def _embedding_layer_norm_kernel(
    input_ids_ptr,  # (T,) or None
    token_type_ids_ptr,  # (T,) or None
    position_ids_ptr,  # (T,) or None
    word_ptr,  # (V, H), or (T, H) without input ids
    token_type_ptr,  # (2, H) or None
    position_ptr,  # (P, H) or None
    weight_ptr,  # (H,)
    ln_bias_ptr,  # (H,) or None
    out_ptr,  # (T, H)
    q_ptr,  # (T, H), 8-bit, where QUANTIZE
    q_scale_ptr,  # (T,)
    words_ptr,  # (4,) where NOTED, as `Notes` has it
    batch_ptr,  # (2,)
    number,
    n_rows,
    n_words,
    n_token_types,
    n_positions,
    word_row_stride,
    token_type_row_stride,
    position_row_stride,
    out_row_stride,
    eps,
    N_COLS: tl.constexpr,
    HAS_INPUT_IDS: tl.constexpr,
    HAS_TOKEN_TYPES: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    NOTED: tl.constexpr,
    QUANTIZE: tl.constexpr,
    INT8: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    row_offs = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask = row_offs < n_rows
    col_offs = tl.arange(0, BLOCK_COLS)
    col_mask = (col_offs < N_COLS)[None, :]
    mask = row_mask[:, None] & col_mask
    id_mask, batch = row_mask, 0
    if NOTED:
        id_mask = row_mask & (row_offs < tl.load(batch_ptr + 1))
        batch = tl.load(batch_ptr) + number

    x = _summed_rows(
        input_ids_ptr, token_type_ids_ptr, position_ids_ptr, word_ptr, token_type_ptr, position_ptr, row_offs, id_mask,
        col_offs, mask, word_row_stride, token_type_row_stride, position_row_stride, words_ptr, batch, n_words,
        n_token_types, n_positions, HAS_INPUT_IDS, HAS_TOKEN_TYPES, HAS_POSITIONS, NOTED,
    )  # fmt: skip

    weight = tl.load(weight_ptr + col_offs, mask=col_offs < N_COLS, other=0.0).to(tl.float32)
    ln_bias = load_bias(ln_bias_ptr, col_offs, N_COLS)
    normalized, _, _ = normalize_rows(x, col_mask, N_COLS, eps)
    out = normalized * weight[None, :] + ln_bias[None, :]

    out_offs = row_offs[:, None] * out_row_stride + col_offs[None, :]
    out = out.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + out_offs, out, mask=mask)
    if QUANTIZE:
        q, scale = quantize_normalized(out, INT8, BLOCK_ROWS, BLOCK_COLS)
        tl.store(q_ptr + row_offs[:, None] * N_COLS + col_offs[None, :], q, mask=mask)
        tl.store(q_scale_ptr + row_offs, scale, mask=row_mask)


@jit(do_not_specialize=["n_rows", *drawing.DO_NOT_SPECIALIZE], do_not_specialize_on_alignment=IDS)
def _embedding_norm_kernel(
    input_ids_ptr,  # (T,) or None
    token_type_ids_ptr,  # (T,) or None
    position_ids_ptr,  # (T,) or None
    word_ptr,  # (V, H), or (T, H) without input ids
    token_type_ptr,  # (2, H) or None
    position_ptr,  # (P, H) or None
    weight_ptr,  # (H,)
    ln_bias_ptr,  # (H,)
    out_ptr,  # (T, H) S
    low_ptr,  # (T, H) C, or None
    total_ptr,  # (T, H) C
    mean_ptr,  # (T,)
    rstd_ptr,  # (T,)
    n_rows,
    word_row_stride,
    token_type_row_stride,
    position_row_stride,
    eps,
    key_low,
    key_high,
    site,
    threshold,
    keep_scale,
    N_COLS: tl.constexpr,
    HAS_INPUT_IDS: tl.constexpr,
    HAS_TOKEN_TYPES: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    DROPOUT: tl.constexpr,
    LOW: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    row_offs = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask = row_offs < n_rows
    col_offs = tl.arange(0, BLOCK_COLS)
    col_mask = (col_offs < N_COLS)[None, :]
    mask = row_mask[:, None] & col_mask
    x = _summed_rows(
        input_ids_ptr, token_type_ids_ptr, position_ids_ptr, word_ptr, token_type_ptr, position_ptr, row_offs, row_mask,
        col_offs, mask, word_row_stride, token_type_row_stride, position_row_stride, None, 0, 0, 0, 0, HAS_INPUT_IDS,
        HAS_TOKEN_TYPES, HAS_POSITIONS, False,
    )  # fmt: skip

    normalized, mean, rstd = normalize_rows(x, col_mask, N_COLS, eps)
    weight = tl.load(weight_ptr + col_offs, mask=col_offs < N_COLS, other=0.0).to(tl.float32)
    ln_bias = tl.load(ln_bias_ptr + col_offs, mask=col_offs < N_COLS, other=0.0).to(tl.float32)
    out = normalized * weight[None, :] + ln_bias[None, :]
    if DROPOUT:
        out = drop_columns(out, row_offs, key_low, key_high, site, threshold, keep_scale, BLOCK_COLS)

    offs = row_offs[:, None] * N_COLS + col_offs[None, :]
    tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=mask)
    if LOW:
        tl.store(low_ptr + offs, out.to(low_ptr.dtype.element_ty), mask=mask)
    tl.store(total_ptr + offs, x.to(total_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + row_offs, mean, mask=row_mask)
    tl.store(rstd_ptr + row_offs, rstd, mask=row_mask)


def embedding_layer_norm_forward(
    input_ids: torch.Tensor | None,
    token_type_ids: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    word: torch.Tensor,
    token_type: torch.Tensor | None,
    position: torch.Tensor | None,
    weight: torch.Tensor,
    ln_bias: torch.Tensor | None,
    eps: float,
    quantized: tuple[torch.Tensor, torch.Tensor] | None = None,
    notes: Notes | None = None,
) -> torch.Tensor:
    """Embeds (T,) ids to (T, H) in the tables' dtype. Without input_ids, word is (T, H) and is read row by row.

    token_type None: no segments, for any token_type_ids; position None: no positions. ln_bias None: zeros. quantized:
    buffers for the same rows in 8 bits, as in `bias_residual_layer_norm_forward`. notes: the memory for ids outside of
    their table; without notes, the caller has checked the ids.
    """
    n_rows, n_cols = (word if input_ids is None else input_ids).shape[0], word.shape[1]
    out = launch.empty((n_rows, n_cols), like=word)
    if n_rows == 0:
        return out
    config = configs.rowwise_config(n_cols)
    # Grid: one program per BLOCK_ROWS tokens.
    launch.run(
        _embedding_layer_norm_kernel,
        (launch.cdiv(n_rows, config["BLOCK_ROWS"]),),
        config,
        input_ids_ptr=input_ids,
        token_type_ids_ptr=token_type_ids if token_type is not None else None,
        position_ids_ptr=position_ids if position is not None else None,
        word_ptr=word,
        token_type_ptr=token_type,
        position_ptr=position,
        weight_ptr=weight,
        ln_bias_ptr=ln_bias,
        out_ptr=out,
        q_ptr=quantized[0] if quantized is not None else None,
        q_scale_ptr=quantized[1] if quantized is not None else None,
        words_ptr=notes.words if notes is not None else None,
        batch_ptr=notes.batch if notes is not None else None,
        number=notes.number if notes is not None else 0,
        n_rows=n_rows,
        n_words=word.shape[0] if notes is not None else 0,
        n_token_types=token_type.shape[0] if notes is not None and token_type is not None else 0,
        n_positions=position.shape[0] if notes is not None and position is not None else 0,
        word_row_stride=word.stride(0),
        token_type_row_stride=token_type.stride(0) if token_type is not None else 0,
        position_row_stride=position.stride(0) if position is not None else 0,
        out_row_stride=out.stride(0),
        eps=eps,
        N_COLS=n_cols,
        HAS_INPUT_IDS=input_ids is not None,
        HAS_TOKEN_TYPES=token_type is not None,
        HAS_POSITIONS=position is not None,
        NOTED=notes is not None,
        QUANTIZE=quantized is not None,
        INT8=quantized is not None and quantized[0].dtype == torch.int8,
    )
    return out


def embedding_norm_forward(
    input_ids: torch.Tensor | None,
    token_type_ids: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    word: torch.Tensor,
    token_type: torch.Tensor | None,
    position: torch.Tensor | None,
    weight: torch.Tensor,
    ln_bias: torch.Tensor,
    eps: float,
    dropout: Dropout | None,
    dtype: torch.dtype,
    low: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes y = dropout(`embedding_layer_norm_forward`), and the data for its backward pass.

    Inputs are those of `embedding_layer_norm_forward`, with tables in S; dtype is C. Returns y in S; y rounded to C if
    `low` and C is not S, else None; the sum before the norm, rounded to C; and the mean and 1 / sqrt(variance + eps) of
    each row of the unrounded sum, (T,) float32.
    """
    n_rows, n_cols = (word if input_ids is None else input_ids).shape[0], word.shape[1]
    y, total = (launch.empty((n_rows, n_cols), like=word, dtype=d) for d in (word.dtype, dtype))
    y_low = launch.empty((n_rows, n_cols), like=word, dtype=dtype) if low and dtype != word.dtype else None
    mean, rstd = (launch.empty((n_rows,), like=word, dtype=torch.float32) for _ in range(2))
    if n_rows == 0:
        return y, y_low, total, mean, rstd
    config = configs.rowwise_config(max(n_cols, masks.GROUP))
    # Grid: one program per BLOCK_ROWS tokens.
    launch.run(
        _embedding_norm_kernel,
        (launch.cdiv(n_rows, config["BLOCK_ROWS"]),),
        config,
        input_ids_ptr=input_ids,
        token_type_ids_ptr=token_type_ids if token_type is not None else None,
        position_ids_ptr=position_ids if position is not None else None,
        word_ptr=word,
        token_type_ptr=token_type,
        position_ptr=position,
        weight_ptr=weight,
        ln_bias_ptr=ln_bias,
        out_ptr=y,
        low_ptr=y_low,
        total_ptr=total,
        mean_ptr=mean,
        rstd_ptr=rstd,
        n_rows=n_rows,
        word_row_stride=word.stride(0),
        token_type_row_stride=token_type.stride(0) if token_type is not None else 0,
        position_row_stride=position.stride(0) if position is not None else 0,
        eps=eps,
        N_COLS=n_cols,
        HAS_INPUT_IDS=input_ids is not None,
        HAS_TOKEN_TYPES=token_type is not None,
        HAS_POSITIONS=position is not None,
        DROPOUT=dropout is not None,
        LOW=y_low is not None,
        **(drawing.NONE if dropout is None else drawing.arguments(dropout)),
    )
    return y, y_low, total, mean, rstd
