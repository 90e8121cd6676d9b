"""This module gives a live tokenizer of transformers the methods of fastbert's: packed, truncated rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch

from fastbert.adapters.live_encoder import Unsupported
from fastbert.text import windows
from fastbert.text.encoding import PackedEncoding


class LiveTokenizer:
    """A `LiveTokenizer` is a tokenizer of transformers with the methods that `Run` and `verify` call.

    limit: the greatest sequence length. cleaned: prepares texts for the tokenizer.
    """

    def __init__(self, theirs: Any, limit: int, cleaned: Callable[[list[str]], list[str]] = list) -> None:
        self.theirs, self.limit, self.cleaned = theirs, limit, cleaned
        self.rust = theirs.backend_tokenizer if getattr(theirs, "is_fast", False) else None
        # Whether a text may be cut before it is tokenised. The first long text asks.
        self._splits: bool | None = None

    @property
    def model_max_length(self) -> int:
        """Returns the limit, under the name of our tokenizer."""
        return self.limit

    @property
    def all_special_ids(self) -> list[int]:
        """Lists the ids of special tokens."""
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
        """Tokenises texts to packed rows, as our tokenizer does. Raises Unsupported for pairs."""
        if pairs is not None:
            raise Unsupported("pairs of texts")
        texts = self.cleaned(list(texts))
        limit = self.limit if max_length is None else min(max_length, self.limit)
        parts: list[tuple[np.ndarray, np.ndarray]] = [(np.empty(0, np.int64),) * 2]
        lengths = [0]
        for first, last in windows.spans(texts, windows.TEXTS, windows.CHARACTERS):
            ids, token_type_ids = self._rows(texts[first:last], limit)
            sizes = list(map(len, ids))
            flat = [np.fromiter(chain.from_iterable(rows), np.int64, sum(sizes)) for rows in (ids, token_type_ids)]
            parts.append((flat[0], flat[1]))
            lengths += sizes
        ends = np.cumsum(lengths).astype(np.int32)
        tensors = [torch.from_numpy(np.concatenate(rows)) for rows in zip(*parts, strict=True)]
        return PackedEncoding(tensors[0], tensors[1], torch.from_numpy(ends), 0, 0)

    def _rows(self, texts: list[str], limit: int) -> tuple[list[list[int]], list[list[int]]]:
        """Returns ids and segment ids of a few texts. Rust gets only the part of a long text that fills the limit."""
        size = 256 + 16 * limit  # Characters.
        rows = self._whole([self._cut(text, size) for text in texts], limit)
        # A row that does not fill the limit is tried again with more of its text.
        while short := [i for i, row in enumerate(rows) if len(row[0]) < limit and self._is_long(texts[i], size)]:
            size *= 8
            for i, row in zip(short, self._whole([self._cut(texts[i], size) for i in short], limit), strict=True):
                rows[i] = row
        return [row[0] for row in rows], [row[1] for row in rows]

    def _is_long(self, text: str, size: int) -> bool:
        """Tells whether cutting the text saves time and does not change its tokens."""
        if len(text) <= 2 * size or self.rust is None:
            return False
        if self._splits is None:
            self._splits = windows.splits(self.rust)
        return self._splits

    def _cut(self, text: str, size: int) -> str:
        return windows.cut(text, size, self.theirs.truncation_side == "left") if self._is_long(text, size) else text

    def _whole(self, texts: list[str], limit: int) -> list[tuple[list[int], list[int]]]:
        """Returns (ids, segment ids) of each text, truncated."""
        options = {"padding": False, "truncation": "longest_first", "max_length": limit}
        ids: Any = None
        token_type_ids: Any = None
        if self.rust is not None:
            self.theirs([""], **options)  # Any call sets the truncation of the Rust object.
            encodings = self.rust.encode_batch(texts)
            if self.rust.padding is None:  # Otherwise a call in another thread has set it meanwhile.
                ids, token_type_ids = [e.ids for e in encodings], [e.type_ids for e in encodings]
        if ids is None:
            encoding = self.theirs(texts, **options)
            ids, token_type_ids = encoding["input_ids"], encoding.get("token_type_ids")
        if "token_type_ids" not in self.theirs.model_input_names or token_type_ids is None:
            token_type_ids = [[0] * len(row) for row in ids]
        return list(zip(ids, token_type_ids, strict=True))
