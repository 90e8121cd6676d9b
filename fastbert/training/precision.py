"""The precision is the data type of matrix products. Weights and the optimiser's state are always float32."""

from __future__ import annotations

import torch

from fastbert.engine import cpu_encoder


def takes_bf16(precision: str, device: torch.device) -> bool:
    """Tells whether matrix products use bfloat16: by the setting, or for "auto" if the device is faster with it."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and cpu_encoder.bfloat16_obstacle() is None
