"""The losses of the models with heads take the labels of transformers. No loss includes padding.

If every label is ignored, a loss is 0, with gradients of 0. A label that is no class raises ValueError on the host; but
a position of an answer outside of its row is ignored.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import ops
from fastbert.ops import IGNORED, Policy, packing, tracing


def token_loss(logits: Tensor, labels: Tensor | None, batch: packing.PackedBatch) -> Tensor | None:
    """Returns the mean cross entropy over tokens with a label other than -100. logits: packed (T, C), labels: padded
    (B, S).
    """
    if labels is None:
        return None
    labels = packed_labels(labels, logits, batch)
    ops.check_labels(labels, logits.shape[-1])
    return ops.mean_cross_entropy(logits, labels)


def packed_labels(labels: Tensor, like: Tensor, batch: packing.PackedBatch) -> Tensor:
    """Returns the labels of the tokens, (T,), from padded (B, S) labels. like: a tensor on their device."""
    check_labels("labels", labels, like, (batch.batch_size, batch.padded_length))
    return packing.pack(labels, batch, IGNORED).long()


def labelled_loss(head: Any, hidden: Tensor, labels: Tensor, batch: packing.PackedBatch, policy: Policy) -> Tensor:
    """Returns the `token_loss` of a head for tokens on hidden states, (T, H). The head runs only on labelled tokens.

    head: a plain BertLMPredictionHead. labels: padded (B, S).
    """
    labels, decoder = packed_labels(labels, hidden, batch), head.decoder
    rows = ops.labelled_rows(labels, decoder.weight.shape[0])
    if rows is not None:
        hidden, labels = hidden.index_select(0, rows), labels.index_select(0, rows)
    x = head.transform(hidden, policy)
    return ops.linear_cross_entropy(x, decoder.weight, decoder.bias, labels, policy=policy, check=False)


def class_loss(logits: Tensor, labels: Tensor | None, name: str = "labels") -> Tensor | None:
    """Returns the mean cross entropy over rows with a label other than -100. logits: (B, C), labels: (B,) or (B, 1)."""
    if labels is None:
        return None
    check_labels(name, labels, logits, (logits.shape[0],), (logits.shape[0], 1))
    labels = labels.view(-1).long()
    ops.check_labels(labels, logits.shape[1], name=name)
    return ops.mean_cross_entropy(logits, labels)


def check_labels(name: str, labels: Tensor, logits: Tensor, *shapes: tuple[int, ...], classes: bool = True) -> None:
    """Raises ValueError for a shape or a device, TypeError for classes that are no integers."""
    if all(tracing.differ(tuple(labels.shape), shape) for shape in shapes):
        raise ValueError(f"{name}: expected shape {shapes[0]}, got {tuple(labels.shape)}")
    if labels.device != logits.device:
        raise ValueError(f"{name}: expected a tensor on the model's device {logits.device}, got {labels.device}")
    if classes and (labels.is_floating_point() or labels.is_complex()):
        raise TypeError(f"{name}: expected integers, got {labels.dtype}")


@tracing.untraced
def check_shares(labels: Tensor) -> None:
    """Raises ValueError for labels of several classes outside of 0 to 1. This waits for the device once."""
    if labels.numel() == 0 or not ops.readable(labels):
        return
    least, greatest = torch.stack(labels.aminmax()).tolist()
    if not (least >= 0.0 and greatest <= 1.0):
        raise ValueError(f"labels: expected numbers from 0 to 1, got values from {least:g} to {greatest:g}")


def sequence_loss(logits: Tensor, labels: Tensor | None, problem: str | None, num_labels: int) -> Tensor | None:
    """Returns the loss of a classification of, or a regression on, whole sequences. logits: (B, C).

    labels: (B,) classes, or (B, C) floats. problem, num_labels: as in the config. Without a problem, num_labels and the
    form of the labels decide it.
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
    # Autocast computes these in float32, and would read labels that were rounded to its dtype.
    autocast = torch.is_autocast_enabled(logits.device.type)
    dtype = torch.promote_types(logits.dtype, torch.float32) if autocast else logits.dtype
    labels = labels.view(n, n_labels).to(dtype)
    if problem == "regression":
        return F.mse_loss(logits, labels)
    check_shares(labels)
    return F.binary_cross_entropy_with_logits(logits, labels)


def span_loss(logits: Tensor, token: Tensor, positions: Tensor, name: str) -> Tensor:
    """Returns the mean cross entropy over the tokens of each row. logits: (B, S), token: (B, S) bool, positions: (B,)
    or (B, 1).

    A position at padding, or above S - 1, is not part of the loss. name: the name of the positions in errors.
    """
    n, length = logits.shape
    check_labels(name, positions, logits, (n,), (n, 1))
    positions = positions.view(-1).long().clamp(0, length)
    answerable = F.pad(token, (0, 1)).gather(1, positions[:, None])[:, 0]
    positions = positions.masked_fill(~answerable, length)
    logits = logits.masked_fill(~token, torch.finfo(logits.dtype).min)
    return ops.mean_cross_entropy(logits, positions, ignore_index=length)
