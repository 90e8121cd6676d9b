"""A page as Markdown: figures are links to files beside it."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping
from urllib.parse import quote

from fastbert.pages.document import NO_VALUE, OK, Block, Fold, Page, Table, Text, Verdict
from fastbert.pages.figures import Plot


def render(page: Page, picture: Plot | None, links: Mapping[str, str]) -> str:
    """The page as text: the verdict first, the method and the environment last.

    picture: the verdict's, where it could be drawn. links: the file of every figure, by the figure's name.
    """
    parts = [f"# {markdown_text(page.title)}", markdown_text(page.subject), *_verdict(page.verdict)]
    if picture is not None:
        parts.append(_block(picture, links))
    parts += map(markdown_text, page.verdict.notes)
    for section in page.sections:
        parts += [f"## {markdown_text(section.title)}", *_blocks(section.blocks, links)]
    parts += ["## Method", _items(page.method), "## Environment", *_blocks(page.environment, links)]
    return "\n\n".join(parts) + "\n"


def _verdict(verdict: Verdict) -> list[str]:
    sentence = f"**{markdown_text(f'{verdict.word}: ' if verdict.word else '')}{markdown_text(verdict.sentence)}**"
    return [sentence, _items(verdict.points)] if verdict.points else [sentence]


def _items(items: Iterable[str]) -> str:
    return "\n".join(f"- {markdown_text(item)}" for item in items)


def _blocks(blocks: Iterable[Block], links: Mapping[str, str]) -> list[str]:
    return [_block(block, links) for block in blocks]


def _block(block: Block, links: Mapping[str, str]) -> str:
    if isinstance(block, Text):
        return markdown_text(block.text)
    if isinstance(block, Fold):
        tables = "\n\n".join(map(markdown_table, block.tables))
        return f"<details><summary>{html.escape(block.title)}</summary>\n\n{tables}\n\n</details>"
    if isinstance(block, Table):
        return markdown_table(block)
    return f"![{markdown_text(block.alt)}]({quote(links[block.name])})"


def markdown_table(table: Table) -> str:
    """The table under its title; the reasons of what did not run follow it, because a cell cannot span columns."""
    absent = [NO_VALUE] * (len(table.header) - 2)
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
