"""From strings to vectors: what one would use, the reference, and the peers of the two settings.

A TextEncoder turns texts into vectors; `Throughput` times it on all texts of a task, `Latency` on one text at a time.
"""

from __future__ import annotations

import copy
import functools
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastbert.bench import memory
from fastbert.bench.engines import TRANSFORMERS_ENGINES, Engine, Pool, Source, missing, quiet
from fastbert.bench.exact import covered, reference_vectors
from fastbert.bench.peers import OURS, Peer
from fastbert.bench.texts import spread
from fastbert.checkpoint.folder import resolve
from fastbert.pipelines.folder import Layout, read_layout
from fastbert.pipelines.modules import Normalize
from fastbert.pipelines.names import SENTENCE_TRANSFORMERS, full_name
from fastbert.pipelines.sentence import SentenceEncoder
from fastbert.text.encoding import PackedEncoding

logger = logging.getLogger("fastbert")

DTYPES = ("float32", "bfloat16", "float16")
WINDOW = 4096  # texts that padded peers tokenise and sort at once: a GPU computes one window during the next
SAMPLE = {"cpu": 48, "cuda": 2048}  # texts on which batch sizes are tried
FEW = 16  # texts of a first run

SHORT_TEXTS, SHORT_TOKENS = 32, 32  # of the latency setting: how many texts, and of how many tokens at most


class TextTask:
    """A sentence encoder and texts for it.

    src: a sentence-transformers folder, a plain BERT checkpoint or a hub id, as for SentenceEncoder. dtype: "auto" is
    that of the checkpoint. device: the GPU if there is one. Raises what SentenceEncoder.from_pretrained does, and
    ValueError where there is no text, for another dtype and for a prompt that pooling leaves out.
    """

    def __init__(
        self,
        src: str | os.PathLike[str],
        texts: Sequence[str],
        *,
        dtype: str = "auto",
        device: str | torch.device | None = None,
        backend: str = "auto",
        revision: str | None = None,
    ) -> None:
        self.folder = resolve(full_name(src, SENTENCE_TRANSFORMERS), revision=revision)
        self.layout = read_layout(self.folder) or Layout(self.folder)
        self.backend = backend
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.exact = SentenceEncoder.from_pretrained(self.folder, device="cpu", backend="torch")  # in the dtype stored
        self.max_seq_length = self.exact.max_seq_length
        self.stored_dtype = str(self.exact.dtype).removeprefix("torch.")
        self.dtype = self.stored_dtype if dtype == "auto" else dtype
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: got {self.dtype!r}, expected one of {', '.join(DTYPES)}")
        name = self.exact.default_prompt_name
        self.prompt = "" if name is None else self.exact.prompts[name]
        if self.prompt and not self.exact.pooling.include_prompt:
            raise ValueError(f"{src}: its default prompt is left out of pooling, which is not supported here")
        self.use(texts)

    def use(self, texts: Sequence[str]) -> None:
        """Takes other texts. n_cut: how many of them are longer than what the model reads."""
        if not texts:
            raise ValueError("texts: expected at least one")
        self.texts = list(texts)
        packed = self._tokens(self.texts)
        self.lengths, self.n_cut = packed.cu_seqlens.diff().numpy(), packed.n_truncated
        self.__dict__.pop("checked", None)

    def __getstate__(self) -> dict[str, Any]:
        """What encoders need of it, without the reference's model."""
        return {name: value for name, value in self.__dict__.items() if name not in ("exact", "checked")}

    @property
    def source(self) -> Source:
        return Source(self.layout.transformer, getattr(torch, self.dtype), self.device)

    @property
    def n_tokens(self) -> int:
        """Valid tokens of all texts, special tokens included."""
        return int(self.lengths.sum())

    def token_lengths(self, texts: Sequence[str]) -> np.ndarray:
        """(n,) tokens that the model reads of each text."""
        return self._tokens(texts).cu_seqlens.diff().numpy()

    def _tokens(self, texts: Sequence[str]) -> PackedEncoding:
        texts = [self.prompt + text for text in texts]
        return self.exact.tokenizer.encode_packed(texts, max_length=self.max_seq_length, warn=False)

    @functools.cached_property
    def checked(self) -> list[int]:
        """Which texts the reference covers."""
        return covered(self.lengths.tolist(), self.exact.model.config, self.device)

    def reference(self) -> Tensor:
        """The (n, dim) float64 vectors of the checked texts."""
        return self.vectors([self.texts[i] for i in self.checked])

    def vectors(self, texts: Sequence[str]) -> Tensor:
        """The (n, dim) float64 vectors of any texts, with the weights as the checkpoint stores them."""
        return reference_vectors(self.exact, [self.prompt + text for text in texts], self.device)

    def short_texts(self) -> list[str]:
        """A few texts of up to 32 tokens for the latency setting; the shortest there are, where all are longer."""
        by_length = np.argsort(self.lengths, kind="stable")
        n_short = int((self.lengths <= SHORT_TOKENS).sum()) or math.ceil(len(by_length) / 10)
        return [self.texts[i] for i in spread(by_length[:n_short].tolist(), SHORT_TEXTS)]


@contextmanager
def untold() -> Iterator[None]:
    """Without the warnings that TextTask has given, and those that every run would give again."""

    def news(record: logging.LogRecord) -> bool:
        return not any(part in str(record.msg) for part in ("truncated", "so mean pooling"))

    logger.addFilter(news)
    try:
        yield
    finally:
        logger.removeFilter(news)


class TextEncoder:
    """One way to turn texts into vectors. Subclasses set `name` and fill in `load` and `encode`.

    dtype: that of the computation. batch_size: None where there is none to choose. unloaded: once prepared, what it was
    before: another process can start from there.
    """

    name: str
    unloaded: TextEncoder
    batch_sizes: tuple[int, ...] = ()
    warmups = 1

    def __init__(self, task: TextTask) -> None:
        self.task, self.dtype = task, task.dtype
        self.batch_size: int | None = None
        self._loaded = False

    def available(self) -> str | None:
        return None

    def load(self) -> None:
        raise NotImplementedError

    def encode(self, texts: list[str]) -> Tensor:
        """(n, dim) float32 vectors on the host."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """Of the last texts encoded: what `Peer.facts` gives."""
        return {} if self.batch_size is None else {"batch_size": self.batch_size}

    def prepare(self) -> None:
        """`load`, once."""
        if not self._loaded:
            self.unloaded = copy.deepcopy(self)
            self.load()
            self._loaded = True

    def choose_batch_size(self) -> None:
        """Takes the one of batch_sizes that is fastest on a sample of the task's texts."""
        device = self.task.device
        if self.batch_size is not None or not self.batch_sizes:
            return
        on_gpu = device.type == "cuda"
        sample = spread(self.task.texts, SAMPLE["cuda" if on_gpu else "cpu"])
        seconds: dict[int, float] = {}
        for size in self.batch_sizes:
            self.batch_size = size
            try:
                for _ in range(self.warmups if on_gpu or not seconds else 0):
                    self.encode(sample)
                seconds[size] = min(seconds_of(self.encode, sample) for _ in range(2 if on_gpu else 1))
            except torch.OutOfMemoryError:
                if not seconds:
                    raise
                break
            if size >= len(sample):  # larger ones would be the same batch
                break
        self.batch_size = min(seconds, key=lambda size: seconds[size])
        if on_gpu:  # the memory that the others took is not this setting's
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)


def seconds_of(encode: Callable[[list[str]], Any], texts: list[str]) -> float:
    """How long that takes."""
    started = time.perf_counter()
    encode(texts)
    return time.perf_counter() - started


class FastBert(TextEncoder):
    """SentenceEncoder, as it is."""

    name = OURS

    def load(self) -> None:
        task = self.task
        self.encoder = SentenceEncoder.from_pretrained(
            task.folder, dtype=task.dtype, device=task.device, backend=task.backend
        )

    def encode(self, texts: list[str]) -> Tensor:
        return torch.from_numpy(self.encoder.encode(texts, show_progress_bar=False))

    def facts(self) -> dict[str, Any]:
        timings = self.encoder.last_timings
        assert timings is not None
        return {"padding_waste": 0.0, "bottleneck": timings.bottleneck, "note": str(timings)}


class Pooled(TextEncoder):
    """An engine behind transformers' tokenizer: texts sorted by their tokens, batches of nearly equal size, pooling."""

    def __init__(self, task: TextTask, engine: type[Engine], **settings: Any) -> None:
        super().__init__(task)
        tail = self.task.layout.tail
        pool = Pool(self.task.layout.pooling.modes[0], normalize=bool(tail))
        self.engine = engine(task.source, pool, **settings)
        self.name, self.dtype, self.batch_sizes = self.engine.name, self.engine.dtype, self._sizes()
        self._waste: float | None = None

    def _sizes(self) -> tuple[int, ...]:
        return self.engine.batch_sizes.get(self.task.device.type, self.engine.batch_sizes["cpu"])

    def available(self) -> str | None:
        modes, tail = self.task.layout.pooling.modes, self.task.layout.tail
        if modes not in (("mean",), ("cls",)) or [type(module) for module in tail] not in ([], [Normalize]):
            after = "".join(f", {type(module).__name__}" for module in tail)
            return f"this checkpoint pools by {', '.join(modes)}{after}; here is only mean or cls, and normalising"
        return missing("transformers") or self.engine.available()

    def load(self) -> None:
        import transformers

        quiet()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.task.layout.transformer)
        self.engine.load()
        self.warmups = self.engine.warmups

    def encode(self, texts: list[str]) -> Tensor:
        if self.task.prompt:
            texts = [self.task.prompt + text for text in texts]
        if self.task.layout.settings.do_lower_case:
            texts = [text.lower() for text in texts]
        settings = {"return_token_type_ids": False, "return_attention_mask": False}
        made, places, computed, valid = [], [], 0, 0
        for first in range(0, len(texts), WINDOW):
            window = texts[first : first + WINDOW]
            found = self.tokenizer(window, truncation=True, max_length=self.task.max_seq_length, **settings)
            rows = [np.array(ids, np.int64) for ids in found["input_ids"]]
            order = np.array(sorted(range(len(rows)), key=lambda i: -len(rows[i])))
            n_batches = math.ceil(len(rows) / (self.batch_size or len(rows)))
            for part in np.array_split(order, n_batches):
                batch = self.engine.batch([rows[i] for i in part])
                made.append(self.engine.compute(*batch))
                computed += self.engine.positions(batch)
            places.append(first + order)
            valid += sum(map(len, rows))
        vectors = torch.cat(made).cpu()
        self._waste = 1.0 - valid / computed
        result = torch.empty_like(vectors)
        result[torch.from_numpy(np.concatenate(places))] = vectors
        return result[:, : self.task.layout.truncate_dim]

    def facts(self) -> dict[str, Any]:
        return super().facts() | ({} if self._waste is None else {"padding_waste": self._waste})


class SentenceTransformers(TextEncoder):
    """sentence-transformers as it is: SentenceTransformer(folder).encode(texts)."""

    name = "sentence-transformers"

    def __init__(self, task: TextTask) -> None:
        super().__init__(task)
        self.dtype = task.stored_dtype

    def available(self) -> str | None:
        return missing("sentence-transformers")

    def load(self) -> None:
        self._load()

    def _load(self, **settings: Any) -> None:
        quiet()
        from sentence_transformers import SentenceTransformer

        self.model = SentenceTransformer(str(self.task.folder), device=str(self.task.device), **settings)

    def encode(self, texts: list[str]) -> Tensor:
        return torch.from_numpy(self.model.encode(texts, show_progress_bar=False)).float()


class TunedSentenceTransformers(SentenceTransformers):
    """In the task's dtype, with the best of a few batch sizes, and results that leave a GPU only at the end.

    With SDPA, or with flash-attn, where that is installed and can run: then sentence-transformers leaves out padding.
    """

    name = "sentence-transformers tuned"

    def __init__(self, task: TextTask) -> None:
        super().__init__(task)
        self.dtype = task.dtype
        self.batch_sizes = Engine.batch_sizes.get(task.device.type, Engine.batch_sizes["cpu"])

    def load(self) -> None:
        dtype, on_gpu = self.task.source.dtype, self.task.device.type == "cuda"
        flash = on_gpu and dtype != torch.float32 and missing("flash-attn") is None
        self._load(model_kwargs={"dtype": dtype, "attn_implementation": "flash_attention_2" if flash else "sdpa"})

    def encode(self, texts: list[str]) -> Tensor:
        size = self.batch_size or 32
        return self.model.encode(texts, batch_size=size, convert_to_tensor=True, show_progress_bar=False).float().cpu()


def text_encoders(task: TextTask) -> list[TextEncoder]:
    """fastbert, and what needs no package but transformers and sentence-transformers."""
    engines = [Pooled(task, engine) for engine in TRANSFORMERS_ENGINES]
    return [FastBert(task), *engines, SentenceTransformers(task), TunedSentenceTransformers(task)]


class Throughput(Peer):
    """All texts of the task at once. The output is that of the texts which `TextTask.reference` covers.

    memory: whether there is time for a process of its own, in which to measure that.
    """

    gives_vectors = True

    def __init__(self, encoder: TextEncoder, memory: bool = True) -> None:
        self.encoder, self.task, self.memory = encoder, encoder.task, memory
        self.name, self.dtype = encoder.name, encoder.dtype

    def available(self) -> str | None:
        return self.encoder.available()

    def prepare(self) -> None:
        self.encoder.prepare()
        self.encoder.encode(spread(self.task.texts, FEW))  # which compiles what is to be compiled

    def run(self, i: int) -> Tensor:
        return self.encoder.encode(self.task.texts)

    def output(self) -> Tensor:
        self.encoder.choose_batch_size()
        for _ in range(self.encoder.warmups - 1):
            self.run(0)
        return self.run(0)[torch.tensor(self.task.checked)]

    def facts(self) -> dict[str, Any]:
        return self.encoder.facts()

    def peak_bytes(self) -> int | None:
        return memory.peak_of(self.encoder) if self.memory and memory.unavailable() is None else None


class Latency(Peer):
    """One text at a time. The output is that of all `texts`, as `TextTask.vectors` gives it for them."""

    gives_vectors = True

    def __init__(self, encoder: TextEncoder, texts: Sequence[str]) -> None:
        self.encoder, self.texts = encoder, list(texts)
        self.name, self.dtype = encoder.name, encoder.dtype

    def available(self) -> str | None:
        return self.encoder.available()

    def prepare(self) -> None:
        self.encoder.prepare()
        self.run(0)

    def run(self, i: int) -> Tensor:
        return self.encoder.encode([self.texts[i % len(self.texts)]])

    def output(self) -> Tensor:
        for _ in range(self.encoder.warmups - 1):
            for i in range(len(self.texts)):
                self.run(i)
        return torch.cat([self.run(i) for i in range(len(self.texts))])
