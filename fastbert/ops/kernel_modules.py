"""This module imports modules of Triton kernels at their first use, because Triton may not be installed.

An import statement inside a function costs the host half a microsecond at each launch, even for a loaded module.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch


@functools.cache
def kernels_of(module: str) -> Any:
    """Returns a module of `fastbert_kernels`. Raises ImportError without Triton."""
    return importlib.import_module(f"fastbert_kernels.{module}")


def dense_rows(rows: torch.Tensor) -> torch.Tensor:
    """Returns the rows with unit stride, as kernels need them: the same tensor, or a copy."""
    return rows if rows.is_contiguous() or rows.stride(-1) == 1 else rows.contiguous()
