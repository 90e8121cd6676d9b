"""Arguments are checked here. An error names the argument, what came and what was expected, in the same words."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral
from typing import Any


def expect(holds: bool, name: str, value: Any, expected: str) -> None:
    """Raises ValueError for an argument that is not as expected."""
    if not holds:
        raise ValueError(f"{name}: got {value!r}, expected {expected}")


def one_of(name: str, value: Any, *choices: Any) -> Any:
    """Returns the choice that the value equals, in type too. Raises ValueError where there is none."""
    for choice in choices:
        if type(value) is type(choice) and value == choice:
            return value
    raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, choices))}")


def positive(name: str, value: Any) -> int:
    """Returns the value, if it is a whole number from 1 on. Raises ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name}: got {value!r}, expected a positive whole number")
    return int(value)


def positive_or_none(name: str, value: Any) -> int | None:
    """Returns the value, if it is None or a whole number from 1 on. Raises ValueError for anything else."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name}: got {value!r}, expected a positive whole number or None")
    return int(value)


def check_fields(record: Any, whole: Iterable[tuple[str, int]], within: Iterable[tuple[str, float, float]]) -> None:
    """Raises ValueError, with its name, for a field of a record that is out of its range; None is in every range.

    whole: fields that are ints, with the least value of each. within: fields that are numbers, with both bounds.
    """
    for name, least in whole:
        value = getattr(record, name)
        if value is not None and not (isinstance(value, int) and value >= least):
            raise ValueError(f"{name}: expected an int of at least {least}, got {value!r}")
    for name, low, high in within:
        value = getattr(record, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"{name}: expected a number from {low:g} to {high:g}, got {value!r}")


def check_text(name: str, text: Any) -> None:
    """Raises TypeError for anything but a str, and ValueError for a str that holds half of a UTF-16 pair."""
    if not isinstance(text, str):
        raise TypeError(f"{name}: got {type(text).__name__}, expected str")
    try:
        _ = text.isascii() or text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name}: lone surrogate U+{ord(text[error.start]):04X} at character {error.start}, half of a UTF-16 pair "
            "and not a character. To join halves that belong together and replace the others by U+FFFD: "
            "text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')"
        ) from None
