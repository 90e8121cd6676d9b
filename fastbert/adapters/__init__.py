"""For models of other libraries: `accelerate` and `restore`, and attention for transformers' other encoders."""

from fastbert.adapters.acceleration import accelerate, counts, encoder_in, modules, notes, obstacle, restore
from fastbert.adapters.attention import register_attention
from fastbert.adapters.live_encoder import Unsupported

__all__ = [
    "Unsupported",
    "accelerate",
    "counts",
    "encoder_in",
    "modules",
    "notes",
    "obstacle",
    "register_attention",
    "restore",
]
