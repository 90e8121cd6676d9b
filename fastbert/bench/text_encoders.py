"""A text encoder converts texts to vectors in one way: fastbert, or an alternative of a user."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastbert.bench.engines import (
    TRANSFORMERS_ENGINES,
    Engine,
    Pool,
    flash_implementation,
    flash_obstacle,
    package_obstacle,
    silence_transformers,
)
from fastbert.bench.peers import OURS
from fastbert.bench.text_task import TextTask
from fastbert.bench.texts import spread
from fastbert.pipelines.modules import Normalize
from fastbert.pipelines.sentence import SentenceEncoder

WINDOW = 4096  # texts that padded peers tokenise and sort at once, while a GPU computes the previous window
SAMPLE = {"cpu": 48, "cuda": 2048}  # number of texts for the choice of batch sizes


class TextEncoder:
    """A TextEncoder is one way to convert texts to vectors. Subclasses set `name` and define `load` and `encode`.

    dtype: the data type of the computation. batch_size: None if there is no choice. unloaded: a copy made before
    `load`, with which another process can start.
    """

    name: str
    unloaded: TextEncoder
    batch_sizes: tuple[int, ...] = ()
    warmups = 1

    def __init__(self, task: TextTask) -> None:
        self.task, self.dtype = task, task.dtype
        self.batch_size: int | None = None
        self._loaded = False

    def obstacle(self) -> str | None:
        return None

    def load(self) -> None:
        raise NotImplementedError

    def encode(self, texts: list[str]) -> Tensor:
        """Returns (n, dim) float32 vectors on the host."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """Returns entries for `Peer.facts`, for the last encoded texts."""
        return {} if self.batch_size is None else {"batch_size": self.batch_size}

    def prepare(self) -> None:
        """Calls `load`, once."""
        if not self._loaded:
            self.unloaded = copy.deepcopy(self)
            self.load()
            self._loaded = True

    def choose_batch_size(self) -> None:
        """Selects the fastest of batch_sizes on a sample of the task's texts."""
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
            if size >= len(sample):  # larger sizes give the same batch
                break
        self.batch_size = min(seconds, key=lambda size: seconds[size])
        if on_gpu:  # the memory of the other sizes does not belong to this setting
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)


def seconds_of(encode: Callable[[list[str]], Any], texts: list[str]) -> float:
    """Returns the seconds that encoding takes."""
    started = time.perf_counter()
    encode(texts)
    return time.perf_counter() - started


class FastBert(TextEncoder):
    """This encoder is the SentenceEncoder, unchanged."""

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
    """This encoder runs transformers' tokenizer and an engine, on texts sorted by length in batches of similar size."""

    def __init__(self, task: TextTask, engine: type[Engine], **settings: Any) -> None:
        super().__init__(task)
        tail = self.task.layout.tail
        pool = Pool(self.task.layout.pooling.modes[0], normalize=bool(tail))
        self.engine = engine(task.source, pool, **settings)
        self.name, self.dtype, self.batch_sizes = self.engine.name, self.engine.dtype, self._sizes()
        self._waste: float | None = None

    def _sizes(self) -> tuple[int, ...]:
        return self.engine.batch_sizes.get(self.task.device.type, self.engine.batch_sizes["cpu"])

    def obstacle(self) -> str | None:
        return pooling_obstacle(self.task) or package_obstacle("transformers") or self.engine.obstacle()

    def load(self) -> None:
        import transformers

        silence_transformers()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.task.layout.transformer)
        self.engine.load()
        self.warmups = self.engine.warmups

    def encode(self, texts: list[str]) -> Tensor:
        parts, places, n_computed, n_valid = [], [], 0, 0
        for first in range(0, len(texts), WINDOW):
            window = texts[first : first + WINDOW]
            rows = [np.array(ids, np.int64) for ids in tokenized(self.task, self.tokenizer, window)]
            order = np.array(sorted(range(len(rows)), key=lambda i: -len(rows[i])))
            n_batches = math.ceil(len(rows) / (self.batch_size or len(rows)))
            for part in np.array_split(order, n_batches):
                batch = self.engine.batch([rows[i] for i in part])
                parts.append(self.engine.compute(*batch))
                n_computed += self.engine.positions(batch)
            places.append(first + order)
            n_valid += sum(map(len, rows))
        vectors = torch.cat(parts).cpu()
        self._waste = 1.0 - n_valid / n_computed
        result = torch.empty_like(vectors)
        result[torch.from_numpy(np.concatenate(places))] = vectors
        return result[:, : self.task.layout.truncate_dim]

    def facts(self) -> dict[str, Any]:
        return super().facts() | ({} if self._waste is None else {"padding_waste": self._waste})


def pooling_obstacle(task: TextTask) -> str | None:
    """Returns the reason why a peer with only mean or [CLS] pooling, and normalisation, cannot be used, or None."""
    modes, tail = task.layout.pooling.modes, task.layout.tail
    if modes in (("mean",), ("cls",)) and [type(module) for module in tail] in ([], [Normalize]):
        return None
    after = "".join(f", {type(module).__name__}" for module in tail)
    return (
        f"this checkpoint pools by {', '.join(modes)}{after}; only mean or cls, and normalisation, are supported here"
    )


def tokenized(task: TextTask, tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Returns the ids of texts from transformers' tokenizer, with the task's prompt, casing and maximum length."""
    if task.prompt:
        texts = [task.prompt + text for text in texts]
    if task.layout.settings.do_lower_case:
        texts = [text.lower() for text in texts]
    settings = {"return_token_type_ids": False, "return_attention_mask": False}
    ids: list[list[int]] = tokenizer(texts, truncation=True, max_length=task.max_seq_length, **settings)["input_ids"]
    return ids


class SentenceTransformers(TextEncoder):
    """This encoder is sentence-transformers, unchanged: SentenceTransformer(folder).encode(texts)."""

    name = "sentence-transformers"

    def __init__(self, task: TextTask) -> None:
        super().__init__(task)
        self.dtype = task.stored_dtype

    def obstacle(self) -> str | None:
        return package_obstacle("sentence-transformers")

    def load(self) -> None:
        self._load()

    def _load(self, **settings: Any) -> None:
        silence_transformers()
        from sentence_transformers import SentenceTransformer

        self.model = SentenceTransformer(str(self.task.folder), device=str(self.task.device), **settings)

    def encode(self, texts: list[str]) -> Tensor:
        return torch.from_numpy(self.model.encode(texts, show_progress_bar=False)).float()


class TunedSentenceTransformers(SentenceTransformers):
    """This encoder is sentence-transformers in the task's dtype, with SDPA and the best of a few batch sizes.

    Results are copied from a GPU at the end.
    """

    name = "sentence-transformers tuned"

    def __init__(self, task: TextTask) -> None:
        super().__init__(task)
        self.dtype = task.dtype
        self.batch_sizes = Engine.batch_sizes.get(task.device.type, Engine.batch_sizes["cpu"])

    def load(self) -> None:
        self._load(model_kwargs={"dtype": self.task.source.dtype, "attn_implementation": "sdpa"})

    def encode(self, texts: list[str]) -> Tensor:
        size = self.batch_size or 32
        return self.model.encode(texts, batch_size=size, convert_to_tensor=True, show_progress_bar=False).float().cpu()


class FlashSentenceTransformers(TunedSentenceTransformers):
    """This encoder is sentence-transformers 6 in float16 with FlashAttention-2, without padding.

    Its makers recommend this setting. FlashAttention-2 comes from flash-attn, or from PyPI's kernels, which every user
    can install. sentence-transformers then packs the tokens of a batch (`unpad_inputs`). Source: sbert.net, "Speeding
    up Inference"; `Transformer.can_flatten_inputs`.
    """

    name = "sentence-transformers FlashAttention-2"

    def __init__(self, task: TextTask) -> None:
        super().__init__(task)
        self.dtype = "float16"

    def obstacle(self) -> str | None:
        if self.task.device.type != "cuda":
            return "FlashAttention-2 needs an NVIDIA GPU"
        return super().obstacle() or flash_obstacle()

    def load(self) -> None:
        self._load(model_kwargs={"dtype": torch.float16, "attn_implementation": flash_implementation()})

    def facts(self) -> dict[str, Any]:
        unpads = getattr(self.model[0], "can_flatten_inputs", False)
        note = {} if unpads else {"note": "this version of sentence-transformers pads its inputs"}
        return {**super().facts(), **({"padding_waste": 0.0} if unpads else {}), **note}


def text_encoders(task: TextTask) -> list[TextEncoder]:
    """Returns fastbert, and the encoders that need only the packages transformers and sentence-transformers."""
    engines = [Pooled(task, engine) for engine in TRANSFORMERS_ENGINES]
    flash = [FlashSentenceTransformers(task)] if task.device.type == "cuda" else []
    return [FastBert(task), *engines, SentenceTransformers(task), TunedSentenceTransformers(task), *flash]
