"""One call of an accelerated encoder: by us where every argument is known, else by the original forward, counted.

B sequences, S longest, H hidden.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import threading
import traceback
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.adapters import versions
from fastbert.adapters.covered import COVERED, Mapping
from fastbert.adapters.live_encoder import LiveEncoder, Options, Unsupported
from fastbert.models.inputs import Inputs
from fastbert.ops import BackendError, packing, tracing
from fastbert.ops.tracing import untraced

logger = logging.getLogger("fastbert")

STATE = "_fastbert"  # in the __dict__ of an accelerated module
OURS = "fastbert"  # what a call that ran here is counted as

_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
_SETTINGS = ("output_attentions", "output_hidden_states", "return_dict")
# Arguments that change nothing in an encoder without a cache.
_IGNORED = ("use_cache", "num_items_in_batch")


class Counted:
    """The options of an accelerated module, and how many of its calls ran where. subject: what is counted, in words."""

    def __init__(self, options: Options, subject: str) -> None:
        self.options, self.subject = options, subject
        self.counts: Counter[str] = Counter()

    def forget(self) -> None:
        """What is derived from the modules is made anew at the next call."""

    def decline(self, reason: str, error: Exception | None = None) -> None:
        """Counts a call of the original code; logs each reason once, with the error that led to it.

        Raises BackendError under strict.
        """
        if self.options.strict:
            raise BackendError(f"accelerate: {self.subject} would have to run as it was, and strict=True: {reason}")
        if reason not in self.counts:
            logger.warning("accelerate: %s runs as it was before: %s", self.subject, reason, exc_info=error)
        self.counts[reason] += 1


class State(Counted):
    """What an accelerated encoder carries: the options, the counts, and what is made at the first call.

    A copy, or what a pickle gives, has the options alone.
    """

    def __init__(self, options: Options, mapping: Mapping) -> None:
        super().__init__(options, f"{mapping.model}.forward")
        self.mapping = mapping
        self._encoder: LiveEncoder | None = None
        self._stale = False
        self.settled = False  # while a caller is known to call eval() for nothing
        self._lock = threading.RLock()

    def __reduce__(self) -> Any:
        return _fresh_state, (self.options, self.mapping.module)

    def __deepcopy__(self, memo: Any) -> State:
        return State(self.options, self.mapping)

    def forget(self) -> None:
        """What is derived from the modules is made anew at the next call."""
        self._encoder = None

    def invalidate(self) -> None:
        """What is derived from the weights is made anew at the next call."""
        self._stale = self._stale or not self.settled

    def encoder(self, live: nn.Module) -> LiveEncoder:
        """Our encoder on the live model as it is. Raises Unsupported."""
        found = self._encoder
        if found is None or not found.is_current() or self._stale:
            with self._lock:
                found = self._encoder
                if found is None or not found.is_current():
                    found = self._encoder = LiveEncoder(live, self.mapping, self.options)
                    found.invalidate()
                elif self._stale:
                    found.invalidate()
                self._stale = False
        return found


class ScoreState(Counted):
    """What an accelerated CrossEncoder carries. A copy has the options alone."""

    def __init__(self, options: Options) -> None:
        super().__init__(options, "CrossEncoder.predict")

    def __reduce__(self) -> Any:
        return ScoreState, (self.options,)

    def __deepcopy__(self, memo: Any) -> ScoreState:
        return ScoreState(self.options)


def predict(live: nn.Module, state: Counted, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """CrossEncoder.predict, whose eval() of a model in eval mode shall not renew what is made of the weights."""
    inner = [(module, module.__dict__[STATE]) for module in live.modules() if STATE in module.__dict__]
    inner = [(module, found) for module, found in inner if isinstance(found, State)]
    for module, found in inner:
        found.settled = not any(part.training for part in module.modules())
    try:
        return original(live, *args, **kwargs)
    finally:
        for _, found in inner:
            found.settled = False


def _fresh_state(options: Options, module: str) -> State:
    return State(options, next(mapping for mapping in COVERED if mapping.module == module))


@functools.cache
def parameter_names(forward: Any) -> tuple[str, ...]:
    """The positional parameters of a forward, self aside, in the order of the installed version."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(forward).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.kind in kinds)[1:]


def forward(live: nn.Module, state: State, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The output of `original(live, *args, **kwargs)`, by whichever can."""
    if tracing.recorded(*args, *kwargs.values()):
        return original(live, *args, **kwargs)  # neither counted nor logged: the tracer would record that
    return _forward(live, state, original, args, kwargs)


@untraced
def _forward(live: nn.Module, state: State, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    names = parameter_names(original)
    call = {**dict(zip(names, args, strict=False)), **kwargs}
    clash = len(args) > len(names) or len(call) < len(args) + len(kwargs)  # the original raises TypeError
    try:
        reason = "arguments that do not fit" if clash else _obstacle(live, state, call, names)
        if reason is None:
            encoder = state.encoder(live)
            reason = encoder.obstacle()
            if reason is None:
                return _run(live, state, encoder, call)
    except Unsupported as error:
        reason = str(error)
    except Exception as error:
        return after_error(error, live, state, original, args, kwargs)
    state.decline(reason)
    return original(live, *args, **kwargs)


def after_error(
    error: Exception, live: nn.Module, state: Counted, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """What the original code gives, where ours has raised: its own error, if the fault is the caller's.

    Raises `error` where the original must not be tried: under strict, where memory or the device is at an end, and for
    ids beyond their table, which on a GPU end the process's use of it.
    """
    names = {kind.__name__ for kind in type(error).__mro__}
    at_an_end = names & {"MemoryError", "OutOfMemoryError", "AcceleratorError"} or "CUDA error" in str(error)
    at_an_end = at_an_end or "alloc" in str(error) and "memory" in str(error)
    on_cpu = next((p.device.type for p in live.parameters()), "cpu") == "cpu"
    if state.options.strict or at_an_end or (isinstance(error, IndexError) and not on_cpu):
        raise error
    traceback.clear_frames(error.__traceback__)  # which hold what was computed
    try:
        output = original(live, *args, **kwargs)
    except IndexError:
        if isinstance(error, IndexError):
            raise error from None  # which names the argument
        raise
    state.decline(f"our path raised {type(error).__name__}", error)
    return output


def model_obstacle(live: nn.Module) -> str | None:
    """What in the state of the whole model we do not do, or None."""
    if getattr(live, "_is_replica", False):
        return "a replica of DataParallel"
    if live.training:
        return "training mode (kernels with dropout and gradients are not here yet)"
    if getattr(live.config, "is_decoder", False) or getattr(live.config, "is_causal", False):
        return "decoder mode"
    return None


def _obstacle(live: nn.Module, state: State, call: dict[str, Any], names: tuple[str, ...]) -> str | None:
    """names: of forward's arguments. What in the call, or in the state of the whole model, we do not do; or None."""
    if (reason := tracing.observed() or model_obstacle(live)) is not None:
        return reason
    config: Any = live.config
    for name, value in call.items():
        known = (name in _INPUTS and name in names) or name in _SETTINGS or name in _IGNORED
        if known or value is None or value is False:
            continue
        return f"the argument {name}"
    if versions.flag(call, config, "output_attentions"):
        return "attentions are requested"
    if not isinstance(versions.flag(call, config, "output_hidden_states"), (bool, type(None))):
        return "single hidden states are requested"
    return _input_obstacle(live, state, call)


def _input_obstacle(live: nn.Module, state: State, call: dict[str, Any]) -> str | None:
    given = {name: call[name] for name in _INPUTS if call.get(name) is not None}
    if not all(type(value) in (Tensor, nn.Parameter) for value in given.values()):
        return "inputs that are no plain tensors"
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    if (ids is None) == (embeds is None):
        return "not exactly one of input_ids and inputs_embeds"
    base: Any = embeds if ids is None else ids
    if base.dim() != (2 if embeds is None else 3):
        return f"{base.dim()}-D inputs"
    shape = tuple(base.shape[:2])
    weight = next(live.parameters())
    if any(value.device != weight.device for value in given.values()):
        return "inputs on another device"
    mask = given.get("attention_mask")
    if mask is not None:
        if mask.dim() != 2:
            return f"a {mask.dim()}-D attention_mask"
        if mask.is_floating_point() and not bool(((mask == 0) | (mask == 1)).all()):
            return "an attention_mask of other numbers than 0 and 1"
    for name, value in given.items():
        fits = tuple(value.shape[:2]) == shape or (name == "position_ids" and tuple(value.shape) == (1, shape[1]))
        if not fits:
            return f"{name} of another shape than the input"
    width = state.mapping.embedding_width(live.config)
    if embeds is not None and (embeds.dtype != weight.dtype or embeds.shape[-1] != width):
        return "inputs_embeds of another dtype or width than the model's"
    if any(t.dtype not in (torch.int64, torch.int32) for n, t in given.items() if n.endswith("_ids")):
        return "ids that are not int64 or int32"
    return None


def _run(live: nn.Module, state: State, encoder: LiveEncoder, call: dict[str, Any]) -> Any:
    """The output, and the call counted. Raises Unsupported where texts are padded on the left.

    There whoever reads the first column finds zeros here, and with the original what padding attends to.
    """
    model, mapping = encoder.model, state.mapping
    config: Any = live.config
    keep_states = bool(versions.flag(call, config, "output_hidden_states"))
    inputs = {name: call.get(name) for name in _INPUTS}
    mask = inputs["attention_mask"]
    batch = None if mask is None else packing.unpad(mask)
    if batch is not None and not batch.first_column:
        raise Unsupported("padding in the first column")
    encoded = model.encode(Inputs(**inputs, output_attentions=False, output_hidden_states=keep_states), batch)
    last = packing.pad(encoded.last_hidden_state, encoded.batch)
    hidden = None
    if encoded.hidden_states is not None:
        hidden = (*(packing.pad(x, encoded.batch) for x in encoded.hidden_states[:-1]), last)
    pooled = {"pooler_output": model.pool(encoded)} if mapping.family.pooler else {}
    output = _output_class(mapping.output)(last_hidden_state=last, **pooled, hidden_states=hidden)
    state.counts[OURS] += 1
    wanted = call.get("return_dict")
    if wanted is None:
        wanted = getattr(config, "return_dict", True)
    return output if wanted else versions.tuple_of(output)


@functools.cache
def _output_class(name: str) -> Any:
    return getattr(importlib.import_module("transformers.modeling_outputs"), name)
