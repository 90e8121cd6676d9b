"""The Triton kernels of gated activations, rotary positions and windows give what their formulas give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import ops
from fastbert.ops import BackendError, Policy
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
