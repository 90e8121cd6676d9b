"""This package runs models of other libraries: `accelerate`, `restore`, and attention for other encoders."""

from fastbert.adapters import acceleration
from fastbert.adapters.acceleration import accelerate, counts, encoder_in, modules, notes, obstacle, restore
from fastbert.adapters.attention import register_attention
from fastbert.adapters.counting import first_encoder, lenient, twins, uncounted
from fastbert.adapters.live_encoder import Unsupported

swap = acceleration  # Programs that ask `swap.counts(model)` have the module under its first name.

__all__ = [
    "Unsupported",
    "accelerate",
    "counts",
    "encoder_in",
    "first_encoder",
    "lenient",
    "modules",
    "notes",
    "obstacle",
    "register_attention",
    "restore",
    "swap",
    "twins",
    "uncounted",
]
