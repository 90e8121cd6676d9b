"""This module describes and checks the arguments that the forwards of all models share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from fastbert.checkpoint.config import BertConfig
from fastbert.ops import packing, tracing
from fastbert.ops.packing import PackedBatch

# Arguments of transformers' forwards besides ours, and their meaning if they are not None. The first ones change
# nothing in an encoder, with any value.
HARMLESS = ("use_cache", "cache_position", "num_items_in_batch")
REFUSED = {
    "past_key_values": "keys and values of earlier tokens, which prefix tuning and decoders pass, are not supported; "
    "prompt tuning, LoRA and others are supported",
    "head_mask": "masks of attention heads are not supported",
    "encoder_hidden_states": "cross-attention is not supported",
    "encoder_attention_mask": "cross-attention is not supported",
}
_THEIRS = frozenset((*HARMLESS, *REFUSED))


@dataclass
class Inputs:
    """An `Inputs` holds a padded batch and the options of the call.

    input_ids: (B, S) integers; or inputs_embeds: (B, S, H), in ELECTRA as wide as its embedding_size. attention_mask:
    (B, S) or (1, S), nonzero at tokens, by default all ones. token_type_ids: (B, S) or (1, S), 0 by default and in a
    model without segments. position_ids: (B, S) or (1, S). The default is the column index. In RoBERTa's family it is
    the padding id + 1 and up, counted over the ids that are not the padding id, or without ids over the columns.
    output_attentions, output_hidden_states: whether the output has them; the config's by default. return_dict: True for
    an output class (the default), False for a tuple.
    """

    input_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    token_type_ids: Tensor | None = None
    position_ids: Tensor | None = None
    inputs_embeds: Tensor | None = None
    output_attentions: bool | None = None
    output_hidden_states: bool | None = None
    return_dict: bool | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Returns the five tensors, in the order of `forward`."""
        return self.input_ids, self.attention_mask, self.token_type_ids, self.position_ids, self.inputs_embeds

    def rows(self) -> tuple[Tensor | None, ...]:
        """Returns the tensors that are packed, in the order of `PackedInputs`."""
        return self.input_ids, self.token_type_ids, self.position_ids, self.inputs_embeds

    def checked(self, model: Any) -> Inputs:
        """Returns the inputs with masks and ids of all B rows, and with positions in a family that counts them.

        Raises ValueError for shapes that do not fit, TypeError for a dtype.
        """
        input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds = self.tensors()
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: expected exactly one of the two")
        first: Any = input_ids if inputs_embeds is None else inputs_embeds
        name = "input_ids" if inputs_embeds is None else "inputs_embeds"
        if first.dim() != (2 if inputs_embeds is None else 3):
            expected = "(B, S)" if inputs_embeds is None else "(B, S, H)"
            raise ValueError(f"{name}: expected shape {expected}, got {tuple(first.shape)}")
        shape = tuple(first.shape[:2])
        for other, tensor in (("attention_mask", attention_mask), ("token_type_ids", token_type_ids)):
            if tensor is not None and all(
                tracing.differ(tuple(tensor.shape), expected) for expected in (shape, (1, shape[1]))
            ):
                hint = " (masks of pairs of tokens are not supported)" if tensor.dim() > 2 else ""
                raise ValueError(f"{other}: expected shape {shape} as {name}, got {tuple(tensor.shape)}{hint}")
        if attention_mask is not None and tracing.differ(attention_mask.shape[0], shape[0]):
            attention_mask = attention_mask.expand(shape)
        if token_type_ids is not None and tracing.differ(token_type_ids.shape[0], shape[0]):
            token_type_ids = token_type_ids.expand(shape)
        if position_ids is not None:
            positions_shape = tuple(position_ids.shape)
            if tracing.differ(positions_shape, shape) and tracing.differ(positions_shape, (1, shape[1])):
                raise ValueError(f"position_ids: expected shape {shape}, got {tuple(position_ids.shape)}")
            position_ids = position_ids.expand(shape)
        check_embeds(inputs_embeds, model)
        padding_id = model.counted_from
        if position_ids is None and padding_id is not None:
            if input_ids is not None:
                position_ids = packing.positions_after_padding(input_ids, padding_id)  # also ids at padding
            else:
                position_ids = (torch.arange(shape[1], device=first.device) + padding_id + 1).expand(shape)
        return replace(self, attention_mask=attention_mask, token_type_ids=token_type_ids, position_ids=position_ids)

    def batch(self, transformed: str | None, device: torch.device) -> PackedBatch:
        """Returns the packing of the batch, for a model on the device. transformed: the result of
        `tracing.transformed`.
        """
        first: Any = self.input_ids if self.inputs_embeds is None else self.inputs_embeds
        if transformed is not None:
            return packing.in_place(first, self.attention_mask)
        if self.attention_mask is not None:
            return packing.unpad(self.attention_mask, device)
        return packing.without_padding(first.shape[0], first.shape[1], device)

    def flattened(self) -> Inputs:
        """Returns each choice as a sequence: (B, C, S) -> (B * C, S)."""
        names = [name for name in _POSITIONAL if getattr(self, name) is not None]
        return replace(self, **{name: getattr(self, name).flatten(0, 1) for name in names})

    def wants(self, name: str, config: BertConfig) -> bool:
        """Tells whether output_attentions or output_hidden_states is set, in the argument or else in the config."""
        value = getattr(self, name)
        return bool(config.extra.get(name) if value is None else value)

    def wants_dict(self, config: BertConfig) -> bool:
        """Tells whether to return an output class or a tuple."""
        return config.use_return_dict if self.return_dict is None else self.return_dict


_NAMES = tuple(field.name for field in fields(Inputs))
_POSITIONAL, _BY_NAME = _NAMES[:5], _NAMES[5:]  # in the order of transformers


def check_embeds(embeds: Tensor | None, model: Any) -> None:
    """Raises TypeError or ValueError for embeddings of a wrong dtype or width. embeds: (..., E) or None."""
    if embeds is None:
        return
    if embeds.dtype != model.dtype:
        raise TypeError(f"inputs_embeds: expected the model's dtype {model.dtype}, got {embeds.dtype}")
    config = model.config
    if tracing.differ(embeds.shape[-1], config.embedding_width):
        shape, expected = tuple(embeds.shape), config.embedding_width
        name = "hidden_size" if model.embeddings_project is None else "embedding_size"
        raise ValueError(f"inputs_embeds: expected {expected} ({name}) in the last dimension, got {shape}")


def takes_inputs(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Makes `forward(self, inputs: Inputs, labels=None, ...)` a forward with the arguments of transformers.

    The five tensors come first, by position or by name, then the forward's own arguments; the others by name only.
    Arguments of HARMLESS are ignored. Raises ValueError for an argument of REFUSED that is set, and TypeError for an
    unknown argument.
    """
    own = [each for each in inspect.signature(forward).parameters.values() if each.name not in ("self", "inputs")]
    positional = (*_POSITIONAL, *(each.name for each in own if each.kind is each.POSITIONAL_OR_KEYWORD))
    names = [each.name for each in own]
    known = frozenset((*_NAMES, *positional, *names))
    n_positional = len(positional)

    def call(self: Any, *args: Any, **arguments: Any) -> Any:
        if isinstance(arguments, torch.fx.Proxy):
            raise TypeError(
                f"torch.fx.symbolic_trace cannot follow a {type(self).__name__}; torch.export and torch.compile can"
            )
        if not _THEIRS.isdisjoint(arguments):
            for name, reason in REFUSED.items():
                value = arguments.pop(name, None)
                if value is not None:
                    raise ValueError(f"{name}: got a {type(value).__name__}, expected None: {reason}")
            for name in HARMLESS:
                arguments.pop(name, None)
        if len(args) > n_positional:
            raise TypeError(f"forward() takes {n_positional} positional arguments, got {len(args)}")
        for name in arguments:
            if name not in known:
                raise TypeError(f"forward() got an unexpected keyword argument {name!r}")
        for name, value in zip(positional, args, strict=False):
            if name in arguments:
                raise TypeError(f"forward() got multiple values for argument {name!r}")
            arguments[name] = value
        others = {name: arguments.pop(name) for name in names if name in arguments}
        return forward(self, Inputs(**arguments), **others)

    functools.update_wrapper(call, forward)
    del call.__wrapped__  # type: ignore[attr-defined]  # torch.fx would take the inner function's names for these
    # Trainer and PEFT read the names here.
    tensor, flag = "Tensor | None", "bool | None"
    parameter = inspect.Parameter
    parameters = [parameter("self", parameter.POSITIONAL_OR_KEYWORD)]
    parameters += [
        parameter(name, parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=tensor) for name in _POSITIONAL
    ]
    parameters += own
    parameters += [parameter(name, parameter.KEYWORD_ONLY, default=None, annotation=flag) for name in _BY_NAME]
    parameters += [
        parameter(name, parameter.KEYWORD_ONLY, default=None, annotation=Any) for name in (*REFUSED, *HARMLESS)
    ]
    returned = inspect.signature(forward).return_annotation
    call.__signature__ = inspect.Signature(parameters, return_annotation=returned)  # type: ignore[attr-defined]
    return call
