"""Tables as plain text for a terminal."""

from __future__ import annotations

import textwrap

from fastbert.pages.document import OK, Table

GAP = "  "
NARROWEST_HEAD = 11  # letters: a head of several words is wrapped to its column, but to no less than that
NARROWEST_REASON = 30  # letters: the same for the reason why a line has no numbers


def plain_table(table: Table, width: int | None = None) -> str:
    """The table with its columns aligned, under heads that are wrapped to their columns.

    Columns beyond the width follow below, beside the first column again; None: all columns stand side by side.
    """
    first = max(len(name) for name in (table.header[0], *(line.name for line in table.lines)))
    columns = [[line.cells[k] for line in table.lines if line.status == OK] for k in range(len(table.header) - 1)]
    heads = [_wrapped(head, column) for head, column in zip(table.header[1:], columns, strict=True)]
    sizes = [max(map(len, (*head, *column))) for head, column in zip(heads, columns, strict=True)]
    lines = [table.title]
    for number, group in enumerate(_groups(sizes, first, width)):
        if number:
            lines.append("")
        rows = max((len(heads[k]) for k in group), default=1)
        for row in range(rows):
            cells = ["" if row < rows - len(heads[k]) else heads[k][row - rows + len(heads[k])] for k in group]
            name = table.header[0] if row == rows - 1 else ""
            lines.append(_joined(name.ljust(first), cells, [sizes[k] for k in group]))
        for line in table.lines:
            if line.status == OK:
                cells = [line.cells[k] for k in group]
                lines.append(_joined(line.name.ljust(first), cells, [sizes[k] for k in group]))
            elif number == 0:
                lines += _reason(line.name.ljust(first), f"{line.status}: {line.reason}", width)
    return "\n".join([*lines, *table.notes])


def _wrapped(head: str, column: list[str]) -> list[str]:
    room = max(NARROWEST_HEAD, *map(len, column or [""]))
    return textwrap.wrap(head, room, break_long_words=False, break_on_hyphens=False) or [""]


def _groups(sizes: list[int], first: int, width: int | None) -> list[list[int]]:
    """The columns that stand side by side, by their indices."""
    groups: list[list[int]] = [[]]
    used = first
    for k, size in enumerate(sizes):
        if groups[-1] and width is not None and used + len(GAP) + size > width:
            groups.append([])
            used = first
        groups[-1].append(k)
        used += len(GAP) + size
    return groups


def _joined(name: str, cells: list[str], sizes: list[int]) -> str:
    return GAP.join([name, *(cell.rjust(size) for cell, size in zip(cells, sizes, strict=True))]).rstrip()


def _reason(name: str, reason: str, width: int | None) -> list[str]:
    """The status in place of cells, with its reason, on as many lines as it takes."""
    indent = " " * len(name) + GAP
    if width is None:
        return [name + GAP + reason]
    text = textwrap.wrap(reason, max(NARROWEST_REASON, width - len(indent)))
    return [name + GAP + text[0], *(indent + rest for rest in text[1:])]
