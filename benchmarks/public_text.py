"""This module makes real text without a hub: Korean help pages, and English Wikipedia articles and news, as JSON lines.

    python benchmarks/public_text.py korean english --output DIR

Each document is a line of DIR/korean.jsonl or DIR/english.jsonl, with its paragraphs under "text", separated by blank
lines. This repository contains none of the text. The sources are fetched into a cache, and kept there.

korean: the help of LibreOffice, Debian's package libreoffice-help-ko (MPL-2.0), by `apt-get download`, which compares
checksums. A third of its paragraphs is not translated; paragraphs without Hangul are left out. english: the articles
and news in the tests of gensim 4.4 (LGPL-2.1, CC BY-SA), from PyPI by pip, which compares checksums.
"""

from __future__ import annotations

import argparse
import bz2
import html
import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

# A package of another release may hold more or less. Less text than these counts means an error.
LEAST_DOCUMENTS = {"korean": 800, "english": 350}
LEAST_CHARACTERS = {"korean": 600_000, "english": 2_500_000}

HANGUL = re.compile("[\uac00-\ud7a3]")
SHARE_OF_HANGUL = 0.25  # of the letters of a paragraph


class Unavailable(RuntimeError):
    """A text cannot be fetched on this machine. The message says why."""


def cache_folder() -> Path:
    """Returns the folder for fetched files: $FASTBERT_TEXTS, or fastbert/texts in the user's cache folder."""
    if place := os.environ.get("FASTBERT_TEXTS"):
        return Path(place)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fastbert" / "texts"


def text_file(name: str, cache: Path | None = None) -> Path:
    """Returns the JSON lines of "korean" or "english". The first request makes them.

    Raises Unavailable with the reason if they cannot be fetched, or hold too little.
    """
    folder = cache_folder() if cache is None else cache
    path = folder / f"{name}.jsonl"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    documents = [text for text in SOURCES[name](folder / f"{name}-source") if text]
    characters = sum(map(len, documents))
    if len(documents) < LEAST_DOCUMENTS[name] or characters < LEAST_CHARACTERS[name]:
        raise Unavailable(f"{name}: got {len(documents)} documents with {characters} characters, expected more")
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in documents), "utf-8")
    temporary.replace(path)
    shutil.rmtree(folder / f"{name}-source")
    return path


def korean(folder: Path) -> Iterator[str]:
    """Yields the Korean paragraphs of each help page."""
    fetch(folder, ["apt-get", "download", "libreoffice-help-ko"])
    package = next(folder.glob("libreoffice-help-ko*.deb"))
    fetch(folder, ["dpkg-deb", "-x", str(package), "pages"])
    for page in sorted((folder / "pages").rglob("*.html")):
        parser = _Paragraphs()
        parser.feed(page.read_text(encoding="utf-8"))
        yield "\n\n".join(filter(is_korean, parser.paragraphs))


def english(folder: Path) -> Iterator[str]:
    """Yields Wikipedia articles without their markup, and news of 300 and 50 documents."""
    fetch(folder, [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "gensim==4.4.0"])
    data = "gensim/test/test_data/"
    with zipfile.ZipFile(next(folder.glob("gensim-*.whl"))) as wheel:
        articles = bz2.decompress(
            wheel.read(data + "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2")
        )
        news = [wheel.read(data + name).decode("latin-1") for name in ("lee_background.cor", "lee.cor")]
    for element in ElementTree.fromstring(articles).iter():
        if element.tag.endswith("}text") and element.text and not element.text.startswith("#REDIRECT"):
            yield _without_markup(element.text)
    for file in news:
        yield from file.splitlines()


SOURCES: dict[str, Callable[[Path], Iterator[str]]] = {"korean": korean, "english": english}


def fetch(folder: Path, command: list[str]) -> None:
    """Runs a command in a folder, which is made. If the command fails, raises Unavailable with its output."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]}: {error}") from error
    if done.returncode:
        raise Unavailable(f"{' '.join(command)}: {done.stderr.strip()[-300:]}")


def is_korean(paragraph: str) -> bool:
    """Tells whether enough of a paragraph's letters are Hangul."""
    letters = sum(character.isalpha() for character in paragraph)
    return letters > 0 and len(HANGUL.findall(paragraph)) >= SHARE_OF_HANGUL * letters


class _Paragraphs(HTMLParser):
    """Collects the text of the elements whose id marks a paragraph or a heading."""

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[str] = []
        self._tag: str | None = None
        self._depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._tag is None and (dict(attrs).get("id") or "").startswith(("par_id", "hd_id")):
            self._tag, self._depth = tag, 0
            self.paragraphs.append("")
        if tag == self._tag:
            self._depth += 1

    def handle_endtag(self, tag: str) -> None:
        if tag == self._tag:
            self._depth -= 1
            if self._depth == 0:
                self._tag = None
                self.paragraphs[-1] = " ".join(self.paragraphs[-1].split())

    def handle_data(self, data: str) -> None:
        if self._tag is not None:
            self.paragraphs[-1] += data


_MARKUP = [(re.compile(pattern, flags), to) for pattern, to, flags in (
    (r"<!--.*?-->", "", re.S),
    (r"<ref[^>]*/>", "", 0),
    (r"<(ref|math|gallery|timeline|code|syntaxhighlight)\b.*?</\1>", "", re.S),
    (r"\{\|.*?\|\}", "", re.S),  # tables
    (r"\[https?://\S+ ?([^\]]*)\]", r"\1", 0),
    (r"\[\[(?:File|Image|Category|[a-z\-]{2,12}):[^\[\]]*(?:\[\[[^\[\]]*\]\][^\[\]]*)*\]\]", "", 0),
    (r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]", r"\1", 0),
    (r"<[^>]*>", "", 0),
    (r"^[=*#:;|!].*$", "", re.M),  # headings, lists and the rest of tables
    (r"'{2,}", "", 0),
    (r"\n{2,}|\n", "\n\n", 0),
)]  # fmt: skip
_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}")


def _without_markup(text: str) -> str:
    """Returns only the paragraphs of an article."""
    count = 1
    while count:
        text, count = _TEMPLATE.subn("", text)
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    paragraphs = (" ".join(html.unescape(paragraph).split()) for paragraph in text.split("\n\n"))
    return "\n\n".join(paragraph for paragraph in paragraphs if len(paragraph) > 40)


def main() -> None:
    """Writes the named files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=sorted(SOURCES))
    parser.add_argument("--output", type=Path, required=True, help="folder for the files")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for name in args.names:
        try:
            path = shutil.copy(text_file(name), args.output / f"{name}.jsonl")
        except Unavailable as error:
            sys.exit(f"error: {error}")
        print(path)


if __name__ == "__main__":
    main()
