"""The Triton kernels of gated activations, rotary positions and windows give what their formulas give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import ops
from fastbert.ops import BackendError, Policy, noting
from fastbert_kernels.embedding import Notes
from gradient_cases import assert_gradient
from helpers import assert_as_accurate, guarded
from model_cases import randn

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
TRITON = Policy("triton", strict=True)
GATES = {"gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu, "silu": F.silu}


def gated_in_torch(activation: str, x: Tensor, grad: Tensor) -> list[Tensor]:
    """The gated activation and its gradient by PyTorch, in x's dtype."""
    leaf = x.detach().clone().requires_grad_()
    first, second = leaf.chunk(2, -1)
    out = GATES[activation](first) * second
    return [out.detach(), *torch.autograd.grad(out, leaf, grad.to(x.dtype))]


@pytest.mark.parametrize("activation", GATES)
@DTYPES
def test_gated(activation: str, dtype: torch.dtype, device: torch.device, poisoned: Any) -> None:
    """Catches halves in each other's place, an edge of a tile left out, or a derivative of another activation."""
    for n_rows, width in ((1, 1), (9, 131), (2, 1100)):
        x, grad = ((2 * randn(n_rows, n, seed=n)).to(device, dtype) for n in (2 * width, width))
        leaf = guarded(x, extra_columns=4).requires_grad_()
        out = ops.gated(leaf, activation, policy=TRITON)
        (d_x,) = torch.autograd.grad(out, leaf, guarded(grad, extra_columns=3))
        eager, exact = gated_in_torch(activation, x, grad), gated_in_torch(activation, x.double(), grad.double())
        assert_as_accurate(activation, out.detach(), eager[0], exact[0])
        assert_gradient(f"{activation}, gradient", d_x, eager[1], exact[1], dtype)
        alone = ops.gated(x[-1:], activation, policy=Policy("triton", batch_invariant=True))
        assert torch.equal(alone, out[-1:])
    poisoned.check()


def test_gates_without_a_kernel(device: torch.device) -> None:
    """Catches an activation without a kernel that is computed as another, and an empty batch that is launched."""
    x = torch.randn(3, 8, device=device)
    with pytest.raises(BackendError, match="there is no Triton kernel for 'mish'"):
        ops.gated(x, "mish", policy=TRITON)
    assert torch.equal(ops.gated(x, "mish", policy=Policy("triton")), F.mish(x[:, :4]) * x[:, 4:])
    assert ops.gated(x[:0], policy=TRITON).shape == (0, 4)
    far = torch.tensor([[-200.0, 1.0]], device=device)
    assert all(ops.gated(far, activation, policy=TRITON).item() == 0.0 for activation in GATES)


@DTYPES
@pytest.mark.parametrize("with_types", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_embeddings_without_positions(
    with_types: bool, with_bias: bool, dtype: torch.dtype, device: torch.device, poisoned: Any
) -> None:
    """Catches a table that is read though absent, and a norm's bias that is another norm's."""
    width = 40
    tables = [randn(n, width, seed=n).to(device, dtype) for n in (101, 2)]
    weight, ln_bias = (randn(width, seed=n).to(device, dtype) for n in (3, 4))
    ids, types = (torch.randint(n, (37,), device=device) for n in (101, 2))
    segments = (types, tables[1]) if with_types else (None, None)
    bias = ln_bias if with_bias else None

    def plain(to: torch.dtype) -> Tensor:
        word, type_table, w, b = (t.to(to) for t in (*tables, weight, ln_bias))
        x = word[ids] + type_table[types] if with_types else word[ids]
        return F.layer_norm(x, (width,), w, b if with_bias else None, 1e-5)

    out = ops.embedding_layer_norm(
        guarded(ids), segments[0], None, guarded(tables[0], 3), segments[1], None, weight, bias, 1e-5, policy=TRITON
    )
    assert_as_accurate("embeddings", out, plain(dtype), plain(torch.float64))
    of_embeds = ops.embedding_layer_norm(
        None, segments[0], None, tables[0], segments[1], None, weight, bias, 1e-5,
        inputs_embeds=tables[0][ids], policy=TRITON,
    )  # fmt: skip
    assert torch.equal(of_embeds, out)
    normed = ops.bias_residual_layer_norm(out, None, None, weight, bias, 1e-5, policy=TRITON)
    eager, exact = (
        F.layer_norm(out.to(to), (width,), weight.to(to), None if bias is None else bias.to(to), 1e-5)
        for to in (dtype, torch.float64)
    )
    assert_as_accurate("norm", normed, eager, exact)
    poisoned.check()


def test_embeddings_note_ids(device: torch.device) -> None:
    """Catches an id beyond its table that nobody notes where there are no positions."""
    notes = Notes(*(torch.zeros(n, dtype=torch.int64, device=device) for n in (4, 2)), 7)
    notes.batch[1] = 3
    words, ids = torch.randn(5, 8, device=device), torch.tensor([1, 9, 2, 9], device=device)
    with noting.noting(notes):
        out = ops.embedding_layer_norm(ids, None, None, words, None, None, words[0], None, 1e-5, policy=TRITON)
    assert notes.words.tolist() == [(7 << 32) | 9, 0, 0, 0] and out.isfinite().all()
