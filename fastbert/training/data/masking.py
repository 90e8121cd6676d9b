"""Masking chooses the tokens to predict, and their replacements in the input.

Devlin et al. 2018: 15 % of the tokens; of these, 80 % become [MASK], 10 % a random token, and 10 % stay unchanged.
"""

from __future__ import annotations

import numpy as np

KEPT, REPLACED = 0.1, 0.2  # below the first fraction a token stays; up to the second it becomes a random one


def mask_tokens(
    ids: np.ndarray,
    sequence_offsets: np.ndarray,
    maskable: np.ndarray,
    words: np.ndarray | None,
    generator: np.random.Generator,
    *,
    probability: float = 0.15,
    mask_id: int,
    replacements: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the input ids, (T,) int64; the indices to predict, (M,) int64, ascending; and their ids, (M,) int64.

    ``ids``: (T,) int64, packed sequences. ``sequence_offsets``: (B + 1,) integers from 0 to T. ``maskable``: (T,) bool,
    false for special tokens. ``words``: (T,) bool, true where a word begins, or None to choose single tokens.
    ``replacements``: the possible ids of a random token.

    Of the n maskable tokens of a sequence, ``probability`` x n are chosen in the mean. The number is one of the two
    integers around this value, at random. Words are taken in random order as long as they fit. The first one that does
    not fit is taken with the probability that keeps the mean. At least one token is chosen if there is one, so the mean
    is larger in short sequences. A word is chosen as a whole or not at all. It ends before a token that is not
    maskable, and at the end of its sequence.
    """
    places = np.flatnonzero(maskable)
    firsts = np.searchsorted(places, sequence_offsets)  # of each sequence, as indices into the maskable tokens
    budgets = np.diff(firsts) * probability
    if words is None:
        chosen = places[_chosen(firsts, budgets, None, generator)]
    else:
        begins = words[places]
        begins[1:] |= np.diff(places) > 1
        begins[firsts[:-1][np.diff(firsts) > 0]] = True
        word_firsts = np.append(np.flatnonzero(begins), len(places))
        lengths = np.diff(word_firsts)
        numbers = _chosen(np.searchsorted(word_firsts, firsts), budgets, lengths, generator)
        n_tokens = lengths[numbers]
        before = np.cumsum(n_tokens) - n_tokens
        chosen = places[np.arange(int(n_tokens.sum())) + np.repeat(word_firsts[numbers] - before, n_tokens)]
    labels = ids[chosen]
    draws, which = generator.random(len(chosen)), generator.random(len(chosen))
    others = np.where(draws < KEPT, labels, replacements[(which * len(replacements)).astype(np.int64)])
    input_ids = ids.copy()
    input_ids[chosen] = np.where(draws < REPLACED, others, mask_id)
    return input_ids, chosen, labels


def _chosen(
    firsts: np.ndarray, budgets: np.ndarray, lengths: np.ndarray | None, generator: np.random.Generator
) -> np.ndarray:
    """Returns the chosen words, ascending: (k,) int64.

    Sequence i has the words ``firsts[i]`` to ``firsts[i + 1]``, of ``lengths`` tokens, or of one token each. In the
    mean, ``budgets[i]`` of its tokens are chosen.
    """
    counts = np.diff(firsts)
    n = int(firsts[-1])
    order = _shuffled(counts, generator.integers(0, 2**64, n, np.uint64))
    coins = generator.random(len(counts))
    sizes = np.ones(n, np.int64) if lengths is None else lengths[order]
    ends = np.cumsum(sizes)
    begins = np.concatenate([[0], ends])[firsts[:-1]]
    before = ends - sizes - np.repeat(begins, counts)  # tokens in earlier words of the sequence
    room = np.repeat(budgets, counts) - before
    taken = (room >= sizes) | (np.repeat(coins, counts) * sizes < room)
    taken[firsts[:-1][counts > 0]] = True
    return np.sort(order[taken])


def _shuffled(counts: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Returns 0, 1, ... in runs of ``counts``, each run shuffled with the random uint64 ``words``: (n,) int64."""
    # One sort of [run | random bits | index] is several times faster than argsort, and no two items are equal.
    n_run, n_index = len(counts).bit_length(), len(words).bit_length()
    keys = words >> np.uint64(n_run + n_index) << np.uint64(n_index)
    keys |= np.arange(len(words), dtype=np.uint64)
    keys |= np.repeat(np.arange(len(counts), dtype=np.uint64) << np.uint64(64 - n_run), counts)
    keys.sort()
    return (keys & np.uint64((1 << n_index) - 1)).astype(np.int64)
