"""The precision in which a training multiplies; weights and the optimiser's state are float32 in each."""

from __future__ import annotations

import torch

from fastbert.engine import cpu_encoder


def takes_bf16(precision: str, device: torch.device) -> bool:
    """Tells whether products are in bfloat16: where that is asked for, or where the device is faster at it."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and cpu_encoder.bfloat16_obstacle() is None
