"""Attention with dropout is timed forward and backward, each as a lap: our kernels and kernels that other projects
train with.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from laps import BACKWARD, FORWARD, Lapped
from suites import Built, Work
from torch import Tensor

from fastbert import ops, reference
from fastbert.bench.engines import package_obstacle
from fastbert.bench.peers import OURS
from fastbert.ops import packing
from fastbert_kernels.masks import Dropout, threshold_of

EAGER = "PyTorch eager"
DROPOUT = 0.1
CHECKED = 2  # sequences whose output and gradient are checked; attention does not mix sequences
Attend = Callable[[Tensor, float], Tensor]  # qkv (T, 3 * N * D), probability of dropout -> (T, N * D)


class AttentionStep(Lapped):
    """An AttentionStep is one function, forward and backward. It has dropout while it is timed, and none while it is
    checked.
    """

    def __init__(
        self, name: str, attend: Attend, qkv: Tensor, grad: Tensor, n_checked: int, obstacle: str | None = None
    ) -> None:
        super().__init__(qkv.device)
        self.name, self.attend, self.grad, self.n_checked, self._obstacle = name, attend, grad, n_checked, obstacle
        self.qkv = qkv.clone().requires_grad_()

    def obstacle(self) -> str | None:
        return self._obstacle

    def run(self, i: int) -> None:
        self.qkv.grad = None
        self.start()
        out = self.attend(self.qkv, DROPOUT)
        self.mark()
        out.backward(self.grad)
        self.mark()

    def output(self) -> Tensor:
        self.run(0)  # for the peak of memory
        self.qkv.grad = None
        out = self.attend(self.qkv, 0.0)
        out.backward(self.grad)
        assert self.qkv.grad is not None
        return checked_part(out.detach(), self.qkv.grad, self.n_checked)


def checked_part(out: Tensor, grad: Tensor, n_rows: int) -> Tensor:
    """Returns the first rows of the output and of the gradient, joined."""
    return torch.cat([out[:n_rows].flatten(), grad[:n_rows].flatten()]).cpu().double()


def build(n_heads: int, head_size: int, lengths: Sequence[int], dtype: torch.dtype, device: torch.device) -> Built:
    """Builds the contest on sequences of these lengths, which are equal: SDPA's kernels take no padding."""
    torch.manual_seed(0)
    batch, width = packing.from_lengths(lengths, device), n_heads * head_size
    qkv, grad = (torch.randn(sum(lengths), n * width, device=device).to(dtype) for n in (3, 1))
    n_checked = sum(lengths[:CHECKED])
    exact = qkv[:n_checked].double().requires_grad_()
    offsets = torch.tensor([0, *lengths[:CHECKED]]).cumsum(0)
    out = reference.varlen_attention(exact, offsets, n_heads)
    out.backward(grad[:n_checked].double())
    assert exact.grad is not None

    seeds = itertools.count()  # another mask at each call

    def ours(qkv: Tensor, p: float) -> Tensor:
        dropout = Dropout(threshold_of(p), next(seeds), 0) if p else None
        return ops.varlen_attention(qkv, batch, n_heads, dropout=dropout)

    def padded(attend: Callable[..., Tensor]) -> Attend:
        def run(qkv: Tensor, p: float) -> Tensor:
            q, k, v = qkv.view(len(lengths), -1, 3, n_heads, head_size).permute(2, 0, 3, 1, 4)  # (B, N, S, D)
            return attend(q, k, v, dropout_p=p).transpose(1, 2).reshape(-1, width)

        return run

    def flash(qkv: Tensor, p: float) -> Tensor:
        from flash_attn import flash_attn_varlen_qkvpacked_func

        packed = qkv.view(-1, 3, n_heads, head_size)
        run = flash_attn_varlen_qkvpacked_func
        return run(packed, batch.cu_seqlens, max(lengths), dropout_p=p, deterministic=True).flatten(1)

    functions: list[tuple[str, Attend, str | None]] = [
        (OURS, ours, None),
        (EAGER, padded(_eager), None),
        ("SDPA", padded(F.scaled_dot_product_attention), None),
        ("FlashAttention-2, deterministic", flash, package_obstacle("flash-attn")),
    ]
    peers = [AttentionStep(name, run, qkv, grad, n_checked, obstacle) for name, run, obstacle in functions]
    forward = 4.0 * width * sum(n * n for n in lengths)
    # The backward pass has five products where the forward pass has two.
    works = {FORWARD: Work(forward), BACKWARD: Work(2.5 * forward)}
    extra = {"length": max(lengths), "batch": len(lengths)}
    return Built(
        peers, EAGER, checked_part(out.detach(), exact.grad, n_checked), tokens=sum(lengths), work=Work(3.5 * forward),
        extra=extra, laps=works,
    )  # fmt: skip


def _eager(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
    probabilities = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)
    return F.dropout(probabilities, dropout_p) @ v
