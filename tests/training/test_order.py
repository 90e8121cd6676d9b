"""The order of documents and random numbers follow from a seed and a key alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastbert.training.data.order import Documents, Permutation, digest, fractions, generator, mixed


def test_random_numbers_stay_what_they_are() -> None:
    """Catches a platform, a NumPy or a change of ours that gives a resumed run other numbers than before."""
    assert digest(8, 1, "epoch", 2) == 2541980007352929054
    draws = generator(1, "mask", 7, 4096).integers(0, 2**64, 2, np.uint64)
    assert draws.tolist() == [11979519427465866391, 14559965196886571867]
    assert mixed(np.arange(3), 5).tolist() == [13168350753275463132, 7134611160154358618, 13877614986023876344]
    assert Permutation(1000, 1, "epoch", 2)(np.arange(5)).tolist() == [968, 828, 853, 147, 291]


def test_generators_of_other_keys_are_others() -> None:
    """Catches keys that run into one another, such as (1, 23) and (12, 3), or a name and a number."""
    keys = [(), (1, 23), (12, 3), (123,), ("1", 23), ("a", 1), ("a", 2), ("b", 1), ("a", 1, 0), ("a", -1), (2**70,)]
    firsts = {float(generator(seed, *key).random()) for seed in (0, 1, -1) for key in keys}
    assert len(firsts) == 3 * len(keys)
    assert generator(np.int64(3), "a", np.int32(4)).random() == generator(3, "a", 4).random()
    with pytest.raises(TypeError):
        generator(0, 1.5)  # type: ignore[arg-type]


def test_words_are_mixed_well() -> None:
    """Catches a mixer that leaves a bit of neighbouring words related, or fractions outside of [0, 1)."""
    words = mixed(np.arange(1 << 14), digest(8, 3))
    bits = (words[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    assert abs(bits.mean(0) - 0.5).max() < 5 * 0.5 / 2**7
    changes = (bits[1:] != bits[:-1]).mean(0)
    assert abs(changes - 0.5).max() < 5 * 0.5 / 2**7
    values = fractions(words)
    assert values.dtype == np.float64 and values.min() >= 0 and values.max() < 1
    assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 5 / 2**7
    assert fractions(np.array([2**64 - 1], np.uint64))[0] < 1


@given(st.integers(1, 3000), st.integers(0, 2**64))
def test_a_permutation_has_each_number_once(n: int, seed: int) -> None:
    """Catches a document that an epoch sees twice or never, for any number of documents."""
    numbers = Permutation(n, seed, "epoch", 0)(np.arange(n))
    assert numbers.dtype == np.int64
    assert np.array_equal(np.sort(numbers), np.arange(n))


def test_a_permutation_needs_no_table() -> None:
    """Catches memory or time that grows with the number of documents."""
    n = 10**15
    numbers = Permutation(n, 0)(np.arange(n - 1000, n))
    assert len(set(numbers.tolist())) == 1000 and numbers.min() >= 0 and numbers.max() < n
    assert Permutation(7, 0)(np.array([[1, 2], [3, 4]])).shape == (2, 2)
    assert Permutation(7, 0)([]).tolist() == []


@pytest.mark.parametrize("n", [1000, 1024, 4097, 100_003])
def test_neighbours_are_strangers(n: int) -> None:
    """Catches a network with too few rounds, in which places beside one another stay related."""
    numbers = Permutation(n, 5, "x")(np.arange(n)).astype(float)
    bound = 5 / np.sqrt(n)
    for distance in (1, 2, 16, 32):
        assert abs(np.corrcoef(numbers[distance:], numbers[:-distance])[0, 1]) < bound
    assert abs(np.corrcoef(numbers, np.arange(n))[0, 1]) < bound
    gaps = np.abs(np.diff(numbers)) / n  # of two random numbers, in the mean a third
    assert abs(gaps.mean() - 1 / 3) < bound
    other = Permutation(n, 5, "y")(np.arange(n)).astype(float)
    assert abs(np.corrcoef(numbers, other)[0, 1]) < bound


def test_small_permutations_are_all_as_likely() -> None:
    """Catches a network that never gives some orders of a few documents, or prefers one."""
    tries = 3000
    orders = Counter(tuple(Permutation(3, seed)(np.arange(3)).tolist()) for seed in range(tries))
    assert len(orders) == 6
    assert max(abs(count / tries - 1 / 6) for count in orders.values()) < 5 * np.sqrt(1 / 6 * 5 / 6 / tries)
    places = Counter(int(Permutation(5, seed)([2])[0]) for seed in range(tries))
    assert max(abs(places[i] / tries - 1 / 5) for i in range(5)) < 5 * np.sqrt(1 / 5 * 4 / 5 / tries)


def test_places_outside_are_refused() -> None:
    """Catches a place that silently walks to some other number."""
    for places in ([-1], [0, 10]):
        with pytest.raises(IndexError, match="expected 0 to 9"):
            Permutation(10, 0)(places)
    with pytest.raises(ValueError, match="n: got 0"):
        Permutation(0, 0)


@given(st.integers(1, 400), st.data())
def test_held_out_documents_are_never_trained_on(n: int, data: st.DataObject) -> None:
    """Catches an epoch that sees a held-out document, sees one twice, or misses one."""
    m = data.draw(st.integers(0, n))
    documents = Documents(n, m, seed=data.draw(st.integers(0, 99)))
    held_out = documents.held_out(np.arange(m))
    training = documents.training(np.arange(n - m))
    assert sorted([*held_out.tolist(), *training.tolist()]) == list(range(n))
    for epoch in (0, 1, 7) if m < n else ():
        assert np.array_equal(np.sort(documents.epoch(epoch, np.arange(n - m))), np.sort(training))


def test_epochs_have_other_orders() -> None:
    """Catches an order that all epochs share, or one that the seed does not change."""
    places = np.arange(90)
    documents, others = Documents(100, 10, seed=1), Documents(100, 10, seed=2)
    assert not np.array_equal(documents.epoch(0, places), documents.epoch(1, places))
    assert not np.array_equal(documents.epoch(0, places), others.epoch(0, places))
    for held_out in (-1, 101):
        with pytest.raises(ValueError, match="held_out"):
            Documents(100, held_out, seed=1)
