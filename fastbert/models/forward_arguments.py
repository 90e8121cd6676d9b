"""Arguments that transformers' forwards take besides ours: dropped where they ask for nothing, or refused."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Forward = TypeVar("Forward", bound=Callable[..., Any])

# What each asks for where it is not None. The first ones change nothing in an encoder, whatever they say.
HARMLESS = ("use_cache", "cache_position", "num_items_in_batch")
REFUSED = {
    "past_key_values": "keys and values of earlier tokens, which prefix tuning and decoders pass, are not supported; "
    "prompt tuning, LoRA and others are",
    "head_mask": "masks of attention heads are not supported",
    "encoder_hidden_states": "cross-attention is not supported",
    "encoder_attention_mask": "cross-attention is not supported",
}
_NAMES = frozenset((*HARMLESS, *REFUSED))


def takes_theirs(forward: Forward) -> Forward:
    """Lets a forward take the arguments of HARMLESS and REFUSED by name; ValueError for one that asks for something."""

    @functools.wraps(forward)
    def call(self: Any, *args: Any, **arguments: Any) -> Any:
        if isinstance(arguments, torch.fx.Proxy):
            raise TypeError(
                f"torch.fx.symbolic_trace cannot follow a {type(self).__name__}; torch.export and torch.compile can"
            )
        if not _NAMES.isdisjoint(arguments):
            for name, reason in REFUSED.items():
                value = arguments.pop(name, None)
                if value is not None:
                    raise ValueError(f"{name}: got a {type(value).__name__}, expected None: {reason}")
            for name in HARMLESS:
                arguments.pop(name, None)
        return forward(self, *args, **arguments)

    del call.__wrapped__  # torch.fx would take the inner function's names for those of this one
    # Trainer and PEFT read the names here.
    signature = inspect.signature(forward)
    kind = inspect.Parameter.KEYWORD_ONLY
    more = [inspect.Parameter(name, kind, default=None, annotation=Any) for name in (*REFUSED, *HARMLESS)]
    call.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *more])  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]
