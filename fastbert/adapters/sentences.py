"""SentenceTransformer.encode, packed from text to vector: fastbert's SentenceEncoder machinery over the live modules.

A pipeline of Transformer, Pooling and any of Dense, LayerNorm, Dropout, Normalize is known; its tokenizer stays theirs.
What else there is, and what `encode` is asked for besides vectors or token vectors of texts, goes to the original.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastbert.adapters import forward as calls
from fastbert.adapters import versions
from fastbert.adapters.forward import OURS, STATE, Counted, State
from fastbert.adapters.live_encoder import Options, Unsupported
from fastbert.adapters.patches import Watch
from fastbert.ops import tracing
from fastbert.pipelines.api import TWO_PROMPTS
from fastbert.pipelines.batching import default_token_budget
from fastbert.pipelines.modules import Normalize
from fastbert.pipelines.pipeline import POOLING_MODES, Pipeline, Pooling
from fastbert.pipelines.run import Request, Run
from fastbert.text import windows
from fastbert.text.encoding import PackedEncoding

logger = logging.getLogger("fastbert")

PACKAGE = "sentence_transformers"
BY_WORKERS = "by the processes of a pool"  # what a call is counted as that others run
_PRECISIONS = ("float32", "int8", "uint8", "binary", "ubinary")
# What encode comes to in sentence-transformers, by version, and what our way to vectors leaves out.
_METHODS = frozenset(("forward", "__call__", "_inference", "preprocess", "tokenize"))
_PROBES = ["  A caf\u00e9, IN   Paris ", "word " * 600, "1"]


class SentenceState(Counted):
    """What an accelerated SentenceTransformer carries. A copy has the options alone."""

    def __init__(self, options: Options) -> None:
        super().__init__(options, "SentenceTransformer.encode")
        self._probed: Any = None
        self._watch: tuple[Any, Watch] | None = None  # the classes of the modules, and the watch over their methods

    def __reduce__(self) -> Any:
        return SentenceState, (self.options,)

    def __deepcopy__(self, memo: Any) -> SentenceState:
        return SentenceState(self.options)

    def forget(self) -> None:
        self._probed = None

    def check_methods(self, live: nn.Module, modules: list[nn.Module]) -> None:
        """Raises Unsupported where a method that our way leaves out was patched: of an object or of its class."""
        kinds = tuple(map(type, modules))
        if self._watch is None or self._watch[0] != kinds:
            original = next(kind for kind in reversed(type(live).__mro__) if kind.__name__ == type(live).__name__)
            self._watch = kinds, Watch((original, *kinds[:2]), names=_METHODS)
        if (patched := self._watch[1].reason()) is not None:
            raise Unsupported(patched)
        for module in (live, *modules[:2]):
            if not _METHODS.isdisjoint(module.__dict__):
                raise Unsupported("a module has a method of its own")

    def check_tokens(self, transformer: nn.Module, tokenizer: LiveTokenizer) -> None:
        """Compares our way to tokens with theirs, once for each tokenizer and limit. Raises Unsupported."""
        probed = tokenizer.theirs, tokenizer.limit
        if self._probed is not None and self._probed[0] is probed[0] and self._probed[1] == probed[1]:
            return
        theirs = versions.preprocess(transformer, _PROBES)
        mask = theirs["attention_mask"].bool()
        ours = tokenizer.encode_packed(_PROBES)
        types = theirs.get("token_type_ids", torch.zeros_like(theirs["input_ids"]))
        if not mask[:, 0].all():
            raise Unsupported("its texts are padded on the left")
        same = torch.equal(theirs["input_ids"][mask], ours.input_ids) and torch.equal(types[mask], ours.token_type_ids)
        if not same:
            raise Unsupported("its texts become tokens in a way that is not known")
        self._probed = probed


class LiveTokenizer:
    """A tokenizer of transformers, with what `Run` and `verify` ask of ours: packed rows, truncated by itself.

    limit: tokens of a text, at most. cleaned: what becomes of texts before the tokenizer sees them.
    """

    def __init__(self, theirs: Any, limit: int, cleaned: Callable[[list[str]], list[str]] = list) -> None:
        self.theirs, self.limit, self.cleaned = theirs, limit, cleaned
        self.rust = theirs.backend_tokenizer if getattr(theirs, "is_fast", False) else None
        self._splits: bool | None = (
            None  # whether a text may be cut before it is tokenised; asked at the first long one
        )

    @property
    def model_max_length(self) -> int:
        """The limit, under the name of our tokenizer."""
        return self.limit

    @property
    def all_special_ids(self) -> list[int]:
        ids: list[int] = self.theirs.all_special_ids
        return ids

    def encode_packed(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        *,
        max_length: int | None = None,
        warn: bool = True,
    ) -> PackedEncoding:
        """The tokens of texts, packed, as our tokenizer gives them. Raises Unsupported for pairs."""
        if pairs is not None:
            raise Unsupported("pairs of texts")
        texts = self.cleaned(list(texts))
        limit = self.limit if max_length is None else min(max_length, self.limit)
        parts: list[tuple[np.ndarray, np.ndarray]] = [(np.empty(0, np.int64),) * 2]
        lengths = [0]
        for first, last in windows.spans(texts, windows.TEXTS, windows.CHARACTERS):
            ids, types = self._rows(texts[first:last], limit)
            sizes = list(map(len, ids))
            flat = [np.fromiter(chain.from_iterable(rows), np.int64, sum(sizes)) for rows in (ids, types)]
            parts.append((flat[0], flat[1]))
            lengths += sizes
        ends = np.cumsum(lengths).astype(np.int32)
        input_ids, token_type_ids = (torch.from_numpy(np.concatenate(rows)) for rows in zip(*parts, strict=True))
        return PackedEncoding(input_ids, token_type_ids, torch.from_numpy(ends), 0, 0)

    def _rows(self, texts: list[str], limit: int) -> tuple[list[list[int]], list[list[int]]]:
        """Ids and segment ids of a few texts. Of long ones Rust sees no more than it takes to fill the limit."""
        size = 256 + 16 * limit  # characters
        found = self._whole([self._cut(text, size) for text in texts], limit)
        # What does not fill the limit is tried again with more of its text.
        while short := [i for i, row in enumerate(found) if len(row[0]) < limit and self._is_long(texts[i], size)]:
            size *= 8
            for i, row in zip(short, self._whole([self._cut(texts[i], size) for i in short], limit), strict=True):
                found[i] = row
        ids, types = [row[0] for row in found], [row[1] for row in found]
        return ids, types

    def _is_long(self, text: str, size: int) -> bool:
        """Whether it pays to cut the text, and whether that can be done without changing its tokens."""
        if len(text) <= 2 * size or self.rust is None:
            return False
        if self._splits is None:
            self._splits = windows.splits(self.rust)
        return self._splits

    def _cut(self, text: str, size: int) -> str:
        return windows.cut(text, size, self.theirs.truncation_side == "left") if self._is_long(text, size) else text

    def _whole(self, texts: list[str], limit: int) -> list[tuple[list[int], list[int]]]:
        """(ids, segment ids) of each text, truncated."""
        how = {"padding": False, "truncation": "longest_first", "max_length": limit}
        ids: Any = None
        types: Any = None
        if self.rust is not None:
            self.theirs([""], **how)  # sets the truncation of the Rust object, as any call does
            encodings = self.rust.encode_batch(texts)
            if self.rust.padding is None:  # or another thread's call has set it meanwhile
                ids, types = [e.ids for e in encodings], [e.type_ids for e in encodings]
        if ids is None:
            found = self.theirs(texts, **how)
            ids, types = found["input_ids"], found.get("token_type_ids")
        if "token_type_ids" not in self.theirs.model_input_names or types is None:
            types = [[0] * len(row) for row in ids]
        return list(zip(ids, types, strict=True))


class Step:
    """A live module after the pooling, as a function of vectors: (B, K) -> (B, M), in the dtype of its parameters."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, x: Tensor) -> Tensor:
        dtype = next((p.dtype for p in self.module.parameters()), x.dtype)
        out: Tensor = self.module({"sentence_embedding": x.to(dtype)})["sentence_embedding"]
        return out.to(x.dtype)

    def in_dtype(self, dtype: torch.dtype) -> Step:
        """The same with weights in that dtype, for a reference."""
        return Step(copy.deepcopy(self.module).to(dtype))


def encode(live: Any, state: SentenceState, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """SentenceTransformer.encode: arguments, order and dtypes of the original."""
    names = calls.parameter_names(original)
    call = {**dict(zip(names, args, strict=False)), **kwargs}
    texts: Any = call.pop("sentences", None) if "sentences" in call else call.pop("inputs", None)
    clash = len(args) > len(names) or len(call) + 1 < len(args) + len(kwargs)
    if clash or _is_wrong(live, texts, call):
        return original(live, *args, **kwargs)  # which raises, or has nothing to do
    if call.get("pool") is not None or isinstance(call.get("device"), (list, tuple)):
        state.counts[BY_WORKERS] += 1  # in whose processes the encoder of a copy is accelerated
        return original(live, *args, **kwargs)
    try:
        if (reason := tracing.observed()) is not None:
            raise Unsupported(reason)
        plan = _Plan(live, texts, call)
        if any(module.training for module in live.modules()):
            live.eval()
        pipeline = _pipeline(live, state, bool(plan.prompt))
        found = plan.run(pipeline)
    except Unsupported as error:
        state.decline(str(error))
        return original(live, *args, **kwargs)
    except Exception as error:
        return calls.after_error(error, live, state, original, args, kwargs)
    state.counts[OURS] += 1
    return found


def _is_wrong(live: Any, texts: Any, call: dict[str, Any]) -> bool:
    """Whether the original would raise, or return something empty."""
    batch_size, name = call.get("batch_size", 32), call.get("prompt_name")
    wrong_size = isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1
    wrong_prompt = call.get("prompt") is None and name is not None and name not in live.prompts
    empty = texts is None or (hasattr(texts, "__len__") and not isinstance(texts, str) and len(texts) == 0)
    return wrong_size or wrong_prompt or empty or call.get("precision", "float32") not in (*_PRECISIONS, None)


class _Plan:
    """What a call of encode asks for. Raises Unsupported for what only the original does."""

    def __init__(self, live: Any, texts: Any, call: dict[str, Any]) -> None:
        known = ("prompt_name", "prompt", "batch_size", "show_progress_bar", "output_value", "precision",
                 "convert_to_numpy", "convert_to_tensor", "device", "normalize_embeddings", "truncate_dim",
                 "chunk_size", "task")  # fmt: skip
        for name, value in call.items():
            if name not in known and value is not None:
                raise Unsupported(f"the argument {name}")
        device = call.get("device")
        if device is not None and (isinstance(device, (list, tuple)) or not _same_device(device, live.device)):
            raise Unsupported("another device than the model's, or several")
        self.output_value = call.get("output_value", "sentence_embedding")
        if self.output_value not in ("sentence_embedding", "token_embeddings"):
            raise Unsupported(f"output_value={self.output_value!r}")
        self.single = isinstance(texts, str)
        if not self.single and (isinstance(texts, (dict, Tensor)) or not hasattr(texts, "__len__")):
            raise Unsupported(f"inputs in a {type(texts).__name__}")
        self.texts: list[str] = [texts] if self.single else getattr(texts, "tolist", lambda: list(texts))()
        if not all(type(text) is str for text in self.texts):
            raise Unsupported("inputs that are not all str")
        prompt, prompt_name = call.get("prompt"), call.get("prompt_name")
        if prompt is None:
            prompt_name = live.default_prompt_name if prompt_name is None else prompt_name
            prompt = None if prompt_name is None else live.prompts.get(prompt_name)
        elif prompt_name is not None:
            logger.warning(TWO_PROMPTS)
        self.prompt = prompt or ""
        self.precision = call.get("precision", "float32") or "float32"
        self.to_tensor = bool(call.get("convert_to_tensor", False))
        self.to_numpy = bool(call.get("convert_to_numpy", True)) and not self.to_tensor
        show = call.get("show_progress_bar")
        if show is None:
            show = logging.getLogger(PACKAGE).getEffectiveLevel() in (logging.INFO, logging.DEBUG)
        self.show = bool(show)
        truncate_dim = call.get("truncate_dim")
        self.truncate_dim = live.truncate_dim if truncate_dim is None else truncate_dim
        self.normalize = bool(call.get("normalize_embeddings", False))
        self.batch_size = call.get("batch_size")

    def run(self, pipeline: Pipeline) -> Any:
        if self.batch_size is not None:
            # The most tokens that the original would hold at once, which is what the caller knows to fit.
            most = min(self.batch_size * pipeline.max_seq_length, default_token_budget(pipeline.device))
            pipeline = replace(pipeline, token_budget=most)
        on_host = self.output_value == "sentence_embedding" and (self.to_numpy or self.precision != "float32")
        with _progress(self.show, len(self.texts)) as progress:
            request = Request(
                prompt=self.prompt,
                output_value=self.output_value,
                normalize=self.normalize,
                truncate_dim=self.truncate_dim,
                single=self.single,
                on_host=on_host,
                progress=progress,
            )
            windows = list(Run(pipeline, request).windows(self.texts))
        if self.output_value == "token_embeddings":
            items = [item for window in windows for item in window]
            return items[0] if self.single else items
        found = windows[0] if len(windows) == 1 and not windows[0].is_pinned() else torch.cat(windows)
        dtype = pipeline.model.dtype
        as_numpy = self.to_numpy or self.precision != "float32"
        # NumPy has no bfloat16: float32 is what the original gives as well.
        return self._finished(found if as_numpy and dtype == torch.bfloat16 else found.to(dtype))

    def _finished(self, vectors: Tensor) -> Any:
        """(n, dim) vectors in the form that was asked for."""
        found: Any = vectors
        if self.precision != "float32":
            found = versions.quantize_embeddings(vectors.cpu().numpy(), self.precision)
        if self.to_tensor:
            found = torch.as_tensor(found)
        elif self.to_numpy and isinstance(found, Tensor):
            found = found.cpu().numpy()
        elif not self.to_numpy:
            found = list(torch.from_numpy(found) if isinstance(found, np.ndarray) else found)
        return found[0] if self.single else found


def _pipeline(live: Any, state: SentenceState, prompted: bool) -> Pipeline:
    """The live modules, looked at anew for each call. Raises Unsupported."""
    modules: list[Any] = list(live.children())
    kinds = [_kind(module) for module in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or not set(kinds[2:]) <= {"Dense", "LayerNorm", "Dropout", "Normalize"}:
        raise Unsupported(f"a pipeline of {', '.join(kinds)}")
    for module in (live, *modules, getattr(modules[0], "auto_model", live)):
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            raise Unsupported("a module has hooks or a forward of its own")
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
    if not isinstance(inner, State):
        raise Unsupported(f"its model is a {type(bert).__name__}, which is not accelerated")
    encoder = inner.encoder(bert)
    if (reason := calls.model_obstacle(bert) or encoder.obstacle()) is not None:
        raise Unsupported(reason)
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
    if getattr(transformer.tokenizer, "padding_side", "right") != "right":  # positions are columns, of a padded batch
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
    """What `encode` of an accelerated SentenceTransformer would run; None for anything else. Raises Unsupported."""
    state = model.__dict__.get(STATE) if isinstance(model, nn.Module) else None
    return _pipeline(model, state, False) if isinstance(state, SentenceState) else None


def _check_transformer(transformer: Any) -> None:
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
            raise Unsupported("its texts take another way than forward")
        if text.get("method_output_name") not in ("last_hidden_state", ("last_hidden_state",), ["last_hidden_state"]):
            raise Unsupported(f"it reads {text.get('method_output_name')} of the model's output")


def _kind(module: Any) -> str:
    """The name of a class of sentence-transformers itself; of others with where they come from."""
    kind = type(module)
    return kind.__name__ if kind.__module__.split(".")[0] == PACKAGE else f"{kind.__module__}.{kind.__name__}"


def _same_device(given: Any, present: torch.device) -> bool:
    wanted = torch.device(given)
    return wanted.type == present.type and (wanted.index is None or wanted.index == present.index)


@contextmanager
def _progress(show: bool, total: int) -> Iterator[Callable[[int], Any] | None]:
    if not show:
        yield None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc="Encoding", unit="text") as bar:
        yield bar.update
