"""torch.compile and torch.export pass through every fused operation."""

from __future__ import annotations

import pytest
import torch

from fastbert import BertConfig, BertModel, ops
from fastbert.ops import Policy, packing
from helpers import cu_seqlens_of, operations_called, rms_error

TRITON = Policy("triton", strict=True)
INVARIANT = Policy("triton", batch_invariant=True)
H, N = 32, 2
LENGTHS = [5, 1, 20, 9]
BATCH = {}


def batch_on(device):
    if device not in BATCH:
        BATCH[device] = packing.from_cu_seqlens(cu_seqlens_of(LENGTHS), sum(LENGTHS), device)
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
    for policy in (TRITON, INVARIANT):
        ops.prepare_attention(batch, torch.float32, H // N, policy)
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
        "attention": (lambda qkv: ops.varlen_attention(qkv, batch, N, policy=TRITON), (rand(n, 3 * H),)),
        "attention, two work lists": (
            lambda qkv: ops.varlen_attention(qkv, batch, N, policy=INVARIANT),
            (rand(n, 3 * H),),
        ),
        "attention, not prepared": (
            lambda qkv, cu, cu_cpu: torch.ops.fastbert.varlen_attention(qkv, cu, cu_cpu, None, None, N, 0.25),
            (rand(n, 3 * H), batch.cu_seqlens, batch.cu_seqlens_cpu),
        ),
        "grouped attention": (
            lambda qkv, cu_cpu: torch.ops.fastbert.grouped_attention(qkv, cu_cpu, N, 0.25),
            (rand(n, 3 * H), batch.cu_seqlens_cpu),
        ),
        "pooling": (lambda x, cu: ops.pool(x, cu, "mean", normalize=True, policy=TRITON), (x, cu_seqlens)),
    }


NAMES = sorted(cases(torch.device("cpu")))


@pytest.mark.parametrize("name", NAMES)
def test_compile(name, device):
    """Catches a graph break, or a fake implementation that contradicts the kernel."""
    function, tensors = cases(device)[name]
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(*tensors), function(*tensors))


@pytest.mark.parametrize("name", NAMES)
def test_compile_with_gradients(name, device):
    """Catches a backward pass that cannot be traced, or that gives something else when it is."""
    function, tensors = cases(device)[name]
    grads = []
    for run in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        leaves = [t.clone().requires_grad_() if t.is_floating_point() else t for t in tensors]
        # Cubed: the squares of normalised vectors sum to a constant, whose gradient is nothing but rounding.
        run(*leaves).pow(3).sum().backward()
        grads.append([leaf.grad for leaf in leaves if leaf.is_floating_point()])
    for eager, traced in zip(*grads, strict=True):
        assert rms_error(traced, eager) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_export(name, device):
    """Catches an operation that export cannot carry, or that loses an argument on the way."""
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
    """Catches a schema, fake implementation or autograd registration that breaks PyTorch's rules for operators."""
    function, tensors = cases(device)[name]
    for op, args in operations_called(function, tensors):
        torch.library.opcheck(op, args)


def test_plain_attention_is_not_traced_by_length(device):
    """Catches a graph break in plain attention, or a graph that is compiled again for every batch."""
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def run(qkv, batch):
        return ops.varlen_attention(qkv, batch, N, policy=Policy("torch"))

    for lengths in ([4, 9], [3, 3, 3], [1, 20]):
        batch = packing.from_cu_seqlens(cu_seqlens_of(lengths), sum(lengths), device)
        qkv = torch.randn(sum(lengths), 3 * H, device=device)
        expected = ops.varlen_attention(qkv, batch, N, policy=Policy("torch"))
        assert torch.allclose(run(qkv, batch), expected, atol=1e-6)
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["triton", "cpu"])
def test_compiled_model_is_one_graph(backend, device):
    """Catches an encoder that breaks into a graph a layer, where only packing and checking at the edge may break it."""
    config = BertConfig(vocab_size=50, hidden_size=H, num_attention_heads=N, num_hidden_layers=3, intermediate_size=48)
    model = BertModel(config, backend=backend).to(device).eval()
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        for shape in ((3, 12), (2, 20), (4, 7)):
            ids = torch.randint(0, 50, shape, device=device)
            mask = torch.ones(shape, device=device)
            mask[0, 5:] = 0
            ours, theirs = compiled(ids, mask), model(ids, mask)
            assert torch.allclose(ours.last_hidden_state, theirs.last_hidden_state, atol=1e-6)
            assert torch.allclose(ours.pooler_output, theirs.pooler_output, atol=1e-6)
        torch._dynamo.reset()
        assert torch._dynamo.explain(model)(ids, mask).graph_break_count <= 3


@pytest.mark.parametrize("backend", ["triton", "cpu"])
def test_exported_model(backend, device):
    """Catches a model whose packing cannot be exported, or that is exported for one mask only."""
    config = BertConfig(vocab_size=50, hidden_size=H, num_attention_heads=N, num_hidden_layers=2, intermediate_size=48)
    model = BertModel(config, backend=backend).to(device).eval()
    ids = torch.randint(0, 50, (3, 12), device=device)
    mask = torch.ones(3, 12, dtype=torch.long, device=device)
    mask[0, 5:] = 0
    with torch.no_grad():
        program = torch.export.export(model, (ids, mask), strict=False)
        mask[1, 2:] = 0
        exported, expected = program.module()(ids, mask), model(ids, mask)
    assert torch.allclose(exported.last_hidden_state, expected.last_hidden_state, atol=1e-6)


@pytest.mark.slow
def test_inductor(device):
    """Catches an operation that the default compiler cannot lower."""
    x, bias = torch.randn(4, 16, device=device), torch.randn(16, device=device)
    compiled = torch.compile(lambda x, b: ops.bias_gelu(x * 2, b, "gelu", policy=TRITON) + 1, fullgraph=True)
    with torch.no_grad():
        expected = ops.bias_gelu(x * 2, bias, "gelu", policy=TRITON) + 1
        assert torch.allclose(compiled(x, bias), expected, atol=1e-6)
