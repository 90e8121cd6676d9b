"""This module chooses between our GEMM and cuBLAS's on the triton backend."""

from __future__ import annotations

import torch


def gemm_kernel(
    dtype: torch.dtype,
    activation: str,
    shape: tuple[int, int] | None = None,
    *,
    arch: int | None = None,
    residual: bool = False,
    batch_invariant: bool = False,
) -> tuple[str, str]:
    """Tells which GEMM the triton backend takes, "fastbert" (with its epilogue) or "cublas", and why.

    shape: (K, M). residual: whether one is added after the GEMM. The tables of arch know what was timed for the shape;
    the rest is heuristic: an activation in the epilogue saves a pass over (T, I) in memory; without one cuBLAS has
    nothing to lose, and in float32 its IEEE GEMM is the faster one: Triton has only scalar multiply-adds for it.
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
    return "fastbert", "heuristic: the activation is in the epilogue"
