"""The passes of training by the C++ kernels for CPUs, in float32 and bfloat16."""

from __future__ import annotations

from fastbert.ops.training.plain import Plain


class CpuKernels(Plain):
    """The passes by C++ kernels; rows are contiguous."""

    name = "cpu"
