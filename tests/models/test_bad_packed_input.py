"""Bad packed input gets an error that names the argument, what came and what was expected."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastbert.ops import packing
from fastbert_kernels import cpu
from helpers import cu_seqlens_of, exactly
from model_cases import (
    theirs,
    twin,
)


@pytest.fixture
def model() -> Any:
    """A small BertModel in float32."""
    return twin(theirs(), torch.float32)


@pytest.mark.parametrize(
    ("cu_seqlens", "error", "message"),
    [
        (torch.tensor([1, 5, 12]), ValueError, "at T = 12, got [1, 5, 12]"),
        (torch.tensor([0, 7, 5, 12]), ValueError, "at T = 12, got [0, 7, 5, 12]"),
        (torch.tensor([0, 5, 11]), ValueError, "at T = 12, got [0, 5, 11]"),
        (torch.tensor([0, 5, 13]), ValueError, "at T = 12, got [0, 5, 13]"),
        (torch.tensor([0, -3, 12]), ValueError, "at T = 12, got [0, -3, 12]"),
        (torch.tensor([0]), ValueError, "at T = 12, got [0]"),
        (torch.tensor([0, 13, 12]).int(), ValueError, "at T = 12, got [0, 13, 12]"),
        (torch.tensor([0, 0, -1, 12]).int(), ValueError, "at T = 12, got [0, 0, -1, 12]"),
        (torch.tensor([0, 2**32 + 12]), ValueError, "at T = 12, got [0, 4294967308]"),
        (torch.tensor([0, *[1] * 10, 13]), ValueError, "at T = 12, got [0, 1, 1, 1] ..."),
        (torch.tensor([[0, 12]]), ValueError, "cu_seqlens: expected shape (B + 1,), got (1, 2)"),
        (torch.tensor(12), ValueError, "cu_seqlens: expected shape (B + 1,), got ()"),
        (torch.tensor([]).int(), ValueError, "cu_seqlens: expected shape (B + 1,), got (0,)"),
        (torch.tensor([0.0, 12.0]), TypeError, "cu_seqlens: expected dtype int32, got torch.float32"),
        (torch.tensor([False, True]), TypeError, "cu_seqlens: expected dtype int32, got torch.bool"),
        ([0, 12], TypeError, "cu_seqlens: expected a tensor, got list"),
    ],
)
@pytest.mark.parametrize("compiled", [True, False], ids=["C++", "NumPy"])
def test_bad_cu_seqlens(
    cu_seqlens: Any, error: type[Exception], message: str, compiled: bool, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches offsets that would send a kernel outside of its tensors, or lose or double tokens."""
    if not compiled:
        monkeypatch.setattr(cpu.library, "load", lambda: (None, "no compiler"))
    if message.startswith("at"):
        message = f"cu_seqlens: expected offsets that start at 0, never decrease and end {message}"
    with pytest.raises(error, match=exactly(message)):
        model.forward_packed(torch.ones(12, dtype=torch.long), cu_seqlens)


@pytest.mark.parametrize("compiled", [True, False], ids=["C++", "NumPy"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("step", [1, 2])
def test_the_longest_sequence(step: int, dtype: torch.dtype, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the length of another sequence, offsets that are read past their strides, or that the caller changes."""
    if not compiled:
        monkeypatch.setattr(cpu.library, "load", lambda: (None, "no compiler"))
    for lengths in ([], [0], [7], [0, 3, 0, 9, 9, 2], [1] * 40):
        offsets = torch.full((step * (len(lengths) + 1),), 99, dtype=dtype)[::step]
        offsets.copy_(cu_seqlens_of(lengths))
        batch = packing.from_cu_seqlens(offsets, sum(lengths), torch.device("cpu"))
        assert batch.padded_length == max(lengths, default=0) and batch.last_position == batch.padded_length - 1
        offsets.fill_(5)
        assert batch.cu_seqlens.tolist() == cu_seqlens_of(lengths).tolist() and batch.cu_seqlens.dtype == torch.int32


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input_ids": torch.ones(3, 4).long()}, ValueError, "input_ids: expected shape (T,), got (3, 4)"),
        ({"input_ids": torch.ones(12)}, TypeError, "input_ids: expected dtype int64 or int32, got torch.float32"),
        ({"input_ids": [1] * 12}, TypeError, "input_ids: expected a tensor, got list"),
        ({"input_ids": torch.full((12,), 101)}, IndexError, "input_ids: expected values from 0 to 100, got 101"),
        ({"input_ids": torch.full((12,), -1)}, IndexError, "input_ids: expected values from 0 to 100, got -1"),
        (
            {"input_ids": torch.ones(12).long().to("meta")},
            ValueError,
            "input_ids: expected a tensor on the model's device cpu, got meta",
        ),
        ({"token_type_ids": torch.ones(11).long()}, ValueError, "token_type_ids: expected shape (12,), got (11,)"),
        ({"token_type_ids": torch.full((12,), 3)}, IndexError, "token_type_ids: expected values from 0 to 2, got 3"),
        ({"position_ids": torch.ones(1, 12).long()}, ValueError, "position_ids: expected shape (12,), got (1, 12)"),
        ({"position_ids": torch.full((12,), 40)}, IndexError, "position_ids: expected values from 0 to 39, got 40"),
    ],
)
def test_bad_packed_input(arguments: dict[str, Any], error: type[Exception], message: str, model: Any) -> None:
    """Catches the checks of forward missing from forward_packed."""
    inputs = {"input_ids": torch.ones(12, dtype=torch.long), **arguments}
    with pytest.raises(error, match=exactly(message)):
        model.forward_packed(cu_seqlens=cu_seqlens_of([5, 7]), **inputs)
