"""Batches for sentence-transformers' trainers are shuffled, without equal texts, or by classes; on several processes.

For N processes, a batch of N times the size is made as on one process, and distributed evenly. So the batch has no
duplicate text, its records have the same columns on all processes, and no process waits for another at the end.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

SMALLEST_OF_CLASSES = 4  # records: two of each of two classes


def sampler_arguments(kind: str, n_processes: int, several: bool) -> dict[str, Any]:
    """Returns the arguments of a trainer that determine its batches.

    kind: "shuffled", "no duplicates" or "classes". several: whether the data are several sets with different columns.
    """
    make = {"shuffled": _shuffled, "no duplicates": no_duplicates, "classes": _by_classes}[kind]
    if n_processes == 1:
        return {"batch_sampler": make}
    whole = functools.partial(_whole, make, n_processes)
    arguments = {"dataloader_drop_last": True}  # The batches have no uneven end; the trainer would warn of one.
    if several:
        sets = functools.partial(_dealt_sets, n_processes)
        return {**arguments, "batch_sampler": whole, "multi_dataset_batch_sampler": sets}
    return {**arguments, "batch_sampler": functools.partial(_dealt, whole, n_processes, kind)}


def no_duplicates(dataset: Any, *args: Any, **kwargs: Any) -> Any:
    """Makes sentence-transformers' sampler of batches without equal texts, with numbers instead of texts.

    The sampler looks at many rows for each batch. Rows of a datasets.Dataset are slow to read, and the sampler's own
    hash code starts a process for them.
    """
    from sentence_transformers.sampler import NoDuplicatesBatchSampler

    return NoDuplicatesBatchSampler(_Numbered.of(dataset, kwargs.get("valid_label_columns")), *args, **kwargs)


def _by_classes(dataset: Any, *args: Any, **kwargs: Any) -> Any:
    """Makes sentence-transformers' sampler, whose batches have at least two records of each of their classes."""
    from sentence_transformers.sampler import GroupByLabelBatchSampler

    return GroupByLabelBatchSampler(dataset, *args, **kwargs)


def _shuffled(dataset: Any, batch_size: int, seed: int = 0, n_processes: int = 1, **kwargs: Any) -> Any:
    return _Shuffled(len(dataset), batch_size, seed, n_processes)


def _whole(make: Any, n_processes: int, dataset: Any, batch_size: int, drop_last: bool = False, **kwargs: Any) -> Any:
    """Makes a sampler of the combined batches of all processes; the last one may be smaller."""
    more = {"n_processes": n_processes} if make is _shuffled else {}
    return make(dataset, batch_size=batch_size * n_processes, drop_last=False, **kwargs, **more)


def _dealt(whole: Any, n_processes: int, kind: str, dataset: Any, **kwargs: Any) -> Any:
    least = SMALLEST_OF_CLASSES if kind == "classes" else 1
    return _Dealt(whole(dataset, **kwargs), n_processes, least, 2 if kind == "classes" else 1)


def _dealt_sets(n_processes: int, dataset: Any, **kwargs: Any) -> Any:
    from sentence_transformers.sampler import ProportionalBatchSampler

    return _Dealt(ProportionalBatchSampler(dataset, **kwargs), n_processes)


class _Shuffled:
    """This sampler yields batches of record indices in an order that depends only on the seed and the epoch.

    It omits the last records of an epoch if they are fewer than the processes.
    """

    drop_last = False

    def __init__(self, n_records: int, batch_size: int, seed: int, n_processes: int) -> None:
        self.n_records, self.n_used = n_records, n_records - n_records % n_processes
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.n_used // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        import torch

        order = torch.randperm(self.n_records, generator=torch.Generator().manual_seed(self.seed + self.epoch)).tolist()
        for start in range(0, self.n_used, self.batch_size):
            yield order[start : min(start + self.batch_size, self.n_used)]


class _Dealt:
    """This sampler splits the batches of another sampler over the processes, and yields the parts one after another.

    Each process has the same number of records of a batch: a multiple of step; the batch is omitted if this is below
    least.
    """

    batch_size = None  # The size varies; accelerate needs this attribute then.
    drop_last = False

    def __init__(self, whole: Any, n_processes: int, least: int = 1, step: int = 1) -> None:
        self.whole, self.n, self.least, self.step = whole, n_processes, least, step

    def set_epoch(self, epoch: int) -> None:
        self.whole.set_epoch(epoch)

    def __len__(self) -> int:
        return self.n * len(self.whole)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.whole:
            size = len(batch) // self.n // self.step * self.step
            if size >= self.least:
                for rank in range(self.n):
                    yield batch[rank * size : (rank + 1) * size]


class _Numbered:
    """A _Numbered has rows with a number for each distinct text.

    It has the part of a datasets.Dataset that samplers use.
    """

    def __init__(self, rows: list[dict[str, int]]) -> None:
        self.rows, self.column_names = rows, list(rows[0]) if rows else []

    @classmethod
    def of(cls, dataset: Any, labels: Sequence[str] | None) -> _Numbered:
        names = [name for name in dataset.column_names if name not in (labels or ()) and name != "dataset_name"]
        numbers: dict[Any, int] = {}
        columns = [[numbers.setdefault(text, len(numbers)) for text in dataset[name]] for name in names]
        return cls([dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, int]:
        return self.rows[index]
