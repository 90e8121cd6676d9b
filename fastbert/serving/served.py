"""A Served is a model behind one interface, which turns texts into items, and items into results."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastbert import ops
from fastbert.pipelines.batching import default_token_budget
from fastbert.pipelines.cross import CrossEncoder
from fastbert.pipelines.entities import Entity, EntityRecognizer, WindowedText
from fastbert.pipelines.inputs import encode_texts
from fastbert.pipelines.run import HeadItems, Request, Run, logits
from fastbert.pipelines.sentence import SentenceEncoder
from fastbert.pipelines.token_logits import token_logits
from fastbert.serving.work import Item, Lane, join, split
from fastbert.text import offsets
from fastbert.vectors import sparse

# Models on a CPU take turns, because each uses all cores.
_CPU = threading.Lock()


@dataclass
class Tokens:
    """A Tokens holds the tokenized texts of a request.

    windowed: the windows of texts, for a model that reads texts in windows.
    """

    items: list[Item]
    n_truncated: int = 0
    n_truncated_tokens: int = 0
    windowed: Sequence[WindowedText] = ()

    @property
    def n_tokens(self) -> int:
        return sum(item.n_tokens for item in self.items)


def n_characters(text: Any) -> int:
    """Returns the number of characters of a text or a pair, or the length of a list of ids."""
    return len(text) + len(getattr(text, "second", ""))


class Served:
    """A Served has a name, a model and the tasks of this model.

    model: a SentenceEncoder, a CrossEncoder or an EntityRecognizer. `encode` may run in several threads at once,
    `compute` only in one.
    """

    kind = ""
    tasks: frozenset[str]
    limit: int | None  # the most tokens of a text, None if windows are used

    def __init__(self, name: str, model: Any) -> None:
        self.name, self.model, self.tokenizer = name, model, model.tokenizer
        self.n_threads = 0  # threads of C++ kernels and PyTorch, as the worker sees them
        self.bert = model.model if isinstance(model, SentenceEncoder) else model.model.bert

    @property
    def token_budget(self) -> int:
        """Returns the most tokens in a batch."""
        return self.model.token_budget or default_token_budget(self.bert.device)

    def encode(self, lane: Lane, texts: list[Any]) -> Tokens:
        """Tokenizes texts and pairs of texts (`Pair`), or takes lists of token ids."""
        if texts and isinstance(texts[0], list):
            return self._of_ids(lane, texts)
        encoded = encode_texts(self._cutting(lane.side), texts, lane.prompt, self.limit_of(lane))
        self.bert.check_ids(encoded.input_ids, encoded.token_type_ids)
        return Tokens(split(encoded), encoded.n_truncated, encoded.n_truncated_tokens)

    def _cutting(self, side: str) -> Any:
        """Returns the tokenizer, or a copy that truncates texts on this side."""
        if side in ("", self.tokenizer.truncation_side):
            return self.tokenizer
        tokenizer = copy.copy(self.tokenizer)
        tokenizer.truncation_side = side
        return tokenizer

    def limit_of(self, lane: Lane) -> int:
        """Returns the greatest number of tokens of a text in a lane."""
        assert self.limit is not None
        return self.limit

    def bound(self, lane: Lane, text: Any) -> int:
        """Returns an upper bound of a text's tokens from its characters, without tokenizing it."""
        n_special = self.tokenizer.num_special_tokens(True)
        n_tokens = n_characters(text) + n_special + (0 if isinstance(text, list) else len(lane.prompt))
        return n_tokens if self.limit is None else min(n_tokens, self.limit_of(lane))

    def _of_ids(self, lane: Lane, rows: list[list[int]]) -> Tokens:
        """Returns rows of token ids as tokens. A row without special tokens at its ends gets them."""
        template = self.tokenizer.template(False)
        n_special, limit = offsets.n_special_tokens(template), self.limit_of(lane)
        n_before = offsets.n_special_tokens(template, 0)
        special = [piece.ids[0] for piece in template if piece.source < 0]
        from_left = (lane.side or self.tokenizer.truncation_side) == "left"
        bare, n_truncated, n_cut = [], 0, 0
        for row in rows:
            end = len(row) - (n_special - n_before)
            if end >= n_before and row[:n_before] + row[end:] == special:
                row = row[n_before:end]
            n_kept = min(limit - n_special, len(row))
            kept = row[len(row) - n_kept :] if from_left else row[:n_kept]
            n_truncated, n_cut = n_truncated + (len(kept) < len(row)), n_cut + len(row) - len(kept)
            bare.append(kept)
        return Tokens(split(offsets.pack(template, bare)), n_truncated, n_cut)

    def compute(self, lane: Lane, items: list[Item]) -> list[Any]:
        """Returns a result for each item, and a NotFinite for a result with NaN or infinity."""
        self.n_threads = torch.get_num_threads()
        with _turn(self.bert.device):
            return _checked(self._compute(lane, items))

    def compute_here(self, lane: Lane, items: list[Item]) -> list[Any] | None:
        """Does the same as `compute`, or returns None if it would wait for another model or use several threads.

        OpenMP's threads belong to the thread that calls them. A second group would slow the first one down.
        """
        if self.bert.device.type != "cpu" or torch.get_num_threads() > 1 or not _CPU.acquire(blocking=False):
            return None
        try:
            return _checked(self._compute(lane, items))
        finally:
            _CPU.release()

    def _compute(self, lane: Lane, items: list[Item]) -> list[Any]:
        raise NotImplementedError


class NotFinite(ArithmeticError):
    """A NotFinite replaces a result with NaN or infinity, which JSON does not support."""


class ServedEncoder(Served):
    """A ServedEncoder makes vectors. Its tasks are "embed", "embed_all" and "sparse".

    The results are (dim,) float32, (tokens, dim) float32, and (ids, weights) of sparse vectors.
    """

    kind = "embedding"

    def __init__(self, name: str, model: SentenceEncoder) -> None:
        super().__init__(name, model)
        self.limit = model.max_seq_length
        dense = {"embed", "embed_all"} if model.has_dense else {"embed_all"}
        self.tasks = frozenset(dense | ({"sparse"} if "sparse" in model.outputs else set()))
        self._multi = not model.has_dense and "multi" in model.outputs

    @property
    def pooling(self) -> str:
        """Returns the name of the pooling, for /info."""
        if self.model.has_dense:
            return "+".join(self.model.pooling.modes)
        return "splade" if "sparse" in self.tasks else "none"

    def limit_of(self, lane: Lane) -> int:
        head: Any = self.model.heads["multi"] if self._multi else None
        return head.limit("document", self.model.max_seq_length) if head else self.model.max_seq_length

    def _compute(self, lane: Lane, items: list[Item]) -> list[Any]:
        request = Request(lane.prompt, normalize=lane.normalize, truncate_dim=lane.dimensions, on_host=True)
        if lane.task == "sparse":
            head: Any = self.model.heads["sparse"]
            request.head, request.batch_size = HeadItems("sparse", head), head.texts_in_batch(self.bert.device)
        elif lane.task == "embed_all" and self._multi:
            options = {"task": "document", "normalize": lane.normalize}
            request.head = HeadItems("multi", self.model.heads["multi"], options)
        elif lane.task == "embed_all":
            request.output_value = "token_embeddings"
        results: Any = Run(self.model.pipeline, request).compute(join(items))
        if lane.task == "sparse":
            limit = self.model.max_active_dims
            kept = (sparse.largest(places, numbers, limit) for places, numbers in results)
            return [(_numpy(places), _numpy(numbers)) for places, numbers in kept]
        if lane.task == "embed_all":
            return [_numpy(vectors) for vectors in results]
        return list(_numpy(results))


class ServedClassifier(Served):
    """A ServedClassifier scores texts and pairs. Its tasks are "predict", and "rerank" for one label.

    The results are (labels,) float32: logits, or the sigmoid of one label or the softmax over several.
    """

    kind = "classifier"

    def __init__(self, name: str, model: CrossEncoder) -> None:
        super().__init__(name, model)
        self.limit = model.max_seq_length
        self.tasks = frozenset({"predict", "rerank"} if model.num_labels == 1 else {"predict"})
        self.kind = "reranker" if model.num_labels == 1 else "classifier"
        # In a multi-label model each label has its own probability.
        self._independent = model.num_labels == 1 or model.config.problem_type == "multi_label_classification"

    def _compute(self, lane: Lane, items: list[Item]) -> list[Any]:
        with torch.inference_mode():
            scores = logits(self.model.pipeline, join(items), None, None)
            if not lane.raw:
                policy = self.bert.policy
                activate = torch.sigmoid if self._independent else partial(torch.softmax, dim=1)
                scores = ops.elementwise(activate, scores, policy=policy)
        return list(_numpy(scores))


class ServedTagger(Served):
    """A ServedTagger finds entities. Its task is "entities".

    The results are (T, labels) float32 logits of all rows of a text. `entities` makes the entities from them.
    """

    kind = "tagger"
    tasks = frozenset({"entities"})
    limit = None
    model: EntityRecognizer

    def encode(self, lane: Lane, texts: list[Any]) -> Tokens:
        windowed = self.model.windows(texts)
        items = []
        for text in windowed:
            rows = self.model.pack([text])
            items.append(Item(rows.input_ids, rows.token_type_ids, rows.cu_seqlens.diff().tolist()))
        return Tokens(items, windowed=windowed)

    def _compute(self, lane: Lane, items: list[Item]) -> list[Any]:
        of_tokens = token_logits(self.model.model, join(items), self.model.token_budget)
        ends = np.cumsum([item.n_tokens for item in items])
        return np.split(of_tokens, ends[:-1])

    def entities(self, text: WindowedText, of_tokens: np.ndarray, strategy: str | None, ignore: Any) -> list[Entity]:
        """Returns the entities of a text. strategy, ignore: None means the model's own."""
        recognizer = self.model
        if strategy is not None or ignore is not None:
            recognizer = copy.copy(recognizer)
            recognizer.strategy = strategy or recognizer.strategy
            recognizer.ignore_labels = recognizer.ignore_labels if ignore is None else frozenset(ignore)
        return recognizer.entities(text, of_tokens)


def serve_model(name: str, model: Any) -> Served:
    """Returns the `Served` of a model. Raises TypeError for another kind of model."""
    kinds: dict[type, type[Served]] = {
        SentenceEncoder: ServedEncoder,
        CrossEncoder: ServedClassifier,
        EntityRecognizer: ServedTagger,
    }
    for model_class, served in kinds.items():
        if isinstance(model, model_class):
            return served(name, model)
    raise TypeError(f"model: got {type(model).__name__}, expected a SentenceEncoder, CrossEncoder or EntityRecognizer")


def _turn(device: torch.device) -> AbstractContextManager[Any]:
    return _CPU if device.type == "cpu" else nullcontext()


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.to(torch.float32 if tensor.is_floating_point() else tensor.dtype).cpu().numpy()


def _checked(results: list[Any]) -> list[Any]:
    return [result if _is_finite(result) else NotFinite() for result in results]


def _is_finite(result: Any) -> bool:
    array = result[1] if isinstance(result, tuple) else result
    return bool(np.isfinite(array).all())
