"""Rows and sequences of each operation on a CPU have the same bits alone and among others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastbert import (
    BackendError,
    ops,
)
from fastbert.ops import Policy
from fastbert.ops.pooling import MODES
from fastbert.pipelines.modules import ACTIVATIONS, Dense, Dropout, LayerNorm, Normalize, apply
from fastbert_kernels import cpu
from helpers import assert_as_accurate, cu_seqlens_of, rms_error
from invariance_cases import DTYPES, INVARIANT, skip_without

pytestmark = [
    pytest.mark.skipif(cpu.obstacle() is not None, reason=str(cpu.obstacle())),
    pytest.mark.usefixtures("number_of_threads"),
]


ROWS = 300  # of which any 1 to MOST are to have the same bits alone
MOST = 40


def assert_rows_are_alone(function: Callable[[slice], Tensor]) -> None:
    """function(rows) has the same bits for some rows as for all of them, with one thread and with two."""
    torch.set_num_threads(1)
    everything = function(slice(0, ROWS))
    assert everything.isfinite().all()
    for n_threads, counts in ((1, range(1, MOST + 1)), (2, (1, 2, 3, 7, 8, 13, 40))):
        torch.set_num_threads(n_threads)
        assert torch.equal(function(slice(0, ROWS)), everything), f"{n_threads} threads"
        for n_rows in counts:
            rows = slice(7, 7 + n_rows)
            assert torch.equal(function(rows), everything[rows]), f"{n_rows} rows, {n_threads} threads"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("k", "n_columns"), [(6, 2), (64, 131), (300, 33), (1536, 50)])
def test_rows_of_a_linear(k: int, n_columns: int, dtype: torch.dtype, variant: str) -> None:
    """Catches a tile for few rows that adds up in another order than that for many, or fuses other steps."""
    skip_without(dtype)
    x, residual = torch.randn(ROWS, k).to(dtype), torch.randn(ROWS, n_columns).to(dtype)
    weight, bias = cpu.pack_weight(torch.randn(n_columns, k).to(dtype)), torch.randn(n_columns).to(dtype)
    for activation, added in (("none", residual), ("gelu", None), ("gelu_tanh", None), ("relu", None)):
        assert_rows_are_alone(
            lambda rows, activation=activation, added=added: cpu.linear_forward(
                x[rows], weight, n_columns, bias, activation, None if added is None else added[rows]
            )
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("k", "n_columns"), [(64, 131), (1536, 50)])
def test_rows_of_a_linear_in_8_bits(k: int, n_columns: int, dtype: torch.dtype, variant: str) -> None:
    """Catches a row whose scale, or whose share of the sums, comes from other rows."""
    if cpu.int8_obstacle() is not None:
        pytest.skip(str(cpu.int8_obstacle()))
    x, residual = torch.randn(ROWS, k).to(dtype), torch.randn(ROWS, n_columns).to(dtype)
    data = torch.randint(-127, 128, (n_columns, k), dtype=torch.int8)
    weight = cpu.pack_int8(data, torch.rand(n_columns) / 100, torch.randn(n_columns))

    def multiply(rows: slice, activation: str, rotated: bool) -> Tensor:
        q, affine = cpu.quantize_forward(x[rows], rotated)
        return cpu.linear_int8_forward(q, affine, weight, dtype, activation, residual[rows])

    for activation, rotated in (("none", True), ("gelu", False), ("gelu_tanh", True), ("relu", False)):
        assert_rows_are_alone(lambda rows, arguments=(activation, rotated): multiply(rows, *arguments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_size", [16, 48, 64])
def test_sequences_of_attention(head_size: int, dtype: torch.dtype, variant: str) -> None:
    """Catches queries or keys that are packed with a neighbour's, or a task that is cut by the number of sequences."""
    lengths = [1, 2, 7, 16, 17, 40, 0, 193, 250]
    qkv = torch.randn(sum(lengths), 3 * 2 * head_size).to(dtype)
    alone = [cpu.varlen_attention_forward(part, cu_seqlens_of([n]), 2, 0.2)
             for part, n in zip(qkv.split(lengths), lengths, strict=True)]  # fmt: skip
    for n_threads in (1, 2):
        torch.set_num_threads(n_threads)
        together = cpu.varlen_attention_forward(qkv, cu_seqlens_of(lengths), 2, 0.2)
        assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [33, 384])
def test_sequences_of_the_pooling(size: int, dtype: torch.dtype, variant: str) -> None:
    """Catches partial sums of a mean that do not start at the text's first row, or PyTorch's norm of many vectors."""
    lengths = [1, 2, 0, 15, 16, 17, 40, 100]
    hidden, each = torch.randn(sum(lengths), size).to(dtype), torch.tensor(lengths)
    for mode in MODES:
        for normalize in (False, True):
            options: dict[str, Any] = {"normalize": normalize, "out_dtype": torch.float32, "policy": INVARIANT}
            alone = [ops.pool(part, cu_seqlens_of([len(part)]), mode, **options) for part in hidden.split(lengths)]
            for n_threads in (1, 2):
                torch.set_num_threads(n_threads)
                together = ops.pool(hidden, cu_seqlens_of(lengths), mode, **options)
                assert torch.equal(together, torch.cat(alone)), mode
            theirs = {**options, "policy": Policy("torch")}
            exact = ops.pool(hidden.double(), cu_seqlens_of(lengths), mode, **{**theirs, "out_dtype": torch.float64})
            eager = ops.pool(hidden, cu_seqlens_of(lengths), mode, **theirs)
            assert_as_accurate(f"pooling {mode}", together[each > 0], eager[each > 0], exact[each > 0])
            assert (together[each == 0] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [16, 33, 384, 1000])
def test_rows_of_what_pytorch_runs(size: int, dtype: torch.dtype) -> None:
    """Catches a PyTorch whose LayerNorm or embeddings depend on the number of rows."""
    x, residual, bias, ln_weight, ln_bias = (
        torch.randn(*shape, size).to(dtype) for shape in ((ROWS,), (ROWS,), (), (), ())
    )
    words, types, positions = (torch.randn(n, size).to(dtype) for n in (50, 2, 40))
    ids, type_ids, places = (torch.randint(n, (ROWS,)) for n in (50, 2, 40))
    options = {"policy": INVARIANT}
    assert_rows_are_alone(
        lambda rows: ops.bias_residual_layer_norm(x[rows], bias, residual[rows], ln_weight, ln_bias, 1e-12, **options)
    )
    assert_rows_are_alone(
        lambda rows: ops.embedding_layer_norm(
            ids[rows], type_ids[rows], places[rows], words, types, positions, ln_weight, ln_bias, 1e-12, **options
        )
    )
    assert_rows_are_alone(lambda rows: ops.bias_gelu(x[rows], bias, **options))


@pytest.mark.parametrize("name", ["Tanh", "GELU", "Sigmoid", "softmax"])
@pytest.mark.parametrize("size", [1, 3, 33])
def test_rows_of_functions(size: int, name: str) -> None:
    """Catches the last elements of a tensor, which PyTorch computes by another formula than whole vectors."""
    function = (lambda x: x.softmax(1)) if name == "softmax" else ACTIVATIONS[name]
    x = torch.randn(ROWS, size)
    assert_rows_are_alone(lambda rows: ops.elementwise(function, x[rows], policy=INVARIANT))
    torch.testing.assert_close(ops.elementwise(function, x, policy=INVARIANT), function(x), rtol=1e-5, atol=1e-6)
    assert ops.elementwise(function, x[:0], policy=INVARIANT).shape == (0, size)
    assert torch.equal(ops.elementwise(function, x), function(x))  # at once, without the mode


@pytest.mark.parametrize(
    "make_module",
    [*(lambda name=name: Dense(48, 20, activation=name) for name in ACTIVATIONS), lambda: Dense(48, 20, bias=False),
     lambda: LayerNorm(48), Normalize, Dropout],
    ids=[*ACTIVATIONS, "Dense without bias", "LayerNorm", "Normalize", "Dropout"],
)  # fmt: skip
def test_after_the_pooling(make_module: Callable[[], nn.Module]) -> None:
    """Catches a module of a sentence encoder whose rows PyTorch computes together."""
    module = make_module().eval()
    x = torch.randn(ROWS, 48)
    with torch.inference_mode():
        assert_rows_are_alone(lambda rows: apply(module, x[rows], INVARIANT))
        assert rms_error(apply(module, x, INVARIANT), module(x)) < 1e-6
        assert rms_error(apply(module.to(torch.bfloat16), x, INVARIANT), module(x)) < 1e-6  # cast on each call
    with pytest.raises(BackendError, match="a module ReLU after the pooling does not support it"):
        apply(nn.ReLU(), x, INVARIANT)
