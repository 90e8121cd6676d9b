"""Labels of tokens are plain tags, such as NOUN, or mark spans in one of several schemes. Training uses only IOB2.

In IOB2 each span begins with B-. In IOB1, B- is used only if a span follows another span of its type directly. IOBES,
also called BIOES, and BILOU also mark last tokens (E-, L-) and spans of one token (S-, U-). Labels without any prefix
are plain tags; they form no spans.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastbert.training.finetuning.columns import Record, RecordError

OUTSIDE = "O"
PLAIN = "plain"
SCHEMES = "IOB2", "IOB1", "IOBES", "BILOU", PLAIN
_AS_IOB2 = {"B": "B", "I": "I", "E": "I", "L": "I", "S": "B", "U": "B"}


def scheme_of(sequences: Sequence[Sequence[str]], records: Sequence[Record]) -> str:
    """Returns the one of SCHEMES that the labels use: "plain" if no label has a prefix.

    sequences: the labels of each record. Raises RecordError, with the position, for mixed schemes, and for prefixes
    without a type, which are ambiguous.
    """
    if _are_plain(sequences, records):
        return PLAIN
    prefixes: dict[str, Record] = {}
    open_inside: Record | None = None  # I- that continues no span of its type
    lone_begin: Record | None = None  # B- that does not follow a span of its type
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


def _are_plain(sequences: Sequence[Sequence[str]], records: Sequence[Record]) -> bool:
    """Tells whether the labels other than O have no prefixes.

    Raises RecordError if only some have, and for only B and I.
    """
    prefixed: tuple[str, Record] | None = None
    plain: tuple[str, Record] | None = None
    for labels, record in zip(sequences, records, strict=True):
        for label in labels:
            prefix, dash, tag = label.partition("-")
            if dash and tag and prefix in _AS_IOB2:
                prefixed = prefixed or (label, record)
            elif label != OUTSIDE:
                plain = plain or (label, record)
    if plain is None:
        return False
    label, record = plain
    if prefixed is not None:
        raise RecordError(
            f"{record.place}: labels: got {label!r}, expected O or a prefix and a type, as {prefixed[0]!r} in "
            f"{prefixed[1].place}; where all labels are tags of their own: scheme plain"
        )
    if all(label in ("B", "I", OUTSIDE) for labels in sequences for label in labels):
        raise RecordError(
            f"{record.place}: labels: got {label!r}, a prefix without a type, expected one as B-NP; where it is a tag "
            "of its own: scheme plain"
        )
    return True


def as_iob2(labels: Sequence[str], scheme: str, record: Record) -> list[str]:
    """Returns the labels of a record in IOB2; plain tags stay unchanged.

    Raises RecordError for a label without a prefix of the scheme.
    """
    if scheme == PLAIN:
        return list(labels)
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
