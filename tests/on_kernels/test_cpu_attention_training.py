"""The C++ kernels train attention: gradients as exact as eager's, masks of `keep`, the same bits on any threads."""

from __future__ import annotations

import pytest
import torch

from fastbert.ops import dropout as plain
from fastbert_kernels import cpu
from fastbert_kernels.masks import RANGE, Dropout
from helpers import Outputs, assert_as_accurate, cu_seqlens_of, guarded

DTYPES = [torch.float32, torch.bfloat16]
LENGTHS = (
    [1],
    [1] * 30,
    [2, 1, 0, 3, 5, 7],
    [16, 17, 15, 33],
    [3, 200, 1, 7],
    [72, 73, 71, 144, 145],
    [129, 64, 0, 0, 65],
)
HEADS = ((3, 16), (2, 32), (2, 48), (2, 64), (1, 80), (1, 128), (1, 256))
DROPOUT = Dropout(13107, 0x1234_5678_9ABC, 8)


@pytest.fixture
def outputs(monkeypatch):
    """Outputs full of NaN, between guard bands."""
    buffers = Outputs()
    monkeypatch.setattr(cpu.library, "empty", buffers.empty)
    return buffers


def attention(qkv, lengths, num_heads, scale, dropout):
    """Eager attention with dropout, a sequence at a time, in qkv's dtype. Returns (T, H) and lse, (N, T)."""
    outs, sums, first = [qkv.new_empty(0, qkv.shape[1] // 3)], [qkv.new_empty(num_heads, 0)], 0
    for length in filter(None, lengths):
        part = qkv[first : first + length].view(length, 3, num_heads, -1)
        q, k, v = part.permute(1, 2, 0, 3)
        scores = q @ k.transpose(1, 2) * scale
        probabilities = torch.softmax(scores, dim=-1)
        if dropout is not None:
            rows = torch.arange(first, first + length)
            keep = plain.keep(rows[None], length, dropout, num_heads)[0]
            probabilities = probabilities * (keep.to(qkv.dtype) * dropout.scale)
        outs.append((probabilities @ v).transpose(0, 1).reshape(length, -1))
        sums.append(torch.logsumexp(scores, dim=-1))
        first += length
    return torch.cat(outs), torch.cat(sums, dim=1)


def by_autograd(qkv, grad, lengths, num_heads, scale, dropout):
    qkv = qkv.clone().requires_grad_()
    out, lse = attention(qkv, lengths, num_heads, scale, dropout)
    out.backward(grad)
    return out.detach(), lse.detach(), qkv.grad


def by_kernels(qkv, grad, lengths, num_heads, scale, dropout):
    offsets = cu_seqlens_of(lengths)
    out, lse = cpu.attention_training_forward(qkv, offsets, num_heads, scale, dropout)
    return out, lse, cpu.attention_backward(grad, qkv, out, lse, offsets, num_heads, scale, dropout)[0]


def check(lengths, num_heads, head_size, dtype, dropout, scale=None, gain=1.0):
    """Compares the output, the logarithm of the sums and the gradients with those of autograd in float64."""
    scale = head_size**-0.5 if scale is None else scale
    qkv = (gain * torch.randn(sum(lengths), 3 * num_heads * head_size)).to(dtype)
    grad = torch.randn(sum(lengths), num_heads * head_size).to(dtype)
    case = lengths, num_heads, scale, dropout
    ours = by_kernels(guarded(qkv, extra_columns=8), guarded(grad, extra_columns=4), *case)
    eager, exact = by_autograd(qkv, grad, *case), by_autograd(qkv.double(), grad.double(), *case)
    assert_as_accurate("out", ours[0], eager[0], exact[0])
    assert_as_accurate("gradient", ours[2], eager[2], exact[2])
    # exp is right to 3e-6 where probabilities become bfloat16; a score's rounding grows with its terms.
    atol = 4e-6 + 2e-7 * abs(scale) * gain**2 * head_size**0.5
    torch.testing.assert_close(ours[1].double(), exact[1], rtol=5e-7, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_heads", "head_size"), HEADS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_gradients_are_as_accurate_as_eager(lengths, num_heads, head_size, dtype, variant, outputs):
    """Catches a term of the chain rule left out, keys of a neighbour, a wrong mask, or a lost edge of a tile."""
    for dropout in (None, DROPOUT):
        check(lengths, num_heads, head_size, dtype, dropout)
        outputs.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("lengths", "head_size"), [([1300], 32), ([700, 513, 512], 16), ([1025], 80)], ids=str)
def test_gradients_of_long_texts(lengths, head_size, dtype, variant, outputs):
    """Catches blocks of keys or queries added twice or left out, and sums whose error grows with the length."""
    check(lengths, 1, head_size, dtype, DROPOUT)
    outputs.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("scale", "gain"), [(0.0, 1.0), (-0.5, 1.0), (0.2, 4.0), (5.0, 2.0)])
def test_gradients_of_any_scale(scale, gain, dtype, variant):
    """Catches an overflow, a sign, or probabilities that the rounding of their sum's logarithm makes wrong."""
    for dropout in (None, DROPOUT):
        check([40, 100, 2, 400], 2, 32, dtype, dropout, scale=scale, gain=gain)


def test_a_text_of_8192_tokens(variant, outputs):
    """Catches an offset of 32 bits, scratch that a long text leaves, or a block lost among many."""
    n, size, scale = 8192, 16, 0.25
    qkv, grad = torch.randn(n, 3 * size), torch.randn(n, size)
    out, lse, grads = by_kernels(qkv, grad, [n], 1, scale, None)
    outputs.check()
    q, k, v = qkv.double().split(size, dim=1)
    exact_lse = torch.cat([torch.logsumexp(part @ k.T * scale, dim=1) for part in q.split(1024)])
    torch.testing.assert_close(lse[0].double(), exact_lse, rtol=1e-6, atol=0)
    delta = (grad.double() * out.double()).sum(1)
    some = torch.tensor([0, 1, 511, 512, 4097, n - 1])
    by_query = torch.exp(q[some] @ k.T * scale - exact_lse[some, None])
    dq = scale * (by_query * (grad[some].double() @ v.T - delta[some, None])) @ k
    by_key = torch.exp(k[some] @ q.T * scale - exact_lse)
    dk = scale * (by_key * (v[some] @ grad.double().T - delta)) @ q
    exact = torch.cat([dq, dk, by_key @ grad.double()], dim=1)
    torch.testing.assert_close(grads[some].double(), exact, rtol=1e-4, atol=1e-6)


def test_the_forward_pass_is_that_of_inference(variant):
    """Catches a second arithmetic: what is trained must be what is served."""
    offsets = cu_seqlens_of([7, 64, 90])
    for dtype in DTYPES:
        qkv = torch.randn(161, 3 * 96).to(dtype)
        out, _ = cpu.attention_training_forward(qkv, offsets, 3, 0.2, None)
        assert torch.equal(out, cpu.varlen_attention_forward(qkv, offsets, 3, 0.2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_passes_draw_the_mask_of_keep(dtype, variant):
    """Catches a mask that one of the passes, or one of the gradients, shifts, transposes or draws of another head."""
    n, size, num_heads, before = 64, 64, 2, 11
    lengths = [before, n]
    one_hot, rows = torch.eye(n).repeat(1, num_heads).to(dtype), slice(before, None)
    dropout = Dropout(RANGE // 4, 987654321, 3)
    keep = plain.keep(torch.arange(before, before + n)[None], n, dropout, num_heads)[0]
    parts = torch.zeros(4, before + n, num_heads * size, dtype=dtype)

    def probe(**values):
        q, k, v, grad = parts.clone()
        for name, value in values.items():
            {"q": q, "k": k, "v": v, "grad": grad}[name][rows] = value
        out, _, grads = by_kernels(torch.cat([q, k, v], dim=1), grad, lengths, num_heads, 1.0, dropout)
        return [x[rows].view(n, num_heads, size).transpose(0, 1) for x in (out, *grads.chunk(3, dim=1))]

    first = torch.eye(size)[0].repeat(num_heads).to(dtype)
    assert torch.equal(probe(v=one_hot)[0] != 0, keep)  # out[i, j] = keep[i, j] / n
    assert torch.equal(probe(grad=one_hot)[3].transpose(1, 2) != 0, keep)  # dv[j, i] likewise
    assert torch.equal(probe(v=first, grad=first, k=one_hot)[1] > 0, keep)  # dq[i, j] = (keep[i, j] - mean) / n
    assert torch.equal(probe(v=first, grad=first, q=one_hot)[2].transpose(1, 2) > 0, keep)


def test_thresholds_of_none_and_all(variant):
    """Catches a division by 0 where everything is dropped, or other numbers where nothing is."""
    qkv, grad = torch.randn(20, 3 * 32), torch.randn(20, 32)
    nothing = by_kernels(qkv, grad, [20], 2, 0.2, Dropout(0, 5, 1))
    assert all(map(torch.equal, nothing, by_kernels(qkv, grad, [20], 2, 0.2, None)))
    out, lse, grads = by_kernels(qkv, grad, [20], 2, 0.2, Dropout(RANGE, 5, 1))
    assert not out.any() and not grads.any() and torch.equal(lse, nothing[1])


@pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("lengths", "num_heads"), [([100, 3, 197], 3), ([1400, 5], 1)], ids=str)
def test_the_same_bits_for_any_number_of_threads(lengths, num_heads, dtype, dropout, variant, number_of_threads):
    """Catches sums whose order depends on the threads, also where a long text is cut into parts for them."""
    qkv, grad = torch.randn(sum(lengths), 3 * num_heads * 32), torch.randn(sum(lengths), num_heads * 32)
    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        results.append(by_kernels(qkv.to(dtype), grad.to(dtype), lengths, num_heads, 0.2, dropout))
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))


def test_gradients_do_not_depend_on_the_rest_of_the_batch(variant):
    """Catches blocks that are laid out by the batch, and not by the text alone."""
    for dtype in DTYPES:
        qkv, grad = torch.randn(300, 3 * 64).to(dtype), torch.randn(300, 64).to(dtype)
        together = by_kernels(qkv, grad, [150, 90, 60], 2, 0.2, None)[2]
        for rows in (slice(150), slice(150, 240), slice(240, 300)):
            part = qkv[rows]
            assert torch.equal(together[rows], by_kernels(part, grad[rows], [len(part)], 2, 0.2, None)[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_no_text_and_batches_of_none(dtype, variant, outputs):
    """Catches old memory in rows that fill a batch up, and a crash where there is no text, no row or no token."""
    for n_rows, lengths in ((9, [2, 4]), (5, []), (5, [0, 0]), (0, []), (0, [0])):
        qkv, grad = torch.randn(n_rows, 3 * 32).to(dtype), torch.randn(n_rows, 32).to(dtype)
        out, lse, grads = by_kernels(guarded(qkv), guarded(grad), lengths, 2, 0.25, DROPOUT)
        n_tokens = sum(lengths)
        assert not out[n_tokens:].any() and not lse[:, n_tokens:].any() and not grads[n_tokens:].any()
        assert grads.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_in_its_text(dtype, variant):
    """Catches a NaN that is lost, or that reaches the gradients of a neighbour."""
    qkv, grad = torch.randn(40, 3 * 32).to(dtype), torch.randn(40, 32).to(dtype)
    qkv[3, 40] = float("nan")  # in a key of the first text
    grads = by_kernels(qkv, grad, [18, 22], 1, 0.2, DROPOUT)[2]
    assert grads[:18].isnan().all() and grads[18:].isfinite().all()


def test_gradients_of_any_strides(variant):
    """Catches a gradient read as if its rows lay one after the other: that of a sum is one number, expanded."""
    qkv = torch.randn(30, 3 * 32)
    for grad in (torch.ones(()).expand(30, 32), torch.randn(32).expand(30, 32), torch.randn(32, 30).T):
        ours, contiguous = (by_kernels(qkv, g, [10, 20], 2, 0.2, None)[2] for g in (grad, grad.contiguous()))
        assert torch.equal(ours, contiguous)


@pytest.mark.parametrize("offsets", [[0, 9, 4], [1, 4], [0, 99], [0, 5, 2, 8]])
def test_offsets_outside_of_the_rows(offsets, variant):
    """Catches reads of memory that is not the tensor's."""
    qkv, offsets = torch.randn(8, 3 * 16), torch.tensor(offsets, dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens: expected offsets from 0 to 8"):
        cpu.attention_training_forward(qkv, offsets, 1, 0.25, None)
    with pytest.raises(ValueError, match="cu_seqlens: expected offsets from 0 to 8"):
        cpu.attention_backward(qkv[:, :16], qkv, qkv[:, :16], qkv[:1], offsets, 1, 0.25, None)
