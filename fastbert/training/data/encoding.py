"""This module converts sentences to token ids, with the threads of the ``tokenizers`` library.

BERT's own pipeline encodes each part between spaces independently of its context. So the ids of parts are stored, and a
repeated part is looked up; most of running text is repeated parts. The ids equal those of the library.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastbert.training.data.special import SpecialIds

if TYPE_CHECKING:
    from fastbert.text.tokenizer import Tokenizer

KEPT_PARTS = 1_000_000  # about 220 MB
LONG_PART = 40  # characters: longer parts are not stored


def special_ids(tokenizer: Tokenizer) -> SpecialIds:
    """Returns the special ids of a tokenizer. Raises ValueError, with the name, if pre-training needs a missing one."""
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    ids = []
    for name, usual in names.items():
        i = getattr(tokenizer, f"{name}_id", None)
        if i is None:
            token = getattr(tokenizer, name, None)
            raise ValueError(f"tokenizer: the vocabulary has no {token or usual}, and pre-training needs a {name}")
        ids.append(int(i))
    pad = tokenizer.pad_token_id
    every = {*ids, *tokenizer.all_special_ids, *([] if pad is None else [pad])}
    return SpecialIds(ids[0], ids[1], ids[2], tuple(sorted(every)))


def word_begins(tokenizer: Tokenizer) -> np.ndarray | None:
    """Returns for each id of a WordPiece vocabulary whether it begins a word, (vocab_size,) bool; for others None."""
    rust = tokenizer.for_raw_text()
    prefix = getattr(rust.model, "continuing_subword_prefix", None)
    if prefix is None or not _is_word_piece(rust):
        return None
    begins = np.ones(tokenizer.vocab_size, bool)
    for token, i in tokenizer.get_vocab().items():
        begins[i] = not token.startswith(prefix)
    return begins


class Encoded(NamedTuple):
    """Encoded holds the ids of consecutive sentences.

    ``ids``: (T,) uint32. ``lengths``: (k,) int64, of the sentences. ``words``: (T,) bool, true where a word begins, or
    None.
    """

    ids: np.ndarray
    lengths: np.ndarray
    words: np.ndarray | None


class Encoder:
    """An Encoder returns the ids of any sentences, without special tokens. Only one thread may use it."""

    def __init__(self, tokenizer: Tokenizer, with_words: bool = False) -> None:
        """Takes ``with_words``: whether to compute ``words`` from the tokenizer's word ids."""
        self._rust = tokenizer.for_raw_text()
        self._with_words = with_words
        self._known: dict[str, bytes] | None = {} if _treats_parts_alone(self._rust) and not with_words else None
        self._space = " " if _sees_space_before(self._rust) else ""
        self._unk = tokenizer.unk_token_id
        # A model can produce these tokens if its vocabulary has them, however the text is split before.
        self._forbidden = np.zeros(tokenizer.vocab_size, bool)
        self._forbidden[[i for i in special_ids(tokenizer).all if i != self._unk]] = True

    def encode_documents(self, documents: list[list[str]]) -> Encoded:
        """Returns the ids of the sentences of documents, as in running text.

        Byte-level BPE gives a word after a space different ids. So each sentence has a space before it, except the
        first of a document.
        """
        space = self._space
        return self.encode([space * (i > 0) + text for document in documents for i, text in enumerate(document)])

    def encode(self, sentences: list[str]) -> Encoded:
        """Returns the ids of sentences. Special tokens that the model makes from text become the unknown token."""
        if self._known is not None:
            ids, lengths = self._by_parts(sentences, self._known)
            words = None
        else:
            method = self._rust.encode_batch if self._with_words else self._rust.encode_batch_fast
            encodings = method(sentences, add_special_tokens=False)
            ids, lengths = _ids(encodings)
            words = _word_starts(encodings, len(ids)) if self._with_words else None
        if (special := self._forbidden[ids]).any():
            ids = np.where(special, np.uint32(self._unk), ids)
        return Encoded(ids, lengths, words)

    def _by_parts(self, sentences: list[str], known: dict[str, bytes]) -> tuple[np.ndarray, np.ndarray]:
        parts: list[str] = []
        sizes = []
        for sentence in sentences:
            more = sentence.split(" ")
            sizes.append(len(more))
            parts += more
        rows: list[Any] = list(map(known.get, parts))
        unknown = [i for i, row in enumerate(rows) if row is None]
        if unknown:
            new = sorted({parts[i] for i in unknown})
            encodings = self._rust.encode_batch_fast(new, add_special_tokens=False)
            ids_of = {part: np.array(row.ids, "<u4").tobytes() for part, row in zip(new, encodings, strict=True)}
            for i in unknown:
                rows[i] = ids_of[parts[i]]
            if len(known) + len(ids_of) > KEPT_PARTS:
                known.clear()
            known.update((part, ids) for part, ids in ids_of.items() if len(part) <= LONG_PART)
        n_bytes = np.fromiter(map(len, rows), np.int64, len(rows))
        lengths = np.add.reduceat(n_bytes, np.cumsum([0, *sizes[:-1]])) // 4
        return np.frombuffer(b"".join(rows), "<u4"), lengths


def _ids(encodings: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.fromiter(map(len, encodings), np.int64, len(encodings))
    ids = np.fromiter(chain.from_iterable(row.ids for row in encodings), np.uint32, int(lengths.sum()))
    return ids, lengths


def _word_starts(encodings: list[Any], n_tokens: int) -> np.ndarray:
    starts = np.empty(n_tokens, bool)
    place = 0
    for row in encodings:
        word_ids = np.array([-1 if i is None else i for i in row.word_ids], np.int64)
        part = starts[place : place + len(word_ids)]
        part[:1] = True
        part[1:] = (word_ids[1:] != word_ids[:-1]) | (word_ids[1:] < 0)
        place += len(word_ids)
    return starts


def _is_word_piece(rust: Any) -> bool:
    return type(rust.model).__name__ == "WordPiece"


def _treats_parts_alone(rust: Any) -> bool:
    """Tells whether the ids of a text are the concatenated ids of its parts between spaces."""
    return (
        _is_word_piece(rust)
        and type(rust.normalizer).__name__ in ("BertNormalizer", "NoneType")
        and type(rust.pre_tokenizer).__name__ == "BertPreTokenizer"
        and all(token.special for token in rust.get_added_tokens_decoder().values())
    )


def _sees_space_before(rust: Any) -> bool:
    """Tells whether a word has different ids after a space, as with byte-level BPE that adds no space itself."""
    alone, spaced, twice = (rust.encode(text, add_special_tokens=False).ids for text in ("a", " a", "a a"))
    return alone != spaced and twice == alone + spaced
