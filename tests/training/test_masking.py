"""Masks have the rates that they promise, and never touch what they must not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from fastbert.training.data.masking import mask_tokens
from fastbert.training.data.order import generator

CLS, SEP, MASK = 1, 2, 3
REPLACEMENTS = np.arange(5, 400)


def masked(
    lengths: list[int], seed: int = 0, words: np.ndarray | None = None, probability: float = 0.15
) -> tuple[np.ndarray, ...]:
    """(ids, offsets, maskable, input_ids, rows, labels) of sequences of so many tokens between [CLS] and [SEP]."""
    offsets = np.cumsum([0, *(n + 2 for n in lengths)])
    ids = 5 + np.arange(offsets[-1]) % 300
    ids[offsets[:-1]], ids[offsets[1:] - 1] = CLS, SEP
    maskable = ids >= 5
    result = mask_tokens(
        ids,
        offsets,
        maskable,
        words,
        generator(seed, "mask"),
        probability=probability,
        mask_id=MASK,
        replacements=REPLACEMENTS,
    )
    return ids, offsets, maskable, *result


@given(st.lists(st.integers(0, 40), max_size=8), st.floats(0.01, 0.99), st.integers(0, 9), st.booleans())
@settings(deadline=None)
def test_masks_keep_their_promises(lengths: list[int], probability: float, seed: int, whole: bool) -> None:
    """Catches a special token that is masked, a sequence without a mask, wrong labels, and a change elsewhere."""
    words = np.random.default_rng(seed).random(sum(lengths) + 2 * len(lengths)) < 0.5 if whole else None
    ids, offsets, maskable, input_ids, rows, labels = masked(lengths, seed, words, probability)
    assert input_ids.dtype == rows.dtype == labels.dtype == np.int64
    assert (np.diff(rows) > 0).all() and maskable[rows].all()
    assert np.array_equal(labels, ids[rows])
    untouched = np.setdiff1d(np.arange(len(ids)), rows)
    assert np.array_equal(input_ids[untouched], ids[untouched])
    counts = np.diff(np.searchsorted(rows, offsets))
    assert np.array_equal(counts > 0, np.array(lengths, int) > 0)
    if not whole:
        wanted = np.array(lengths) * probability
        assert (counts <= np.maximum(np.floor(wanted) + 1, 1)).all() and (counts >= np.floor(wanted)).all()


def test_rates_are_those_of_the_paper() -> None:
    """Catches another share than 15 %, another split than 80/10/10, and places or random ids that are preferred."""
    n, length = 4000, 50
    ids, offsets, _, input_ids, rows, labels = masked([length] * n)
    assert abs(len(rows) - 0.15 * n * length) < 5 * np.sqrt(n / 4)  # 7 or 8 a sequence
    m = len(rows)
    is_mask, is_kept = input_ids[rows] == MASK, input_ids[rows] == labels
    by_chance = 0.1 / len(REPLACEMENTS)
    for share, rate in ((is_mask.mean(), 0.8), (is_kept.mean(), 0.1 + by_chance)):
        assert abs(share - rate) < 5 * np.sqrt(rate * (1 - rate) / m)
    places = np.bincount((rows % (length + 2)) - 1, minlength=length)
    assert abs(places - m / length).max() < 5 * np.sqrt(m / length)
    random = input_ids[rows][~is_mask & ~is_kept]
    counts = np.bincount(random, minlength=400)
    assert counts[:5].sum() == 0 and abs(counts[5:] - len(random) / 395).max() < 6 * np.sqrt(len(random) / 395)


@pytest.mark.parametrize("length", [7, 8, 13, 20])
def test_rounding_is_fair(length: int) -> None:
    """Catches a number of masks that is rounded down, so that short sequences have fewer than their share."""
    n = 4000
    rows = masked([length] * n)[4]
    mean = 0.15 * length
    fraction = mean % 1
    assert abs(len(rows) / n - mean) < 5 * np.sqrt(fraction * (1 - fraction) / n) + 1e-9
    assert len(masked([3] * n)[4]) == n


def test_pairs_of_tokens_are_chosen_alike() -> None:
    """Catches a choice in which neighbours come together, or never do."""
    n, length = 6000, 10
    rows = masked([length] * n, probability=0.3)[4].reshape(n, 3) % (length + 2)
    seen = np.zeros((length + 2, length + 2), int)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        np.add.at(seen, (rows[:, a], rows[:, b]), 1)
    counts = seen[np.triu_indices(length + 2, 1)]
    counts = counts[counts > 0]
    mean = 3 * n / 45
    assert len(counts) == 45 and abs(counts - mean).max() < 5 * np.sqrt(mean)


def test_masks_follow_from_the_generator() -> None:
    """Catches masks that depend on something else than the generator, or not on it."""
    first, second, other = (masked([30, 60, 5], seed)[3:] for seed in (1, 1, 2))
    for a, b in zip(first, second, strict=True):
        assert np.array_equal(a, b)
    assert not np.array_equal(first[1], other[1])


def test_whole_words_have_the_same_share() -> None:
    """Catches a budget that long words overrun or never fill, and words that are chosen in part."""
    n, length = 3000, 60
    words = np.random.default_rng(0).random(n * (length + 2)) < 0.4
    _, offsets, maskable, _, rows, _ = masked([length] * n, words=words)
    counts = np.diff(np.searchsorted(rows, offsets))
    assert abs(counts.mean() - 0.15 * length) < 5 * counts.std() / np.sqrt(n)
    chosen = np.zeros(len(words), bool)
    chosen[rows] = True
    inside = maskable[1:] & maskable[:-1] & ~words[1:]  # the second token continues the first one's word
    assert np.array_equal(chosen[1:][inside], chosen[:-1][inside])


def test_words_end_with_their_sequence() -> None:
    """Catches a word that goes on behind a [SEP] or in the next sequence, where no word begins."""
    n = 300
    words = np.zeros(n * 5, bool)
    _, offsets, _, _, rows, _ = masked([3] * n, words=words, probability=0.5)
    assert np.array_equal(rows, np.flatnonzero(np.arange(n * 5) % 5 % 4))  # one word each, always chosen
    ids = np.array([CLS, 10, 11, SEP, 12, 13, SEP] * n)
    offsets = np.arange(n + 1) * 7
    rows = mask_tokens(
        ids,
        offsets,
        ids >= 5,
        np.zeros(len(ids), bool),
        generator(0),
        mask_id=MASK,
        replacements=REPLACEMENTS,
    )[1].reshape(n, 2)
    assert np.array_equal(rows[:, 1] - rows[:, 0], np.ones(n)) and len(set((rows[:, 0] % 7).tolist())) == 2


TEXT = [
    "unbelievable internationalisation of the tokenizers library",
    "나는 커피를 좋아한다 그리고 우리는 도서관에서 책을 읽었습니다",
    "the believable library of internationals reads 커피 and 도서관에서",
]


def wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=110, special_tokens=["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"])
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"]
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=special)
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"]
    trainer = trainers.UnigramTrainer(vocab_size=80, special_tokens=special, unk_token="[UNK]")
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


@pytest.mark.parametrize("make", [wordpiece, bpe, unigram])
def test_whole_words_of_every_tokenizer(make: Callable[[], Tokenizer]) -> None:
    """Catches a word, in Latin letters or Hangul, of which some pieces are masked and others can be read."""
    encodings = [make().encode(text) for text in TEXT] * 40
    numbers = [np.array([-1, *encoding.word_ids, -2]) for encoding in encodings]
    offsets = np.cumsum([0, *map(len, numbers)])
    ids = np.concatenate([[CLS, *encoding.ids, SEP] for encoding in encodings])
    word_of = np.concatenate([word + 1000 * i for i, word in enumerate(numbers)])
    words = np.concatenate([[True], np.diff(word_of) != 0])
    rows = mask_tokens(
        ids, offsets, ids >= 5, words, generator(0), mask_id=MASK, replacements=np.arange(5, ids.max() + 1)
    )[1]
    chosen = np.zeros(len(ids), bool)
    chosen[rows] = True
    n_pieces = 0
    for word in np.unique(word_of):
        pieces = word_of == word
        assert chosen[pieces].all() or not chosen[pieces & (ids >= 5)].any()
        n_pieces += int(pieces.sum() > 1 and chosen[pieces].any())
    assert n_pieces > 20, "words of several pieces were chosen"
    assert abs(len(rows) / (ids >= 5).sum() - 0.15) < 0.04
