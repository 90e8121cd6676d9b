"""A file's columns get our names here: by an explicit mapping, by their own name, or by an alias.

For each of our names, the first of these rules that holds decides; case, and spaces and hyphens for underscores, do not
matter in the last two:

1. ``columns`` maps the name to a column, which must be there.
2. A column has the name.
3. One column has an alias of it. With two, the file is refused, by the names of both.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

logger = logging.getLogger("fastbert")

# Our name: other names of the same thing. Names after the empty one count only where none before it is there.
ALIASES: dict[str, tuple[str, ...]] = {
    "text": ("sentence", "sentence1", "premise", "text_a", "text1", "question1"),
    "text_pair": ("sentence2", "hypothesis", "text_b", "text2", "question2"),
    "label": ("labels", "class", "target", "category", "gold_label", "", "score", "similarity", "similarity_score"),
    "labels": ("tags", "ner_tags"),
    "tokens": ("words",),
    "spans": ("entities",),
    "context": ("paragraph",),
    "question": (),
    "answers": ("answer",),
    "choices": ("options", "endings"),
    "anchor": ("query",),
    "positive": ("pos", "passage", "document"),
    "negative": ("neg",),
    "score": ("similarity", "similarity_score"),
    "id": (),
}
SHOWN = 3  # places in a warning


class RecordError(ValueError):
    """A record cannot be used; the message begins with its place: the file and the line, or the record's number."""


@dataclass(frozen=True)
class Record:
    """A record is one example. values: cells by column, under the file's names and under ours. place: where it stands.

    A cell that is empty is None.
    """

    values: Mapping[str, Any]
    place: str

    def value(self, name: str) -> Any:
        """Returns the cell under one of our names. Raises RecordError where there is none, or where it is empty."""
        if self.values.get(name) is not None:
            return self.values[name]
        if name in self.values:
            raise RecordError(f"{self.place}: column {name!r} is empty")
        names = ", ".join(repr(_cut(column)) for column in self.values)
        raise RecordError(
            f"{self.place}: no column {name!r}; there are {names}. To choose one: {name}=COLUMN in columns"
        )


def renames_of(names: Iterable[str], columns: Mapping[str, str], place: str) -> dict[str, str]:
    """Returns {our name: the file's} by the rules of this module.

    Raises RecordError, with the columns that are there, for one that `columns` names and the file does not have, and
    for two columns that may be meant.
    """
    names = list(names)
    mapping = {}
    for ours, theirs in columns.items():
        if theirs not in names:
            listed = ", ".join(repr(_cut(name)) for name in names)
            raise RecordError(f"{place}: no column {theirs!r}, which columns maps {ours!r} to; there are {listed}")
        mapping[ours] = theirs
    plain: dict[str, list[str]] = {}
    for name in names:
        plain.setdefault(_plain(name), []).append(name)
    for ours, aliases in ALIASES.items():
        if ours in mapping or ours in names:
            continue
        groups = [(ours,), *_groups(aliases)]
        for group in groups:
            candidates = [name for alias in group for name in plain.get(alias, ())]
            if len(candidates) > 1:
                raise _ambiguous(ours, candidates, place)
            if candidates:
                mapping[ours] = candidates[0]
                break
    # QNLI names its two texts "question" and "sentence": a text alone would be half of the example.
    text = mapping.get("text")
    is_half = "text" not in columns and text is not None and _plain(text) == "sentence"
    if is_half and "question" in plain and not {"text_pair", "context"} & {*mapping, *names}:
        raise _ambiguous("text", [*plain["question"], str(text)], place)
    return mapping


def _ambiguous(ours: str, candidates: Sequence[str], place: str) -> RecordError:
    several = " and ".join(map(repr, candidates))
    return RecordError(f"{place}: columns {several} may each be {ours!r}. To choose: {ours}={candidates[0]} in columns")


def _groups(aliases: tuple[str, ...]) -> list[tuple[str, ...]]:
    if "" not in aliases:
        return [aliases]
    at = aliases.index("")
    return [aliases[:at], aliases[at + 1 :]]


def _plain(name: str) -> str:
    return name.strip().casefold().replace(" ", "_").replace("-", "_")


def _cut(name: str) -> str:
    return name if len(name) <= 40 else name[:39] + "…"


@dataclass
class Builder:
    """A Builder makes records of rows, and counts what deserves a warning.

    source: for messages. texts: whether cells come from text, where nothing and "NaN" stand for an empty cell.
    """

    source: str
    columns: Mapping[str, str]
    texts: bool = False
    _renames: dict[tuple[str, ...], dict[str, str]] = field(default_factory=dict)
    _empty: dict[str, list[str]] = field(default_factory=dict)

    def record(self, row: Mapping[str, Any], place: str) -> Record:
        """Returns a record with the row's cells, under its names and ours. Raises RecordError with the place."""
        key = tuple(row)
        if key not in self._renames:
            self._renames[key] = renames_of(key, self.columns, place)
        values = {name: self._cell(cell, name, place) for name, cell in row.items()}
        values.update({ours: values[theirs] for ours, theirs in self._renames[key].items()})
        return Record(values, place)

    def _cell(self, cell: Any, name: str, place: str) -> Any:
        if isinstance(cell, str):
            if self.texts and (not cell or cell.isspace() or cell in ("NaN", "nan")):
                cell = None
            elif not cell.isascii():
                _check_text(cell, name, place)
        elif isinstance(cell, float) and math.isnan(cell):
            cell = None
        elif hasattr(cell, "tolist"):  # of NumPy
            cell = cell.tolist()
            if isinstance(cell, float) and math.isnan(cell):
                cell = None
        elif type(cell).__name__ in ("NAType", "NaTType"):  # of pandas
            cell = None
        if cell is None:
            self._empty.setdefault(name, []).append(place)
        return cell

    def finish(self, records: list[Record]) -> list[Record]:
        """Returns the records, and warns of empty cells. Raises RecordError where there are no records."""
        if not records:
            raise RecordError(f"{self.source}: there are no records")
        for name, places in self._empty.items():
            if len(places) == len(records):
                logger.warning("%s: column %r is empty in all %d records", self.source, name, len(places))
                continue
            logger.warning("%s: column %r is empty in %s", self.source, name, several(places))
        return records


def several(places: Sequence[str]) -> str:
    """Returns how many records the places are, and the first of them, for a warning."""
    count = f"{len(places)} record" + ("s" if len(places) > 1 else "")
    more = ", …" if len(places) > SHOWN else ""
    return f"{count} ({'; '.join(places[:SHOWN])}{more})"


def _check_text(text: str, name: str, place: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RecordError(f"{place}: column {name!r} has half of a UTF-16 pair at character {error.start}") from None
