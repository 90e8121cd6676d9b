"""Examples are spans of a corpus that become sequences. They are arrays of numbers, and no token is copied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np


class TokenSource(Protocol):
    """A TokenSource returns the token ids of consecutive documents; ``shards.Corpus`` is one.

    ``document_offsets``: (n_documents + 1,) integers, in tokens. Each document has at least one token. ``has_words``:
    whether ``word_starts`` is available.
    """

    vocab_size: int
    n_documents: int
    n_tokens: int
    document_offsets: np.ndarray
    has_words: bool

    def sentence_starts(self, start: int, end: int) -> np.ndarray:
        """Returns the indices of the tokens in [start, end) that begin a sentence: int64, ascending."""
        ...

    def take(self, starts: Any, lengths: Any) -> np.ndarray:
        """Returns the ids of spans of tokens, concatenated: int64."""
        ...

    def word_starts(self, starts: Any, lengths: Any) -> np.ndarray:
        """Returns for each token of ``take`` whether it begins a word: bool."""
        ...


@dataclass(frozen=True, eq=False)
class Examples:
    """Examples holds n sequences of one or more spans of tokens.

    ``starts``, ``lengths``, ``segments``: (n_spans,) int64, the first token, the number of tokens and the token type of
    each span. ``offsets``: (n + 1,) int64; example i has the spans ``offsets[i]`` to ``offsets[i + 1]``. ``is_next``:
    (n,) int8, 1 if the second span follows the first in the text, 0 if it is from a random document, -1 if the example
    is no pair. ``documents``: (n,) int64, the document of the first span.
    """

    starts: np.ndarray
    lengths: np.ndarray
    segments: np.ndarray
    offsets: np.ndarray
    is_next: np.ndarray
    documents: np.ndarray

    def __len__(self) -> int:
        return len(self.documents)

    def n_tokens(self) -> np.ndarray:
        """Returns the number of tokens of each example, with [CLS] and a [SEP] after each span: (n,) int64."""
        ends = np.concatenate([[0], np.cumsum(self.lengths)])
        return np.diff(ends[self.offsets]) + np.diff(self.offsets) + 1

    def take(self, indices: Any) -> Examples:
        """Returns the examples with the given indices, integers of shape (k,), in that order."""
        indices = np.asarray(indices, np.int64)
        counts = self.offsets[indices + 1] - self.offsets[indices]
        offsets = np.concatenate([[0], np.cumsum(counts)])
        spans = np.arange(offsets[-1]) + np.repeat(self.offsets[indices] - offsets[:-1], counts)
        return Examples(
            self.starts[spans],
            self.lengths[spans],
            self.segments[spans],
            offsets,
            self.is_next[indices],
            self.documents[indices],
        )

    @classmethod
    def join(cls, parts: Sequence[Examples]) -> Examples:
        """Returns the examples of all parts, concatenated."""
        if not parts:
            none = np.empty(0, np.int64)
            return cls(none, none, none, np.zeros(1, np.int64), np.empty(0, np.int8), none)
        counts = np.concatenate([np.diff(part.offsets) for part in parts])
        return cls(
            np.concatenate([part.starts for part in parts]),
            np.concatenate([part.lengths for part in parts]),
            np.concatenate([part.segments for part in parts]),
            np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            np.concatenate([part.is_next for part in parts]),
            np.concatenate([part.documents for part in parts]),
        )


class Sentences(NamedTuple):
    """Sentences holds the sentences of some documents, in the order of the documents.

    ``starts``: (n,) int64, their first tokens in the corpus. ``ends``: (n + 1,) int64, the cumulative number of their
    tokens. ``offsets``: (n_documents + 1,) int64; document i has the sentences ``offsets[i]`` to ``offsets[i + 1]``.
    """

    starts: np.ndarray
    ends: np.ndarray
    offsets: np.ndarray


def sentences_of(corpus: TokenSource, documents: np.ndarray, longest: int) -> Sentences:
    """Returns the sentences of documents; a longer one is split into pieces of ``longest`` tokens and a rest."""
    bounds = np.asarray(corpus.document_offsets)
    firsts, lasts = bounds[documents].astype(np.int64), bounds[documents + 1].astype(np.int64)
    parts = [corpus.sentence_starts(a, b) for a, b in zip(firsts.tolist(), lasts.tolist(), strict=True)]
    counts = np.array([len(part) for part in parts], np.int64)
    starts = np.concatenate([np.empty(0, np.int64), *parts])
    ends = np.append(starts[1:], 0)
    ends[np.cumsum(counts) - 1] = lasts
    lengths = ends - starts
    n_pieces = -(-lengths // longest)
    if (n_pieces > 1).any():
        n_before = np.concatenate([[0], np.cumsum(n_pieces)])
        piece = np.arange(n_before[-1]) - np.repeat(n_before[:-1], n_pieces)
        starts = np.repeat(starts, n_pieces) + piece * longest
        lengths = np.minimum(np.repeat(lengths, n_pieces) - piece * longest, longest)
        offsets = n_before[np.concatenate([[0], np.cumsum(counts)])]
    else:
        offsets = np.concatenate([[0], np.cumsum(counts)])
    return Sentences(starts, np.concatenate([[0], np.cumsum(lengths)]), offsets)
