"""The persistent GEMM on tensor descriptors is right, and is taken where it should be."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastbert import reference
from fastbert_kernels import launch, linear
from fastbert_kernels.linear_persistent import describable, linear_persistent_forward
from helpers import assert_as_accurate, guarded

DTYPES = (torch.bfloat16, torch.float16)
TILE = {"BLOCK_ROWS": 32, "BLOCK_COLS": 16, "BLOCK_K": 32, "GROUP_ROWS": 2, "num_warps": 4, "num_stages": 2}
APART = {**TILE, "FLATTEN": 0, "PROGRAMS": 2}


@pytest.fixture(autouse=True)
def _descriptors(device):
    if device.type == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("tensor descriptors need compute capability 9.0")


def inputs(n_rows, k, n_cols, dtype, device):
    shapes = (n_rows, k), (n_cols, k), (n_cols,), (n_rows, n_cols)
    x, weight, bias, residual = (torch.randn(shape).to(device, dtype) for shape in shapes)
    return x, (weight / k**0.5).to(dtype), bias, residual


def check(name, x, weight, bias, activation, residual, ours):
    y = reference.linear(x.double(), weight.double(), None if bias is None else bias.double(), activation)
    eager = F.linear(x, weight, bias)
    if activation is not None:
        eager = F.gelu(eager, approximate="tanh" if activation == "gelu_tanh" else "none")
    if residual is not None:
        y, eager = y + residual.double(), eager + residual
    assert_as_accurate(name, ours, eager, y)


@pytest.mark.parametrize(
    ("activation", "with_bias", "with_residual"),
    [("none", True, False), ("gelu", True, False), ("gelu_tanh", False, False), ("none", True, True),
     ("none", False, True), ("none", False, False)],
)  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n_rows", "k", "n_cols"), [(1, 16, 8), (5, 40, 56), (33, 32, 16), (70, 72, 24)])
def test_kernel(n_rows, k, n_cols, dtype, activation, with_bias, with_residual, device, poisoned):
    """Catches a read or write past an edge of a descriptor, a tail of K left out, an epilogue of another tile."""
    x, weight, bias, residual = inputs(n_rows, k, n_cols, dtype, device)
    bias, residual = bias if with_bias else None, residual if with_residual else None
    out = launch.empty((n_rows, n_cols), like=x)
    inside = [None if t is None else guarded(t, extra_columns=8) for t in (x, weight, bias, residual)]
    linear_persistent_forward(inside[0], inside[1], inside[2], activation, inside[3], TILE, out)
    check(f"{n_rows}x{k}x{n_cols}", x, weight, bias, None if activation == "none" else activation, residual, out)
    poisoned.check()


def test_visits_every_tile(device, poisoned, monkeypatch):
    """Catches a tile that no program takes, or two do, where the tiles are no multiple of the programs."""
    x, weight, bias, _ = inputs(200, 16, 72, torch.float16, device)
    for n_programs, tile in ((1, TILE), (3, TILE), (1000, TILE), (3, APART)):
        monkeypatch.setattr(launch, "n_multiprocessors", lambda device, n=n_programs: n)
        out = launch.empty((200, 72), like=x)
        linear_persistent_forward(x, weight, bias, "none", None, tile, out)
        check(f"{n_programs} programs", x, weight, bias, None, None, out)
    poisoned.check()


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"FLATTEN": 0, "PROGRAMS": 2, "num_stages": 2}], ids=["", "apart"])
def test_on_a_gpu(options):
    """Catches wrong numbers of the compiled kernel, whose pipeline and copies the interpreter does not see."""
    tile = {**TILE, "BLOCK_ROWS": 128, "BLOCK_COLS": 128, "BLOCK_K": 64, "GROUP_ROWS": 8, "num_warps": 8}
    for n_rows, k, n_cols in ((1, 768, 768), (5000, 768, 3072), (3001, 1032, 1016)):
        x, weight, bias, residual = inputs(n_rows, k, n_cols, torch.bfloat16, "cuda")
        out = torch.full_like(residual, float("nan"))
        linear_persistent_forward(x, weight, bias, "none", residual, {**tile, **options}, out)
        check("sm_90", x, weight, bias, None, residual, out)


def taken(monkeypatch, x, weight, arch):
    """The names of the kernels that linear_forward launches as on this architecture, and its output."""
    names = []
    run = launch.run
    with monkeypatch.context() as patched:
        patched.setattr(launch, "arch", lambda device: arch)
        patched.setattr(
            launch, "run", lambda kernel, *a, **kw: names.append(kernel.fn.__name__) or run(kernel, *a, **kw)
        )
        return names, linear.linear_forward(x, weight, None, "none")


def test_where_it_is_taken(device, poisoned, monkeypatch):
    """Catches a descriptor on a GPU that has none, for what is not aligned or not in 16 bits, or a wrong fallback."""
    x, weight, _, _ = inputs(20, 64, 40, torch.bfloat16, device)
    persistent, pointers = ["_linear_persistent_kernel"], ["_linear_kernel"]
    wide = torch.zeros(20, 67, dtype=x.dtype, device=device)[:, :64].copy_(x)
    wide_weight = torch.zeros(40, 67, dtype=x.dtype, device=device)[:, :64].copy_(weight)
    odd_rows = torch.zeros(39, 64, dtype=x.dtype, device=device).copy_(weight[:39])
    for arch, rows, matrix, expected in (
        (90, x, weight, persistent),
        (100, x, weight, persistent),
        (80, x, weight, pointers),
        (89, x, weight, pointers),
        (90, wide, weight, persistent),  # copied
        (90, x, wide_weight, pointers),
        (90, x, odd_rows, pointers),  # rows of the output are 78 bytes
        (90, x.float(), weight.float(), pointers),
    ):
        names, out = taken(monkeypatch, rows, matrix, arch)
        assert names == expected, (arch, rows.stride(), matrix.shape)
        check(f"sm_{arch}", rows, matrix, None, None, None, out)
    poisoned.check()


def test_where_rows_begin_does_not_matter(device, monkeypatch):
    """Catches rows at an odd address that take another kernel, and so other bits, than the same rows elsewhere."""
    x, weight, _, _ = inputs(20, 64, 40, torch.bfloat16, device)
    shifted = torch.zeros(20 * 64 + 3, dtype=x.dtype, device=device)[3:].view(20, 64).copy_(x)
    assert describable(x) and not describable(shifted)
    lone = torch.as_strided(x[:1], (1, 64), (3, 1))  # a single row, whose stride says nothing
    for arch in (80, 90):
        (names, out), (names_shifted, out_shifted) = (taken(monkeypatch, rows, weight, arch) for rows in (x, shifted))
        assert names == names_shifted and torch.equal(out, out_shifted)
        lone_names, lone_out = taken(monkeypatch, lone, weight, arch)
        assert lone_names == names and torch.equal(lone_out[0], out[0])


def test_rows_are_the_same_wherever_they_stand(device):
    """Catches a tile, or a program's place in the loop, that enters a row's bits."""
    x, weight, bias, residual = inputs(90, 48, 40, torch.bfloat16, device)
    out = linear_persistent_forward(x, weight, bias, "none", residual, TILE, torch.empty_like(residual))
    for order in (torch.arange(90).flip(0), torch.randperm(90)[:37], torch.tensor([5])):
        part = torch.empty_like(residual[order])
        linear_persistent_forward(x[order], weight, bias, "none", residual[order], TILE, part)
        assert torch.equal(part, out[order])
