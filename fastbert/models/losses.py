"""The losses of the models with heads, with the labels of transformers. Padding enters none of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.ops import packing, tracing

IGNORED = -100


def token_loss(logits: Tensor, labels: Tensor | None, batch: packing.PackedBatch) -> Tensor | None:
    """Mean cross entropy over the tokens whose label is not -100. logits: packed (T, C), labels: padded (B, S)."""
    if labels is None:
        return None
    check_labels("labels", labels, logits, (batch.batch_size, batch.padded_length))
    return F.cross_entropy(logits, packing.pack(labels, batch, IGNORED).long(), ignore_index=IGNORED)


def class_loss(logits: Tensor, labels: Tensor | None, name: str = "labels") -> Tensor | None:
    """Mean cross entropy. logits: (B, C), labels: (B,) or (B, 1)."""
    if labels is None:
        return None
    check_labels(name, labels, logits, (logits.shape[0],), (logits.shape[0], 1))
    return F.cross_entropy(logits, labels.view(-1).long())


def check_labels(name: str, labels: Tensor, logits: Tensor, *shapes: tuple[int, ...], classes: bool = True) -> None:
    """Raises ValueError for a shape or a device, TypeError for classes that are no integers."""
    if all(tracing.differ(tuple(labels.shape), shape) for shape in shapes):
        raise ValueError(f"{name}: expected shape {shapes[0]}, got {tuple(labels.shape)}")
    if labels.device != logits.device:
        raise ValueError(f"{name}: expected a tensor on the model's device {logits.device}, got {labels.device}")
    if classes and (labels.is_floating_point() or labels.is_complex()):
        raise TypeError(f"{name}: expected integers, got {labels.dtype}")


def sequence_loss(logits: Tensor, labels: Tensor | None, problem: str | None, num_labels: int) -> Tensor | None:
    """The loss of a classification of, or a regression on, whole sequences. logits: (B, C).

    labels: (B,) classes, or (B, C) floats. problem, num_labels: as in the config; without a problem it is what
    num_labels and the form of the labels say.
    """
    if labels is None:
        return None
    n, n_labels = logits.shape
    if problem is None:
        if num_labels == 1:
            problem = "regression"
        elif labels.is_floating_point():
            problem = "multi_label_classification"
        else:
            problem = "single_label_classification"
    if problem == "single_label_classification":
        return class_loss(logits, labels)
    shapes = [(n, n_labels), (n,)] if n_labels == 1 else [(n, n_labels)]
    check_labels("labels", labels, logits, *shapes, classes=False)
    labels = labels.view(n, n_labels).to(logits.dtype)
    if problem == "regression":
        return F.mse_loss(logits, labels)
    return F.binary_cross_entropy_with_logits(logits, labels)


def span_loss(logits: Tensor, token: Tensor, positions: Tensor, name: str) -> Tensor:
    """Mean cross entropy over the tokens of each row. logits: (B, S), token: (B, S) bool, positions: (B,) or (B, 1).

    A position at padding, or above S - 1, enters no loss. name: what an error calls the positions.
    """
    n, length = logits.shape
    check_labels(name, positions, logits, (n,), (n, 1))
    positions = positions.view(-1).long().clamp(0, length)
    answerable = F.pad(token, (0, 1)).gather(1, positions[:, None])[:, 0]
    positions = positions.masked_fill(~answerable, length)
    logits = logits.masked_fill(~token, torch.finfo(logits.dtype).min)
    return F.cross_entropy(logits, positions, ignore_index=length)
