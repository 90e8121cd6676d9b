"""Modules of Triton kernels are imported at their first use, since Triton need not be there.

An import statement inside of a function takes the host half a microsecond at each launch, also where all is imported.
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
    """Returns the rows as kernels take them, of unit stride: themselves, or a copy."""
    return rows if rows.is_contiguous() or rows.stride(-1) == 1 else rows.contiguous()
