"""This kernel computes bidirectional attention over packed sequences in one pass (flash attention).

    out[i] = sum_j softmax_j(scale * q[i] . k[j] + bias[i, j]) v[j],    j over the tokens of i's own sequence

q, k, v, out: (T, N, D), fp32 / bf16 / fp16, D from 16 to 128. Scores, softmax and accumulator are float32; the
probabilities are rounded to the input dtype for the second product. FLOPs: 4 * N * D * sum_b len_b^2; bytes moved at
least 4 * T * N * D elements.

A tile of BLOCK_Q query rows holds either a slice of one long sequence or several whole short ones, masked
block-diagonally. A list of tiles, made once a batch, defines the rows of each tile: see `work_list`. A program computes
one tile for one head. Heads come first in the grid. So tiles with the most keys start first in all heads, and the empty
tiles at the end of a list of fixed length start last.

A tile of several sequences multiplies all its rows by all its keys before masking, so a NaN or infinity in one sequence
can reach the sequences that share its tile.

If no tile is shared (`share=False` in the work list), a row's bits do not depend on the other sequences. The row has
the same place in its tile in any batch. Its keys are in the same blocks, counted from the first key of its sequence,
with the same mask. In a shared tile the blocks begin at the first key of another sequence, so sums are split elsewhere.
Without sharing, sequences much shorter than BLOCK_Q have a separate list (`short_list`), with tiles of 16 rows and all
their keys in one block. Only a sequence's own length decides its list.

Within a window (attention_window.py), a tile reads the keys that some of its queries reach, and each block has a mask.
Blocks then begin `window` keys before the tile's first query. This, too, depends only on the sequence.

Source: Dao, "FlashAttention-2", 2023, arXiv:2307.08691; online softmax after Milakov and Gimelshein, arXiv:1805.02867.
"""

from __future__ import annotations

import torch
import triton.language as tl

from fastbert_kernels import attention_bias as biases
from fastbert_kernels import attention_specialized, configs, launch
from fastbert_kernels import attention_window as windows
from fastbert_kernels import dropout as drawing
from fastbert_kernels.attention_bias import PositionBias, bias_of
from fastbert_kernels.attention_tiles import COLUMNS, LOG2_E, LOWEST, load_tile, row_ranges
from fastbert_kernels.attention_window import Window, keys_in_reach, reach_of_rows
from fastbert_kernels.dropout import GROUP, keep_bits, keep_bits_from, spread_columns
from fastbert_kernels.jit import jit
from fastbert_kernels.masks import Dropout
from fastbert_kernels.quantize import quantize_rows
from fastbert_kernels.work_list import WorkList

LN_2 = tl.constexpr(0.6931471805599453)
MAX_TILES = 65_532  # The most of a launch: 65,535 rounded down, so that all parts of a list have the same alignment.


@jit
def keep_probabilities(
    block_start,  # the first of the keys
    rows,  # (BLOCK_Q,) packed rows
    row_first_key,  # (BLOCK_Q,)
    first_key,  # the first key of the tile
    head,
    mask_key,  # (key_low, key_high, site, threshold)
    shared,  # whether the tile is of several sequences
    BLOCK_K: tl.constexpr,
):
    """Draws the mask (BLOCK_Q, BLOCK_K), which `spread_columns` takes.

    A key's column is its place in its sequence. In a tile of several sequences, a row's columns may begin in a group.
    """
    N_GROUPS: tl.constexpr = min(4, BLOCK_K // GROUP)
    offs = tl.arange(0, BLOCK_K // GROUP).reshape(BLOCK_K // GROUP // N_GROUPS, N_GROUPS) * GROUP
    offs, rows = offs[None, :, :], rows[:, None, None]
    if shared:
        bits = keep_bits_from(block_start - row_first_key[:, None, None] + offs, rows, head, *mask_key)
    else:
        bits = keep_bits((block_start - first_key + offs) // GROUP, rows, head, *mask_key)
    return bits


@jit
def _attend(
    q,  # (BLOCK_Q, BLOCK_D)
    k_block_ptr,  # (BLOCK_D, BLOCK_K) pointers to keys 0 to BLOCK_K - 1 of the batch
    v_block_ptr,  # (BLOCK_K, BLOCK_D)
    key_start,
    key_end,
    row_first_key,  # (BLOCK_Q,) first key that each row sees
    row_end_key,  # (BLOCK_Q,)
    row_text_key,  # (BLOCK_Q,) first key of each row's sequence, where DROPOUT
    kv_row_stride,
    scale_log2,
    d_mask,  # (BLOCK_D,)
    acc,  # (BLOCK_Q, BLOCK_D) float32
    row_sum,  # (BLOCK_Q,) float32
    row_max,  # (BLOCK_Q,) float32, of the scores times scale_log2
    rows,  # (BLOCK_Q,) packed rows
    text_key,  # the first key of the tile's sequences
    shared,  # whether the tile is of several sequences
    head,
    mask_key,  # (key_low, key_high, site, threshold) where DROPOUT
    bias,  # (bias_ptr, columns_ptr, bias_radius, bias_scale, end_row) where BIASED
    BIASED: tl.constexpr,
    HOLES: tl.constexpr,
    DROPOUT: tl.constexpr,
    MASKED: tl.constexpr,
    PADDED_D: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Folds the keys [key_start, key_end) into the running softmax. Unless MASKED, that is a whole number of blocks."""
    k_ptrs = k_block_ptr + key_start.to(tl.int64) * kv_row_stride
    v_ptrs = v_block_ptr + key_start.to(tl.int64) * kv_row_stride
    for block_start in range(key_start, key_end, BLOCK_K):
        keys = block_start + tl.arange(0, BLOCK_K)
        if MASKED:
            key_mask = keys < key_end
            k = tl.load(k_ptrs, mask=d_mask[:, None] & key_mask[None, :], other=0.0)
            v = tl.load(v_ptrs, mask=key_mask[:, None] & d_mask[None, :], other=0.0)
        elif PADDED_D:
            k = tl.load(k_ptrs, mask=d_mask[:, None], other=0.0)
            v = tl.load(v_ptrs, mask=d_mask[None, :], other=0.0)
        else:
            k = tl.load(k_ptrs)
            v = tl.load(v_ptrs)

        if DROPOUT:
            bits = keep_probabilities(
                block_start, rows, row_text_key, text_key, head, mask_key, MASKED and shared, BLOCK_K
            )
        scores = tl.dot(q, k, input_precision=INPUT_PRECISION)  # (BLOCK_Q, BLOCK_K)
        if BIASED:
            own_rows, own_keys = (rows < bias[4])[:, None], (keys < key_end)[None, :]
            scores += bias_of(rows[:, None], keys[None, :], own_rows, own_keys, head, bias, HOLES)
        if MASKED:
            own = (keys[None, :] >= row_first_key[:, None]) & (keys[None, :] < row_end_key[:, None])
            scores = tl.where(own, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, axis=1) * scale_log2)
        p = tl.exp2(scores * scale_log2 - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(p, axis=1)
        if DROPOUT:
            p = tl.where(spread_columns(bits), p, 0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=INPUT_PRECISION)
        row_max = new_max
        k_ptrs += BLOCK_K * kv_row_stride
        v_ptrs += BLOCK_K * kv_row_stride
    return acc, row_sum, row_max


@jit
def _attend_once(
    q,  # (BLOCK_Q, BLOCK_D)
    k_block_ptr,  # (BLOCK_D, BLOCK_K)
    v_block_ptr,  # (BLOCK_K, BLOCK_D)
    key_start,
    key_end,
    row_first_key,  # (BLOCK_Q,)
    row_end_key,  # (BLOCK_Q,)
    kv_row_stride,
    scale_log2,
    d_mask,  # (BLOCK_D,)
    rows,  # (BLOCK_Q,)
    text_key,
    head,
    mask_key,
    bias,
    BIASED: tl.constexpr,
    HOLES: tl.constexpr,
    DROPOUT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`_attend` of all keys, which are in one block: the same bits, without a running maximum and what it rescales."""
    keys = key_start + tl.arange(0, BLOCK_K)
    key_mask = keys < key_end
    start = key_start.to(tl.int64) * kv_row_stride
    k = tl.load(k_block_ptr + start, mask=d_mask[:, None] & key_mask[None, :], other=0.0)
    v = tl.load(v_block_ptr + start, mask=key_mask[:, None] & d_mask[None, :], other=0.0)
    scores = tl.dot(q, k, input_precision=INPUT_PRECISION)
    if BIASED:
        own_rows = (rows < bias[4])[:, None]
        scores += bias_of(rows[:, None], keys[None, :], own_rows, key_mask[None, :], head, bias, HOLES)
    own = (keys[None, :] >= row_first_key[:, None]) & (keys[None, :] < row_end_key[:, None])
    scores = tl.where(own, scores, float("-inf"))
    row_max = tl.maximum(tl.max(scores, axis=1) * scale_log2, LOWEST)
    p = tl.exp2(scores * scale_log2 - row_max[:, None])
    kept = p
    if DROPOUT:
        bits = keep_probabilities(key_start, rows, rows, text_key, head, mask_key, False, BLOCK_K)
        kept = tl.where(spread_columns(bits), p, 0.0)
    return tl.dot(kept.to(v.dtype), v, input_precision=INPUT_PRECISION), tl.sum(p, axis=1), row_max


@jit(
    do_not_specialize=[
        "lse_head_stride", *drawing.DO_NOT_SPECIALIZE, *biases.DO_NOT_SPECIALIZE, *windows.DO_NOT_SPECIALIZE
    ]
)  # fmt: skip
def _varlen_attention_kernel(
    q_ptr,  # (T, N, D)
    k_ptr,  # (T, N, D)
    v_ptr,  # (T, N, D)
    out_ptr,  # (T, N, D), 8-bit where QUANTIZE
    out_scale_ptr,  # (T, N) where QUANTIZE
    lse_ptr,  # (N, T) float32 where SAVE_LSE
    tiles_ptr,  # (W, 5) int32: see `work_list.WorkList`
    row_spans_ptr,  # (T,) int32
    bias_ptr,  # (N, 2R + 1) where BIASED; see `attention_bias`
    columns_ptr,  # (T,) int32 where HOLES
    ranges_ptr,  # (T, 2) int32 where WINDOWED, or None; see `attention_window`
    qkv_row_stride,
    out_row_stride,
    lse_head_stride,
    scale_log2,  # softmax scale times log2(e)
    key_low,  # this and the next four: where DROPOUT
    key_high,
    site,
    threshold,
    keep_scale,
    bias_radius,  # this and the next: where BIASED
    bias_scale,
    window,  # where WINDOWED
    HEAD_SIZE: tl.constexpr,
    BIASED: tl.constexpr,
    HOLES: tl.constexpr,
    WINDOWED: tl.constexpr,
    DROPOUT: tl.constexpr,
    SAVE_LSE: tl.constexpr,
    QUANTIZE: tl.constexpr,
    INT8: tl.constexpr,
    ONE_BLOCK: tl.constexpr,  # whether no tile of the work list has more than BLOCK_K keys
    INPUT_PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head = tl.program_id(0)
    first_row, end_row, first_key, end_key, shared = load_tile(tiles_ptr, tl.program_id(1))
    if end_row == first_row:  # what fills a work list of fixed length up
        return
    text_key, text_end = first_key, end_key
    if WINDOWED:
        first_key, end_key = keys_in_reach(first_row, end_row, text_key, text_end, window, DROPOUT)

    rows = first_row + tl.arange(0, BLOCK_Q)
    row_mask = rows < end_row
    d_offs = tl.arange(0, BLOCK_D)
    d_mask = d_offs < HEAD_SIZE
    q_offs = rows.to(tl.int64)[:, None] * qkv_row_stride + head * HEAD_SIZE + d_offs[None, :]
    q = tl.load(q_ptr + q_offs, mask=row_mask[:, None] & d_mask[None, :], other=0.0)
    key_offs = tl.arange(0, BLOCK_K).to(tl.int64) * qkv_row_stride + head * HEAD_SIZE
    k_block_ptr = k_ptr + key_offs[None, :] + d_offs[:, None]
    v_block_ptr = v_ptr + key_offs[:, None] + d_offs[None, :]

    mask_key = (key_low, key_high, site, threshold)
    bias = (bias_ptr, columns_ptr, bias_radius, bias_scale, end_row)
    if ONE_BLOCK:
        row_first_key, row_end_key = row_ranges(row_spans_ptr, rows, row_mask, text_key, text_end, shared)
        if WINDOWED:
            row_first_key, row_end_key = reach_of_rows(rows, row_mask, row_first_key, row_end_key, window, ranges_ptr)
        acc, row_sum, row_max = _attend_once(
            q, k_block_ptr, v_block_ptr, first_key, end_key, row_first_key, row_end_key, qkv_row_stride,
            scale_log2, d_mask, rows, text_key, head, mask_key, bias, BIASED, HOLES, DROPOUT, INPUT_PRECISION, BLOCK_K,
        )  # fmt: skip
    else:
        acc = tl.zeros((BLOCK_Q, BLOCK_D), dtype=tl.float32)
        row_sum = tl.zeros((BLOCK_Q,), dtype=tl.float32)
        row_max = tl.full((BLOCK_Q,), LOWEST, dtype=tl.float32)

        # Only one sequence: whole blocks of keys need no mask. Several, or a window: every block does.
        end_unmasked = first_key
        if not WINDOWED:
            if not shared:
                end_unmasked = first_key + (end_key - first_key) // BLOCK_K * BLOCK_K
            acc, row_sum, row_max = _attend(
                q, k_block_ptr, v_block_ptr, first_key, end_unmasked, rows, rows, rows, qkv_row_stride,
                scale_log2, d_mask, acc, row_sum, row_max, rows, text_key, shared, head, mask_key, bias, BIASED, HOLES,
                DROPOUT, False, BLOCK_D != HEAD_SIZE, INPUT_PRECISION, BLOCK_K,
            )  # fmt: skip
        # Read here, so that no register holds it over the loop before, which tiles of several sequences pass by.
        row_text_key, row_end_key = row_ranges(row_spans_ptr, rows, row_mask, text_key, text_end, shared)
        row_first_key = row_text_key
        if WINDOWED:
            row_first_key, row_end_key = reach_of_rows(rows, row_mask, row_text_key, row_end_key, window, ranges_ptr)
        acc, row_sum, row_max = _attend(
            q, k_block_ptr, v_block_ptr, end_unmasked, end_key, row_first_key, row_end_key, row_text_key,
            qkv_row_stride, scale_log2, d_mask, acc, row_sum, row_max, rows, text_key, shared, head, mask_key, bias,
            BIASED, HOLES, DROPOUT, True, BLOCK_D != HEAD_SIZE, INPUT_PRECISION, BLOCK_K,
        )  # fmt: skip

    if DROPOUT:  # The list is read again, so that no register holds it over the loops, whose masks take many.
        tile_ptr = tiles_ptr + COLUMNS * tl.program_id(1)
        rows = tl.load(tile_ptr, volatile=True) + tl.arange(0, BLOCK_Q)
        row_mask = rows < tl.load(tile_ptr + 1, volatile=True)
    row_sum = tl.where(row_mask, row_sum, 1.0)
    row_scale = 1.0 / row_sum  # one division a row, not one an element
    if DROPOUT:
        row_scale *= keep_scale
    out = acc * row_scale[:, None]
    out_offs = rows.to(tl.int64)[:, None] * out_row_stride + head * HEAD_SIZE + d_offs[None, :]
    out_mask = row_mask[:, None] & d_mask[None, :]
    if QUANTIZE:  # what the store would have rounded to; columns past the head are 0, as those of v are
        out, scale = quantize_rows(out.to(v_ptr.dtype.element_ty).to(tl.float32), INT8)
        tl.store(out_scale_ptr + rows.to(tl.int64) * tl.num_programs(0) + head, scale, mask=row_mask)
    tl.store(out_ptr + out_offs, out.to(out_ptr.dtype.element_ty), mask=out_mask)
    if SAVE_LSE:
        lse = (row_max + tl.log2(row_sum)) * LN_2
        tl.store(lse_ptr + head * lse_head_stride.to(tl.int64) + rows, lse, mask=row_mask)


def varlen_attention_forward(
    qkv: torch.Tensor,
    work_list: WorkList,
    num_heads: int,
    scale: float,
    quantized: tuple[torch.Tensor, torch.Tensor] | None = None,
    config: dict[str, int] | None = None,
    short_list: WorkList | None = None,
    dropout: Dropout | None = None,
    lse: torch.Tensor | None = None,
    bias: PositionBias | None = None,
    window: Window | None = None,
) -> torch.Tensor:
    """Computes attention: (T, 3 * N * D), laid out [q | k | v], -> (T, N * D) in the same dtype.

    quantized: contiguous buffers (T, N * D), float8_e4m3fn or int8, and (T, N) float32, for the result in 8 bits and
    one scale for each row and head, as in `quantize`. Then the first buffer is returned, and nothing else is written.

    work_list: on qkv's device, built for the BLOCK_Q of `config` (by default from `configs.attention_config`). Its
    empty tiles cost nothing. Output rows outside of all tiles are not written. qkv needs unit stride along its last
    axis.

    short_list: tiles of sequences of at most BLOCK_K tokens, with BLOCK_Q and BLOCK_K of
    `configs.short_attention_config`. It is a second launch, even if it is empty, so that no later batch must compile
    the kernel.

    dropout: the dropout of the probabilities. lse: a buffer (N, T) float32 with unit stride along T, for the natural
    logarithm of each row's sum of exponentials, which the backward pass needs. bias: added to the scaled scores.
    window: the keys that a query reaches, by default all of its sequence.
    """
    n_rows, hidden_size = qkv.shape[0], qkv.shape[1] // 3
    head_size = hidden_size // num_heads
    out = launch.empty((n_rows, hidden_size), like=qkv) if quantized is None else quantized[0]
    if n_rows == 0:
        return out
    config = config or configs.attention_config(qkv.dtype, head_size, launch.arch(qkv.device)).block_sizes
    if bias is not None and lse is not None and launch.arch(qkv.device) < 90:
        config = {**config, "num_warps": 8}  # leaves registers for the bias
    lists = [(work_list, config, False)]
    if config.get("WARP_SPECIALIZE"):
        plain = quantized is None and dropout is None and lse is None and bias is None and window is None
        if plain and attention_specialized.obstacle(qkv, work_list, head_size, launch.arch(qkv.device)) is None:
            attention_specialized.specialized_attention_forward(qkv, work_list, num_heads, scale, config, out)
            lists = []
        else:
            lists = [(work_list, attention_specialized.fallback(config), False)]
    if short_list is not None:
        short = configs.short_attention_config(qkv.dtype, head_size, launch.arch(qkv.device))
        assert short is not None, "this tile has no smaller one for short sequences"
        lists.append((short_list, short.block_sizes, True))
    inference = n_rows > 1 and quantized is dropout is lse is None
    table, columns, width = (None, None, 0) if bias is None else (*bias, bias.table.shape[1])
    size, ranges = (None, None) if window is None else window
    precision = launch.dot_precision(qkv.dtype)
    # Grid: every head for every tile of a work list. A launch takes as many tiles as a grid's second dimension allows.
    for (tiles, row_spans), block_sizes, one_block in lists:
        for part in tiles.split(MAX_TILES) if tiles.shape[0] > MAX_TILES else (tiles,):
            grid, facts = (num_heads, part.shape[0]), None
            if inference and (dtypes := launch.alike(qkv, out, part, row_spans, table, columns, ranges)):
                q, step = qkv.data_ptr(), hidden_size * qkv.element_size()  # k and v are views, here addresses
                facts = dtypes, hidden_size, num_heads, scale, one_block, precision, width, size
                head = qkv, q + step, q + 2 * step, out, None, None, part, row_spans, table, columns, ranges
                if launch.again(_varlen_attention_kernel, grid, block_sizes, facts, *head):
                    continue
            launch.run_first(
                _varlen_attention_kernel,
                grid,
                block_sizes,
                facts,
                11,
                q_ptr=qkv,
                k_ptr=qkv[:, hidden_size:],
                v_ptr=qkv[:, 2 * hidden_size :],
                out_ptr=out,
                out_scale_ptr=quantized[1] if quantized is not None else None,
                lse_ptr=lse,
                tiles_ptr=part,
                row_spans_ptr=row_spans,
                qkv_row_stride=qkv.stride(0),
                out_row_stride=out.stride(0),
                lse_head_stride=lse.stride(0) if lse is not None else None,
                scale_log2=scale * LOG2_E.value,
                **(drawing.NONE if dropout is None else drawing.arguments(dropout)),
                **(biases.NONE if bias is None else biases.arguments(bias, scale)),
                **(windows.NONE if window is None else windows.arguments(window)),
                HEAD_SIZE=head_size,
                DROPOUT=dropout is not None,
                SAVE_LSE=lse is not None,
                QUANTIZE=quantized is not None,
                INT8=out.dtype == torch.int8,
                ONE_BLOCK=one_block,
                INPUT_PRECISION=precision,
            )
    return out
