"""This module tries whether a module in the place of one of ours works row by row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class CalledModule:
    """A `CalledModule` stands in the place of a linear or of the word embeddings, as an adapter or a quantised linear.

    Our path calls it with the rows of the tokens, (T, K), where transformers calls it with (B, S, K), padding included.
    `obstacle` tries once whether both give the same. Classes of PEFT, and linears that differ in their weight alone,
    are known to do so.
    """

    def __init__(self, path: str, module: nn.Module, like: nn.Module) -> None:
        self.path, self.module = path, module
        self._width = like.in_features if isinstance(like, nn.Linear) else None  # None where the input is ids.
        self._out = like.out_features if isinstance(like, nn.Linear) else like.embedding_dim
        self._n_ids: Any = getattr(module, "num_embeddings", getattr(like, "num_embeddings", 1))
        forward = getattr(type(module), "forward", None)  # Scripted modules have it in their objects.
        by_weight_alone = forward in (nn.Linear.forward, nn.Embedding.forward)
        self._asked = by_weight_alone or type(module).__module__.split(".")[0] == "peft"
        self._obstacle: str | None = None

    def obstacle(self, like: Tensor) -> str | None:
        """Says why the module cannot be called with rows, or returns None. like: of the input's dtype and device."""
        if not self._asked:
            devices = [like.device] if like.device.type == "cuda" else []
            try:
                with torch.no_grad(), torch.random.fork_rng(devices):
                    same = self._works_by_rows(like)
                self._obstacle = None if same else "does not work row by row"
            except Exception as error:
                self._obstacle = f"cannot be called with rows ({type(error).__name__})"
            self._asked = True
        return None if self._obstacle is None else f"{self.path}, a {type(self.module).__qualname__}, {self._obstacle}"

    def _works_by_rows(self, like: Tensor) -> bool:
        generator = torch.Generator().manual_seed(0)
        if self._width is None:
            x = torch.randint(max(int(self._n_ids), 1), (2, 3), generator=generator).to(like.device)
        else:  # The rows differ in size: a scale that is taken from all of them would mix them.
            sizes = torch.tensor([1.0, 8.0, 0.25, 2.0, 30.0, 0.5]).view(2, 3, 1)
            x = (torch.randn(2, 3, self._width, generator=generator) * sizes).to(like.device, like.dtype)
        padded, rows = self.module(x), self.module(x.flatten(0, 1))
        two_rows = self.module(x.flatten(0, 1)[2:4])
        if padded.shape != (2, 3, self._out) or rows.shape != (6, self._out) or two_rows.shape != (2, self._out):
            return False
        exact = padded.flatten(0, 1).double()
        bound = exact.abs().amax(1, keepdim=True) * _rounding(like.dtype)
        return bool(((rows.double() - exact).abs() <= bound).all()) and bool(
            ((two_rows.double() - exact[2:4]).abs() <= bound[2:4]).all()
        )


def _rounding(dtype: torch.dtype) -> float:
    """Bounds the difference of two orders of summation, over the largest number: TF32, or a few ulp."""
    return {torch.float64: 1e-9, torch.float32: 2e-3}.get(dtype, 16 * torch.finfo(dtype).eps)
