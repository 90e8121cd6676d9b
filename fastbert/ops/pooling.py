"""This module pools each sequence to one vector, with optional L2 normalisation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fastbert.ops import dispatch, recording, tracing
from fastbert.ops.dispatch import AUTO, Policy
from fastbert.ops.library import register
from fastbert_kernels import cpu

KERNELS = {"triton": "fastbert_kernels.pooling", "torch": "sum or segment_reduce, index_select"}

MEANS = ("mean", "mean_sqrt_len")
EXACT = ("cls", "max", "last")  # these modes round nothing
MODES = ("cls", "mean", "max", "weighted_mean", "last", "mean_sqrt_len")


def _sums(hidden: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Returns the sum over each sequence, (T, H) -> (B, H)."""
    if (hidden.device.type == "cpu" and not torch.compiler.is_compiling()) or tracing.transformed(hidden) is not None:
        # On CPUs segment_reduce adds row after row, which loses bits over a long text; sum() adds in a cascade.
        # It has no rule for transforms either.
        return torch.stack([part.sum(0) for part in hidden.split(offsets.diff().tolist())])
    return torch.segment_reduce(hidden, "sum", offsets=offsets, axis=0)


def _maxima(hidden: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Returns the maximum of each column over each sequence, (T, H) -> (B, H); undefined for an empty one.

    The gradient goes to the first of equal rows, as in torch.max. In segment_reduce it goes to all of them, and a
    negative gradient is not divided.
    """
    if tracing.transformed(hidden) is not None:  # segment_reduce has no rule for transforms
        parts = hidden.split(offsets.diff().tolist())
        return torch.stack([part.max(0).values if part.shape[0] else hidden[0] for part in parts])
    if not hidden.requires_grad:
        return torch.segment_reduce(hidden, "max", offsets=offsets, axis=0)
    return hidden.gather(0, _first_maxima(hidden.detach(), offsets).clamp(max=hidden.shape[0] - 1))


def _first_maxima(hidden: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Returns the first row with each column's maximum, or NaN, (T, H) -> (B, H); T for an empty sequence."""
    n_rows = hidden.shape[0]
    maxima = torch.segment_reduce(hidden, "max", offsets=offsets, axis=0)
    sequences = _sequences(offsets, n_rows)
    greatest = (hidden == maxima[sequences]) | hidden.isnan()
    rows = torch.where(greatest, torch.arange(n_rows, device=hidden.device)[:, None], n_rows)
    first = torch.full(maxima.shape, n_rows, device=hidden.device)
    return first.scatter_reduce(0, sequences[:, None].expand_as(rows), rows, "amin")


def _sequences(offsets: torch.Tensor, n_rows: int) -> torch.Tensor:
    """Returns the sequence of each row, (B + 1,) -> (T,)."""
    return torch.repeat_interleave(offsets.diff(), output_size=n_rows)


def _eager(
    hidden: torch.Tensor, cu_seqlens: torch.Tensor, mode: str, normalize: bool, out_dtype: torch.dtype
) -> torch.Tensor:
    offsets = cu_seqlens.long()
    lengths = offsets.diff()
    # Sums in float32 at least, as in the kernel: a long text in bf16 would lose its tail.
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    empty = (lengths == 0)[:, None]
    if not torch.compiler.is_compiling() and hidden.shape[0] == 0:  # a tracer cannot compare sizes, and has tokens
        pooled = hidden.new_zeros(lengths.shape[0], hidden.shape[1])
    elif mode in ("cls", "last"):
        rows = offsets[:-1] if mode == "cls" else offsets[1:] - 1
        pooled = hidden.index_select(0, rows.clamp(0, hidden.shape[0] - 1))
    elif mode == "max":
        pooled = _maxima(hidden, offsets)
    else:
        n = lengths.clamp(min=1).to(hidden.dtype)[:, None]
        if mode == "weighted_mean":
            starts = torch.repeat_interleave(offsets[:-1], lengths, output_size=hidden.shape[0])
            weights = torch.arange(1, hidden.shape[0] + 1, device=hidden.device) - starts
            hidden = hidden * weights.to(hidden.dtype)[:, None]
        divisor = {"mean": n, "mean_sqrt_len": n.sqrt(), "weighted_mean": n * (n + 1) / 2}[mode]
        pooled = _sums(hidden, offsets) / divisor
    pooled = pooled.masked_fill(empty, 0.0)
    if normalize:
        pooled = F.normalize(pooled, dim=-1, eps=1e-12)
    return pooled.to(out_dtype)


def _eager_backward(
    grad: torch.Tensor, hidden: torch.Tensor, cu_seqlens: torch.Tensor, mode: str, normalize: bool
) -> torch.Tensor:
    """Returns the gradient of hidden by operations of PyTorch, which have derivatives themselves."""
    grad = grad.to(torch.promote_types(hidden.dtype, torch.float32))
    if normalize:
        grad = _normalize_backward(grad, _eager(hidden, cu_seqlens, mode, False, grad.dtype))
    offsets = cu_seqlens.long()
    sequences = _sequences(offsets, hidden.shape[0])
    rows = torch.arange(hidden.shape[0], device=hidden.device)
    places, n = rows - offsets[sequences], offsets.diff()[sequences]
    if mode == "max":
        share = rows[:, None] == _first_maxima(hidden.detach(), offsets)[sequences]
    elif mode in ("cls", "last"):
        share = (places == (0 if mode == "cls" else n - 1))[:, None]
    else:
        n = n.to(grad.dtype)
        weight = {"mean": 1 / n, "mean_sqrt_len": 1 / n.sqrt(), "weighted_mean": 2 * (places + 1) / (n * (n + 1))}
        share = weight[mode][:, None]
    return (grad[sequences] * share).to(hidden.dtype)


def _normalize_backward(grad: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
    """Returns the gradient of the pooled vectors, (B, H), from that of the normalised ones."""
    norm = pooled.norm(dim=-1, keepdim=True)
    divisor = norm.clamp(min=1e-12)
    y = pooled / divisor
    along = (y * grad).sum(-1, keepdim=True).masked_fill(norm < 1e-12, 0.0)
    return (grad - y * along) / divisor


def _kernel_backward(
    grad: torch.Tensor, hidden: torch.Tensor, cu_seqlens: torch.Tensor, mode: str, normalize: bool
) -> torch.Tensor:
    from fastbert_kernels.pooling_backward import pool_backward

    return pool_backward(_rows(grad), _rows(hidden), cu_seqlens, mode, normalize)


def _backward(
    grad: torch.Tensor, hidden: torch.Tensor, cu_seqlens: torch.Tensor, mode: str, normalize: bool, *_: torch.dtype
) -> tuple[torch.Tensor | None, ...]:
    # The registered operation has no derivative. The same computation in PyTorch has one, for create_graph=True.
    run = _eager_backward if torch.is_grad_enabled() else torch.ops.fastbert.pool_backward
    return run(grad, hidden, cu_seqlens, mode, normalize), None, None, None, None


def _kernel(
    hidden: torch.Tensor, cu_seqlens: torch.Tensor, mode: str, normalize: bool, out_dtype: torch.dtype
) -> torch.Tensor:
    from fastbert_kernels.pooling import pool_forward

    return pool_forward(_rows(hidden), cu_seqlens, mode, normalize, out_dtype)


register(
    "pool(Tensor hidden, Tensor cu_seqlens, str mode, bool normalize, ScalarType out_dtype) -> Tensor",
    kernel=_kernel,
    eager=_eager,
    fake=lambda hidden, cu_seqlens, mode, normalize, out_dtype: hidden.new_empty(
        cu_seqlens.shape[0] - 1, hidden.shape[1], dtype=out_dtype
    ),
    backward=_backward,
)
register(
    "pool_backward(Tensor grad, Tensor hidden, Tensor cu_seqlens, str mode, bool normalize) -> Tensor",
    kernel=_kernel_backward,
    eager=_eager_backward,
    fake=lambda grad, hidden, *rest: torch.empty_like(hidden, memory_format=torch.contiguous_format),
)


def triton_obstacle(hidden_size: int, hidden: torch.Tensor) -> str | None:
    """Tells why the triton backend cannot run this call, or returns None."""
    return dispatch.dtype_obstacle(hidden) or dispatch.hidden_size_obstacle(hidden_size)


def cpu_obstacle(dtype: torch.dtype) -> str | None:
    """Tells why means in float32 run by PyTorch's operations and not by the C++ kernel, or returns None."""
    if dtype not in (torch.float32, torch.bfloat16):
        return f"there is no C++ kernel for {dtype}"
    return cpu.obstacle()


def _compiled(hidden: torch.Tensor, cu_seqlens: torch.Tensor, mode: str, out_dtype: torch.dtype) -> bool:
    """Tells whether the C++ kernel runs: for means in float32, without gradients or an observer of the operations."""
    if not dispatch.direct(hidden):
        return False
    dtypes = out_dtype == torch.float32 and cu_seqlens.dtype == torch.int32
    return dtypes and mode in MEANS and cpu_obstacle(hidden.dtype) is None


def _invariant(
    hidden: torch.Tensor, cu_seqlens: torch.Tensor, mode: str, normalize: bool, out_dtype: torch.dtype
) -> torch.Tensor:
    """Pools on a CPU with all sums in the C++ kernel. PyTorch's sums depend on the numbers of rows and threads."""
    if mode in MEANS:
        return cpu.pool_forward(_rows(hidden), cu_seqlens, mode, normalize).to(out_dtype)
    if mode == "weighted_mean":
        ends = cu_seqlens.long()
        starts = torch.repeat_interleave(ends[:-1], ends.diff(), output_size=hidden.shape[0])
        places = torch.arange(1, hidden.shape[0] + 1, device=hidden.device) - starts
        weighted = hidden.float() * places.float()[:, None]
        pooled = cpu.pool_forward(weighted, cu_seqlens, "mean") / ((ends.diff()[:, None] + 1) / 2)
    else:
        pooled = _eager(hidden, cu_seqlens, mode, False, torch.float32)
    if normalize:
        one_row_each = torch.arange(len(pooled) + 1, dtype=torch.int32, device=pooled.device)
        pooled = cpu.pool_forward(_rows(pooled), one_row_each, "mean", True)
    return pooled.to(out_dtype)


def invariant_obstacle(hidden: torch.Tensor, mode: str, normalize: bool) -> str | None:
    """Tells why the cpu backend has no batch-invariant pooling for this call, or returns None."""
    if mode in EXACT and not normalize:
        return None
    obstacle = cpu_obstacle(hidden.dtype)
    return obstacle or (None if dispatch.direct(hidden) else "gradients are needed, or a mode observes the operations")


def _rows(hidden: torch.Tensor) -> torch.Tensor:
    return hidden if hidden.stride(-1) == 1 else hidden.contiguous()


def pool(
    hidden: torch.Tensor,
    cu_seqlens: torch.Tensor,
    mode: str = "mean",
    *,
    normalize: bool = False,
    out_dtype: torch.dtype | None = None,
    policy: Policy = AUTO,
) -> torch.Tensor:
    """Returns one vector for each sequence. hidden: (T, H); cu_seqlens: (B + 1,) int32 on the same device.

    mode: "cls" (first token), "mean", "max", "weighted_mean" (weights 1 to n by place in the sequence), "last" or
    "mean_sqrt_len". normalize: y / max(||y||_2, 1e-12). Returns (B, H) in out_dtype (hidden's by default); a sequence
    of length 0 gives zeros. Raises ValueError for an unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    asked_dtype, out_dtype = out_dtype, hidden.dtype if out_dtype is None else out_dtype
    obstacle = (
        triton_obstacle(hidden.shape[1], hidden) if dispatch.wants_triton(policy.backend, hidden.device) else None
    )
    backend = dispatch.choose("pooling", policy.backend, policy.strict, hidden.device, obstacle)
    if backend == "triton":
        kernel = "triton"
    else:
        invariant = policy.batch_invariant
        if invariant:
            dispatch.check_invariant("pooling", policy, backend, invariant_obstacle(hidden, mode, normalize))
        if invariant and (mode not in EXACT or normalize):
            kernel = "invariant"
        elif backend == "cpu" and _compiled(hidden, cu_seqlens, mode, out_dtype):
            kernel = "compiled"
        else:
            kernel = "torch"
    if recording.on:
        shape = cu_seqlens.shape[0] - 1, hidden.shape[1]
        facts: dict[str, Any] = {"kernel": kernel, "mode": mode, "normalize": normalize, "out_dtype": asked_dtype}
        if recording.note("pooling", backend, hidden.shape, shape, hidden.dtype, **facts):
            return hidden.new_zeros(shape, dtype=out_dtype)
    if kernel == "triton":
        return torch.ops.fastbert.pool(hidden, cu_seqlens, mode, normalize, out_dtype)
    if kernel == "invariant":
        return _invariant(hidden, cu_seqlens.int(), mode, normalize, out_dtype)
    if kernel == "compiled":
        return cpu.pool_forward(_rows(hidden), cu_seqlens, mode, normalize)
    return _eager(hidden, cu_seqlens, mode, normalize, out_dtype)
