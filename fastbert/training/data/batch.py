"""A Batch holds packed sequences without padding, and the tokens to predict. It is made from Examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fastbert.training.data.examples import Examples, TokenSource
from fastbert.training.data.masking import mask_tokens
from fastbert.training.data.order import generator
from fastbert.training.data.special import SpecialIds

if TYPE_CHECKING:
    import torch

EVALUATION = -1  # the step of evaluation batches, whose masks are always the same
NO_PAIR = -100  # the next-sentence label of a sequence that is no pair


@dataclass(frozen=True)
class Masking:
    """Masking holds the ``probability`` of a token to be chosen, and whether ``whole_words`` are chosen."""

    probability: float = 0.15
    whole_words: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.probability < 1:
            raise ValueError(f"probability: got {self.probability!r}, expected more than 0 and less than 1")


@dataclass(frozen=True, eq=False)
class Batch:
    """A Batch holds B sequences with T tokens in total.

    ``input_ids``: (T,) int64, with masks. ``token_type_ids``: (T,) int64. ``cu_seqlens``: (B + 1,) int32, from 0 to T.
    ``rows``: (M,) int64, the indices of the tokens to predict, ascending. ``labels``: (M,) int64, their ids.
    ``next_sentence_label``: (B,) int64, 0 if the second part follows the first, 1 if it is random, -100 for a sequence
    that is no pair. ``documents``: (B,) int64, the documents of the first parts.
    """

    input_ids: np.ndarray
    token_type_ids: np.ndarray
    cu_seqlens: np.ndarray
    rows: np.ndarray
    labels: np.ndarray
    next_sentence_label: np.ndarray
    documents: np.ndarray

    @property
    def n_tokens(self) -> int:
        """Returns T, the number of tokens in the batch."""
        return len(self.input_ids)

    @property
    def n_pairs(self) -> int:
        """Returns the number of sequences with a next-sentence label."""
        return int(np.count_nonzero(self.next_sentence_label != NO_PAIR))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns the arrays as CPU tensors, by name. They share the memory of the arrays."""
        import torch

        return {name: torch.from_numpy(getattr(self, name)) for name in self.__dataclass_fields__}


def make_batch(
    corpus: TokenSource,
    examples: Examples,
    special: SpecialIds,
    *,
    seed: int,
    step: int,
    first_token: int,
    masking: Masking,
) -> Batch:
    """Returns the packed and masked batch of examples: [CLS] span [SEP], or [CLS] span [SEP] span [SEP], and so on.

    ``first_token``: the number of tokens of the step before this batch. The masks depend on ``seed``, ``step``,
    ``first_token`` and the text. For evaluation ``step`` is ``EVALUATION``.

    Raises ValueError if whole words are requested and the corpus has no starts of words.
    """
    if masking.whole_words and not corpus.has_words:
        raise ValueError("whole_words: got True, expected False for a corpus that does not know where words begin")
    n_spans = np.diff(examples.offsets)
    cu_seqlens = np.concatenate([[0], np.cumsum(examples.n_tokens())])
    n_tokens = int(cu_seqlens[-1])
    # The [SEP] of a span follows all earlier spans, their [SEP]s, and the [CLS]s up to its own sequence.
    n_cls = np.repeat(np.arange(1, len(examples) + 1), n_spans)
    seps = np.cumsum(examples.lengths + 1) + n_cls - 1
    text = np.ones(n_tokens, bool)
    text[cu_seqlens[:-1]] = False
    text[seps] = False
    ids = np.empty(n_tokens, np.int64)
    ids[cu_seqlens[:-1]] = special.cls
    ids[seps] = special.sep
    ids[text] = corpus.take(examples.starts, examples.lengths)
    sizes = examples.lengths + 1
    sizes[examples.offsets[:-1]] += 1  # the first span includes the [CLS]

    is_special = np.zeros(max(corpus.vocab_size, *(i + 1 for i in special.all)), bool)
    is_special[list(special.all)] = True
    words = None
    if masking.whole_words:
        words = np.ones(n_tokens, bool)
        words[text] = corpus.word_starts(examples.starts, examples.lengths)
    input_ids, rows, labels = mask_tokens(
        ids,
        cu_seqlens,
        text & ~is_special[ids],
        words,
        generator(seed, "mask", step, first_token),
        probability=masking.probability,
        mask_id=special.mask,
        replacements=np.flatnonzero(~is_special[: corpus.vocab_size]),
    )
    return Batch(
        input_ids,
        np.repeat(examples.segments, sizes),
        cu_seqlens.astype(np.int32),
        rows,
        labels,
        np.where(examples.is_next < 0, NO_PAIR, 1 - examples.is_next.astype(np.int64)),
        examples.documents,
    )
