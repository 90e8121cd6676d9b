"""This module has one function for each difference between versions of transformers and sentence-transformers.

transformers 4.48 to 5.x are supported. A function asks for a difference where it can, rather than a version number.
The order of forward's arguments needs none (4.x has `head_mask`, 5.x has not): it comes from the installed signature.
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
    """Returns (major, minor) of the installed transformers."""
    import transformers

    major, minor = transformers.__version__.split(".")[:2]
    return int(major), int(minor)


def tuple_of(output: Any) -> tuple[Any, ...]:
    """Returns the output of forward for return_dict=False. 4.x keeps a missing pooler as None, 5.x leaves it out.

    Outputs of a family without poolers have no such field, and no None.
    """
    values: tuple[Any, ...] = output.to_tuple()
    if transformers_version()[0] >= 5 or getattr(output, "pooler_output", MISSING) is not None:
        return values
    return values[0], None, *values[1:]


def flag(call: Mapping[str, Any], config: Any, name: str) -> Any:
    """Returns the setting `output_...` of a call. None in it means False from 5.0 on, and the config's before."""
    value = call.get(name, MISSING)
    if value is MISSING or (value is None and transformers_version()[0] < 5):
        return getattr(config, name, False)
    return value


def is_harmless(hook: Callable[..., Any]) -> bool:
    """Says whether a forward hook is one of transformers' own that asks nothing of our path.

    5.x installs recorders for good when hidden states or attentions are first asked for; they do nothing but in a call
    of the original forward. Gradient checkpointing has the word embeddings' output require gradients (in 5.x always,
    before with PEFT, which has a hook of its own for models that have none); embeddings with a hook are called, so it
    does.
    """
    if getattr(hook, "__qualname__", "").endswith(("make_inputs_require_grads", "make_inputs_require_grad")):
        return True
    return getattr(hook, "__module__", "").startswith("transformers.utils.")


def is_own_forward(module: Any) -> bool:
    """Says whether a forward in a module's own dictionary is that of its class.

    5.0 puts it there after recording, and MatryoshkaLoss of sentence-transformers after each step.
    """
    forward: Any = module.__dict__["forward"]
    kind: Any = type(module)
    return getattr(forward, "__self__", None) is module and forward.__func__ is kind.forward


def attention_dropout(attention: Any, dropout: Any) -> tuple[Any, str, Any]:
    """Returns which module has the probability of attention's dropout, by what name, and whose mode counts.

    dropout: the module in attention.

    From 5.0 on, attention reads the p of its dropout, and drops out in its own training mode. In 4.x the dropout is
    called, but with SDPA, whose classes have a copy of the probability.
    """
    if "dropout_prob" in attention.__dict__:
        return attention, "dropout_prob", attention
    return dropout, "p", dropout if transformers_version()[0] < 5 else attention


def checkpointing(encoder: Any, layer: Any) -> Callable[..., Any] | None:
    """Returns the function that calls a layer so that it keeps its input alone, or None where it keeps more.

    From 4.53 on, each layer has a setting, and in 5.23 not every layer need be set. Before, their encoder has it.
    """
    owner = layer if hasattr(layer, "gradient_checkpointing") else encoder
    active = owner.training and getattr(owner, "gradient_checkpointing", False)
    return owner._gradient_checkpointing_func if active else None


def non_reentrant(function: Callable[..., Any] | None) -> Callable[..., Any] | None:
    """Returns the function of `checkpointing` with use_reentrant=False, which 5.x takes by default and 4.x does not.

    A function that does not come from PyTorch's checkpoint, or around it, stays as it is.
    """
    from torch.utils.checkpoint import checkpoint

    if function is checkpoint:
        return functools.partial(checkpoint, use_reentrant=False)
    if isinstance(function, functools.partial):
        return functools.partial(function, use_reentrant=False)
    return function


def attention_interfaces() -> tuple[Any, Any] | None:
    """Returns (AttentionInterface, AttentionMaskInterface) where encoders read both, from 5.0 on, and else None."""
    if transformers_version()[0] < 5:
        return None
    from transformers import AttentionInterface, AttentionMaskInterface

    return AttentionInterface, AttentionMaskInterface


def check_attention(name: str, check: Callable[[type], None]) -> None:
    """Has transformers call `check(class)` before it makes a model with attn_implementation=name.

    transformers checks only its own names, in this method, and has no place to register a check. A second call changes
    nothing.
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
    """Says whether a class of models takes its attention from transformers' interface, by the source of its modules.

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
        if re.search(r"ATTENTION_CLASSES\[", source):  # It takes the names that it knows.
            return False
        if "ALL_ATTENTION_FUNCTIONS" in source:
            return True
        if re.search(r"^class \w*Attention\w*\((torch\.)?nn\.Module\):", source, re.MULTILINE):
            return False
    return True


def is_mask_of_other_states(maker: Any) -> bool:
    """Says whether a function of transformers' masking_utils makes a mask for cross-attention. maker: its frame.

    It tells mask functions the lengths alone, which may be equal.
    """
    return maker.f_locals.get("encoder_hidden_states") is not None


def attention_registries(module: Any) -> tuple[tuple[Mapping[str, Any], Mapping[str, Any]], ...]:
    """Lists the registries that a model's source reads by the name of its attention, as (own entries, common entries).

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
    """Lists the modes of a Pooling of sentence-transformers, in the order of its output: flags before version 6."""
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
    """Says whether "cls" pooling that leaves the prompt out takes the prompt's first token, as before version 6."""
    import torch

    place = pooling_modes(pooling).index("cls")
    width = pooling.pooling_output_dimension // len(pooling_modes(pooling))
    tokens = torch.arange(3.0, device="cpu")[None, :, None].expand(1, 3, width)
    features = {
        "token_embeddings": tokens,
        "attention_mask": torch.ones(1, 3, dtype=torch.int64, device="cpu"),
        "prompt_length": 1,
    }
    return bool(pooling(features)["sentence_embedding"][0, place * width] == 0)


def quantize_embeddings(vectors: Any, precision: str) -> Any:
    """Quantises vectors by the function of sentence-transformers, which moved in version 6."""
    try:
        from sentence_transformers.util.quantization import quantize_embeddings as quantize
    except ImportError:
        from sentence_transformers.quantization import quantize_embeddings as quantize
    return quantize(vectors, precision=precision)


def preprocess(transformer: Any, texts: list[str]) -> Any:
    """Calls `preprocess` of the Transformer module of sentence-transformers, `tokenize` before version 6."""
    modern = hasattr(transformer, "preprocess")
    return transformer.preprocess(texts) if modern else transformer.tokenize(texts)


def cleaned(transformer: Any, texts: list[str]) -> list[str]:
    """Returns the texts that go to the tokenizer. Before version 6 they are stripped, and lower-cased on request."""
    if hasattr(transformer, "preprocess"):
        return texts
    return [text.strip().lower() if transformer.do_lower_case else text.strip() for text in texts]


def query_length(mask_arguments: Mapping[str, Any]) -> int | None:
    """Reads the number of queries from a mask function's arguments: `q_length`, in the first 5.x `cache_position`."""
    length = mask_arguments.get("q_length")
    if length is None and mask_arguments.get("cache_position") is not None:
        length = mask_arguments["cache_position"].shape[0]
    return length if isinstance(length, int) else None
