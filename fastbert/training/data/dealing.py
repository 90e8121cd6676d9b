"""This module distributes examples of a block over steps, and those of a step over batches, within the budgets."""

from __future__ import annotations

import heapq

import numpy as np

from fastbert.training.data.examples import Examples


def deal(examples: Examples, step_budget: int, batch_budget: int, n_batches: int) -> list[list[Examples]]:
    """Returns the batches of each step. Each step has ``n_batches`` batches, and none is empty.

    The examples are distributed in order over as few steps as possible, with about the same number of tokens each. No
    step has more than ``step_budget`` tokens, and no batch more than ``batch_budget``. If a step has fewer examples
    than ``n_batches``, its longest examples are halved, which adds two tokens each.

    Raises ValueError if a step has fewer tokens of text than ``n_batches``.
    """
    sizes = examples.n_tokens()
    middles = np.cumsum(sizes) - sizes / 2
    n_tokens = int(sizes.sum())
    n_steps = -(-n_tokens // step_budget)
    steps: list[list[np.ndarray]] = []
    while not steps:
        # An example belongs to the step that contains its middle.
        bounds = np.unique(np.searchsorted(middles, np.arange(n_steps + 1) * (n_tokens / n_steps)))
        n_steps += 1
        if np.add.reduceat(sizes, bounds[:-1]).max() > step_budget:
            continue
        for first, last in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            batches = _batches(sizes[first:last], batch_budget, n_batches)
            if batches is None:
                steps = []
                break
            steps.append(batches)
    result = []
    for first, last, step in zip(bounds[:-1].tolist(), bounds[1:].tolist(), steps, strict=True):
        if last - first < n_batches:
            part = halved(examples.take(np.arange(first, last)), n_batches)
            result.append([part.take([i]) for i in range(n_batches)])
        else:
            result.append([examples.take(first + indices) for indices in step])
    return result


def batches_of(examples: Examples, budget: int) -> list[Examples]:
    """Returns the examples in their order, in batches of at most ``budget`` tokens."""
    ends = np.cumsum(examples.n_tokens())
    cuts = [0]
    while cuts[-1] < len(examples):
        before = ends[cuts[-1] - 1] if cuts[-1] else 0
        cuts.append(max(int(np.searchsorted(ends, before + budget, "right")), cuts[-1] + 1))
    return [examples.take(np.arange(a, b)) for a, b in zip(cuts, cuts[1:], strict=False)]


def halved(examples: Examples, n: int) -> Examples:
    """Returns ``n`` examples with the same text: the longest examples are cut until there are ``n``.

    A pair is cut into its two parts, which are then no pair. A single span is cut in the middle. The cut examples are
    at the end. Raises ValueError if the text has fewer than ``n`` tokens.
    """
    while len(examples) < n:
        text = examples.n_tokens() - np.diff(examples.offsets) - 1
        longest = int(np.argmax(text))
        if text[longest] < 2:
            raise ValueError(
                f"a step has {int(text.sum())} tokens of text, too few for its {n} batches: "
                "the corpus is too small for so many processes, or for so many batches a step"
            )
        spans = np.arange(examples.offsets[longest], examples.offsets[longest + 1])
        starts, lengths = examples.starts[spans], examples.lengths[spans]
        if len(spans) == 1:
            half = int(lengths[0]) // 2
            starts, lengths = np.array([starts[0], starts[0] + half]), np.array([half, lengths[0] - half])
        zeros = np.zeros(len(starts), np.int64)
        documents = np.full(len(starts), examples.documents[longest])
        parts = Examples(
            starts, lengths, zeros, np.arange(len(starts) + 1), np.full(len(starts), -1, np.int8), documents
        )
        rest = np.delete(np.arange(len(examples)), longest)
        examples = Examples.join([examples.take(rest), parts])
    return examples


def _batches(sizes: np.ndarray, budget: int, n_batches: int) -> list[np.ndarray] | None:
    """Returns the indices of each batch, ascending, or None if a batch has more than ``budget`` tokens.

    The longest remaining example goes to the batch with the fewest tokens; of equal ones, the first is chosen.
    """
    heap = [(0, i) for i in range(n_batches)]
    owners = np.empty(len(sizes), np.int64)
    order = np.argsort(-sizes, kind="stable")
    for index, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        load, batch = heap[0]
        heapq.heapreplace(heap, (load + size, batch))
        owners[index] = batch
    if max(load for load, _ in heap) > budget:
        return None
    grouped = np.argsort(owners, kind="stable")
    return np.split(grouped, np.searchsorted(owners[grouped], np.arange(1, n_batches)))
