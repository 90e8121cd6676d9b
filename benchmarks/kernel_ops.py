"""Each fused operation is described for the kernel suite: inputs, our function, eager PyTorch's, and the least work.

fastbert and the packed library kernels take (T, ...) tokens. Eager PyTorch takes the padded (B, S, ...) batch, which
has the same tokens if all lengths are equal.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from suites import Work
from torch import Tensor

from fastbert import ops, reference
from fastbert.ops import Policy, packing

VOCAB, POSITIONS = 30522, 512
EPS = 1e-12


@dataclass
class Shape:
    """A Shape has the sizes of one case. batch and mask, (B, S) bool, give the places of tokens; padded copies use
    them.
    """

    hidden: int
    inner: int
    heads: int
    lengths: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    batch: packing.PackedBatch = field(init=False)
    mask: Tensor = field(init=False)

    def __post_init__(self) -> None:
        lengths = torch.tensor(self.lengths)
        self.mask = (torch.arange(int(lengths.max())) < lengths[:, None]).to(self.device)
        self.batch = packing.unpad(self.mask)

    @property
    def n_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def equal(self) -> bool:
        return len(set(self.lengths)) == 1

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def policy(self) -> Policy:
        """The policy is strict: a fallback is a failure, and is not timed under the kernel's name."""
        return Policy("cpu" if self.device.type == "cpu" else "triton", strict=True)

    def randn(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        return (torch.randn(*shape, device=self.device) * scale + mean).to(self.dtype)


class Op:
    """An Op is one operation in one shape. needs: the operations whose tests must have passed.

    ours and eager take activations and weights, as do functions of `library`. exact takes them in float64 with the
    offsets of their sequences. per_sequence: the output has a row a sequence instead of one a token.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]
    per_sequence: ClassVar[bool] = False

    def __init__(self, shape: Shape) -> None:
        self.shape = shape

    def activations(self) -> tuple[Tensor, ...]:
        """Returns new (T, ...) tensors."""
        raise NotImplementedError

    def weights(self) -> tuple[Tensor, ...]:
        return ()

    def ours(self, *tensors: Tensor) -> Tensor:
        raise NotImplementedError

    def eager(self, *tensors: Tensor) -> Tensor:
        raise NotImplementedError

    def exact(self, cu_seqlens: Tensor, *tensors: Tensor) -> Tensor:
        raise NotImplementedError

    def work(self, *tensors: Tensor) -> Work:
        raise NotImplementedError


class LayerNorm(Op):
    name, needs = "layer_norm", ("layer_norm",)

    def activations(self) -> tuple[Tensor, ...]:
        n, h = self.shape.n_tokens, self.shape.hidden
        return self.shape.randn(n, h), self.shape.randn(n, h)

    def weights(self) -> tuple[Tensor, ...]:
        h, randn = self.shape.hidden, self.shape.randn
        return randn(h), randn(h, scale=0.1, mean=1.0), randn(h)

    def ours(self, x: Tensor, residual: Tensor, bias: Tensor, weight: Tensor, ln_bias: Tensor) -> Tensor:
        return ops.bias_residual_layer_norm(x, bias, residual, weight, ln_bias, EPS, policy=self.shape.policy)

    def eager(self, x: Tensor, residual: Tensor, bias: Tensor, weight: Tensor, ln_bias: Tensor) -> Tensor:
        return F.layer_norm(x + bias + residual, weight.shape, weight, ln_bias, EPS)

    def exact(self, cu_seqlens: Tensor, x: Tensor, residual: Tensor, bias: Tensor, *norm: Tensor) -> Tensor:
        return reference.bias_residual_layer_norm(x, bias, residual, *norm, EPS)

    def work(self, *tensors: Tensor) -> Work:
        # x and residual read, out written: 3 T H; bias, weight, ln_bias: 3 H.
        return Work(n_bytes=(3 * self.shape.n_tokens + 3) * self.shape.hidden * self.shape.itemsize)


class BiasGelu(Op):
    name, needs = "bias_gelu", ("gelu",)

    def activations(self) -> tuple[Tensor, ...]:
        return (self.shape.randn(self.shape.n_tokens, self.shape.inner),)

    def weights(self) -> tuple[Tensor, ...]:
        return (self.shape.randn(self.shape.inner),)

    def ours(self, x: Tensor, bias: Tensor) -> Tensor:
        return ops.bias_gelu(x, bias, policy=self.shape.policy)

    def eager(self, x: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(x + bias)

    def exact(self, cu_seqlens: Tensor, x: Tensor, bias: Tensor) -> Tensor:
        return reference.bias_gelu(x, bias)

    def work(self, *tensors: Tensor) -> Work:
        # x read, out written: 2 T I; bias: I.
        return Work(n_bytes=(2 * self.shape.n_tokens + 1) * self.shape.inner * self.shape.itemsize)


class LinearGelu(Op):
    name, needs = "linear + GELU", ("linear", "gelu")

    def activations(self) -> tuple[Tensor, ...]:
        return (self.shape.randn(self.shape.n_tokens, self.shape.hidden),)

    def weights(self) -> tuple[Tensor, ...]:
        return self.shape.randn(self.shape.inner, self.shape.hidden, scale=0.02), self.shape.randn(self.shape.inner)

    def ours(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.linear(x, weight, bias, "gelu", policy=self.shape.policy)

    def eager(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(F.linear(x, weight, bias))

    def exact(self, cu_seqlens: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return reference.linear(x, weight, bias, "gelu")

    def work(self, *tensors: Tensor) -> Work:
        return _gemm(self.shape, self.shape.hidden, self.shape.inner)


class LinearLayerNorm(Op):
    """LinearLayerNorm is the second half of a layer: (T, I) -> (T, H), bias, residual, LayerNorm."""

    name, needs = "linear + residual + LayerNorm", ("linear", "layer_norm")

    def activations(self) -> tuple[Tensor, ...]:
        n, randn = self.shape.n_tokens, self.shape.randn
        return randn(n, self.shape.inner), randn(n, self.shape.hidden)

    def weights(self) -> tuple[Tensor, ...]:
        h, randn = self.shape.hidden, self.shape.randn
        return randn(h, self.shape.inner, scale=0.02), randn(h), randn(h, scale=0.1, mean=1.0), randn(h)

    def ours(self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *norm: Tensor) -> Tensor:
        policy = self.shape.policy
        return ops.linear_residual_layer_norm(x, weight, bias, residual, *norm, EPS, policy=policy)

    def eager(self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *norm: Tensor) -> Tensor:
        return F.layer_norm(F.linear(x, weight, bias) + residual, bias.shape, *norm, EPS)

    def exact(self, cu_seqlens: Tensor, x: Tensor, residual: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
        bias, *norm = rest
        return reference.bias_residual_layer_norm(x @ weight.T, bias, residual, *norm, EPS)

    def work(self, *tensors: Tensor) -> Work:
        gemm = _gemm(self.shape, self.shape.inner, self.shape.hidden)
        # The residual is read as well.
        residual = self.shape.n_tokens * self.shape.hidden * self.shape.itemsize
        return Work(gemm.flops, gemm.n_bytes + residual)


class Embedding(Op):
    name, needs = "embedding + LayerNorm", ("embedding",)

    def activations(self) -> tuple[Tensor, ...]:
        n, device = self.shape.n_tokens, self.shape.device
        words, types = (torch.randint(0, size, (n,), device=device) for size in (VOCAB, 2))
        return words, types, self.shape.batch.position_ids

    def weights(self) -> tuple[Tensor, ...]:
        h, randn = self.shape.hidden, self.shape.randn
        tables = (randn(n, h, scale=0.02) for n in (VOCAB, 2, POSITIONS))
        return *tables, randn(h, scale=0.1, mean=1.0), randn(h)

    def ours(self, *tensors: Tensor) -> Tensor:
        return ops.embedding_layer_norm(*tensors, EPS, policy=self.shape.policy)

    def eager(self, *tensors: Tensor) -> Tensor:
        words, types, positions, word, token_type, position, *norm = tensors
        x = F.embedding(words, word) + F.embedding(types, token_type) + F.embedding(positions, position)
        return F.layer_norm(x, (x.shape[-1],), *norm, EPS)

    def exact(self, cu_seqlens: Tensor, *tensors: Tensor) -> Tensor:
        words, types, positions, word, token_type, position, *norm = tensors
        ids = (t.long() for t in (words, types, positions))
        return reference.embedding_layer_norm(*ids, word, position, token_type, *norm, EPS)

    def work(self, *tensors: Tensor) -> Work:
        # The used rows of the tables once each; out written: T H; three ids of 8 bytes a token.
        rows = sum(int(t.unique().numel()) for t in tensors[:3]) + self.shape.n_tokens
        return Work(n_bytes=rows * self.shape.hidden * self.shape.itemsize + 24 * self.shape.n_tokens)


class Pooling(Op):
    """Pooling is the mean over each sequence, normalised to length 1."""

    name, needs, per_sequence = "mean pooling", ("pooling",), True

    def activations(self) -> tuple[Tensor, ...]:
        return (self.shape.randn(self.shape.n_tokens, self.shape.hidden),)

    def ours(self, x: Tensor) -> Tensor:
        return ops.pool(x, self.shape.batch.cu_seqlens, "mean", normalize=True, policy=self.shape.policy)

    def eager(self, x: Tensor) -> Tensor:
        mask = self.shape.mask[:, :, None].to(x.dtype)
        return F.normalize((x * mask).sum(1) / mask.sum(1), dim=1)

    def exact(self, cu_seqlens: Tensor, x: Tensor) -> Tensor:
        return reference.pool(x, cu_seqlens, "mean", normalize=True)

    def work(self, *tensors: Tensor) -> Work:
        # x read: T H; out written: B H.
        rows = self.shape.n_tokens + len(self.shape.lengths)
        return Work(n_bytes=rows * self.shape.hidden * self.shape.itemsize)


class Attention(Op):
    name, needs = "attention", ("attention",)

    def activations(self) -> tuple[Tensor, ...]:
        return (self.shape.randn(self.shape.n_tokens, 3 * self.shape.hidden),)

    def ours(self, qkv: Tensor) -> Tensor:
        return ops.varlen_attention(qkv, self.shape.batch, self.shape.heads, policy=self.shape.policy)

    def eager(self, qkv: Tensor) -> Tensor:
        q, k, v = self.split(qkv)
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if not self.shape.equal:
            scores = scores.masked_fill(~self.shape.mask[:, None, None, :], torch.finfo(scores.dtype).min)
        return self.join(torch.softmax(scores, dim=-1) @ v)

    def exact(self, cu_seqlens: Tensor, qkv: Tensor) -> Tensor:
        return reference.varlen_attention(qkv, cu_seqlens, self.shape.heads)

    def work(self, *tensors: Tensor) -> Work:
        # Two products of n^2 D multiply-adds a head and sequence of n tokens: 4 H sum(n^2). q, k, v read, out written.
        flops = 4 * self.shape.hidden * sum(n * n for n in self.shape.lengths)
        return Work(flops, 4 * self.shape.n_tokens * self.shape.hidden * self.shape.itemsize)

    def sdpa(self, qkv: Tensor) -> Tensor:
        mask = None if self.shape.equal else self.shape.mask[:, None, None, :]
        return self.join(F.scaled_dot_product_attention(*self.split(qkv), attn_mask=mask))

    def varlen_attn(self, qkv: Tensor) -> Tensor:
        from torch.nn.attention import varlen as torch_varlen

        batch, longest = self.shape.batch, max(self.shape.lengths)
        q, k, v = qkv.view(qkv.shape[0], 3, self.shape.heads, -1).unbind(1)
        out = torch_varlen.varlen_attn(q, k, v, batch.cu_seqlens, batch.cu_seqlens, longest, longest)
        return out.flatten(1)

    def split(self, qkv: Tensor) -> Any:
        """Splits (B, S, 3H) into q, k, v, each (B, N, S, D), as views."""
        return qkv.unflatten(-1, (3, self.shape.heads, -1)).permute(2, 0, 3, 1, 4)

    def join(self, out: Tensor) -> Tensor:
        """Joins (B, N, S, D) to (B, S, H)."""
        return out.transpose(1, 2).flatten(2)


def _gemm(shape: Shape, k: int, m: int) -> Work:
    # 2 T M K operations; x, weight and out once each, and the bias.
    n = shape.n_tokens
    return Work(2.0 * n * k * m, (n * k + m * k + n * m + m) * shape.itemsize)


OPS: dict[str, type[Op]] = {
    op.name: op for op in (LinearGelu, Attention, LayerNorm, LinearLayerNorm, Embedding, Pooling, BiasGelu)
}
