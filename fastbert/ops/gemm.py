"""This module chooses between fastbert's GEMM and cuBLAS's on the triton backend."""

from __future__ import annotations

import functools

import torch

from fastbert.ops import dispatch, recording
from fastbert.ops.dispatch import Policy
from fastbert.ops.tracing import constant


def gemm_kernel(
    dtype: torch.dtype,
    activation: str,
    shape: tuple[int, int] | None = None,
    *,
    arch: int | None = None,
    residual: bool = False,
    batch_invariant: bool = False,
) -> tuple[str, str]:
    """Returns the GEMM that the triton backend runs, "fastbert" (with its epilogue) or "cublas", and the reason.

    activation: "gated" for a product with its gate. shape: (K, M). residual: whether one is added after the GEMM. The
    tables of arch hold the choice for timed shapes. For other shapes there is a heuristic. An activation or a gate in
    the epilogue saves a pass over (T, I) in memory. Without one cuBLAS is selected. In float32 cuBLAS's IEEE GEMM is
    faster, because Triton has only scalar multiply-adds for it.
    """
    if batch_invariant:
        return "fastbert", "batch_invariant: cuBLAS chooses its algorithm by the number of rows"
    if shape is not None and arch is not None:
        from fastbert_kernels import configs

        known = configs.gemm(dtype, arch, shape, "residual" if residual else activation)
        if known.choice is not None and known.choice_source is not None:
            return "cublas" if known.choice == "cublas" else "fastbert", known.choice_source
    if dtype == torch.float32:
        return "cublas", "heuristic: IEEE float32 has no tensor cores"
    if activation == "none":
        return "cublas", "heuristic: no activation to fuse"
    if activation == "gated":
        return "fastbert", "heuristic: the gate is in the epilogue"
    return "fastbert", "heuristic: the activation is in the epilogue"


@constant
def takes_our_gemm(
    dtype: torch.dtype,
    activation: str,
    k_size: int,
    n_cols: int,
    residual: bool,
    device: torch.device,
    backend: str,
    batch_invariant: bool,
    obstacle: str | None,
) -> bool:
    """Tells whether fastbert's GEMM runs. Without an activation PyTorch's runs, unless the tables choose fastbert's."""
    if batch_invariant:
        return dispatch.choose("linear", backend, True, device, obstacle) == "triton"
    if backend in ("cpu", "torch") or (backend == "auto" and device.type == "cpu"):
        return False
    question = dtype, activation, (k_size, n_cols), residual, device, backend, obstacle
    # The answer may change under the interpreter, which tests turn on and off, and in a dry run for another GPU.
    return _looked_up(*question) if device.type == "cpu" or recording.on else _remembered(*question)


def _looked_up(
    dtype: torch.dtype,
    activation: str,
    shape: tuple[int, int],
    residual: bool,
    device: torch.device,
    backend: str,
    obstacle: str | None,
) -> bool:
    if dispatch.decide("linear", Policy(backend), device, obstacle).backend != "triton":
        return False
    from fastbert_kernels import tables

    tables.on_forget(_remembered.cache_clear)
    return gemm_kernel(dtype, activation, shape, arch=dispatch.arch_of(device), residual=residual)[0] == "fastbert"


_remembered = functools.cache(_looked_up)
