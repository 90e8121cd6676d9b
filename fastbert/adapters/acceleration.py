"""This module accelerates and restores a live model: it replaces the class of an object by a subclass.

The subclass has the name and the module of the original class, because transformers reads them (architectures in
config.json, supported models of a pipeline, the recorders of hidden states). `classes.py` makes it, so that pickle
finds it. A pickle holds an object of the original class, and accelerates it when it is loaded.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from fastbert.adapters.classes import derive, derivers, originals
from fastbert.adapters.covered import covered_in_words, derived_from, find, is_of_sentences
from fastbert.adapters.forward import forward, model_obstacle
from fastbert.adapters.live_encoder import LiveEncoder, Unsupported
from fastbert.adapters.scores import ScoreState, predict
from fastbert.adapters.state import STATE, AcceleratedState, EncoderState
from fastbert.engine import Options
from fastbert.models.bert import BertModel

logger = logging.getLogger("fastbert")

Model = TypeVar("Model")


class Accelerated:
    """This class is a base of all derived classes. An object without a state works like one of the original class."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(max(int(protocol), 2))
        original = originals.get(type(self))
        if original is None or not isinstance(reduced, tuple):  # a user's subclass of the derived class
            return reduced
        kind, bases = original
        return (_blank, (kind, bases), *reduced[2:])


class AcceleratedEncoder(Accelerated):
    """This class precedes the encoder's class in the order of methods."""

    def train(self, mode: bool = True) -> Any:
        state = self.__dict__.get(STATE)
        if state is not None and not mode:
            state.invalidate()
        return super().train(mode)  # type: ignore[misc]

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        before = self._places()
        applied = super()._apply(*args, **kwargs)  # type: ignore[misc]
        state = self.__dict__.get(STATE)
        if state is not None and self._places() != before:  # `.to(device)` often changes nothing.
            state.forget()
        return applied

    def _places(self) -> list[tuple[int, torch.dtype, torch.device]]:
        parameters: Any = self.parameters()  # type: ignore[attr-defined]
        try:
            return [(p.data_ptr(), p.dtype, p.device) for p in parameters]
        except RuntimeError:  # Tensors without memory do not run here.
            return []


class AcceleratedSentences(Accelerated):
    """This class precedes SentenceTransformer in the order of methods."""


class AcceleratedScores(Accelerated):
    """This class precedes CrossEncoder in the order of methods."""


def _blank(original: type, mixin: str) -> Any:
    """Makes an object of the derived class, for pickle and copy to fill."""
    kind: Any = derivers[mixin](original)
    return kind.__new__(kind)


def derive_encoder(original: type) -> type:
    """Derives the class of accelerated encoders."""
    return derive(original, AcceleratedEncoder, "forward", forward)


def derive_sentences(original: type) -> type:
    """Derives the class of accelerated SentenceTransformers."""
    from fastbert.adapters import sentences

    return derive(original, AcceleratedSentences, "encode", sentences.encode)


def derive_scores(original: type) -> type:
    """Derives the class of accelerated CrossEncoders."""
    return derive(original, AcceleratedScores, "predict", predict)


derivers[AcceleratedEncoder.__name__] = derive_encoder
derivers[AcceleratedSentences.__name__] = derive_sentences
derivers[AcceleratedScores.__name__] = derive_scores


def modules(model: Any) -> list[nn.Module]:
    """Lists all modules of a module or of a pipeline around one, and nothing for other objects."""
    root = _module_of(model)
    return [] if root is None else list(root.modules())


def parts(model: Any) -> list[nn.Module]:
    """Lists the accelerated modules of a module or of a pipeline around one."""
    return [module for module in modules(model) if STATE in module.__dict__]


def _module_of(model: Any) -> nn.Module | None:
    if isinstance(model, nn.Module):
        return model
    inner = getattr(model, "model", None)
    return inner if isinstance(inner, nn.Module) else None


def accelerate(
    model: Model, *, backend: str = "auto", strict: bool = False, cuda_graphs: bool = True, strict_ids: bool = False
) -> Model:
    """Lets fastbert run the encoders of BERT's family in a live model of another library, and returns the same object.

    model: an encoder of transformers, such as `BertModel`, `RobertaModel` or `MPNetModel` (docs/drop-in.md lists all),
    a `...For...` model with such an encoder, the model of an `AutoModel...`, a pipeline, a wrapper (PEFT,
    DataParallel), a `SentenceTransformer` or a `CrossEncoder`. backend: "auto", "triton", "cpu" or "torch". strict:
    whether a call that fastbert cannot run raises BackendError. cuda_graphs: on a GPU, run short batches as CUDA
    graphs. strict_ids: on a GPU, each call waits for the check of its own ids; otherwise the next call raises.

    Arguments, outputs, state dict and parameters stay the same. Rows of outputs at padding positions are zero;
    transformers leaves unspecified values there. The original forward runs a call that fastbert does not support
    (requested attentions, masks for pairs of tokens, texts padded on the left, caches, decoders, hooks inside ...), and
    a call that raises an error in fastbert. Each reason is logged once, and `fastbert.explain(model)` shows the counts.

    fastbert runs training too, on packed tokens. The model's own parameters get the gradients. Dropout has the model's
    probabilities, but other random masks. Gradient checkpointing works layer by layer.

    A second call changes only the options. `restore` undoes the change. Raises TypeError for an object that is not a
    model, and ValueError for a model without a covered encoder. Both errors list the covered classes.
    """
    options = Options(backend=backend, strict=strict, cuda_graphs=cuda_graphs, strict_ids=strict_ids)
    root = _module_of(model)
    if root is None:
        raise TypeError(f"model: got {type(model).__name__}, expected a model; covered: {covered_in_words()}")
    has_encoder, before = False, parts(model)
    passed_over: dict[str, str] = {}  # A class, and the covered one that it is derived from.
    for module in list(root.modules()):
        state = module.__dict__.get(STATE)
        if isinstance(state, AcceleratedState):
            has_encoder = True
            if state.options != options:
                state.options = options
                state.forget()
            continue
        kind = _original(module)
        family = find(kind)
        if family is not None:
            has_encoder = True
            module.__class__ = derive_encoder(kind)
            module.__dict__[STATE] = EncoderState(options, family)
        elif (family := derived_from(kind)) is not None:
            passed_over[f"{kind.__module__}.{kind.__qualname__}"] = family.model
    reasons = "".join(
        f"; {name} is a subclass of {covered} and may compute another result" for name, covered in passed_over.items()
    )
    if not has_encoder:
        name = type(model).__name__
        if (code := next(filter(None, map(_code_from_hub, root.modules())), None)) is not None:
            reasons += (
                f"; {code} is Python code from the hub, which is not supported; fastbert.BertModel may read its files"
            )
        raise ValueError(f"model: found no encoder to accelerate in {name}{reasons}; covered: {covered_in_words()}")
    if reasons:
        logger.warning("accelerate: a part of the model still runs by the original code%s", reasons)
    for module in list(root.modules()):
        kind = _original(module)
        if STATE in module.__dict__:
            continue
        if is_of_sentences(kind, "SentenceTransformer"):
            from fastbert.adapters.live_pipeline import SentenceState

            module.__class__ = derive_sentences(kind)
            module.__dict__[STATE] = SentenceState(options)
            _note_padding_readers(module)
        elif is_of_sentences(kind, "CrossEncoder"):
            module.__class__ = derive_scores(kind)
            module.__dict__[STATE] = ScoreState(options)
    for module in parts(model):
        if module not in before:
            _announce(module, module.__dict__[STATE])
    return model


def _note_padding_readers(sentences: nn.Module) -> None:
    """Tells the encoders in a SentenceTransformer that its convolutions read rows of padding."""
    if any(is_of_sentences(type(child), "CNN") for child in sentences.modules()):
        for part in parts(sentences):
            state = part.__dict__[STATE]
            if isinstance(state, EncoderState):
                state.padding_reader = "CNN"


def _announce(module: nn.Module, state: AcceleratedState) -> None:
    """Warns before the first call if fastbert can never run the model in its present state, with the reason."""
    lasting: str | None = None
    try:
        if isinstance(state, EncoderState):
            lasting = model_obstacle(module) or LiveEncoder(module, state.mapping, state.options).obstacle()
        elif is_of_sentences(_original(module), "SentenceTransformer"):
            from fastbert.adapters.live_pipeline import pipeline_in

            pipeline_in(module)
    except Exception as error:  # The first call handles it by its own rules.
        lasting = str(error)
    if lasting is not None:
        logger.warning("accelerate: %s will always run by the original code: %s", state.subject, lasting)


def _code_from_hub(module: nn.Module) -> str | None:
    """Names the class of a module that trust_remote_code has loaded, or returns None."""
    kind = type(module)
    return f"{kind.__module__}.{kind.__qualname__}" if kind.__module__.startswith("transformers_modules.") else None


def restore(model: Model) -> Model:
    """Undoes `accelerate`, in copies and unpickled models too, and returns the same object."""
    for module in modules(model):
        kind = type(module)
        if kind in originals:
            module.__class__ = originals[kind][0]
        elif STATE in module.__dict__:
            name = f"{kind.__module__}.{kind.__qualname__}"
            raise ValueError(f"model: {name} is a subclass of the accelerated class; undo that first")
        module.__dict__.pop(STATE, None)
    return model


def _original(module: nn.Module) -> type:
    """Returns the original of a derived class, or the module's class. `type(accelerated)(config)` has no state."""
    kind = type(module)
    return originals[kind][0] if kind in originals else kind


def counts(model: Any) -> dict[str, int]:
    """Returns the numbers of calls: those by fastbert, and for each reason those by the original code."""
    total: Counter[str] = Counter()
    for module in parts(model):
        total.update(module.__dict__[STATE].counts)
    return dict(total)


def encoder_in(model: Any) -> BertModel | None:
    """Returns fastbert's BertModel on the modules of the first accelerated encoder in a model, or None without one.

    Raises Unsupported if fastbert does not support that encoder, so that the original code runs every call.
    """
    first = _first(model)
    return None if first is None else first[1].encoder(first[0]).model


def obstacle(model: Any) -> str | None:
    """Says why the original code runs every call of the first accelerated encoder, or returns None."""
    first = _first(model)
    if first is None:
        return None
    try:
        return model_obstacle(first[0]) or first[1].encoder(first[0]).obstacle()
    except Unsupported as error:
        return str(error)


def notes(model: Any) -> Iterator[str]:
    """Yields lines for a report: the counts of an accelerated model's calls, and the present obstacle."""
    done = ", ".join(f"{n} {reason}" for reason, n in counts(model).items())
    yield f"accelerated: calls by fastbert and, by reason, by the original code: {done or 'none yet'}"
    if (present_obstacle := obstacle(model)) is not None:
        yield f"at present every call runs by the original code: {present_obstacle}"


def _first(model: Any) -> tuple[nn.Module, EncoderState] | None:
    for module in parts(model):
        state = module.__dict__[STATE]
        if isinstance(state, EncoderState):
            return module, state
    return None
