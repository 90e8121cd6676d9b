"""Checks of arguments: what passes, and the words of an error."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fastbert import checks


@pytest.mark.parametrize("value", [0, -1, True, 1.0, "1", np.float32(1), None])
def test_positive_refuses(value: Any) -> None:
    """Catches a bool, a float or a str that passes for a size."""
    with pytest.raises(ValueError) as error:
        checks.positive("size", value)
    assert str(error.value) == f"size: got {value!r}, expected a positive whole number"
    if value is not None:
        with pytest.raises(ValueError, match="expected a positive whole number or None$"):
            checks.positive_or_none("size", value)


@pytest.mark.parametrize("value", [1, np.int64(7), np.uint8(3)])
def test_positive_gives_an_int(value: Any) -> None:
    """Catches one of NumPy's whole numbers that is refused, or that is handed on to code that expects an int."""
    for size in (checks.positive("size", value), checks.positive_or_none("size", value)):
        assert type(size) is int and size == value
    assert checks.positive_or_none("size", None) is None


@pytest.mark.parametrize("value", [1, 1.0, "true", None])
def test_one_of_compares_types(value: Any) -> None:
    """Catches 1 that passes for True."""
    with pytest.raises(ValueError, match=r"^flag: got .*, expected one of True, False, 'longest'$"):
        checks.one_of("flag", value, True, False, "longest")
    assert checks.one_of("flag", "longest", True, "longest") == "longest"
