"""The tests of attention share lengths at which it makes mistakes, and a check against eager attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastbert import ops, reference
from fastbert.ops import packing
from helpers import assert_as_accurate, cu_seqlens_of, guarded

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# Which edge each list of lengths stands at.
LENGTHS = {
    "one token": [1],
    "around a tile": [127, 128, 129, 63, 64, 65],
    "511 and 512": [511, 512],
    "many of length 1": [1] * 200,
    "one long among short": [3, 5, 2, 300, 4, 1, 7],
    "zero-length rows": [0, 5, 0, 0, 130, 0, 1, 0],
    "only zero-length rows": [0, 0],
}


def eager_attention(qkv: torch.Tensor, lengths: list[int], num_heads: int, scale: float) -> torch.Tensor:
    """transformers' eager attention, a sequence at a time, in qkv's dtype. (T, 3H) -> (T, H)"""
    outs = [qkv.new_empty(0, qkv.shape[1] // 3)]
    for part in qkv.split(lengths):
        if part.shape[0]:
            q, k, v = part.view(part.shape[0], 3, num_heads, -1).permute(1, 2, 0, 3)
            probabilities = F.softmax(q @ k.transpose(-1, -2) * scale, dim=-1)
            outs.append((probabilities @ v).transpose(0, 1).reshape(part.shape[0], -1))
    return torch.cat(outs)


def check(name, lengths, num_heads, head_size, dtype, device, policy, scale=None, gain=1.0):
    n_tokens, hidden_size = sum(lengths), num_heads * head_size
    qkv = (torch.randn(n_tokens, 3 * hidden_size) * gain).to(device, dtype)
    batch = packing.from_cu_seqlens(cu_seqlens_of(lengths), n_tokens, device)
    ours = ops.varlen_attention(guarded(qkv, extra_columns=8), batch, num_heads, scale=scale, policy=policy)
    scale = head_size**-0.5 if scale is None else scale
    expected = reference.varlen_attention(qkv.double(), batch.cu_seqlens, num_heads, scale)
    assert_as_accurate(name, ours, eager_attention(qkv, lengths, num_heads, scale), expected)
