"""The pages of the documentation, and their code blocks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: (.+) -->\n$")


@dataclass(frozen=True)
class Block:
    """A code block. line: of its first line of code. not_run: the reason of the marker above it, "" without one."""

    language: str
    code: str
    line: int
    not_run: str


def blocks(page: Path) -> list[Block]:
    """The fenced code blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    listed = []
    for match in FENCE.finditer(text):
        marker = NOT_RUN.search(text[: match.start()])
        line = text.count("\n", 0, match.start(2)) + 1
        listed.append(Block(match[1], match[2], line, "" if marker is None else marker[1]))
    return listed


def name(page: Path) -> str:
    """The page's path from the root of the repository."""
    return page.relative_to(ROOT).as_posix()
