"""torch.compile and torch.export pass through every fused operation."""

from __future__ import annotations

import pytest
import torch

from fastbert import ops, varlen
from fastbert.ops import Policy
from helpers import cu_seqlens_of, rms_error

TRITON = Policy("triton", strict=True)
H, N = 32, 2
LENGTHS = [5, 1, 20, 9]
BATCH = {}


def batch_on(device):
    if device not in BATCH:
        BATCH[device] = varlen.from_cu_seqlens(cu_seqlens_of(LENGTHS), sum(LENGTHS), device)
    return BATCH[device]


def cases(device):
    """Name -> (function of tensors, its tensors): every op, as a model calls it."""
    n = sum(LENGTHS)

    def rand(*shape):
        return torch.randn(*shape, device=device)

    x, residual, weight, bias, ln_weight, ln_bias = rand(n, H), rand(n, H), rand(H, H), rand(H), rand(H), rand(H)
    ids = [torch.randint(0, size, (n,), device=device) for size in (50, 2, 30)]
    cu_seqlens = cu_seqlens_of(LENGTHS, device)
    batch = batch_on(device)
    batch.seq_ids  # noqa: B018  made outside the traced function, as a model does
    ops.varlen_attention(rand(n, 3 * H), batch, N, policy=TRITON)
    return {
        "layer_norm": (
            lambda x, r, b, w, lb: ops.bias_residual_layer_norm(x, b, r, w, lb, 1e-5, policy=TRITON),
            (x, residual, bias, ln_weight, ln_bias),
        ),
        "bias_gelu": (lambda x, b: ops.bias_gelu(x, b, "gelu", policy=TRITON), (x, bias)),
        "linear": (lambda x, w, b: torch.ops.fastbert.linear(x, w, b, "gelu"), (x, weight, bias)),
        "linear_residual_layer_norm": (
            lambda x, w, b, r, lw, lb: ops.linear_residual_layer_norm(x, w, b, r, lw, lb, 1e-5, policy=TRITON),
            (x, weight, bias, residual, ln_weight, ln_bias),
        ),
        "embedding": (
            lambda i, t, p, a, b, c, w, lb: ops.embedding_layer_norm(i, t, p, a, b, c, w, lb, 1e-5, policy=TRITON),
            (*ids, rand(50, H), rand(2, H), rand(30, H), ln_weight, ln_bias),
        ),
        "attention": (
            lambda qkv, cu, cu_cpu, seq, work: torch.ops.fastbert.varlen_attention(qkv, cu, cu_cpu, seq, work, N, 0.25),
            (
                rand(n, 3 * H),
                batch.cu_seqlens,
                batch.cu_seqlens_cpu,
                batch.seq_ids,
                next(plan for key, plan in batch._plans.items() if key[0] == "work_list"),
            ),
        ),
        "pooling": (lambda x, cu: ops.pool(x, cu, "mean", normalize=True, policy=TRITON), (x, cu_seqlens)),
    }


NAMES = sorted(cases(torch.device("cpu")))


@pytest.mark.parametrize("name", NAMES)
def test_compile(name, device):
    """A graph break, or a fake implementation that contradicts the kernel."""
    function, tensors = cases(device)[name]
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(*tensors), function(*tensors))


@pytest.mark.parametrize("name", NAMES)
def test_compile_with_gradients(name, device):
    """A backward pass that cannot be traced, or that gives something else when it is."""
    function, tensors = cases(device)[name]
    grads = []
    for run in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        leaves = [t.clone().requires_grad_() if t.is_floating_point() else t for t in tensors]
        run(*leaves).square().sum().backward()
        grads.append([leaf.grad for leaf in leaves if leaf.is_floating_point()])
    for eager, traced in zip(*grads, strict=True):
        assert rms_error(traced, eager) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_export(name, device):
    """An operation that export cannot carry, or that loses an argument on the way."""
    function, tensors = cases(device)[name]

    class Module(torch.nn.Module):
        def forward(self, *args):
            return function(*args)

    with torch.no_grad():
        program = torch.export.export(Module(), tensors, strict=False)
        assert any("fastbert" in str(node.target) for node in program.graph.nodes)
        assert torch.equal(program.module()(*tensors), function(*tensors))


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, device):
    """A schema, fake implementation or autograd registration that breaks PyTorch's rules for operators."""
    function, tensors = cases(device)[name]
    seen = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op.namespace == "fastbert":
                seen.append((op, args))
            return op(*args, **(kwargs or {}))

    with Spy(), torch.no_grad():
        function(*tensors)
    assert seen
    for op, args in seen:
        torch.library.opcheck(op, args)


@pytest.mark.slow
def test_inductor(device):
    """An operation that the default compiler cannot lower."""
    x, bias = torch.randn(4, 16, device=device), torch.randn(16, device=device)
    compiled = torch.compile(lambda x, b: ops.bias_gelu(x * 2, b, "gelu", policy=TRITON) + 1, fullgraph=True)
    with torch.no_grad():
        expected = ops.bias_gelu(x * 2, bias, "gelu", policy=TRITON) + 1
        assert torch.allclose(compiled(x, bias), expected, atol=1e-6)
