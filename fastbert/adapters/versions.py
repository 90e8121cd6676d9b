"""What differs between versions of transformers and sentence-transformers: one function each, named.

Supported: transformers 4.48 to 5.x. Where a difference can be asked for, it is asked for, rather than compared with a
version number. The order of forward's arguments, where 4.x has `head_mask` and 5.x has not, is no entry here: the
signature of the installed version is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

MISSING = object()


def transformers_version() -> tuple[int, int]:
    """(major, minor) of the installed transformers."""
    import transformers

    major, minor = transformers.__version__.split(".")[:2]
    return int(major), int(minor)


def tuple_of(output: Any) -> tuple[Any, ...]:
    """What BertModel.forward returns for return_dict=False. 4.x kept a missing pooler as None, 5.x leaves it out."""
    found: tuple[Any, ...] = output.to_tuple()
    if transformers_version()[0] >= 5 or output.pooler_output is not None:
        return found
    return found[0], None, *found[1:]


def flag(call: Mapping[str, Any], config: Any, name: str) -> Any:
    """The setting `output_...` of a call. None given by the caller means False from 5.0 on, and the config's before."""
    value = call.get(name, MISSING)
    if value is MISSING or (value is None and transformers_version()[0] < 5):
        return getattr(config, name, False)
    return value


def is_recorder(hook: Callable[..., Any]) -> bool:
    """Whether a forward hook is one that 5.x installs for good when hidden states or attentions are first asked for.

    It does nothing but in a call of the original forward.
    """
    return getattr(hook, "__module__", "").startswith("transformers.utils.")


def attention_interfaces() -> tuple[Any, Any] | None:
    """(AttentionInterface, AttentionMaskInterface) where encoders read both, from 5.0 on; else None."""
    if transformers_version()[0] < 5:
        return None
    from transformers import AttentionInterface, AttentionMaskInterface

    return AttentionInterface, AttentionMaskInterface


def pooling_modes(pooling: Any) -> tuple[str, ...]:
    """The modes of a Pooling module: one attribute from sentence-transformers 6 on, a flag each before."""
    modes = getattr(pooling, "pooling_mode", None)
    if modes is None:
        modes = pooling.get_pooling_mode_str().split("+")
    return (modes,) if isinstance(modes, str) else tuple(modes)
