"""What differs between versions of transformers and sentence-transformers: one function each, named.

Supported: transformers 4.48 to 5.x. Where a difference can be asked for, it is asked for, rather than compared with a
version number. The order of forward's arguments, where 4.x has `head_mask` and 5.x has not, is no entry here: the
signature of the installed version is taken.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

MISSING = object()


def transformers_version() -> tuple[int, int]:
    """(major, minor) of the installed transformers."""
    import transformers

    major, minor = transformers.__version__.split(".")[:2]
    return int(major), int(minor)


def tuple_of(output: Any) -> tuple[Any, ...]:
    """What forward returns for return_dict=False. 4.x kept a missing pooler as None, 5.x leaves it out.

    Outputs of a family without poolers have no such field, and no None.
    """
    found: tuple[Any, ...] = output.to_tuple()
    if transformers_version()[0] >= 5 or getattr(output, "pooler_output", MISSING) is not None:
        return found
    return found[0], None, *found[1:]


def flag(call: Mapping[str, Any], config: Any, name: str) -> Any:
    """The setting `output_...` of a call. None given by the caller means False from 5.0 on, and the config's before."""
    value = call.get(name, MISSING)
    if value is MISSING or (value is None and transformers_version()[0] < 5):
        return getattr(config, name, False)
    return value


def is_harmless(hook: Callable[..., Any]) -> bool:
    """Whether a forward hook is one of transformers' own that asks nothing of our path.

    5.x installs recorders for good when hidden states or attentions are first asked for; they do nothing but in a call
    of the original forward. Gradient checkpointing has the word embeddings' output require gradients (in 5.x always,
    before with PEFT); embeddings with a hook are called, so it does.
    """
    if getattr(hook, "__qualname__", "").endswith("make_inputs_require_grads"):
        return True
    return getattr(hook, "__module__", "").startswith("transformers.utils.")


def is_own_forward(module: Any) -> bool:
    """Whether a forward in a module's own dictionary is that of its class: 5.0 puts it back so after recording."""
    forward: Any = module.__dict__["forward"]
    kind: Any = type(module)
    return getattr(forward, "__self__", None) is module and forward.__func__ is kind.forward


def attention_interfaces() -> tuple[Any, Any] | None:
    """(AttentionInterface, AttentionMaskInterface) where encoders read both, from 5.0 on; else None."""
    if transformers_version()[0] < 5:
        return None
    from transformers import AttentionInterface, AttentionMaskInterface

    return AttentionInterface, AttentionMaskInterface


def check_attention(name: str, check: Callable[[type], None]) -> None:
    """Has transformers call `check(class)` before it makes a model with attn_implementation=name. Again does nothing.

    transformers does such checks for its own names alone, in this method; there is nowhere to register one.
    """
    from transformers import PreTrainedModel

    before: Any = PreTrainedModel.get_correct_attn_implementation
    if name in getattr(before, "checked", ()):
        return

    @functools.wraps(before)
    def get_correct_attn_implementation(self: Any, requested_attention: Any, *args: Any, **kwargs: Any) -> Any:
        if requested_attention == name:
            check(type(self))
        return before(self, requested_attention, *args, **kwargs)

    get_correct_attn_implementation.checked = (*getattr(before, "checked", ()), name)  # type: ignore[attr-defined]
    PreTrainedModel.get_correct_attn_implementation = get_correct_attn_implementation


@functools.cache
def reads_attention_interface(kind: type) -> bool:
    """Whether a class of models takes its attention from transformers' interface, by the source of its modules.

    Neither of the class's flags says that. transformers looks at the source, too, where an implementation is set later.
    True for a class without attention of its own, whose parts may read the interface.
    """
    for base in kind.__mro__:
        if base.__module__ == "transformers.modeling_utils":
            break
        try:
            source = inspect.getsource(sys.modules[base.__module__])
        except (KeyError, OSError, TypeError):
            continue
        if re.search(r"ATTENTION_CLASSES\[", source):  # by the names that it knows
            return False
        if "ALL_ATTENTION_FUNCTIONS" in source:
            return True
        if re.search(r"^class \w*Attention\w*\((torch\.)?nn\.Module\):", source, re.MULTILINE):
            return False
    return True


def is_mask_of_other_states(maker: Any) -> bool:
    """Whether a function of transformers' masking_utils makes a mask for cross-attention; maker: its frame.

    It tells mask functions the lengths alone, which may be equal.
    """
    return maker.f_locals.get("encoder_hidden_states") is not None


def attention_registries(module: Any) -> tuple[tuple[Mapping[str, Any], Mapping[str, Any]], ...]:
    """Registries that a model's source reads by the name of its attention: (this object's entries, everybody's) each.

    They hold the functions of attention and, from 4.53 on, those of masks. Empty where the source reads none.
    """
    interface = getattr(module, "ALL_ATTENTION_FUNCTIONS", None)
    if interface is None:
        return ()
    interfaces = [interface]
    try:
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

        interfaces.append(ALL_MASK_ATTENTION_FUNCTIONS)
    except ImportError:
        pass
    return tuple((getattr(each, "_local_mapping", {}), getattr(each, "_global_mapping", each)) for each in interfaces)


def pooling_modes(pooling: Any) -> tuple[str, ...]:
    """The modes of a Pooling of sentence-transformers, in the order of its output: a flag each before version 6."""
    flags = {
        "cls": "pooling_mode_cls_token",
        "max": "pooling_mode_max_tokens",
        "mean": "pooling_mode_mean_tokens",
        "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
        "weightedmean": "pooling_mode_weightedmean_tokens",
        "lasttoken": "pooling_mode_lasttoken",
    }
    modes = getattr(pooling, "pooling_mode", None)
    if modes is None:
        return tuple(mode for mode, flag in flags.items() if getattr(pooling, flag))
    return (modes,) if isinstance(modes, str) else tuple(modes)


def takes_prompt_for_cls(pooling: Any) -> bool:
    """Whether "cls" pooling takes the first token of all where it is to leave the prompt out, as before version 6."""
    import torch

    place = pooling_modes(pooling).index("cls")
    width = pooling.pooling_output_dimension // len(pooling_modes(pooling))
    tokens = torch.arange(3.0)[None, :, None].expand(1, 3, width)
    features = {"token_embeddings": tokens, "attention_mask": torch.ones(1, 3, dtype=torch.int64), "prompt_length": 1}
    return bool(pooling(features)["sentence_embedding"][0, place * width] == 0)


def quantize_embeddings(vectors: Any, precision: str) -> Any:
    """That of sentence-transformers, which moved it in version 6."""
    try:
        from sentence_transformers.util.quantization import quantize_embeddings as quantize
    except ImportError:
        from sentence_transformers.quantization import quantize_embeddings as quantize
    return quantize(vectors, precision=precision)


def preprocess(transformer: Any, texts: list[str]) -> Any:
    """What the Transformer module of sentence-transformers makes of texts; `tokenize` before version 6."""
    modern = hasattr(transformer, "preprocess")
    return transformer.preprocess(texts) if modern else transformer.tokenize(texts)


def cleaned(transformer: Any, texts: list[str]) -> list[str]:
    """The texts as they go to the tokenizer: stripped, and lower-cased on request, before version 6."""
    if hasattr(transformer, "preprocess"):
        return texts
    return [text.strip().lower() if transformer.do_lower_case else text.strip() for text in texts]


def query_length(mask_arguments: Mapping[str, Any]) -> int | None:
    """Of the arguments of a mask function: `q_length`, which the first 5.x gave as the length of `cache_position`."""
    length = mask_arguments.get("q_length")
    if length is None and mask_arguments.get("cache_position") is not None:
        length = mask_arguments["cache_position"].shape[0]
    return length if isinstance(length, int) else None
