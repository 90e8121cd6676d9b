"""This kernel sums token, position and segment embeddings, then applies LayerNorm, in one pass.

    out[t] = LayerNorm(word[input_ids[t]] + token_type[token_type_ids[t]] + position[position_ids[t]])

Ids: (T,), int32 or int64. Tables: word (V, H), position (P, H), token_type (2, H); weight, ln_bias (H,);
fp32 / bf16 / fp16; out (T, H). Without input_ids the word rows are given directly as word = inputs_embeds (T, H);
without a token_type table (DistilBERT has none) its term and its ids are left out.
Arithmetic in float32, one rounding. Bytes moved: T * H elements read (the small tables stay in cache), T * H written.
Ids are not checked here; a caller checks them on the host before. A row's bits do not depend on the batch, as in
layer_norm.py: its sum is elementwise, and its LayerNorm that of a whole row.

Source: Devlin et al., "BERT", 2018, arXiv:1810.04805, figure 2.
"""

from __future__ import annotations

import torch
import triton.language as tl

from fastbert_kernels import configs, launch
from fastbert_kernels.jit import jit
from fastbert_kernels.layer_norm import normalize_rows, quantize_normalized

# A caller's ids may start anywhere in memory: no kernel of its own for those that start at a multiple of 16 bytes.
IDS = ("input_ids_ptr", "token_type_ids_ptr", "position_ids_ptr")


@jit(do_not_specialize=["n_rows"], do_not_specialize_on_alignment=IDS)
def _embedding_layer_norm_kernel(
    input_ids_ptr,  # (T,) or None
    token_type_ids_ptr,  # (T,) or None
    position_ids_ptr,  # (T,)
    word_ptr,  # (V, H), or (T, H) without input ids
    token_type_ptr,  # (2, H) or None
    position_ptr,  # (P, H)
    weight_ptr,  # (H,)
    ln_bias_ptr,  # (H,)
    out_ptr,  # (T, H)
    q_ptr,  # (T, H), 8-bit, where QUANTIZE
    q_scale_ptr,  # (T,)
    n_rows,
    word_row_stride,
    token_type_row_stride,
    position_row_stride,
    out_row_stride,
    eps,
    N_COLS: tl.constexpr,
    HAS_INPUT_IDS: tl.constexpr,
    HAS_TOKEN_TYPES: tl.constexpr,
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

    if HAS_INPUT_IDS:
        word_rows = tl.load(input_ids_ptr + row_offs, mask=row_mask, other=0).to(tl.int64)
    else:
        word_rows = row_offs
    position_rows = tl.load(position_ids_ptr + row_offs, mask=row_mask, other=0).to(tl.int64)

    word_offs = word_rows[:, None] * word_row_stride + col_offs[None, :]
    position_offs = position_rows[:, None] * position_row_stride + col_offs[None, :]
    x = tl.load(word_ptr + word_offs, mask=mask, other=0.0).to(tl.float32)
    if HAS_TOKEN_TYPES:
        token_type_rows = tl.load(token_type_ids_ptr + row_offs, mask=row_mask, other=0).to(tl.int64)
        token_type_offs = token_type_rows[:, None] * token_type_row_stride + col_offs[None, :]
        x += tl.load(token_type_ptr + token_type_offs, mask=mask, other=0.0).to(tl.float32)
    x += tl.load(position_ptr + position_offs, mask=mask, other=0.0).to(tl.float32)

    weight = tl.load(weight_ptr + col_offs, mask=col_offs < N_COLS, other=0.0).to(tl.float32)
    ln_bias = tl.load(ln_bias_ptr + col_offs, mask=col_offs < N_COLS, other=0.0).to(tl.float32)
    normalized, _, _ = normalize_rows(x, col_mask, N_COLS, eps)
    out = normalized * weight[None, :] + ln_bias[None, :]

    out_offs = row_offs[:, None] * out_row_stride + col_offs[None, :]
    out = out.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + out_offs, out, mask=mask)
    if QUANTIZE:
        q, scale = quantize_normalized(out, INT8, BLOCK_ROWS, BLOCK_COLS)
        tl.store(q_ptr + row_offs[:, None] * N_COLS + col_offs[None, :], q, mask=mask)
        tl.store(q_scale_ptr + row_offs, scale, mask=row_mask)


def embedding_layer_norm_forward(
    input_ids: torch.Tensor | None,
    token_type_ids: torch.Tensor | None,
    position_ids: torch.Tensor,
    word: torch.Tensor,
    token_type: torch.Tensor | None,
    position: torch.Tensor,
    weight: torch.Tensor,
    ln_bias: torch.Tensor,
    eps: float,
    quantized: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Embeds (T,) ids to (T, H) in the tables' dtype. Without input_ids, word is (T, H) and taken row by row.

    token_type None: no segments, whatever token_type_ids says.
    quantized: buffers to fill with the same rows in 8 bits, as for `bias_residual_layer_norm_forward`.
    """
    n_rows, n_cols = position_ids.shape[0], word.shape[1]
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
        position_ids_ptr=position_ids,
        word_ptr=word,
        token_type_ptr=token_type,
        position_ptr=position,
        weight_ptr=weight,
        ln_bias_ptr=ln_bias,
        out_ptr=out,
        q_ptr=quantized[0] if quantized is not None else None,
        q_scale_ptr=quantized[1] if quantized is not None else None,
        n_rows=n_rows,
        word_row_stride=word.stride(0),
        token_type_row_stride=token_type.stride(0) if token_type is not None else 0,
        position_row_stride=position.stride(0),
        out_row_stride=out.stride(0),
        eps=eps,
        N_COLS=n_cols,
        HAS_INPUT_IDS=input_ids is not None,
        HAS_TOKEN_TYPES=token_type is not None,
        QUANTIZE=quantized is not None,
        INT8=quantized is not None and quantized[0].dtype == torch.int8,
    )
    return out
