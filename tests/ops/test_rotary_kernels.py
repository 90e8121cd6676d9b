"""The Triton kernels of gated activations, rotary positions and windows give what their formulas give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import ops
from fastbert.ops import BackendError, Policy, noting, packing
from fastbert_kernels.embedding import Notes
from fastbert_kernels.gated import gated_backward
from fastbert_kernels.masks import Dropout, threshold_of
from fastbert_kernels.rotary import rotary_backward
from gradient_cases import assert_gradient
from helpers import assert_as_accurate, guarded
from model_cases import randn
from window_cases import gradients_within, holes, within

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
TRITON = Policy("triton", strict=True)
GATES = {"gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu, "silu": F.silu}


def gated_in_torch(activation: str, x: Tensor, grad: Tensor) -> list[Tensor]:
    """The gated activation and its gradient by PyTorch, in x's dtype."""
    leaf = x.detach().clone().requires_grad_()
    first, second = leaf.chunk(2, -1)
    out = GATES[activation](first) * second
    return [out.detach(), *torch.autograd.grad(out, leaf, grad.to(x.dtype))]


@pytest.mark.parametrize("activation", GATES)
@DTYPES
def test_gated(activation: str, dtype: torch.dtype, device: torch.device, poisoned: Any) -> None:
    """Catches halves in each other's place, an edge of a tile left out, or a derivative of another activation."""
    for n_rows, width in ((1, 1), (9, 131), (2, 1100)):
        x, grad = ((2 * randn(n_rows, n, seed=n)).to(device, dtype) for n in (2 * width, width))
        leaf = guarded(x, extra_columns=4).requires_grad_()
        out = ops.gated(leaf, activation, policy=TRITON)
        (d_x,) = torch.autograd.grad(out, leaf, guarded(grad, extra_columns=3))
        eager, exact = gated_in_torch(activation, x, grad), gated_in_torch(activation, x.double(), grad.double())
        again = torch.empty_like(out)
        both = gated_backward(grad, x, activation, again)
        assert torch.equal(both, d_x) and torch.equal(again, out)
        assert_as_accurate(activation, out.detach(), eager[0], exact[0])
        assert_gradient(f"{activation}, gradient", d_x, eager[1], exact[1], dtype)
        alone = ops.gated(x[-1:], activation, policy=Policy("triton", batch_invariant=True))
        assert torch.equal(alone, out[-1:])
    poisoned.check()


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # numpy, of the exponential far on the left
def test_gates_without_a_kernel(device: torch.device) -> None:
    """Catches an activation without a kernel that is computed as another, and an empty batch that is launched."""
    x = torch.randn(3, 8, device=device)
    with pytest.raises(BackendError, match="there is no Triton kernel for 'mish'"):
        ops.gated(x, "mish", policy=TRITON)
    assert torch.equal(ops.gated(x, "mish", policy=Policy("triton")), F.mish(x[:, :4]) * x[:, 4:])
    assert ops.gated(x[:0], policy=TRITON).shape == (0, 4)
    far = torch.tensor([[-80.0, 1.0]], device=device)
    assert all(abs(ops.gated(far, activation, policy=TRITON).item()) < 1e-30 for activation in GATES)


@DTYPES
@pytest.mark.parametrize("with_types", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_embeddings_without_positions(
    with_types: bool, with_bias: bool, dtype: torch.dtype, device: torch.device, poisoned: Any
) -> None:
    """Catches a table that is read though absent, and a norm's bias that is another norm's."""
    width = 40
    tables = [randn(n, width, seed=n).to(device, dtype) for n in (101, 2)]
    weight, ln_bias = (randn(width, seed=n).to(device, dtype) for n in (3, 4))
    ids, types = (torch.randint(n, (37,), device=device) for n in (101, 2))
    segments = (types, tables[1]) if with_types else (None, None)
    bias = ln_bias if with_bias else None

    def plain(to: torch.dtype) -> Tensor:
        word, type_table, w, b = (t.to(to) for t in (*tables, weight, ln_bias))
        x = word[ids] + type_table[types] if with_types else word[ids]
        return F.layer_norm(x, (width,), w, b if with_bias else None, 1e-5)

    out = ops.embedding_layer_norm(
        guarded(ids), segments[0], None, guarded(tables[0], 3), segments[1], None, weight, bias, 1e-5, policy=TRITON
    )
    assert_as_accurate("embeddings", out, plain(dtype), plain(torch.float64))
    of_embeds = ops.embedding_layer_norm(
        None, segments[0], None, tables[0], segments[1], None, weight, bias, 1e-5,
        inputs_embeds=tables[0][ids], policy=TRITON,
    )  # fmt: skip
    assert torch.equal(of_embeds, out)
    normed = ops.bias_residual_layer_norm(out, None, None, weight, bias, 1e-5, policy=TRITON)
    eager, exact = (
        F.layer_norm(out.to(to), (width,), weight.to(to), None if bias is None else bias.to(to), 1e-5)
        for to in (dtype, torch.float64)
    )
    assert_as_accurate("norm", normed, eager, exact)
    poisoned.check()


def test_embeddings_note_ids(device: torch.device) -> None:
    """Catches an id beyond its table that nobody notes where there are no positions."""
    notes = Notes(*(torch.zeros(n, dtype=torch.int64, device=device) for n in (4, 2)), 7)
    notes.batch[1] = 3
    words, ids = torch.randn(5, 8, device=device), torch.tensor([1, 9, 2, 9], device=device)
    with noting.noting(notes):
        out = ops.embedding_layer_norm(ids, None, None, words, None, None, words[0], None, 1e-5, policy=TRITON)
    assert notes.words.tolist() == [(7 << 32) | 9, 0, 0, 0] and out.isfinite().all()


def turned_in_torch(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> Tensor:
    """The rotation in PyTorch, in qkv's dtype, as transformers writes it."""
    q, k, v = qkv.unflatten(1, (3, num_heads, -1)).unbind(1)
    cos, sin = (torch.cat([t, t], -1)[:, None].to(qkv.dtype) for t in (cos, sin))
    q, k = (x * cos + torch.cat([-x.chunk(2, -1)[1], x.chunk(2, -1)[0]], -1) * sin for x in (q, k))
    return torch.stack([q, k, v], 1).flatten(1)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, of what a mask takes away
@DTYPES
@pytest.mark.parametrize(("num_heads", "size"), [(1, 2), (3, 16), (2, 26), (12, 64), (1, 128)])
def test_rotary(num_heads: int, size: int, dtype: torch.dtype, device: torch.device, poisoned: Any) -> None:
    """Catches another pair of elements, heads that are left out, values that turn, and a gradient that turns on."""
    qkv = randn(21, 3 * num_heads * size).to(device, dtype)
    qkv[0, -1] = float("inf")  # a value that is multiplied by 0 would be NaN
    cos, sin = ops.rotations(torch.arange(21, device=device) * 90, size, 100.0)
    leaf = guarded(qkv, extra_columns=7).requires_grad_()
    out = ops.rotary(leaf, guarded(cos.flatten()).view_as(cos), sin, num_heads, policy=TRITON)
    eager, exact = (turned_in_torch(x, cos, sin, num_heads) for x in (qkv, qkv.double()))
    finite = exact.isfinite()
    assert torch.equal(out[~finite], qkv[~finite]) and not (~finite).sum() > 1
    assert_as_accurate("rotary", out[finite].detach(), eager[finite], exact[finite])
    grad = randn(*qkv.shape, seed=2).to(device, dtype)
    (d_qkv,) = torch.autograd.grad(out, leaf, grad)
    assert torch.equal(d_qkv, ops.rotary(grad, cos, -sin, num_heads, policy=TRITON))
    assert torch.equal(rotary_backward(grad.clone(), cos, sin, num_heads), d_qkv)
    poisoned.check()
    ours, fresh = guarded(qkv, extra_columns=7), ops.rotary(qkv, cos, sin, num_heads, policy=TRITON)
    assert torch.equal(fresh, out)  # qkv is as it was
    with torch.no_grad():
        in_place = ops.rotary(ours, cos, sin, num_heads, policy=TRITON, fresh=True)
    assert in_place.data_ptr() == ours.data_ptr() and torch.equal(in_place, out)
    alone = ops.rotary(qkv[5:6], cos[5:6], sin[5:6], num_heads, policy=Policy("triton", batch_invariant=True))
    assert torch.equal(alone, out[5:6])


# Texts that share a tile, an empty one, texts of the window's length and one more or less, and of several tiles.
LENGTHS = [1, 0, 7, 63, 64, 65, 66, 129, 200]


def windowed(
    qkv: Tensor, lengths: list[int], window: int, columns: Tensor | None, policy: Policy, num_heads: int = 2
) -> Tensor:
    batch = packing.from_lengths(lengths, qkv.device)
    batch.columns = columns
    with torch.no_grad():
        return ops.varlen_attention(qkv, batch, num_heads, window=window, policy=policy)


FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("dtype", "size", "window", "with_holes"),
    [(FP32, 24, 64, True), (FP32, 24, 1, False), (FP32, 16, 0, True), (BF16, 16, 64, False), (BF16, 16, 500, True),
     (FP16, 16, 0, False)],
    ids=str,
)  # fmt: skip
def test_window(
    dtype: torch.dtype, size: int, window: int, with_holes: bool, device: torch.device, poisoned: Any
) -> None:
    """Catches a key at the edge of the window, or of a text, that is seen or missed, and rows that see a neighbour."""
    qkv = randn(sum(LENGTHS), 3 * 2 * size).to(device, dtype)
    columns = holes(LENGTHS).to(device) if with_holes else None
    eager, exact = (within(x.cpu(), LENGTHS, 2, window, holes(LENGTHS) if with_holes else None)
                    for x in (qkv, qkv.double()))  # fmt: skip
    ours = windowed(guarded(qkv, 8), LENGTHS, window, columns, TRITON)
    assert_as_accurate("window", ours.cpu(), eager, exact)
    policy = Policy("triton", batch_invariant=True)
    together = windowed(qkv, LENGTHS, window, columns, policy)
    assert_as_accurate("batch-invariant", together.cpu(), eager, exact)
    for i in (3, 6, 8):
        rows = slice(sum(LENGTHS[:i]), sum(LENGTHS[: i + 1]))
        own = None if columns is None else columns[rows].contiguous()
        assert torch.equal(windowed(qkv[rows], LENGTHS[i : i + 1], window, own, policy), together[rows])
    poisoned.check()


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # numpy, of the rows that see one
def test_window_of_a_long_text(device: torch.device) -> None:
    """Catches keys beyond the window that are visited: some are NaN here, and what is 0 times NaN would show."""
    qkv = randn(8192, 3 * 16).to(device, torch.float32)
    qkv[3000:5000, 16:] = float("nan")
    out = windowed(qkv, [8192], 64, None, TRITON, 1).cpu()
    assert out[:2800].isfinite().all() and out[5200:].isfinite().all()
    assert out[2936:5064].isnan().all()
    for first, end, kept in ((0, 300, slice(0, 200)), (7900, 8192, slice(100, 292))):
        eager, exact = (within(x[first:end].cpu(), [end - first], 1, 64)[kept] for x in (qkv, qkv.double()))
        assert_as_accurate("the ends", out[first:end][kept], eager, exact)


@pytest.mark.parametrize("backend", ["torch", "cpu", "triton"])
@pytest.mark.parametrize("with_holes", [False, True])
def test_window_with_gradients(backend: str, with_holes: bool, device: torch.device) -> None:
    """Catches gradients or a mask of dropout within a window that a backend has otherwise than the others."""
    lengths = [70, 3]
    batch, columns = packing.from_lengths(lengths, device), holes(lengths).to(device) if with_holes else None
    batch.columns = columns
    qkv, grad = (randn(73, n * 32, seed=n).to(device, FP32) for n in (3, 1))
    for dropout in (None, Dropout(threshold_of(0.3), 77, 4)):
        leaf = qkv.clone().requires_grad_()
        out = ops.varlen_attention(leaf, batch, 2, window=5, dropout=dropout, policy=Policy(backend, strict=True))
        found = out.detach(), *torch.autograd.grad(out, leaf, grad)
        eager, exact = (
            gradients_within(x, g, lengths, 2, 5, columns, dropout)
            for x, g in ((qkv, grad), (qkv.double(), grad.double()))
        )
        for name, mine, plain, truth in zip(("out", "gradient"), found, eager, exact, strict=True):
            assert_gradient(name, mine, plain, truth, FP32)


def test_what_no_window_kernel_does(device: torch.device) -> None:
    """Catches dropout within a window that a kernel computes as if there were none, and gradients in float64."""
    batch, qkv = packing.from_lengths([70, 3], device), torch.randn(73, 48, device=device)
    with pytest.raises(BackendError, match="dropout"):
        ops.varlen_attention(qkv, batch, 1, window=5, dropout=0.5, policy=TRITON)
    with pytest.raises(BackendError, match="no Triton kernels for torch.float64"):
        ops.varlen_attention(qkv.double().requires_grad_(), batch, 1, window=5, policy=TRITON)
    with pytest.raises(BackendError, match="gradients"):
        invariant = Policy("triton", strict=True, batch_invariant=True)
        ops.varlen_attention(qkv.clone().requires_grad_(), batch, 1, window=5, policy=invariant)
