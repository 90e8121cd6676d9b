"""attn_implementation="fastbert": our attention over packed tokens, for encoders of transformers that are not ours.

Registered with two interfaces of transformers 5: one for the attention, and one for the mask, without which a model
gets no mask at all and padding leaks into the tokens. B sequences, S longest, N heads, D head size, T packed tokens.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from fastbert import ops, varlen
from fastbert.adapters import versions
from fastbert.varlen import PackedBatch

logger = logging.getLogger("fastbert")

NAME = "fastbert"  # "flash" in it would send transformers looking for flash attention
OURS = "fastbert"
counts: Counter[str] = Counter()  # of layers' calls: here, or by SDPA, by reason

# What layers pass on that changes nothing in attention without a cache.
_HARMLESS = ("position_ids", "use_cache", "is_causal", "num_items_in_batch", "return_dict", "output_hidden_states")
_BOOLS = "_fastbert_bools"  # an attribute of the masks made here
_last = threading.local()  # the mask of the layer before, and what was made of it


def register_attention() -> str:
    """Makes attn_implementation="fastbert" known to transformers, and returns that name. Again does nothing.

    It runs plain bidirectional attention, with padding or without. Everything else (causal, cross-attention, grouped
    heads, position biases, sliding windows, masks made by the caller, dropout in training, tracing) goes to PyTorch's
    scaled_dot_product_attention; the reason is logged once and counted in `fastbert.adapters.attention.counts`. Outputs
    at padding positions are zero before the next layer adds to them. Raises RuntimeError before transformers 5.0.

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
    """Raises ValueError for a class of models that reads no attention interface, and would not run our attention."""
    if versions.reads_attention_interface(kind):
        return
    others = 'attn_implementation="eager"' + (' or "sdpa"' if getattr(kind, "_supports_sdpa", False) else "")
    raise ValueError(
        f'attn_implementation="{NAME}": {kind.__name__} has attention of its own, which reads no AttentionInterface of '
        f"transformers, so fastbert's would never run; take {others}"
    )


def attention_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask of a batch, as transformers' eager_mask makes it, or None where nothing is masked.

    (B, 1, S, S) in the dtype of the model: 0 where attention goes, the dtype's least number elsewhere. Any code can add
    that to scores, whether or not it reads transformers' attention interface. `attention_forward` takes the mask of
    bools that is kept beside it: where padding alone is masked, a view of (B, S) with a stride of 0 along the queries.
    """
    from transformers import masking_utils

    if _tracing():
        traced: Tensor | None = masking_utils.eager_mask(*args, **kwargs)
        return traced
    padding, length = kwargs.get("attention_mask"), versions.query_length(kwargs)
    known = (
        not args
        and kwargs.get("mask_function") is masking_utils.bidirectional_mask_function
        and length is not None
        and length == kwargs.get("kv_length")
        and all(isinstance(kwargs.get(name, 0), int) and not kwargs.get(name, 0) for name in ("q_offset", "kv_offset"))
        and (padding is None or tuple(padding.shape) == (kwargs.get("batch_size"), length))
    )
    if known and padding is not None:
        if kwargs.get("allow_is_bidirectional_skip") and bool(padding.all()):
            return None
        bools: Tensor | None = padding.bool()[:, None, None, :]
    else:
        bools = masking_utils.sdpa_mask(*args, **kwargs)
        if bools is None:  # nothing is masked, or a causal mask that SDPA does not need, and others do
            alone: Tensor | None = masking_utils.eager_mask(*args, **kwargs)
            return alone
    dtype = kwargs.get("dtype", torch.float32)
    zero, least = (torch.full((), value, dtype=dtype, device=bools.device) for value in (0, torch.finfo(dtype).min))
    made = torch.where(bools, zero, least).expand(-1, 1, length, -1)
    made.__dict__[_BOOLS] = bools.expand(-1, 1, length, -1), _version(made)
    return made


def _bools(mask: Tensor | None) -> Tensor | None:
    """What was kept beside a mask of ours, if nobody has written to that; any other mask as it is."""
    bools, version = (None, None) if mask is None else mask.__dict__.get(_BOOLS, (None, None))
    return mask if mask is None or bools is None or version != _version(mask) else bools


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
    """(B, N, S, D) three times -> (B, S, N, D), and no probabilities: the signature of transformers' interface."""
    if _tracing():
        return _sdpa(module, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs)
    attention_mask = _bools(attention_mask)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    reason = _obstacle(query, key, value, attention_mask, dropout, bool(causal), kwargs)
    if reason is not None:
        if reason not in counts:
            logger.warning('attn_implementation="fastbert" falls back to sdpa: %s', reason)
        counts[reason] += 1
        return _sdpa(module, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs)
    counts[OURS] += 1
    n_seqs, n_heads, length, head_size = query.shape
    batch = _packing(attention_mask, n_seqs, length, query.device)
    rows = [varlen.pack(t.transpose(1, 2), batch).flatten(1) for t in (query, key, value)]  # each (T, N * D)
    out = ops.varlen_attention(torch.cat(rows, dim=1), batch, n_heads, scale=scaling)
    return varlen.pad(out.view(-1, n_heads, head_size), batch), None


def _obstacle(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, causal: bool, rest: dict[str, Any]
) -> str | None:
    """Why it is not plain bidirectional attention, or None."""
    if query.shape[2] != key.shape[2]:
        return "queries and keys of different lengths"
    if query.shape != key.shape or query.shape != value.shape:
        return "keys or values of another shape than the queries"
    if dropout:
        return "dropout of the probabilities"
    if mask is None and causal and query.shape[2] > 1:
        return "causal attention"
    if mask is not None and not _masks_padding(mask, query.shape[0], query.shape[2]):
        return "a mask of more than padding"
    for name, value_ in rest.items():
        if value_ is not None and value_ is not False and name not in _HARMLESS:
            return f"the argument {name}"
    if type(query) is not Tensor:
        return "a tensor of another kind"
    return None


def _masks_padding(mask: Tensor, n_seqs: int, length: int) -> bool:
    shape_fits = tuple(mask.shape) == (n_seqs, 1, length, length)
    return mask.dtype == torch.bool and shape_fits and (mask.stride(2) == 0 or length == 1)


def _packing(mask: Tensor | None, n_seqs: int, length: int, device: torch.device) -> PackedBatch:
    """That of the layer before, if it had the same mask: making it looks at the mask, which waits for a GPU."""
    key = n_seqs, length, device, None if mask is None or mask.is_inference() else mask._version, mask is None
    found = getattr(_last, "packing", None)
    if found is not None and found[0] == key and (found[1]() is mask if mask is not None else found[1] is None):
        kept: PackedBatch = found[2]
        return kept
    batch = varlen.without_padding(n_seqs, length, device) if mask is None else varlen.unpad(mask[:, 0, 0])
    _last.packing = key, None if mask is None else weakref.ref(mask), batch
    return batch


def _sdpa(module: Any, query: Any, key: Any, value: Any, mask: Any, dropout: Any, scaling: Any, causal: Any,
          rest: dict[str, Any]) -> tuple[Tensor, None]:  # fmt: skip
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    out: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=causal, **rest
    )
    return out


def _tracing() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()
