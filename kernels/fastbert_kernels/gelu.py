"""This module has two kernels: for bias and GELU in one pass, if the GEMM has no such epilogue, and for the gradient.

    erf:   gelu(x) = x * (1 + erf(x / sqrt(2))) / 2
    tanh:  gelu(x) = x * (1 + tanh(u)) / 2 = x * sigmoid(2 u),    u = sqrt(2 / pi) * (x + 0.044715 x^3)
    relu:  max(x, 0), in training

x, out: (T, I), fp32 / bf16 / fp16; bias: (I,). Arithmetic in float32. Bytes moved: 2 * T * I elements.
Elementwise, so a row's bits do not depend on the batch.

The backward pass starts from pre = x + bias, which the forward pass saved. It computes the activation again, because
the next layer's weight gradient needs it:

    grad_pre = grad * gelu'(pre),    activated = gelu(pre),    grad_bias = sum_t grad_pre
    erf:   gelu'(x) = Phi(x) + x exp(-x^2 / 2) / sqrt(2 pi),    Phi(x) = (1 + erf(x / sqrt(2))) / 2
    tanh:  gelu'(x) = s + x s (1 - s) 2 u',    s = sigmoid(2 u),    u' = sqrt(2 / pi) * (1 + 3 * 0.044715 x^2)
    relu:  relu'(x) = 1 where x > 0, else 0

Bytes moved: 4 * T * I elements. grad_bias is summed in two steps, in a fixed order (see `column_sums`).

Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016, arXiv:1606.08415.
"""

from __future__ import annotations

import torch
import triton.language as tl

from fastbert_kernels import configs, launch
from fastbert_kernels.column_sums import column_sums, shares
from fastbert_kernels.jit import jit

SQRT_1_2 = tl.constexpr(0.7071067811865476)
SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
SQRT_1_2PI = tl.constexpr(0.3989422804014327)
HALF_LOG2_E = tl.constexpr(0.7213475204444817)
STAGES = tl.constexpr(3)  # Two tiles are copied while one is computed.
MAX_PROGRAMS = 768  # of the backward pass. It decides the order of sums, and is equal on every device.
# The limit of a, then the coefficients of P(a) from the highest power down.
LOG2_PHI_BF16 = tl.constexpr((14.0, -2.384121e-4, 4.932471e-3, -4.486147e-2, -0.46924147, -1.146512, -1.0003369))
LOG2_PHI_FP16 = tl.constexpr(
    (8.0, 3.1125604e-5, -7.3149486e-4, 7.8611607e-3, -5.2873353e-2, -0.4593474, -1.1509726, -1.0000112)
)
LOG2_PHI_8 = tl.constexpr((14.0, -4.307371e-4, 6.8083083e-3, -5.1192082e-2, -0.46062142, -1.1505315, -1.0000694))


@jit
def gelu_erf(x):
    """Elementwise, float32."""
    return 0.5 * x * (1.0 + tl.erf(x * SQRT_1_2))


@jit
def _log2_phi(x, DTYPE: tl.constexpr):
    """Returns (a, P(a)) for a = |x|, elementwise, float32: see gelu_erf_rounded."""
    C: tl.constexpr = (
        LOG2_PHI_8 if DTYPE.primitive_bitwidth == 8 else LOG2_PHI_FP16 if DTYPE.is_fp16() else LOG2_PHI_BF16
    )
    # Where a is cut off, 2^P is far below anything that can be seen in the result; infinity * 0 is kept out as well.
    a = tl.minimum(tl.abs(x), C[0])
    p = C[1] * a + C[2]
    for i in tl.static_range(3, 8 if DTYPE.is_fp16() else 7):
        p = p * a + C[i]
    return a, p


@jit
def gelu_erf_rounded(x, DTYPE: tl.constexpr):
    """gelu_erf for what is rounded to DTYPE, of 16 bits or fewer: float32, at a quarter of the instructions.

        gelu(x) = max(x, 0) - |x| Phi(-|x|),    Phi(-a) = 2^P(a),    P a minimax polynomial of log2 Phi(-a)

    bfloat16: before rounding the error is at most 3.2e-5 and, over x Phi(x), 2.4e-4 from -5 on, 5e-3 at -6 and 0.2 at
    -8, where 1 + erf in float32 has lost all digits by -5.6. Of every finite input the rounded result is within 0.56
    ulp where it is larger than 1e-7, and within 1e-9 below.
    float16, one degree more: 1.3e-6, and 8e-6 from -4.2 on, where results become subnormal. Of every finite input the
    rounded result is within 0.52 ulp.
    8 bits, whose steps are absolute or coarse: 8.5e-7, and 5.1e-4 from -4 on, 0.02 at -5.
    NaN stays NaN, infinity stays infinity, and minus infinity gives the limit, 0.
    """
    a, p = _log2_phi(x, DTYPE)
    # A bare maximum would make 0 of NaN.
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) - a * tl.exp2(p)


@jit
def gelu_tanh(x):
    """Elementwise, float32. (1 + tanh(u)) / 2 = sigmoid(2 u) needs no tanh and loses no bits near u = 0."""
    u = SQRT_2_OVER_PI * (x + 0.044715 * x * x * x)
    return x * tl.sigmoid(2.0 * u)


@jit
def activate(x, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr):
    """The activation, elementwise on float32: "none", "gelu", "gelu_tanh" or "relu". DTYPE: of the result."""
    if ACTIVATION == "gelu":
        x = gelu_erf(x) if DTYPE.is_fp32() else gelu_erf_rounded(x, DTYPE)
    elif ACTIVATION == "gelu_tanh":
        x = gelu_tanh(x)
    elif ACTIVATION == "relu":
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        tl.static_assert(ACTIVATION == "none")
    return x


@jit
def activate_with_slope(x, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr):
    """Returns (activation(x), its derivative at x), elementwise, in float32, for what is rounded to DTYPE."""
    if ACTIVATION == "gelu":
        density = SQRT_1_2PI * tl.exp2(-HALF_LOG2_E * x * x)
        if DTYPE.is_fp32():
            phi = 0.5 * (1.0 + tl.erf(x * SQRT_1_2))
            y = gelu_erf(x)
        else:
            a, p = _log2_phi(x, DTYPE)
            tail = tl.exp2(p)
            phi = tl.where(x > 0.0, 1.0 - tail, tail)
            y = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) - a * tail
        slope = phi + x * density
    elif ACTIVATION == "gelu_tanh":
        s = tl.sigmoid(2.0 * (SQRT_2_OVER_PI * (x + 0.044715 * x * x * x)))
        y = x * s
        slope = s + y * (1.0 - s) * (2.0 * SQRT_2_OVER_PI) * (1.0 + 3.0 * 0.044715 * x * x)
    else:
        tl.static_assert(ACTIVATION == "relu")
        y = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        slope = tl.where(x > 0.0, 1.0, 0.0)
    return y, slope


@jit(do_not_specialize=["n_rows"])
def _bias_gelu_kernel(
    x_ptr,  # (T, I)
    bias_ptr,  # (I,)
    out_ptr,  # (T, I)
    n_rows,
    n_cols,
    x_row_stride,
    out_row_stride,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    row_offs = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col_offs = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    mask = (row_offs < n_rows)[:, None] & (col_offs < n_cols)[None, :]

    x = tl.load(x_ptr + row_offs[:, None] * x_row_stride + col_offs[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias_ptr + col_offs, mask=col_offs < n_cols, other=0.0).to(tl.float32)[None, :]
    out = activate(x, ACTIVATION, out_ptr.dtype.element_ty)

    out_offs = row_offs[:, None] * out_row_stride + col_offs[None, :]
    tl.store(out_ptr + out_offs, out.to(out_ptr.dtype.element_ty), mask=mask)


@jit(do_not_specialize=["n_rows", "tiles_each"])
def _activation_backward_kernel(
    grad_ptr,  # (T, I)
    pre_ptr,  # (T, I)
    grad_pre_ptr,  # (T, I)
    activated_ptr,  # (T, I)
    partials_ptr,  # (P, I)
    n_rows,
    tiles_each,  # row tiles of a program
    n_cols,
    grad_row_stride,
    pre_row_stride,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    col_offs = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    col_mask = col_offs < n_cols
    sums = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32)
    for tile in tl.range(tiles_each, num_stages=STAGES):
        row_offs = (program * tiles_each + tile) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        mask = (row_offs < n_rows)[:, None] & col_mask[None, :]
        grad_offs = row_offs[:, None] * grad_row_stride + col_offs[None, :]
        pre_offs = row_offs[:, None] * pre_row_stride + col_offs[None, :]
        grad = tl.load(grad_ptr + grad_offs, mask=mask, other=0.0).to(tl.float32)
        pre = tl.load(pre_ptr + pre_offs, mask=mask, other=0.0).to(tl.float32)
        activated, slope = activate_with_slope(pre, ACTIVATION, pre_ptr.dtype.element_ty)
        grad_pre = grad * slope
        offs = row_offs[:, None] * n_cols + col_offs[None, :]
        tl.store(grad_pre_ptr + offs, grad_pre.to(grad_pre_ptr.dtype.element_ty), mask=mask)
        tl.store(activated_ptr + offs, activated.to(activated_ptr.dtype.element_ty), mask=mask)
        sums += grad_pre
    tl.store(partials_ptr + program * n_cols + col_offs, tl.sum(sums, axis=0), mask=col_mask)


def bias_gelu_forward(x: torch.Tensor, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
    """Computes (T, I) -> (T, I) in x's dtype; activation "gelu" or "gelu_tanh". x needs unit stride along I."""
    n_rows, n_cols = x.shape
    out = launch.empty((n_rows, n_cols), like=x)
    if n_rows == 0:
        return out
    config = configs.elementwise_config(n_cols)
    # Grid: tiles of BLOCK_ROWS x BLOCK_COLS; rows on axis 0, whose limit is 2^31 - 1 programs.
    launch.run(
        _bias_gelu_kernel,
        (launch.cdiv(n_rows, config["BLOCK_ROWS"]), launch.cdiv(n_cols, config["BLOCK_COLS"])),
        config,
        x_ptr=x,
        bias_ptr=bias,
        out_ptr=out,
        n_rows=n_rows,
        n_cols=n_cols,
        x_row_stride=x.stride(0),
        out_row_stride=out.stride(0),
        HAS_BIAS=bias is not None,
        ACTIVATION=activation,
    )
    return out


def activation_backward(
    grad: torch.Tensor, pre: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (grad_pre, activated, grad_bias) from the gradient of activation(pre).

    grad, pre: (T, I) of one dtype, with unit stride along I; activation "gelu", "gelu_tanh" or "relu". grad_pre and
    activated = activation(pre) are (T, I) in that dtype; grad_bias, the sum of grad_pre over T, is (I,) float32.
    """
    n_rows, n_cols = pre.shape
    grad_pre, activated = (launch.empty((n_rows, n_cols), like=pre) for _ in range(2))
    config = configs.elementwise_backward_config(n_cols)
    n_col_blocks = launch.cdiv(n_cols, config["BLOCK_COLS"])
    n_programs, tiles_each = shares(n_rows, config["BLOCK_ROWS"], max(1, MAX_PROGRAMS // n_col_blocks))
    partials = launch.empty((n_programs, n_cols), like=pre, dtype=torch.float32)
    if n_rows > 0:
        # Grid: one program per share of the row tiles and block of columns.
        launch.run(
            _activation_backward_kernel,
            (n_programs, n_col_blocks),
            config,
            grad_ptr=grad,
            pre_ptr=pre,
            grad_pre_ptr=grad_pre,
            activated_ptr=activated,
            partials_ptr=partials,
            n_rows=n_rows,
            tiles_each=tiles_each,
            n_cols=n_cols,
            grad_row_stride=grad.stride(0),
            pre_row_stride=pre.stride(0),
            ACTIVATION=activation,
        )
    return grad_pre, activated, column_sums(partials)
