"""This module maps the columns of a file to fastbert's names: by an explicit mapping, by the same name, or by an alias.

For each of fastbert's names, the first matching rule decides. The last two rules ignore case, and treat spaces and
hyphens as underscores:

1. ``columns`` maps the name to a column, which must exist. 2. A column has the name. 3. One column has an alias of the
name. With two such columns, the file is rejected, with both names.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

logger = logging.getLogger("fastbert")

# fastbert's name: its aliases. Aliases after the empty string are used only if no alias before it exists.
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
    """This error reports an unusable record.

    Its message begins with the position: file and line, or the record's number.
    """


@dataclass(frozen=True)
class Record:
    """A record is one example.

    values: cells by column, under the file's names and under fastbert's names; an empty cell is None. place: its
    position.
    """

    values: Mapping[str, Any]
    place: str

    def value(self, name: str) -> Any:
        """Returns the cell with one of fastbert's names. Raises RecordError if there is none, or if it is empty."""
        if self.values.get(name) is not None:
            return self.values[name]
        if name in self.values:
            raise RecordError(f"{self.place}: column {name!r} is empty")
        names = ", ".join(repr(_cut(column)) for column in self.values)
        raise RecordError(
            f"{self.place}: no column {name!r}; there are {names}. To choose one: {name}=COLUMN in columns"
        )


def renames_of(names: Iterable[str], columns: Mapping[str, str], place: str) -> dict[str, str]:
    """Returns {fastbert's name: the file's name} by the rules of this module.

    Raises RecordError, with the existing columns, for a column in `columns` that the file does not have, and for a name
    with two candidate columns.
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
    # QNLI names its two texts "question" and "sentence". The alias alone would take half of the example.
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
    """A Builder makes records from rows, and counts empty cells for a warning.

    source: the name in messages. texts: whether cells come from a text file, in which "" and "NaN" mean an empty cell.
    """

    source: str
    columns: Mapping[str, str]
    texts: bool = False
    _renames: dict[tuple[str, ...], dict[str, str]] = field(default_factory=dict)
    _empty: dict[str, list[str]] = field(default_factory=dict)

    def record(self, row: Mapping[str, Any], place: str) -> Record:
        """Returns a record with the row's cells, under its names and fastbert's.

        Raises RecordError with the position.
        """
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
        """Returns the records, and warns of empty cells. Raises RecordError if there are no records."""
        if not records:
            raise RecordError(f"{self.source}: there are no records")
        for name, places in self._empty.items():
            if len(places) == len(records):
                logger.warning("%s: column %r is empty in all %d records", self.source, name, len(places))
                continue
            logger.warning("%s: column %r is empty in %s", self.source, name, several(places))
        return records


def several(places: Sequence[str]) -> str:
    """Returns the number of records at the places, and the first places, for a warning."""
    count = f"{len(places)} record" + ("s" if len(places) > 1 else "")
    more = ", …" if len(places) > SHOWN else ""
    return f"{count} ({'; '.join(places[:SHOWN])}{more})"


def _check_text(text: str, name: str, place: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RecordError(f"{place}: column {name!r} has half of a UTF-16 pair at character {error.start}") from None
