"""This module holds linear layers with bias and activation, or with bias, dropout, residual and LayerNorm."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastbert.checkpoint.activations import OTHERS
from fastbert.ops import dispatch, gelu, layer_norm, packed_linear, recording, tracing
from fastbert.ops.dispatch import AUTO, Policy
from fastbert.ops.dropout import Drop, probability_of
from fastbert.ops.gemm import gemm_kernel, takes_our_gemm
from fastbert.ops.kernel_modules import dense_rows, kernels_of
from fastbert.ops.library import register
from fastbert.ops.training import choose, functions

KERNELS = {
    "triton": "fastbert_kernels.linear",
    "torch": "torch.nn.functional.linear",
}


def _eager(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    residual: torch.Tensor | None = None,
    by_rows: bool = False,
) -> torch.Tensor:
    out = gelu.activate(F.linear(x, weight, bias), activation)
    return out if residual is None else out + residual


def _kernel(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    residual: torch.Tensor | None = None,
    by_rows: bool = False,
) -> torch.Tensor:
    residual = None if residual is None else dense_rows(residual)
    out: torch.Tensor = kernels_of("linear").linear_forward(
        dense_rows(x), dense_rows(weight), bias, activation, residual, by_rows=by_rows
    )
    return out


register(
    "linear(Tensor x, Tensor weight, Tensor? bias, str activation, Tensor? residual=None, bool by_rows=False)"
    " -> Tensor",
    kernel=_kernel,
    eager=_eager,
    fake=lambda x, weight, *others: x.new_empty(x.shape[0], weight.shape[0]),
)


def _eager_layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    ln_weight: torch.Tensor,
    ln_bias: torch.Tensor,
    eps: float,
    product: str,
) -> torch.Tensor:
    return F.layer_norm(F.linear(x, weight, bias) + residual, weight.shape[:1], ln_weight, ln_bias, eps)


def _kernel_layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    ln_weight: torch.Tensor,
    ln_bias: torch.Tensor,
    eps: float,
    product: str,
) -> torch.Tensor:
    from fastbert_kernels import few_rows, launch
    from fastbert_kernels.layer_norm import bias_residual_layer_norm_forward
    from fastbert_kernels.split_linear import split_linear_layer_norm_forward

    norm = ln_weight, ln_bias, eps
    x, weight, residual = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, weight, residual))
    split = few_rows.split(x.dtype, launch.arch(x.device), (weight.shape[1], weight.shape[0]), x.shape[0])
    if split is not None:
        return split_linear_layer_norm_forward(x, weight, bias, residual, *norm, split)
    if product == "fastbert":
        y = _kernel(x, weight, bias, "none", residual, by_rows=True)
        return bias_residual_layer_norm_forward(y, None, None, *norm)
    return bias_residual_layer_norm_forward(F.linear(x, weight), bias, residual, *norm)


# product: "fastbert" or "library" if no table splits this number of rows. The kernel chooses inside, so that a tracer
# does not specialise on the number of rows.
register(
    "linear_layer_norm(Tensor x, Tensor weight, Tensor? bias, Tensor residual, Tensor ln_weight, Tensor ln_bias, "
    "float eps, str product) -> Tensor",
    kernel=_kernel_layer_norm,
    eager=_eager_layer_norm,
    fake=lambda x, weight, *others: x.new_empty(x.shape[0], weight.shape[0]),
)


def splits(x: torch.Tensor, weight: torch.Tensor, policy: Policy) -> bool:
    """Tells whether a table splits this linear before LayerNorm for some number of rows."""
    if policy.batch_invariant:
        return False
    from fastbert_kernels import few_rows

    return few_rows.splits(x.dtype, dispatch.arch_of(x.device), (weight.shape[1], weight.shape[0]))


def _ours(
    x: torch.Tensor, weight: torch.Tensor, activation: str, residual: bool, policy: Policy, obstacle: str | None
) -> bool:
    n_cols, k_size = weight.shape
    how = policy.backend, policy.batch_invariant, obstacle
    return takes_our_gemm(x.dtype, activation, k_size, n_cols, residual, x.device, *how)


def _packed(
    policy: Policy,
    keep: bool,
    obstacle: str | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    *others: torch.Tensor | None,
) -> bool:
    """Tells whether the backend is "cpu" and its weight is packed. obstacle: the reason why triton cannot run it."""
    if policy.batch_invariant:
        backend = dispatch.decide("linear", policy, x.device, obstacle).backend
        invariant_obstacle = packed_linear.invariant_obstacle(x, weight, *others)
        dispatch.check_invariant("linear", policy, backend, invariant_obstacle)
        return invariant_obstacle is None  # in a dry run nothing raises
    if not keep or x.device.type != "cpu" or dispatch.decide("linear", policy, x.device, obstacle).backend != "cpu":
        return False
    return packed_linear.operands_obstacle(x, weight, *others) is None


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    *,
    policy: Policy = AUTO,
    keep: bool = True,
) -> torch.Tensor:
    """Computes activation(x @ weight^T + bias). x: (T, K), weight: (M, K), bias: (M,) or None, of one floating dtype.

    activation: "none", "gelu" (erf), "gelu_tanh", "relu" or one of fastbert.checkpoint.activations.OTHERS. keep:
    whether a packed copy of the weight may be kept; False in training mode. Returns (T, M) in x's dtype. Raises
    ValueError for wrong shapes, BackendError under a strict policy.
    """
    check_shapes(x, weight, bias)
    if activation in OTHERS:
        return gelu.bias_gelu(linear(x, weight, bias, policy=policy, keep=keep), None, activation, policy=policy)
    if (
        choose.wanted(policy, None, x, weight, bias)
        and (trained := _with_gradients(x, weight, bias, activation, policy)) is not None
    ):
        return trained
    obstacle = dispatch.dtype_obstacle(x, weight, bias) or gelu.activation_obstacle(activation)
    # Without an activation PyTorch's product runs on every backend, unless gemm_kernel selects fastbert's.
    backend = None
    if activation != "none":
        backend = dispatch.choose("linear", policy.backend, policy.strict, x.device, obstacle)
    if backend in (None, "triton") and _ours(x, weight, activation, False, policy, obstacle):
        product = "fastbert"
    elif (
        backend != "triton"
        and activation in packed_linear.ACTIVATIONS
        and _packed(policy, keep, obstacle, x, weight, bias)
    ):
        product = "packed"
    else:
        product = "library"
    gelu_later = product == "library" and backend == "triton"
    if recording.on:
        later = activation if gelu_later else None
        if _note(product, policy, obstacle, x, weight, bias, activation, later=later):
            return x.new_zeros(x.shape[0], weight.shape[0])
    if product == "fastbert":
        return torch.ops.fastbert.linear(x, weight, bias, activation, None, not policy.batch_invariant)
    if product == "packed":
        return packed_linear.linear(x, weight, bias, activation, batch_invariant=policy.batch_invariant, keep=keep)
    if gelu_later:
        return torch.ops.fastbert.bias_gelu(F.linear(x, weight), bias, activation)
    return F.linear(x, weight, bias) if activation == "none" else _eager(x, weight, bias, activation)


def _note(
    product: str,
    policy: Policy,
    obstacle: str | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str = "none",
    *,
    residual: bool = False,
    later: str | None = None,
    choice: bool = True,
) -> bool:
    """Records a product: "fastbert" (Triton), "packed", "split" (with a LayerNorm), or "library" (PyTorch's).
    Returns what `recording.note` does.

    later: the activation of a separate kernel, which also adds the bias. residual: whether the product may add one.
    choice: whether the product was chosen, if the backend is "triton".
    """
    backend = dispatch.decide("linear", policy, x.device, obstacle).backend
    shape, n_cols = (x.shape[0], weight.shape[0]), weight.shape[0]
    why = None
    if backend == "triton" and choice:
        arch, sizes = dispatch.arch_of(x.device), (weight.shape[1], n_cols)
        invariant = policy.batch_invariant
        why = gemm_kernel(x.dtype, activation, sizes, arch=arch, residual=residual, batch_invariant=invariant)[1]
    facts = {
        "product": product,
        "why": why,
        "bias": bias is not None and later is None,
        "activation": "none" if later is not None else activation,
        "residual": residual and product != "library",
        "batch_invariant": policy.batch_invariant,
    }
    dry = recording.note("linear", backend, x.shape, shape, x.dtype, weight, **facts)
    if later is not None:
        recording.note("bias_gelu", backend, shape, shape, x.dtype, weight, bias=bias is not None, activation=later)
    return dry


def linear_residual_layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    ln_weight: torch.Tensor,
    ln_bias: torch.Tensor,
    eps: float,
    *,
    dropout: Drop = None,
    policy: Policy = AUTO,
    keep: bool = True,
) -> torch.Tensor:
    """Computes LayerNorm(dropout(x @ weight^T + bias) + residual) * ln_weight + ln_bias.

    x: (T, K), weight: (H, K), bias: (H,) or None, residual: (T, H), ln_weight, ln_bias: (H,). keep: as in `linear`.
    Returns (T, H). The matrix product adds bias and residual if it is fastbert's GEMM or has a packed weight. Otherwise
    the LayerNorm kernel adds them. Without this kernel the matrix product adds the bias.
    """
    check_shapes(x, weight, bias)
    may_train = choose.perhaps(dropout, torch.compiler.is_compiling())
    if may_train and choose.wanted(policy, dropout, x, weight, bias, residual, ln_weight, ln_bias):
        y = linear(x, weight, bias, policy=policy, keep=keep)
        return layer_norm.bias_residual_layer_norm(
            y, None, residual, ln_weight, ln_bias, eps, dropout=dropout, policy=policy
        )
    dropout_p = probability_of(dropout)
    obstacle = layer_norm.triton_obstacle(
        weight.shape[0], x, weight, bias, residual, ln_weight, ln_bias, dropout_p=dropout_p
    )
    backend = dispatch.choose("layer_norm", policy.backend, policy.strict, x.device, obstacle)
    fused = backend == "triton"
    if not fused:
        dispatch.check_invariant("layer_norm", policy, backend, dispatch.training_obstacle(dropout_p))
    if fused and _ours(x, weight, "none", True, policy, obstacle):
        product = "fastbert"
    elif not fused and dropout_p == 0.0 and _packed(policy, keep, obstacle, x, weight, bias, residual):
        product = "packed"
    else:
        product = "library"
    if fused and dropout_p == 0.0 and splits(x, weight, policy):
        if recording.on and _note("split", policy, obstacle, x, weight, bias, residual=True):
            return torch.empty_like(residual)
        return torch.ops.fastbert.linear_layer_norm(x, weight, bias, residual, ln_weight, ln_bias, eps, product)
    inside = bias if product != "library" or not fused else None
    if recording.on and _note(
        product, policy, dispatch.dtype_obstacle(x, weight, bias), x, weight, inside, residual=True, choice=fused
    ):
        y = x.new_zeros(x.shape[0], weight.shape[0])
    elif product == "fastbert":
        y = torch.ops.fastbert.linear(x, weight, bias, "none", residual, not policy.batch_invariant)
    elif product == "packed":
        y = packed_linear.linear(x, weight, bias, residual=residual, batch_invariant=policy.batch_invariant, keep=keep)
    else:
        y = F.linear(x, weight, inside)
    if product != "library":
        return layer_norm.bias_residual_layer_norm(y, None, None, ln_weight, ln_bias, eps, policy=policy)
    return layer_norm.bias_residual_layer_norm(
        y, bias if fused else None, residual, ln_weight, ln_bias, eps, dropout=dropout, policy=policy
    )


def _with_gradients(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str, policy: Policy
) -> torch.Tensor | None:
    """Runs the linear with gradients by kernels; returns None if PyTorch's linear must run."""
    to, sizes = choose.product_dtype(x), tuple(weight.shape)
    mixed = {t.dtype for t in (x, weight, bias) if t is not None} - {x.dtype}
    if mixed and to == x.dtype and not torch.is_autocast_enabled(x.device.type):
        return None
    kernels = choose.kernels("linear", policy, x.device, to, sizes=sizes, activation=activation)
    return None if kernels is None else functions.linear(x, weight, bias, activation, kernels, to)


def check_shapes(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Raises ValueError for tensors that no linear can multiply."""
    known = tracing.has_sizes()
    if x.dim() != 2 or weight.dim() != 2 or (known and x.shape[1] != weight.shape[1]):
        raise ValueError(f"x, weight: expected (T, K) and (M, K), got {tuple(x.shape)} and {tuple(weight.shape)}")
    if bias is not None and known and bias.shape != (weight.shape[0],):
        raise ValueError(f"bias: expected shape ({weight.shape[0]},), got {tuple(bias.shape)}")
