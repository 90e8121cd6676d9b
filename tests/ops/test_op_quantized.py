"""8-bit operations are right: the rounding, the kernels that quantise, and the linear on 8-bit operands."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

import float8_sums
from fastbert import ops
from fastbert.ops import BackendError, Policy, dispatch, packing
from fastbert.ops import quantized as Q
from fastbert_kernels.gelu import activate
from helpers import assert_as_accurate, cu_seqlens_of, operations_called, rms_error

TRITON, TORCH = Policy("triton", strict=True), Policy("torch")
PRECISIONS = ("fp8", "int8")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LENGTHS = [5, 0, 1, 31]
T = sum(LENGTHS)


def randn(*shape, dtype=torch.float32, device="cpu"):
    """Normal values, with channels that are much larger than the rest, as LayerNorms of BERT give them."""
    x = torch.randn(*shape)
    if len(shape) == 2:
        x[:, 3] *= 20
    return x.to(device, dtype)


def as_steps(data):
    """8-bit values -> integers in the same order, neighbours one apart."""
    if data.dtype == torch.int8:
        return data.int()
    bits = data.view(torch.int8).int()
    return torch.where(bits < 0, -(bits & 0x7F), bits)


def assert_same_8_bit(name, ours, expected):
    """Equal but for ties: float32 sums of 32 terms and an approximate division, both relative 2^-18 at most, move a
    value of up to 127 steps over a boundary in at most 2 * 127 * 2^-18 = 0.1 % of the cases, and by one step."""
    assert ours.data.dtype == expected.data.dtype and ours.data.shape == expected.data.shape and name
    assert ours.group == expected.group
    torch.testing.assert_close(ours.scale, expected.scale, rtol=1e-5, atol=0)
    steps = (as_steps(ours.data) - as_steps(expected.data)).abs()
    assert steps.max() <= 1 if steps.numel() else True, f"{name}: {int(steps.max())} steps off"
    assert (steps > 0).sum() <= max(2, 0.001 * steps.numel()), f"{name}: {int((steps > 0).sum())} of {steps.numel()}"


@triton.jit
def _activate_kernel(x_ptr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    ptrs = x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(ptrs, activate(tl.load(ptrs), ACTIVATION, tl.float8e4nv))


def activated(x, activation):
    """What the kernels' activation gives before its result is rounded to 8 bits, in float32."""
    padded = F.pad(x.flatten(), (0, -x.numel() % 1024))
    _activate_kernel[(padded.numel() // 1024,)](padded, activation, 1024)
    return padded[: x.numel()].view_as(x)


def batch_on(device):
    return packing.from_cu_seqlens(cu_seqlens_of(LENGTHS), T, device)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("k", "group"), [(96, None), (96, 32), (90, 40), (5, 128)])
def test_rounding(k, group, precision):
    """Catches a scale of the wrong group, values beyond the top, or an error of more than half a step."""
    x = randn(7, k)
    x[2] = 0
    x[3] *= 1e-33
    q = Q.quantize(x, precision, group)
    assert q.data.dtype == Q.DTYPES[precision] and q.data.shape == x.shape
    assert q.scale.shape == (7, -(-k // q.group)) and q.precision == precision
    scale = q.scale.repeat_interleave(q.group, 1)[:, :k]
    half_step = scale / 2 if precision == "int8" else torch.maximum(x.abs() * 2**-4, scale * 2**-10)
    assert ((Q.dequantize(q) - x).abs() <= half_step * (1 + 1e-5) + 1e-30).all()
    assert (q.data[2].float() == 0).all() and (q.scale[2] == 0).all()
    top = q.data.float().abs()[[0, 1, 4, 5, 6]]
    assert (top <= Q.TOP[q.data.dtype]).all() and (top == Q.TOP[q.data.dtype]).any(1).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_not_finite_stays_so(precision, value, device):
    """Catches a NaN or an infinity of one channel that 8 bits turn into an ordinary number."""
    x, weight = torch.randn(4, 64, device=device), torch.randn(8, 64, device=device)
    x[1, 7] = value
    ones, zeros = torch.ones(64, device=device), torch.zeros(64, device=device)
    for policy in (TRITON, TORCH):
        _, q = Q.bias_residual_layer_norm(x, None, None, ones, zeros, 1e-5, precision, policy=policy)
        y = Q.linear(q, Q.quantize_weight(weight, precision), None, torch.float32, policy=policy)
        assert not y[1].isfinite().any() and y[[0, 2, 3]].isfinite().all()
        qkv = torch.cat([x, x, x], 1)
        batch = packing.from_cu_seqlens(cu_seqlens_of([1, 1, 2]), 4, device)
        q = Q.varlen_attention(qkv, batch, 2, precision, policy=policy)
        y = Q.linear(q, Q.quantize_weight(weight, precision), None, torch.float32, policy=policy)
        assert not y[1].isfinite().any()


def test_rotation_keeps_products():
    """Catches a rotation whose inverse is not in the weight, or that mixes blocks."""
    x, weight = randn(6, 96).double(), randn(10, 96).double()
    h = Q.hadamard(Q.ROTATION)
    assert torch.equal(h @ h, Q.ROTATION * torch.eye(Q.ROTATION))
    i = torch.arange(32)
    parity = torch.tensor([[bin(int(a & b)).count("1") % 2 for b in i] for a in i])
    assert torch.equal(h, 1.0 - 2 * parity)
    product = Q.rotate(x) @ (Q.rotate(weight) / Q.ROTATION).T
    assert rms_error(product, x @ weight.T) < 1e-6
    in_8_bits = Q.quantize(x, "int8", rotated=True), Q.quantize_weight(weight, "int8", rotated=True)
    assert rms_error(Q.linear(*in_8_bits, None, torch.float32, policy=TORCH), (x @ weight.T).float()) < 0.02


def test_rotation_is_worth_it():
    """Catches rows with one large channel whose other channels int8 leaves with few steps, in spite of the rotation."""
    x = torch.randn(50, 384)
    x[:, 5] *= 60
    plain = rms_error(Q.dequantize(Q.quantize(x, "int8"))[:, 6:], x[:, 6:])
    turned = Q.dequantize(Q.quantize(x, "int8", rotated=True))
    back = Q.rotate(turned) / Q.ROTATION
    assert rms_error(back[:, 32:], x[:, 32:]) < 0.3 * plain


def test_constants_are_those_of_the_kernels():
    """Catches an emulation with another top, rotation or group than the kernels."""
    from fastbert_kernels import quantize, quantized_linear

    assert (quantize.TOP_FLOAT8.value, quantize.TOP_INT8.value) == (Q.TOP[torch.float8_e4m3fn], Q.TOP[torch.int8])
    assert quantize.ROTATION.value == Q.ROTATION and quantize.TINY.value == Q.TINY
    assert quantized_linear.OUT_GROUP == Q.OUT_GROUP


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("h", [32, 96, 384])
def test_layer_norm_quantises_what_it_stores(h, precision, dtype, device, poisoned):
    """Catches 8-bit rows that are not those of the residual beside them, or another residual than in 16 bits."""
    x, residual = (randn(T, h, dtype=dtype, device=device) for _ in range(2))
    bias, weight, ln_bias = (torch.randn(h).to(device, dtype) for _ in range(3))
    for extra in ((bias, residual), (None, None)):
        arguments = x, *extra, weight, ln_bias, 1e-12
        out, q = Q.bias_residual_layer_norm(*arguments, precision, policy=TRITON)
        assert torch.equal(out, ops.bias_residual_layer_norm(*arguments, policy=TRITON))
        assert_same_8_bit("layer_norm", q, Q.quantize(out, precision, rotated=precision == "int8"))
    poisoned.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_embedding_quantises_what_it_stores(precision, dtype, device, poisoned):
    """Catches 8-bit rows of embeddings that differ from the rows beside them, by id, given, or without segments."""
    h = 96
    ids = [torch.randint(0, size, (T,), device=device) for size in (50, 2, 30)]
    tables = [randn(size, h, dtype=dtype, device=device) for size in (50, 2, 30)]
    norm = [torch.randn(h).to(device, dtype) for _ in range(2)]
    embeds = randn(T, h, dtype=dtype, device=device)
    for first, words, token_type_ids in (
        (ids[0], tables[0], ids[1]),
        (None, embeds, ids[1]),
        (ids[0], tables[0], None),
    ):
        segments = None if token_type_ids is None else tables[1]
        arguments = first, token_type_ids, ids[2], words, segments, tables[2], *norm, 1e-12
        out, q = Q.embedding_layer_norm(*arguments, precision, policy=TRITON)
        extra = {"inputs_embeds": embeds} if first is None else {}
        assert torch.equal(out, ops.embedding_layer_norm(*arguments, policy=TRITON, **extra))
        assert_same_8_bit("embedding", q, Q.quantize(out, precision, rotated=precision == "int8"))
    poisoned.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("d", [16, 32, 48, 64])
def test_attention_quantises_what_it_would_store(d, precision, dtype, device, poisoned):
    """Catches a scale of another head or row, and padded columns that enter one."""
    qkv = randn(T, 3 * 2 * d, dtype=dtype, device=device)
    batch = batch_on(device)
    q = Q.varlen_attention(qkv, batch, 2, precision, policy=TRITON)
    poisoned.check()
    out = ops.varlen_attention(qkv, batch, 2, policy=TRITON)
    assert_same_8_bit("attention", q, Q.quantize(out, precision, d))


def operands(n_rows, k, n_cols, group, precision, device):
    x = Q.quantize(randn(n_rows, k, device=device), precision, group)
    weight = Q.quantize_weight(randn(n_cols, k, device=device) / k**0.5, precision)
    return x, weight, torch.randn(n_cols, device=device)


def exact_product(x, weight, bias, activation):
    y = F.linear(Q.dequantize(x).double(), Q.dequantize(weight).double(), bias.double())
    return exact_activation(y, activation)


def exact_activation(y, activation):
    return y if activation == "none" else F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")


SHAPES = [  # T, K, M, group
    (1, 32, 1, None),
    (5, 33, 131, None),
    (130, 320, 64, None),
    (33, 96, 40, 16),
    (33, 96, 40, 24),
    (33, 96, 130, 32),
    (33, 240, 40, 80),
    (20, 192, 129, 64),
    (20, 300, 40, 128),
]


@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("n_rows", "k", "n_cols", "group"), SHAPES)
def test_linear(n_rows, k, n_cols, group, precision, activation, device, poisoned):
    """Catches a scale of the wrong group, row or column, a tail of K that counts twice, or an edge left out."""
    x, weight, bias = operands(n_rows, k, n_cols, group, precision, device)
    expected = exact_product(x, weight, bias, activation)
    for dtype in DTYPES:
        ours = Q.linear(x, weight, bias.to(dtype), dtype, activation, policy=TRITON)
        expected = exact_product(x, weight, bias.to(dtype), activation)
        if precision == "fp8" and float8_sums.are_short(device):
            bound = float8_sums.bound(x, weight, bias.to(dtype), lambda y: exact_activation(y, activation))
            assert rms_error(ours, expected) <= bound + 0.5 * torch.finfo(dtype).eps
        else:
            twin = Q.linear(x, weight, bias.to(dtype), dtype, activation, policy=TORCH)
            assert_as_accurate(f"{n_rows}x{k}x{n_cols}", ours, twin, expected)
    poisoned.check()


@pytest.mark.parametrize("last", [0, 200])
@pytest.mark.parametrize("group", [None, 64])
def test_sums_inside_and_outside(last, group, device, monkeypatch):
    """Catches a scale applied twice or not at all, on GPUs that leave float8 sums to the tensor cores or do not."""
    from fastbert_kernels import launch

    monkeypatch.setattr(launch, "LAST_ARCH_WITH_SHORT_FLOAT8_SUMS", last)
    x, weight, bias = operands(20, 320, 40, group, "fp8", device)
    ours = Q.linear(x, weight, bias, torch.float32, policy=TRITON)
    # On such a GPU the larger error, where sums are inside, is allowed for both ways.
    bound = float8_sums.bound(x, weight, bias) if float8_sums.are_short(device) else 0.0
    assert rms_error(ours, exact_product(x, weight, bias, "none")) <= bound + 1e-6


def test_sums_of_short_float8():
    """Catches an arithmetic of Hopper that is exact, forgets group or scale, or is so coarse that all would pass."""
    x, weight, bias = operands(20, 320, 40, 64, "fp8", torch.device("cpu"))
    exact = Q.dequantize(x).double() @ Q.dequantize(weight).double().T
    errors = [rms_error(float8_sums.summed(x, weight, step), exact) for step in (32, 64)]
    assert 2**-15 < errors[0] <= errors[1] < 2**-10
    assert float8_sums.bound(x, weight, None) == 2 * errors[1]
    lone = Q.quantize(torch.eye(4, 32), "fp8"), Q.quantize_weight(torch.randn(6, 32), "fp8")
    assert rms_error(float8_sums.summed(*lone, 32), Q.dequantize(lone[1])[:, :4].T) < 1e-6
    sums = [
        float8_sums._cut(torch.tensor([1.0, x], dtype=torch.float64)).sum() for x in (2**-13, 2**-13.1, -(2**-13.1))
    ]
    assert sums == [1 + 2**-13, 1.0, 1.0]


def test_int8_sums_are_exact(device):
    """Catches sums that lose bits for the largest products over the K of BERT-large's last linear."""
    x = torch.full((3, 4096), 127, dtype=torch.int8, device=device)
    weight = torch.full((5, 4096), 127, dtype=torch.int8, device=device)
    weight[1] = -127
    weight[2, ::2] = -126
    ones = torch.ones(3, 1, device=device)
    x, weight = Q.Quantized(x, ones, 4096), Q.Quantized(weight, torch.ones(5, 1, device=device), 4096)
    y = Q.linear(x, weight, None, torch.float32, policy=TRITON)
    expected = x.data.double() @ weight.data.double().T
    assert torch.equal(y.double(), expected.float().double())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("n_cols", "activation"), [(40, "gelu"), (128, "none"), (300, "gelu_tanh"), (257, "gelu")])
def test_linear_quantises_what_it_would_store(n_cols, activation, precision, device, poisoned):
    """Catches a scale that counts columns past the end, or lands at another tile's place."""
    x, weight, bias = operands(150, 64, n_cols, None, precision, device)
    q = Q.linear_quantized(x, weight, bias, activation, policy=TRITON)
    poisoned.check()
    assert q.scale.shape == (150, -(-n_cols // 128))
    y = activated(Q.linear(x, weight, bias, torch.float32, policy=TRITON), activation)
    assert_same_8_bit("linear", q, Q.quantize(y, precision, 128))


def test_gelu_before_8_bits(device):
    """Catches a GELU before 8 bits that is off by a thousandth of a step, or by more than 1 % of small values."""
    x = torch.cat([torch.linspace(-20, 20, 40_001), torch.tensor([-float("inf"), -1e30, 1e30])]).to(device)
    out, x = activated(x, "gelu").double(), x.double()
    expected = torch.where(x > 0, x - x * torch.special.log_ndtr(-x).exp(), x * torch.special.log_ndtr(x).exp())
    expected[-3] = 0.0
    error = (out - expected).abs()
    assert (error[:-1] < 9e-7 + 1.2e-7 * expected[:-1].abs()).all() and out[-1] == x[-1]
    small = (x < 0) & (x > -4.7)
    assert (error[small] < 0.01 * expected[small].abs()).all()
    assert activated(torch.tensor([float("nan")], device=device), "gelu").isnan().all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_tokens(precision, device):
    """Catches a launch without programs."""
    x, weight, bias = operands(0, 64, 40, None, precision, device)
    empty = torch.empty(0, 64, device=device)
    norm = torch.ones(64, device=device)
    batch = packing.from_cu_seqlens(cu_seqlens_of([0, 0]), 0, device)
    for policy in (TRITON, TORCH):
        assert Q.linear(x, weight, bias, torch.bfloat16, policy=policy).shape == (0, 40)
        assert Q.linear_quantized(x, weight, bias, "gelu", policy=policy).scale.shape == (0, 1)
        assert (
            Q.bias_residual_layer_norm(empty, None, empty, norm, norm, 1e-5, precision, policy=policy)[0].shape[0] == 0
        )
        qkv = torch.empty(0, 192, device=device)
        assert Q.varlen_attention(qkv, batch, 2, precision, policy=policy).scale.shape == (0, 2)


def test_tokens_do_not_make_kernels():
    """Catches a token count in a block size or a specialisation, so that a new length compiles while serving."""
    from fastbert_kernels import launch
    from fastbert_kernels.quantized_linear import quantized_linear_forward

    seen = []
    for n in (1, 16, 17, 4096):
        x, scale = torch.empty(n, 64, dtype=torch.int8, device="meta"), torch.empty(n, 1, device="meta")
        weight, column = torch.empty(64, 64, dtype=torch.int8, device="meta"), torch.empty(64, device="meta")
        with launch.recording(90) as launches:
            quantized_linear_forward(x, scale, 64, weight, column, None, "none", torch.bfloat16)
        sizes = {k: v for k, v in launches[0].arguments.items() if isinstance(v, int | str) and k != "n_rows"}
        seen.append({**launches[0].config, **sizes})
    assert all(entry == seen[0] for entry in seen)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w: (x, w._replace(data=w.data[:, :32]), None), "weight.scale|x, weight"),
        (lambda x, w: (x._replace(group=32), w, None), "x.scale: expected"),
        (lambda x, w: (x._replace(data=x.data.float()), w, None), "x: expected .* got .* in torch.float32"),
        (lambda x, w: (x._replace(scale=x.scale.double()), w, None), "x.scale: expected"),
        (lambda x, w: (x, w, torch.ones(3)), "bias: expected shape"),
        (lambda x, w: (x, Q.quantize(torch.ones(40, 64), "fp8"), None), "of one dtype"),
    ],
)
def test_what_does_not_fit_raises(change, message):
    """Catches operands that do not fit, or are of two precisions, and are read past their end."""
    x, weight = Q.quantize(torch.randn(5, 64), "int8"), Q.quantize(torch.randn(40, 64), "int8")
    x, weight, bias = change(x, weight)
    with pytest.raises(ValueError, match=message):
        Q.linear(x, weight, bias, torch.float32, policy=TRITON)


def test_bad_arguments_raise():
    """Catches an unknown precision, rows that cannot be rotated, or shapes that do not fit, that are accepted."""
    x, one = torch.randn(4, 48), torch.ones(48)
    with pytest.raises(ValueError, match="precision: expected one of 'fp8', 'int8' or None, got 'fp4'"):
        Q.bias_residual_layer_norm(x, None, None, one, one, 1e-5, "fp4")
    with pytest.raises(ValueError, match="hidden size: expected a multiple of 32 for int8, got 48"):
        Q.bias_residual_layer_norm(x, None, None, one, one, 1e-5, "int8")
    with pytest.raises(ValueError, match="qkv: expected shape"):
        Q.varlen_attention(torch.randn(3, 96), batch_on("cpu"), 2, "fp8")


def test_no_gradient():
    """Catches a result without a gradient where one was asked for."""
    x, one = torch.randn(4, 64, requires_grad=True), torch.ones(64)
    with pytest.raises(RuntimeError, match="layer_norm: int8 is for inference and has no gradient"):
        Q.bias_residual_layer_norm(x, None, None, one, one, 1e-5, "int8")
    with torch.no_grad():
        assert Q.bias_residual_layer_norm(x, None, None, one, one, 1e-5, "int8")[0].shape == x.shape


def test_devices():
    """Catches fp8 on a GPU that cannot multiply it, or a reason that does not name what is needed."""
    cuda = torch.device("cuda")
    assert Q.device_obstacle("fp8", cuda, 86) == "fp8 needs compute capability 8.9, and this GPU has 8.6"
    assert Q.device_obstacle("int8", cuda, 75) == "int8 needs compute capability 8.0, and this GPU has 7.5"
    assert Q.device_obstacle("fp8", cuda, 89) is None and Q.device_obstacle("int8", cuda, 80) is None
    assert Q.device_obstacle("fp8", torch.device("cpu")) is None


def test_strict(monkeypatch):
    """Catches a strict backend without kernels that runs the emulation in silence."""
    x, weight = Q.quantize(torch.randn(5, 64), "fp8"), Q.quantize(torch.randn(40, 64), "fp8")
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    with pytest.raises(BackendError, match="linear in fp8: .*strict=True"):
        Q.linear(x, weight, None, torch.float32, policy=TRITON)
    monkeypatch.setattr(dispatch, "interpreting", lambda: True)
    with pytest.raises(BackendError, match="no Triton kernel for 'relu'"):
        Q.linear(x, weight, None, torch.float32, "relu", policy=TRITON)


def calls(device):
    """Name -> (function of tensors, its tensors)."""
    h, batch = 64, batch_on(device)
    x, norm = randn(T, h, device=device), torch.randn(h, device=device)
    ids = [torch.randint(0, size, (T,), device=device) for size in (50, 2, 30)]
    tables = [randn(size, h, device=device) for size in (50, 2, 30)]
    q, weight, bias = operands(T, h, 48, None, "int8", device)
    tensors = *q[:2], *weight[:2], bias
    ops.prepare_attention(batch, torch.float32, 32, TRITON)

    def linear(data, scale, w_data, w_scale, bias):
        x, weight = Q.Quantized(data, scale, h), Q.Quantized(w_data, w_scale, h)
        return Q.linear(x, weight, bias, torch.bfloat16, "gelu", policy=TRITON)

    def linear_quantized(data, scale, w_data, w_scale, bias):
        x, weight = Q.Quantized(data, scale, h), Q.Quantized(w_data, w_scale, h)
        return Q.linear_quantized(x, weight, bias, "gelu", policy=TRITON)[:2]

    def layer_norm(x, norm):
        out, q = Q.bias_residual_layer_norm(x, norm, x, norm, norm, 1e-5, "int8", policy=TRITON)
        return out, *q[:2]

    def embedding(i, t, p, a, b, c, norm):
        out, q = Q.embedding_layer_norm(i, t, p, a, b, c, norm, norm, 1e-5, "fp8", policy=TRITON)
        return out, *q[:2]

    return {
        "linear": (linear, tensors),
        "linear_quantized": (linear_quantized, tensors),
        "layer_norm": (layer_norm, (x, norm)),
        "embedding": (embedding, (*ids, *tables, norm)),
        "attention": (
            lambda qkv: Q.varlen_attention(qkv, batch, 2, "fp8", policy=TRITON)[:2],
            (torch.cat([x, x, x], 1),),
        ),
    }


@pytest.mark.parametrize("name", sorted(calls(torch.device("cpu"))))
def test_compile(name, device):
    """Catches a graph break, or a fake implementation that contradicts the kernel."""
    function, tensors = calls(device)[name]
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for ours, expected in zip(*(f(*tensors) for f in (compiled, function)), strict=True):
            assert torch.equal(ours.float(), expected.float())


@pytest.mark.parametrize("name", sorted(calls(torch.device("cpu"))))
def test_opcheck(name, device):
    """Catches a schema or a fake implementation that breaks PyTorch's rules for operators."""
    function, tensors = calls(device)[name]
    for op, args in operations_called(function, tensors):
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))
