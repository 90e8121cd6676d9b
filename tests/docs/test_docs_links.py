"""The pages of the documentation lead to one another and to what is there."""

from __future__ import annotations

import re
from pathlib import Path

import docs_pages as pages
import pytest

LONGEST_README = 160
LINK = re.compile(r"(?<!\\)\]\(([^)\s]+)\)")
CODE_PATH = re.compile(r"`((?:fastbert|kernels|tests|benchmarks|docs|examples)/[\w./-]+)`")
OTHERS = [pages.ROOT / "CONTRIBUTING.md", pages.ROOT / "CHANGELOG.md", pages.ROOT / "benchmarks" / "README.md"]
# Files of other libraries' tests, in docs/upstream-tests.md.
THEIRS = re.compile(r"tests/(?:sentence_transformer|cross_encoder|base|util)\b")


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return pages.FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*pages.PAGES, *OTHERS], ids=pages.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Catches a link to a file or a heading that is not there."""
    broken = []
    for target in LINK.findall(prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = page if not path else (page.parent / path).resolve()
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", pages.PAGES, ids=pages.name)
def test_paths_in_the_text_exist(page: Path) -> None:
    """Catches the path of a file that has moved."""
    named = [path for path in CODE_PATH.findall(prose(page)) if not THEIRS.match(path)]
    assert [path for path in named if not (pages.ROOT / path).exists()] == []


def test_readme_is_short() -> None:
    """Catches a README that grows back into the reference."""
    assert len(pages.PAGES[0].read_text(encoding="utf-8").splitlines()) <= LONGEST_README


def test_readme_leads_to_every_page_and_every_example() -> None:
    """Catches a page of docs/, or a script of examples/, that nobody finds."""
    linked = set(LINK.findall(prose(pages.ROOT / "README.md")))
    there = [path for path in pages.PAGES[1:] if path.name != "README.md"]  # docs/README.md is the folder's own
    there += sorted((pages.ROOT / "examples").glob("*.py"))
    assert {pages.name(path) for path in there} - linked == set()
