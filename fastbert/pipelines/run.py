"""One call of a SentenceEncoder: windows of texts, batches of tokens, pooling.

Texts are tokenised a window at a time, sorted by length within the window, cut into batches by a budget of tokens, run
packed, pooled in float32 and put back in the order in which they came.

With a GPU three things go on at once: a thread tokenises the windows to come, the calling thread launches the work of
one window, and the GPU computes the one before and copies its vectors to the host. Nothing waits for the GPU but who
reads a window's vectors. On a CPU they take turns, since both want all cores.

    tokenise   | 0 | 1  |  2  |   3   |
    launch         |0|  |1|   |2|     |3|
    GPU             |  0  |   1  |   2    |    3   |
    read                  0      1        2        3
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastbert.checks import check_text
from fastbert.models.bert import Encoded
from fastbert.ops import packing, silent_writes
from fastbert.pipelines.batching import default_token_budget, in_batches
from fastbert.pipelines.inputs import encode_texts
from fastbert.pipelines.pipeline import Pipeline
from fastbert.pipelines.pooling import sentence_vectors
from fastbert.text.tokenizer import PackedEncoding
from fastbert.text.windows import WINDOW_CHARACTERS

logger = logging.getLogger("fastbert")

WINDOW = 16384  # texts tokenised and sorted at once, at most; WINDOW_CHARACTERS bounds them, too
FIRST_WINDOW = 1024  # of a call that overlaps: until it is tokenised the GPU has nothing to do
AHEAD = 2  # windows tokenised, or being tokenised, before the calling thread asks for them
# The warning of sentence-transformers, word for word: programs look for it.
TWO_PROMPTS = (
    "Provide either a `prompt`, a `prompt_name`, or neither, but not both. "
    "Ignoring the `prompt_name` in favor of `prompt`."
)


@dataclass(slots=True)
class Request:
    """What one call asks for.

    single: one text came, not a list, so that errors name no index. even: windows do not grow to WINDOW texts, but have
    as many from the first on. on_host: vectors are to be read on the host, as numbers: they may be inference tensors.
    """

    prompt: str = ""
    batch_size: int | None = None
    output_value: str | None = "sentence_embedding"
    normalize: bool = False
    truncate_dim: int | None = None
    single: bool = False
    even: bool = False
    on_host: bool = False
    max_length: int | None = None  # the most tokens of a text, where it is not the encoder's max_seq_length
    progress: Callable[[int], Any] | None = None  # called with the number of texts of each batch


@dataclass
class Timings:
    """Where the time of one call went, in seconds.

    overlapped: tokenizing went on in a thread beside the rest; waiting_for_tokens is then how long the calling thread
    had to wait for it, and waiting_for_device how long for vectors.
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
        """ "tokenizing" or "model": which of the two the other waits for, or, where they take turns, takes longer."""
        if self.overlapped:
            return "tokenizing" if self.waiting_for_tokens > self.waiting_for_device else "model"
        return "tokenizing" if self.tokenizing > self.total / 2 else "model"

    def __str__(self) -> str:
        said = f"{self.texts:,} texts, {self.tokens:,} tokens in {self.total:.3g} s, {self.tokenizing:.3g} s tokenizing"
        if self.overlapped:
            waits = f"{self.waiting_for_tokens:.3g} s for tokens and {self.waiting_for_device:.3g} s for the device"
            said += f" in a thread beside it; waited {waits}"
        return f"{said}; the bottleneck is {'tokenizing' if self.bottleneck == 'tokenizing' else 'the model'}"


def overlaps(device: torch.device) -> bool:
    """Whether tokenizing and computing go on at once."""
    return device.type == "cuda"


class Run:
    """`windows` does the work; the counters say what was cut, `timings` where the time went."""

    def __init__(self, pipeline: Pipeline, request: Request) -> None:
        self.pipeline, self.request = pipeline, request
        self.model = pipeline.model
        self.device = self.model.device
        self.limit = request.max_length or pipeline.max_seq_length
        self.n_prompt_tokens = self._prompt_tokens()
        # With output_value None sentence-transformers returns what the modules make, never normalised after that.
        self._vectors = partial(
            sentence_vectors,
            pipeline,
            n_prompt_tokens=self.n_prompt_tokens,
            normalize=request.normalize and request.output_value is not None,
            truncate_dim=request.truncate_dim,
        )
        self.n_texts = self.n_truncated = self.n_truncated_tokens = 0
        self.timings = Timings(overlapped=overlaps(self.device))

    def _prompt_tokens(self) -> int:
        """The number of tokens at the start of each text that pooling leaves out."""
        pooling, prompt = self.pipeline.pooling, self.request.prompt
        if not prompt or pooling is None or pooling.include_prompt:
            return 0
        ids = self.pipeline.tokenizer.encode_packed([prompt], max_length=self.limit, warn=False).input_ids
        return len(ids) - int(ids[-1].item() in self.pipeline.tokenizer.all_special_ids)

    def windows(self, texts: Iterable[str]) -> Iterator[Any]:
        """The result of each window: (n, dim) vectors, or a list for other output values."""
        started = time.perf_counter()
        waiting: _Result | None = None
        for tokens in self._tokenized(iter(texts)):
            result = _Result(self._compute(tokens), self.request.on_host)
            if not self.timings.overlapped:
                yield result.get()
                continue
            # Whoever reads a window waits for the device: let that have the next one to go on with.
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
        started = time.perf_counter()
        found = result.get()
        self.timings.waiting_for_device += time.perf_counter() - started
        return found

    def _tokenized(self, source: Iterator[str]) -> Iterator[PackedEncoding]:
        """The tokens of each window, in order. The calling thread takes the texts from the source; it may be theirs."""
        windows = self._cut(source)
        if not self.timings.overlapped:
            yield from map(self._tokenize, windows)
            return
        pool = ThreadPoolExecutor(1, "fastbert-tokenizer")  # one: windows are counted and checked in their order
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
        """Windows of WINDOW texts, or growing to that from a first that is soon tokenised; of long texts, fewer."""
        size = FIRST_WINDOW if self.timings.overlapped and not self.request.even else WINDOW
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
        started = time.perf_counter()
        for i, text in enumerate(window, start=self.n_texts):
            check_text("sentences" if self.request.single else f"sentences[{i}]", text)
        tokens = encode_texts(self.pipeline.tokenizer, window, self.request.prompt, self.limit)
        self.model.embeddings.check_ids(tokens.input_ids, tokens.token_type_ids)
        self.n_texts += len(window)
        self.n_truncated += tokens.n_truncated
        self.n_truncated_tokens += tokens.n_truncated_tokens
        self.timings.tokens += tokens.input_ids.shape[0]
        self.timings.tokenizing += time.perf_counter() - started
        return tokens

    def _compute(self, tokens: PackedEncoding) -> Tensor | list[Any]:
        request, n_texts = self.request, tokens.cu_seqlens.shape[0] - 1
        vectors: Tensor | None = None
        items: list[Any] = [None] * n_texts
        results: Tensor | list[Any]
        token_budget = self.pipeline.token_budget or default_token_budget(self.device)
        if silent_writes.waits(self.device):  # elsewhere each use looks
            self.model.follow_weights()
        for places, batch, *ids in in_batches(tokens, token_budget, request.batch_size, self.device):
            with torch.inference_mode():
                hidden = self.model.encode_packed(batch, *ids, check=False)[-1]
                if request.output_value == "sentence_embedding":
                    results = self._vectors(hidden, batch)
                else:
                    results = self._items(hidden, batch, *ids)
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
        """What the output values "token_embeddings" and None ask for, a text each."""
        lengths = batch.cu_seqlens_cpu.diff().tolist()
        if self.request.output_value == "token_embeddings":
            return list(hidden.split(lengths))
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


def logits(
    pipeline: Pipeline, tokens: PackedEncoding, batch_size: int | None, progress: Callable[[int], Any] | None
) -> Tensor:
    """What the head of a pipeline gives for inputs: (n, num_labels), in float32 at least, in their order."""
    bert, device, n_pairs = pipeline.model, pipeline.device, tokens.cu_seqlens.shape[0] - 1
    assert pipeline.head is not None, "a pipeline without a head gives no logits"
    bert.embeddings.check_ids(tokens.input_ids, tokens.token_type_ids)
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
    """A tensor that callers may use in autograd, also if they call from inference mode."""
    with torch.inference_mode(False):
        return make()


class _Result:
    """What a window gave. Vectors that are to be read on the host are already on their way there."""

    def __init__(self, made: Tensor | list[Any], on_host: bool) -> None:
        self.made, self.copied = made, None
        if on_host and isinstance(made, Tensor) and made.is_cuda:
            # Now, not when they are read: a copy then would wait for the window after this one.
            self.made = torch.empty(made.shape, dtype=made.dtype, device="cpu", pin_memory=True)
            self.made.copy_(made, non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record(torch.cuda.current_stream(made.device))

    def get(self) -> Any:
        if self.copied is not None:
            self.copied.synchronize()
        return self.made
