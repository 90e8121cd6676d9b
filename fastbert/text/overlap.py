"""A text longer than the model's limit is read in overlapping windows. Each token counts in only one of them."""

from __future__ import annotations

import numpy as np


def overlapping(n: int, capacity: int, stride: int, starts: np.ndarray | None = None) -> list[tuple[int, int]]:
    """Returns the (first, last) of windows over n tokens: the first window begins at 0, the last one ends at n.

    capacity: the maximum number of tokens of a window. stride: the number of tokens in the overlap of a window and the
    next. starts: (n,) bool, true where words begin; then windows begin and end at word boundaries, and overlap by at
    least `stride` tokens, unless a word is too long. Without it the windows equal those of ``tokenizers``. A text
    without tokens has one window. Raises ValueError for a capacity below 1, and for a stride that is negative or not
    below the capacity.
    """
    if capacity < 1:
        raise ValueError(f"max_length: leaves room for {capacity} tokens of the text beside the special tokens")
    if not 0 <= stride < capacity:
        raise ValueError(f"stride: got {stride}, expected 0 to {capacity - 1}, less than the tokens of a window")
    places = None if starts is None else np.flatnonzero(starts)
    spans: list[tuple[int, int]] = []
    first = 0
    while True:
        last = min(first + capacity, n)
        if places is not None and last < n:
            last = _at_or_before(places, last, first, last)
        spans.append((first, last))
        if last >= n:
            return spans
        following = last - stride
        if places is not None:
            following = _at_or_before(places, following, first, following)
        first = following if first < following else min(first + capacity - stride, last)


def _at_or_before(places: np.ndarray, place: int, above: int, default: int) -> int:
    """Returns the last of the places up to `place` that is greater than `above`, else the default."""
    i = int(np.searchsorted(places, place, side="right")) - 1
    return int(places[i]) if i >= 0 and places[i] > above else default


def owners(spans: list[tuple[int, int]], n: int, starts: np.ndarray | None = None) -> np.ndarray:
    """Returns (n,) int64: for each token the number of the window that gives it the most context.

    In that window the distance to the nearer end is greatest; an end of the window that is also an end of the text is
    ignored. Of equal windows the first is chosen. starts: (n,) bool, true where words begin; then all tokens of a word
    have the window with the most context for the whole word, unless no window contains the whole word.
    """
    alone = _best(spans, n, np.arange(n), np.arange(n))
    if starts is None or n == 0 or len(spans) == 1:
        return alone
    firsts = np.flatnonzero(starts)
    if not len(firsts) or firsts[0] != 0:
        firsts = np.concatenate([[0], firsts])
    lasts = np.concatenate([firsts[1:], [n]]) - 1
    of_words = np.repeat(_best(spans, n, firsts, lasts), lasts - firsts + 1)
    return np.where(of_words < 0, alone, of_words)


def _best(spans: list[tuple[int, int]], n: int, firsts: np.ndarray, lasts: np.ndarray) -> np.ndarray:
    """Returns for each range of tokens the window that contains it with the most context, or -1."""
    most = np.full(len(firsts), -1, np.int64)
    best = np.full(len(firsts), -1, np.int64)
    for number, (first, last) in enumerate(spans):
        low, high = np.searchsorted(firsts, first), np.searchsorted(lasts, last)
        left = firsts[low:high] - first if first > 0 else np.full(max(high - low, 0), n)
        right = last - 1 - lasts[low:high] if last < n else np.full(max(high - low, 0), n)
        context = np.minimum(left, right)
        better = context > most[low:high]
        most[low:high][better] = context[better]
        best[low:high][better] = number
    return best
