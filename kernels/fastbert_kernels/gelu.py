"""This kernel adds a bias and applies GELU in one pass, for linears whose GEMM has no epilogue of its own.

    erf:   gelu(x) = x * (1 + erf(x / sqrt(2))) / 2
    tanh:  gelu(x) = x * (1 + tanh(u)) / 2 = x * sigmoid(2 u),    u = sqrt(2 / pi) * (x + 0.044715 x^3)

x, out: (T, I), fp32 / bf16 / fp16; bias: (I,). Arithmetic in float32. Bytes moved: 2 * T * I elements.
Elementwise, so a row's bits do not depend on the batch.

Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016, arXiv:1606.08415.
"""

from __future__ import annotations

import torch
import triton.language as tl

from fastbert_kernels import configs, launch
from fastbert_kernels.jit import jit

SQRT_1_2 = tl.constexpr(0.7071067811865476)
SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
# What a is cut off at, then P(a) from the highest power down.
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
    C: tl.constexpr = (
        LOG2_PHI_8 if DTYPE.primitive_bitwidth == 8 else LOG2_PHI_FP16 if DTYPE.is_fp16() else LOG2_PHI_BF16
    )
    # Where a is cut off, 2^P is far below anything that can be seen in the result; infinity * 0 is kept out as well.
    a = tl.minimum(tl.abs(x), C[0])
    p = C[1] * a + C[2]
    for i in tl.static_range(3, 8 if DTYPE.is_fp16() else 7):
        p = p * a + C[i]
    # A bare maximum would make 0 of NaN.
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) - a * tl.exp2(p)


@jit
def gelu_tanh(x):
    """Elementwise, float32. (1 + tanh(u)) / 2 = sigmoid(2 u) needs no tanh and loses no bits near u = 0."""
    u = SQRT_2_OVER_PI * (x + 0.044715 * x * x * x)
    return x * tl.sigmoid(2.0 * u)


@jit
def activate(x, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr):
    """The epilogue's activation, elementwise on float32: "none", "gelu" or "gelu_tanh". DTYPE: of the result."""
    if ACTIVATION == "gelu":
        x = gelu_erf(x) if DTYPE.is_fp32() else gelu_erf_rounded(x, DTYPE)
    elif ACTIVATION == "gelu_tanh":
        x = gelu_tanh(x)
    return x


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
