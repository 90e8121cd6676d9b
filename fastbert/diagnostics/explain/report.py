"""This module holds the report of `explain`, which converts to text and to JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

SORTED = 32  # sentence-transformers sorts texts by length and by default pads so many together
MODULE = "module"  # marks, in the place of a backend, a module that is called as it is


def amount(value: float) -> str:
    """Formats a number with three digits and a prefix: 12300 -> "12.3 k"."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}"
    return f"{value:.3g} "


@dataclass(frozen=True)
class OpReport:
    """An `OpReport` is one row of a report: an operation.

    module: its place in the model; equal layers are together: "encoder.layer.0-5.output.dense".

    shapes: in words. backend: "triton", "cpu", "torch", or "module" for a module that is called as it is. kernel: the
    kernel of this backend. block_sizes: the sizes of a Triton kernel, with its warps and stages. source: the source of
    the block sizes and of the choice of GEMM. reason: why it is not the requested backend, or why the module is called.
    raises: whether strict=True raises BackendError. launches: the number of kernel launches on a GPU for one run, or
    None if PyTorch decides it. flops, bytes_moved: estimates for the batch, for all layers of the row together.
    """

    op: str
    module: str
    shapes: str
    backend: str
    kernel: str
    block_sizes: dict[str, int] | None = None
    source: str | None = None
    reason: str | None = None
    raises: bool = False
    launches: int | None = None
    flops: int | None = None
    bytes_moved: int | None = None

    def remarks(self) -> Iterator[str]:
        if self.reason is not None:
            fallback = "raises BackendError: " if self.raises else "falls back: "
            yield self.reason if self.backend == MODULE else fallback + self.reason
        if self.block_sizes is not None:
            yield f"{' '.join(f'{name}={size}' for name, size in self.block_sizes.items())}: {self.source}"
        elif self.source is not None:
            yield self.source


@dataclass(frozen=True)
class BatchReport:
    """A `BatchReport` holds a batch of sequences, and its costs without and with padding.

    n_tokens: the number of tokens. longest: the greatest length. rows: the number of packed rows that are computed,
    rounded up if a backend supports only some numbers of rows. padded_tokens: the number with every sequence padded to
    the longest. padded_sorted: the number if sequences are sorted by length and padded 32 at a time. flops,
    bytes_moved: estimates over all operations; padded_flops, padded_bytes: the same if every sequence were padded to
    the longest. n_truncated: the number of texts that are longer than the model's limit. kept_bytes: the bytes that the
    layers keep for the backward pass if the model is in training mode; otherwise None.
    """

    n_sequences: int
    n_tokens: int
    longest: int
    rows: int
    padded_tokens: int
    padded_sorted: int
    flops: int
    bytes_moved: int
    padded_flops: int
    padded_bytes: int
    n_truncated: int = 0
    kept_bytes: int | None = None

    @property
    def padding_avoided(self) -> float:
        """Returns the share of the padded tokens that is not computed, from 0 to 1."""
        return 1 - self.rows / self.padded_tokens if self.padded_tokens else 0.0

    def __str__(self) -> str:
        rows = f", computed in {self.rows:,} rows" if self.rows != self.n_tokens else ""
        cut = f" ({self.n_truncated} cut)" if self.n_truncated else ""
        kept = "" if self.kept_bytes is None else f"\nkept for the backward pass: {amount(self.kept_bytes)}B"
        return (
            f"batch: {self.n_sequences:,} sequences{cut}, {self.n_tokens:,} tokens{rows}; padded to the longest, "
            f"{self.longest:,}, it would be {self.padded_tokens:,} tokens: {self.padding_avoided:.1%} avoided "
            f"(sorted and padded {SORTED} at a time: {self.padded_sorted:,})\n"
            f"estimated: {amount(self.flops)}FLOP, {amount(self.bytes_moved)}B; padded to the longest "
            f"{amount(self.padded_flops)}FLOP, {amount(self.padded_bytes)}B{kept}"
        )


@dataclass(frozen=True)
class Report:
    """A `Report` holds the operations in the order in which they run. `str(report)` is a table.

    calls: for an accelerated model, the number of calls by "fastbert", and by the original code for each reason.
    """

    model: str
    device: str
    dtype: str
    backend: str
    strict: bool
    rows: tuple[OpReport, ...]
    notes: tuple[str, ...] = ()
    batch_invariant: bool = False
    precision: str | None = None
    batch: BatchReport | None = None
    calls: dict[str, int] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Returns the same as dicts, lists, strings, numbers and None, for JSON."""
        rows = [dataclasses.asdict(row) for row in self.rows]
        fields = {**dataclasses.asdict(self), "rows": rows, "notes": list(self.notes)}
        if self.batch is not None:
            fields["batch"]["padding_avoided"] = self.batch.padding_avoided
        return fields

    def __str__(self) -> str:
        remarks: dict[str, int] = {}  # remark -> its number; a remark of many rows is printed once
        costs: tuple[str, ...] = ("FLOP", "bytes") if self.batch is not None else ()
        table = [("op", "module", "shapes", "backend", "kernel", *costs, "")]
        for row in self.rows:
            numbers = [f"[{remarks.setdefault(remark, len(remarks) + 1)}]" for remark in row.remarks()]
            kernel = row.kernel.replace("torch.nn.functional.", "F.")
            if self.batch is not None:
                costs = tuple("" if n is None else amount(n).rstrip() for n in (row.flops, row.bytes_moved))
            table.append((row.op, row.module, row.shapes, row.backend, kernel, *costs, " ".join(numbers)))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
        head = f"{self.model} on {self.device}, {self.dtype}, backend {self.backend!r}{', strict' * self.strict}"
        head += ", batch-invariant" * self.batch_invariant
        head += f", precision {self.precision!r}" if self.precision is not None else ""
        numbered = [f"[{number}] {remark}" for remark, number in remarks.items()]
        batch = [] if self.batch is None else [str(self.batch)]
        return "\n".join([head, "", *(line.rstrip() for line in lines), "", *numbered, *batch, *self.notes]).rstrip()
