"""Gradients of attention within a window are right in the Triton kernels, and cost by the window."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastbert.ops import packing
from fastbert.ops.columns_around import ranges_of
from fastbert_kernels import attention, attention_key_gradient, attention_query_gradient, configs, launch
from fastbert_kernels import attention_backward as backward
from fastbert_kernels.attention_window import Window
from fastbert_kernels.masks import Dropout, threshold_of
from fastbert_kernels.work_list import WorkList, build_work_list
from gradient_cases import assert_gradient
from helpers import assert_as_accurate, cu_seqlens_of, guarded, rms_error
from model_cases import randn
from window_cases import gradients_within, holes, within

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DROPOUT = Dropout(threshold_of(0.2), 0x0123456789ABCDEF, 8)
# Texts that share a tile, an empty one, texts of the window's length and one more or less, and of several tiles.
LENGTHS = [1, 0, 7, 32, 33, 34, 150]


def reach(lengths: list[int], window: int, columns: Tensor | None, device: Any) -> Window:
    batch = packing.from_lengths(lengths, device)
    batch.columns = columns
    return Window(window, ranges_of(batch, window))


def both_passes(
    qkv: Tensor,
    grad: Tensor,
    lengths: list[int],
    num_heads: int,
    window: Window,
    dropout: Dropout | None = None,
    tiles: configs.AttentionBackward | None = None,
    share: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, the log-sum-exp and the gradient of qkv; all that is read lies between guard bands."""
    offsets, device, head_size = cu_seqlens_of(lengths).tolist(), qkv.device, qkv.shape[1] // (3 * num_heads)
    arch, scale = launch.arch(device), head_size**-0.5

    def on_device(made: WorkList) -> WorkList:
        return WorkList(*(guarded(part.to(device)) for part in made))

    config = configs.attention_config(qkv.dtype, head_size, arch).block_sizes if tiles is None else tiles.query
    lse = launch.empty((num_heads, qkv.shape[0]), like=qkv, dtype=torch.float32)
    qkv, grad = guarded(qkv, extra_columns=8), guarded(grad, extra_columns=8)
    out = attention.varlen_attention_forward(
        qkv, on_device(build_work_list(offsets, config["BLOCK_Q"], share)), num_heads, scale, config=config,
        dropout=dropout, lse=lse, window=window,
    )  # fmt: skip
    tiles = tiles or configs.attention_backward_configs(qkv.dtype, head_size, arch, windowed=True)
    plan = backward.Plan(*map(on_device, backward.work_lists(offsets, tiles, share)))
    grad_qkv, _ = backward.varlen_attention_backward(
        grad, qkv, out, lse, plan, num_heads, scale, dropout, tiles, window=window
    )
    return out, lse, grad_qkv


def tiles_of(rows: int, step: int, head_size: int = 16) -> configs.AttentionBackward:
    sizes = {"BLOCK_D": head_size, "num_warps": 4, "num_stages": 1}
    return configs.AttentionBackward(
        {"BLOCK_Q": rows, "BLOCK_K": step, **sizes}, {"BLOCK_K": rows, "BLOCK_Q": step, **sizes}
    )


def check(
    lengths: list[int],
    dtype: torch.dtype,
    window: int,
    with_holes: bool,
    device: torch.device,
    dropout: Dropout | None,
    *,
    size: int = 16,
    num_heads: int = 2,
    **changes: Any,
) -> None:
    qkv, grad = (randn(sum(lengths), n * num_heads * size, seed=n).to(device, dtype) for n in (3, 1))
    columns = holes(lengths).to(device) if with_holes else None
    ours = both_passes(qkv, grad, lengths, num_heads, reach(lengths, window, columns, device), dropout, **changes)
    eager, exact = (
        gradients_within(x, g, lengths, num_heads, window, columns, dropout)
        for x, g in ((qkv, grad), (qkv.double(), grad.double()))
    )
    assert_as_accurate("out", ours[0], eager[0], exact[0])
    parts = [x.split(num_heads * size, 1) for x in (ours[2], eager[1], exact[1])]
    for name, our_part, eager_part, exact_part in zip("qkv", *parts, strict=True):
        assert_gradient(f"gradient of {name}", our_part, eager_part, exact_part, dtype)


@pytest.mark.parametrize(
    ("dtype", "size", "window", "with_holes", "dropout"),
    [(FP32, 24, 33, True, DROPOUT), (FP32, 16, 1, False, None), (BF16, 16, 33, False, DROPOUT),
     (BF16, 16, 32, False, None), (BF16, 32, 13, True, None), (FP16, 16, 0, False, DROPOUT),
     (FP16, 16, 500, True, DROPOUT)],
    ids=["fp32 holes", "fp32", "bf16", "bf16 kept", "bf16 holes", "fp16 alone", "fp16 all"],
)  # fmt: skip
def test_gradients(
    dtype: torch.dtype,
    size: int,
    window: int,
    with_holes: bool,
    dropout: Dropout | None,
    device: torch.device,
    poisoned: Any,
) -> None:
    """Catches a key at the edge of the window, or of a text, whose gradient is lost or made of a row too far away."""
    check(LENGTHS, dtype, window, with_holes, device, dropout, size=size)
    poisoned.check()


TILES = [(16, 32, 3, True), (64, 32, 10, True), (32, 64, 21, False)]


@pytest.mark.parametrize(("rows", "step", "window", "share"), TILES)
def test_tiles_of_any_size(rows: int, step: int, window: int, share: bool, device: torch.device) -> None:
    """Catches a window that only fits the tiles that it met, and places of dropout that follow the window's start."""
    lengths = [5, 9, 40, 2, 1, 70]
    check(lengths, FP16, window, rows == 64, device, DROPOUT, num_heads=1, tiles=tiles_of(rows, step), share=share)


@pytest.mark.parametrize("lengths", [[0, 0], [1], [6], [1, 1, 0, 1]], ids=str)
def test_short_and_empty_texts(lengths: list[int], device: torch.device, poisoned: Any) -> None:
    """Catches a text shorter than the window, or none at all, that a pass divides by or reads past."""
    if sum(lengths) == 0:
        qkv = torch.empty(0, 3 * 32, device=device)
        out, _, grad_qkv = both_passes(qkv, qkv[:, :32], lengths, 2, Window(3))
        assert out.shape == (0, 32) and grad_qkv.shape == qkv.shape
    else:
        for window in (0, 5):
            check(lengths, FP32, window, False, device, DROPOUT)
    poisoned.check()


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_far_keys_are_not_visited(device: torch.device) -> None:
    """Catches keys or queries beyond the window that a pass reads: some are NaN, and 0 times NaN would show."""
    qkv, grad = randn(1300, 3 * 16).to(device, BF16), randn(1300, 16, seed=1).to(device, BF16)
    qkv[600:610] = float("nan")
    out, lse, grad_qkv = both_passes(qkv, grad, [1300], 1, Window(16))
    near = 2 * (128 + 64 + 16)  # a tile, a block and the window, of what was NaN and again of the rows that saw it
    for rows in (out, lse.t(), grad_qkv):
        assert rows[: 600 - near].isfinite().all() and rows[610 + near :].isfinite().all()
    assert grad_qkv[600:610].isnan().all()


@pytest.mark.parametrize(
    ("module", "loads"), [(attention_query_gradient, 2), (attention_key_gradient, 2)], ids=["queries", "keys"]
)
def test_cost_is_by_the_window(module: Any, loads: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a pass whose tiles go over a number of blocks that grows with the length of a text."""
    if device.type == "cuda":
        pytest.skip("blocks are counted under the interpreter")
    original, visited = module.load_rows, []

    def counted(*arguments: Any) -> Any:
        visited.append(None)
        return original(*arguments)

    monkeypatch.setattr(module, "load_rows", counted)
    window, rows, step = 32, 64, 32
    counts = []
    for length in (256, 512):
        visited.clear()
        qkv, grad = randn(length, 3 * 16).to(BF16), randn(length, 16).to(BF16)
        both_passes(qkv, grad, [length], 1, Window(window), tiles=tiles_of(rows, step))
        counts.append(len(visited) // loads)
    most = (rows + 2 * window) // step  # blocks of a tile; the first and the last one have half of a window less
    assert counts == [most * (n // rows) - 2 for n in (256, 512)]


def test_same_bits_again(device: torch.device) -> None:
    """Catches a sum whose order varies from run to run."""
    qkv, grad = randn(90, 3 * 32).to(device, FP16), randn(90, 32, seed=1).to(device, FP16)
    first, second = (both_passes(qkv, grad, [70, 2, 18], 2, Window(9), DROPOUT) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_windows_as_wide_as_the_text_change_nothing(device: torch.device) -> None:
    """Catches a window that takes something away from a text that it covers, gradients of a mask included."""
    lengths = [20, 3, 9]
    qkv, grad = randn(32, 3 * 32).to(device, FP32), randn(32, 32, seed=1).to(device, FP32)
    ours = both_passes(qkv, grad, lengths, 2, Window(19), DROPOUT)
    exact = gradients_within(qkv.double(), grad.double(), lengths, 2, 1 << 20, None, DROPOUT)
    assert rms_error(ours[0], exact[0]) < 1e-6 and rms_error(ours[2], exact[1]) < 1e-6
    assert torch.equal(within(qkv, lengths, 2, 19), within(qkv, lengths, 2, 1 << 20))
