"""This package trains BERT on raw text, trains heads on BERT, and finds the source of NaN in any training loop.

Modules are imported when a name is first used, so the options of `fastbert pretrain` do not wait for PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastbert.training.callback import finite_callback
    from fastbert.training.finetuning.embeddings import train_embeddings
    from fastbert.training.finetuning.finetune import finetune
    from fastbert.training.finetuning.rerank import train_cross_encoder
    from fastbert.training.finite import FiniteGuard

_PUBLIC = {
    "FiniteGuard": "fastbert.training.finite",
    "finetune": "fastbert.training.finetuning.finetune",
    "finite_callback": "fastbert.training.callback",
    "train_cross_encoder": "fastbert.training.finetuning.rerank",
    "train_embeddings": "fastbert.training.finetuning.embeddings",
}

__all__ = ["FiniteGuard", "finetune", "finite_callback", "train_cross_encoder", "train_embeddings"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fastbert.training' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
