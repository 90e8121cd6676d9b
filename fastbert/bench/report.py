"""The report of results: plain text for a terminal, or a page of tables and figures as Markdown or HTML.

What a row may carry in `Row.extra` for the report to show is listed in tables.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import html
import json
import os
import re
import shutil
import textwrap
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastbert.bench import plots
from fastbert.bench.peers import OURS
from fastbert.bench.results import OK, Results
from fastbert.bench.tables import (
    NOT_GIVEN,
    Line,
    Table,
    ceiling_lines,
    contest_table,
    environment_lines,
    source,
    suites,
    summary_table,
)
from fastbert.checkpoint.files import write_text
from fastbert.pages.figures import Plot

METHOD = (
    "All competitors are prepared and warmed up, then timed in turn within one process: each once a round, in an order "
    "that rotates, on inputs that rotate.",
    "GPUs are timed by events on the device (single kernels after the L2 cache was overwritten), CPUs by the monotonic "
    "clock. Clock rates are left alone.",
    "A time is the median over rounds, and ± half the interquartile range; tokens/s count valid tokens, never padding.",
    "How many times faster fastbert is: the competitor's time over fastbert's in the same round, the median over "
    "rounds, with a 95 % bootstrap interval in brackets. Below 1, fastbert is slower.",
    "Output is checked against a float64 reference first (RMS error over RMS). Untimed is what is wrong (beyond its "
    "bound), failed (raised) or missing (not available here); the reason stands in its place.",
)
NO_FIGURES = "There are no figures because matplotlib is not installed (pip install matplotlib)."

_GAP = "  "
_PNG_NAME = re.compile(r".+-[0-9a-f]{10}\.png")


@dataclass(frozen=True)
class _Heading:
    level: int
    text: str


@dataclass(frozen=True)
class _Text:
    text: str


@dataclass(frozen=True)
class _Items:
    items: tuple[str, ...]


@dataclass(frozen=True)
class _Fold:
    """Tables that a reader opens on demand."""

    title: str
    tables: tuple[Table, ...]


_Block = _Heading | _Text | _Items | _Fold | Table | Plot

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --back: #ffffff; --band: #f3f5f7; --rule: #d1d9e0;
  --bad: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ea; --soft: #a0a8b0; --back: #14171a; --band: #1d2226; --rule: #3a4148; --bad: #ff8a80; } }
body { margin: 0 auto; padding: 1rem 1.25rem 4rem; max-width: 1120px; color: var(--ink); background: var(--back);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--rule); }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: 0.87rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 0.3rem 0; }
th, td { padding: 0.25rem 0.7rem; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th:first-child, td.reason, td.text { text-align: left; } td.reason, td.text { white-space: normal; }
tbody th { font-weight: 400; } tbody tr.ours { background: var(--band); } tr.ours th { font-weight: 600; }
.status { color: var(--bad); font-weight: 600; }
figure { margin: 1.5rem 0; } figure svg { max-width: 100%; height: auto; }
summary { cursor: pointer; color: var(--soft); } .note { color: var(--soft); }
"""


def render_terminal(results: Results, *, width: int | None = None, summary_only: bool = False) -> str:
    """The results as aligned plain text: a table a contest, then for each suite of several the ratios together.

    width: columns of the terminal, by default those of the present one; a table too wide for it is continued below
    itself. summary_only: without the tables of single contests, where there is a table of the suite.
    """
    width = width or shutil.get_terminal_size((140, 24)).columns
    parts = ["\n".join(textwrap.fill(line, width) for line in _origin(results.environment))]
    if results.ceilings:
        parts.append("measured ceilings: " + ", ".join(" ".join(pair) for pair in ceiling_lines(results.ceilings)))
    for suite, members in suites(results).items():
        if not summary_only or len(members) == 1:
            parts += [plain_table(contest_table(contest), width) for contest in members]
        if len(members) > 1:
            parts.append(plain_table(summary_table(suite, members), width))
    if not (results.rows or results.ceilings or results.notes):
        parts.append("no rows")
    return "\n\n".join(parts) + "\n"


def write_report(results: Results, path: str | os.PathLike[str], *, title: str = "fastbert benchmarks") -> None:
    """Writes the report whole or not at all: `.html` with everything in it, `.md` with PNG files in a folder beside it.

    That folder is named after the report: report.md has report-figures/. Figures need matplotlib; without it the
    report says so. Raises ValueError for another suffix.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in (".md", ".html"):
        raise ValueError(f"path: got {os.fspath(path)!r}, expected a name that ends in .md or .html")
    path.parent.mkdir(parents=True, exist_ok=True)
    blocks = list(_blocks(results, title))
    if kind == ".html":
        write_text(path, _page(title, blocks))
    else:
        _write_markdown(path, blocks)


def _blocks(results: Results, title: str) -> Iterator[_Block]:
    """The report from top to bottom."""
    yield _Heading(1, title)
    yield _Text(source(results.environment) + ".")
    figures: list[Plot] = []
    try:
        figures = plots.figures(results)
    except ImportError:
        yield _Text(NO_FIGURES)
    yield _Heading(2, "How it was measured")
    yield _Items(METHOD)
    yield _pairs("Environment", environment_lines(results.environment))
    if results.ceilings:
        yield _pairs("Ceilings, measured", ceiling_lines(results.ceilings))
    if results.notes:
        yield _pairs("Notes", [(name, _note(value)) for name, value in results.notes.items()])
    if not results.rows:
        yield _Text("There are no rows.")
    for suite, members in suites(results).items():
        yield _Heading(2, f"Suite {suite}")
        tables = tuple(contest_table(contest) for contest in members)
        if len(members) > 1:
            yield summary_table(suite, members)
        else:
            yield tables[0]
        yield from (figure for figure in figures if figure.suite == suite)
        if len(members) > 1:
            yield _Fold(f"Every number of suite {suite}: {len(members)} tables", tables)


def _pairs(title: str, pairs: Sequence[tuple[str, str]]) -> Table:
    return Table(title, ("", ""), tuple(Line(name, (value,)) for name, value in pairs))


def _note(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _origin(environment: dict[str, Any]) -> list[str]:
    """Where results come from, in a few lines."""
    found = dict(environment_lines(environment))
    versions = [f"{key} {found[key]}" for key in ("driver", "cuda", "python") if key in found]
    packages = [found["packages"]] if "packages" in found else []
    return [source(environment), ", ".join([*versions, *packages])] if versions or packages else [source(environment)]


def plain_table(table: Table, width: int) -> str:
    """The table with its columns aligned; columns beyond the width follow below, beside the first column again."""
    names = [table.header[0], *(line.name for line in table.lines)]
    first = max(map(len, names))
    columns = [
        [heading, *(line.cells[k] for line in table.lines if line.status == OK)]
        for k, heading in enumerate(table.header[1:])
    ]
    sizes = [max(map(len, column)) for column in columns]
    blocks: list[list[int]] = [[]]
    used = first
    for k, size in enumerate(sizes):
        if blocks[-1] and used + len(_GAP) + size > width:
            blocks.append([])
            used = first
        blocks[-1].append(k)
        used += len(_GAP) + size
    out = [table.title]
    for number, block in enumerate(blocks):
        if number:
            out.append("")
        shown = [Line(table.header[0], table.header[1:]), *table.lines]
        for line in shown:
            if line.status != OK:
                if number == 0:
                    indent = " " * first + _GAP
                    said = textwrap.wrap(f"{line.status}: {line.reason}", max(30, width - len(indent)))
                    out += [line.name.ljust(first) + _GAP + said[0], *(indent + rest for rest in said[1:])]
                continue
            cells = [line.cells[k].rjust(sizes[k]) for k in block]
            out.append(_GAP.join([line.name.ljust(first), *cells]).rstrip())
    return "\n".join([*out, *table.notes])


def _write_markdown(path: Path, blocks: Sequence[_Block]) -> None:
    """Figures first, under names made of their content: an old page keeps its own until the new one is there."""
    folder = path.with_name(f"{path.stem}-figures")
    images: dict[str, bytes] = {}
    links: dict[str, str] = {}
    for block in blocks:
        if isinstance(block, Plot):
            content = block.png()
            name = f"{block.name}-{hashlib.sha256(content).hexdigest()[:10]}.png"
            images[name], links[block.name] = content, f"{folder.name}/{name}"
    text = "\n\n".join(_markdown(block, links) for block in blocks) + "\n"
    added: list[Path] = []
    try:
        for name, content in images.items():
            folder.mkdir(exist_ok=True)
            if not (folder / name).exists():
                added.append(folder / name)
                _write_bytes(folder / name, content)
        write_text(path, text)
    except BaseException:
        for image in added:
            image.unlink(missing_ok=True)
        raise
    if folder.is_dir():
        for old in folder.iterdir():
            if _PNG_NAME.fullmatch(old.name) and old.name not in images:
                old.unlink()
        with contextlib.suppress(OSError):  # not empty
            folder.rmdir()


def _write_bytes(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _markdown(block: _Block, links: Mapping[str, str]) -> str:
    if isinstance(block, _Heading):
        return f"{'#' * block.level} {markdown_text(block.text)}"
    if isinstance(block, _Text):
        return markdown_text(block.text)
    if isinstance(block, _Items):
        return "\n".join(f"- {markdown_text(item)}" for item in block.items)
    if isinstance(block, _Fold):
        tables = "\n\n".join(_markdown(table, links) for table in block.tables)
        return f"<details><summary>{html.escape(block.title)}</summary>\n\n{tables}\n\n</details>"
    if isinstance(block, Plot):
        return f"![{markdown_text(block.alt)}]({quote(links[block.name])})"
    return markdown_table(block)


def markdown_table(table: Table) -> str:
    """The table under its title; the reasons of what did not run follow it, because a cell cannot span columns."""
    absent = [NOT_GIVEN] * (len(table.header) - 2)
    rows = [
        [
            markdown_text(line.name),
            *(map(markdown_text, line.cells) if line.status == OK else [f"**{line.status}**", *absent]),
        ]
        for line in table.lines
    ]
    rule = "---|" if table.prose else "---:|"
    head = ["| " + " | ".join(map(markdown_text, table.header)) + " |", "|---|" + rule * (len(table.header) - 1)]
    body = ["| " + " | ".join(row) + " |" for row in rows]
    reasons = [
        f"- {markdown_text(line.name)} {line.status}: {markdown_text(line.reason)}"
        for line in table.lines
        if line.status != OK
    ]
    parts = [
        f"**{markdown_text(table.title)}**",
        "\n".join(head + body),
        "\n".join(reasons),
        *map(markdown_text, table.notes),
    ]
    return "\n\n".join(filter(None, parts))


def markdown_text(text: str) -> str:
    """One line in which no character has a meaning in Markdown."""
    return re.sub(r"([\\`*_\[\]<>|~#])", r"\\\1", " ".join(text.split()))


def _page(title: str, blocks: Sequence[_Block]) -> str:
    body = "\n".join(map(_html, blocks))
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _html(block: _Block) -> str:
    if isinstance(block, _Heading):
        return f"<h{block.level}>{html.escape(block.text)}</h{block.level}>"
    if isinstance(block, _Text):
        return f"<p>{html.escape(block.text)}</p>"
    if isinstance(block, _Items):
        return "<ul>" + "".join(f"<li>{html.escape(item)}</li>" for item in block.items) + "</ul>"
    if isinstance(block, _Fold):
        tables = "\n".join(map(_html, block.tables))
        return f"<details><summary>{html.escape(block.title)}</summary>\n{tables}\n</details>"
    if isinstance(block, Plot):
        return f"<figure>{block.svg()}</figure>"
    return _html_table(block)


def _html_table(table: Table) -> str:
    rows = []
    for line in table.lines:
        name = f'<th scope="row">{html.escape(line.name)}</th>'
        if line.status == OK:
            opening = '<td class="text">' if table.prose else "<td>"
            cells = "".join(f"{opening}{html.escape(cell)}</td>" for cell in line.cells)
        else:
            said = f'<span class="status">{html.escape(line.status)}</span>: {html.escape(line.reason)}'
            cells = f'<td class="reason" colspan="{len(table.header) - 1}">{said}</td>'
        rows.append(f'<tr class="{"ours" if line.name == OURS else "other"}">{name}{cells}</tr>')
    head = "".join(f'<th scope="col">{html.escape(heading)}</th>' for heading in table.header)
    notes = "".join(f'<p class="note">{html.escape(note)}</p>' for note in table.notes)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{html.escape(table.title)}"><table>'
        f"<caption>{html.escape(table.title)}</caption>"
        + ("" if table.prose else f"<thead><tr>{head}</tr></thead>")
        + f"<tbody>{''.join(rows)}</tbody></table></div>{notes}"
    )
