"""This module checks the records of the task `tokens`: tokens with labels, or texts with spans."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from fastbert.training.finetuning.columns import Record, RecordError


class Span(NamedTuple):
    """A Span is a part of a text: its type, its first character, and the character after its last."""

    type: str
    start: int
    end: int


def has_spans(record: Record) -> bool:
    """Tells whether a record is a text with spans instead of a list of tokens."""
    return record.values.get("tokens") is None and "spans" in record.values


def tokens_of(record: Record) -> tuple[list[str], list[str]]:
    """Returns the tokens and the labels of a record. Raises RecordError for wrong types and for different numbers."""
    tokens, labels = record.value("tokens"), record.value("labels")
    for name, value in (("tokens", tokens), ("labels", labels)):
        if (
            not hasattr(value, "__len__")
            or isinstance(value, (str, Mapping))
            or not all(isinstance(x, str) for x in value)
        ):
            raise RecordError(f"{record.place}: {name}: got {value!r:.80}, expected a list of str")
    if len(tokens) != len(labels):
        raise RecordError(f"{record.place}: got {len(labels)} labels for {len(tokens)} tokens, expected as many")
    return list(tokens), list(labels)


def spans_in(record: Record) -> list[Span]:
    """Returns the spans of a record in order.

    Raises RecordError for a span outside of the text, and for overlapping spans.
    """
    text, value = record.value("text"), record.values.get("spans")
    spans = []
    for each in value if value is not None else ():
        kind = (
            next((each[k] for k in ("label", "type", "entity_group") if k in each), None)
            if isinstance(each, Mapping)
            else None
        )
        if kind is None or not all(isinstance(each.get(k), (int, np.integer)) for k in ("start", "end")):
            raise RecordError(f"{record.place}: spans: got {each!r:.80}, expected start, end and label of each")
        if not 0 <= each["start"] < each["end"] <= len(text):
            raise RecordError(
                f"{record.place}: spans: got {each['start']} to {each['end']}, expected places in its {len(text)}"
            )
        spans.append(Span(str(kind), int(each["start"]), int(each["end"])))
    spans.sort(key=lambda span: span.start)
    for one, other in zip(spans, spans[1:], strict=False):
        if other.start < one.end:
            raise RecordError(f"{record.place}: spans: {tuple(one)} and {tuple(other)} overlap")
    return spans
