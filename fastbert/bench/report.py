"""The report of results is plain text for a terminal, or a page of tables and figures as Markdown or HTML.

tables.py lists the keys of `Row.extra` that the report shows.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import textwrap
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastbert.bench import plots
from fastbert.bench.results import Results
from fastbert.bench.tables import (
    Contest,
    ceiling_lines,
    contest_table,
    environment_lines,
    source,
    suites,
    summary_table,
)
from fastbert.bench.verdict import UNIT, verdict
from fastbert.checkpoint.files import write_text
from fastbert.pages import html, markdown
from fastbert.pages.document import NO_FIGURES, Block, Fold, Page, Section, Table, facts
from fastbert.pages.figures import Plot
from fastbert.pages.terminal import plain_table

METHOD = (
    "All competitors are prepared and warmed up, then timed in turn within one process: each once a round, in an order "
    "that rotates, on inputs that rotate.",
    "GPUs are timed by events on the device (single kernels after the L2 cache was overwritten), CPUs by the monotonic "
    "clock. Clock rates are left alone.",
    "A time is the median over rounds, and ± half the interquartile range; tokens/s count valid tokens, never padding.",
    "How many times faster fastbert is: the competitor's time ÷ fastbert's in the same round, the median over rounds, "
    "with a 95 % bootstrap interval in brackets. Below 1, fastbert is slower.",
    "The fastest other competitor is the one with the least ratio in its workload. fastbert in another precision or "
    "padded is no other.",
    "Output is checked against a float64 reference first (RMS error over RMS). A competitor is not timed if it is "
    "wrong (beyond its bound), failed (raised) or missing (not available there); the reason stands in its place.",
)

_PNG_NAME = re.compile(r".+-[0-9a-f]{10}\.png")


def render_terminal(results: Results, *, width: int | None = None, summary_only: bool = False) -> str:
    """Returns the results as aligned plain text: a table per contest, one per suite with several, and the verdict.

    width: columns of the terminal, by default those of the current one; a table that is too wide continues below.
    summary_only: a suite of several contests has only its summary table.
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
    if results.rows:
        parts.append(textwrap.fill(verdict(results).sentence, width))
    elif not (results.ceilings or results.notes):
        parts.append("no rows")
    return "\n\n".join(parts) + "\n"


def write_report(results: Results, path: str | os.PathLike[str], *, title: str = "fastbert benchmarks") -> None:
    """Writes the report completely or not at all: `.html` with everything inside, or `.md` with a folder of PNG files.

    The folder is named after the report: report.md has report-figures/. Figures need matplotlib; without it the report
    has a note. Raises ValueError for another suffix.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in (".md", ".html"):
        raise ValueError(f"path: got {os.fspath(path)!r}, expected a name that ends in .md or .html")
    path.parent.mkdir(parents=True, exist_ok=True)
    page = report_page(results, title)
    if kind == ".html":
        write_text(path, html.render(page))
    else:
        _write_markdown(path, page)


def report_page(results: Results, title: str) -> Page:
    """Returns the report as data. Without matplotlib it has no figures."""
    notes: tuple[str, ...] = ()
    figures: list[Plot] = []
    try:
        figures = plots.figures(results)
    except ImportError:
        notes = (NO_FIGURES,)
    sections = (
        Section(f"Suite {suite}", tuple(_suite(suite, members, figures))) for suite, members in suites(results).items()
    )
    subject = source(results.environment) + "."
    return Page(title, subject, verdict(results, notes), tuple(sections), METHOD, tuple(_environment(results)))


def _suite(suite: str, members: Sequence[Contest], figures: Sequence[Plot]) -> Iterator[Block]:
    tables = tuple(contest_table(contest) for contest in members)
    yield summary_table(suite, members) if len(members) > 1 else tables[0]
    yield from (figure for figure in figures if figure.suite == suite)
    if len(members) > 1:
        yield Fold(f"Every number of suite {suite}: {len(members)} tables", tables)


def _environment(results: Results) -> Iterator[Table]:
    yield facts("Machine and packages", ("item", "value"), tuple(environment_lines(results.environment)))
    if results.ceilings:
        yield facts("Ceilings, measured", ("ceiling", "value"), tuple(ceiling_lines(results.ceilings)))
    if results.notes:
        notes = tuple((name, _note(value)) for name, value in results.notes.items())
        yield facts("Notes", ("note", "value"), notes)


def _note(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _origin(environment: dict[str, Any]) -> list[str]:
    """Returns the machine of the results, in one or two lines."""
    values = dict(environment_lines(environment))
    versions = [f"{key} {values[key]}" for key in ("driver", "cuda", "python") if key in values]
    packages = [values["packages"]] if "packages" in values else []
    return [source(environment), ", ".join([*versions, *packages])] if versions or packages else [source(environment)]


def _write_markdown(path: Path, page: Page) -> None:
    """Writes the figures first, with names made from their content, and then the page.

    So an old page keeps its figures until the new one exists.
    """
    folder = path.with_name(f"{path.stem}-figures")
    images: dict[str, bytes] = {}
    links: dict[str, str] = {}
    picture = None
    if page.verdict.picture is not None and NO_FIGURES not in page.verdict.notes:
        picture = page.verdict.picture.plot(UNIT, page.subject)
    for plot in [*([] if picture is None else [picture]), *page.plots()]:
        content = plot.png()
        name = f"{plot.name}-{hashlib.sha256(content).hexdigest()[:10]}.png"
        images[name], links[plot.name] = content, f"{folder.name}/{name}"
    text = markdown.render(page, picture, links)
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
        with contextlib.suppress(OSError):  # the folder is not empty
            folder.rmdir()


def _write_bytes(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
