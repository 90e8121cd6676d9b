"""This module tests whether a module that replaces one of fastbert's modules works row by row."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


class CalledModule:
    """A `CalledModule` replaces a linear or the word embeddings, as an adapter or a quantised linear does.

    fastbert calls it with the rows of the tokens, (T, K); transformers calls it with (B, S, K), with padding.
    `obstacle` tests once in each mode whether both results are the same. For classes of PEFT, and for linears with
    another weight only, this is known.
    """

    def __init__(self, path: str, module: nn.Module, like: nn.Module) -> None:
        self.path, self.module = path, module
        self._width = like.in_features if isinstance(like, nn.Linear) else None  # None where the input is ids.
        self._out = like.out_features if isinstance(like, nn.Linear) else like.embedding_dim
        self._n_ids: Any = getattr(module, "num_embeddings", getattr(like, "num_embeddings", 1))
        forward = getattr(type(module), "forward", None)  # Scripted modules have it in their objects.
        by_weight_alone = forward in (nn.Linear.forward, nn.Embedding.forward)
        self._known = by_weight_alone or type(module).__module__.split(".")[0] == "peft"
        self._obstacles: dict[bool, str | None] = {}  # By whether a module of it is in training mode.

    def obstacle(self, like: Tensor) -> str | None:
        """Says why the module cannot be called with rows, or returns None. like: of the input's dtype and device."""
        if self._known:
            return None
        training = any(module.training for module in self.module.modules())
        if training not in self._obstacles:
            self._obstacles[training] = self._tried(like, training)
        obstacle = self._obstacles[training]
        return None if obstacle is None else f"{self.path}, a {type(self.module).__qualname__}, {obstacle}"

    def _tried(self, like: Tensor, training: bool) -> str | None:
        devices = [like.device] if like.device.type == "cuda" else []
        try:
            module = _without_dropout(self.module) if training else self.module
            with torch.no_grad(), torch.random.fork_rng(devices):
                same = self._works_by_rows(module, like)
        except Exception as error:
            return f"cannot be called with rows ({type(error).__name__})"
        return None if same else "does not work row by row"

    def _works_by_rows(self, module: nn.Module, like: Tensor) -> bool:
        generator = torch.Generator().manual_seed(0)
        if self._width is None:
            x = torch.randint(max(int(self._n_ids), 1), (2, 3), generator=generator).to(like.device)
        else:  # The rows differ in size: a scale that is taken from all of them would mix them.
            sizes = torch.tensor([1.0, 8.0, 0.25, 2.0, 30.0, 0.5]).view(2, 3, 1)
            x = (torch.randn(2, 3, self._width, generator=generator) * sizes).to(like.device, like.dtype)
        padded, rows = module(x), module(x.flatten(0, 1))
        two_rows = module(x.flatten(0, 1)[2:4])
        if padded.shape != (2, 3, self._out) or rows.shape != (6, self._out) or two_rows.shape != (2, self._out):
            return False
        exact = padded.flatten(0, 1).double()
        bound = exact.abs().amax(1, keepdim=True) * _rounding(like.dtype)
        return bool(((rows.double() - exact).abs() <= bound).all()) and bool(
            ((two_rows.double() - exact[2:4]).abs() <= bound[2:4]).all()
        )


def _without_dropout(module: nn.Module) -> nn.Module:
    """Copies a module for the test in training mode, because a call may change it and its dropouts are random."""
    copied = copy.deepcopy(module)
    for each in copied.modules():
        each.training = each.training and not isinstance(each, nn.modules.dropout._DropoutNd)
    return copied


def _rounding(dtype: torch.dtype) -> float:
    """Bounds the difference of two orders of summation, over the largest number: TF32, or a few ulp."""
    return {torch.float64: 1e-9, torch.float32: 2e-3}.get(dtype, 16 * torch.finfo(dtype).eps)
