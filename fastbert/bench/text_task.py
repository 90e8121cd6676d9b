"""A `TextTask` is a sentence encoder with texts for it, and its float64 vectors are what competitors must give."""

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
        """The state that encoders need, without the reference's model."""
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
        """The numbers of the texts that the reference covers."""
        return choose_checked(self.lengths.tolist(), self.exact.model.config, self.device)

    def reference(self) -> Tensor:
        """The (n, dim) float64 vectors of the checked texts."""
        return self.vectors([self.texts[i] for i in self.checked])

    def vectors(self, texts: Sequence[str]) -> Tensor:
        """The (n, dim) float64 vectors of any texts, with the weights as the checkpoint stores them."""
        return reference_vectors(self.exact, [self.prompt + text for text in texts], self.device)

    def short_texts(self) -> list[str]:
        """A few texts of up to 32 tokens for the latency setting, or the shortest if all are longer."""
        by_length = np.argsort(self.lengths, kind="stable")
        n_short = int((self.lengths <= SHORT_TOKENS).sum()) or math.ceil(len(by_length) / 10)
        return [self.texts[i] for i in spread(by_length[:n_short].tolist(), SHORT_TEXTS)]


@contextmanager
def known_warnings_hidden() -> Iterator[None]:
    """Hides the warnings that a TextTask has given already, and that every run would give again."""

    def is_new(record: logging.LogRecord) -> bool:
        return not any(part in str(record.msg) for part in ("truncated", "so mean pooling"))

    logger.addFilter(is_new)
    try:
        yield
    finally:
        logger.removeFilter(is_new)
