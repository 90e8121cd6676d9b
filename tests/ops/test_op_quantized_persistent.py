"""The persistent 8-bit GEMM on tensor descriptors is right, and is taken where it should be."""

from __future__ import annotations

import functools

import pytest
import torch
from test_op_quantized import PRECISIONS, TORCH, assert_same_8_bit, exact_activation, exact_product, operands

import float8_sums
from fastbert.ops import quantized as Q
from fastbert_kernels import configs, launch, quantized_configs
from fastbert_kernels.quantized_linear import quantized_linear_forward, quantized_linear_pointer_forward
from fastbert_kernels.quantized_linear_persistent import quantized_linear_persistent_forward
from helpers import assert_as_accurate, guarded, rms_error

TILE = {"BLOCK_ROWS": 32, "BLOCK_COLS": 32, "BLOCK_K": 32, "GROUP_ROWS": 2, "num_warps": 4, "num_stages": 2}
WIDE = {**TILE, "BLOCK_COLS": 256}  # worked on in two parts
ONE_PART = {**TILE, "BLOCK_COLS": 128}
SHAPES = [  # T, K, M, group
    (1, 32, 112, None),
    (5, 48, 144, None),
    (70, 96, 272, None),
    (33, 80, 48, 32),
    (33, 192, 400, 64),
]


@pytest.fixture(autouse=True)
def _descriptors(device):
    if device.type == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("tensor descriptors need compute capability 9.0")


def arguments(x, weight, bias, activation="none"):
    return x.data, x.scale, x.group, weight.data, weight.scale.flatten(), bias, activation


def persistent(x, weight, bias, activation, dtype, tile, sum_outside):
    out = launch.empty((x.data.shape[0], weight.data.shape[0]), like=x.data, dtype=dtype)
    return quantized_linear_persistent_forward(*arguments(x, weight, bias, activation), tile, out, None, sum_outside)


def by_pointers(x, weight, bias, activation, dtype, tile, sum_outside):
    out = launch.empty((x.data.shape[0], weight.data.shape[0]), like=x.data, dtype=dtype)
    return quantized_linear_pointer_forward(*arguments(x, weight, bias, activation), tile, out, None, sum_outside)


def guard(q):
    """The same operand between bands of other values, which a read past an edge would see."""
    data = torch.full((q.data.shape[0] + 2, q.data.shape[1]), 99, device=q.data.device).to(q.data.dtype)
    data[1:-1] = q.data
    scale = torch.full((q.scale.shape[0] + 2, q.scale.shape[1]), float("nan"), device=q.scale.device)
    scale[1:-1] = q.scale
    return q._replace(data=data[1:-1], scale=scale[1:-1])


@pytest.mark.parametrize(("activation", "with_bias"), [("gelu", True), ("none", False)])
@pytest.mark.parametrize("tile", [TILE, WIDE], ids=["one part", "two parts"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("n_rows", "k", "n_cols", "group"), SHAPES)
def test_kernel(n_rows, k, n_cols, group, precision, tile, activation, with_bias, device, poisoned):
    """Catches a scale of another group or step, or a tail of K, an edge or a part of a tile left out."""
    x, weight, bias = operands(n_rows, k, n_cols, group, precision, device)
    bias = bias if with_bias else torch.zeros_like(bias)
    inputs = guard(x), guard(weight), guarded(bias) if with_bias else None
    expected = exact_product(x, weight, bias, activation)
    for dtype in (torch.float32, torch.bfloat16) if activation == "none" else (torch.float32,):
        for sum_outside in {precision == "fp8", False}:
            ours = persistent(*inputs, activation, dtype, tile, sum_outside)
            if precision == "fp8" and float8_sums.are_short(device):
                step = tile["BLOCK_K"] if sum_outside else None
                bound = float8_sums.bound(x, weight, bias, lambda y: exact_activation(y, activation), step)
                assert rms_error(ours, expected) <= bound + 0.5 * torch.finfo(dtype).eps
            else:
                twin = Q.linear(x, weight, bias, dtype, activation, policy=TORCH)
                assert_as_accurate(f"{n_rows}x{k}x{n_cols}", ours, twin, expected)
    poisoned.check()


@pytest.mark.parametrize("tile", [TILE, WIDE], ids=["one part", "two parts"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("group", [None, 64])
def test_bits_of_the_other_kernel(group, precision, tile, device):
    """Catches sums that are added up, or scaled, in another order than the kernel's on pointers."""
    if device.type == "cuda":
        pytest.skip("instructions of another shape may add up in another order")
    x, weight, bias = operands(70, 192, 272, group, precision, device)
    theirs = ONE_PART if tile is WIDE else TILE  # numpy, too, adds up in an order that depends on the width
    for sum_outside in {precision == "fp8", False}:
        rest = bias, "gelu", torch.float32
        ours = persistent(x, weight, *rest, tile, sum_outside)
        assert torch.equal(ours, by_pointers(x, weight, *rest, theirs, sum_outside))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("tile", [ONE_PART, WIDE], ids=["one part", "two parts"])
@pytest.mark.parametrize(("n_cols", "activation"), [(128, "none"), (144, "gelu"), (384, "gelu_tanh"), (272, "gelu")])
def test_quantises_what_it_would_store(n_cols, activation, tile, precision, device, poisoned):
    """Catches a scale of columns past the end, at another part's place, or written by a part past the end."""
    x, weight, bias = operands(40, 64, n_cols, None, precision, device)
    n_groups = -(-n_cols // 128)
    data = launch.empty((40, n_cols), like=x.data)
    scale = launch.empty((40, n_groups), like=x.scale)
    inputs = arguments(x, weight, bias, activation)
    quantized_linear_persistent_forward(*inputs, tile, data, scale, precision == "fp8")
    poisoned.check()
    y = persistent(x, weight, bias, activation, torch.float32, tile, precision == "fp8")
    assert_same_8_bit("linear", Q.Quantized(data, scale, 128), Q.quantize(y, precision, 128))


def test_visits_every_tile(device, poisoned, monkeypatch):
    """Catches a tile that no program takes, or two do, where the tiles are no multiple of the programs."""
    x, weight, bias = operands(100, 32, 272, None, "int8", device)
    expected = exact_product(x, weight, bias, "none")
    for n_programs in (1, 3, 1000):
        monkeypatch.setattr(launch, "n_multiprocessors", lambda device, n=n_programs: n)
        for tile in (TILE, WIDE):
            assert rms_error(persistent(x, weight, bias, "none", torch.float32, tile, False), expected) < 1e-6
    poisoned.check()


def taken(monkeypatch, x, weight, arch, dtype=torch.float32):
    """The names of the kernels that quantized_linear_forward launches as on this architecture, and its output."""
    names = []
    run = launch.run
    with monkeypatch.context() as patched:
        patched.setattr(launch, "arch", lambda device: arch)
        patched.setattr(
            launch, "run", lambda kernel, *a, **kw: names.append(kernel.fn.__name__) or run(kernel, *a, **kw)
        )
        return names, quantized_linear_forward(*arguments(x, weight, None), dtype)


POINTERS, DESCRIPTORS = ["_quantized_linear_kernel"], ["_quantized_linear_persistent_kernel"]


@pytest.mark.parametrize(
    ("arch", "precision", "k", "n_cols", "group", "expected"),
    [
        (90, "fp8", 64, 48, None, DESCRIPTORS),
        (90, "int8", 64, 48, 32, DESCRIPTORS),
        (100, "fp8", 64, 48, None, DESCRIPTORS),
        (100, "int8", 64, 48, None, POINTERS),  # old instructions, which descriptors do not help
        (89, "fp8", 64, 48, None, POINTERS),
        (80, "int8", 64, 48, None, POINTERS),
        (120, "fp8", 64, 48, None, POINTERS),
        (90, "int8", 72, 48, None, POINTERS),  # rows of 72 bytes
        (90, "int8", 64, 46, None, POINTERS),  # rows of the output are 184 bytes
        (90, "int8", 96, 48, 48, POINTERS),  # a step of 64 columns would reach into the next group
        (90, "int8", 96, 48, 16, POINTERS),
    ],
)
def test_where_it_is_taken(arch, precision, k, n_cols, group, expected, device, poisoned, monkeypatch):
    """Catches a descriptor on a GPU that has none, or for what has no descriptor, or a fallback that is wrong."""
    x, weight, _ = operands(20, k, n_cols, group, precision, device)
    names, out = taken(monkeypatch, x, weight, arch)
    assert names == expected
    bound = float8_sums.bound(x, weight, None) if precision == "fp8" and float8_sums.are_short(device) else 0.0
    assert rms_error(out, Q.dequantize(x).double() @ Q.dequantize(weight).double().T) < bound + 1e-6
    poisoned.check()


def test_where_operands_begin(device, monkeypatch):
    """Catches rows at an odd address that take another kernel, and so other bits, than the same rows elsewhere."""
    x, weight, _ = operands(20, 64, 48, None, "int8", device)

    def shifted(q):
        data = torch.zeros(q.data.numel() + 3, dtype=torch.int8, device=device)[3:].view(q.data.shape)
        return q._replace(data=data.copy_(q.data))

    (names, out), (names_shifted, out_shifted) = (taken(monkeypatch, rows, weight, 90) for rows in (x, shifted(x)))
    assert names == names_shifted == DESCRIPTORS and torch.equal(out, out_shifted)
    names, other = taken(monkeypatch, x, shifted(weight), 90)
    assert names == POINTERS and rms_error(other, out) < 1e-6


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_are_the_same_wherever_they_stand(precision, device):
    """Catches a tile, or a program's place in the loop, that enters a row's bits."""
    x, weight, bias = operands(90, 128, 272, 64, precision, device)
    rest = bias, "gelu", torch.bfloat16, WIDE, precision == "fp8"
    out = persistent(x, weight, *rest)
    for order in (torch.arange(90).flip(0), torch.randperm(90)[:37], torch.tensor([5])):
        part = x._replace(data=x.data[order], scale=x.scale[order])
        assert torch.equal(persistent(part, weight, *rest), out[order])


def test_tables_choose(monkeypatch):
    """Catches a choice of a table that is not followed, or a tile of another shape, group or result."""
    fp8, none = torch.float8_e4m3fn, torch.bfloat16
    tile = {**TILE, "GROUP_ROWS": 7}
    tables_by_key = {
        "quantized_linear/float8/768x768/group64": tile,
        "quantized_gemm/float8/768x768/group64": {"kernel": "quantized_linear"},
        "quantized_linear_persistent/float8/768x3072/row-quantized": {**tile, "BLOCK_COLS": 128},
    }
    find = configs.tables.find

    def planted(op, keys, *rest):
        entries = (tables_by_key[f"{op}/{key}"] for key in keys if f"{op}/{key}" in tables_by_key)
        entry = next(entries, None)
        return find(op, keys, *rest) if entry is None else (entry, "planted")

    monkeypatch.setattr(configs.tables, "find", planted)
    quantized_configs._quantized_gemm.cache_clear()
    try:
        chosen = quantized_configs.quantized_gemm(fp8, 90, (768, 768), 64, none)
        assert (chosen.choice, chosen.choice_source, chosen.ours) == ("quantized_linear", "planted", "quantized_linear")
        assert chosen.config.block_sizes == {**tile, "BLOCK_K": 32}
        for shape, group, dtype in (((768, 768), None, none), ((768, 3072), None, none)):
            chosen = quantized_configs.quantized_gemm(fp8, 90, shape, group, dtype)
            assert chosen.choice is None and chosen.ours == "quantized_linear_persistent"
            assert chosen.config.block_sizes["BLOCK_COLS"] == 256
        chosen = quantized_configs.quantized_gemm(fp8, 90, (768, 3072), None, fp8)
        assert chosen.ours == "quantized_linear_persistent" and chosen.config.block_sizes["BLOCK_COLS"] == 128
    finally:
        quantized_configs._quantized_gemm.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("n_cols_of_a_tile", [128, 256])
def test_on_a_gpu(n_cols_of_a_tile, precision):
    """Catches wrong numbers of the compiled kernel, whose pipeline and copies the interpreter does not see."""
    device, arch = torch.device("cuda"), launch.arch(torch.device("cuda"))
    if Q.device_obstacle(precision, device) is not None or (precision == "int8" and arch != 90):
        pytest.skip("this kernel is not taken in this precision here")
    sizes = {"BLOCK_ROWS": 128, "BLOCK_COLS": n_cols_of_a_tile, "GROUP_ROWS": 8, "num_warps": 8, "num_stages": 3}
    outside = precision == "fp8" and arch <= launch.LAST_ARCH_WITH_SHORT_FLOAT8_SUMS
    for n_rows, k, n_cols, group in ((1, 768, 768, 64), (5000, 768, 3072, None), (3001, 1040, 1040, None),
                                     (2000, 3072, 768, 128)):  # fmt: skip
        x, weight, bias = operands(n_rows, k, n_cols, group, precision, device)
        config = {**sizes, "BLOCK_K": group or 128}
        out = torch.full((n_rows, n_cols), float("nan"), device=device)
        inputs = arguments(x, weight, bias, "gelu")
        quantized_linear_persistent_forward(*inputs, config, out, None, outside)
        bound = 2**-12
        if precision == "fp8" and float8_sums.are_short(device):
            finish = functools.partial(exact_activation, activation="gelu")
            bound = float8_sums.bound(x, weight, bias, finish, config["BLOCK_K"])
        assert rms_error(out, exact_product(x, weight, bias, "gelu")) <= bound
        data, scale = torch.empty_like(out, dtype=x.data.dtype), x.scale.new_empty(n_rows, -(-n_cols // 128))
        quantized_linear_persistent_forward(*inputs, config, data, scale, outside)
        assert_same_8_bit("linear", Q.Quantized(data, scale, 128), Q.quantize(out, precision, 128))
