"""A vocabulary is trained from texts, Korean ones among them."""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastbert.text.tokenizer import Tokenizer
from helpers import docstrings
from tokenizer_cases import FIVE, KOREAN

SYLLABLE = re.compile("[가-힣]")
JAMO = re.compile("[\u1100-\u11ff]")


@pytest.fixture(scope="module")
def korean() -> Tokenizer:
    return Tokenizer.train(KOREAN * 3, vocab_size=600)


def syllables(text: str) -> str:
    return "".join(SYLLABLE.findall(text))


def test_hangul_survives_a_round_trip(korean: Tokenizer) -> None:
    """Catches a vocabulary learned from Korean text with accents stripped, which decomposes Hangul."""
    vocab = korean.get_vocab()
    assert any(SYLLABLE.search(token) for token in vocab)
    assert not any(JAMO.search(token) for token in vocab)
    unseen = "서울 다람쥐와 책, The Fox: 값비싼 닭"
    for text in [*KOREAN, unseen]:
        ids = korean(text)["input_ids"]
        assert korean.unk_token_id not in ids
        decoded = korean.decode(ids)
        assert syllables(decoded) == syllables(text)
        assert decoded.replace(" ", "") == text.lower().replace(" ", "")


def test_stripping_accents_would_decompose_hangul(caplog: pytest.LogCaptureFixture) -> None:
    """Catches strip_accents=True that is overruled, or that decomposes Korean without a warning."""
    stripped = Tokenizer.train(KOREAN * 3, vocab_size=600, strip_accents=True)
    assert "strip_accents=True" in caplog.text and "Hangul" in caplog.text
    assert any(JAMO.search(token) for token in stripped.get_vocab())
    assert not any(SYLLABLE.search(token) for token in stripped.get_vocab())
    decoded = stripped.decode(stripped("다람쥐 헌")["input_ids"])
    assert syllables(decoded) == "" and decoded == unicodedata.normalize("NFD", "다람쥐 헌")


def test_accents_follow_lowercase_without_hangul(caplog: pytest.LogCaptureFixture) -> None:
    """Catches accents kept in uncased training, stripped in cased, and Hangul missed in a stream's last text."""
    english = ["Café naïve Ångström"] * 5
    cases: list[tuple[list[str], dict[str, Any], str]] = [
        (english, {}, "cafe"),
        (english, {"strip_accents": False}, "café"),
        (english, {"lowercase": False}, "Café"),
        (english, {"lowercase": False, "strip_accents": True}, "Cafe"),
        ([*english, "한"], {}, "café"),
    ]
    for batch, options, expected in cases:
        trained = Tokenizer.train(iter(batch), vocab_size=200, **options)
        assert trained.tokenize("Café") == [expected], options
    assert not caplog.records


def test_training_is_deterministic_for_every_kind_of_source(tmp_path: Path) -> None:
    """Catches the random order of the trainer's hash maps, and sources that are not read as the same texts."""
    lines = [line for text in docstrings(150) for line in text.splitlines() if line.strip()] + KOREAN
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("\n".join(lines[:1000]), encoding="utf-8")
    second.write_text("\n".join(lines[1000:]), encoding="utf-8")

    def stream() -> Iterator[str]:
        yield from lines

    sources: list[Any] = [lines, tuple(lines), stream(), [first, second], iter([first, *lines[1000:]])]
    tokens, *others = (Tokenizer.train(s, vocab_size=1500).convert_ids_to_tokens(range(1500)) for s in sources)
    assert tuple(tokens[:5]) == FIVE and len(set(tokens)) == 1500
    for other in others:
        assert other == tokens
    first.write_text("\n".join(lines), encoding="utf-8")
    assert Tokenizer.train(first, vocab_size=1500).get_vocab() == {token: i for i, token in enumerate(tokens)}


def test_alphabet_is_limited_to_the_most_frequent_characters() -> None:
    """Catches rare characters that crowd out words, ties broken at random, and marks that get a useless ## twin."""
    corpus, special = ["aaaa bbbb cc dd . 漢"] * 2, [*FIVE, "<x>"]
    trained = Tokenizer.train(corpus, vocab_size=40, limit_alphabet=3, special_tokens=special)
    assert trained.convert_ids_to_tokens(range(12)) == [*special, "a", "b", "c", "##a", "##b", "##c"]
    assert trained.tokenize("<x> dd aaaa") == ["<x>", "[UNK]", "aaaa"]
    assert 5 in trained.all_special_ids
    whole = Tokenizer.train(["ab. 漢字"] * 2, vocab_size=40).get_vocab()
    assert {".", "漢", "##a", "##b"} <= whole.keys() and not {"##.", "##漢"} & whole.keys()


def test_training_refuses_what_it_cannot_use(tmp_path: Path) -> None:
    """Catches a path taken for a text's characters, a vocabulary larger than asked, and unclear errors."""
    latin = tmp_path / "latin1.txt"
    latin.write_bytes("Café\n".encode("latin-1"))
    cases: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        ("corpus.txt", {}, TypeError, "texts_or_files: got a single str"),
        (["a", 3], {}, TypeError, r"texts_or_files\[1\]: got int"),
        (["a\ud800"], {}, ValueError, r"texts_or_files\[0\]: lone surrogate U\+D800 at character 1"),
        ([], {}, ValueError, "got no text to train on"),
        ([" \x00"], {}, ValueError, "got no text to train on"),
        (["abcdef"], {"vocab_size": 10, "limit_alphabet": 6}, ValueError, "vocab_size: got 10, but .* are 17"),
        (["a"], {"special_tokens": ["[PAD]"]}, ValueError, r"special_tokens: got \['\[PAD\]'\], expected \[UNK\]"),
        ([latin], {}, ValueError, "latin1.txt is not UTF-8"),
        ([tmp_path / "absent.txt"], {}, FileNotFoundError, "absent.txt"),
    ]
    for source, options, error, message in cases:
        with pytest.raises(error, match=message):
            Tokenizer.train(source, **options)


def test_trained_tokenizer_is_complete(korean: Tokenizer) -> None:
    """Catches a trained tokenizer without template, decoder or special ids."""
    assert korean("서울", "dog")["input_ids"][0] == korean.cls_token_id == 2
    assert korean("서울", "dog")["token_type_ids"][-1] == 1
    assert [korean.pad_token_id, korean.unk_token_id, korean.sep_token_id, korean.mask_token_id] == [0, 1, 3, 4]
    assert korean.model_max_length is None
    shuffled = random.Random(0).sample(KOREAN, 4)
    assert korean.decode_batch(korean(shuffled, padding=True, return_tensors="pt").input_ids) == [
        korean.decode(korean(text).input_ids) for text in shuffled
    ]
