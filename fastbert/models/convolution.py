"""This module has the convolution over columns beside the first layer of DeBERTa-v2's large models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastbert import ops
from fastbert.checkpoint.activations import ACTIVATIONS
from fastbert.checkpoint.config import BertConfig
from fastbert.checkpoint.deberta import DebertaSettings
from fastbert.engine import Convolution, Linear, Norm
from fastbert.engine.listeners import is_bare
from fastbert.models import fused, hooks
from fastbert.models.modules import call_dropout
from fastbert.models.rotary import normalise
from fastbert.ops import Policy, packing
from fastbert.ops.columns_around import beside
from fastbert.ops.derived import Derived


class DebertaConvolution(nn.Module):
    """LayerNorm(y + activation(dropout(conv(x)))): x is the layer's input, and y its output.

    Columns without a token are zeros. A convolution of k columns is a product with the joined rows of k columns.
    """

    def __init__(self, config: BertConfig, settings: DebertaSettings) -> None:
        super().__init__()
        size, k = config.hidden_size, settings.conv_size
        self.conv = nn.Conv1d(size, size, k, padding=(k - 1) // 2, groups=settings.conv_groups)
        self.LayerNorm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.activation = ACTIVATIONS[settings.conv_activation]
        self.derived = Derived()

    def _weight(self) -> tuple[Tensor, ...]:
        weight, groups = self.conv.weight, self.conv.groups

        def make() -> tuple[Tensor, ...]:
            n_out, n_in, _ = weight.shape
            wide = weight
            if groups > 1:  # the numbers of other groups are zeros
                parts = weight.unflatten(0, (groups, n_out // groups))  # (groups, out, in, k)
                own = torch.eye(groups, dtype=weight.dtype, device=weight.device)
                wide = torch.einsum("goik,gh->gohik", parts, own).reshape(n_out, groups * n_in, -1)
            return (wide.permute(0, 2, 1).flatten(1),)

        return make() if self.training else self.derived.get("product", [weight], make)

    def product(self) -> tuple[Tensor, Tensor]:
        """Returns the convolution as a linear on the joined rows of k columns: weight (H, k * H) and bias (H,)."""
        assert self.conv.bias is not None
        return self._weight()[0], self.conv.bias

    def derived_addresses(self) -> tuple[int, ...]:
        """Returns the address of the current weight of the product; () if it is not kept."""
        return self.derived.addresses("product", self._weight())

    def renew(self, training: bool) -> None:
        """Marks the product's weight to be made again at its next use, or, for training, drops it."""
        fused.renew(self, training)

    def train(self, mode: bool = True) -> DebertaConvolution:
        self.renew(mode)
        return super().train(mode)

    def _replicate_for_data_parallel(self) -> DebertaConvolution:
        replica: DebertaConvolution = fused.replica(super()._replicate_for_data_parallel())
        return replica

    def data(self) -> Convolution:
        """Returns the convolution as data, for engines; its modules must be plain."""
        p = self.dropout.p if self.training else 0.0
        conv = self.conv
        assert conv.bias is not None
        return Convolution(
            conv.weight, conv.bias, conv.groups, Norm.of(self.LayerNorm), self.activation, p,
            lambda: Linear(*self.product()),
        )  # fmt: skip

    def forward(
        self, x: Tensor, y: Tensor, batch: Any = None, policy: Policy = ops.AUTO
    ) -> Tensor:  # (T, H), (T, H) -> (T, H)
        if x.dim() == 3:
            return hooks.on_packed(DebertaConvolution.forward, self, x, y)
        if is_bare(self.conv, nn.Conv1d):
            rows = beside(x, batch, self.conv.kernel_size[0])
            x = ops.linear(rows, *self.product(), policy=policy, keep=not self.training)
        elif x.shape[0]:  # PyTorch convolves no row of length 0
            view = hooks.padded_view(batch)
            x = packing.pack(self.conv(packing.pad(x, view).transpose(1, 2)).transpose(1, 2), view)
        x = ops.bias_gelu(call_dropout(self.dropout, x, batch), None, self.activation, policy=policy)
        return normalise(self.LayerNorm, y + x, policy, batch)
