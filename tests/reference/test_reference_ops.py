"""The reference operations give what torch and sentence-transformers give, in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from sentence_transformers.sentence_transformer.modules import Pooling

from fastbert import reference
from reference_cases import error, generator, randn

OP_BOUND = 1e-12


@pytest.mark.parametrize("hidden", [1, 97, 768, 1023])
@pytest.mark.parametrize("eps", [1e-12, 1e-2])
def test_layer_norm(hidden: int, eps: float) -> None:
    """Catches a variance divided by n - 1 or an epsilon outside the root."""
    x, weight, bias = 3 * randn(7, hidden) + 5, randn(hidden, seed=1), randn(hidden, seed=2)
    assert error(reference.layer_norm(x, weight, bias, eps), F.layer_norm(x, (hidden,), weight, bias, eps)) < OP_BOUND


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_bias_residual_layer_norm(with_bias: bool, with_residual: bool) -> None:
    """Catches an addend left out, or added after the norm."""
    x, residual, bias, weight, ln_bias = randn(9, 33), randn(9, 33, seed=1), *randn(3, 33, seed=2)
    total = x + bias * with_bias + residual * with_residual
    ours = reference.bias_residual_layer_norm(
        x, bias if with_bias else None, residual if with_residual else None, weight, ln_bias, 1e-5
    )
    assert error(ours, F.layer_norm(total, (33,), weight, ln_bias, 1e-5)) < OP_BOUND


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(approximate: str) -> None:
    """Catches the wrong form of GELU, or a bias added to its result."""
    x, bias = 4 * randn(50, 31), randn(31, seed=1)
    assert error(reference.gelu(x, approximate), F.gelu(x, approximate=approximate)) < OP_BOUND
    assert error(reference.bias_gelu(x, bias, approximate), F.gelu(x + bias, approximate=approximate)) < OP_BOUND


def test_gelu_tail() -> None:
    """Catches cancellation in the left tail, where 1 + erf(x) has no digits left."""
    x = torch.linspace(-30, -5, 26, dtype=torch.float64)
    expected = torch.tensor([v * 0.5 * math.erfc(-v / math.sqrt(2)) for v in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(reference.gelu(x), expected, rtol=1e-12, atol=0)


def test_linear() -> None:
    """Catches an untransposed weight, or an activation taken before the bias."""
    x, weight, bias = randn(3, 5, 17), randn(29, 17, seed=1), randn(29, seed=2)
    plain = F.linear(x, weight, bias)
    assert error(reference.linear(x, weight), F.linear(x, weight)) < OP_BOUND
    assert error(reference.linear(x, weight, bias), plain) < OP_BOUND
    assert error(reference.linear(x, weight, bias, "gelu"), F.gelu(plain)) < OP_BOUND
    assert error(reference.linear(x, weight, bias, "gelu_tanh"), F.gelu(plain, approximate="tanh")) < OP_BOUND
    assert error(reference.linear(x, weight, bias, "relu"), F.relu(plain)) < OP_BOUND


@pytest.mark.parametrize("lead", [(11,), (2, 5)])
@pytest.mark.parametrize("types", [False, True])
@pytest.mark.parametrize("embeds", [False, True])
def test_embedding_layer_norm(lead: tuple[int, ...], types: bool, embeds: bool) -> None:
    """Catches a table left out or looked up with another's ids."""
    word, position, token_type = randn(20, 16), randn(12, 16, seed=1), randn(2, 16, seed=2)
    weight, bias = randn(2, 16, seed=3)
    ids, positions, type_ids = (torch.randint(n, lead, generator=generator(n)) for n in (20, 12, 2))
    inputs_embeds = randn(*lead, 16, seed=4)
    total = inputs_embeds if embeds else F.embedding(ids, word)
    total = total + F.embedding(positions, position) + F.embedding(type_ids * types, token_type)
    ours = reference.embedding_layer_norm(
        None if embeds else ids,
        type_ids if types else None,
        positions,
        word,
        position,
        token_type,
        weight,
        bias,
        1e-12,
        inputs_embeds if embeds else None,
    )
    assert error(ours, F.layer_norm(total, (16,), weight, bias, 1e-12)) < OP_BOUND


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize(("heads", "size"), [(1, 16), (3, 32), (5, 64), (2, 7)])
def test_varlen_attention(heads: int, size: int, scale: float | None) -> None:
    """Catches attention across sequences, a wrong head layout, or a crash on an empty sequence."""
    lengths = [0, 1, 7, 0, 33, 2, 0]
    hidden = heads * size
    qkv = randn(sum(lengths), 3 * hidden)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    ours = reference.varlen_attention(qkv, cu_seqlens, heads, scale)
    assert ours.shape == (sum(lengths), hidden)
    for rows, mine in zip(qkv.split(lengths), ours.split(lengths), strict=True):
        if len(rows):
            q, k, v = rows.reshape(1, len(rows), 3, heads, size).permute(2, 0, 3, 1, 4)
            expected = F.scaled_dot_product_attention(q, k, v, scale=scale)[0].transpose(0, 1).reshape(-1, hidden)
            assert error(mine, expected) < OP_BOUND


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_packed_ops_without_tokens(lengths: list[int]) -> None:
    """Catches a crash on no tokens and on no sequences."""
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    assert reference.varlen_attention(randn(0, 24), cu_seqlens, 2).shape == (0, 8)
    for mode in reference.POOLING_MODES:
        pooled = reference.pool(randn(0, 8), cu_seqlens, mode, normalize=True)
        assert torch.equal(pooled, torch.zeros(len(lengths), 8, dtype=torch.float64))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("mode", "theirs"),
    [
        ("cls", "cls"),
        ("mean", "mean"),
        ("max", "max"),
        ("weighted_mean", "weightedmean"),
        ("last", "lasttoken"),
        ("mean_sqrt_len", "mean_sqrt_len_tokens"),
    ],
)
def test_pool_matches_sentence_transformers(mode: str, theirs: str, normalize: bool) -> None:
    """Catches a wrong formula of a mode, or a sequence's vector in another's place after an empty one."""
    lengths = torch.tensor([4, 1, 9, 2])
    padded = randn(4, 9, 11)
    valid = torch.arange(9)[None] < lengths[:, None]
    features = {"token_embeddings": padded, "attention_mask": valid.long()}
    expected = Pooling(11, theirs)(features)["sentence_embedding"]
    if normalize:
        expected = F.normalize(expected, dim=1)
    cu_seqlens = torch.tensor([0, 4, 4, 5, 14, 16]).int()
    ours = reference.pool(padded[valid], cu_seqlens, mode, normalize)
    assert error(ours[[0, 2, 3, 4]], expected) < OP_BOUND
    assert (ours[1] == 0).all()


@pytest.mark.parametrize("mode", reference.POOLING_MODES)
def test_pool_gradient_is_finite(mode: str) -> None:
    """Catches a NaN gradient from normalising the zero vector of an empty sequence."""
    hidden = randn(5, 6).requires_grad_()
    reference.pool(hidden, torch.tensor([0, 0, 2, 5, 5]), mode, normalize=True).square().sum().backward()
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ops_keep_their_dtype(dtype: torch.dtype) -> None:
    """Catches an operation that promotes its inputs, and so judges others by a dtype that nobody asked for."""
    x, w, cu = randn(6, 12).to(dtype), randn(12, seed=1).to(dtype), torch.tensor([0, 2, 6]).int()
    outputs = [
        reference.bias_residual_layer_norm(x, w, x, w, w, 1e-12),
        reference.bias_gelu(x, w, "none"),
        reference.bias_gelu(x, w, "tanh"),
        reference.linear(x, x, None, "gelu"),
        reference.varlen_attention(x, cu, 2),
        *(reference.pool(x, cu, mode, normalize=True) for mode in reference.POOLING_MODES),
    ]
    assert {y.dtype for y in outputs} == {dtype}
