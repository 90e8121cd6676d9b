"""This module groups sequences of equal length, for attention in plain PyTorch."""

from __future__ import annotations

import torch

from fastbert.ops.packing import to_device

# A group of sequences of equal length: (number of sequences, length, rows). Neighbouring rows are a slice.
Group = tuple[int, int, "slice | torch.Tensor"]


def group_by_length(cu_seqlens_cpu: torch.Tensor, device: torch.device) -> tuple[list[Group], torch.Tensor | None]:
    """Returns groups of sequences of equal length, and the row order that undoes it (None if it is unchanged)."""
    lengths = cu_seqlens_cpu.diff().long()
    order = torch.argsort(lengths, stable=True)
    order = order[lengths[order] > 0]
    groups: list[Group] = []
    all_rows = []
    distinct, counts = torch.unique_consecutive(lengths[order], return_counts=True)
    for length, n_seqs in zip(distinct.tolist(), counts.tolist(), strict=True):
        starts = cu_seqlens_cpu[:-1].long()[order[:n_seqs]]
        order = order[n_seqs:]
        rows = (starts[:, None] + torch.arange(length, device=starts.device)).flatten()
        all_rows.append(rows)
        first = int(starts[0])
        neighbours = bool((starts == first + length * torch.arange(n_seqs, device=starts.device)).all())
        groups.append(
            (n_seqs, length, slice(first, first + n_seqs * length) if neighbours else to_device(rows, device))
        )
    if not groups:
        return [], None
    rows = torch.cat(all_rows)
    in_order = bool((rows[1:] > rows[:-1]).all())
    return groups, None if in_order else to_device(torch.argsort(rows), device)
