"""The cross entropy of a linear layer's outputs is computed in chunks of rows, without the whole logits (T, V).

Only labelled rows are multiplied. The forward pass keeps two numbers for each row, and the logits of the last chunk.
The backward pass computes the logits of the other chunks again. It replaces the logits of a chunk by their gradient,
and adds this chunk's part of the gradients of hidden states, weight and bias. A batch in one chunk multiplies nothing
twice.

Liger-Kernel computes gradients in the forward pass, scales them in the backward pass, and never multiplies again. Here
the backward pass computes them, for three reasons. Memory does not hold a gradient as large as the weight between the
passes. A GradScaler's factor reaches a float16 gradient before it is rounded. PyTorch detects a weight that changes
between the passes, and gradients can be computed twice.

PyTorch 2.13 has a function `linear_cross_entropy`, which is not used. Without any label its result is NaN. In chunks it
does not smooth labels, rounds 16-bit sums after each chunk, ignores autocast, and adds with atomics on GPUs. It has no
z-loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.ops import dispatch, softmax_rows, tracing
from fastbert.ops.dispatch import AUTO, Policy
from fastbert.ops.labels import IGNORED, labelled_rows, readable
from fastbert.ops.softmax_rows import Statistics, Terms, wide
from fastbert.ops.tracing import untraced

KERNELS = {"triton": "fastbert_kernels.cross_entropy", "torch": "amax, exp and sum of blocks of rows"}

# The logits of a chunk take at most so many bytes by the type of device, or are one row.
CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}
REDUCTIONS = ("mean", "sum", "none")


def n_rows_within(n_cols: int, like: Tensor) -> int:
    """Returns the number of rows in a chunk, for rows of this length in a tensor's dtype and on its device."""
    n_bytes = CHUNK_BYTES.get(like.device.type, CHUNK_BYTES["cuda"])
    return max(1, n_bytes // max(1, n_cols * like.dtype.itemsize))


@dataclass
class _Rows:
    """Holds labelled rows: the operands of their products, and how the losses are computed."""

    hidden: Tensor  # (T, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (width,)
    labels: Tensor  # (T,)
    terms: Terms
    kernels: bool  # whether the Triton kernels run

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.hidden, self.weight, self.bias

    def chunks(self) -> list[slice]:
        """Returns the rows of each chunk. The chunks have nearly equal sizes."""
        n_rows = self.hidden.shape[0]
        n_chunks = -(-n_rows // n_rows_within(self.weight.shape[0], self.hidden))
        step = -(-n_rows // max(1, n_chunks))
        return [slice(start, min(start + step, n_rows)) for start in range(0, n_rows, max(1, step))]

    @property
    def width(self) -> int:
        """Returns the columns of the logits' memory. For the kernels rows begin at multiples of 16 (tensor cores)."""
        n_classes = self.weight.shape[0]
        return -(-n_classes // 16) * 16 if self.kernels else n_classes

    def buffer(self, chunk: slice) -> Tensor:
        """Returns memory for the logits of a chunk, (rows, width)."""
        shape = chunk.stop - chunk.start, self.width
        if not self.kernels:
            return self.hidden.new_empty(shape)
        from fastbert_kernels import launch

        return launch.empty(shape, like=self.hidden)

    def multiply(self, chunk: slice, buffer: Tensor) -> None:
        """Writes the logits of a chunk into the first rows of the buffer, without the bias if the kernels add it."""
        hidden, weight, out = self.hidden[chunk], self.weight.t(), self.logits(chunk, buffer)
        if self.bias is None or self.kernels:
            torch.mm(hidden, weight, out=out)
        else:
            torch.addmm(self.bias, hidden, weight, out=out)

    def logits(self, chunk: slice, buffer: Tensor) -> Tensor:
        """Returns the part of the buffer that holds the logits of a chunk, or their gradient."""
        return buffer[: chunk.stop - chunk.start, : self.weight.shape[0]]

    def forward(self, chunk: slice, buffer: Tensor) -> tuple[Tensor, Statistics]:
        """Returns the losses of a chunk, from its logits in the buffer, and the statistics for its gradient."""
        labels = self.labels[chunk]
        if not self.kernels:
            return softmax_rows.forward(self.logits(chunk, buffer), labels, self.terms)
        from fastbert_kernels.cross_entropy import cross_entropy_forward

        rows, n_classes = buffer[: labels.shape[0]], self.weight.shape[0]
        losses, *statistics = cross_entropy_forward(rows, self.bias, labels, n_classes, IGNORED, *self.terms)
        return losses, Statistics(*statistics)

    def backward(
        self, chunk: slice, buffer: Tensor, statistics: Statistics, scale: Tensor, grad_bias: Tensor | None
    ) -> Tensor:
        """Writes the gradient of a chunk's logits over them, and adds its column sums to grad_bias."""
        labels, peak, log_sum, scale = (each[chunk] for each in (self.labels, *statistics, scale))
        logits = self.logits(chunk, buffer)
        if not self.kernels:
            softmax_rows.backward(logits, labels, Statistics(peak, log_sum), scale, self.terms, grad_bias)
            return logits
        from fastbert_kernels.cross_entropy import cross_entropy_backward

        rows = buffer[: labels.shape[0]]
        cross_entropy_backward(rows, self.bias, labels, peak, log_sum, scale, logits.shape[1], IGNORED, *self.terms)
        if grad_bias is not None:
            grad_bias += logits.sum(0, dtype=grad_bias.dtype)
        return logits


class _WeightGradient:
    """Holds the sum of grad^T @ hidden over chunks. Several chunks are added in float32 at least."""

    def __init__(self, weight: Tensor, n_chunks: int) -> None:
        make = torch.empty_like if n_chunks else torch.zeros_like
        self.total = make(weight, dtype=weight.dtype if n_chunks <= 1 else wide(weight.dtype))
        self.has_some = False

    def add(self, grad: Tensor, hidden: Tensor) -> None:
        if self.total.dtype != grad.dtype:
            self._add_parts(grad, hidden)
        elif self.has_some:
            self.total.addmm_(grad.t(), hidden)
        else:
            torch.mm(grad.t(), hidden, out=self.total)
        self.has_some = True

    def _add_parts(self, grad: Tensor, hidden: Tensor) -> None:
        step = n_rows_within(hidden.shape[1], hidden)  # a product in 16 bits needs new memory
        for part, total in zip(grad.split(step, 1), self.total.split(step), strict=True):
            product = torch.mm(part.t(), hidden)
            _ = total.add_(product) if self.has_some else total.copy_(product)


def _forward(rows: _Rows) -> tuple[Tensor, Statistics, Tensor | None]:
    """Returns the losses, (T,), their statistics, and the buffer that holds the logits of the last chunk."""
    chunks = rows.chunks()
    if not chunks:
        none = rows.hidden.new_empty(0, dtype=wide(rows.hidden.dtype))
        return none, Statistics(none.clone(), none.clone()), None
    buffer, parts = rows.buffer(chunks[0]), []
    for chunk in chunks:
        rows.multiply(chunk, buffer)
        parts.append(rows.forward(chunk, buffer))
    peak, log_sum = (torch.cat(each) for each in zip(*(statistics for _, statistics in parts), strict=True))
    return torch.cat([losses for losses, _ in parts]), Statistics(peak, log_sum), buffer


def _backward(
    rows: _Rows, statistics: Statistics, scale: Tensor, kept: Tensor | None, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Returns the needed gradients, in the operands' dtype or a wider one. kept: the buffer of `_forward`, or None."""
    chunks = rows.chunks()
    hidden, weight, bias = rows.operands
    grad_hidden = torch.empty_like(hidden) if wanted[0] else None
    grad_weight = _WeightGradient(weight, len(chunks)) if wanted[1] else None
    grad_bias = None if bias is None or not wanted[2] else bias.new_zeros(weight.shape[0], dtype=wide(bias.dtype))
    buffer = kept
    for chunk in reversed(chunks):
        if buffer is None:
            buffer = rows.buffer(chunks[0])
        if kept is None or chunk is not chunks[-1]:
            rows.multiply(chunk, buffer)
        logits = rows.backward(chunk, buffer, statistics, scale, grad_bias)
        if grad_hidden is not None:
            torch.mm(logits, weight, out=grad_hidden[chunk])
        if grad_weight is not None:
            grad_weight.add(logits, hidden[chunk])
    return grad_hidden, None if grad_weight is None else grad_weight.total, grad_bias


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the losses of labelled rows, (T,), in float32 at least. dtype: the dtype of the products."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, terms: Terms,
        dtype: torch.dtype, kernels: bool,
    ) -> Tensor:  # fmt: skip
        ctx.options = terms, dtype, kernels
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        with torch.autocast(hidden.device.type, enabled=False):
            rows = _rows(hidden, weight, bias, labels, *ctx.options)
            losses, statistics, ctx.logits = _forward(rows)
        ctx.save_for_backward(rows.hidden, weight, bias, labels, *statistics)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("cross_entropy: its gradient cannot be differentiated again (create_graph=True)")
        *operands, peak, log_sum = ctx.saved_tensors
        logits, ctx.logits = ctx.logits, None
        with torch.autocast(grad.device.type, enabled=False):
            rows = _rows(*operands, *ctx.options)
            grads = _backward(rows, Statistics(peak, log_sum), grad.contiguous(), logits, ctx.needs_input_grad)
            cast = [None if g is None else g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True)]
        return *cast, None, None, None, None


def _rows(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, terms: Terms, dtype: torch.dtype, kernels: bool
) -> _Rows:
    rows = _Rows(hidden.to(dtype), weight.to(dtype), None, labels, terms, kernels)
    if bias is not None:
        rows.bias = F.pad(bias.to(dtype), (0, rows.width - bias.shape[0]))
    return rows


@untraced
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    ignore_index: int = IGNORED,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    policy: Policy = AUTO,
    check: bool = True,
) -> Tensor:
    """Computes the cross entropy of hidden @ weight^T + bias with labels, for rows whose label is not ignore_index.

    hidden: (T, H), weight: (V, H), bias: (V,) or None, of one floating dtype; labels: (T,) integers. Under autocast the
    products are in its dtype; each gradient is in the dtype of its tensor. label_smoothing: as in PyTorch. z_loss: the
    weight of the squared log-sum-exp in the loss. reduction: "mean" divides the "sum" by the number of labelled rows;
    "none" returns (T,), 0 in rows without a label. check=False: the caller has checked that every row has a valid
    label; no values are read from the device.

    Returns float32, or float64 for float64 inputs. Without any label the loss and all gradients are 0. The result is
    differentiable once. Raises ValueError for wrong shapes, options or labels, before any kernel runs; TypeError for
    wrong dtypes; BackendError under a strict policy if no kernel runs, and under a batch-invariant one.
    """
    _check(hidden, weight, bias, labels, reduction)
    terms = _terms(label_smoothing, z_loss)
    if policy.batch_invariant:
        dispatch.refuse("cross_entropy", "its products have as many rows as there are labels")
    if not readable(labels) or tracing.transformed(hidden, weight) is not None:
        return _whole(hidden, weight, bias, labels, ignore_index, terms, reduction)
    rows = labelled_rows(labels, weight.shape[0], ignore_index) if check else None
    n_rows = labels.shape[0]
    if rows is not None:
        hidden, labels = hidden.index_select(0, rows), labels.index_select(0, rows)
    dtype = _dtype_of_products(hidden, weight, bias)
    kernels = dispatch.choose("cross_entropy", policy.backend, policy.strict, hidden.device, _obstacle(dtype))
    labels = labels.long().contiguous()
    losses = _LinearCrossEntropy.apply(hidden, weight, bias, labels, terms, dtype, kernels == "triton")
    if reduction == "none":
        return losses if rows is None else losses.new_zeros(n_rows).index_copy(0, rows, losses)
    return losses.sum() / max(1, losses.shape[0]) if reduction == "mean" else losses.sum()


def _whole(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int, terms: Terms, reduction: str
) -> Tensor:
    """Computes the same from all logits at once, in operations that every tracer and transform supports."""
    logits = F.linear(hidden, weight, bias)
    logits = logits.to(wide(logits.dtype))
    logs = logits.log_softmax(1)
    ignored = labels == ignore_index
    target = logs.gather(1, labels.long().masked_fill(ignored, 0)[:, None])[:, 0]
    losses = -(1.0 - terms.label_smoothing) * target - terms.label_smoothing * logs.mean(1)
    losses = (losses + terms.z_loss * logits.logsumexp(1).square()).masked_fill(ignored, 0.0)
    if reduction == "none":
        return losses
    return losses.sum() / (~ignored).sum().clamp(min=1) if reduction == "mean" else losses.sum()


def _dtype_of_products(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    dtypes = {x.dtype for x in (hidden, weight, bias) if x is not None}
    if torch.is_autocast_enabled(hidden.device.type) and torch.float64 not in dtypes:
        return torch.get_autocast_dtype(hidden.device.type)
    if len(dtypes) > 1:
        raise TypeError(f"hidden, weight, bias: expected one dtype, got {', '.join(sorted(map(str, dtypes)))}")
    return hidden.dtype


def _obstacle(dtype: torch.dtype) -> str | None:
    """Tells why the triton backend cannot run this call, or returns None."""
    known = (torch.float32, torch.bfloat16, torch.float16)
    return None if dtype in known else f"there are no Triton kernels for {dtype}"


def _terms(label_smoothing: float, z_loss: float) -> Terms:
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: expected a number from 0 to 1, got {label_smoothing!r}")
    if not 0.0 <= z_loss < float("inf"):
        raise ValueError(f"z_loss: expected a finite number from 0 on, got {z_loss!r}")
    return Terms(float(label_smoothing), float(z_loss))


def _check(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if hidden.dim() != 2 or weight.dim() != 2 or tracing.differ(hidden.shape[1], weight.shape[1]):
        raise ValueError(
            f"hidden, weight: expected (T, H) and (V, H), got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and tracing.differ(bias.shape, weight.shape[:1]):
        raise ValueError(f"bias: expected shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    if tracing.differ(labels.shape, hidden.shape[:1]):
        raise ValueError(f"labels: expected shape ({hidden.shape[0]},), got {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"labels: expected integers, got {labels.dtype}")
    if labels.device != hidden.device:
        raise ValueError(f"labels: expected a tensor on the device of hidden, {hidden.device}, got {labels.device}")
