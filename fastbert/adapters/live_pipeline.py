"""This module makes a fastbert pipeline from a live SentenceTransformer, or says why it cannot.

It supports a pipeline of Transformer, Pooling and any of Dense, LayerNorm, Dropout, Normalize. The tokenizer stays the
live one.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.adapters import versions
from fastbert.adapters.forward import model_obstacle
from fastbert.adapters.live_encoder import Unsupported
from fastbert.adapters.live_tokenizer import LiveTokenizer
from fastbert.adapters.patches import Watch
from fastbert.adapters.state import STATE, AcceleratedState, EncoderState
from fastbert.engine import Options
from fastbert.pipelines.modules import Normalize
from fastbert.pipelines.pipeline import POOLING_MODES, Pipeline, Pooling

PACKAGE = "sentence_transformers"
# Methods that encode of sentence-transformers calls, by version, and that our way to vectors leaves out.
_METHODS = frozenset(("forward", "__call__", "_inference", "preprocess", "tokenize"))
_PROBES = ["  A caf\u00e9, IN   Paris ", "word " * 600, "1"]


class SentenceState(AcceleratedState):
    """A `SentenceState` belongs to an accelerated SentenceTransformer. A copy has only the options."""

    def __init__(self, options: Options) -> None:
        super().__init__(options, "SentenceTransformer.encode")
        self._probed: Any = None
        self._watch: tuple[Any, Watch] | None = None  # The classes of the modules, and their watch.

    def __reduce__(self) -> Any:
        return SentenceState, (self.options,)

    def __deepcopy__(self, memo: Any) -> SentenceState:
        return SentenceState(self.options)

    def forget(self) -> None:
        """Drops the result of the comparison of tokens. The next call compares again."""
        self._probed = None

    def check_methods(self, live: nn.Module, modules: list[nn.Module]) -> None:
        """Raises Unsupported if a method that fastbert does not call was patched, in an object or in its class."""
        kinds = tuple(map(type, modules))
        if self._watch is None or self._watch[0] != kinds:
            original = next(kind for kind in reversed(type(live).__mro__) if kind.__name__ == type(live).__name__)
            self._watch = kinds, Watch((original, *kinds[:2]), names=_METHODS)
        if (patch := self._watch[1].obstacle()) is not None:
            raise Unsupported(patch)
        for module in (live, *modules[:2]):
            if not _METHODS.isdisjoint(module.__dict__.keys() - {"forward"}):
                raise Unsupported("a module has its own method")

    def check_tokens(self, transformer: nn.Module, tokenizer: LiveTokenizer) -> None:
        """Compares fastbert's tokens with the original's, once for each tokenizer and limit. Raises Unsupported."""
        probed = tokenizer.theirs, tokenizer.limit
        if self._probed is not None and self._probed[0] is probed[0] and self._probed[1] == probed[1]:
            return
        theirs = versions.preprocess(transformer, _PROBES)
        mask = theirs["attention_mask"].bool()
        ours = tokenizer.encode_packed(_PROBES)
        token_type_ids = theirs.get("token_type_ids", torch.zeros_like(theirs["input_ids"]))
        if not mask[:, 0].all():
            raise Unsupported("its texts are padded on the left")
        same_ids = torch.equal(theirs["input_ids"][mask], ours.input_ids)
        if not (same_ids and torch.equal(token_type_ids[mask], ours.token_type_ids)):
            raise Unsupported("its texts are tokenized by an unknown method")
        self._probed = probed


class Step:
    """A `Step` calls a live module after the pooling on vectors, (B, K) -> (B, M), in the dtype of its parameters."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, x: Tensor) -> Tensor:
        dtype = next((p.dtype for p in self.module.parameters()), x.dtype)
        out: Tensor = self.module({"sentence_embedding": x.to(dtype)})["sentence_embedding"]
        return out.to(x.dtype)

    def in_dtype(self, dtype: torch.dtype) -> Step:
        """Copies the step with weights in that dtype, for a reference."""
        return Step(copy.deepcopy(self.module).to(dtype))


def live_pipeline(live: Any, state: SentenceState, prompted: bool) -> Pipeline:
    """Makes a pipeline of the live modules, which each call checks again. Raises Unsupported."""
    modules: list[Any] = list(live.children())
    kinds = [_kind(module) for module in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or not set(kinds[2:]) <= {"Dense", "LayerNorm", "Dropout", "Normalize"}:
        raise Unsupported(f"a pipeline of {', '.join(kinds)}")
    for module in (live, *modules, getattr(modules[0], "auto_model", live)):
        own_forward = "forward" not in module.__dict__ or versions.is_own_forward(module)
        if module._forward_hooks or module._forward_pre_hooks or not own_forward:
            raise Unsupported("a module has hooks or its own forward")
    state.check_methods(live, modules)
    if getattr(live, "_distributed_inference", None) is not None or getattr(live, "_placement_is_delegated", False):
        raise Unsupported("its modules are placed on several devices")
    transformer, pooling, *tail = modules
    _check_transformer(transformer)
    for module in tail:
        for name in ("module_input_name", "module_output_name"):
            if getattr(module, name, "sentence_embedding") != "sentence_embedding":
                raise Unsupported(f"{name} of a {_kind(module)}")
    bert = transformer.auto_model
    inner = bert.__dict__.get(STATE)
    if not isinstance(inner, EncoderState):
        raise Unsupported(f"its model is a {type(bert).__name__}, which is not accelerated")
    encoder = inner.encoder(bert)
    if (obstacle := model_obstacle(bert) or encoder.obstacle()) is not None:
        raise Unsupported(obstacle)
    modes = versions.pooling_modes(pooling)
    if not modes or not set(modes) <= POOLING_MODES.keys():
        raise Unsupported(f"pooling by {modes}")
    if prompted and not pooling.include_prompt and "cls" in modes and versions.takes_prompt_for_cls(pooling):
        raise Unsupported(f"pooling by {', '.join(modes)} that leaves the prompt out")
    embeddings = encoder.model.embeddings
    limit = transformer.max_seq_length
    if limit is None or limit > encoder.model.longest_text:
        raise Unsupported(f"max_seq_length is {limit}")
    if not hasattr(embeddings.word_embeddings, "num_embeddings"):
        raise Unsupported("its word embeddings are an adapter")
    tokenizer = LiveTokenizer(transformer.tokenizer, limit, partial(versions.cleaned, transformer))
    if getattr(transformer.tokenizer, "padding_side", "right") != "right":  # Positions are columns of a padded batch.
        raise Unsupported("its texts are padded on the left")
    state.check_tokens(transformer, tokenizer)
    kept = [module for module in tail if _kind(module) != "Dropout"]
    return Pipeline(
        encoder.model,
        tokenizer,
        limit,
        Pooling(modes, pooling.include_prompt),
        tuple(Normalize() if _kind(module) == "Normalize" else Step(module) for module in kept),
        truncate_dim=live.truncate_dim,
    )


def pipeline_in(model: Any) -> Pipeline | None:
    """Makes the pipeline of an accelerated SentenceTransformer. Returns None for other models. Raises Unsupported."""
    state = model.__dict__.get(STATE) if isinstance(model, nn.Module) else None
    return live_pipeline(model, state, False) if isinstance(state, SentenceState) else None


def _check_transformer(transformer: Any) -> None:
    """Raises Unsupported for settings of the Transformer module that fastbert does not support."""
    expected: dict[str, tuple[Any, ...]] = {
        "backend": ("torch",),
        "transformer_task": ("feature-extraction",),
        "module_output_name": ("token_embeddings",),
        "query_expansion": (None,),
        "query_length": (None,),
        "document_length": (None,),
        "processing_kwargs": ({}, None),
    }
    for name, values in expected.items():
        value = getattr(transformer, name, values[0])
        if value not in values:
            raise Unsupported(f"{name} is {value!r}")
    modality = getattr(transformer, "modality_config", None)
    if modality is not None:
        text = modality.get("text") or {}
        if "message" in modality or text.get("method") != "forward":
            raise Unsupported("its texts do not go through forward")
        if text.get("method_output_name") not in ("last_hidden_state", ("last_hidden_state",), ["last_hidden_state"]):
            raise Unsupported(f"it reads {text.get('method_output_name')} of the model's output")


def _kind(module: Any) -> str:
    """Names the class of a module, with its Python module if it is not of sentence-transformers."""
    kind = type(module)
    return kind.__name__ if kind.__module__.split(".")[0] == PACKAGE else f"{kind.__module__}.{kind.__name__}"
