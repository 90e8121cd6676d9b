"""This module checks labels on the host before any kernel runs, and leaves out rows without a label."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.ops import tracing
from fastbert.ops.tracing import untraced

IGNORED = -100
_FAR = 1 << 62  # beyond any label


def readable(labels: Tensor) -> bool:
    """Tells whether values may be read on the host: the program is not exported, traced or transformed."""
    return not torch.compiler.is_exporting() and tracing.transformed(labels) is None


@untraced
def check_labels(labels: Tensor, n_classes: int, ignore_index: int = IGNORED, name: str = "labels") -> int | None:
    """Returns the number of labels that are not ignored, or None if no values may be read. It reads the device once.

    labels: integers of any shape. Raises ValueError for a label that is neither from 0 to n_classes - 1 nor
    ignore_index.
    """
    if not readable(labels):
        return None
    if labels.numel() == 0:
        return 0
    labels = labels.long()
    ignored = labels == ignore_index
    bounds = labels.masked_fill(ignored, _FAR).amin(), labels.masked_fill(ignored, -_FAR).amax(), (~ignored).sum()
    least, greatest, count = torch.stack(bounds).tolist()
    if count and (least < 0 or greatest >= n_classes):
        raise ValueError(
            f"{name}: expected classes from 0 to {n_classes - 1}, or {ignore_index} for none, "
            f"got values from {least} to {greatest}"
        )
    return int(count)


@untraced
def labelled_rows(labels: Tensor, n_classes: int, ignore_index: int = IGNORED, name: str = "labels") -> Tensor | None:
    """Returns the places of labels, (T,), that are not ignored, in order; None if no label is ignored.

    It reads the device once, so values must be readable. It raises ValueError as `check_labels` does.
    """
    count = check_labels(labels, n_classes, ignore_index, name)
    assert count is not None, "values may not be read: ask `readable` first"
    if count == labels.shape[0]:
        return None
    return torch.nonzero_static(labels != ignore_index, size=count).flatten()


def mean_cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = IGNORED) -> Tensor:
    """Returns PyTorch's mean cross entropy, or 0 with gradients of 0 if every label is ignored or there is none."""
    none = (labels == ignore_index).all()
    loss = torch.nn.functional.cross_entropy(logits, labels.masked_fill(none, 0), ignore_index=ignore_index)
    return loss.masked_fill(none, 0.0)
