"""The embeddings' kernels for training are right: the norm with dropout, and the gradients of the tables."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastbert_kernels import configs
from fastbert_kernels.embedding import embedding_layer_norm_forward, embedding_norm_forward
from fastbert_kernels.embedding_backward import PIECE, embedding_backward, segments_of
from fastbert_kernels.layer_norm_backward import residual_norm_backward
from gradient_cases import BF16, FP16, FP32, PAIR_NAMES, PAIRS, assert_gradient, assert_same_bits, dropout, kept, leaves
from helpers import assert_as_accurate, guarded

EPS = 1e-12
SIZES = {"word": 101, "token_type": 2, "position": 40}
NAMES = (*SIZES, "weight", "ln_bias")


def inputs(n_tokens, hidden_size, s, device, id_dtype=torch.int64):
    """The ids, the tables with the norm's vectors, and the gradient of the output."""
    ids = [torch.randint(0, size, (n_tokens,), device=device, dtype=id_dtype) for size in SIZES.values()]
    tables = [torch.randn(size, hidden_size).to(device, s) for size in SIZES.values()]
    return ids, [*tables, *(torch.randn(hidden_size).to(device, s) for _ in range(2))]


def plain(ids, tensors, mask, embeds=None):
    *tables, weight, ln_bias = tensors
    words, *others = (F.embedding(i, table) for i, table in zip(ids, tables, strict=True))
    x = (words if embeds is None else embeds) + others[0] + others[1]
    return F.layer_norm(x, weight.shape, weight, ln_bias, EPS) * mask.to(x.dtype)


def plain_gradients(ids, tensors, mask, grad, grad_low, c):
    y = plain(ids, tensors, mask)
    loss = (y * grad.to(y.dtype)).sum() + (0 if grad_low is None else (y.to(c) * grad_low.to(c)).sum())
    return dict(zip(NAMES, torch.autograd.grad(loss, tensors), strict=True))


def ours(ids, tensors, drop, c, grad, grad_low):
    word, token_type, position, weight, ln_bias = (guarded(t, extra_columns=3) for t in tensors)
    ids = [guarded(i) for i in ids]
    y, y_low, *saved = embedding_norm_forward(*ids, word, token_type, position, weight, ln_bias, EPS, drop, c, True)
    _, grad_sum, *vectors = residual_norm_backward(
        guarded(grad, 1), grad_low, *map(guarded, saved), weight, None, drop, want_residual=True, want_x=False
    )
    grads = {"weight": vectors[0], "ln_bias": vectors[1]}
    for i, (name, size) in zip(ids, SIZES.items(), strict=True):
        grads[name] = embedding_backward(guarded(grad_sum, 2), segments_of(i, size), grad.dtype)
    return (y, y_low, *saved), grads


@pytest.mark.parametrize(("c", "s"), PAIRS, ids=PAIR_NAMES)
@pytest.mark.parametrize("drop", [None, dropout()], ids=["plain", "dropout"])
def test_kernels(c, s, drop, device, poisoned):
    """Catches a gather from the wrong table, dropout before the norm, or a gradient that skips either output."""
    ids, tensors = inputs(300, 48, s, device)
    grad, grad_low = torch.randn(300, 48).to(device, s), torch.randn(300, 48).to(device, c) if c != s else None
    mask = kept(300, 48, drop, device)
    (y, y_low, total, _, _), grads = ours(ids, tensors, drop, c, grad, grad_low)
    exact_tensors, eager_tensors = leaves(tensors, torch.float64), leaves(tensors)
    expected, eager = plain(ids, exact_tensors, mask), plain(ids, eager_tensors, mask)
    assert_as_accurate("y", y, eager, expected)
    assert total.dtype == c and (y_low is None) == (c == s)
    if y_low is not None:
        assert torch.equal(y_low, y.to(c))
    exact = plain_gradients(ids, exact_tensors, mask, grad.double(),
                            None if grad_low is None else grad_low.double(), torch.float64)  # fmt: skip
    eager = plain_gradients(ids, eager_tensors, mask, grad, grad_low, c)
    for name in NAMES:
        assert_gradient(name, grads[name], eager[name], exact[name], c)
    poisoned.check()


@pytest.mark.parametrize("hidden_size", [1, 7, 320, 1023, 4096])
def test_hidden_sizes(hidden_size, device, poisoned):
    """Catches a tail of the row that enters the norm, or that is not written."""
    ids, tensors = inputs(6, hidden_size, FP32, device, torch.int32)
    y, y_low, total, mean, rstd = embedding_norm_forward(*ids, *tensors, EPS, dropout(), BF16, True)
    mask = kept(6, hidden_size, dropout(), device)
    exact = plain(ids, [t.double() for t in tensors], mask)
    assert_as_accurate("y", y, plain(ids, tensors, mask), exact)
    poisoned.check()


@pytest.mark.parametrize("n_tokens", [0, 1, 67])
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
def test_tokens_and_id_dtypes(n_tokens, id_dtype, device, poisoned):
    """Catches ids read with the wrong width, a last block of tokens that is cut off, or an empty grid."""
    ids, tensors = inputs(n_tokens, 24, FP32, device, id_dtype)
    grad, grad_low = torch.randn(n_tokens, 24, device=device), torch.randn(n_tokens, 24, device=device).to(BF16)
    mask = kept(n_tokens, 24, dropout(), device)
    (y, y_low, total, _, _), grads = ours(ids, tensors, dropout(), BF16, grad, grad_low)
    assert total.dtype == y_low.dtype == BF16
    exact_tensors, eager_tensors = leaves(tensors, torch.float64), leaves(tensors)
    assert_as_accurate("y", y, plain(ids, eager_tensors, mask), plain(ids, exact_tensors, mask))
    exact = plain_gradients(ids, exact_tensors, mask, grad.double(), grad_low.double(), torch.float64)
    eager = plain_gradients(ids, eager_tensors, mask, grad, grad_low, BF16)
    for name in NAMES:
        assert_gradient(name, grads[name], eager[name], exact[name], BF16)
    poisoned.check()


def test_embeddings_and_models_without_segments(device, poisoned):
    """Catches embeddings given directly that are looked up by id, or a missing table that is read."""
    ids, (word, token_type, position, *norm) = inputs(9, 48, FP32, device)
    embeds, types = torch.randn(9, 48, device=device), torch.zeros_like(token_type)
    drop = dropout(p=0.1)
    y = embedding_norm_forward(None, *ids[1:], embeds, token_type, position, *norm, EPS, drop, FP32, True)[0]
    mask, tensors = kept(9, 48, drop, device), [word, token_type, position, *norm]
    exact = plain(ids, [t.double() for t in tensors], mask, embeds.double())
    assert_as_accurate("embeds", y, plain(ids, tensors, mask, embeds), exact)
    y = embedding_norm_forward(ids[0], None, ids[2], word, None, position, *norm, EPS, drop, FP32, True)[0]
    tensors = [word, types, position, *norm]
    exact = plain(ids, [t.double() for t in tensors], mask)
    assert_as_accurate("without segments", y, plain(ids, tensors, mask), exact)
    poisoned.check()


@pytest.mark.parametrize("segments", [True, False])
def test_models_without_positions(segments, device, poisoned):
    """Catches positions that are read where there are none, and a gradient that such a model's tables lack."""
    ids, tensors = inputs(70, 48, FP32, device)
    absent = [2] if segments else [1, 2]
    exact_tensors, eager_tensors = leaves(tensors, torch.float64), leaves(tensors)
    for each in (exact_tensors, eager_tensors):
        for place in absent:
            each[place].data.zero_()
    drop, grad = dropout(), torch.randn(70, 48, device=device)
    present = [None if place in absent else guarded(tensors[place], extra_columns=3) for place in range(3)]
    rows = [None if place in absent else guarded(ids[place]) for place in range(3)]
    y, _, *saved = embedding_norm_forward(*rows, *present, *tensors[3:], EPS, drop, FP32, False)
    mask = kept(70, 48, drop, device)
    assert_as_accurate("y", y, plain(ids, eager_tensors, mask), plain(ids, exact_tensors, mask))
    _, of_sum, *vectors = residual_norm_backward(grad, None, *saved, tensors[3], None, drop, True, want_x=False)
    ours = {
        "weight": vectors[0],
        "ln_bias": vectors[1],
        "word": embedding_backward(of_sum, segments_of(ids[0], 101), FP32),
    }
    exact = plain_gradients(ids, exact_tensors, mask, grad.double(), None, FP32)
    eager = plain_gradients(ids, eager_tensors, mask, grad, None, FP32)
    for name, gradient in ours.items():
        assert_gradient(name, gradient, eager[name], exact[name], FP32)
    poisoned.check()


def test_without_dropout_the_output_is_that_of_inference(device):
    """Catches training that embeds in another way than inference."""
    ids, tensors = inputs(13, 96, BF16, device)
    y = embedding_norm_forward(*ids, *tensors, EPS, None, BF16, True)[0]
    assert torch.equal(y, embedding_layer_norm_forward(*ids, *tensors, EPS))


def test_masks(device, monkeypatch):
    """Catches a mask that is not the one of fastbert.ops.dropout, in either pass or in tiles of another height."""
    ids, (*tables, _, _) = inputs(23, 40, FP32, device)
    drop, ones = dropout(p=0.5), torch.ones(40, device=device)  # The scale is 2: sums are exact.
    expected, results = kept(23, 40, drop, device) > 0, []
    for block_rows in (None, 1, 8):
        if block_rows is not None:
            config = {**configs.rowwise_config(64), "BLOCK_ROWS": block_rows}
            monkeypatch.setattr(configs, "rowwise_config", lambda n, config=config: config)
        y, _, *saved = embedding_norm_forward(*ids, *tables, ones, ones * 9, EPS, drop, FP32, False)
        grads = residual_norm_backward(ones.expand(23, 40), None, *saved, ones, None, drop, False)
        assert torch.equal(y != 0, expected)
        assert torch.equal(grads[3], (expected * drop.scale).sum(0).float())
        results.append((y, grads[0]))
    for others in results[1:]:
        assert_same_bits(others, results[0])


def skewed(n_tokens, n_ids, device):
    """Ids of which half are 0, as those of [CLS] and of the first segment are."""
    ids = torch.randint(0, n_ids, (n_tokens,), device=device)
    return torch.where(torch.rand(n_tokens, device=device) < 0.5, 0, ids)


def added(ids, n_ids, grad):
    return torch.zeros(n_ids, grad.shape[1], dtype=grad.dtype, device=grad.device).index_add(0, ids.long(), grad)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("n_tokens", [1, PIECE - 1, PIECE, PIECE + 1, 9 * PIECE, 1001])
def test_scatter(n_tokens, dtype, device, poisoned):
    """Catches a token that is left out or added twice where a segment crosses pieces, or a sum in 16 bits."""
    grad = torch.randn(n_tokens, 33).to(device, dtype)
    for n_ids, id_dtype in ((1, torch.int64), (7, torch.int32)):
        ids = skewed(n_tokens, n_ids, device).to(id_dtype)
        for to in {dtype, FP32}:
            out = embedding_backward(guarded(grad, 3), segments_of(guarded(ids), n_ids), to)
            assert_gradient(f"V{n_ids}", out, added(ids, n_ids, grad.to(to)), added(ids, n_ids, grad.double()), to)
    poisoned.check()


@pytest.mark.parametrize("offset", [0, 1, 63])
def test_scatter_of_segments_that_end_with_pieces(offset, device, poisoned):
    """Catches a piece that is counted for its neighbour, where segments begin or end exactly between two pieces."""
    lengths = [offset, PIECE, 0, 2 * PIECE, PIECE - offset, 5, 3 * PIECE - 5, 1]
    ids = torch.repeat_interleave(torch.arange(8), torch.tensor(lengths)).to(device)
    grad = torch.randn(len(ids), 16, device=device)
    shuffled = torch.randperm(len(ids), device=device)
    for order in (torch.arange(len(ids), device=device), shuffled):
        out = embedding_backward(grad, segments_of(ids[order], 8), FP32)
        assert_gradient("pieces", out, added(ids[order], 8, grad), added(ids[order], 8, grad.double()), FP32)
    poisoned.check()


@pytest.mark.parametrize("width", [5, 1100])
def test_scatter_into_a_large_table(width, device, poisoned, monkeypatch):
    """Catches the tile of large tables that misses columns, or rows of ids that no token has."""
    sizes = configs.segments_config(50000, width)
    assert sizes != configs.segments_config(512, width)
    monkeypatch.setattr(configs, "segments_config", lambda n_rows, n_cols: sizes)
    ids, grad = skewed(300, 40, device), torch.randn(300, width, device=device)
    out = embedding_backward(grad, segments_of(ids, 60), FP32)
    assert_gradient("wide", out, added(ids, 60, grad), added(ids, 60, grad.double()), FP32)
    assert not out[40:].any()
    poisoned.check()


def test_padding_idx_and_no_tokens(device, poisoned):
    """Catches a pad token whose row is trained, another one that is not, or rows that nothing wrote."""
    ids, grad = skewed(200, 5, device), torch.randn(200, 16, device=device)
    whole = embedding_backward(grad, segments_of(ids, 5), FP32)
    for padding_idx in range(5):
        out = embedding_backward(grad, segments_of(ids, 5), FP32, padding_idx)
        assert not out[padding_idx].any()
        assert torch.equal(out[torch.arange(5) != padding_idx], whole[torch.arange(5) != padding_idx])
    out = embedding_backward(grad[:0], segments_of(ids[:0], 5), BF16)
    assert torch.equal(out.cpu(), torch.zeros(5, 16, dtype=BF16))
    poisoned.check()


def test_same_bits_twice(device):
    """Catches atomics, or a sort that lets equal ids change places."""
    ids, grad = skewed(700, 9, device), torch.randn(700, 8, device=device)
    runs = [[embedding_backward(grad, segments_of(ids, n), FP32) for n in (9, 50)] for _ in range(2)]
    assert_same_bits(*runs)
