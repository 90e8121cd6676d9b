"""Hooks on a module inside a model see padded tensors, (B, S, ...), as in transformers.

Inside, every module works on packed rows, (T, ...). A module may have hooks of any kind, also PyTorch's global ones, or
a patched forward. Then its inputs are padded before the call, its forward packs them again, and the same happens the
other way round with its output. Rows at padding positions are zero, and values that a hook writes there are lost. A
foreign module may read more than one row, for example a recurrent module as classifier. It is called with padded
tensors, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastbert.engine.listeners import is_sharded, listened, listened_inside
from fastbert.ops import AUTO, Policy, packing
from fastbert.ops.packing import PackedBatch

_ROWWISE = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.Dropout, nn.Identity)

# The batch and the policy of the present padded call.
_under_way: ContextVar[tuple[PackedBatch, Policy] | None] = ContextVar("fastbert padded call", default=None)


class AttentionOutput(NamedTuple):
    """The output of attention for a hook has padded states (B, S, H) and no weights, in a tuple as in transformers."""

    hidden_states: Tensor
    weights: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """Returns the shape of the states."""
        return self.hidden_states.shape

    def __mul__(self, other: Any) -> Any:
        raise TypeError("the output of attention is a tuple, as in transformers: its hidden states are output[0]")


def _is_ours(module: nn.Module) -> bool:
    return type(module).__module__.startswith("fastbert.")


def _wants_padding(module: nn.Module) -> bool:
    if _is_ours(module):
        return listened(module)
    if is_sharded(module):
        return False
    rowwise = isinstance(module, _ROWWISE) or type(module).__module__.startswith("peft.")
    return not rowwise or listened_inside(module)


def call(module: Any, batch: PackedBatch, policy: Policy, *rows: Tensor, **more: Any) -> Any:
    """Calls module(*rows, batch=batch, policy=policy), (T, ...) each; or with padded tensors alone, if the module needs
    them.
    """
    if not _wants_padding(module):
        return module(*rows, batch=batch, policy=policy, **more)
    view = padded_view(batch)
    token = _under_way.set((batch, policy))
    try:
        output = module(*(packing.pad(x, view) for x in rows), **more)
    finally:
        _under_way.reset(token)
    return rows_of(output, batch)


def call_embeddings(module: Any, batch: PackedBatch, policy: Policy, **ids: Tensor | None) -> Tensor:
    """Returns the embeddings (T, E) of packed ids, computed on padded ids if there are hooks."""
    if not _wants_padding(module):
        return module(**ids, batch=batch, policy=policy)
    view = padded_view(batch)
    token = _under_way.set((batch, policy))
    try:
        output = module(**{name: None if x is None else packing.pad(x, view) for name, x in ids.items()})
    finally:
        _under_way.reset(token)
    return rows_of(output, batch)


def call_with_pooled(
    module: Any, batch: PackedBatch, policy: Policy, x: Tensor, pooled: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Calls module(x, pooled), (T, H) and (B, H), which gives rows of tokens and of sequences."""
    if not listened(module):
        return module(x, pooled, batch=batch, policy=policy)
    token = _under_way.set((batch, policy))
    try:
        tokens, sequences = module(packing.pad(x, padded_view(batch)), pooled)
    finally:
        _under_way.reset(token)
    return rows_of(tokens, batch), sequences


def states_of_encoder(encoder: Any, batch: PackedBatch, policy: Policy, x: Tensor, keep_states: bool) -> list[Tensor]:
    """Returns the hidden states, all or the last, of an encoder with hooks."""
    view = padded_view(batch)
    token = _under_way.set((batch, policy))
    try:
        output = encoder(packing.pad(x, view), keep_states=keep_states)
    finally:
        _under_way.reset(token)
    last = rows_of(output, batch)
    states = getattr(output, "hidden_states", None) or ()
    return [*(rows_of(state, batch) for state in states[:-1]), last]


def leaf(module: nn.Module, x: Tensor, batch: PackedBatch | None) -> Any:
    """Calls module(x) if the module does not know packing. x: (T, ...), or (B, ...) without a batch, which stays so."""
    if batch is None or not _wants_padding(module):
        return module(x)
    return rows_of(module(packing.pad(x, padded_view(batch))), batch)


def on_packed(
    forward: Callable[..., Any], module: nn.Module, *padded: Tensor | None, per_token: bool = True, **more: Any
) -> Any:
    """Calls forward(module, *rows, batch=..., policy=...) on the packed rows of padded tensors, and pads its output.

    per_token: False for an output of one row a sequence, which stays as it is. If the call comes from outside of a
    model, every position holds a token.
    """
    under_way = _under_way.get()
    if under_way is None:
        first = next(x for x in padded if x is not None)
        under_way = packing.without_padding(first.shape[0], first.shape[1], first.device), AUTO
    batch, policy = under_way
    view, shape = padded_view(batch), (batch.batch_size, batch.padded_length)
    rows = (None if x is None else packing.pack(x.expand(*shape, *x.shape[2:]), view) for x in padded)
    output = forward(module, *rows, batch=batch, policy=policy, **more)
    if isinstance(output, list):
        return [packing.pad(x, view) for x in output]
    return packing.pad(output, view) if per_token else output


def rows_of(output: Any, batch: PackedBatch) -> Any:
    """Returns the packed rows of a module's output: of a padded tensor, or of the first of several."""
    if not isinstance(output, Tensor):
        output = output[0]
    if output.dim() < 3:
        return output
    view = padded_view(batch)
    shape = batch.batch_size, batch.padded_length
    if any(n not in (1, wanted) for n, wanted in zip(output.shape[:2], shape, strict=True)):
        raise ValueError(f"output of a hooked module: expected shape {(*shape, '...')}, got {tuple(output.shape)}")
    return packing.pack(output.expand(*shape, *output.shape[2:]), view)


def padded_view(batch: PackedBatch) -> PackedBatch:
    """Returns the batch with the places of its tokens in the padded batch; a batch that was never padded lacks them."""
    if batch.indices is not None or batch.n_tokens == batch.batch_size * batch.padded_length:
        return batch

    def make() -> PackedBatch:
        starts = batch.cu_seqlens[:-1].long()
        sequences = batch.seq_ids.long()
        columns = torch.arange(batch.n_tokens, device=batch.device) - starts.index_select(0, sequences)
        return dataclasses.replace(batch, indices=sequences * batch.padded_length + columns, _plans={})

    return batch.plan("padded view", make)
