"""A run is one call of a pipeline: windows of texts become tokens, and batches of them become vectors or logits.

README.md shows how tokenizing and computing overlap.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastbert.checks import check_text
from fastbert.models.bert import BertModel
from fastbert.models.encoded import Encoded
from fastbert.ops import packing, silent_writes
from fastbert.pipelines.batching import default_token_budget, in_batches
from fastbert.pipelines.inputs import encode_texts, n_prompt_tokens
from fastbert.pipelines.pipeline import Pipeline
from fastbert.pipelines.pool import Pool
from fastbert.pipelines.pooling import sentence_vectors
from fastbert.pipelines.progress import Progress
from fastbert.text.encoding import PackedEncoding
from fastbert.text.windows import WINDOW_CHARACTERS

logger = logging.getLogger("fastbert")

WINDOW = 16384  # most texts tokenised and sorted at once; WINDOW_CHARACTERS limits them, too
FIRST_WINDOW = 1024  # of a call that overlaps: the GPU waits until it is tokenised
AHEAD = 2  # windows that are tokenised, or in work, before the calling thread needs them


@dataclass(slots=True)
class HeadItems:
    """A HeadItems calls a head of an encoder for the items of a batch's texts, one for each.

    output: the name of the head. module: the head, None on the way to another process. options: its further arguments.
    """

    output: str
    module: Any
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(
        self, model: BertModel, batch: packing.PackedBatch, input_ids: Tensor, token_type_ids: Tensor
    ) -> list[Any]:
        # A head reads ids beside hidden states, so it needs them on the device.
        ids = (packing.to_device(each, batch.cu_seqlens.device) for each in (input_ids, token_type_ids))
        return self.module.items(model, batch, *ids, **self.options)


@dataclass(slots=True)
class Request:
    """A Request holds the arguments of one call.

    single: the input was one text and not a list, so errors name no index. even: windows do not grow to WINDOW texts;
    all have the same number, also the first. on_host: vectors are read on the host, as numbers, so they may be
    inference tensors. max_length: the most tokens of a text, if it is not the pipeline's max_seq_length. head: makes
    the items of a batch's texts, instead of pooling. pool: its processes compute; None for this process. own_pool:
    whether the pool runs for this call alone. n_left_out: tokens at the start of each text that pooling leaves out,
    besides a prompt's.
    """

    prompt: str = ""
    batch_size: int | None = None
    output_value: str | None = "sentence_embedding"
    normalize: bool = False
    truncate_dim: int | None = None
    single: bool = False
    even: bool = False
    on_host: bool = False
    max_length: int | None = None
    progress: Progress | None = None
    head: HeadItems | None = None
    pool: Pool | None = None
    own_pool: bool = False
    n_left_out: int = 0


@dataclass
class Timings:
    """Timings are the times of the parts of one call, in seconds.

    overlapped: tokenizing ran in a thread beside the rest. Then waiting_for_tokens and waiting_for_device are the times
    that the calling thread waited for tokens and for vectors.
    """

    texts: int = 0
    tokens: int = 0
    tokenizing: float = 0.0
    waiting_for_tokens: float = 0.0
    waiting_for_device: float = 0.0
    total: float = 0.0
    overlapped: bool = False

    @property
    def bottleneck(self) -> str:
        """Names the slower part, "tokenizing" or "model"; if they overlap, the part that the other waits for."""
        if self.overlapped:
            return "tokenizing" if self.waiting_for_tokens > self.waiting_for_device else "model"
        return "tokenizing" if self.tokenizing > self.total / 2 else "model"

    def __str__(self) -> str:
        text = f"{self.texts:,} texts, {self.tokens:,} tokens in {self.total:.3g} s, {self.tokenizing:.3g} s tokenizing"
        if self.overlapped:
            waits = f"{self.waiting_for_tokens:.3g} s for tokens and {self.waiting_for_device:.3g} s for the device"
            text += f" in a thread beside it; waited {waits}"
        return f"{text}; the bottleneck is {'tokenizing' if self.bottleneck == 'tokenizing' else 'the model'}"


def overlaps(device: torch.device) -> bool:
    """Tells whether tokenizing and computing run at the same time."""
    return device.type == "cuda"


class Run:
    """A Run is one call of a pipeline. `windows` does the work, and afterwards `timings` has the times."""

    def __init__(self, pipeline: Pipeline, request: Request) -> None:
        self.pipeline, self.request = pipeline, request
        self.model = pipeline.model
        self.device = self.model.device
        self.limit = request.max_length or pipeline.max_seq_length
        pooling, left_out = pipeline.pooling, request.n_left_out
        if request.prompt and pooling is not None and not pooling.include_prompt:
            left_out = n_prompt_tokens(pipeline.tokenizer, request.prompt, self.limit)
        self.n_left_out = left_out
        # With output_value None sentence-transformers returns the output of the modules, without a further
        # normalisation.
        self._vectors = partial(
            sentence_vectors,
            pipeline,
            n_prompt_tokens=left_out,
            normalize=request.normalize and request.output_value is not None,
            truncate_dim=request.truncate_dim,
        )
        self.n_texts = self.n_truncated = self.n_truncated_tokens = 0
        self.timings = Timings(overlapped=overlaps(self.device))
        self.windows_grow = self.timings.overlapped and not request.even

    def windows(self, texts: Iterable[str]) -> Iterator[Any]:
        """Yields the result of each window: (n, dim) vectors, or a list for other output values."""
        started = time.perf_counter()
        waiting: _Result | None = None
        for tokens in self._tokenized(iter(texts)):
            result = _Result(self.compute(tokens), self.request.on_host)
            if not self.timings.overlapped:
                yield result.get()
                continue
            # The reader of a window waits for the device. The next window should run in the meantime.
            if waiting is not None:
                yield self._read(waiting)
            waiting = result
        if waiting is not None:
            yield self._read(waiting)
        self.timings.texts, self.timings.total = self.n_texts, time.perf_counter() - started
        logger.info("encode: %s", self.timings)
        if self.n_truncated:
            logger.warning(
                "encode: %d of %d texts were longer than max_seq_length = %d and truncated: %d tokens cut",
                self.n_truncated, self.n_texts, self.limit, self.n_truncated_tokens,
            )  # fmt: skip

    def _read(self, result: _Result) -> Any:
        """Waits for the device, and counts the time."""
        started = time.perf_counter()
        output = result.get()
        self.timings.waiting_for_device += time.perf_counter() - started
        return output

    def _tokenized(self, source: Iterator[str]) -> Iterator[PackedEncoding]:
        """Yields the tokens of each window, in order. Texts are taken from the source in the calling thread."""
        windows = self._cut(source)
        if not self.timings.overlapped:
            yield from map(self._tokenize, windows)
            return
        # There is one thread, so windows are counted and checked in their order.
        pool = ThreadPoolExecutor(1, "fastbert-tokenizer")
        futures: deque[Future[PackedEncoding]] = deque()
        try:
            while True:
                futures += [pool.submit(self._tokenize, window) for window in islice(windows, AHEAD - len(futures))]
                if not futures:
                    return
                started = time.perf_counter()
                tokens = futures.popleft().result()
                self.timings.waiting_for_tokens += time.perf_counter() - started
                yield tokens
        finally:
            pool.shutdown(cancel_futures=True)

    def _cut(self, source: Iterator[str]) -> Iterator[list[str]]:
        """Yields windows of at most WINDOW texts. If tokenizing overlaps, the first window is small, and soon
        tokenised.
        """
        size = FIRST_WINDOW if self.windows_grow else WINDOW
        window: list[str] = []
        n_characters = 0
        for text in source:
            window.append(text)
            n_characters += len(text) if isinstance(text, str) else 0
            if len(window) == size or n_characters >= WINDOW_CHARACTERS:
                yield window
                window, n_characters, size = [], 0, min(2 * size, WINDOW)
        if window:
            yield window

    def _tokenize(self, window: list[str]) -> PackedEncoding:
        """Checks and encodes the texts of a window, and counts truncated texts and tokens."""
        started = time.perf_counter()
        for i, text in enumerate(window, start=self.n_texts):
            check_text("sentences" if self.request.single else f"sentences[{i}]", text)
        tokens = encode_texts(self.pipeline.tokenizer, window, self.request.prompt, self.limit)
        self.model.check_ids(tokens.input_ids, tokens.token_type_ids)
        self.n_texts += len(window)
        self.n_truncated += tokens.n_truncated
        self.n_truncated_tokens += tokens.n_truncated_tokens
        self.timings.tokens += tokens.input_ids.shape[0]
        self.timings.tokenizing += time.perf_counter() - started
        return tokens

    def compute(self, tokens: PackedEncoding) -> Tensor | list[Any]:
        """Returns the vectors of a window, or its items, in the order of its texts."""
        request, n_texts = self.request, tokens.cu_seqlens.shape[0] - 1
        vectors: Tensor | None = None
        items: list[Any] = [None] * n_texts
        results: Tensor | list[Any]
        token_budget = self.pipeline.token_budget or default_token_budget(self.device)
        if silent_writes.waits(self.device):  # elsewhere each use checks this
            self.model.follow_weights()
        for places, batch, *ids in in_batches(tokens, token_budget, request.batch_size, self.device):
            with torch.inference_mode():
                if request.head is not None:
                    results = request.head(self.model, batch, *ids)
                elif request.output_value == "sentence_embedding":
                    results = self._vectors(self.model.encode_packed(batch, *ids, check=False)[-1], batch)
                else:
                    results = self._items(self.model.encode_packed(batch, *ids, check=False)[-1], batch, *ids)
            if not isinstance(results, Tensor):
                for place, item in zip(places, results, strict=True):
                    items[place] = item
            elif len(places) == n_texts and places == list(range(n_texts)):
                vectors = results.contiguous() if request.on_host else _for_autograd(results.clone)
            else:
                if vectors is None:
                    vectors = _for_autograd(partial(results.new_empty, (n_texts, results.shape[1])))
                rows = torch.from_numpy(np.array(places))
                vectors.index_copy_(0, packing.to_device(rows, self.device), results)
            if request.progress is not None:
                request.progress(len(places))
        return items if vectors is None else vectors

    def _items(
        self, hidden: Tensor, batch: packing.PackedBatch, input_ids: Tensor, token_type_ids: Tensor
    ) -> list[Any]:
        """Returns an item for each text, for the output values "token_embeddings" and None."""
        lengths = batch.cu_seqlens_cpu.diff().tolist()
        if self.request.output_value == "token_embeddings":
            return list(hidden.split(lengths))
        input_ids, token_type_ids = (packing.to_device(ids, self.device) for ids in (input_ids, token_type_ids))
        rows = zip(
            input_ids.split(lengths),
            token_type_ids.split(lengths),
            hidden.split(lengths),
            self._vectors(hidden, batch),
            strict=True,
        )
        return [
            {
                "input_ids": text_ids,
                "token_type_ids": text_type_ids,
                "attention_mask": torch.ones_like(text_ids),
                "token_embeddings": states,
                "sentence_embedding": vector,
            }
            for text_ids, text_type_ids, states, vector in rows
        ]


def logits(pipeline: Pipeline, tokens: PackedEncoding, batch_size: int | None, progress: Progress | None) -> Tensor:
    """Returns the output of a pipeline's head for inputs: (n, num_labels), in float32 at least, in their order."""
    bert, device, n_pairs = pipeline.model, pipeline.device, tokens.cu_seqlens.shape[0] - 1
    assert pipeline.head is not None, "a pipeline without a head has no logits"
    bert.check_ids(tokens.input_ids, tokens.token_type_ids)
    bert.follow_weights()
    dtype = torch.promote_types(bert.dtype, torch.float32)
    result = torch.empty(n_pairs, bert.config.num_labels, device=device, dtype=dtype)
    token_budget = pipeline.token_budget or default_token_budget(device)
    for places, batch, input_ids, token_type_ids in in_batches(tokens, token_budget, batch_size, device):
        hidden = bert.encode_packed(batch, input_ids, token_type_ids, check=False)[-1]
        scores = pipeline.head(Encoded(batch, hidden, None, None))
        result[packing.to_device(torch.from_numpy(np.array(places)), device)] = scores.to(dtype)
        if progress is not None:
            progress(len(places))
    return result


def _for_autograd(make: Callable[[], Tensor]) -> Tensor:
    """Makes a tensor that callers may use in autograd, also if they call from inference mode."""
    with torch.inference_mode(False):
        return make()


class _Result:
    """A _Result holds the output of a window. Vectors for the host are already being copied there."""

    def __init__(self, output: Tensor | list[Any], on_host: bool) -> None:
        self.output, self.copied = output, None
        if on_host and isinstance(output, Tensor) and output.is_cuda:
            # The copy starts now. A copy that starts at reading would wait for the window after this one.
            self.output = torch.empty(output.shape, dtype=output.dtype, device="cpu", pin_memory=True)
            self.output.copy_(output, non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record(torch.cuda.current_stream(output.device))

    def get(self) -> Any:
        """Returns the output when it is at the place where it will be read."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.output
