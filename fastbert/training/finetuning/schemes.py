"""Labels of tokens come in several manners of writing spans; training knows one of them, IOB2.

In IOB2 each span begins with B-. In IOB1 B- stands only where a span touches one of its type. IOBES, which is also
called BIOES, and BILOU mark last tokens (E-, L-) and spans of one token (S-, U-), too.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastbert.training.finetuning.columns import Record, RecordError

OUTSIDE = "O"
_AS_IOB2 = {"B": "B", "I": "I", "E": "I", "L": "I", "S": "B", "U": "B"}


def scheme_of(sequences: Sequence[Sequence[str]], records: Sequence[Record]) -> str:
    """Returns "IOB2", "IOB1", "IOBES" or "BILOU". sequences: the labels of each record.

    Raises RecordError, with the place, for a label without such a prefix, and for a mixture.
    """
    prefixes: dict[str, Record] = {}
    open_inside: Record | None = None  # I- where no span of its type goes on
    lone_begin: Record | None = None  # B- that touches no span of its type
    for labels, record in zip(sequences, records, strict=True):
        before = ""
        for label in labels:
            prefix, tag = _split(label, record)
            if prefix:
                prefixes.setdefault(prefix, record)
                if prefix == "I" and tag != before:
                    open_inside = open_inside or record
                if prefix == "B" and tag != before:
                    lone_begin = lone_begin or record
            before = tag
    if {"E", "S"} & set(prefixes) and {"L", "U"} & set(prefixes):
        place = prefixes["L" if "L" in prefixes else "U"]
        raise RecordError(f"{place.place}: labels: prefixes of IOBES (E-, S-) and of BILOU (L-, U-) in the same data")
    if {"E", "S"} & set(prefixes):
        return "IOBES"
    if {"L", "U"} & set(prefixes):
        return "BILOU"
    if open_inside is None:
        return "IOB2"
    if lone_begin is None:
        return "IOB1"
    raise RecordError(
        f"{open_inside.place}: labels: a span begins with I-, as in IOB1, and in {lone_begin.place} with B-, as in "
        "IOB2; expected one of the two"
    )


def as_iob2(labels: Sequence[str], scheme: str, record: Record) -> list[str]:
    """Returns the labels of a record in IOB2. Raises RecordError for a label without the prefix of a scheme."""
    converted = []
    before = ""
    for label in labels:
        prefix, tag = _split(label, record)
        if scheme == "IOB1" and prefix == "I" and tag != before:
            prefix = "B"
        if scheme == "IOB2" and prefix not in ("", "B", "I"):
            raise RecordError(f"{record.place}: labels: {label!r} among labels of IOB2")
        converted.append(f"{_AS_IOB2[prefix]}-{tag}" if prefix else OUTSIDE)
        before = tag
    return converted


def _split(label: str, record: Record) -> tuple[str, str]:
    """Returns the prefix and the type of a label; ("", "") for O."""
    if label == OUTSIDE:
        return "", ""
    prefix, dash, tag = label.partition("-")
    if not dash or not tag or prefix not in _AS_IOB2:
        raise RecordError(
            f"{record.place}: labels: got {label!r}, expected O or a prefix and a type, as B-PER: IOB2, IOB1, IOBES or "
            "BILOU"
        )
    return prefix, tag
