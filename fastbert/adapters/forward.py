"""This module runs one call of an accelerated encoder: by fastbert if it is supported, else by the original forward.

B sequences, S longest, H hidden.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import traceback
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.adapters import versions
from fastbert.adapters.live_encoder import LiveEncoder, Unsupported
from fastbert.adapters.state import OURS, AcceleratedState, EncoderState
from fastbert.models.inputs import Inputs
from fastbert.ops import packing, tracing
from fastbert.ops.tracing import untraced

_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
_SETTINGS = ("output_attentions", "output_hidden_states", "return_dict")
# Arguments that change nothing in an encoder without a cache.
_IGNORED = ("use_cache", "num_items_in_batch")
# What sentence-transformers has made of a batch, and hands to a forward that takes any name, as to that of a guide.
_MADE_BEFORE = ("token_embeddings", "sentence_embedding", "all_layer_embeddings")


@functools.cache
def parameter_names(forward: Any) -> tuple[str, ...]:
    """Lists the positional parameters of a forward without self, in the order of the installed version."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(forward).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.kind in kinds)[1:]


@functools.cache
def ignored_names(forward: Any) -> frozenset[str]:
    """Lists the arguments that a forward accepts and ignores."""
    takes_any = any(each.kind is each.VAR_KEYWORD for each in inspect.signature(forward).parameters.values())
    return frozenset((*_IGNORED, *_MADE_BEFORE) if takes_any else _IGNORED)


def forward(live: nn.Module, state: EncoderState, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Computes the output of `original(live, *args, **kwargs)`, by fastbert or by the original."""
    if tracing.recorded(*args, *kwargs.values()):
        return original(live, *args, **kwargs)  # It is neither counted nor logged: a tracer would record that.
    return _forward(live, state, original, args, kwargs)


@untraced
def _forward(live: nn.Module, state: EncoderState, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    names = parameter_names(original)
    call = {**dict(zip(names, args, strict=False)), **kwargs}
    clash = len(args) > len(names) or len(call) < len(args) + len(kwargs)  # The original raises TypeError.
    try:
        obstacle = "arguments that do not fit" if clash else _call_obstacle(live, state, call, original)
        if obstacle is None:
            encoder = state.encoder(live)
            obstacle = encoder.obstacle()
            if obstacle is None:
                return _run(live, state, encoder, call)
    except Unsupported as error:
        obstacle = str(error)
    except Exception as error:
        return after_error(error, live, state, original, args, kwargs)
    state.decline(obstacle)
    return original(live, *args, **kwargs)


def after_error(
    error: Exception,
    live: nn.Module,
    state: AcceleratedState,
    original: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Runs the original code after fastbert's has raised. It raises its own error if the call is wrong.

    Raises `error` if the original must not run: with strict=True, after exhausted memory or a failed device, and for
    ids outside their table, which on a GPU would make it unusable for the process. Checkpointing around the model stops
    a recomputation with an error, at the last needed tensor.
    """
    names = {kind.__name__ for kind in type(error).__mro__}
    if "_StopRecomputationError" in names:
        raise error
    exhausted = names & {"MemoryError", "OutOfMemoryError", "AcceleratorError"} or "CUDA error" in str(error)
    exhausted = exhausted or "alloc" in str(error) and "memory" in str(error)
    on_cpu = next((p.device.type for p in live.parameters()), "cpu") == "cpu"
    if state.options.strict or exhausted or (isinstance(error, IndexError) and not on_cpu):
        raise error
    traceback.clear_frames(error.__traceback__)  # The frames hold what was computed.
    try:
        output = original(live, *args, **kwargs)
    except IndexError:
        if isinstance(error, IndexError):
            raise error from None  # Ours names the argument.
        raise
    state.decline(f"our path raised {type(error).__name__}", error)
    return output


def model_obstacle(live: nn.Module) -> str | None:
    """Says which state of the whole model fastbert does not support, or returns None."""
    if getattr(live, "_is_replica", False):
        return "a replica of DataParallel"
    if getattr(live.config, "is_decoder", False) or getattr(live.config, "is_causal", False):
        return "decoder mode"
    return None


def _call_obstacle(live: nn.Module, state: EncoderState, call: dict[str, Any], original: Any) -> str | None:
    """Says which argument or which state of the model fastbert does not support, or returns None."""
    if (obstacle := tracing.observed() or model_obstacle(live)) is not None:
        return obstacle
    config: Any = live.config
    names, ignored = parameter_names(original), ignored_names(original)
    for name, value in call.items():
        known = (name in _INPUTS and name in names) or name in _SETTINGS or name in ignored
        if known or value is None or value is False:
            continue
        return f"the argument {name}"
    if versions.flag(call, config, "output_attentions"):
        return "attentions are requested"
    if not isinstance(versions.flag(call, config, "output_hidden_states"), (bool, type(None))):
        return "single hidden states are requested"
    return _input_obstacle(live, state, call)


def _input_obstacle(live: nn.Module, state: EncoderState, call: dict[str, Any]) -> str | None:
    inputs = {name: call[name] for name in _INPUTS if call.get(name) is not None}
    if not all(type(value) in (Tensor, nn.Parameter) for value in inputs.values()):
        return "inputs that are not plain tensors"
    ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    if (ids is None) == (embeds is None):
        return "both or none of input_ids and inputs_embeds"
    base: Any = embeds if ids is None else ids
    if base.dim() != (2 if embeds is None else 3):
        return f"{base.dim()}-D inputs"
    shape = tuple(base.shape[:2])
    weight = next(live.parameters())
    if any(value.device != weight.device for value in inputs.values()):
        return "inputs on another device"
    mask = inputs.get("attention_mask")
    if mask is not None:
        if mask.dim() != 2:
            return f"a {mask.dim()}-D attention_mask"
        # DeBERTa multiplies its embeddings by the mask; other families ask whether it is 0.
        multiplies = state.mapping.family.text == "deberta" and mask.dtype != torch.bool
        if (mask.is_floating_point() or multiplies) and not bool(((mask == 0) | (mask == 1)).all()):
            return "an attention_mask with numbers other than 0 and 1"
    for name, value in inputs.items():
        fits = tuple(value.shape[:2]) == shape or (name == "position_ids" and tuple(value.shape) == (1, shape[1]))
        if not fits:
            return f"{name} whose shape differs from the input's"
    width = state.mapping.embedding_width(live.config)
    if embeds is not None and (embeds.dtype != weight.dtype or embeds.shape[-1] != width):
        return "inputs_embeds whose dtype or width differs from the model's"
    if any(t.dtype not in (torch.int64, torch.int32) for n, t in inputs.items() if n.endswith("_ids")):
        return "ids that are not int64 or int32"
    return None


def _run(live: nn.Module, state: EncoderState, encoder: LiveEncoder, call: dict[str, Any]) -> Any:
    """Runs a call with fastbert, counts it, and returns its output. Raises Unsupported for texts padded on the left.

    The first column of such texts has zeros in fastbert, and other values in the original.
    """
    model, mapping = encoder.model, state.mapping
    config: Any = live.config
    keep_states = bool(versions.flag(call, config, "output_hidden_states"))
    inputs = {name: call.get(name) for name in _INPUTS}
    mask = inputs["attention_mask"]
    batch = None if mask is None else packing.unpad(mask)
    if batch is not None and not batch.first_column:
        raise Unsupported("padding in the first column")
    if (
        state.padding_reader is not None
        and batch is not None
        and batch.n_tokens < batch.batch_size * batch.padded_length
    ):
        raise Unsupported(f"padding, which a {state.padding_reader} reads")
    encoded = model.encode(Inputs(**inputs, output_attentions=False, output_hidden_states=keep_states), batch)
    last = packing.pad(encoded.last_hidden_state, encoded.batch)
    hidden = None
    if encoded.hidden_states is not None:
        hidden = (*(packing.pad(x, encoded.batch) for x in encoded.hidden_states[:-1]), last)
    pooled = {"pooler_output": model.pool(encoded)} if mapping.family.pooler or model.pooler is not None else {}
    output = _output_class(mapping.output)(last_hidden_state=last, **pooled, hidden_states=hidden)
    state.counts[OURS] += 1
    wanted = call.get("return_dict")
    if wanted is None:
        wanted = getattr(config, "return_dict", True)
    return output if wanted else versions.tuple_of(output)


@functools.cache
def _output_class(name: str) -> Any:
    return getattr(importlib.import_module("transformers.modeling_outputs"), name)
