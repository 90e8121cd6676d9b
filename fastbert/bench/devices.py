"""The benchmarks select a device, and a data type that is fast on it."""

from __future__ import annotations

import torch

from fastbert.bench.options import LIMIT
from fastbert.engine import cpu_encoder


def choose_device(name: str | None) -> torch.device:
    """Returns the named device, by default the GPU if there is one. Raises ValueError if it is not available."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type not in LIMIT:
        raise ValueError(f"device: got {name!r}, expected cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: got {name!r}, but PyTorch finds no NVIDIA GPU")
    return device


def fast_at_bfloat16(device: torch.device) -> bool:
    """Tells whether the device multiplies bfloat16 matrices faster than float32 ones.

    On a CPU, dtype="auto" uses this.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return cpu_encoder.bfloat16_obstacle() is None
