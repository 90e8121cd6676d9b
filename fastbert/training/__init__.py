"""What a training loop needs beside the models: so far, the source of a loss that is not finite."""

from fastbert.training.callback import finite_callback
from fastbert.training.finite import FiniteGuard

__all__ = ["FiniteGuard", "finite_callback"]
