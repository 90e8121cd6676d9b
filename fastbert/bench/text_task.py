"""A `TextTask` is a sentence encoder with texts. Competitors are compared with its float64 vectors."""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastbert.bench.engines import Source
from fastbert.bench.exact import choose_checked, reference_vectors
from fastbert.bench.texts import spread
from fastbert.checkpoint.folder import resolve
from fastbert.pipelines.folder import Layout, read_layout
from fastbert.pipelines.names import SENTENCE_TRANSFORMERS, full_name
from fastbert.pipelines.sentence import SentenceEncoder
from fastbert.text.encoding import PackedEncoding

logger = logging.getLogger("fastbert")

DTYPES = ("float32", "bfloat16", "float16")
SHORT_TEXTS, SHORT_TOKENS = 32, 32  # for latency: the number of texts, and their maximum number of tokens


class TextTask:
    """A TextTask holds a sentence encoder and texts for it.

    src: a sentence-transformers folder, a plain BERT checkpoint or a hub id, as for SentenceEncoder. dtype: "auto" is
    that of the checkpoint. device: by default the GPU if there is one. Raises the errors of
    SentenceEncoder.from_pretrained, and ValueError if there is no text, for another dtype, and for a prompt that
    pooling excludes.
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
        self.exact = SentenceEncoder.from_pretrained(self.folder, device="cpu", backend="torch")  # in the stored dtype
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
        """Replaces the texts. n_cut: the number of texts that are longer than the model's limit."""
        if not texts:
            raise ValueError("texts: expected at least one")
        self.texts = list(texts)
        packed = self._tokens(self.texts)
        self.lengths, self.n_cut = packed.cu_seqlens.diff().numpy(), packed.n_truncated
        self.__dict__.pop("checked", None)

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state that encoders need, without the reference's model."""
        return {name: value for name, value in self.__dict__.items() if name not in ("exact", "checked")}

    @property
    def source(self) -> Source:
        return Source(self.layout.transformer, getattr(torch, self.dtype), self.device)

    @property
    def n_tokens(self) -> int:
        """Returns the number of valid tokens of all texts, including special tokens."""
        return int(self.lengths.sum())

    def token_lengths(self, texts: Sequence[str]) -> np.ndarray:
        """Returns (n,) the number of tokens that the model reads of each text."""
        return self._tokens(texts).cu_seqlens.diff().numpy()

    def _tokens(self, texts: Sequence[str]) -> PackedEncoding:
        texts = [self.prompt + text for text in texts]
        return self.exact.tokenizer.encode_packed(texts, max_length=self.max_seq_length, warn=False)

    @functools.cached_property
    def checked(self) -> list[int]:
        """Returns the indices of the texts that the reference covers."""
        return choose_checked(self.lengths.tolist(), self.exact.model.config, self.device)

    def reference(self) -> Tensor:
        """Returns the (n, dim) float64 vectors of the checked texts."""
        return self.vectors([self.texts[i] for i in self.checked])

    def vectors(self, texts: Sequence[str]) -> Tensor:
        """Returns the (n, dim) float64 vectors of any texts, with the weights as stored in the checkpoint."""
        return reference_vectors(self.exact, [self.prompt + text for text in texts], self.device)

    def short_texts(self) -> list[str]:
        """Returns a few texts of at most 32 tokens for the latency setting, or the shortest if all are longer."""
        by_length = np.argsort(self.lengths, kind="stable")
        n_short = int((self.lengths <= SHORT_TOKENS).sum()) or math.ceil(len(by_length) / 10)
        return [self.texts[i] for i in spread(by_length[:n_short].tolist(), SHORT_TEXTS)]


@contextmanager
def known_warnings_hidden() -> Iterator[None]:
    """Hides the warnings that a TextTask has already given and that every run would repeat."""

    def is_new(record: logging.LogRecord) -> bool:
        return not any(part in str(record.msg) for part in ("truncated", "so mean pooling"))

    logger.addFilter(is_new)
    try:
        yield
    finally:
        logger.removeFilter(is_new)
