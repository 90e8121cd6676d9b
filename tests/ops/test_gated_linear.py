"""A product with its gate in one kernel is right, and is taken where it should be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import ops
from fastbert.ops import BackendError, Policy, recording
from fastbert_kernels import configs, few_rows, gated_linear, launch
from fastbert_kernels.gated_linear_persistent import gated_linear_persistent_forward
from helpers import assert_as_accurate, guarded
from model_cases import randn

TILE = {"BLOCK_ROWS": 32, "BLOCK_COLS": 32, "BLOCK_K": 32, "GROUP_ROWS": 2, "num_warps": 4, "num_stages": 2}
APART = {**TILE, "FLATTEN": 0, "PROGRAMS": 2}
TRITON = Policy("triton", strict=True)
INVARIANT = Policy("triton", batch_invariant=True)
GATES: dict[str, Any] = {
    "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu, "silu": F.silu
}  # fmt: skip
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def inputs(n_rows: int, k: int, inner: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """x (T, K), weight (2 I, K) and bias (2 I,), of which the halves differ in size."""
    x, weight, bias = randn(n_rows, k, seed=1), randn(2 * inner, k, seed=2) / k**0.5, randn(2 * inner, seed=3)
    weight[inner:] *= 2
    return x.to(device, dtype), weight.to(device, dtype), bias.to(device, dtype)


def in_torch(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    first, second = F.linear(x, weight, bias).chunk(2, -1)
    out: Tensor = GATES[activation](first) * second
    return out


def check(name: str, ours: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> None:
    exact = in_torch(x.double(), weight.double(), None if bias is None else bias.double(), activation)
    assert_as_accurate(name, ours, in_torch(x, weight, bias, activation), exact)


def needs_descriptors(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("tensor descriptors need compute capability 9.0")


@pytest.mark.parametrize("activation", GATES)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize(("n_rows", "k", "inner"), [(1, 16, 50), (33, 39, 37)])
def test_by_pointers(
    n_rows: int, k: int, inner: int, dtype: torch.dtype, activation: str, device: torch.device, poisoned: Any
) -> None:
    """Catches halves in each other's place, a bias of the other half, an edge of a tile or a tail of K left out."""
    x, weight, bias = inputs(n_rows, k, inner, dtype, device)
    for added in (bias, None):
        out = launch.empty((n_rows, inner), like=x)
        inside = guarded(x, extra_columns=3), guarded(weight, extra_columns=5), None if added is None else guarded(bias)
        gated_linear.gated_linear_pointer_forward(*inside, activation, TILE, out)
        check(activation, out, x, weight, added, activation)
    poisoned.check()


@pytest.mark.parametrize(("activation", "tile"), [("gelu", TILE), ("silu", TILE), ("gelu_tanh", APART)])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize(("n_rows", "k", "inner"), [(1, 16, 48), (70, 40, 56)])
def test_on_descriptors(
    n_rows: int, k: int, inner: int, dtype: torch.dtype, activation: str, tile: dict[str, int], device: torch.device,
    poisoned: Any,
) -> None:  # fmt: skip
    """Catches a descriptor of another shape or stride, or of one half that is read into the other."""
    needs_descriptors(device)
    x, weight, bias = inputs(n_rows, k, inner, dtype, device)
    for added in (bias, None):
        inside = guarded(x, extra_columns=8), guarded(weight, extra_columns=8), None if added is None else guarded(bias)
        out = launch.empty((n_rows, inner), like=x)
        gated_linear_persistent_forward(*inside, activation, tile, out)
        check(activation, out, x, weight, added, activation)
    poisoned.check()


@pytest.mark.gpu
@pytest.mark.parametrize("persistent", [False, True])
def test_compiled(persistent: bool) -> None:
    """Catches wrong numbers of the compiled kernels, whose pipelines and copies the interpreter does not see."""
    device = torch.device("cuda")
    if persistent:
        needs_descriptors(device)
    arch = launch.arch(device)
    for n_rows, k, inner in ((1, 768, 1152), (5000, 768, 1152), (3001, 1032, 1016)):
        x, weight, bias = inputs(n_rows, k, inner, BF16, device)
        out = torch.full((n_rows, inner), float("nan"), dtype=BF16, device=device)
        shape = k, 2 * inner
        if persistent:
            config = configs.linear_persistent_config(BF16, arch, shape, "gated")
            assert config is not None
            gated_linear_persistent_forward(x, weight, bias, "gelu", config.block_sizes, out)
        else:
            tile = configs.linear_config(BF16, arch, shape, "gated").block_sizes
            gated_linear.gated_linear_pointer_forward(x, weight, bias, "gelu", tile, out)
        check(f"{n_rows} rows", out, x, weight, bias, "gelu")


def launched(monkeypatch: pytest.MonkeyPatch, call: Any, arch: int = 90) -> tuple[list[tuple[str, Any]], Tensor]:
    """The kernels that a call launches as on an architecture, with their tiles, and its output."""
    names: list[tuple[str, Any]] = []
    run = launch.run

    def noted(kernel: Any, grid: Any, config: Any, **arguments: Any) -> None:
        names.append((kernel.fn.__name__, config))
        run(kernel, grid, config, **arguments)

    with monkeypatch.context() as patch:
        patch.setattr(launch, "arch", lambda device: arch)
        patch.setattr("fastbert.ops.dispatch.arch_of", lambda device: arch)
        patch.setattr(launch, "run", noted)
        return names, call()


def test_where_it_is_taken(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a descriptor of rows that are not aligned, on a GPU that has none, or in float32; or a wrong result."""
    x, weight, bias = inputs(600, 32, 40, BF16, device)
    wide = torch.zeros(80, 35, dtype=BF16, device=device)[:, :32].copy_(weight)
    odd = inputs(600, 32, 36, BF16, device)  # rows of the result are 72 bytes
    persistent, pointers = "_gated_linear_persistent_kernel", "_gated_linear_kernel"
    for name, arch, operands, expected in (
        ("sm_90", 90, (x, weight, bias), persistent), ("sm_100", 100, (x, weight, bias), persistent),
        ("sm_80", 80, (x, weight, bias), pointers), ("unaligned weight", 90, (x, wide, bias), pointers),
        ("unaligned result", 90, odd, pointers), ("copied rows", 90, (guarded(x, 3), weight, bias), persistent),
        ("float32", 90, tuple(t.float() for t in (x, weight, bias)), pointers),
    ):  # fmt: skip
        if device.type == "cuda":
            arch = launch.arch(device)
        if arch < 90:
            expected = pointers
        call = lambda operands=operands: ops.gated_linear(*operands, "gelu", policy=INVARIANT)  # noqa: E731
        names, out = launched(monkeypatch, call, arch)
        assert [kernel for kernel, _ in names] == [expected], name
        check(name, out, *operands, "gelu")


def test_two_kernels_where_one_does_not_pay(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches one kernel in float32, with gradients, or for an activation that it has not; and an invariant one."""
    operands = inputs(5, 16, 24, BF16, device)
    one, two = ["_gated_linear_kernel"], ["_gated_kernel"]
    asked: list[tuple[str, Any, list[str]]] = [("16 bits", operands, one)]
    asked.append(("float32", tuple(t.float() for t in operands), two))
    asked.append(("gradients", (operands[0], operands[1].clone().requires_grad_(), operands[2]), two))
    for name, tensors, expected in asked:
        names, out = launched(monkeypatch, lambda t=tensors: ops.gated_linear(*t, "silu", policy=TRITON), 80)
        assert [kernel for kernel, _ in names] == expected, name
        check(name, out.detach(), *(t.detach() for t in tensors), "silu")
    with torch.no_grad():
        names, _ = launched(monkeypatch, lambda: ops.gated_linear(*asked[-1][1], "silu", policy=TRITON), 80)
    assert [kernel for kernel, _ in names] == one
    plain = Policy("triton")
    with pytest.raises(BackendError, match="there is no Triton kernel for 'mish'"):
        ops.gated_linear(*operands, "mish", policy=TRITON)
    mish = ops.gated_linear(*operands, "mish", policy=plain)
    assert torch.equal(mish, ops.gated(ops.linear(*operands, policy=plain), "mish", policy=plain))
    with pytest.raises(ValueError, match=r"x: expected shape \(T, 2 I\)"):
        ops.gated_linear(operands[0], operands[1][1:], None, policy=TRITON)
    with pytest.raises(ValueError, match="x, weight: expected"):
        ops.gated_linear(operands[0][:, :8], operands[1], None, policy=TRITON)
    assert ops.gated_linear(operands[0][:0], *operands[1:], policy=TRITON).shape == (0, 24)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_rows_do_not_see_the_batch(dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches bits of a row that depend on the rows beside it, or a tile by their number, in batch-invariant mode."""
    x, weight, bias = inputs(300, 48, 40, dtype, device)
    rows, kernels = [], set()
    for n_rows in (1, 2, 100, 300):
        part = x[300 - n_rows :]
        names, out = launched(monkeypatch, lambda p=part: ops.gated_linear(p, weight, bias, policy=INVARIANT))
        rows.append(out[-1])
        kernels |= {(name, tuple(config.items())) for name, config in names}
    assert len(kernels) == 1 and all(torch.equal(row, rows[0]) for row in rows)


def test_few_rows(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the tile of many rows for few, or one of few rows that is not the product's of the same width."""
    x, weight, bias = inputs(600, 32, 96, BF16, device)
    for n_rows in (9, 600):
        names, out = launched(monkeypatch, lambda n=n_rows: ops.gated_linear(x[:n], weight, bias, policy=TRITON))
        expected = few_rows.heuristic_tile(192, n_rows) if n_rows <= few_rows.FEW else None
        assert [config for _, config in names] == [
            expected or configs.gemm(BF16, 90, (32, 192), "gated").config.block_sizes
        ]
        check(f"{n_rows} rows", out, x[:n_rows], weight, bias, "gelu")


def test_operation(device: torch.device) -> None:
    """Catches a schema or a fake implementation that breaks PyTorch's rules for operators, or a graph break."""
    x, weight, bias = inputs(6, 16, 8, FP32, device)
    arguments = *(t.requires_grad_() for t in (x, weight, bias)), "gelu"
    tests = "test_schema", "test_faketensor", "test_autograd_registration"
    torch.library.opcheck(torch.ops.fastbert.gated_linear, arguments, test_utils=tests)
    operands = inputs(6, 16, 8, BF16, device)
    call = lambda *tensors: ops.gated_linear(*tensors, "silu", policy=TRITON)  # noqa: E731
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    try:
        with torch.no_grad():
            assert torch.equal(compiled(*operands), call(*operands))
    finally:
        torch._dynamo.reset()


def test_records(device: torch.device) -> None:
    """Catches a report that names two operations where one runs, or that lacks the gate."""
    operands = inputs(5, 16, 24, BF16, device)
    with recording.recorded() as recorder:
        ops.gated_linear(*operands, "silu", policy=TRITON)
        ops.gated_linear(*(t.float() for t in operands), "silu", policy=TRITON)
    first, *rest = recorder.records
    assert (first.op, first.before, first.after) == ("linear", (5, 16), (5, 24))
    assert first.facts["gated"] and first.facts["activation"] == "silu"
    assert [record.op for record in rest] == ["linear", "gated"]
