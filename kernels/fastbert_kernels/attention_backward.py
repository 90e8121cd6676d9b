"""This module computes the gradients of attention over packed sequences, in two passes without atomics.

    p[i, j] = exp(scale * q[i] . k[j] - lse[i]),    dp[i, j] = keep[i, j] * keep_scale * (dout[i] . v[j])
    ds[i, j] = p[i, j] * (dp[i, j] - delta[i]),     delta[i] = dout[i] . out[i] = sum_j p[i, j] dp[i, j]
    dq[i] = scale * sum_j ds[i, j] k[j],    dk[j] = scale * sum_i ds[i, j] q[i]
    dv[j] = keep_scale * sum_i keep[i, j] * p[i, j] dout[i]

qkv, grad_qkv: (T, 3 * N * D), laid out [q | k | v]; dout, out: (T, N * D); fp32 / bf16 / fp16, D from 16 to 128. lse
and delta: (N, T) float32. p, ds and all sums are float32; p and ds are rounded to the input dtype for the products that
they enter. FLOPs: 14 * N * D * sum_b len_b^2, and 4 more in float32. One pass that adds dq atomically would need 10.
Bytes moved: 12 * T * N * D elements and 36 * T * N bytes at least.

In the first pass, `attention_query_gradient`, each program has a tile of queries and loops over blocks of keys. In the
second pass, `attention_key_gradient`, each program has a tile of keys and loops over blocks of queries. One program
computes each sum in a fixed order, so the bits do not vary. Tiles and work lists are as in the forward pass: see
`work_list`.

Within a window (attention_window.py), a tile of queries reads the keys that one of them reaches. A tile of keys reads
the queries that reach one of them. This is BLOCK + 2 * window rows for any length of the sequence.

With a position bias, p contains it besides the scaled product. A third pass, `attention_bias_gradient`, computes its
gradient.

The factor keep_scale is taken out of the sums: delta is divided by it, and so is ds; the results are multiplied.

Source: Dao, "FlashAttention-2", 2023, arXiv:2307.08691, section 3.1.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastbert_kernels import attention_bias as biases
from fastbert_kernels import attention_window as windows
from fastbert_kernels import configs, launch
from fastbert_kernels import dropout as drawing
from fastbert_kernels.attention_bias import PositionBias
from fastbert_kernels.attention_bias_gradient import bias_gradient
from fastbert_kernels.attention_key_gradient import key_value_gradient_kernel
from fastbert_kernels.attention_query_gradient import query_gradient_kernel
from fastbert_kernels.attention_tiles import LOG2_E
from fastbert_kernels.attention_window import Window
from fastbert_kernels.masks import Dropout
from fastbert_kernels.work_list import WorkList, build_work_list


class Plan(NamedTuple):
    """A `Plan` holds the work lists for a batch's gradients, made by `work_lists`, on its device."""

    queries: WorkList
    keys: WorkList


def work_lists(cu_seqlens: Sequence[int], tiles: configs.AttentionBackward, share: bool = True) -> Plan:
    """Lists the tiles of queries and of keys on the CPU, as `build_work_list` does. Equal lists are one object."""
    n_queries, n_keys = tiles.query["BLOCK_Q"], tiles.key["BLOCK_K"]
    queries = build_work_list(cu_seqlens, n_queries, share)
    return Plan(queries, queries if n_keys == n_queries else build_work_list(cu_seqlens, n_keys, share))


def varlen_attention_backward(
    grad: torch.Tensor,
    qkv: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    plan: Plan,
    num_heads: int,
    scale: float,
    dropout: Dropout | None = None,
    tiles: configs.AttentionBackward | None = None,
    bias: PositionBias | None = None,
    want_bias: bool = True,
    window: Window | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Computes the gradient of qkv, (T, 3 * N * D), in its dtype, from grad, (T, N * D), the gradient of the result.

    If the gradient of a bias is needed, it also computes that of its table, (N, 2R + 1) float32. The table's rows must
    then be neighbours.

    out (T, N * D) and lse (N, T) float32 are results of `varlen_attention_forward` with the same scale, dropout and
    window. A bias excludes a window. Each tensor needs unit stride along its last axis. Rows outside of all tiles are
    not written: the caller must set them to zero if there are any.
    """
    assert window is None or bias is None, "a window has no position bias"
    n_rows, hidden_size = grad.shape
    head_size = hidden_size // num_heads
    grad_qkv = launch.empty((n_rows, 3 * hidden_size), like=qkv)
    if n_rows == 0:
        return grad_qkv, torch.zeros_like(bias.table, dtype=torch.float32) if bias and want_bias else None
    statistics = launch.empty((num_heads, n_rows, 4), like=lse)
    if tiles is None:
        arch, features = launch.arch(qkv.device), (bias is not None, window is not None)
        tiles = configs.attention_backward_configs(qkv.dtype, head_size, arch, *features)
    shared = {
        "q_ptr": qkv,
        "k_ptr": qkv[:, hidden_size:],
        "v_ptr": qkv[:, 2 * hidden_size :],
        "dout_ptr": grad,
        "statistics_ptr": statistics,
        "qkv_row_stride": qkv.stride(0),
        "dout_row_stride": grad.stride(0),
        "n_rows": n_rows,
        "scale_log2": scale * LOG2_E.value,
        "grad_scale": scale * (1.0 if dropout is None else dropout.scale),
        "HEAD_SIZE": head_size,
        "DROPOUT": dropout is not None,
        "NORMALIZE": qkv.dtype == torch.float32,
        "INPUT_PRECISION": launch.dot_precision(qkv.dtype),
        **drawing.arguments(dropout),
        **biases.arguments(bias, scale),
        **windows.arguments(window),
    }
    # Grids: every tile of a work list, for every head.
    launch.run(
        query_gradient_kernel,
        (plan.queries.tiles.shape[0], num_heads),
        tiles.query,
        **shared,
        out_ptr=out,
        lse_ptr=lse,
        dq_ptr=grad_qkv,
        tiles_ptr=plan.queries.tiles,
        row_spans_ptr=plan.queries.row_spans,
        out_row_stride=out.stride(0),
        lse_head_stride=lse.stride(0),
        dq_row_stride=grad_qkv.stride(0),
    )
    launch.run(
        key_value_gradient_kernel,
        (plan.keys.tiles.shape[0], num_heads),
        tiles.key,
        **shared,
        dk_ptr=grad_qkv[:, hidden_size:],
        dv_ptr=grad_qkv[:, 2 * hidden_size :],
        tiles_ptr=plan.keys.tiles,
        row_spans_ptr=plan.keys.row_spans,
        grad_row_stride=grad_qkv.stride(0),
    )
    if bias is None or not want_bias:
        return grad_qkv, None
    of_batch = grad, qkv, statistics, plan.queries, num_heads, scale, dropout
    return grad_qkv, bias_gradient(*of_batch, bias, tiles.query)
