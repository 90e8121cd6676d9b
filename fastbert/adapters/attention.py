"""This module is attn_implementation="fastbert": attention over packed tokens, for other encoders of transformers.

It registers with two interfaces of transformers 5: one for attention and one for the mask. Without the second, a model
gets no mask, and tokens would attend to padding.

B sequences, S longest, N heads, D head size, T packed tokens.
"""

from __future__ import annotations

import logging
import sys
import threading
import weakref
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastbert import ops
from fastbert.adapters import versions
from fastbert.ops import packing, tracing
from fastbert.ops.packing import PackedBatch

logger = logging.getLogger("fastbert")

NAME = "fastbert"  # With "flash" in the name, transformers would look for flash attention.
OURS = "fastbert"
counts: Counter[str] = Counter()  # Calls of layers: those that ran here (OURS), and those by SDPA, by reason.

# Arguments of layers that change nothing in attention without a cache.
_HARMLESS = ("position_ids", "use_cache", "is_causal", "num_items_in_batch", "return_dict", "output_hidden_states")
_MADE = "_fastbert_made"  # An attribute of the masks made here.
_last = threading.local()  # The mask of the layer before, and its packing.


def register_attention() -> str:
    """Registers attn_implementation="fastbert" with transformers, and returns that name. A second call has no effect.

    It computes plain bidirectional attention, with padding or without. PyTorch's scaled_dot_product_attention computes
    all other kinds: causal, cross-attention, grouped heads, position biases, sliding windows, masks made by the caller,
    dropout in training, tracing. Each reason is logged once and counted in `fastbert.adapters.attention.counts`.
    Outputs at padding positions are zero before the next layer adds to them. Raises RuntimeError before transformers
    5.0.

    A model whose class does not read the interface (MPNet, MegatronBert, DeBERTa, ...) raises ValueError when it is
    made or loaded with that name. Code that computes attention itself gets the mask of eager attention.
    """
    interfaces = versions.attention_interfaces()
    if interfaces is None:
        import transformers

        raise RuntimeError(
            f"register_attention: needs transformers 5.0 or newer, whose encoders read the interface, "
            f"found {transformers.__version__}; fastbert.accelerate works with both"
        )
    attention_interface, mask_interface = interfaces
    attention_interface.register(NAME, attention_forward)
    mask_interface.register(NAME, attention_mask)
    versions.check_attention(NAME, _check_class)
    return NAME


def _check_class(kind: type) -> None:
    """Raises ValueError for a class of models that does not read the attention interface."""
    if versions.reads_attention_interface(kind):
        return
    others = 'attn_implementation="eager"' + (' or "sdpa"' if getattr(kind, "_supports_sdpa", False) else "")
    raise ValueError(
        f'attn_implementation="{NAME}": {kind.__name__} has its own attention, which does not read the '
        f"AttentionInterface of transformers, so fastbert's would never run; use {others}"
    )


@dataclass
class _Made:
    """A `_Made` holds the data of a mask that this module made."""

    bools: Tensor | None  # (B, 1, S, S), True where attention goes, or None where it goes everywhere.
    padding: bool  # Whether the mask leaves out padding alone, in queries as in keys.
    version: int  # The mask's count of writes when it was made.


def attention_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Makes the mask of a batch as transformers' eager_mask does, or returns None for a causal mask without padding.

    (B, 1, S, S) in the dtype of the model: 0 for pairs that attend, and the dtype's least number for the others. Code
    that does not read transformers' attention interface can add it to scores. `attention_forward` uses the boolean mask
    that is kept with it.
    """
    from transformers import masking_utils

    if torch.compiler.is_compiling() or tracing.transformed(kwargs.get("attention_mask")) is not None:
        traced: Tensor | None = masking_utils.eager_mask(*args, **kwargs)
        return traced
    padding, n_seqs = kwargs.get("attention_mask"), kwargs.get("batch_size")
    length: Any = None
    n_keys: Any = None
    bidirectional = not args and kwargs.get("mask_function") is masking_utils.bidirectional_mask_function
    if bidirectional:
        length, n_keys = versions.query_length(kwargs), kwargs.get("kv_length")
    offsets = [kwargs.get(name, 0) for name in ("q_offset", "kv_offset")]
    plain = all(isinstance(offset, int) and not offset for offset in offsets)
    fits = padding is None or (plain and tuple(padding.shape) == (n_seqs, n_keys))
    dtype, device = kwargs.get("dtype", torch.float32), kwargs.get("device")
    skips = padding is None or bool(kwargs.get("allow_is_bidirectional_skip"))
    if length is not None and fits and skips and (padding is None or bool(padding.all())):
        # A mask of zeros stands for None, which some layers take for causal attention.
        full = torch.zeros((), dtype=dtype, device=device if padding is None else padding.device)
        return _with(full.expand(kwargs["batch_size"], 1, length, n_keys), None, False)
    crossing = versions.is_mask_of_other_states(sys._getframe(1))
    if padding is not None and fits and length is not None and length == n_keys and not crossing:
        row = padding.bool()[:, None, None, :]
        return _with(_additive(row, dtype).expand(-1, 1, length, -1), row.expand(-1, 1, length, -1), True)
    bools: Tensor | None = masking_utils.sdpa_mask(*args, **kwargs)
    if bools is None:  # SDPA needs no causal mask, other implementations do.
        alone: Tensor | None = masking_utils.eager_mask(*args, **kwargs)
        return alone
    return _with(_additive(bools, dtype), bools, False)


def _additive(bools: Tensor, dtype: torch.dtype) -> Tensor:
    zero, least = (torch.full((), value, dtype=dtype, device=bools.device) for value in (0, torch.finfo(dtype).min))
    return torch.where(bools, zero, least)


def _with(mask: Tensor, bools: Tensor | None, padding: bool) -> Tensor:
    mask.__dict__[_MADE] = _Made(bools, padding, _version(mask))
    return mask


def _made(mask: Tensor | None) -> _Made | None:
    """Returns the data of a mask, if this module made it and it was not changed."""
    made: _Made | None = None if mask is None else mask.__dict__.get(_MADE)
    return None if made is None or mask is None or made.version != _version(mask) else made


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Computes attention by transformers' signature: (B, N, S, D) three times -> (B, S, N, D), None."""
    if torch.compiler.is_compiling() or tracing.recorded(query):
        return _sdpa(module, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    made = _made(attention_mask)
    if made is not None:
        attention_mask = made.bools
        is_causal = causal = False  # The mask says everything.
    of_padding = attention_mask is None or bool(made and made.padding and not _crosses(module))
    obstacle = _obstacle(query, key, value, attention_mask, dropout, bool(causal), kwargs, of_padding)
    if obstacle is not None:
        if obstacle not in counts:
            logger.warning('attn_implementation="fastbert" falls back to sdpa: %s', obstacle)
        counts[obstacle] += 1
        return _sdpa(module, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs)
    counts[OURS] += 1
    n_seqs, n_heads, length, head_size = query.shape
    batch = _packing(attention_mask, n_seqs, length, query.device)
    rows = [packing.pack(t.transpose(1, 2), batch).flatten(1) for t in (query, key, value)]  # each (T, N * D)
    out = ops.varlen_attention(torch.cat(rows, dim=1), batch, n_heads, scale=scaling)
    return packing.pad(out.view(-1, n_heads, head_size), batch), None


def _obstacle(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, causal: bool,
              rest: dict[str, Any], of_padding: bool = True) -> str | None:  # fmt: skip
    """Says why a call is not plain bidirectional attention, or returns None."""
    if (observer := tracing.observed(query, key, value, mask)) is not None:
        return observer
    if query.shape[2] != key.shape[2]:
        return "queries and keys of different lengths"
    if query.shape != key.shape or query.shape != value.shape:
        return "keys or values whose shape differs from the queries'"
    if dropout:
        return "dropout of the probabilities"
    if mask is None and causal and query.shape[2] > 1:
        return "causal attention"
    if not of_padding:
        return "a mask with more than padding"
    for name, value_ in rest.items():
        if value_ is not None and value_ is not False and name not in _HARMLESS:
            return f"the argument {name}"
    return None


def _crosses(module: Any) -> bool:
    """Says whether a module attends to other states than its own, whose padding is not that of the queries."""
    return "cross" in type(module).__name__.lower() or bool(getattr(module, "is_cross_attention", False))


def _packing(mask: Tensor | None, n_seqs: int, length: int, device: torch.device) -> PackedBatch:
    """Returns the packing of the layer before, if it had the same mask.

    A new packing reads the mask, so the host waits for a GPU.
    """
    key = n_seqs, length, device, None if mask is None or mask.is_inference() else mask._version, mask is None
    last = getattr(_last, "packing", None)
    if last is not None and last[0] == key and (last[1]() is mask if mask is not None else last[1] is None):
        kept: PackedBatch = last[2]
        return kept
    batch = packing.without_padding(n_seqs, length, device) if mask is None else packing.unpad(mask[:, 0, 0])
    _last.packing = key, None if mask is None else weakref.ref(mask), batch
    return batch


def _sdpa(module: Any, query: Any, key: Any, value: Any, mask: Any, dropout: Any, scaling: Any, causal: Any,
          rest: dict[str, Any]) -> tuple[Tensor, None]:  # fmt: skip
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    # Only this one of PyTorch's implementations has a rule for every transform.
    implementation = sdpa_kernel(SDPBackend.MATH) if tracing.differentiated() else nullcontext()
    with implementation:
        out: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=causal, **rest
        )
    return out
