"""For models of other libraries: `accelerate` and `restore`, and attention for transformers' other encoders."""

from fastbert.adapters.swap import accelerate, counts, restore

__all__ = ["accelerate", "counts", "restore"]
