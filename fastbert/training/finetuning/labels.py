"""This module converts labels to numbers, by name.

The names come from the training data; unknown labels are rejected.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastbert.training.finetuning.class_weights import weights_of
from fastbert.training.finetuning.columns import Record, RecordError

logger = logging.getLogger("fastbert")


@dataclass(frozen=True)
class Labels:
    """A `Labels` holds the class names in the order of their numbers, and the count of training records of each."""

    names: tuple[str, ...]
    counts: tuple[int, ...]
    _numbers: Mapping[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_numbers", {name: number for number, name in enumerate(self.names)})

    def number(self, record: Record, column: str = "label") -> int:
        """Returns the class of a record.

        Raises RecordError, with the classes, for a class that is not in the training data.
        """
        return self._number(class_name(record, column), record, column)

    def numbers(self, record: Record, column: str = "labels", separator: str = ",") -> np.ndarray:
        """Returns the classes of a record with any number of classes, as (L,) float32 of 0 and 1."""
        vector = np.zeros(len(self.names), np.float32)
        for name in names_of(record, column, separator):
            vector[self._number(name, record, column)] = 1
        return vector

    def _number(self, name: str, record: Record, column: str) -> int:
        if name not in self._numbers:
            listed = ", ".join(map(repr, self.names[:8])) + (", …" if len(self.names) > 8 else "")
            raise RecordError(f"{record.place}: {column} {name!r} is not among those of the training data: {listed}")
        return self._numbers[name]

    def weights(self, rule: str | Mapping[str, float]) -> np.ndarray | None:
        """Returns the weight of each class in a loss, (C,) float32, by `class_weights.weights_of`; None for "none"."""
        return weights_of(rule, self.names, self.counts)


def find_labels(
    records: Sequence[Record],
    *,
    column: str | None = None,
    order: Sequence[str] = (),
    many: bool = False,
    separator: str = ",",
) -> Labels:
    """Returns the classes of the training records: sorted, whole numbers by size, or in the given order.

    many: a record has any number of labels. column: by default "labels" for many, else "label". order: the names of all
    classes. Warns of classes with one record, and of names that differ only in case. Raises RecordError for a record
    without a label, and for fractional numbers, which are for the task regress. Raises ValueError for fewer than two
    classes (one, for many), and for a class that is not in the order.
    """
    column = column or ("labels" if many else "label")
    places: dict[str, list[str]] = {}
    for record in records:
        record_labels = names_of(record, column, separator) if many else [class_name(record, column)]
        for name in record_labels:
            places.setdefault(name, []).append(record.place)
    if not order and places and all(map(_is_number, places)):
        for name, where in places.items():
            if not float(name).is_integer():
                raise RecordError(
                    f"{where[0]}: {column} {name} is a number with a fraction, and all are numbers: the task for these "
                    "is regress; to take them as names of classes, give the order of all"
                )
    if other := sorted(set(places) - set(order)) if order else []:
        raise ValueError(f"label order: the training data has {other[:8]} too, at {places[other[0]][0]}")
    least = 1 if many else 2
    if len(order or places) < least:
        raise ValueError(f"{column}: got the classes {sorted(places)}, expected {least} or more")
    if rare := [name for name in sorted(places) if len(places[name]) == 1]:
        first = ", ".join(f"{name!r} ({places[name][0]})" for name in rare[:3])
        logger.warning("%s: %d classes have one record each: %s", column, len(rare), first)
    folded: dict[str, list[str]] = {}
    for name in sorted(places):
        folded.setdefault(name.casefold(), []).append(name)
    for alike in folded.values():
        if len(alike) > 1:
            logger.warning("%s: these classes differ in case alone: %s", column, ", ".join(map(repr, alike)))
    whole = all(name.removeprefix("-").isdecimal() for name in places)
    names = tuple(order) or tuple(sorted(places, key=int if whole else str))
    return Labels(names, tuple(len(places.get(name, ())) for name in names))


def class_name(record: Record, column: str = "label") -> str:
    """Returns the name of a record's class: a text without surrounding blanks, or a whole number; 1.0 is "1".

    Raises RecordError for a record without a class, for fractional numbers, and for lists.
    """
    return _named(record.value(column), record, column)


def names_of(record: Record, column: str = "labels", separator: str = ",") -> list[str]:
    """Returns the distinct names of a record's labels, from a list or from one cell. An empty cell has no labels.

    Raises RecordError for a record without the column.
    """
    if column in record.values and record.values[column] is None:
        return []
    cell = record.value(column)
    cells = cell.split(separator) if isinstance(cell, str) else cell if isinstance(cell, (list, tuple)) else [cell]
    names = (_named(each, record, column) for each in cells if not (isinstance(each, str) and not each.strip()))
    return list(dict.fromkeys(names))


def _named(value: Any, record: Record, column: str) -> str:
    if isinstance(value, str):
        name = value.strip()
        if not name:
            raise RecordError(f"{record.place}: {column} is empty")
        # pandas writes the whole numbers of a column with empty cells as 1.0.
        return name.removesuffix(".0") if name.endswith(".0") and name[:-2].removeprefix("-").isdecimal() else name
    if isinstance(value, float):
        if not value.is_integer():
            raise RecordError(
                f"{record.place}: {column} {value!r} is a number with a fraction, expected a class; the task for "
                "numbers is regress"
            )
        return str(int(value))
    if isinstance(value, (bool, int)):
        return str(value)
    raise RecordError(f"{record.place}: {column} is a {type(value).__name__}, expected the name of one class")


def numbers_of(records: Sequence[Record], column: str = "label") -> np.ndarray:
    """Returns the numbers of records for regress, (N,) float64. Warns if all of them are whole.

    Raises RecordError for a record without a number, and for a value that is not a finite number.
    """
    values = []
    for record in records:
        value = record.value(column)
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise RecordError(f"{record.place}: {column} is {value!r}, expected a finite number")
        values.append(number)
    numbers = np.array(values)
    if values and bool((numbers == np.round(numbers)).all()):
        n_values = len(np.unique(numbers))
        logger.warning("%s: all are whole numbers, %d different ones, from %s on, and are taken as amounts; for names "
                       "of classes the task is classify", column, n_values, records[0].place)  # fmt: skip
    return numbers


def warn_of_unseen(names: Sequence[str], seen: Collection[str], column: str = "label") -> None:
    """Warns of names of the training data that no evaluation record has, so that they are not evaluated."""
    if missing := [name for name in names if name not in seen]:
        shown = ", ".join(map(repr, missing[:8])) + (", …" if len(missing) > 8 else "")
        logger.warning("%s: %d classes have no record for evaluation: %s", column, len(missing), shown)


def _is_number(name: str) -> bool:
    try:
        return math.isfinite(float(name))
    except ValueError:
        return False
