"""This module checks requests field by field, so that an error names the field and the expected value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from fastbert.checks import check_text
from fastbert.pipelines.entities import STRATEGIES
from fastbert.pipelines.inputs import Pair
from fastbert.serving.errors import ApiError, invalid
from fastbert.serving.limits import Limits, type_name

T = TypeVar("T", str, bool, list, dict)


@dataclass
class Fields:
    """A Fields holds the fields of a JSON object. A null counts as a missing field. Unknown fields have no effect."""

    body: Mapping[str, Any]
    path: str = ""

    def get(self, name: str, kind: type[T], default: T | None = None) -> T | None:
        """Returns a field of that type, or the default."""
        value = self.body.get(name)
        if value is None:
            return default
        if not isinstance(value, kind):
            expected = {str: "a string", bool: "a boolean", list: "an array", dict: "an object"}[kind]
            raise invalid(self.path + name, f"expected {expected}, got {type_name(value)}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """Returns a boolean."""
        return bool(self.get(name, bool, default))

    def choice(self, name: str, default: str, *allowed: str) -> str:
        """Returns one of the allowed strings. Upper and lower case are equal."""
        value = self.get(name, str, default)
        assert value is not None
        if value.lower() not in allowed:
            raise invalid(self.path + name, f"expected one of {', '.join(filter(None, allowed))}")
        return value.lower()

    def whole(self, name: str, highest: int) -> int | None:
        """Returns an integer from 1 to highest, or None."""
        value = self.body.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= highest:
            raise invalid(self.path + name, f"expected a whole number from 1 to {highest}")
        return value

    def required(self, name: str) -> Any:
        """Returns a required field."""
        value = self.body.get(name)
        if value is None:
            raise ApiError(400, "missing_field", f"{self.path}{name}: expected a value", param=self.path + name)
        return value

    def object(self, name: str) -> Fields:
        """Returns the fields of an object inside this one, or no fields if it is missing."""
        return Fields(self.get(name, dict) or {}, f"{self.path}{name}.")

    def as_base64(self) -> bool:
        """Tells whether the answer has vectors in base64, not as numbers."""
        return self.choice("encoding_format", "float", "float", "base64") == "base64"

    def truncation_side(self) -> str:
        """Returns the side on which texts are truncated, or "" if the request does not set it."""
        return self.choice("truncation_direction", "", "right", "left", "")


def text(name: str, value: Any) -> str:
    """Returns a string without lone surrogates."""
    if not isinstance(value, str):
        raise invalid(name, f"expected a string, got {type_name(value)}")
    try:
        check_text(name, value)
    except ValueError:
        raise invalid(name, "holds half of a UTF-16 pair") from None
    return value


def texts(name: str, value: Any, limits: Limits) -> list[str]:
    """Returns a list of at least one string."""
    return [text(f"{name}[{i}]", item) for i, item in enumerate(filled_list(name, value, limits))]


def text_or_texts(name: str, value: Any, limits: Limits) -> tuple[list[str], bool]:
    """Returns the strings, and whether the value is a single string outside of a list."""
    if isinstance(value, str):
        return [text(name, value)], True
    if not isinstance(value, list):
        raise invalid(name, f"expected a string or an array, got {type_name(value)}")
    return texts(name, value, limits), False


def filled_list(name: str, value: Any, limits: Limits) -> list[Any]:
    """Returns a list of at least one and at most `limits.texts` items."""
    if not isinstance(value, list):
        raise invalid(name, f"expected an array, got {type_name(value)}")
    if not value:
        raise invalid(name, "expected at least one item")
    if len(value) > limits.texts:
        message = f"{name}: got {len(value)} texts, expected at most {limits.texts}"
        raise ApiError(413, "too_many_texts", message, param=name)
    return value


def inputs(name: str, value: Any, limits: Limits, vocab_size: int) -> tuple[list[Any], bool]:
    """Returns texts or rows of token ids, and whether the value is a single string or a single array of ids."""
    if not isinstance(value, list):
        return text_or_texts(name, value, limits)
    items = value if _is_row(value) else filled_list(name, value, limits)
    if _is_row(items):
        return [_row(name, items, vocab_size, limits)], True
    if isinstance(items[0], list):
        return [_row(f"{name}[{i}]", item, vocab_size, limits) for i, item in enumerate(items)], False
    return text_or_texts(name, items, limits)


def rows(name: str, value: Any, limits: Limits, vocab_size: int) -> list[list[int]]:
    """Returns rows of token ids, from one row or a list of rows, with at most `limits.tokens` in all."""
    if isinstance(value, list) and not _is_row(value):
        items = filled_list(name, value, limits)
        row_list = [_row(f"{name}[{i}]", item, vocab_size, limits) for i, item in enumerate(items)]
    else:
        row_list = [_row(name, value, vocab_size, limits)]
    if (n_ids := sum(map(len, row_list))) > limits.tokens:
        message = f"{name}: got {n_ids} token ids, expected at most {limits.tokens}"
        raise ApiError(413, "too_many_tokens", message, param=name)
    return row_list


def _is_row(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], int) and not isinstance(value[0], bool)


def _row(name: str, value: Any, vocab_size: int, limits: Limits) -> list[int]:
    if not isinstance(value, list) or not value:
        raise invalid(name, "expected an array of token ids")
    if len(value) > limits.tokens:
        message = f"{name}: got {len(value)} token ids, expected at most {limits.tokens}"
        raise ApiError(413, "too_many_tokens", message, param=name)
    for id_ in value:
        if isinstance(id_, bool) or not isinstance(id_, int) or not 0 <= id_ < vocab_size:
            raise invalid(name, f"expected token ids from 0 to {vocab_size - 1}")
    return value


def sequences(name: str, value: Any, limits: Limits) -> tuple[list[str], bool]:
    """Returns texts and pairs, and whether there is a single one. Forms: "a", ["a", "b"], [["a"], ["a", "b"], ...]."""
    if not isinstance(value, list):
        return text_or_texts(name, value, limits)
    items = filled_list(name, value, limits)
    if not isinstance(items[0], list):
        return [_sequence(name, items)], True
    return [_sequence(f"{name}[{i}]", item) for i, item in enumerate(items)], False


def _sequence(name: str, value: Any) -> str:
    if not isinstance(value, list) or len(value) not in (1, 2):
        raise invalid(name, "expected an array of one string, or of two")
    parts = [text(f"{name}[{i}]", part) for i, part in enumerate(value)]
    return parts[0] if len(parts) == 1 else Pair(*parts)


def entity_options(fields: Fields) -> tuple[str | None, list[str] | None]:
    """Returns the strategy and the ignored labels from the Hub's fields, None for a missing field."""
    strategy = fields.choice("aggregation_strategy", "none", *STRATEGIES)
    ignored = fields.get("ignore_labels", list)
    labels = None if ignored is None else [text(f"{fields.path}ignore_labels", label) for label in ignored]
    return strategy if fields.body.get("aggregation_strategy") is not None else None, labels
