"""The C++ kernels for CPUs are right in each instruction set that this processor has."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from fastbert.ops import Policy, attention, pool, varlen_attention
from fastbert.ops.packing import from_cu_seqlens
from fastbert_kernels import cpu
from helpers import (
    assert_as_accurate,
    cu_seqlens_of,
    docstrings,
    guarded,
    minilm_folder,
    source_env,
)

CPU = torch.device("cpu")
LENGTHS = ([1], [2, 1, 0, 3, 5, 7], [16, 17, 15, 33], [130, 6, 12], [193, 400], [5] * 40)
ACTIVATED = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")
@pytest.mark.skipif(not os.path.exists("/proc/cpuinfo"), reason="no Linux")
def test_kernels_were_compiled():
    """Catches kernels that no longer compile, unnoticed because PyTorch takes their place without a word."""
    if not cpu.library.processor_flags() >= cpu.VARIANTS["avx2"][1]:
        pytest.skip("the processor has no AVX2")
    assert cpu.obstacle() is None, "python setup.py build_ext --inplace compiles them"


def exact_attention(qkv, batch, num_heads, scale=None):
    return varlen_attention(qkv.double(), batch, num_heads, scale=scale, policy=Policy("torch"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("num_heads", "head_size"), [(3, 16), (12, 32), (2, 48), (2, 64), (1, 80), (1, 128)])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_attention_is_as_accurate_as_eager(lengths, num_heads, head_size, dtype, variant, outputs):
    """Catches keys of a neighbour, of another head or beyond the end, a query left out, or sums that lose bits."""
    torch.manual_seed(0)
    qkv = torch.randn(sum(lengths), 3 * num_heads * head_size).to(dtype)
    batch = from_cu_seqlens(cu_seqlens_of(lengths), sum(lengths), CPU)
    exact = exact_attention(qkv, batch, num_heads)
    eager = varlen_attention(qkv, batch, num_heads, policy=Policy("torch"))
    ours = varlen_attention(guarded(qkv, extra_columns=8), batch, num_heads, policy=Policy("cpu"))
    assert_as_accurate("attention", ours, eager, exact)
    outputs.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_of_a_very_long_text(dtype, variant):
    """Catches an error that grows with the number of keys, or queries in the wrong chunk."""
    torch.manual_seed(0)
    qkv = torch.randn(3000, 3 * 32).to(dtype)
    batch = from_cu_seqlens(cu_seqlens_of([3000]), 3000, CPU)
    eager = varlen_attention(qkv, batch, 1, policy=Policy("torch"))
    ours = varlen_attention(qkv, batch, 1, policy=Policy("cpu"))
    assert_as_accurate("attention", ours, eager, exact_attention(qkv, batch, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [0.0, -0.5, 30.0])
def test_attention_of_any_scale(scale, dtype, variant):
    """Catches a softmax that overflows, or that takes the least score for the largest where the scale is negative."""
    torch.manual_seed(0)
    qkv = (3 * torch.randn(50, 3 * 32)).to(dtype)
    batch = from_cu_seqlens(cu_seqlens_of([20, 30]), 50, CPU)
    eager = varlen_attention(qkv, batch, 2, scale=scale, policy=Policy("torch"))
    ours = varlen_attention(qkv, batch, 2, scale=scale, policy=Policy("cpu"))
    assert_as_accurate("attention", ours, eager, exact_attention(qkv, batch, 2, scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_stays_in_its_sequence(dtype, variant):
    """Catches a NaN that is lost in the softmax, or that reaches a neighbour."""
    qkv = torch.randn(40, 3 * 32).to(dtype)
    qkv[3, 40] = float("nan")  # in a key of the first sequence
    batch = from_cu_seqlens(cu_seqlens_of([18, 22]), 40, CPU)
    out = varlen_attention(qkv, batch, 1, policy=Policy("cpu"))
    assert out[:18].isnan().all() and out[18:].isfinite().all()


def test_rows_beyond_the_last_sequence_are_zero(variant, outputs):
    """Catches old memory left in rows that fill a batch up."""
    out = cpu.varlen_attention_forward(torch.randn(9, 3 * 16), cu_seqlens_of([2, 4]), 1, 0.25)
    assert torch.equal(out[6:], torch.zeros(3, 16)) and out[:6].isfinite().all()


@pytest.mark.parametrize("offsets", [[0, 9, 4], [1, 4], [0, 99], [0, 5, 2, 8]])
def test_offsets_outside_of_the_rows(offsets, variant):
    """Catches reads of memory that is not the tensor's."""
    with pytest.raises(ValueError, match="cu_seqlens: expected offsets from 0 to 8"):
        cpu.varlen_attention_forward(torch.randn(8, 3 * 16), torch.tensor(offsets, dtype=torch.int32), 1, 0.25)


@pytest.mark.parametrize("activation", list(cpu.ACTIVATIONS))
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(
    ("n_rows", "k", "n_cols"), [(1, 1, 1), (0, 5, 7), (4, 16, 64), (9, 33, 131), (70, 384, 96), (25, 3072, 80)]
)
def test_linear_is_as_accurate_as_eager(n_rows, k, n_cols, with_residual, activation, variant, outputs):
    """Catches a wrong edge of a tile, a column of the padding, one chain of sums over K, or a wrong polynomial."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(n_rows, k), torch.randn(n_cols, k) / k**0.5, torch.randn(n_cols)
    residual = torch.randn(n_rows, n_cols) if with_residual else None
    exact = ACTIVATED[activation](F.linear(x.double(), weight.double(), bias.double()))
    eager = ACTIVATED[activation](F.linear(x, weight, bias))
    if residual is not None:
        exact, eager = exact + residual.double(), eager + residual
    packed = cpu.pack_weight(guarded(weight, extra_columns=5))
    residual = None if residual is None else guarded(residual, extra_columns=3)
    ours = cpu.linear_forward(guarded(x, extra_columns=7), packed, n_cols, guarded(bias), activation, residual)
    assert_as_accurate(f"{k} {activation}", ours, eager, exact)
    outputs.check() if n_rows else None


@pytest.mark.parametrize(("n_rows", "k", "n_cols"), [(1, 2, 1), (13, 258, 131), (9, 600, 48)])
def test_linear_in_bfloat16_is_rounded_once(n_rows, k, n_cols, variant, outputs):
    """Catches bits of an element's partner in a product, a sum in bfloat16, or columns beyond a row's end."""
    torch.manual_seed(0)
    x, weight = torch.randn(n_rows, k).bfloat16(), torch.randn(n_cols, k).bfloat16()
    exact = x.double() @ weight.double().T
    packed = cpu.pack_weight(guarded(weight, extra_columns=6))
    ours = cpu.linear_forward(guarded(x, extra_columns=6), packed, n_cols, None)
    half_ulp = torch.finfo(torch.bfloat16).eps / 2 * exact.abs()
    assert ((ours.double() - exact).abs() <= half_ulp + 1e-5 * k**0.5).all()
    outputs.check()


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_gelu_over_its_whole_range(activation, variant):
    """Catches a polynomial that leaves its range, a tail that is not 0 or x, or an infinity or a NaN that changes."""
    ends = torch.tensor([-1e30, -200.0, -20.0, 20.0, 200.0, 1e30, float("inf"), float("nan"), 0.0, -0.0])
    x = torch.cat([torch.linspace(-12, 12, 20001), ends])[:, None]
    identity = cpu.pack_weight(torch.ones(1, 1))
    ours = cpu.linear_forward(x, identity, 1, None, activation)
    exact = ACTIVATED[activation](x.double())
    torch.testing.assert_close(ours.double(), exact, rtol=3e-6, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("mode", ["mean", "mean_sqrt_len"])
@pytest.mark.parametrize("width", [1, 7, 48, 100])
def test_pooling_is_as_accurate_as_eager(width, mode, normalize, dtype, variant):
    """Catches rows of a neighbour, lanes beyond the row, a lost tail, or a text without tokens that is not zero."""
    lengths = [1, 0, 5, 33, 900, 2]
    hidden = (1 + torch.randn(sum(lengths), width)).to(dtype)
    options = {"normalize": normalize, "out_dtype": torch.float32}
    offsets = cu_seqlens_of(lengths)
    exact = pool(hidden.double(), offsets, mode, normalize=normalize, policy=Policy("torch"))
    eager = pool(hidden, offsets, mode, policy=Policy("torch"), **options)
    ours = pool(guarded(hidden, extra_columns=5), offsets, mode, policy=Policy("cpu"), **options)
    assert_as_accurate(mode, ours, eager, exact)
    assert ours[1].abs().max() == 0


def test_pooling_of_what_the_kernel_does_not_take():
    """Catches gradients that are lost, or another dtype than was asked for."""
    hidden, offsets = torch.randn(6, 8, requires_grad=True), cu_seqlens_of([2, 4])
    pool(hidden, offsets, policy=Policy("cpu")).sum().backward()
    assert hidden.grad is not None
    assert pool(hidden.detach().bfloat16(), offsets, policy=Policy("cpu")).dtype == torch.bfloat16
    for offsets in ([0, 9], [0, 4, 2], [1, 6]):
        with pytest.raises(ValueError, match="cu_seqlens"):
            cpu.pool_forward(torch.randn(6, 8), torch.tensor(offsets, dtype=torch.int32))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads(threads, variant):
    """Catches bits that depend on the number of threads, or work left undone by fewer of them."""
    torch.manual_seed(0)
    qkv, x = torch.randn(300, 3 * 64), torch.randn(60, 100)
    packed, offsets = cpu.pack_weight(torch.randn(200, 100)), cu_seqlens_of([100, 3, 197])

    def run():
        return cpu.varlen_attention_forward(qkv, offsets, 2, 0.2), cpu.linear_forward(x, packed, 200, None)

    before = torch.get_num_threads()
    expected = run()
    try:
        torch.set_num_threads(threads)
        assert all(map(torch.equal, run(), expected))
    finally:
        torch.set_num_threads(before)


def test_what_the_kernel_does_not_take_runs_elsewhere(monkeypatch):
    """Catches a crash, or numbers of another kernel, for a head size, dtype or machine without one."""
    batch = from_cu_seqlens(cu_seqlens_of([3, 4]), 7, CPU)
    for head_size, dtype in ((24, torch.float32), (32, torch.float16), (32, torch.float64)):
        qkv = torch.randn(7, 3 * head_size).to(dtype)
        assert attention.cpu_obstacle(head_size, qkv) is not None
        ours, plain = (varlen_attention(qkv, batch, 1, policy=Policy(backend)) for backend in ("cpu", "torch"))
        assert torch.equal(ours, plain)
    monkeypatch.setattr(cpu.library, "load", lambda: (None, "planted"))
    qkv = torch.randn(7, 3 * 32)
    ours, plain = (varlen_attention(qkv, batch, 1, policy=Policy(backend)) for backend in ("cpu", "torch"))
    assert torch.equal(ours, plain) and attention.cpu_obstacle(32, qkv) == "planted"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_attention(dtype):
    """Catches gradients that stop at a kernel which autograd knows nothing of."""
    if attention.cpu_obstacle(32, torch.empty(0, dtype=dtype)) is not None:
        pytest.skip(str(cpu.obstacle()))
    torch.manual_seed(0)
    qkv, grad = torch.randn(30, 3 * 64).to(dtype), torch.randn(30, 64).to(dtype)
    batch = from_cu_seqlens(cu_seqlens_of([9, 21]), 30, CPU)
    gradients = {}
    for name, backend, leaf in (("ours", "cpu", qkv), ("eager", "torch", qkv), ("exact", "torch", qkv.double())):
        leaf = leaf.clone().requires_grad_()
        varlen_attention(leaf, batch, 2, policy=Policy(backend)).backward(grad.to(leaf.dtype))
        gradients[name] = leaf.grad
    assert_as_accurate("gradient", gradients["ours"], gradients["eager"], gradients["exact"])


# Each line: the instruction sets that ATen and oneDNN may use, as if the processor had no others.
AVX2_ONLY = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "DNNL_MAX_CPU_ISA": "AVX2"}
PLAIN = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "DNNL_MAX_CPU_ISA": "SSE41"}
ENCODE = """
import json, sys, torch, fastbert
from fastbert_kernels import cpu
folder, texts = sys.argv[1], json.loads(sys.argv[2])
vectors = {}
for dtype in ("auto", "float32", "bfloat16"):
    encoder = fastbert.SentenceEncoder.from_pretrained(folder, dtype=dtype)
    vectors[dtype] = encoder.encode(texts, normalize_embeddings=True).tolist(), str(encoder.dtype)
print(json.dumps([cpu.instructions(), vectors]))
"""


@pytest.mark.parametrize(("allowed", "instructions"), [(AVX2_ONLY, "AVX2"), (PLAIN, None)], ids=["avx2", "neither"])
def test_processors_with_less(allowed, instructions):
    """Catches an illegal instruction, a bfloat16 that nothing can run, or other numbers without AVX-512."""
    texts = docstrings(12)
    command = [sys.executable, "-c", ENCODE, str(minilm_folder()), json.dumps(texts)]
    done = subprocess.run(command, env=source_env(**allowed), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    facts, vectors = json.loads(done.stdout.splitlines()[-1])
    assert facts == (None if cpu.obstacle() is not None else instructions)
    assert vectors["auto"][1] == "torch.float32"
    from fastbert import SentenceEncoder

    expected = torch.from_numpy(SentenceEncoder.from_pretrained(str(minilm_folder()), dtype="float32").encode(texts))
    for dtype, least in (("auto", 0.99999), ("float32", 0.99999), ("bfloat16", 0.999)):
        assert F.cosine_similarity(torch.tensor(vectors[dtype][0]), expected).min() > least
