"""The gradients of linear layers, the packing of their weights and what they save are right in the C++ kernels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastbert_kernels import cpu
from helpers import GUARD, Outputs, assert_as_accurate, guarded

SIZES = ((1, 1), (3, 0), (0, 60), (5, 7), (8, 48), (97, 33), (50, 131), (200, 16))
DTYPES = {"float32": (torch.float32, torch.float32), "bfloat16": (torch.bfloat16, torch.bfloat16),
          "bfloat16 to float32": (torch.bfloat16, torch.float32)}  # fmt: skip


class Memory(Outputs):
    """Outputs and scratch full of NaN, between guard bands."""

    def __init__(self):
        super().__init__()
        self.scratches = []

    def scratch(self, n_bytes):
        buffer = torch.full((n_bytes + 2 * GUARD,), 0xFF, dtype=torch.uint8)  # NaN in either dtype
        self.scratches.append(buffer)
        return buffer[GUARD : GUARD + n_bytes]

    def check(self):
        super().check()
        for buffer in self.scratches:
            assert (buffer[:GUARD] == 0xFF).all() and (buffer[-GUARD:] == 0xFF).all(), (
                "a kernel wrote beside its scratch"
            )


@pytest.fixture
def memory(monkeypatch):
    """Everything that the kernels write to is checked by `memory.check()`."""
    buffers = Memory()
    monkeypatch.setattr(cpu.library, "empty", buffers.empty)
    monkeypatch.setattr(cpu.library, "scratch", buffers.scratch)
    return buffers


def operands(n_rows, m_size, k_size, dtype, seed=0):
    torch.manual_seed(seed)
    return torch.randn(n_rows, m_size).to(dtype), torch.randn(n_rows, k_size).to(dtype)


def assert_gradients_as_accurate(gradients, inputs):
    """Compares weights and biases; a float32 result of bfloat16 operands has to be as exact as those of float32."""
    weights, biases = map(torch.stack, zip(*gradients, strict=True))
    grad, x = map(torch.stack, zip(*inputs, strict=True))
    eager = torch.stack([g.to(weights.dtype).T @ x.to(weights.dtype) for g, x in inputs])
    assert_as_accurate("weight", weights, eager, grad.double().mT @ x.double())
    eager_bias = torch.stack([g.float().sum(0) for g, _ in inputs])
    assert_as_accurate("bias", biases, eager_bias, grad.double().sum(1))


def test_dtypes_on_offer(variant):
    """Catches bfloat16 refused where no instruction multiplies pairs of it, or a dtype without kernels on offer."""
    assert [cpu.multiplies(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)] == [True, True, False]


def test_rate_of_bfloat16():
    """Catches a rate measured anew for each model, of the compiler's cleverness, or of no instruction at all."""
    rate = cpu.bfloat16_rate()
    assert rate == cpu.bfloat16_rate()
    assert (rate is None) == ("avx512_bf16" not in cpu.library.processor_flags())
    assert rate is None or 0.1 < rate < 4.0


@pytest.mark.parametrize(("rate", "first"), [(2.0, "avx512_bf16"), (0.5, "avx512_vnni"), (None, "avx512_vnni")])
def test_library_by_the_rate_of_bfloat16(rate, first, monkeypatch):
    """Catches kernels that multiply bfloat16 by an instruction slower than float32's, or leave a fast one unused."""
    if not cpu.library.processor_flags() >= cpu.VARIANTS["avx512_bf16"][1]:
        pytest.skip("the processor has no AVX-512 with bfloat16")
    monkeypatch.setattr(cpu.library, "bfloat16_rate", lambda: rate)
    cpu.library.load.cache_clear()
    try:
        assert cpu.instructions() == cpu.VARIANTS[first][0]
    finally:
        cpu.library.load.cache_clear()


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize(("m_size", "k_size"), SIZES, ids=str)
@pytest.mark.parametrize("n_rows", [0, 1, 2, 3, 17, 1000])
def test_weight_gradient_is_as_accurate_as_eager(n_rows, m_size, k_size, dtypes, variant, memory):
    """Catches a wrong edge of a tile, an odd row of a pair, a piece lost, or one chain of sums over all rows."""
    dtype, out_dtype = DTYPES[dtypes]
    draws = range(20 if m_size * k_size < 100 else 1)  # few numbers have an error by chance
    inputs = [operands(n_rows, m_size, k_size, dtype, seed) for seed in draws]
    gradients = [
        cpu.weight_gradient(guarded(grad, extra_columns=9), guarded(x, extra_columns=3), out_dtype, True)
        for grad, x in inputs
    ]
    assert_gradients_as_accurate(gradients, inputs)
    memory.check()


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize(("n_rows", "m_size", "k_size"), [(9000, 90, 60), (700, 400, 800)])
def test_more_than_one_chunk(n_rows, m_size, k_size, dtypes, variant, memory):
    """Catches a chunk packed over one that is still multiplied, or sums of the bias added twice or not at all."""
    dtype, out_dtype = DTYPES[dtypes]
    grad, x = operands(n_rows, m_size, k_size, dtype)
    assert_gradients_as_accurate([cpu.weight_gradient(grad, x, out_dtype, True)], [(grad, x)])
    memory.check()


def test_a_bias_gradient_only_where_wanted(variant):
    """Catches a weight gradient that depends on whether the bias' is computed, or a bias nobody asked for."""
    grad, x = operands(300, 70, 50, torch.float32)
    both, alone = (cpu.weight_gradient(grad, x, torch.float32, want_bias) for want_bias in (True, False))
    assert torch.equal(both[0], alone[0]) and alone[1] is None


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("threads", [2, 3])
def test_bits_do_not_depend_on_threads(threads, dtypes, variant, number_of_threads):
    """Catches sums whose order follows the tasks of the threads."""
    dtype, out_dtype = DTYPES[dtypes]
    grad, x = operands(1500, 210, 330, dtype)
    torch.set_num_threads(1)
    expected = cpu.weight_gradient(grad, x, out_dtype, True)
    torch.set_num_threads(threads)
    for _ in range(5):
        assert all(map(torch.equal, cpu.weight_gradient(grad, x, out_dtype, True), expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_stays_in_its_row_and_column(dtype, variant):
    """Catches a NaN that is lost, or one that reaches the gradients of other weights."""
    grad, x = operands(200, 60, 70, dtype)
    grad[150, 31], x[3, 52] = float("nan"), float("inf")
    weight, bias = cpu.weight_gradient(grad, x, torch.float32, True)
    expected = torch.zeros(60, 70, dtype=torch.bool)
    expected[31], expected[:, 52] = True, True
    assert torch.equal(~weight.isfinite(), expected)
    assert bias.isnan().nonzero().tolist() == [[31]]


def layout(weight, variant):
    """A weight as the product reads it: [panel of columns][K][column], bfloat16 in pairs along K."""
    columns, together = 16 if variant == "avx2" else 48, 2 if weight.dtype == torch.bfloat16 else 1
    n_columns, k_size = weight.shape
    weight = F.pad(weight, (0, -k_size % together, 0, -n_columns % columns))
    return weight.view(-1, columns, weight.shape[1] // together, together).transpose(1, 2).flatten()


def assert_same_bits(packed, weight, variant):
    expected = layout(weight, variant)
    assert packed.dtype == weight.dtype
    bits = torch.int32 if weight.dtype == torch.float32 else torch.int16
    assert torch.equal(packed[: expected.numel()].view(bits), expected.view(bits))


# (the weight's dtype, that of what is packed)
PACKED = {"float32": (torch.float32, None), "bfloat16": (torch.bfloat16, None),
          "float32 to bfloat16": (torch.float32, torch.bfloat16)}  # fmt: skip
HEIGHTS = ([1], [131], [16, 16, 16], [7, 1, 40], [97, 96, 95])


@pytest.mark.parametrize("dtypes", PACKED)
@pytest.mark.parametrize("k_size", [1, 2, 33, 96])
@pytest.mark.parametrize("heights", HEIGHTS, ids=str)
def test_packed_bytes(heights, k_size, dtypes, variant):
    """Catches a word out of its place, an edge without zeros, a row of another weight, or another rounding."""
    dtype, packed_dtype = PACKED[dtypes]
    weights = [torch.randn(n, k_size).to(dtype) for n in heights]
    weights[0][0, 0], weights[-1][-1, -1] = float("inf"), -0.0
    inputs = [guarded(weight, extra_columns=i + 3) for i, weight in enumerate(weights)]
    whole = torch.cat(weights).to(packed_dtype or dtype)
    assert_same_bits(cpu.pack_weights(inputs, packed_dtype), whole, variant)
    assert_same_bits(cpu.pack_weights(inputs, packed_dtype, transposed=True), whole.T, variant)
    if len(weights) == 1:
        assert_same_bits(cpu.pack_weight(inputs[0], packed_dtype), whole, variant)
        assert_same_bits(cpu.pack_transposed(inputs[0].T.contiguous().T, packed_dtype), whole.T, variant)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heights", [[96], [50], [20, 30, 14]], ids=str)
def test_gradient_of_the_input(heights, dtype, variant, memory):
    """Catches a transposed weight packed for another product than grad @ weight."""
    weights = [(torch.randn(n, 77) / n**0.5).to(dtype) for n in heights]
    grad, whole = torch.randn(30, sum(heights)).to(dtype), torch.cat(weights)
    packed = cpu.pack_weights(weights, transposed=True)
    ours = cpu.linear_forward(guarded(grad, extra_columns=5), packed, 77, None)
    assert_as_accurate("input", ours, grad @ whole, grad.double() @ whole.double())
    memory.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", list(cpu.ACTIVATIONS))
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(("n_rows", "n_cols"), [(0, 3), (1, 1), (13, 131), (40, 96)])
def test_saved_input_of_the_activation(n_rows, n_cols, with_residual, activation, dtype, variant, memory):
    """Catches an output that depends on what is saved, or something else saved than goes into the activation."""
    x, weight, bias, residual = (
        torch.randn(*shape).to(dtype) for shape in ((n_rows, 150), (n_cols, 150), (n_cols,), (n_rows, n_cols))
    )
    packed, residual = cpu.pack_weight(weight), residual if with_residual else None
    wide = memory.empty((n_rows, n_cols + 5), like=x)
    pre = wide[:, :n_cols]
    ours = cpu.linear_forward(x, packed, n_cols, bias, activation, residual, pre)
    assert torch.equal(ours, cpu.linear_forward(x, packed, n_cols, bias, activation, residual))
    assert torch.equal(pre, cpu.linear_forward(x, packed, n_cols, bias))
    assert wide[:, n_cols:].isnan().all(), "something was written beside the rows"
    wide[:, n_cols:] = 0
    memory.check()
