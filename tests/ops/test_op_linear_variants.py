"""Linears for few rows, with K in shares, and with specialised warps are right, and are taken where they should be."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_op_linear_persistent import check, inputs
from test_op_quantized import PRECISIONS, exact_product, operands
from test_op_quantized_persistent import ONE_PART, arguments, guard

from fastbert import ops, reference
from fastbert.ops import Policy
from fastbert.ops import quantized as Q
from fastbert_kernels import dependent, few_rows, launch, linear, tables
from fastbert_kernels.linear_specialized import linear_specialized_forward
from fastbert_kernels.quantized_linear_persistent import quantized_linear_persistent_forward
from fastbert_kernels.quantized_linear_specialized import quantized_linear_specialized_forward
from fastbert_kernels.split_linear import split_linear_layer_norm_forward
from helpers import assert_as_accurate, guarded, rms_error

TILE = {"BLOCK_ROWS": 32, "BLOCK_COLS": 16, "BLOCK_K": 16, "GROUP_ROWS": 2, "num_warps": 4, "num_stages": 2}
BF16 = torch.bfloat16
TRITON = Policy("triton", strict=True)


@pytest.fixture
def interpreted(device):
    """The device, where warp-specialised kernels need no GPU: the interpreter has no warps."""
    if device.type == "cuda":
        pytest.skip("on a GPU, test_specialized_on_a_gpu.py runs these kernels with the tiles they are made for")
    return device


@pytest.mark.parametrize(
    ("activation", "with_bias", "with_residual"),
    [("none", True, False), ("gelu", True, False), ("gelu_tanh", False, False), ("none", False, True)],
)
@pytest.mark.parametrize(("n_rows", "k", "n_cols"), [(1, 16, 8), (70, 72, 24)])
def test_specialized(n_rows, k, n_cols, activation, with_bias, with_residual, interpreted, poisoned):
    """Catches a descriptor made on the device with another shape or stride, or an epilogue of another tile."""
    x, weight, bias, residual = inputs(n_rows, k, n_cols, BF16, interpreted)
    bias, residual = bias if with_bias else None, residual if with_residual else None
    out = launch.empty((n_rows, n_cols), like=x)
    inside = [None if t is None else guarded(t, extra_columns=8) for t in (x, weight, bias, residual)]
    linear_specialized_forward(inside[0], inside[1], inside[2], activation, inside[3], TILE, out)
    check(f"{n_rows}x{k}x{n_cols}", x, weight, bias, None if activation == "none" else activation, residual, out)
    poisoned.check()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("n_cols", "group", "quantizes"), [(144, None, True), (272, 64, False)])
def test_specialized_8_bits(n_cols, group, quantizes, precision, interpreted, poisoned):
    """Catches a scale of another group, step or row, or other bits than those of the persistent kernel."""
    x, weight, bias = operands(33, 128, n_cols, group, precision, interpreted)
    results = []
    for forward in (quantized_linear_persistent_forward, quantized_linear_specialized_forward):
        out = launch.empty((33, n_cols), like=x.data, dtype=x.data.dtype if quantizes else torch.float32)
        scale = launch.empty((33, -(-n_cols // 128)), like=x.scale) if quantizes else None
        forward(*arguments(guard(x), guard(weight), bias, "gelu"), ONE_PART, out, scale, precision == "fp8")
        results.append((out, scale))
    poisoned.check()
    (theirs, their_scale), (ours, our_scale) = results
    assert torch.equal(ours, theirs) and (not quantizes or torch.equal(our_scale, their_scale))
    if not quantizes:
        assert rms_error(ours, exact_product(x, weight, bias, "gelu")) < 1e-6


def test_specialized_8_bits_have_one_part(interpreted):
    """Catches a tile of more columns than share a scale."""
    x, weight, bias = operands(4, 32, 256, None, "int8", interpreted)
    with pytest.raises(ValueError, match="BLOCK_COLS"):
        quantized_linear_specialized_forward(
            *arguments(x, weight, bias), {**ONE_PART, "BLOCK_COLS": 256}, x.data, None, False
        )


def layer_norm_inputs(n_rows, k, h, device):
    x, weight, bias, residual = inputs(n_rows, k, h, BF16, device)
    return x, weight, bias, residual, *(torch.randn(h).to(device, BF16) for _ in range(2))


def exact_layer_norm(x, weight, bias, residual, ln_weight, ln_bias):
    d = [t.double() for t in (x, weight, bias, residual, ln_weight, ln_bias)]
    return reference.bias_residual_layer_norm(d[0] @ d[1].T, d[2], d[3], d[4], d[5], 1e-12)


@pytest.mark.parametrize("splits", [1, 2, 3, 8])
@pytest.mark.parametrize(("n_rows", "k", "h"), [(1, 16, 16), (33, 112, 40), (40, 70, 56)])
def test_split(n_rows, k, h, splits, device, poisoned):
    """Catches a share of K left out, taken twice or read past its end, an empty share that is not 0, or other bits."""
    x, weight, bias, residual, ln_weight, ln_bias = layer_norm_inputs(n_rows, k, h, device)
    split = few_rows.Split({**TILE, "BLOCK_ROWS": 64, "BLOCK_COLS": 64}, splits)
    inside = [guarded(t, extra_columns=8) for t in (x, weight)], guarded(bias), guarded(residual, extra_columns=3)
    arguments = *inside[0], inside[1], inside[2], ln_weight, ln_bias, 1e-12, split
    out = split_linear_layer_norm_forward(*arguments)
    poisoned.check()
    eager = F.layer_norm(F.linear(x, weight, bias) + residual, (h,), ln_weight, ln_bias, 1e-12)
    expected = exact_layer_norm(x, weight, bias, residual, ln_weight, ln_bias)
    assert_as_accurate(f"{splits} shares", out, eager, expected)
    assert torch.equal(out, split_linear_layer_norm_forward(*arguments))
    no_bias = split_linear_layer_norm_forward(x, weight, None, residual, ln_weight, ln_bias, 1e-12, split)
    assert rms_error(no_bias, exact_layer_norm(x, weight, 0 * bias, residual, ln_weight, ln_bias)) < 2**-7


@pytest.mark.parametrize("n_cols", [384, 768, 1024, 1536, 3072, 4096])
def test_heuristic_fills_the_gpu(n_cols):
    """Catches a tile for few rows that leaves half of a GPU idle where a smaller one would not, or has two rounds."""
    for bucket in few_rows.BUCKETS:
        sizes = few_rows.heuristic_tile(n_cols, bucket)
        programs = [-(-bucket // t["BLOCK_ROWS"]) * -(-n_cols // t["BLOCK_COLS"]) for t in few_rows.TILES]
        if sizes is None:
            assert min(programs) > few_rows.MULTIPROCESSORS
        else:
            fitting = [n for n in programs if n <= few_rows.MULTIPROCESSORS]
            assert programs[few_rows.TILES.index(sizes)] == max(fitting)


def launched(monkeypatch, call):
    names, run = [], launch.run
    with monkeypatch.context() as patched:
        patched.setattr(
            launch, "run", lambda kernel, grid, config, **kw: names.append((kernel.fn.__name__, config)) or
            run(kernel, grid, config, **kw)
        )  # fmt: skip
        return names, call()


def test_few_rows_have_a_tile_of_their_own(device, monkeypatch):
    """Catches a tile by the number of rows on another architecture, in float32, for training or past the limit."""
    shape = 768, 3072
    for n_rows, expected in ((1, (64, 64)), (64, (64, 64)), (65, (64, 64)), (129, (64, 128)), (512, (128, 128))):
        sizes = few_rows.tile(BF16, 90, shape, "gelu", n_rows)
        assert (sizes["BLOCK_ROWS"], sizes["BLOCK_COLS"]) == expected
    for dtype, arch, epilogue, n_rows in (
        (BF16, 90, "gelu", 513), (BF16, 80, "gelu", 64), (torch.float32, 90, "gelu", 64), (BF16, 90, "pre", 64),
    ):  # fmt: skip
        assert few_rows.tile(dtype, arch, shape, epilogue, n_rows) is None


@pytest.mark.parametrize("invariant", [False, True])
def test_batch_invariant_mode_has_one_tile(invariant, device, monkeypatch):
    """Catches a tile by the number of rows in batch-invariant mode, where a row's bits must not depend on it."""
    monkeypatch.setattr(launch, "arch", lambda device: 90)
    monkeypatch.setattr("fastbert.ops.dispatch.arch_of", lambda device: 90)
    x, weight, bias, residual, ln_weight, ln_bias = layer_norm_inputs(300, 64, 192, device)
    policy = Policy("triton", strict=True, batch_invariant=invariant)
    kernels, rows = set(), []
    for n_rows in (1, 100, 300):
        part = x[:n_rows], weight, bias
        for call in (
            lambda part=part: ops.linear(*part, "gelu", policy=policy),
            lambda part=part, n=n_rows: ops.linear_residual_layer_norm(
                *part, residual[:n], ln_weight, ln_bias, 1e-12, policy=policy
            ),
        ):
            names, out = launched(monkeypatch, call)
            kernels |= {(name, tuple(config.items())) for name, config in names if "linear" in name}
            rows.append(out[0])
    if invariant:
        assert {name for name, _ in kernels} == {"_linear_persistent_kernel"} and len(kernels) == 2  # two epilogues
        assert all(torch.equal(row, rows[i % 2]) for i, row in enumerate(rows))
    else:
        assert any(name == "_linear_kernel" for name, _ in kernels)


@pytest.fixture
def table(monkeypatch):
    """Plants entries of `few_rows` in the place of those that tables have."""

    def plant(entries):
        find = tables.find

        def planted(op, keys, *rest):
            known = [entries[key] for key in keys if op == "few_rows" and key in entries]
            return (known[0], "planted") if known else find(op, keys, *rest)

        monkeypatch.setattr(tables, "find", planted)
        monkeypatch.setattr(tables, "generation", tables.generation + 1000)

    return plant


def test_a_table_splits(table, device, monkeypatch):
    """Catches a split of a table that is not followed, that another number of rows gets, or batch-invariant mode."""
    table({"float16/96x48/residual/64": {"kernel": "split_linear", "SPLITS": 3, **TILE}})
    tensors = layer_norm_inputs(100, 96, 48, device)
    expected = exact_layer_norm(*tensors)
    x, weight, bias, residual, ln_weight, ln_bias = tensors
    eager = F.layer_norm(F.linear(x, weight, bias) + residual, (48,), ln_weight, ln_bias, 1e-12)
    for n_rows, policy, wanted in (
        (64, TRITON, ["_linear_kernel", "_split_layer_norm_kernel"]),
        (100, TRITON, ["_bias_residual_layer_norm_kernel"]),
        (64, Policy("triton", strict=True, batch_invariant=True), None),
    ):
        names, out = launched(
            monkeypatch,
            lambda n=n_rows, policy=policy: ops.linear_residual_layer_norm(
                x[:n], weight, bias, residual[:n], ln_weight, ln_bias, 1e-12, policy=policy
            ),
        )
        assert "_split_layer_norm_kernel" not in dict(names) if wanted is None else [n for n, _ in names] == wanted
        assert_as_accurate(str(n_rows), out, eager[:n_rows], expected[:n_rows])


def test_a_table_has_a_tile_for_few_rows(table, device, monkeypatch):
    """Catches a tile of a table that is not followed, or that more rows than its own get."""
    table({"float16/32x48/gelu/64": {"kernel": "linear", **TILE}})
    x, weight, bias, _ = inputs(80, 32, 48, BF16, device)
    for n_rows in (64, 80):
        names, out = launched(monkeypatch, lambda n=n_rows: ops.linear(x[:n], weight, bias, "gelu", policy=TRITON))
        assert (names[0][1] == TILE) == (n_rows == 64)
        check("few", x[:n_rows], weight, bias, "gelu", None, out)


def test_dependent_launches_are_off():
    """Catches an option that is on before a GPU has shown that it pays, or on a GPU that does not have it."""
    config = {"num_warps": 4}
    assert dependent.options(config, 90) is config
    dependent.use(True)
    try:
        assert dependent.options(config, 80) is config
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launch, "interpreted", lambda: True)
            assert dependent.options(config, 90) is config
            patch.setattr(launch, "interpreted", lambda: False)
            assert dependent.options(config, 90) == {"num_warps": 4, "PDL": True, "launch_pdl": True}
    finally:
        dependent.use(None)


def test_specialized_kernels_are_chosen_by_tables(monkeypatch):
    """Catches a choice of a table that is not followed, or that is on an architecture without that kernel."""
    tile = {**TILE, "num_warps": 4}
    planted = {
        "gemm/float16/768x3072/gelu": {"kernel": "linear_specialized", "ours": "linear_specialized"},
        "linear_specialized/float16/768x3072/gelu": tile,
        "quantized_gemm/float8/768x768/row": {"kernel": "quantized_linear_specialized"},
        "quantized_linear_specialized/float8/768x768/row": tile,
    }
    find = tables.find

    def found(op, keys, *rest):
        entry = next((planted[f"{op}/{key}"] for key in keys if f"{op}/{key}" in planted), None)
        return find(op, keys, *rest) if entry is None else (dict(entry), "planted")

    monkeypatch.setattr(tables, "find", found)
    monkeypatch.setattr(tables, "generation", tables.generation + 2000)
    for arch, expected in ((90, "_linear_specialized_kernel"), (100, "_linear_persistent_kernel")):
        with launch.recording(arch) as launches:
            out = linear.linear_forward(*(torch.empty(s, dtype=BF16) for s in ((64, 768), (3072, 768))), None, "gelu")
        assert [each.kernel.fn.__name__ for each in launches] == [expected] and out.shape == (64, 3072)
        with launch.recording(arch) as launches:
            x, weight, scale = torch.empty(64, 768), torch.empty(768, 768), torch.empty(64, 1)
            x8 = Q.Quantized(x.to(torch.float8_e4m3fn), scale, 768)
            w8 = Q.Quantized(weight.to(torch.float8_e4m3fn), torch.empty(768, 1), 768)
            from fastbert_kernels.quantized_linear import quantized_linear_forward

            quantized_linear_forward(*arguments(x8, w8, None), BF16)
        assert [each.kernel.fn.__name__ for each in launches] == [expected.replace("_linear", "_quantized_linear")]
