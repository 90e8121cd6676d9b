"""accelerate and restore: the class of the object is exchanged for one derived from it, and nothing else of it.

The derived class has the name and the module of the original, which transformers goes by (architectures in config.json,
supported models of a pipeline, the recorders of hidden states). `classes.py` makes it, and has pickle find it; its
objects are pickled as objects of the original class that are to be accelerated again.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from fastbert.adapters import covered as mapping
from fastbert.adapters import forward as calls
from fastbert.adapters.classes import derive, derivers, originals
from fastbert.adapters.forward import STATE, Counted, ScoreState, State
from fastbert.adapters.live_encoder import LiveEncoder, Options, Unsupported
from fastbert.models.bert import BertModel

logger = logging.getLogger("fastbert")

Model = TypeVar("Model")


class Accelerated:
    """What the derived classes share. An object of such a class that has no state is as one of the original."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(max(int(protocol), 2))
        original = originals.get(type(self))
        if original is None or not isinstance(reduced, tuple):  # somebody has derived a class of his own from ours
            return reduced
        kind, bases = original
        return (_blank, (kind, bases), *reduced[2:])


class AcceleratedEncoder(Accelerated):
    """Before the encoder's class in the order of methods."""

    def train(self, mode: bool = True) -> Any:
        state = self.__dict__.get(STATE)
        if state is not None:
            state.forget() if mode else state.invalidate()
        return super().train(mode)  # type: ignore[misc]

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        before = self._places()
        applied = super()._apply(*args, **kwargs)  # type: ignore[misc]
        state = self.__dict__.get(STATE)
        if state is not None and self._places() != before:  # `.to(device)` is often called for nothing
            state.forget()
        return applied

    def _places(self) -> list[tuple[int, torch.dtype, torch.device]]:
        parameters: Any = self.parameters()  # type: ignore[attr-defined]
        try:
            return [(p.data_ptr(), p.dtype, p.device) for p in parameters]
        except RuntimeError:  # tensors without memory, on which nothing runs here
            return []


class AcceleratedSentences(Accelerated):
    """Before SentenceTransformer in the order of methods."""


class AcceleratedScores(Accelerated):
    """Before CrossEncoder in the order of methods."""


def _blank(original: type, mixin: str) -> Any:
    """An object of the derived class, for pickle and copy to fill."""
    kind: Any = derivers[mixin](original)
    return kind.__new__(kind)


def derive_encoder(original: type) -> type:
    return derive(original, AcceleratedEncoder, "forward", calls.forward)


def derive_sentences(original: type) -> type:
    from fastbert.adapters import sentences

    return derive(original, AcceleratedSentences, "encode", sentences.encode)


def derive_scores(original: type) -> type:
    return derive(original, AcceleratedScores, "predict", calls.predict)


derivers[AcceleratedEncoder.__name__] = derive_encoder
derivers[AcceleratedSentences.__name__] = derive_sentences
derivers[AcceleratedScores.__name__] = derive_scores


def modules(model: Any) -> list[nn.Module]:
    """All modules of a module or of what wraps one (a pipeline); none of anything else."""
    root = _module_of(model)
    return [] if root is None else list(root.modules())


def parts(model: Any) -> list[nn.Module]:
    """The accelerated modules among them."""
    return [module for module in modules(model) if STATE in module.__dict__]


def _module_of(model: Any) -> nn.Module | None:
    if isinstance(model, nn.Module):
        return model
    inner = getattr(model, "model", None)
    return inner if isinstance(inner, nn.Module) else None


def accelerate(model: Model, *, backend: str = "auto", strict: bool = False, cuda_graphs: bool = True) -> Model:
    """Lets fastbert run the encoders of BERT's family in a live model of another library; the same object comes back.

    model: a `BertModel`, `RobertaModel`, `XLMRobertaModel`, `CamembertModel`, `DistilBertModel` or `ElectraModel` of
    transformers, a `...For...` around one, what an `AutoModel...` gave, a pipeline, a wrapper (PEFT, DataParallel), a
    `SentenceTransformer` or a `CrossEncoder`. Arguments, outputs, state dict and parameters stay; rows of outputs at
    padding positions are zero, where transformers leaves unspecified values. What is not known (training mode,
    requested attentions, masks of pairs of tokens, texts padded on the left, caches, decoders, hooks inside ...) goes
    to the original forward: counted by reason, logged once each, shown by `fastbert.explain(model)`. What raises here
    runs there, too. strict=True makes a BackendError of it. backend: "auto", "triton", "cpu" or "torch". cuda_graphs:
    on a GPU, launch short batches as CUDA graphs.

    Doing it again changes nothing but the options. `restore` undoes it. Raises TypeError for what is no model,
    ValueError for a model without an encoder that is covered; both say what is.
    """
    options = Options(backend, strict, cuda_graphs)
    _ = options.policy  # raises ValueError for a backend that does not exist
    root = _module_of(model)
    if root is None:
        raise TypeError(f"model: got {type(model).__name__}, which is no model; covered: {mapping.covered()}")
    found, before = False, parts(model)
    passed_over: dict[str, str] = {}  # a class -> the covered one that it is derived from
    for module in list(root.modules()):
        state = module.__dict__.get(STATE)
        if isinstance(state, Counted):
            found = True
            if state.options != options:
                state.options = options
                state.forget()
            continue
        kind = _original(module)
        family = mapping.find(kind)
        if family is not None:
            found = True
            module.__class__ = derive_encoder(kind)
            module.__dict__[STATE] = State(options, family)
        elif (family := mapping.derived_from(kind)) is not None:
            passed_over[f"{kind.__module__}.{kind.__qualname__}"] = family.model
    reasons = "".join(
        f"; {name} is derived from {covered}, and may compute something else" for name, covered in passed_over.items()
    )
    if not found:
        name = type(model).__name__
        raise ValueError(f"model: found no encoder to accelerate in {name}{reasons}; covered: {mapping.covered()}")
    if reasons:
        logger.warning("accelerate: runs as it was before, in a part%s", reasons)
    for module in list(root.modules()):
        kind = _original(module)
        if STATE in module.__dict__:
            continue
        if mapping.is_of_sentences(kind, "SentenceTransformer"):
            from fastbert.adapters.sentences import SentenceState

            module.__class__ = derive_sentences(kind)
            module.__dict__[STATE] = SentenceState(options)
        elif mapping.is_of_sentences(kind, "CrossEncoder"):
            module.__class__ = derive_scores(kind)
            module.__dict__[STATE] = ScoreState(options)
    for module in parts(model):
        if module not in before:
            _announce(module, module.__dict__[STATE])
    return model


def _announce(module: nn.Module, state: Counted) -> None:
    """Logs why a model would never run here in the state that it is in, so that this is known before it is called.

    Training mode, in which models are made and which passes, is left to the first call.
    """
    reason: str | None = None
    try:
        if isinstance(state, State) and not module.training:
            reason = calls.model_obstacle(module) or LiveEncoder(module, state.mapping, state.options).obstacle()
        elif mapping.is_of_sentences(_original(module), "SentenceTransformer"):
            from fastbert.adapters.sentences import pipeline_in

            encoders = [part for part in module.modules() if isinstance(part.__dict__.get(STATE), State)]
            if not any(part.training for part in encoders):
                pipeline_in(module)
    except Exception as error:  # what the first call makes of it is its own affair
        reason = str(error)
    if reason is not None:
        logger.warning("accelerate: %s will run as it was before, whatever the inputs: %s", state.subject, reason)


def restore(model: Model) -> Model:
    """Undoes `accelerate`, in copies and unpickled models too, and gives the same object back."""
    for module in modules(model):
        kind = type(module)
        if kind in originals:
            module.__class__ = originals[kind][0]
        elif STATE in module.__dict__:
            name = f"{kind.__module__}.{kind.__qualname__}"
            raise ValueError(f"model: {name} was derived from the accelerated class; undo that first")
        module.__dict__.pop(STATE, None)
    return model


def _original(module: nn.Module) -> type:
    """The module's class, or what that was derived from: `type(accelerated)(config)` has no state."""
    kind = type(module)
    return originals[kind][0] if kind in originals else kind


def counts(model: Any) -> dict[str, int]:
    """How many calls ran here ("fastbert"), and how many by the original code, by reason."""
    total: Counter[str] = Counter()
    for module in parts(model):
        total.update(module.__dict__[STATE].counts)
    return dict(total)


def encoder_in(model: Any) -> BertModel | None:
    """Our BertModel on the modules of the first accelerated encoder in a model; None where there is none.

    Raises Unsupported where that encoder cannot be followed, and every call of it runs as before.
    """
    found = _first(model)
    return None if found is None else found[1].encoder(found[0]).model


def obstacle(model: Any) -> str | None:
    """Why a call of the first accelerated encoder would run as before, in the state it is in, whatever the inputs."""
    found = _first(model)
    if found is None:
        return None
    try:
        return calls.model_obstacle(found[0]) or found[1].encoder(found[0]).obstacle()
    except Unsupported as error:
        return str(error)


def notes(model: Any) -> Iterator[str]:
    """In words, for a report: where the calls of an accelerated model ran, and what is in the way of the next one."""
    done = ", ".join(f"{n} {reason}" for reason, n in counts(model).items())
    yield f"accelerated: calls by fastbert and, by reason, as before: {done or 'none yet'}"
    if (why_not := obstacle(model)) is not None:
        yield f"at the moment every call runs as before: {why_not}"


def _first(model: Any) -> tuple[nn.Module, State] | None:
    for module in parts(model):
        state = module.__dict__[STATE]
        if isinstance(state, State):
            return module, state
    return None
