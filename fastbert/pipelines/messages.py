"""Tensors go through a pipe as arrays. As tensors, each would hold its own file descriptor and shared memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class _Bits:
    """A _Bits holds a tensor of a dtype that NumPy lacks, as whole numbers of the same size."""

    array: np.ndarray
    dtype: torch.dtype


@dataclass(frozen=True)
class _Array:
    """An _Array holds a tensor whose dtype NumPy has."""

    array: np.ndarray


def to_message(value: Any) -> Any:
    """Returns the value with arrays instead of tensors, in lists, tuples and dicts as well."""
    if isinstance(value, Tensor):
        tensor = value.detach().cpu().contiguous()
        if tensor.dtype == torch.bfloat16:
            return _Bits(tensor.view(torch.int16).numpy(), tensor.dtype)
        return _Array(tensor.numpy())
    if isinstance(value, dict):
        return {key: to_message(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(to_message(item) for item in value)
    return value


def from_message(value: Any) -> Any:
    """Inverts `to_message`, with tensors on the CPU."""
    if isinstance(value, _Bits):
        return torch.from_numpy(value.array).view(value.dtype)
    if isinstance(value, _Array):
        return torch.from_numpy(value.array)
    if isinstance(value, dict):
        return {key: from_message(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(from_message(item) for item in value)
    return value
