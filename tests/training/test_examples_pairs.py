"""Pairs are those of the paper, on spans, and each document's are its own."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus_cases import ListedCorpus, assert_same_examples, corpus_of, random_corpus
from fastbert.training.data import pairs
from fastbert.training.data.examples import Examples, sentences_of
from fastbert.training.data.order import digest, mixed
from fastbert.training.data.pairs import Pool, cuts, heads, next_sentence_examples

SIZES = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=12), min_size=2, max_size=8)


def pairs_of(corpus: ListedCorpus, documents: object = None, **options: object) -> Examples:
    options = {"seed": 3, "epoch": 0, "max_length": 64} | options
    return next_sentence_examples(corpus, range(corpus.n_documents) if documents is None else documents, **options)


def spans_of(examples: Examples, i: int) -> list[tuple[int, int, int]]:
    """(start, length, segment) of each span of example i."""
    first, last = examples.offsets[i], examples.offsets[i + 1]
    columns = (examples.starts, examples.lengths, examples.segments)
    return list(zip(*(column[first:last].tolist() for column in columns), strict=True))


def test_take_and_join_keep_examples_whole() -> None:
    """Catches a span that moves to another example where examples are chosen, reordered or joined."""
    examples = pairs_of(random_corpus(20))
    order = np.random.default_rng(0).permutation(len(examples))
    taken = examples.take(order)
    assert [spans_of(taken, k) for k in range(len(order))] == [spans_of(examples, i) for i in order]
    assert np.array_equal(taken.n_tokens(), examples.n_tokens()[order])
    joined = Examples.join([examples.take(order[:3]), examples.take([]), examples.take(order[3:])])
    assert_same_examples(joined, taken)
    assert len(Examples.join([])) == 0 and len(Examples.join([]).n_tokens()) == 0
    sizes = [1 + sum(n + 1 for _, n, _ in spans_of(examples, i)) for i in range(len(examples))]
    assert examples.n_tokens().tolist() == sizes


@given(SIZES, st.integers(2, 20))
def test_sentences_are_all_there(sizes: list[list[int]], longest: int) -> None:
    """Catches text that is lost or doubled where a sentence is too long and comes in pieces."""
    corpus = corpus_of(sizes)
    documents = np.arange(len(sizes))[::-1]
    starts, ends, offsets = sentences_of(corpus, documents, longest)
    assert np.diff(ends).max() <= longest
    for i, document in enumerate(documents):
        tokens = [
            token
            for j in range(offsets[i], offsets[i + 1])
            for token in range(starts[j], starts[j] + ends[j + 1] - ends[j])
        ]
        assert tokens == list(range(corpus.document_offsets[document], corpus.document_offsets[document + 1]))
        sizes_of_pieces = [min(longest, n - k) for n in sizes[document] for k in range(0, n, longest)]
        assert np.diff(ends[offsets[i] : offsets[i + 1] + 1]).tolist() == sizes_of_pieces


@given(SIZES, st.integers(5, 64), st.floats(0, 1), st.integers(0, 5))
@settings(deadline=None)
def test_pairs_are_what_they_say(sizes: list[list[int]], max_length: int, short: float, seed: int) -> None:
    """Catches a "random" part from its own document, a "next" one that is not, and a sequence that is too long."""
    corpus = corpus_of(sizes)
    examples = pairs_of(corpus, max_length=max_length, short_probability=short, seed=seed)
    assert examples.n_tokens().max() <= max_length
    assert examples.lengths.min() >= 1
    assert np.array_equal(np.unique(examples.documents), np.arange(len(sizes)))
    for i in range(len(examples)):
        (a, n_a, segment), *second = spans_of(examples, i)
        document = examples.documents[i]
        assert segment == 0 and corpus.document_of([a, a + n_a - 1]).tolist() == [document] * 2
        assert len(second) == (examples.is_next[i] >= 0)
        for b, n_b, segment in second:
            owners = set(corpus.document_of([b, b + n_b - 1]).tolist())
            assert segment == 1 and len(owners) == 1
            assert (owners == {document}) == (examples.is_next[i] == 1)
            assert b >= a + n_a or examples.is_next[i] == 0


@given(SIZES, st.integers(0, 5))
@settings(deadline=None)
def test_no_text_is_lost_without_truncation(sizes: list[list[int]], seed: int) -> None:
    """Catches sentences that a random part displaced and that were not put back, and a gap between two parts."""
    corpus = corpus_of(sizes)
    examples = pairs_of(corpus, max_length=4000, short_probability=0, seed=seed)
    seen = []
    for i in range(len(examples)):
        own = spans_of(examples, i)[: 1 if examples.is_next[i] == 0 else 2]
        seen += [token for start, n, _ in own for token in range(start, start + n)]
    assert seen == list(range(corpus.n_tokens))


@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 70))
def test_truncation_takes_from_the_longer_part(a: int, b: int, limit: int) -> None:
    """Catches another length than that of the paper's loop, which drops one token at a time."""
    n_a, n_b = a, b
    while n_a + n_b > limit:
        if n_a > n_b:
            n_a -= 1
        else:
            n_b -= 1
    cut_a, cut_b = cuts(np.array([a]), np.array([b]), limit)
    assert (a - cut_a[0], b - cut_b[0]) == (n_a, n_b)


@pytest.mark.parametrize("n", [1, 5, 63, 64, 65, 200])
def test_front_and_back_are_as_likely(n: int) -> None:
    """Catches tokens that are cut from one end more than from the other, or not one by one."""
    tries = 4000
    counts = heads(np.full(tries, n), mixed(np.arange(tries), digest(8, n)))
    assert counts.min() >= 0 and counts.max() <= n
    assert abs(counts.mean() - n / 2) < 5 * np.sqrt(n / 4 / tries)
    assert abs(counts.var() / (n / 4) - 1) < 5 * np.sqrt(2 / tries)
    assert heads(np.array([0, n, 0]), mixed(np.arange(3), 0))[[0, 2]].tolist() == [0, 0]


def test_parts_lose_tokens_at_both_ends() -> None:
    """Catches a part of a pair that is cut at its end only, or that goes beyond its sentence."""
    n = 2000
    corpus = corpus_of([[40, 41]] * n)
    examples = pairs_of(corpus, short_probability=0)
    first = examples.offsets[:-1][examples.is_next == 1]
    starts = examples.documents[examples.is_next == 1] * 81
    for spans, begin, size, length in ((first, starts, 40, 31), (first + 1, starts + 40, 41, 30)):
        cut = examples.starts[spans] - begin
        n_cut = size - length
        assert set(examples.lengths[spans].tolist()) == {length}
        assert cut.min() >= 0 and cut.max() <= n_cut
        assert abs(cut.mean() - n_cut / 2) < 5 * np.sqrt(n_cut / 4 / len(spans))


def paper(corpus: ListedCorpus, max_length: int, short: float, rng: random.Random) -> list[tuple[int, int, int]]:
    """(tokens of the first part, of the second part, is next) by a plain loop over sentences and tokens."""
    bounds = corpus.document_offsets
    limit = max_length - 3
    documents = [
        np.diff([*corpus.sentence_starts(a, b), b]).tolist() for a, b in zip(bounds[:-1], bounds[1:], strict=True)
    ]
    results = []
    for number, document in enumerate(documents):
        target = rng.randint(2, limit) if rng.random() < short else limit
        chunk: list[int] = []
        i = 0
        while i < len(document):
            chunk.append(document[i])
            if i == len(document) - 1 or sum(chunk) >= target:
                split = rng.randint(1, len(chunk) - 1) if len(chunk) > 1 else 1
                a, b, is_next = sum(chunk[:split]), sum(chunk[split:]), 1
                if len(chunk) == 1:
                    b, is_next = 0, -1
                elif rng.random() < 0.5:
                    other = documents[rng.choice([k for k in range(len(documents)) if k != number])]
                    b, is_next = 0, 0
                    for size in other[rng.randrange(len(other)) :]:
                        b += size
                        if b >= target - a:
                            break
                    i -= len(chunk) - split
                while a + b > limit:
                    if a > b:
                        a -= 1
                    else:
                        b -= 1
                results.append((a, b, is_next))
                chunk = []
            i += 1
    return results


def test_statistics_are_those_of_the_paper() -> None:
    """Catches another distribution of lengths, of pairs or of the number of sequences than the plain loop gives."""
    corpus = random_corpus(1500, mean=14)
    expected = np.array(paper(corpus, 64, 0.1, random.Random(0)), float)
    examples = pairs_of(corpus, max_length=64)
    second = np.zeros(len(examples))
    is_pair = examples.is_next >= 0
    second[is_pair] = examples.lengths[examples.offsets[:-1][is_pair] + 1]
    ours = np.stack([examples.lengths[examples.offsets[:-1]], second, examples.is_next], 1).astype(float)
    assert abs(len(ours) / len(expected) - 1) < 0.03
    for kind in (-1, 0, 1):
        a, b = ours[ours[:, 2] == kind], expected[expected[:, 2] == kind]
        assert abs(len(a) / len(ours) - len(b) / len(expected)) < 0.02
        for column in (0, 1):
            spread = np.sqrt(a[:, column].var() / len(a) + b[:, column].var() / len(b))
            assert abs(a[:, column].mean() - b[:, column].mean()) <= 5 * spread + 1e-9
    totals, expected_totals = ours[:, :2].sum(1), expected[:, :2].sum(1)
    assert abs((totals == 61).mean() - (expected_totals == 61).mean()) < 0.03


def test_next_and_random_are_half_each() -> None:
    """Catches a coin that is not fair, or one that chunks of a single sentence are counted in."""
    examples = pairs_of(random_corpus(1500))
    n_next, n_random = (examples.is_next == 1).sum(), (examples.is_next == 0).sum()
    n = n_next + n_random
    assert n > 3000 and abs(n_next - n / 2) < 5 * np.sqrt(n / 4)
    lone = pairs_of(corpus_of([[7], [200], [9]]), short_probability=0)
    assert lone.is_next.tolist() == [-1] * 6 and lone.lengths.tolist() == [7, 61, 61, 61, 17, 9]


def test_a_tenth_of_documents_has_short_sequences() -> None:
    """Catches a target length that is short too often, too rarely, or not spread from 2 tokens on."""
    n, limit = 1000, 29
    corpus = corpus_of([[1] * 200] * n)
    for probability in (0.0, 0.1, 1.0):
        examples = pairs_of(corpus, max_length=limit + 3, short_probability=probability)
        longest = np.zeros(n, int)
        np.maximum.at(longest, examples.documents, examples.n_tokens() - 3 * (examples.is_next >= 0))
        n_short = (longest < limit).sum()
        mean = probability * (limit - 2) / (limit - 1)  # a random target may be the whole length
        assert abs(n_short - n * mean) <= 5 * np.sqrt(n * mean * (1 - mean))
        if probability == 1:
            assert longest.min() == 2
            assert abs(longest.mean() - (2 + limit) / 2) < 5 * limit / np.sqrt(12 * n)


def test_examples_are_the_documents_own() -> None:
    """Catches pairs that depend on the documents beside them, on an earlier call, or not on the seed and the epoch."""
    corpus = random_corpus(30)
    whole = pairs_of(corpus)
    assert_same_examples(whole, Examples.join([pairs_of(corpus, [i]) for i in range(30)]))
    assert_same_examples(pairs_of(corpus, [7, 2]), Examples.join([pairs_of(corpus, [i]) for i in (7, 2)]))
    for options in ({"seed": 4}, {"epoch": 1}):
        other = pairs_of(corpus, **options)
        assert len(other) != len(whole) or not np.array_equal(other.is_next, whole.is_next)
    assert len(pairs_of(corpus, [])) == 0


@pytest.mark.parametrize("as_pool", [False, True])
def test_random_parts_are_from_the_pool(as_pool: bool) -> None:
    """Catches a held-out document in training, an own one as random, and a document of the pool that never comes."""
    corpus = random_corpus(40)
    numbers = np.array([3, 9, 12, 20, 33])
    pool = Pool(len(numbers), lambda places: numbers[places]) if as_pool else numbers
    counts = np.zeros(40, int)
    for epoch in range(60):
        examples = pairs_of(corpus, [9, 12, 30], epoch=epoch, pool=pool)
        chosen = examples.offsets[:-1][examples.is_next == 0] + 1
        others = corpus.document_of(examples.starts[chosen])
        assert not (others == examples.documents[examples.is_next == 0]).any()
        np.add.at(counts, others, 1)
    assert np.flatnonzero(counts).tolist() == numbers.tolist()
    n = counts.sum()
    assert abs(counts[3] - counts[33]) < 5 * np.sqrt(2 * n / 5)


def test_the_random_sentence_is_any() -> None:
    """Catches random parts that prefer some sentences of a document."""
    corpus = corpus_of([[3] * 6, *([[10, 10]] * 400)])
    examples = pairs_of(corpus, range(1, 401), pool=np.array([0, 401 - 1]), max_length=1000)
    starts = examples.starts[examples.offsets[:-1][examples.is_next == 0] + 1]
    counts = np.bincount(starts[starts < 18], minlength=18)
    assert np.flatnonzero(counts).tolist() == [0, 3, 6, 9, 12, 15]
    n = counts.sum()
    assert abs(counts[::3] - n / 6).max() < 5 * np.sqrt(n / 6)


def test_long_documents_are_not_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a book that is read for each random part, and parts that are short or from one place of it."""
    monkeypatch.setattr(pairs, "WINDOW", 20)
    corpus = corpus_of([[10, 10] * 5000, [10, 10] * 5000, *([[10, 10]] * 300)])
    corpus.asked.clear()
    examples = pairs_of(corpus, range(2, 302), pool=np.array([0, 1]), short_probability=0)
    assert max(end - start for start, end in corpus.asked) <= 81
    chosen = examples.offsets[:-1][examples.is_next == 0] + 1
    starts, lengths = examples.starts[chosen], examples.lengths[chosen]
    inside = starts < 199_900
    assert lengths[inside].min() == 51
    assert abs(starts.mean() / 200_000 - 0.5) < 5 / np.sqrt(12 * len(starts))
    monkeypatch.setattr(pairs, "WINDOW", 5)
    huge = pairs_of(corpus_of([[5000], [5000], *([[10, 10]] * 30)]), range(2, 32), pool=np.array([0, 1]))
    assert huge.n_tokens().max() == 64


def test_a_single_document_is_refused() -> None:
    """Catches a search for another document that has no end, and a message that does not say what to do."""
    corpus = corpus_of([[5, 5, 5]])
    with pytest.raises(ValueError, match="--no-nsp"):
        pairs_of(corpus)
    with pytest.raises(ValueError, match="blank lines between documents"):
        pairs_of(random_corpus(3), pool=np.array([1]))
    with pytest.raises(ValueError, match="max_length: got 4"):
        pairs_of(random_corpus(3), max_length=4)
