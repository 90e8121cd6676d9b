"""This module holds `PackedBatch`: the positions of a batch's sequences, and data that operations derive from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from fastbert_kernels import cpu


@dataclass(eq=False)
class PackedBatch:
    """A `PackedBatch` describes B sequences of different lengths in T packed tokens.

    cu_seqlens: (B + 1,) int32 on the tensors' device. It starts at 0 and ends at T. Sequence b has the rows
    cu_seqlens[b] to cu_seqlens[b + 1]. cu_seqlens_cpu: the same on the host. position_ids: (T,) int64, the column of
    each token. indices: (T,) int64, the index of each token in the flattened (B * S) batch, None if the batch was never
    padded. valid: (B, S) bool, the attention mask of a batch that keeps the rows of padding (`in_place`); None in any
    other. first_column: whether each sequence has a token in the first column. last_position: the largest of
    position_ids, -1 without tokens; None if the host does not know it. counted: whether position_ids count from 0 in
    each sequence. If not, host_columns are the columns on the host, if known, and host_indices are the indices on the
    host. columns: (T,) int32, the column of each token, if a mask has zeros between tokens; None if the tokens of each
    sequence are neighbours, or before `packing.find_holes`. n_layers_before: for a layer that runs several times, the
    number of layers since its first run, for its dropout masks.

    mask: (B * S,), for a batch whose lengths stay on the device (`masked.batch_of`); its T is B * S. None for any
    other. places: (B * S,) int32, the row of each element of the mask, -1 for padding. reads_columns: whether layers
    read the columns of such a batch.

    If the host knows the lengths, tensors on the device are made at their first use (`later`). A CUDA graph does not
    need them: it has its own.
    """

    cu_seqlens: torch.Tensor
    cu_seqlens_cpu: torch.Tensor
    position_ids: torch.Tensor
    batch_size: int
    padded_length: int
    indices: torch.Tensor | None = field(default_factory=lambda: None)  # not a class attribute: see `later`
    valid: torch.Tensor | None = None
    first_column: bool = True
    last_position: int | None = None
    _plans: dict[Any, Any] = field(default_factory=dict, repr=False)
    counted: bool = False
    host_columns: np.ndarray | None = field(default=None, repr=False)
    host_indices: np.ndarray | None = field(default=None, repr=False)
    columns: torch.Tensor | None = None
    n_layers_before: int = 0
    mask: torch.Tensor | None = None
    places: torch.Tensor | None = None
    reads_columns: bool = False
    n_tokens: int = field(init=False)  # T
    device: torch.device = field(init=False)

    def __post_init__(self) -> None:
        self.n_tokens, self.device = self.position_ids.shape[0], self.cu_seqlens.device

    @classmethod
    def later(
        cls, make: dict[str, Callable[[PackedBatch], Any]], n_tokens: int, device: torch.device, **fields: Any
    ) -> PackedBatch:
        """Returns a batch whose fields in `make` are computed at their first use."""
        return cls.of_fields(cls.fields_later(make, n_tokens, device, **fields))

    @staticmethod
    def fields_later(
        make: dict[str, Callable[[PackedBatch], Any]], n_tokens: int, device: torch.device, **fields: Any
    ) -> dict[str, Any]:
        """Returns the argument of `of_fields` for such a batch. It may serve many batches."""
        every = {**_FIELDS, "n_tokens": n_tokens, "device": device, "_make": make, **fields}
        if "indices" in make:
            del every["indices"]
        return every

    @classmethod
    def of_fields(cls, fields: dict[str, Any]) -> PackedBatch:
        """Returns a batch from the result of `fields_later`."""
        batch = cls.__new__(cls)
        own = batch.__dict__
        own.update(fields)
        own["_plans"] = {}
        return batch

    def __getattr__(self, name: str) -> Any:
        make = self.__dict__.get("_make", {}).get(name)
        if make is None:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        value = self.__dict__[name] = make(self)
        return value

    def in_rows(self, position_ids: torch.Tensor, plans: dict[Any, Any]) -> PackedBatch:
        """Returns the same sequences in the rows of position_ids, with other plans. The last rows are empty."""
        return replace(self, position_ids=position_ids, counted=False, host_columns=None, _plans=plans)

    @property
    def seq_ids(self) -> torch.Tensor:
        """Holds the sequence of each token, (T,) int32."""
        return self.plan("seq_ids", lambda: sequence_ids(self.cu_seqlens, self.n_tokens))

    @property
    def form(self) -> tuple[bytes, tuple[int, int] | None, bool]:
        """Holds the offsets as bytes, B and S if lengths stay on the device, and whether layers have the columns of
        rows.

        The tiles of attention depend on nothing else of a batch.
        """
        own = self.__dict__
        offsets: bytes | None = own.get("_offsets")
        if offsets is None:
            offsets = own["_offsets"] = self.cu_seqlens_cpu.numpy().tobytes()
        padded = None if self.mask is None else (self.batch_size, self.padded_length)
        return offsets, padded, self.columns is not None or self.reads_columns

    def plan(self, key: Any, make: Callable[[], Any]) -> Any:
        """Returns data that is made from the lengths once for each batch, such as work lists."""
        if key not in self._plans:
            self._plans[key] = make()
        return self._plans[key]

    def known_plan(self, key: Any) -> Any:
        """Returns the result of an earlier `plan`, or None."""
        return self._plans.get(key)

    def plans(self) -> dict[Any, Any]:
        """Returns all results of `plan` so far."""
        return dict(self._plans)

    def set_plans(self, plans: dict[Any, Any]) -> None:
        """Replaces all results of `plan` by these."""
        self._plans = dict(plans)

    def has_plan(self, key: Any) -> bool:
        """Tells whether `plan` has made this one."""
        return key in self._plans


_FIELDS: dict[str, Any] = {
    "valid": None, "first_column": True, "last_position": None, "counted": False, "host_columns": None,
    "host_indices": None, "indices": None,
}  # fmt: skip


def sequence_ids(cu_seqlens: torch.Tensor, n_tokens: int) -> torch.Tensor:
    """Returns the sequence of each token, (T,) int32, from (B + 1,) offsets on the same device."""
    sequences = torch.arange(cu_seqlens.shape[0] - 1, dtype=torch.int32, device=cu_seqlens.device)
    return torch.repeat_interleave(sequences, cu_seqlens.diff(), output_size=n_tokens)


def within_sequences(rows: torch.Tensor, cu_seqlens: torch.Tensor, seq_ids: torch.Tensor) -> torch.Tensor:
    """Returns the position of each packed row in its sequence, (T,), in the dtype of `rows`. All are on one device."""
    return rows - cu_seqlens.index_select(0, seq_ids)


def offsets_of(lengths: Any) -> np.ndarray:
    """Returns the offsets of sequences of these lengths: (B,) -> (B + 1,) int32."""
    offsets = np.zeros(len(lengths) + 1, np.int32)
    np.add.accumulate(lengths, out=offsets[1:])
    return offsets


def count_positions(offsets: np.ndarray) -> np.ndarray:
    """Returns positions that count from 0 in each sequence: (B + 1,) offsets -> (T,) int64."""
    positions = np.arange(offsets[-1], dtype=np.int64)
    if len(offsets) > 2:
        positions -= offsets[:-1].repeat(offsets[1:] - offsets[:-1])
    return positions


def counted_positions(batch: PackedBatch) -> torch.Tensor:
    """Returns positions that count from 0 in each sequence, (T,) int64, made on the batch's device."""
    rows = torch.arange(batch.n_tokens, device=batch.device)
    return rows if batch.batch_size < 2 else within_sequences(rows, batch.cu_seqlens, batch.seq_ids)


def longest_sequence(cu_seqlens: torch.Tensor, n_tokens: int) -> int:
    """Returns the length of the longest sequence, from offsets on the host. Raises ValueError if they are wrong."""
    if cpu.obstacle() is None and cu_seqlens.is_contiguous():
        longest = cpu.longest_of(cu_seqlens, n_tokens)
    else:
        longest = _longest(cu_seqlens.numpy(), n_tokens)
    if longest < 0:
        values = cu_seqlens.tolist()
        raise ValueError(
            f"cu_seqlens: expected offsets that start at 0, never decrease and end at T = {n_tokens}, "
            f"got {values if len(values) <= 9 else f'{values[:4]} ...'}"
        )
    return longest


def _longest(offsets: np.ndarray, n_tokens: int) -> int:
    """Returns the length of the longest sequence, or -1 if the offsets are wrong."""
    lengths = (offsets[1:] - offsets[:-1]).view(_UNSIGNED[offsets.itemsize])  # unsigned, a negative length is very long
    longest = int(_most(lengths)) if len(lengths) else 0
    return longest if offsets[0] == 0 and offsets[-1] == n_tokens and longest <= n_tokens else -1


_most = np.maximum.reduce
_UNSIGNED = {4: np.uint32, 8: np.uint64}
