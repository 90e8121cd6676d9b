"""This module computes the softmax cross entropy of rows of logits, and writes its gradient over the logits.

    l      = logits + bias
    peak   = max_j l_j,    log_sum = log sum_j exp(l_j - peak),    lse = peak + log_sum
    loss   = (1 - e) (lse - l_y) + e (lse - mean_j l_j) + z lse^2
    dl_j   = scale (p_j (1 + 2 z lse) - (1 - e) [j = y] - e / V),    p_j = exp(l_j - peak - log_sum)

logits: (T, W), fp32 / bf16 / fp16; bias: (W,) or None; labels y: (T,) int64; e: label smoothing; z: z-loss; scale: (T,)
float32, the gradient of each row's loss. V, the number of classes, is at most W. Columns from V on may have any values,
and get the gradient 0. If W is a multiple of 16, loads and stores have 16 bytes for any V. A row whose label is
ignore_index has loss and gradient 0. The caller must have checked the labels on the host.

peak and log_sum are kept apart, because the loss of a row with a very probable label is far smaller than one ulp of
their sum.

The forward kernel reads a row once: peak and sum are online, and the sum is rescaled if a block raises the peak.
Arithmetic is in float32. Sums have a fixed order, without atomics. Bytes moved: T * V elements read in the forward
kernel, T * V read and written in the backward one.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018, arXiv:1805.02867; the gradient in the
place of the logits is Liger-Kernel's, Hsu et al., 2024, arXiv:2410.10989. z-loss: Chowdhery et al., "PaLM", 2022,
arXiv:2204.02311, section 5.
"""

from __future__ import annotations

import torch
import triton.language as tl

from fastbert_kernels import configs, launch
from fastbert_kernels.jit import jit

# These pointers begin anywhere in the caller's memory for all chunks, so there is no kernel specialised on alignment.
ROWS = ("labels_ptr", "losses_ptr", "peak_ptr", "log_sum_ptr", "scale_ptr")


@jit
def _load(logits_ptr, bias_ptr, col_offs, n_cols, width, HAS_BIAS: tl.constexpr):
    """A block of a row of logits, with the bias, in float32; minus infinity from n_cols on."""
    x = tl.load(logits_ptr + col_offs, mask=col_offs < width, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias_ptr + col_offs, mask=col_offs < width, other=0.0).to(tl.float32)
    return tl.where(col_offs < n_cols, x, float("-inf"))


@jit(do_not_specialize=["n_cols", "ignore_index"], do_not_specialize_on_alignment=ROWS)
def _forward_kernel(
    logits_ptr,  # (T, V)
    bias_ptr,  # (V,)
    labels_ptr,  # (T,)
    losses_ptr,  # (T,) float32
    peak_ptr,  # (T,) float32
    log_sum_ptr,  # (T,) float32
    n_cols,
    width,
    logits_row_stride,
    ignore_index,
    label_smoothing,
    z_loss,
    HAS_BIAS: tl.constexpr,
    SMOOTHING: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_row_stride
    label = tl.load(labels_ptr + row)

    peak, total, above = -3.4e38, 0.0, 0.0  # above: the sum of l_j - peak
    for start in range(0, width, BLOCK_COLS):
        col_offs = start + tl.arange(0, BLOCK_COLS)
        x = _load(logits_ptr, bias_ptr, col_offs, n_cols, width, HAS_BIAS)
        new_peak = tl.maximum(peak, tl.max(x, axis=0))
        total = total * tl.exp(peak - new_peak) + tl.sum(tl.exp(x - new_peak), axis=0)
        if SMOOTHING:
            n_before = tl.minimum(start, n_cols)
            above += n_before * (peak - new_peak) + tl.sum(tl.where(col_offs < n_cols, x - new_peak, 0.0), axis=0)
        peak = new_peak
    log_sum = tl.log(total)

    is_labelled = label != ignore_index
    col = tl.where(is_labelled, label, 0)
    target = tl.load(logits_ptr + col).to(tl.float32)
    if HAS_BIAS:
        target += tl.load(bias_ptr + col).to(tl.float32)
    loss = log_sum - (1.0 - label_smoothing) * (target - peak)
    if SMOOTHING:
        loss -= label_smoothing * (above / n_cols)
    lse = peak + log_sum
    loss += z_loss * lse * lse
    tl.store(losses_ptr + row, tl.where(is_labelled, loss, 0.0))
    tl.store(peak_ptr + row, peak)
    tl.store(log_sum_ptr + row, log_sum)


@jit(do_not_specialize=["n_cols", "ignore_index"], do_not_specialize_on_alignment=ROWS)
def _backward_kernel(
    logits_ptr,  # (T, V), read and written
    bias_ptr,  # (V,)
    labels_ptr,  # (T,)
    peak_ptr,  # (T,) float32
    log_sum_ptr,  # (T,) float32
    scale_ptr,  # (T,) float32
    n_cols,
    width,
    logits_row_stride,
    ignore_index,
    label_smoothing,
    z_loss,
    HAS_BIAS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    col_offs = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    logits_ptr += row * logits_row_stride
    label = tl.load(labels_ptr + row)
    peak, log_sum, scale = tl.load(peak_ptr + row), tl.load(log_sum_ptr + row), tl.load(scale_ptr + row)

    x = _load(logits_ptr, bias_ptr, col_offs, n_cols, width, HAS_BIAS)
    p = tl.exp(x - peak - log_sum)
    # The parts of the formula in the order in which they cancel.
    is_label = (col_offs == label).to(tl.float32)
    gradient = p - is_label + p * (2.0 * z_loss * (peak + log_sum)) + label_smoothing * (is_label - 1.0 / n_cols)
    gradient = tl.where((label != ignore_index) & (col_offs < n_cols), scale * gradient, 0.0)
    tl.store(logits_ptr + col_offs, gradient.to(logits_ptr.dtype.element_ty), mask=col_offs < width)


def cross_entropy_forward(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    n_classes: int,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes the losses, peaks and log sums of (T, W) logits, (T,) float32 each. logits need unit stride along W."""
    n_rows, width = logits.shape
    losses, peak, log_sum = (launch.empty((n_rows,), like=logits, dtype=torch.float32) for _ in range(3))
    if n_rows == 0:
        return losses, peak, log_sum
    # Grid: one program per row.
    launch.run(
        _forward_kernel,
        (n_rows,),
        configs.long_row_config(width),
        logits_ptr=logits,
        bias_ptr=bias,
        labels_ptr=labels,
        losses_ptr=losses,
        peak_ptr=peak,
        log_sum_ptr=log_sum,
        n_cols=n_classes,
        width=width,
        logits_row_stride=logits.stride(0),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        HAS_BIAS=bias is not None,
        SMOOTHING=label_smoothing != 0.0,
    )
    return losses, peak, log_sum


def cross_entropy_backward(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    peak: torch.Tensor,
    log_sum: torch.Tensor,
    scale: torch.Tensor,
    n_classes: int,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> None:
    """Writes the gradient of sum_t scale_t loss_t over the logits. The statistics come from the forward pass."""
    n_rows, width = logits.shape
    if n_rows == 0:
        return
    config = configs.long_row_config(width)
    # Grid: one program per row and block of columns; rows on axis 0, whose limit is 2^31 - 1 programs.
    launch.run(
        _backward_kernel,
        (n_rows, launch.cdiv(width, config["BLOCK_COLS"])),
        config,
        logits_ptr=logits,
        bias_ptr=bias,
        labels_ptr=labels,
        peak_ptr=peak,
        log_sum_ptr=log_sum,
        scale_ptr=scale,
        n_cols=n_classes,
        width=width,
        logits_row_stride=logits.stride(0),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        HAS_BIAS=bias is not None,
    )
