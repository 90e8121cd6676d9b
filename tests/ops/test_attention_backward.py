"""Gradients of varlen attention, dropout included, are right in the Triton kernels."""

from __future__ import annotations

import pytest
import torch

from fastbert.ops.dropout import keep
from fastbert_kernels import attention, configs, launch
from fastbert_kernels import attention_backward as backward
from fastbert_kernels.masks import RANGE, Dropout, threshold_of
from fastbert_kernels.work_list import WorkList, build_work_list
from helpers import assert_as_accurate, cu_seqlens_of, guarded, rms_error

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DROPOUT = Dropout(threshold_of(0.2), 0x0123456789ABCDEF, 8)
# Which edge each list of lengths stands at.
LENGTHS = {
    "one token": [1],
    "around a block": [31, 32, 33, 64, 65],
    "many of length 1": [1] * 40,
    "one long among short": [3, 5, 2, 150, 4, 1, 7],
    "zero-length rows": [0, 5, 0, 0, 70, 0, 1, 0],
    "only zero-length rows": [0, 0],
}


class Kernels:
    """`Kernels` runs them on one batch, whose inputs lie between guard bands."""

    def __init__(self, lengths, num_heads, scale, dropout=None, *, device, tiles=None, config=None, share=True):
        self.lengths, self.num_heads, self.scale, self.dropout = lengths, num_heads, scale, dropout
        self.device, self.tiles, self.config, self.share = device, tiles, config, share
        self.offsets = cu_seqlens_of(lengths).tolist()

    def guard(self, made):
        """The list on the device, where a read past its end is caught."""
        return WorkList(*(guarded(part.to(self.device)) for part in made))

    def work_list(self, block):
        return self.guard(build_work_list(self.offsets, block, self.share))

    def forward(self, qkv):
        """(T, 3 N D) -> (T, N D) and the log-sum-exp, (N, T)."""
        head_size, arch = qkv.shape[1] // (3 * self.num_heads), launch.arch(self.device)
        config = self.config or configs.attention_config(qkv.dtype, head_size, arch).block_sizes
        lse = launch.empty((self.num_heads, qkv.shape[0]), like=qkv, dtype=torch.float32)
        out = attention.varlen_attention_forward(
            guarded(qkv, extra_columns=8), self.work_list(config["BLOCK_Q"]),
            self.num_heads, self.scale, config=config, dropout=self.dropout, lse=lse,
        )  # fmt: skip
        return out, lse

    def backward(self, grad, qkv, out, lse):
        head_size, arch = qkv.shape[1] // (3 * self.num_heads), launch.arch(self.device)
        tiles = self.tiles or configs.attention_backward_configs(qkv.dtype, head_size, arch)
        plan = backward.Plan(*map(self.guard, backward.work_lists(self.offsets, tiles, self.share)))
        grad_qkv, _ = backward.varlen_attention_backward(
            guarded(grad, extra_columns=8), guarded(qkv, extra_columns=8), guarded(out, extra_columns=8),
            guarded(lse, extra_columns=3), plan,
            self.num_heads, self.scale, self.dropout, tiles,
        )  # fmt: skip
        return grad_qkv

    def both(self, qkv, grad):
        """The result, the log-sum-exp and the gradient of qkv."""
        out, lse = self.forward(qkv)
        return out, lse, self.backward(grad, qkv, out, lse)


def plain(qkv, grad, lengths, num_heads, scale, dropout):
    """The result, the log-sum-exp and the gradient of qkv by autograd, in qkv's dtype, a sequence at a time."""
    qkv = qkv.detach().requires_grad_()
    outs, sums, first_row = [qkv[:0, : grad.shape[1]]], [qkv.new_empty(num_heads, 0)], 0
    for part in filter(len, qkv.split(lengths)):
        q, k, v = part.view(len(part), 3, num_heads, -1).permute(1, 2, 0, 3)
        scores = q @ k.transpose(-1, -2) * scale
        probabilities = scores.softmax(-1)
        if dropout is not None:
            rows = torch.arange(first_row, first_row + len(part), device=qkv.device)
            kept = keep(rows[None], len(part), dropout, num_heads)[0]
            probabilities = probabilities * (kept.to(qkv.dtype) * dropout.scale)
        outs.append((probabilities @ v).transpose(0, 1).reshape(len(part), -1))
        sums.append(scores.detach().logsumexp(-1))
        first_row += len(part)
    out = torch.cat(outs)
    out.backward(grad)
    return out.detach(), torch.cat(sums, 1), qkv.grad


def check(lengths, num_heads, head_size, dtype, device, dropout=None, scale=None, gain=1.0, **changes):
    scale = head_size**-0.5 if scale is None else scale
    n_tokens, hidden_size = sum(lengths), num_heads * head_size
    qkv = (torch.randn(n_tokens, 3 * hidden_size) * gain).to(device, dtype)
    grad = torch.randn(n_tokens, hidden_size).to(device, dtype)
    ours = Kernels(lengths, num_heads, scale, dropout, device=device, **changes).both(qkv, grad)
    eager = plain(qkv, grad, lengths, num_heads, scale, dropout)
    expected = plain(qkv.double(), grad.double(), lengths, num_heads, scale, dropout)
    assert_as_accurate("out", ours[0], eager[0], expected[0])
    assert rms_error(ours[1], expected[1]) < 1e-6 * gain
    parts = [x[2].split(hidden_size, 1) for x in (ours, eager, expected)]
    for name, our_part, eager_part, expected_part in zip("qkv", *parts, strict=True):
        assert_as_accurate(f"gradient of {name}", our_part, eager_part, expected_part)


@pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["all kept", "dropout"])
@pytest.mark.parametrize("case", LENGTHS)
def test_gradients_at_the_edges(case, dropout, device, poisoned):
    """Catches a mistake in tiles, masks or work lists at the lengths where they happen."""
    check(LENGTHS[case], 2, 32, torch.bfloat16, device, dropout)
    poisoned.check()


@pytest.mark.parametrize("case", ["one token", "around a block", "zero-length rows"])
def test_gradients_in_float32(case, device, poisoned):
    """Catches a product, a sum or a statistic in fewer digits than float32."""
    check(LENGTHS[case], 1, 32, torch.float32, device, DROPOUT)
    poisoned.check()


@pytest.mark.parametrize("head_size", [16, 20, 32, 64, 80, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_head_sizes(head_size, dtype, device, poisoned):
    """Catches a head size that is padded to a power of two wrongly, or for which the tiles do not fit."""
    check([40, 3, 1], 2 if head_size <= 32 else 1, head_size, dtype, device, DROPOUT)
    poisoned.check()


def test_tiles_of_many_blocks(device, poisoned):
    """Catches whole blocks that are passed over or counted twice, where a tile of 128 rows has neighbours."""
    check([127, 128, 129, 260], 1, 16, torch.float16, device)
    poisoned.check()


def test_own_scale_and_large_scores(device):
    """Catches a softmax scale that one of the passes ignores, and exponentials that overflow."""
    check([33, 9], 2, 16, torch.float32, device, DROPOUT, scale=0.7)
    for dtype, gain in ((torch.float32, 4.0), (torch.bfloat16, 5.0)):  # scores of more than 100 among them
        check([33, 9], 2, 16, dtype, device, scale=0.7, gain=gain)


@pytest.mark.parametrize("share", [True, False], ids=["shared tiles", "own tiles"])
def test_tiles_of_any_size(share, device):
    """Catches a choice of tiles that only works by chance, and places of keys that a shared tile gets wrong."""
    for rows, step in ((16, 16), (64, 32), (32, 64)):
        sizes = {"BLOCK_D": 16, "num_warps": 4, "num_stages": 1}
        tiles = configs.AttentionBackward(
            {"BLOCK_Q": rows, "BLOCK_K": step, **sizes}, {"BLOCK_K": rows, "BLOCK_Q": step, **sizes}
        )
        check([5, 9, 40, 2, 1, 11], 1, 16, torch.float16, device, DROPOUT, tiles=tiles, share=share)


def test_everything_dropped(device, poisoned):
    """Catches a division by zero where no probability is kept."""
    qkv, grad = torch.randn(9, 3 * 16, device=device), torch.randn(9, 16, device=device)
    out, lse, grad_qkv = Kernels([9], 1, 0.25, Dropout(RANGE, 3, 0), device=device).both(qkv, grad)
    assert not out.any() and not grad_qkv.any() and lse.isfinite().all()
    poisoned.check()


PROBED = [9, 64, 3, 21, 1]  # The first two fill more than one tile, or share it, by the size of the tiles.


def probe(name, num_heads, dropout, device, **changes):
    """Recovers the mask of each pass for PROBED, {sequence: (N, length, length) bool}, from inputs that show it.

    Scores are 0, so each probability is 1 / length. Rows of a matrix are unit vectors, so that sums have one term.
    """
    n_tokens, size = sum(PROBED), 64
    unit = torch.cat([torch.eye(length, size) for length in PROBED])[:, None].expand(-1, num_heads, -1)
    zero, first = torch.zeros_like(unit), torch.zeros_like(unit)
    first[..., 0] = 1.0
    q, k, v, grad = {
        "forward": (zero, zero, unit, zero),
        "values": (zero, zero, zero, unit),
        "queries": (zero, unit, first, first),
        "keys": (unit, zero, first, first),
    }[name]
    qkv = torch.stack([q, k, v], 1).reshape(n_tokens, -1).to(device)
    kernels = Kernels(PROBED, num_heads, 1.0, dropout, device=device, **changes)
    out, _, grad_qkv = kernels.both(qkv, grad.reshape(n_tokens, -1).to(device))
    dq, dk, dv = grad_qkv.view(n_tokens, 3, num_heads, size).unbind(1)
    result = {"forward": out.view(n_tokens, num_heads, size), "values": dv, "queries": dq, "keys": dk}[name].cpu()
    masks = {}
    for index, part in enumerate(result.split(PROBED)):
        length = len(part)
        shown = part[..., :length].transpose(0, 1) * length / dropout.scale  # (N, length, length)
        if name in ("values", "keys"):
            shown = shown.transpose(1, 2)
        if name in ("queries", "keys"):  # keep - share of what is kept in the row, which is 0 where all of it is
            masks[index] = shown > -0.5 / length
        else:
            assert ((shown - shown.round()).abs() < 1e-5).all()
            masks[index] = shown.round() == 1.0
    return masks


def expected_masks(num_heads, dropout):
    starts = cu_seqlens_of(PROBED).tolist()
    return {
        index: keep(torch.arange(start, start + length)[None], length, dropout, num_heads)[0]
        for index, (start, length) in enumerate(zip(starts, PROBED, strict=False))
    }


@pytest.mark.parametrize("name", ["forward", "values", "queries", "keys"])
def test_each_pass_draws_the_same_mask(name, device):
    """Catches a pass whose mask is another one than `keep`'s, or depends on the tiles or on who shares them."""
    sizes = {"BLOCK_D": 64, "num_warps": 4, "num_stages": 1}
    for rows, step, share in ((64, 32, True), (32, 64, False)):
        tiles = configs.AttentionBackward(
            {"BLOCK_Q": rows, "BLOCK_K": step, **sizes}, {"BLOCK_K": rows, "BLOCK_Q": step, **sizes}
        )
        masks = probe(name, 2, DROPOUT, device, tiles=tiles, config=tiles.query, share=share)
        for index, mask in expected_masks(2, DROPOUT).items():
            if PROBED[index] > 1 or name in ("forward", "values"):
                assert torch.equal(masks[index], mask), (rows, step, share, index)


@pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["all kept", "dropout"])
def test_finite_differences(dropout, device):
    """Catches a gradient that is not the derivative of what the forward kernel itself computes."""
    step, kernels = 2.0**-6, Kernels([4, 3], 1, 0.3, dropout, device=device)
    qkv, grad = torch.randn(7, 3 * 16, device=device), torch.randn(7, 16, device=device)
    grad_qkv = kernels.both(qkv, grad)[2]
    for part in range(3):
        direction = torch.zeros_like(qkv)
        direction[:, 16 * part : 16 * part + 16] = torch.randn(7, 16)
        after, before = (kernels.forward(qkv + sign * step * direction)[0].double() for sign in (1.0, -1.0))
        slope = ((after - before) * grad).sum() / (2.0 * step)
        # The step's third derivative leaves some 1e-4, float32's rounding eps / step = 1e-5.
        assert abs(slope - (grad_qkv * direction).double().sum()) < 1e-3 * slope.abs().clamp(min=1.0), "qkv"[part]


def test_rows_of_no_sequence_and_empty_tiles(device):
    """Catches rows past the last sequence that are read or written, and tiles without rows that are worked on."""
    lengths, rows = [20, 0, 5], 6
    qkv, grad = torch.randn(25, 3 * 32, device=device), torch.randn(25, 32, device=device)
    expected = Kernels(lengths, 2, 0.2, DROPOUT, device=device).both(qkv, grad)

    class Padded(Kernels):
        def work_list(self, block):
            tiles, row_spans = super().work_list(block)
            return WorkList(torch.cat([tiles, torch.zeros(3, 5, dtype=torch.int32, device=self.device)]), row_spans)

    nan = float("nan")
    qkv, grad = (torch.cat([x, x.new_full((rows, x.shape[1]), nan)]) for x in (qkv, grad))
    ours = Padded(lengths, 2, 0.2, DROPOUT, device=device).both(qkv, grad)
    assert torch.equal(ours[0][:25], expected[0]) and torch.equal(ours[1][:, :25], expected[1])
    assert torch.equal(ours[2][:25], expected[2])


def test_bits_are_the_same_again(device):
    """Catches a sum whose order varies from run to run."""
    qkv, grad = torch.randn(90, 3 * 32, device=device).half(), torch.randn(90, 32, device=device).half()
    kernels = Kernels([70, 2, 18], 2, 0.2, DROPOUT, device=device)
    for first, second in zip(kernels.both(qkv, grad), kernels.both(qkv, grad), strict=True):
        assert torch.equal(first, second)


def test_lists_are_built_once_for_tiles_of_one_size():
    """Catches a second list of the same tiles, which costs as much again on the host."""
    offsets = cu_seqlens_of([20] * 30).tolist()
    for query, key, same in ((64, 64, True), (64, 32, False)):
        tiles = configs.AttentionBackward({"BLOCK_Q": query}, {"BLOCK_K": key})
        query_tiles, key_tiles = backward.work_lists(offsets, tiles)
        assert (query_tiles is key_tiles) == same
        assert all(map(torch.equal, key_tiles, build_work_list(offsets, key)))
