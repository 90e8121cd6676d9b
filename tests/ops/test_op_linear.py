"""Linear layers are right with each epilogue, and so is linear + residual + LayerNorm."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from fastbert import ops, reference
from fastbert.ops import BackendError, Policy
from fastbert.ops.linear import gemm_kernel
from helpers import assert_as_accurate, guarded, rms_error, source_env

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRITON = Policy("triton", strict=True)
ACTIVATIONS = {"none": None, "gelu": "gelu", "gelu_tanh": "gelu_tanh", "relu": "relu"}


def eager_linear(x, weight, bias, activation):
    y = F.linear(x, weight, bias)
    if activation == "relu":
        return F.relu(y)
    return y if activation == "none" else F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")


def inputs(n_rows, k, n_cols, dtype, device):
    return [t.to(device, dtype) for t in (torch.randn(n_rows, k), torch.randn(n_cols, k) / k**0.5, torch.randn(n_cols))]


def check(name, tensors, activation, ours):
    expected = reference.linear(*(None if t is None else t.double() for t in tensors), ACTIVATIONS[activation])
    assert_as_accurate(name, ours, eager_linear(*tensors, activation), expected)


@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n_rows", "k", "n_cols"), [(1, 16, 1), (5, 33, 131), (130, 96, 64), (129, 320, 257)])
def test_kernel(n_rows, k, n_cols, dtype, activation, device, poisoned):
    """Catches an edge of a tile left out, a tail of K read past the row, or an epilogue of the wrong column."""
    x, weight, bias = inputs(n_rows, k, n_cols, dtype, device)
    guards = guarded(x, extra_columns=7), guarded(weight, extra_columns=5), guarded(bias)
    check(f"{n_rows}x{k}x{n_cols}", (x, weight, bias), activation, torch.ops.fastbert.linear(*guards, activation))
    poisoned.check()


def test_kernel_without_bias(device, poisoned):
    """Catches a bias that is read though absent."""
    x, weight, _ = inputs(20, 64, 40, torch.bfloat16, device)
    check("no bias", (x, weight, None), "gelu", torch.ops.fastbert.linear(x, weight, None, "gelu"))
    poisoned.check()


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n_rows", "k", "n_cols"), [(1, 16, 1), (129, 40, 131)])
def test_kernel_with_residual(n_rows, k, n_cols, dtype, with_bias, device, poisoned):
    """Catches a residual left out, rounded on the way, read past its edge, or of another row."""
    x, weight, bias = inputs(n_rows, k, n_cols, dtype, device)
    bias = bias if with_bias else None
    residual = torch.randn(n_rows, n_cols).to(device, dtype)
    operands = (x, weight, bias, residual)
    inside = [None if t is None else guarded(t, extra_columns=3) for t in operands]
    ours = torch.ops.fastbert.linear(inside[0], inside[1], inside[2], "none", inside[3])
    d = [None if t is None else t.double() for t in operands]
    expected = reference.linear(d[0], d[1], d[2], None) + d[3]
    assert_as_accurate("residual", ours, F.linear(x, weight, bias) + residual, expected)
    poisoned.check()


@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n_rows", "k", "n_cols"), [(1, 32, 48), (140, 96, 136), (33, 50, 67)])
def test_kernel_stores_the_pre_activation(n_rows, k, n_cols, dtype, activation, device, poisoned):
    """Catches a pre-activation without bias, after the activation or left out at an edge; or another result with it."""
    from fastbert_kernels import launch
    from fastbert_kernels.linear import linear_forward

    x, weight, bias = inputs(n_rows, k, n_cols, dtype, device)
    pre = launch.empty((n_rows, n_cols), like=x)
    for b in (bias, None):
        out = linear_forward(x, weight, b, activation, pre=pre)
        check("pre", (x, weight, b), "none", pre)
        assert torch.equal(out, linear_forward(x, weight, b, activation))
    poisoned.check()


def test_one_compiled_kernel_for_all_shapes():
    """Catches a size of a weight that is compiled in, so that every linear compiles a kernel of its own."""
    from fastbert_kernels import launch
    from fastbert_kernels.linear import linear_forward

    seen = []
    for k, n_cols in ((768, 768), (3072, 768), (384, 1536)):
        for n_rows in (1, 16, 100):
            with launch.recording(80) as launches:
                linear_forward(torch.empty(n_rows, k), torch.empty(n_cols, k), torch.empty(n_cols), "gelu")
            (launched,) = launches
            run_time = {name for name, value in launched.arguments.items() if type(value) is int}
            assert run_time == {"n_rows", "n_cols", "k_size", "x_row_stride", "weight_row_stride",
                                "residual_row_stride", "out_row_stride"}  # fmt: skip
            constants = {n: v for n, v in launched.arguments.items() if isinstance(v, bool | str)}
            divisible = {n: launched.arguments[n] % 16 == 0 for n in run_time - {"n_rows"}}
            seen.append((launched.kernel, launched.config, constants, divisible))
    assert all(entry == seen[0] for entry in seen)


@pytest.fixture
def table(tmp_path, monkeypatch, request, device):
    """Writes a table for the architecture of the tests' device, in the place of the one that ships."""
    from fastbert_kernels import launch, tables

    arch = launch.arch(device)
    shipped = tables.shipped_table(arch)[1]

    def write(gemm, **ops):
        changed = {**shipped, "arch": arch, "device": "Test GPU", "date": "2026-01-02", "gemm": gemm}
        for op, entries in ops.items():
            changed[op] = {**changed.get(op, {}), **entries}
        (tmp_path / f"sm_{arch}.json").write_text(json.dumps(changed))
        monkeypatch.setattr(tables, "TABLE_FOLDER", tmp_path)
        monkeypatch.setattr(tables, "gpus", list)
        tables.forget()

    yield write
    monkeypatch.undo()
    tables.forget()


def launched(monkeypatch, call):
    from fastbert_kernels import launch

    names, run = [], launch.run
    with monkeypatch.context() as patched:
        patched.setattr(
            launch, "run", lambda kernel, *args, **kw: names.append(kernel.fn.__name__) or run(kernel, *args, **kw)
        )
        return names, call()


def our_gemm(dtype, shape, epilogue, device):
    """The name of the kernel that this architecture takes for four rows where the choice is ours."""
    from fastbert_kernels import configs, few_rows, launch

    arch = launch.arch(device)
    few = few_rows.tile(dtype, arch, shape, epilogue, 4) is not None
    return f"_{'linear' if few else configs.gemm(dtype, arch, shape, epilogue).ours}_kernel"


def test_table_chooses_the_gemm(table, device, monkeypatch):
    """Catches a choice of the table that does not reach the op, or reaches another shape, dtype or epilogue."""
    from fastbert_kernels import launch

    tile = {"BLOCK_ROWS": 32, "BLOCK_COLS": 16, "BLOCK_K": 16, "GROUP_ROWS": 8, "num_warps": 4, "num_stages": 2}
    table(
        {
            "float16/32x16/none": {"kernel": "linear"},
            "float16/32x16/gelu": {"kernel": "cublas"},
            "float16/32x16/residual": {"kernel": "linear"},
            "float32/32x16/gelu": {"kernel": "linear"},
        },
        linear={"float16/32x16/none": tile},
    )
    arch = launch.arch(device)
    cublas, ours = False, True
    for dtype, activation, k, choice in (
        (torch.bfloat16, "none", 32, ours),
        (torch.bfloat16, "none", 48, cublas),
        (torch.bfloat16, "gelu", 32, cublas),
        (torch.float16, "gelu_tanh", 32, cublas),
        (torch.bfloat16, "gelu", 48, ours),
        (torch.float32, "none", 32, cublas),
        (torch.float32, "gelu", 32, ours),
    ):
        tensors = inputs(4, k, 16, dtype, device)
        kernels = [] if activation == "none" else ["_bias_gelu_kernel"]
        if choice is ours:
            kernels = [our_gemm(dtype, (k, 16), activation, device)]
        names, out = launched(monkeypatch, lambda t=tensors, a=activation: ops.linear(*t, a, policy=TRITON))
        assert names == kernels, (dtype, activation, k)
        check("chosen", tensors, activation, out)
    which, why = gemm_kernel(torch.bfloat16, "none", (32, 16), arch=arch)
    assert which == "fastbert" and "measured on Test GPU, 2026-01-02" in why
    x, weight, bias = inputs(4, 32, 16, torch.bfloat16, device)
    norm = torch.ones(16, dtype=x.dtype, device=device)
    residual = torch.randn(4, 16).to(x)
    names, out = launched(
        monkeypatch,
        lambda: ops.linear_residual_layer_norm(x, weight, bias, residual, norm, norm, 1e-5, policy=TRITON),
    )
    assert names == [our_gemm(x.dtype, (32, 16), "residual", device), "_bias_residual_layer_norm_kernel"]
    d = [t.double() for t in (x, weight, bias, residual, norm)]
    expected = reference.bias_residual_layer_norm(d[0] @ d[1].T, d[2], d[3], d[4], d[4], 1e-5)
    eager = F.layer_norm(F.linear(x, weight, bias) + residual, (16,), norm, norm, 1e-5)
    assert_as_accurate("residual through the GEMM", out, eager, expected)


def test_remembered_choice_follows_the_table(table, device, monkeypatch):
    """Catches a choice remembered for a GPU that outlasts the table it came from."""
    from fastbert.ops import dispatch
    from fastbert_kernels import launch

    gpu, arch = torch.device("cuda", 0), launch.arch(device)
    monkeypatch.setattr(dispatch, "triton_obstacle", lambda device: None)
    monkeypatch.setattr(launch, "arch", lambda device: arch)
    module = sys.modules[gemm_kernel.__module__]

    def ours(backend="auto"):
        return module.takes_our_gemm(torch.bfloat16, "none", 32, 16, False, gpu, backend, False, None)

    for kernel in ("linear", "cublas", "linear"):
        table({"float16/32x16/none": {"kernel": kernel}})
        assert ours() is ours() is (kernel == "linear")
        assert not ours("torch") and not ours("cpu")
    module._remembered.cache_clear()


def test_gradients_through_the_residual(table, device):
    """Catches a backward pass that loses the residual's gradient where the GEMM adds it."""
    table({"float32/24x20/residual": {"kernel": "linear"}})
    tensors = [*inputs(6, 24, 20, torch.float32, device), torch.randn(6, 20, device=device)]
    norm = torch.rand(20, device=device)
    grads = []
    for policy in (TRITON, Policy("torch")):
        leaves = [t.clone().requires_grad_() for t in tensors]
        ops.linear_residual_layer_norm(*leaves, norm, norm, 1e-5, policy=policy).pow(3).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*grads, strict=True):
        assert rms_error(ours, theirs) < 1e-5


def test_kernel_visits_every_tile(device, poisoned):
    """Catches a grouped tile order that skips or repeats a tile where the groups do not divide the grid."""
    x, weight, bias = inputs(1300, 16, 300, torch.float16, device)
    check("many tiles", (x, weight, bias), "none", torch.ops.fastbert.linear(x, weight, bias, "none"))
    poisoned.check()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", ["triton", "cpu", "torch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_op(backend, dtype, activation, device):
    """Catches a backend, or a choice of GEMM within one, that loses the bias or the activation."""
    tensors = inputs(9, 48, 30, dtype, device if backend == "triton" else torch.device("cpu"))
    check(backend, tensors, activation, ops.linear(*tensors, activation, policy=Policy(backend)))


def test_gemm_choice(device, monkeypatch):
    """Catches an activation in 16 bits that costs a pass of its own, or fp32 through a kernel without tensor cores."""
    assert gemm_kernel(torch.bfloat16, "gelu")[0] == "fastbert"
    assert gemm_kernel(torch.float32, "gelu")[0] == "cublas"
    assert gemm_kernel(torch.bfloat16, "none")[0] == "cublas"
    from fastbert_kernels import launch

    launched = []
    run = launch.run
    monkeypatch.setattr(
        launch, "run", lambda kernel, *args, **kw: launched.append(kernel.fn.__name__) or run(kernel, *args, **kw)
    )
    for dtype in (torch.bfloat16, torch.float32):
        ops.linear(*inputs(4, 32, 16, dtype, device), "gelu", policy=TRITON)
    assert launched == [our_gemm(torch.bfloat16, (32, 16), "gelu", device), "_bias_gelu_kernel"]


@pytest.mark.parametrize(
    "switch",
    [
        "torch.backends.cuda.matmul.allow_tf32 = True",
        "torch.set_float32_matmul_precision('high')",
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    ],
)
def test_tf32_only_where_allowed(switch):
    """Catches fp32 that is quietly TF32, or a switch of PyTorch's that is not read."""
    if "fp32_precision" in switch and not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("fp32_precision came with PyTorch 2.9")
    script = (
        "import torch; from fastbert_kernels import launch; before = launch.dot_precision(torch.float32); "
        f"{switch}; print(before, launch.dot_precision(torch.float32), launch.dot_precision(torch.bfloat16))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=source_env(), check=True)
    assert done.stdout.split() == ["ieee", "tf32", "ieee"]


@pytest.mark.parametrize("backend", ["triton", "cpu", "torch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_residual_layer_norm(backend, dtype, with_bias, device):
    """Catches a bias added twice, or by neither of the two kernels."""
    device = device if backend == "triton" else torch.device("cpu")
    x, weight, bias = inputs(11, 80, 48, dtype, device)
    bias = bias if with_bias else None
    residual, ln_weight, ln_bias = (torch.randn(s).to(device, dtype) for s in ((11, 48), (48,), (48,)))
    ours = ops.linear_residual_layer_norm(
        x, weight, bias, residual, ln_weight, ln_bias, 1e-12, policy=Policy(backend, strict=True)
    )
    d = [None if t is None else t.double() for t in (x, weight, bias, residual, ln_weight, ln_bias)]
    expected = reference.bias_residual_layer_norm(d[0] @ d[1].T, d[2], d[3], d[4], d[5], 1e-12)
    eager = F.layer_norm(F.linear(x, weight, bias) + residual, (48,), ln_weight, ln_bias, 1e-12)
    assert_as_accurate(backend, ours, eager, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_under_triton(dtype, device):
    """Catches a backward pass that is not the derivative of the forward one, for the input or a parameter."""
    tensors = inputs(6, 24, 20, dtype, device)
    grads = []
    for policy in (TRITON, Policy("torch")):
        leaves = [t.clone().requires_grad_() for t in tensors]
        ops.linear(*leaves, "gelu", policy=policy).float().square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*grads, strict=True):
        assert rms_error(ours, theirs) < 2 * torch.finfo(dtype).eps


def test_wrong_shapes():
    """Catches a wrong shape that reaches a kernel."""
    x, weight, bias = inputs(4, 8, 6, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"x, weight: expected \(T, K\) and \(M, K\), got \(4, 8\) and \(6, 7\)"):
        ops.linear(x, weight[:, :7], bias)
    with pytest.raises(ValueError, match=r"bias: expected shape \(6,\), got \(5,\)"):
        ops.linear(x, weight, bias[:5], "gelu")


def test_strict_refuses_what_has_no_kernel(device):
    """Catches a strict policy that falls back."""
    x, weight, bias = inputs(4, 8, 6, torch.float64, device)
    with pytest.raises(BackendError, match="linear: .*there are no Triton kernels for torch.float64"):
        ops.linear(x, weight, bias, "gelu", policy=TRITON)
