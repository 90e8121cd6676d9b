"""This module computes the gradients of disentangled attention, without atomics and without numbers for all pairs.

    p[i, j] = exp(scale * (q[i] . k[j] + q[i] . pk[b(i - j)] + k[j] . pq[b(i - j)]) - lse[i])
    dp[i, j] = keep[i, j] * (dout[i] . v[j])                           delta[i] = sum_j p[i, j] * dp[i, j]
    ds[i, j] = p[i, j] * (dp[i, j] - delta[i])
    c[i, r] = sum of ds[i, j] over the keys with b(i - j) = r          e[j, r] = the same sum over the queries
    dq[i] = grad_scale * (sum_j ds[i, j] k[j] + sum_r c[i, r] pk[r])   dpk[r] = grad_scale * sum_i c[i, r] q[i]
    dk[j] = grad_scale * (sum_i ds[i, j] q[i] + sum_r e[j, r] pq[r])   dpq[r] = grad_scale * sum_j e[j, r] k[j]
    dv[j] = keep_scale * sum_i keep[i, j] p[i, j] dout[i]              grad_scale = keep_scale * scale

qkv, grad_qkv: (T, 3 * N * D); dout, out: (T, N * D); pk, pq, dpk, dpq: (2R, N, D); fp32 / bf16 / fp16, D from 16 to
128. lse: (N, T) float32; c, e: (T, N, W) float32, for the W rows that the longest sequence needs (see `disentangled`).

The first pass, `disentangled_query_gradient`, has a program for each tile of queries. The second,
`disentangled_key_gradient`, has one for each tile of keys. A program adds ds to its own rows of c or e, one number to a
sum at a time. The third pass multiplies c and e by q and k. There a program adds the products of a share of the tokens
in their order, and `column_sums` adds the shares. So the bits do not vary. FLOPs: 14 * N * D * sum_b len_b^2 + 12 * T *
N * W * D. Bytes moved: 4 * T * N * W for each access to c and e (write, read or addition), and half as much in 16 bits
for each access to q . pk and k . pq: about 10 accesses each.

Sources: He et al., "DeBERTa", 2020, arXiv:2006.03654; Dao, "FlashAttention-2", 2023, arXiv:2307.08691, section 3.1.2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastbert_kernels import dropout as drawing
from fastbert_kernels import launch
from fastbert_kernels.attention_tiles import LOG2_E
from fastbert_kernels.column_sums import column_sums, shares
from fastbert_kernels.disentangled import MAX_TILES, terms
from fastbert_kernels.disentangled_key_gradient import disentangled_key_gradient_kernel
from fastbert_kernels.disentangled_query_gradient import disentangled_query_gradient_kernel
from fastbert_kernels.disentangled_tiles import Distances
from fastbert_kernels.jit import jit
from fastbert_kernels.masks import Dropout
from fastbert_kernels.work_list import WorkList

SHARES = 16  # the number of shares of the tokens in the third pass


@jit(do_not_specialize=["n_tokens", "n_rows", "tiles_each"])
def _distance_gradient_kernel(
    sums_ptr,  # (T, N, W) float32
    x_ptr,  # (T, N, D)
    partials_ptr,  # (P, W, N, D) float32
    n_tokens,
    n_rows,  # W
    tiles_each,  # tiles of a share
    x_row_stride,
    grad_scale,
    HEAD_SIZE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head, n_heads = tl.program_id(1), tl.num_programs(1)
    share = tl.program_id(2)
    places = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    place_mask = places < n_rows
    d_offs = tl.arange(0, BLOCK_D)
    d_mask = d_offs < HEAD_SIZE
    acc = tl.zeros((BLOCK_W, BLOCK_D), dtype=tl.float32)
    for tile in range(share * tiles_each, (share + 1) * tiles_each):
        tokens = tile * BLOCK_T + tl.arange(0, BLOCK_T)
        token_mask = tokens < n_tokens
        sum_offs = (tokens.to(tl.int64) * n_heads + head)[None, :] * n_rows + places[:, None]
        sums = tl.load(sums_ptr + sum_offs, mask=place_mask[:, None] & token_mask[None, :], other=0.0)
        x_offs = tokens.to(tl.int64)[:, None] * x_row_stride + head * HEAD_SIZE + d_offs[None, :]
        x = tl.load(x_ptr + x_offs, mask=token_mask[:, None] & d_mask[None, :], other=0.0)
        acc = tl.dot(sums.to(x.dtype), x, acc, input_precision=INPUT_PRECISION)
    out_rows = (share.to(tl.int64) * n_rows + places) * n_heads + head
    out_offs = out_rows[:, None] * HEAD_SIZE + d_offs[None, :]
    tl.store(partials_ptr + out_offs, acc * grad_scale, mask=place_mask[:, None] & d_mask[None, :])


def tile_rows(dtype: torch.dtype, head_size: int) -> int:
    """Returns the number of rows in the tiles of the first two passes. The work list is built for it."""
    if dtype == torch.float32 and head_size > 32:
        return 16
    return 32 if dtype == torch.float32 or head_size > 64 else 64


def query_tile(dtype: torch.dtype, head_size: int) -> dict[str, int]:
    """Chooses the tile of the first pass: BLOCK_Q queries, BLOCK_K keys a step, BLOCK_W rows of pk a step.

    It is the largest one without spills in the offline report, with dropout.
    """
    block_d = max(16, triton.next_power_of_2(head_size))
    step = 16 if block_d > 32 else 32
    return {
        "BLOCK_Q": tile_rows(dtype, head_size), "BLOCK_K": step, "BLOCK_W": step, "BLOCK_D": block_d,
        "num_warps": 8, "num_stages": 1,
    }  # fmt: skip


def key_tile(dtype: torch.dtype, head_size: int) -> dict[str, int]:
    """Chooses the tile of the second pass: BLOCK_K keys, BLOCK_Q queries a step, BLOCK_W rows of pq a step."""
    sizes = query_tile(dtype, head_size)
    return {**sizes, "BLOCK_Q": sizes["BLOCK_K"], "BLOCK_K": sizes["BLOCK_Q"]}


def table_tile(dtype: torch.dtype, head_size: int) -> dict[str, int]:
    """Chooses the tile of the third pass: BLOCK_W rows of a table, BLOCK_T tokens a step."""
    block_d = max(16, triton.next_power_of_2(head_size))
    wide = dtype == torch.float32 or block_d > 64
    return {"BLOCK_W": 64, "BLOCK_T": 32, "BLOCK_D": block_d, "num_warps": 8 if wide else 4, "num_stages": 1}


def _table_gradient(
    sums: torch.Tensor, x: torch.Tensor, table: torch.Tensor, distances: Distances, n_tokens: int, grad_scale: float
) -> torch.Tensor:
    """Computes the gradient of pk or pq, like the table. sums: c or e, (T, N, W). x: q or k, (T, N * D)."""
    n_heads, n_rows, head_size = sums.shape[1], sums.shape[2], x.shape[1] // sums.shape[1]
    config = table_tile(x.dtype, head_size)
    n_shares, tiles_each = shares(n_tokens, config["BLOCK_T"], SHARES)
    partials = launch.empty((n_shares, n_rows, n_heads, head_size), like=sums)
    # Grid: tiles of rows, heads, shares of the tokens.
    launch.run(
        _distance_gradient_kernel,
        (launch.cdiv(n_rows, config["BLOCK_W"]), n_heads, n_shares),
        config,
        sums_ptr=sums,
        x_ptr=x,
        partials_ptr=partials,
        n_tokens=n_tokens,
        n_rows=n_rows,
        tiles_each=tiles_each,
        x_row_stride=x.stride(0),
        grad_scale=grad_scale,
        HEAD_SIZE=head_size,
        INPUT_PRECISION=launch.dot_precision(x.dtype),
    )
    gradient = torch.zeros_like(table)
    gradient[distances.low : distances.low + n_rows] = column_sums(partials).flatten(1).to(table.dtype)
    return gradient


def disentangled_attention_backward(
    grad: torch.Tensor,
    qkv: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    work_list: WorkList,
    num_heads: int,
    scale: float,
    distances: Distances,
    runs_of: torch.Tensor,
    n_tokens: int,
    dropout: Dropout | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Computes the gradients of qkv, (T, 3 * N * D), and of distances.keys and queries, or None; each in its dtype.

    work_list: on qkv's device, built for `tile_rows`. grad: the gradient of the result, (T, N * D), contiguous. out and
    lse: results of `disentangled_training_forward` for the other arguments. runs_of: (2M + 1,) int32, for each distance
    the number of earlier ones with the same row. n_tokens: the number of tokens of all sequences; the gradient is zero
    in later rows.
    """
    n_rows, hidden_size = grad.shape
    grad_qkv = launch.empty((n_rows, 3 * hidden_size), like=qkv)
    grad_qkv[n_tokens:] = 0
    keys, queries = distances.keys, distances.queries
    if n_tokens == 0:
        none = [None if table is None else torch.zeros_like(table) for table in (keys, queries)]
        return grad_qkv, none[0], none[1]
    q, k, v = qkv[:, :hidden_size], qkv[:, hidden_size : 2 * hidden_size], qkv[:, 2 * hidden_size :]
    statistics = launch.empty((num_heads, n_rows, 4), like=lse)
    of_queries, of_keys = (
        None if table is None else torch.zeros(n_rows, num_heads, distances.n_rows, device=qkv.device)
        for table in (keys, queries)
    )
    terms_of_queries, terms_of_keys = terms(qkv, num_heads, distances)
    grad_scale = scale * (1.0 if dropout is None else dropout.scale)
    shared = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "dout_ptr": grad,
        "statistics_ptr": statistics,
        "of_queries_ptr": terms_of_queries,
        "of_keys_ptr": terms_of_keys,
        "rows_of_ptr": distances.rows_of,
        "runs_of_ptr": runs_of,
        "columns_ptr": distances.columns,
        "row_spans_ptr": work_list.row_spans,
        "qkv_row_stride": qkv.stride(0),
        "dout_row_stride": grad.stride(0),
        "grad_row_stride": grad_qkv.stride(0),
        "table_row_stride": hidden_size,
        "n_tokens": n_rows,
        "scale_log2": scale * LOG2_E.value,
        "grad_scale": grad_scale,
        "radius": distances.rows_of.shape[0] // 2,
        "low": distances.low,
        "n_rows": distances.n_rows,
        **drawing.arguments(dropout),
        "HEAD_SIZE": hidden_size // num_heads,
        "KEYS": keys is not None,
        "QUERIES": queries is not None,
        "HOLES": distances.columns is not None,
        "DROPOUT": dropout is not None,
        "INPUT_PRECISION": launch.dot_precision(qkv.dtype),
    }
    of_heads = qkv.dtype, hidden_size // num_heads
    # Grids: every head for every tile of the work list. A launch takes as many tiles as a grid's second dimension
    # allows.
    for tiles in work_list.tiles.split(MAX_TILES):
        launch.run(
            disentangled_query_gradient_kernel,
            (num_heads, tiles.shape[0]),
            query_tile(*of_heads),
            **shared,
            out_ptr=out,
            lse_ptr=lse,
            dq_ptr=grad_qkv,
            table_ptr=keys,
            sums_ptr=of_queries,
            tiles_ptr=tiles,
            out_row_stride=out.stride(0),
            lse_head_stride=lse.stride(0),
            NORMALIZE=qkv.dtype == torch.float32,
        )
    for tiles in work_list.tiles.split(MAX_TILES):
        launch.run(
            disentangled_key_gradient_kernel,
            (num_heads, tiles.shape[0]),
            key_tile(*of_heads),
            **shared,
            dk_ptr=grad_qkv[:, hidden_size:],
            dv_ptr=grad_qkv[:, 2 * hidden_size :],
            table_ptr=queries,
            sums_ptr=of_keys,
            tiles_ptr=tiles,
        )
    each = ((of_queries, q, keys), (of_keys, k, queries))
    tables = [
        None if table is None or sums is None else _table_gradient(sums, x, table, distances, n_tokens, grad_scale)
        for sums, x, table in each
    ]
    return grad_qkv, tables[0], tables[1]
