"""8-bit operations of other layers than BERT's: gates, sums before norms, windows, and rows by a pass of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import float8_sums
from fastbert import ops
from fastbert.ops import Policy, packing
from fastbert.ops import quantized as Q
from fastbert.ops import quantized_parts as P
from fastbert.ops.gelu import activate
from fastbert_kernels import configs, launch, quantized_gated_linear
from fastbert_kernels.sum_norm import sum_norm_forward
from helpers import assert_as_accurate, cu_seqlens_of, guarded, operations_called, rms_error

TRITON, TORCH = Policy("triton", strict=True), Policy("torch")
PRECISION = pytest.mark.parametrize("precision", ["fp8", "int8"])
BY_POINTERS = configs.Gemm(None, None, "quantized_gated_linear", configs.Config({}, ""))
DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def randn(*shape: int, dtype: torch.dtype = torch.float32, device: Any = "cpu") -> Tensor:
    """Normal values with a channel that is much larger than the rest."""
    x = torch.randn(*shape)
    x[:, 3] *= 20
    return x.to(device, dtype)


def assert_same(ours: Q.Quantized, expected: Q.Quantized, off: float = 0.001) -> None:
    """Equal but for ties: a rounding error in float32 moves few values by one step. off: the share of them."""
    assert ours.data.dtype == expected.data.dtype and ours.data.shape == expected.data.shape
    assert ours.group == expected.group
    torch.testing.assert_close(ours.scale, expected.scale, rtol=1e-4, atol=1e-30)
    steps = [q.data.view(torch.int8).int() for q in (ours, expected)]
    if ours.precision == "fp8":
        steps = [torch.where(bits < 0, -(bits & 0x7F), bits) for bits in steps]
    apart = (steps[0] - steps[1]).abs()
    assert not apart.numel() or (apart.max() <= 1 and (apart > 0).sum() <= max(2, off * apart.numel()))


@DTYPE
@pytest.mark.parametrize(("n_rows", "width"), [(1, 32), (7, 96), (5, 770)])
def test_sum_and_norm(n_rows: int, width: int, dtype: torch.dtype, device: torch.device, poisoned: Any) -> None:
    """Catches other bits than an addition and a LayerNorm give, an edge that is left out, or a lost sum."""
    x, residual = (guarded(randn(n_rows, width, dtype=dtype, device=device), extra_columns=3) for _ in range(2))
    weight, ln_bias = (torch.randn(width).to(device, dtype) for _ in range(2))
    for bias in (ln_bias, None):
        total, out = sum_norm_forward(x, residual, weight, bias, 1e-5)
        assert total is not None and torch.equal(total, x + residual)
        assert torch.equal(out, ops.bias_residual_layer_norm(total, None, None, weight, bias, 1e-5, policy=TRITON))
        none, again = sum_norm_forward(x, residual, weight, bias, 1e-5, keep_sum=False)
        assert none is None and torch.equal(again, out)
        poisoned.check()
    exact = F.layer_norm((x + residual).double(), (width,), weight.double(), ln_bias.double(), 1e-5)
    total, out = sum_norm_forward(x, residual, weight, ln_bias, 1e-5)
    assert_as_accurate("sum_norm", out, F.layer_norm(x + residual, (width,), weight, ln_bias, 1e-5), exact)
    assert sum_norm_forward(x[:0], residual[:0], weight, None, 1e-5)[1].shape == (0, width)


@DTYPE
@PRECISION
def test_sum_and_norm_in_8_bits(precision: str, dtype: torch.dtype, device: torch.device, poisoned: Any) -> None:
    """Catches a sum or rows in 8 bits that are not those of the operations apart."""
    x, residual = (randn(9, 96, dtype=dtype, device=device) for _ in range(2))
    weight = torch.randn(96).to(device, dtype)
    total, q = P.add_layer_norm(x, residual, weight, None, 1e-5, precision, policy=TRITON)
    poisoned.check()
    normed = ops.bias_residual_layer_norm(x + residual, None, None, weight, None, 1e-5, policy=TRITON)
    assert torch.equal(total, x + residual)
    assert_same(q, Q.quantize(normed, precision, rotated=precision == "int8"))
    twin = P.add_layer_norm(x, residual, weight, None, 1e-5, precision, policy=TORCH)
    assert torch.equal(twin[0], total) and rms_error(Q.dequantize(twin[1]), Q.dequantize(q)) < 0.01


@DTYPE
@PRECISION
def test_rows(precision: str, dtype: torch.dtype, device: torch.device, poisoned: Any) -> None:
    """Catches a scale of another row or head, or rows that are not rotated."""
    x = randn(7, 96, dtype=dtype, device=device)
    for group, rotated in ((None, False), (None, precision == "int8"), (16, False)):
        q = P.rows(x, precision, group, rotated=rotated, policy=TRITON)
        assert_same(q, Q.quantize(x, precision, group, rotated=rotated))
    poisoned.check()
    assert P.rows(x[:0], precision, 16, policy=TRITON).scale.shape == (0, 6)
    with pytest.raises(ValueError, match="group: expected a divisor of 96, got 50"):
        P.rows(x, precision, 50)


def operands(n_rows: int, k: int, width: int, precision: str, device: torch.device) -> tuple[Any, Any, Tensor]:
    x = Q.quantize(randn(n_rows, k, device=device), precision)
    weight = Q.quantize_weight(randn(2 * width, k, device=device) / k**0.5, precision)
    return x, weight, torch.randn(2 * width, device=device)


def exact_gate(x: Q.Quantized, weight: Q.Quantized, bias: Tensor | None, activation: str) -> Tensor:
    both = F.linear(Q.dequantize(x).double(), Q.dequantize(weight).double(), None if bias is None else bias.double())
    first, second = both.chunk(2, -1)
    return activate(first, activation) * second


@pytest.mark.parametrize(
    ("n_rows", "k", "width", "activation"),
    [
        (1, 32, 16, "gelu"),
        (70, 96, 130, "silu"),
        (5, 320, 300, "gelu_tanh"),
        (130, 64, 128, "relu"),
        (9, 80, 33, "swish"),
    ],
)
@PRECISION
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # numpy, of the exponential far on the left
def test_gated_linear(
    n_rows: int, k: int, width: int, activation: str, precision: str, device: torch.device, poisoned: Any
) -> None:
    """Catches halves in each other's place, a scale of the wrong half or group, a tail of K or of columns."""
    x, weight, bias = operands(n_rows, k, width, precision, device)
    for added in (bias, None):
        ours = P.gated_linear(x, weight, added, activation, policy=TRITON)
        poisoned.check()
        expected = exact_gate(x, weight, added, activation)
        error = rms_error(Q.dequantize(ours), expected)
        # float8 sums of Hopper are coarse before they are quantised
        extra = 0.0
        if precision == "fp8" and float8_sums.are_short(device):
            extra = 2 * float8_sums.bound(x, weight, added)
        rounded = rms_error(Q.dequantize(Q.quantize(expected.float(), precision, 128)), expected)
        assert error <= 1.05 * rounded + 1e-6 + extra
        if not extra:
            assert_same(ours, Q.quantize(expected.float(), precision, 128), off=0.005)
            assert_same(P.gated_linear(x, weight, added, activation, policy=TORCH), ours, off=0.005)


@pytest.mark.parametrize(("n_rows", "k", "width"), [(1, 32, 16), (130, 272, 144), (9, 128, 400)])
@pytest.mark.parametrize("activation", ["gelu", "silu"])
@PRECISION
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_gated_linear_on_descriptors(
    n_rows: int, k: int, width: int, activation: str, precision: str, device: torch.device, poisoned: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Catches other bits than the kernel on pointers gives, or a tile that no program takes."""
    if device.type == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("tensor descriptors need compute capability 9.0")
    if device.type == "cpu":
        monkeypatch.setattr(launch, "_recorded_arch", 90)
    x, weight, bias = operands(n_rows, k, width, precision, device)
    for added in (bias, None):
        ours = P.gated_linear(x, weight, added, activation, policy=TRITON)
        poisoned.check()
        with monkeypatch.context() as patch:
            patch.setattr(quantized_gated_linear, "quantized_gated_gemm", lambda *arguments: BY_POINTERS)
            expected = P.gated_linear(x, weight, added, activation, policy=TRITON)
        assert torch.equal(ours.data.view(torch.int8), expected.data.view(torch.int8))
        assert torch.equal(ours.scale, expected.scale)


def test_gated_linear_of_what_does_not_fit(device: torch.device) -> None:
    """Catches scales by groups, an odd weight or an unknown gate that are multiplied all the same; an empty launch."""
    x, weight, _ = operands(3, 64, 32, "int8", device)
    assert P.gated_linear(Q.Quantized(x.data[:0], x.scale[:0], 64), weight, None, policy=TRITON).data.shape == (0, 32)
    with pytest.raises(ValueError, match="expected one scale a row"):
        P.gated_linear(Q.quantize(randn(3, 64), "int8", 32), Q.quantize_weight(randn(64, 64), "int8"), None)
    with pytest.raises(ops.BackendError, match="there is no Triton kernel for 'mish'"):
        P.gated_linear(x, weight, None, "mish", policy=TRITON)
    with pytest.raises(ops.BackendError, match="batch_invariant"):
        P.gated_linear(x, weight, None, policy=Policy("triton", batch_invariant=True))


@DTYPE
@PRECISION
@pytest.mark.parametrize("holes", [False, True])
def test_attention_within_a_window(
    holes: bool, precision: str, dtype: torch.dtype, device: torch.device, poisoned: Any
) -> None:
    """Catches a window, a column or a scale that is lost where attention quantises its rows."""
    lengths = [5, 0, 1, 31]
    qkv = randn(sum(lengths), 3 * 2 * 16, dtype=dtype, device=device)
    if holes:
        mask = torch.rand(3, 20) < 0.7
        mask[:, 0] = True
        batch = packing.unpad(mask.long().to(device))
        packing.find_holes(batch)
        qkv = randn(batch.n_tokens, 3 * 2 * 16, dtype=dtype, device=device)
    else:
        batch = packing.from_cu_seqlens(cu_seqlens_of(lengths), sum(lengths), device)
    q = P.windowed_attention(qkv, batch, 2, 4, precision, policy=TRITON)
    poisoned.check()
    out = ops.varlen_attention(qkv, batch, 2, window=4, policy=TRITON)
    assert_same(q, Q.quantize(out, precision, 16))
    twin = P.windowed_attention(qkv, batch, 2, 4, precision, policy=TORCH)
    assert rms_error(Q.dequantize(twin), Q.dequantize(q)) < 0.02


def calls(device: torch.device) -> dict[str, Any]:
    """Name -> (function of tensors, its tensors)."""
    x, weight, bias = operands(8, 64, 48, "int8", device)
    rows, norm = randn(8, 64, device=device), torch.randn(64, device=device)
    batch = packing.from_cu_seqlens(cu_seqlens_of([3, 5]), 8, device)
    ops.prepare_attention(batch, torch.float32, 32, TRITON)

    def gated(data: Tensor, scale: Tensor, w_data: Tensor, w_scale: Tensor, bias: Tensor) -> Any:
        x, weight = Q.Quantized(data, scale, 64), Q.Quantized(w_data, w_scale, 64)
        return P.gated_linear(x, weight, bias, "silu", policy=TRITON)[:2]

    def sums(x: Tensor, norm: Tensor) -> Any:
        total, q = P.add_layer_norm(x, x, norm, None, 1e-5, "int8", policy=TRITON)
        return total, *q[:2]

    return {
        "gated": (gated, (*x[:2], *weight[:2], bias)),
        "sums": (sums, (rows, norm)),
        "rows": (lambda x: P.rows(x, "int8", rotated=True, policy=TRITON)[:2], (rows,)),
        "window": (
            lambda qkv: P.windowed_attention(qkv, batch, 2, 2, "fp8", policy=TRITON)[:2],
            (torch.cat([rows, rows, rows], 1),),
        ),
    }


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("name", ["gated", "rows", "sums", "window"])
def test_compile_and_opcheck(name: str, device: torch.device) -> None:
    """Catches a graph break, or a schema or fake implementation that contradicts the kernel."""
    function, tensors = calls(device)[name]
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for ours, expected in zip(*(f(*tensors) for f in (compiled, function)), strict=True):
            assert torch.equal(ours.float(), expected.float())
    for op, args in operations_called(function, tensors):
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))
