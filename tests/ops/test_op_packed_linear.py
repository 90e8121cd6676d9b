"""Linears of the cpu backend are right with packed weights, in the C++ kernel and in oneDNN."""

from __future__ import annotations

import contextlib
import gc

import pytest
import torch
import torch.nn.functional as F

from fastbert import BertConfig, BertModel
from fastbert.engine import cpu_encoder
from fastbert.ops import onednn, packed_linear
from fastbert_kernels import cpu
from helpers import assert_as_accurate, guarded

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True, params=["C++", "oneDNN"])
def product(request, monkeypatch):
    """float32 in either of the two; on a processor or a PyTorch without them there is only the way around them."""
    if request.param == "oneDNN":
        monkeypatch.setattr(cpu.library, "load", lambda: (None, "planted"))
        if onednn._operations_obstacle() is not None:
            pytest.skip(onednn._operations_obstacle())
    elif cpu.obstacle() is not None:
        pytest.skip(cpu.obstacle())
    return request.param


def inputs(n_rows, k, n_cols, dtype=torch.float32):
    torch.manual_seed(0)
    tensors = torch.randn(n_rows, k), torch.randn(n_cols, k) / k**0.5, torch.randn(n_cols), torch.randn(n_rows, n_cols)
    return [t.to(dtype) for t in tensors]


def activated(x, activation):
    if activation in ("none", "relu"):
        return x if activation == "none" else F.relu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def skip_without(dtype):
    x, weight, bias, _ = inputs(4, 4, 4, dtype)
    if packed_linear.operands_obstacle(x, weight, bias) is not None:
        pytest.skip(packed_linear.operands_obstacle(x, weight, bias))


@pytest.mark.parametrize("activation", list(packed_linear.ACTIVATIONS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n_rows", "k", "n_cols"), [(4, 16, 64), (5, 33, 131), (70, 384, 96), (40, 3072, 80)])
def test_as_accurate_as_eager(n_rows, k, n_cols, dtype, activation):
    """Catches sums in one chain over a long K, a piece of K left out, or an activation applied to each piece."""
    skip_without(dtype)
    x, weight, bias, _ = inputs(n_rows, k, n_cols, dtype)
    exact = activated(F.linear(x.double(), weight.double(), bias.double()), activation)
    eager = activated(F.linear(x, weight, bias), activation)
    operands = guarded(x, extra_columns=7), guarded(weight, extra_columns=5), guarded(bias)
    assert_as_accurate(f"{k} {activation}", packed_linear.linear(*operands, activation), eager, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [64, 1000])
@pytest.mark.parametrize("with_bias", [True, False])
def test_residual_is_added_once(k, dtype, with_bias):
    """Catches a residual that each piece of K adds, or that is written to."""
    skip_without(dtype)
    x, weight, bias, residual = inputs(30, k, 50, dtype)
    bias = bias if with_bias else None
    before = residual.clone()
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double()) + residual.double()
    ours = packed_linear.linear(x, weight, bias, residual=residual)
    assert_as_accurate("residual", ours, F.linear(x, weight, bias) + residual, exact)
    assert torch.equal(residual, before)


def test_no_rows():
    """Catches an empty batch that crashes."""
    x, weight, bias, residual = inputs(0, 600, 50)
    assert packed_linear.linear(x, weight, bias, "gelu").shape == (0, 50)
    assert packed_linear.linear(x, weight, bias, residual=residual).shape == (0, 50)


def test_weights_that_change():
    """Catches results of weights that were written to, replaced, or exchanged for others at the same address."""
    x, weight, bias, _ = inputs(3, 8, 4)
    weight = torch.nn.Parameter(weight)

    def right():
        with torch.no_grad():
            torch.testing.assert_close(packed_linear.linear(x, weight, bias), F.linear(x, weight, bias))

    right()
    with torch.no_grad():
        weight.mul_(2)
    right()
    for _ in range(10):  # the allocator likes to give freed memory to the next of its size
        weight.data = torch.randn(4, 8)
        right()
    weight.data.mul_(3)  # which nothing counts
    packed_linear.forget([weight])
    right()


def test_packed_weights_go_with_their_weight():
    """Catches memory that stays after the model is gone."""
    gc.collect()  # what other tests left
    n_before = len(packed_linear._packed)
    x, weight, bias, _ = inputs(3, 8, 4)
    packed_linear.linear(x, weight, bias)
    assert len(packed_linear._packed) == n_before + 1
    del weight
    gc.collect()
    assert len(packed_linear._packed) == n_before


def test_pieces_cover_k():
    """Catches columns of K lost or doubled where pieces are cut."""
    for k in (1, 16, 255, 256, 257, 384, 385, 768, 1000, 3072):
        for longest in (onednn.PIECE, onednn.PIECE_BEFORE_GELU):
            cuts = onednn._cuts(k, longest)
            assert cuts[0][0] == 0 and cuts[-1][1] == k
            assert all(end == start for (_, end), (start, _) in zip(cuts, cuts[1:], strict=False))
            assert max(end - start for start, end in cuts) <= longest


def test_obstacles(monkeypatch):
    """Catches gradients lost, autocast or the user's own switch ignored, or a weight packed that changes uncounted."""
    x, weight, bias, _ = inputs(4, 8, 4)
    assert packed_linear.operands_obstacle(x, weight, bias) is None
    assert "fewer than 4 rows" in packed_linear.operands_obstacle(x[:3], weight, bias)  # where F.linear is more exact
    assert "gradients" in packed_linear.operands_obstacle(x, torch.nn.Parameter(weight), bias)
    with torch.no_grad():
        assert packed_linear.operands_obstacle(x, torch.nn.Parameter(weight), bias) is None
    assert "mixed dtypes" in packed_linear.operands_obstacle(x, weight.bfloat16(), bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert "mixed dtypes" in packed_linear.operands_obstacle(x, weight, bias)
    with torch.inference_mode():
        made_there = weight.clone()
        assert packed_linear.operands_obstacle(x, weight, bias) is None
    assert "counted" in packed_linear.operands_obstacle(x, made_there, bias)
    assert "no torch.float64" in packed_linear.operands_obstacle(x.double(), weight.double())
    assert "meta" in packed_linear.operands_obstacle(x.to("meta"), weight.to("meta"))
    monkeypatch.setattr(cpu.library, "load", lambda: (None, "planted"))
    with torch.backends.mkldnn.flags(enabled=False):
        assert "switched off" in packed_linear.operands_obstacle(x, weight, bias)
    monkeypatch.setattr(onednn, "_operations_obstacle", lambda: "planted too")
    assert packed_linear.operands_obstacle(x, weight, bias) == "planted too"


def test_rows_are_few_sizes(product):
    """Catches rows cut off, an eighth more than needed, or a new size, and so a new program, for every batch."""
    if product == "C++":
        assert packed_linear.rows_for(1001, torch.float32) == 1001
        return
    sizes = [packed_linear.rows_for(n, torch.float32) for n in range(4097)]
    assert sizes[:6] == [0, 1, 2, 3, 8, 8] and all(
        rows >= n and rows - n < max(8, n / 8) for n, rows in enumerate(sizes)
    )
    assert len(set(sizes)) <= 60
    assert sizes[64:66] == [64, 72] and sizes[2048] == 2048


@contextlib.contextmanager
def nothing_packed():
    """Lets linears run as PyTorch runs them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_linear, "packing_obstacle", lambda dtype: "planted")
        yield


def small_model():
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    return BertModel(config, backend="cpu").eval()


@pytest.mark.parametrize("lengths", [[5], [1, 20, 9, 9, 0, 25], [8]])
def test_model_in_more_rows(lengths, monkeypatch):
    """Catches rows of padding that reach a text or are returned, or a token count that reaches oneDNN unpadded."""
    monkeypatch.setattr(cpu_encoder, "obstacles", lambda *args: iter(["planted"]))  # which runs no linear of its own
    model, n_tokens = small_model(), sum(lengths)
    ids, cu_seqlens = torch.arange(n_tokens) % 50, torch.tensor([0, *lengths]).cumsum(0).int()
    rows = set()
    plain = packed_linear.linear
    monkeypatch.setattr(
        packed_linear, "linear", lambda x, *rest, **more: rows.add(x.shape[0]) or plain(x, *rest, **more)
    )
    with torch.no_grad():
        ours = model.forward_packed(ids, cu_seqlens)
        assert rows == {packed_linear.rows_for(n_tokens, torch.float32)} and ours.shape == (n_tokens, 32)
        seen = []
        hook = model.encoder.layer[0].register_forward_hook(lambda module, inputs, out: seen.append(out.shape))
        torch.testing.assert_close(model.forward_packed(ids, cu_seqlens), ours)
        hook.remove()
        assert seen == [(len(lengths), max(lengths), 32)]
        with nothing_packed():
            torch.testing.assert_close(model.forward_packed(ids, cu_seqlens), ours)
    rows.clear()
    torch.testing.assert_close(model.forward_packed(ids, cu_seqlens).detach(), ours)
    assert not rows  # with gradients


def test_eval_forgets_what_was_packed():
    """Catches results of old weights after someone wrote to them through `.data` and called eval()."""
    model = small_model()
    ids, cu_seqlens = torch.arange(9), torch.tensor([0, 9], dtype=torch.int32)
    with torch.no_grad():
        before = model.forward_packed(ids, cu_seqlens)
        for parameter in model.parameters():
            parameter.data.mul_(1.1)
        after = model.eval().forward_packed(ids, cu_seqlens)
        with nothing_packed():
            expected = model.forward_packed(ids, cu_seqlens)
    torch.testing.assert_close(after, expected)
    assert not torch.allclose(after, before)
