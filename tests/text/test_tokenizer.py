"""The tokenizer against transformers' BertTokenizerFast, its arithmetic, its errors, and training with Korean text."""

from __future__ import annotations

import json
import logging
import pickle
import random
import re
import shutil
import time
import unicodedata
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, BertTokenizerFast

from fastbert.text.encoding import Encoding
from fastbert.text.tokenizer import Tokenizer
from helpers import docstrings, minilm_folder

KEYS = ("input_ids", "token_type_ids", "attention_mask")
NASTY = [
    "",
    " \t\n ",
    "emoji 😀 👩‍👩‍👧 🇰🇷 ❤️",
    "漢字とかな交じり文、中文字符。𠀀𪚥",
    "e\u0301 n\u0303 o\u0308\u0323 Å ﬁ ǅ İstanbul ΣΊΣΥΦΟΣ",
    "שלום עולם مرحبا بالعالم \u202eabc\u202c",
    "bell\x07 nul\x00l del\x7f soft\xadhyphen zero\u200bwidth \ufffd \u2028 \x85 \ue000 \U000e0001",
    "x" * 99 + " " + "y" * 100 + " " + "z" * 101 + " " + "한" * 150,
    "한국어 문장입니다. 값이 없다 \u1112\u1161\u11ab",
    "[CLS] not special? [SEP] [MASK] [mask] [UNK][PAD] ##ing [ SEP ]",
    "don't can't I'm U.S.A. 3.14 $5 a_b a-b http://x.y/?q=1&r=2 ``quoted'' …",
    "नमस्ते दुनिया ไทย ქართული ǆ ß ſ",
]
KOREAN = [
    "다람쥐 헌 쳇바퀴에 타고파. 키스의 고유조건은 입술끼리 만나야 하고 특별한 기술은 필요치 않다.",
    "닭 잡아먹고 오리발 내민다; 값싼 것이 비지떡이다. 넓은 밭에 삶은 밤과 읽던 책을 두었다.",
    "The quick brown fox jumps over the lazy dog at the Café, 서울 2024.",
    "한국어와 English를 섞어 쓴 문장도 있습니다: PyTorch로 모델을 학습합니다.",
]
FIVE = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SYLLABLE = re.compile("[가-힣]")
JAMO = re.compile("[\u1100-\u11ff]")


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return Tokenizer.from_pretrained(minilm_folder())


@pytest.fixture(scope="module")
def theirs() -> BertTokenizerFast:
    return BertTokenizerFast.from_pretrained(minilm_folder())


@pytest.fixture(scope="module")
def adjustable() -> tuple[Tokenizer, BertTokenizerFast]:
    """Tokenizers of their own for the tests that set padding_side and truncation_side."""
    return Tokenizer.from_pretrained(minilm_folder()), BertTokenizerFast.from_pretrained(minilm_folder())


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return docstrings(500) + NASTY


@pytest.fixture(scope="module")
def korean() -> Tokenizer:
    return Tokenizer.train(KOREAN * 3, vocab_size=600)


def copy_files(source: Path, target: Path, *names: str, **config: Any) -> Path:
    for name in names:
        shutil.copy(source / name, target)
    (target / "tokenizer_config.json").write_text(json.dumps(config))
    return target


def assert_same_ids(ours: Tokenizer, theirs: Any, texts: list[str], **options: Any) -> None:
    expected = theirs(texts, truncation=True, **options)
    found = ours(texts, **options)
    for text, a, b in zip(texts, found["input_ids"], expected["input_ids"], strict=True):
        assert a == b, f"{text[:80]!r}: {ours.convert_ids_to_tokens(a)[:40]}"
    assert found == {key: expected[key] for key in KEYS}


# Encoding


def test_ids_are_those_of_transformers(ours: Tokenizer, theirs: BertTokenizerFast, texts: list[str]) -> None:
    """Would catch any difference in cleaning, splitting, word pieces, special tokens or default truncation."""
    assert_same_ids(ours, theirs, texts)
    assert ours(texts, add_special_tokens=False) == {
        key: value for key, value in theirs(texts, truncation=True, add_special_tokens=False).items() if key in KEYS
    }
    assert [ours.tokenize(text) for text in texts] == [theirs.tokenize(text) for text in texts]


@given(
    lengths=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=6),
    limit=st.integers(3, 64),
    strategy=st.sampled_from([True, "longest_first", "only_first", "only_second"]),
    side=st.sampled_from(["right", "left"]),
    special=st.booleans(),
)
@settings(max_examples=400, deadline=None)
def test_pair_truncation_is_that_of_transformers(
    adjustable: tuple[Tokenizer, BertTokenizerFast],
    lengths: list[tuple[int, int]],
    limit: int,
    strategy: bool | str,
    side: str,
    special: bool,
) -> None:
    """Would catch a wrong split of the budget between two texts, odd budgets, ties and impossible limits included."""
    ours, theirs = adjustable
    first = [" ".join(map(str, range(n))) for n, _ in lengths]
    second = [" ".join(map(str, range(n, 0, -1))) for _, n in lengths]
    ours.truncation_side = theirs.truncation_side = side
    options: dict[str, Any] = {"truncation": strategy, "max_length": limit, "add_special_tokens": special}
    try:
        expected = theirs(first, second, **options)
    except Exception:  # tokenizers raises Exception itself: the text that may be cut is too short
        with pytest.raises(ValueError, match="use 'longest_first'"):
            ours(first, second, **options)
        return
    assert ours(first, second, **options) == {key: expected[key] for key in KEYS}
    packed = ours.encode_packed(first, second, **options)
    assert packed.input_ids.tolist() == sum(expected["input_ids"], [])
    assert packed.token_type_ids.tolist() == sum(expected["token_type_ids"], [])
    full = [len(row) for row in theirs(first, second, add_special_tokens=special)["input_ids"]]
    cut = [n - len(row) for n, row in zip(full, expected["input_ids"], strict=True)]
    assert (packed.n_truncated, packed.n_truncated_tokens) == (sum(n > 0 for n in cut), sum(cut))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("padding", [True, "longest", "max_length"])
@pytest.mark.parametrize("kind", ["pt", "np", None])
def test_padding_is_that_of_transformers(
    adjustable: tuple[Tokenizer, BertTokenizerFast], texts: list[str], side: str, padding: bool | str, kind: str | None
) -> None:
    """Would catch a wrong pad id, segment id or mask at padding, on either side, in each kind of result."""
    ours, theirs = adjustable
    ours.truncation_side = theirs.truncation_side = "right"
    ours.padding_side = theirs.padding_side = side
    options: dict[str, Any] = {"padding": padding, "max_length": 40, "truncation": True, "return_tensors": kind}
    for batch in (texts[::25], texts[0]):
        found, expected = ours(batch, **options), theirs(batch, **options)
        assert tuple(found) == KEYS
        for key in KEYS:
            assert type(found[key]) is type(expected[key])
            assert np.array_equal(np.asarray(found[key]), np.asarray(expected[key])), key
            if kind is not None:
                assert str(found[key].dtype).removeprefix("torch.") == "int64"


def test_results_have_the_shape_of_the_input(ours: Tokenizer) -> None:
    """Would catch a batch dimension too many or too few, and an empty batch or text that crashes."""
    assert ours("") == {"input_ids": [101, 102], "token_type_ids": [0, 0], "attention_mask": [1, 1]}
    assert ours([""])["input_ids"] == [[101, 102]]
    assert ours("a", "b")["token_type_ids"] == [0, 0, 0, 1, 1]
    assert ours("a", "")["input_ids"] == [101, 1037, 102, 102]
    assert ours("a", return_tensors="pt").input_ids.shape == (1, 3)
    assert ours([]) == {key: [] for key in KEYS}
    assert ours([], []) == {key: [] for key in KEYS}
    assert ours([], padding=True, return_tensors="pt").input_ids.shape == (0, 0)
    assert ours(iter(["a", "b"]), return_tensors="np")["input_ids"].shape == (2, 3)
    assert ours(np.array(["a", "b"])) == ours(("a", "b"))
    packed = ours.encode_packed([])
    assert packed.input_ids.shape == packed.token_type_ids.shape == (0,)
    assert packed.cu_seqlens.tolist() == [0] and packed.cu_seqlens.dtype == torch.int32
    assert ours.encode_packed("").input_ids.tolist() == [101, 102]
    assert ours("", add_special_tokens=False)["input_ids"] == []


def test_packed_rows_are_the_unpadded_rows(ours: Tokenizer, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch rows out of order, offsets off by one, wrong dtypes, and a seam between chunks."""
    monkeypatch.setattr("fastbert.text.windows.TEXTS", 7)
    for second in (None, texts[::-1]):
        rows = ours(texts, second, max_length=60)
        packed = ours.encode_packed(texts, second, max_length=60)
        assert (packed.input_ids.dtype, packed.token_type_ids.dtype) == (torch.int64, torch.int64)
        assert packed.cu_seqlens.dtype == torch.int32
        bounds = packed.cu_seqlens.tolist()
        assert bounds[0] == 0 and bounds[-1] == len(packed.input_ids) == len(packed.token_type_ids)
        spans = [slice(*span) for span in zip(bounds[:-1], bounds[1:], strict=True)]
        assert [packed.input_ids[span].tolist() for span in spans] == rows["input_ids"]
        assert [packed.token_type_ids[span].tolist() for span in spans] == rows["token_type_ids"]


def test_truncation_stored_in_tokenizer_json_is_not_applied(ours: Tokenizer) -> None:
    """Would catch the 128 tokens of padding and truncation that MiniLM's tokenizer.json asks for."""
    assert len(ours("a " * 300)["input_ids"]) == 302
    assert len(ours("a")["input_ids"]) == 3
    assert ours.model_max_length == 512


def test_threads_with_different_limits_do_not_interfere(ours: Tokenizer, texts: list[str]) -> None:
    """Would catch truncation or padding kept as state of the shared Rust tokenizer."""
    texts = texts[:120]
    limits = [5, 17, 64, 200] * 8
    expected = {limit: ours(texts, max_length=limit)["input_ids"] for limit in set(limits)}
    with ThreadPoolExecutor(4) as pool:
        for limit, found in zip(limits, pool.map(lambda n: ours(texts, max_length=n), limits), strict=True):
            assert found["input_ids"] == expected[limit]


def test_cut_tokens_are_counted_in_one_warning(ours: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    """Would catch silent truncation, a warning per text, wrong counts, and a warning where the caller set the limit."""
    batch = ["a " * 600, "short", "b " * 511]
    for encode in (ours, ours.encode_packed):
        caplog.clear()
        encode(batch)
        assert [record.name for record in caplog.records] == ["fastbert"]
        assert "2 of 3 texts" in caplog.text and "512" in caplog.text and f"{90 + 1} tokens cut" in caplog.text
    caplog.clear()
    ours(batch, max_length=512)
    ours(batch[1])
    packed = ours.encode_packed(batch, warn=False)
    assert not caplog.records
    assert (packed.n_truncated, packed.n_truncated_tokens) == (2, 91)
    assert packed.cu_seqlens.tolist() == [0, 512, 515, 1027]


def test_no_truncation_names_the_text_that_is_too_long(ours: Tokenizer) -> None:
    """Would catch a limit ignored, or an error that does not say which of many texts and how long it is."""
    with pytest.raises(ValueError, match=r"texts\[2\] has 613 tokens, expected at most 512"):
        ours(["a", "b", "c " * 611], truncation=False)
    with pytest.raises(ValueError, match=r"texts\[1\] has 9 tokens, expected at most 8"):
        ours.encode_packed(["a", "b b b"], ["a", "b b b"], truncation=False, max_length=8)
    assert len(ours("c " * 6, truncation=False, max_length=8)["input_ids"]) == 8


def test_a_megabyte_in_one_text_takes_seconds(ours: Tokenizer) -> None:
    """Would catch quadratic time in text length, for ordinary text and for the worst of each kind."""
    for text, length in (
        ("hello world " * 90_000, 180_002),
        ("x" * 1_000_000, 3),
        ("漢" * 350_000, 350_002),
        ("." * 1_000_000, 1_000_002),
        ("e" + "\u0301" * 500_000, 3),
    ):
        start = time.perf_counter()
        packed = ours.encode_packed([text], warn=False)
        seconds = time.perf_counter() - start
        assert len(packed.input_ids) + packed.n_truncated_tokens == length
        assert seconds < 15, f"{text[:5]!r}: {seconds:.1f} s"


# Bad input


@pytest.mark.parametrize("text", ["ok \ud800 x", "ab\udcff", "\ud83d\ude00"])
def test_lone_surrogates_are_refused_with_a_recipe_that_works(ours: Tokenizer, text: str) -> None:
    """Would catch surrogates replaced in silence, an error without the place, and advice that does not help."""
    at = re.search("[\ud800-\udfff]", text)
    assert at is not None
    code = f"U\\+{ord(at[0]):04X}"
    for call in (lambda: ours(["fine", text]), lambda: ours.encode_packed(["fine", text])):
        with pytest.raises(ValueError, match=rf"texts\[1\]: lone surrogate {code} at character {at.start()}") as error:
            call()
    with pytest.raises(ValueError, match=r"pairs\[0\]: lone surrogate"):
        ours("fine", text)
    with pytest.raises(ValueError, match="text: lone surrogate"):
        ours.tokenize(text)
    recipe = str(error.value).rsplit(": ", 1)[1]
    repaired = eval(recipe, {"text": text})
    assert repaired == ("😀" if len(text) == 2 else re.sub("[\ud800-\udfff]", "\ufffd", text))
    ours(repaired)


def test_nul_and_control_characters_are_removed(ours: Tokenizer) -> None:
    """Would catch a NUL that ends or splits a text: BERT's clean_text drops it."""
    assert ours("he\x00llo \x00world\x00") == ours("hello world")
    assert ours("\x00") == ours("")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda t: t(None), TypeError, "texts: got NoneType, expected a str or a sequence of str"),
        (lambda t: t(b"bytes"), TypeError, "texts: got bytes"),
        (lambda t: t({"a": 1}), TypeError, "texts: got dict"),
        (lambda t: t(["a", None]), TypeError, r"texts\[1\]: got NoneType, expected str"),
        (lambda t: t(["a", b"b"]), TypeError, r"texts\[1\]: got bytes"),
        (lambda t: t([("a", "b")]), TypeError, r"texts\[0\]: got tuple"),
        (lambda t: t(["a"], [7]), TypeError, r"pairs\[0\]: got int"),
        (lambda t: t(["a"], "b"), TypeError, "pairs: got str for texts of type list"),
        (lambda t: t(["a", "b"], ["c"]), ValueError, "pairs: got 1 for 2 texts"),
        (lambda t: t("a", padding="left"), ValueError, "padding: got 'left', expected one of False, True, 'longest'"),
        (lambda t: t("a", truncation="first"), ValueError, "truncation: got 'first', expected one of True"),
        (lambda t: t("a", truncation="only_second"), ValueError, "'only_second' without pairs"),
        (lambda t: t("a", max_length=1), ValueError, "max_length: got 1, expected None or an int >= 2"),
        (lambda t: t("a", "b", max_length=2), ValueError, "max_length: got 2, expected None or an int >= 3"),
        (lambda t: t("a", max_length=2.5), ValueError, "max_length: got 2.5"),
        (
            lambda t: t("a", return_tensors="tf"),
            ValueError,
            "return_tensors: got 'tf', expected one of None, 'pt', 'np'",
        ),
        (lambda t: t(["a", "b c"], return_tensors="pt"), ValueError, "rows have 3 to 4 tokens; pass padding=True"),
        (lambda t: t("a").to("cpu"), TypeError, "input_ids is a list; encode with return_tensors='pt'"),
        (lambda t: t.decode([5, 30522]), ValueError, "ids: got 30522, expected 0 to 30521"),
        (lambda t: t.decode([-100]), ValueError, "ids: got -100"),
        (lambda t: t.decode([[5], [6]]), TypeError, "ids: got 2 dimensions"),
        (lambda t: t.decode([0.5]), TypeError, "ids: got 1 dimensions of float64"),
    ],
)
def test_bad_arguments_are_named(
    ours: Tokenizer, call: Callable[[Tokenizer], Any], error: type[Exception], message: str
) -> None:
    """Would catch an error from deep inside Rust or numpy that does not name the argument and what came."""
    with pytest.raises(error, match=message):
        call(ours)


# Results and back


def test_encoding_gives_attributes_moves_and_unpacks(ours: Tokenizer) -> None:
    """Would catch an Encoding that cannot stand for transformers' BatchEncoding in `model(**encoding.to(device))`."""
    encoding = ours(["a", "b"], return_tensors="pt")
    assert encoding.input_ids is encoding["input_ids"]
    assert {**encoding}.keys() == set(KEYS)
    moved = encoding.to("meta")
    assert moved is encoding and all(value.device.type == "meta" for value in moved.values())
    with pytest.raises(AttributeError, match="no 'labels', only input_ids"):
        _ = encoding.labels
    assert isinstance(pickle.loads(pickle.dumps(ours("a"))), Encoding)


def test_decoding_is_that_of_transformers(ours: Tokenizer, theirs: BertTokenizerFast, texts: list[str]) -> None:
    """Would catch other rules for ##, spaces or special tokens on the way back, for lists, arrays and tensors."""
    rows = ours(texts)["input_ids"]
    for skip in (True, False):
        expected = [theirs.decode(row, skip_special_tokens=skip) for row in rows]
        assert [ours.decode(row, skip_special_tokens=skip) for row in rows] == expected
        assert ours.decode_batch(rows, skip_special_tokens=skip) == expected
    assert ours.decode(torch.tensor(rows[0])) == ours.decode(np.array(rows[0])) == ours.decode(rows[0])
    assert ours.decode([]) == ""
    assert ours.decode(ours("Hello, World!")["input_ids"]) == "hello, world!"


def test_tokens_and_ids_convert(ours: Tokenizer, theirs: BertTokenizerFast) -> None:
    """Would catch special tokens, sizes and unknown tokens that differ from transformers'."""
    for name in ("cls", "sep", "pad", "mask", "unk"):
        assert getattr(ours, f"{name}_token") == getattr(theirs, f"{name}_token")
        assert getattr(ours, f"{name}_token_id") == getattr(theirs, f"{name}_token_id")
    assert ours.vocab_size == len(theirs) == 30522
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.all_special_ids == sorted(theirs.all_special_ids)
    assert [ours.num_special_tokens(pair) for pair in (False, True)] == [2, 3]
    assert ours.convert_ids_to_tokens([101, 7592]) == ["[CLS]", "hello"]
    assert ours.convert_ids_to_tokens(7592) == ours.convert_ids_to_tokens(torch.tensor(7592)) == "hello"
    assert ours.convert_tokens_to_ids(["hello", "no such token"]) == [7592, 100]
    assert ours.convert_tokens_to_ids("hello") == 7592


def test_pickled_tokenizer_works(ours: Tokenizer) -> None:
    """Would catch state that worker processes of a DataLoader cannot receive."""
    again = pickle.loads(pickle.dumps(ours))
    assert again("Hello world", "pair") == ours("Hello world", "pair")
    assert again.model_max_length == 512


# Loading


@pytest.mark.parametrize("names", [("tokenizer.json",), ("vocab.txt",)], ids=["tokenizer.json", "vocab.txt"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"do_lower_case": False},
        {"do_lower_case": False, "strip_accents": True},
        {"strip_accents": False, "tokenizer_class": "BertTokenizerFast"},
        {"tokenize_chinese_chars": False, "tokenizer_class": "DistilBertTokenizer"},
        {"model_max_length": 20, "padding_side": "left", "truncation_side": "left"},
        {"model_max_length": 1e30},
        {
            "mask_token": "[unused7]",
            "cls_token": "[unused1]",
            "sep_token": {"__type": "AddedToken", "content": "[unused2]"},
        },
        {"additional_special_tokens": ["[unused3]", "<new>"]},
        {
            "added_tokens_decoder": {
                "101": {"content": "[CLS]", "special": True},
                "30522": {"content": "DomainWord", "normalized": False, "special": False},
                "30523": {"content": "lowered", "normalized": True, "special": False},
            }
        },
    ],
)
def test_options_of_the_config_act_as_in_transformers(
    minilm: Path, tmp_path: Path, texts: list[str], names: tuple[str, ...], config: dict[str, Any]
) -> None:
    """Would catch tokenizer.json's normalizer winning over the config, ignored options, and other defaults."""
    copy_files(minilm, tmp_path, *names, **config)
    ours, theirs = Tokenizer.from_pretrained(tmp_path), BertTokenizerFast.from_pretrained(tmp_path)
    batch = [*NASTY, *texts[:20], "a [unused3] b <new> c DomainWord d domainword LOWERED [unused7][unused2] Café"]
    assert_same_ids(ours, theirs, batch)
    assert_same_ids(ours, theirs, batch, padding=True)
    assert ours.vocab_size == len(theirs)
    assert ours.model_max_length == (None if theirs.model_max_length > 1e12 else theirs.model_max_length)
    assert ours.mask_token_id == theirs.mask_token_id


def test_older_files_for_special_and_added_tokens_are_read(minilm: Path, tmp_path: Path) -> None:
    """Would catch special_tokens_map.json or added_tokens.json ignored where the config is an old one."""
    copy_files(minilm, tmp_path, "vocab.txt", mask_token="[unused9]")
    mask = {"content": "[MASK]", "lstrip": True, "rstrip": False, "single_word": False, "normalized": False}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"mask_token": mask, "sep_token": "[unused8]"}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"newword": 30523, "otherword": 30522}))
    ours, theirs = Tokenizer.from_pretrained(tmp_path), BertTokenizerFast.from_pretrained(tmp_path)
    assert_same_ids(ours, theirs, ["a newword, NEWWORD otherword x", "the   [MASK] sat", "a [unused8] [SEP]"])
    assert (ours.mask_token, ours.sep_token) == ("[MASK]", "[unused8]")
    assert ours.convert_tokens_to_ids(["otherword", "newword"]) == [30522, 30523]


def test_other_tokenizer_classes_take_tokenizer_json_as_it_stands(minilm: Path, tmp_path: Path) -> None:
    """Would catch BERT's pipeline forced on a tokenizer.json that says otherwise and whose class is not BERT's."""
    inputs = list(KEYS)  # transformers 5 gives this class no segment ids of itself
    copy_files(
        minilm, tmp_path, "tokenizer.json", "config.json", tokenizer_class="PreTrainedTokenizerFast",
        model_input_names=inputs,
    )  # fmt: skip
    stored = json.loads((tmp_path / "tokenizer.json").read_text())
    stored["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFKC"}, stored["normalizer"]]}
    for side in ("single", "pair"):
        stored["post_processor"][side].insert(0, {"SpecialToken": {"id": "[SEP]", "type_id": 1}})
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    for path in (tmp_path, tmp_path / "saved"):
        ours = Tokenizer.from_pretrained(path)
        theirs = AutoTokenizer.from_pretrained(tmp_path)
        theirs.model_input_names = list(KEYS)
        assert_same_ids(ours, theirs, [*NASTY, "ﬁne ①"])
        expected = theirs(["a b c d", "e"], ["f", "g h i"], truncation=True, max_length=7)
        assert ours(["a b c d", "e"], ["f", "g h i"], max_length=7) == {key: expected[key] for key in KEYS}
        assert (ours.num_special_tokens(False), ours.num_special_tokens(True)) == (3, 4)
        ours.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="do_lower_case: cannot be changed"):
        Tokenizer.from_pretrained(tmp_path, do_lower_case=False)
    copy_files(minilm, tmp_path / "saved", tokenizer_class="GPT2Tokenizer")
    with pytest.raises(FileNotFoundError, match="'GPT2Tokenizer' needs a tokenizer.json"):
        Tokenizer.from_pretrained(tmp_path / "saved" / "vocab.txt")


def test_overrides_win_over_the_files(minilm: Path) -> None:
    """Would catch an override that is dropped, or a misspelt one that passes."""
    cased = Tokenizer.from_pretrained(minilm, do_lower_case=False, model_max_length=6, padding_side="left")
    assert cased.tokenize("Hello hello") == ["[UNK]", "hello"]
    assert cased(["a b c d e f", ""], padding=True)["input_ids"][1] == [0, 0, 0, 0, 101, 102]
    assert Tokenizer.from_pretrained(minilm, model_max_length=None).model_max_length is None
    with pytest.raises(TypeError, match="got lower, expected only pad_token"):
        Tokenizer.from_pretrained(minilm, lower=True)
    with pytest.raises(ValueError, match="model_max_length: got 0, expected a positive int or None"):
        Tokenizer.from_pretrained(minilm, model_max_length=0)
    with pytest.raises(ValueError, match="padding_side: got 'top', expected one of 'right', 'left'"):
        Tokenizer.from_pretrained(minilm, padding_side="top")
    with pytest.raises(ValueError, match="neither max_length nor model_max_length is set"):
        Tokenizer.from_pretrained(minilm, model_max_length=None)("a", padding="max_length")


def test_missing_files_are_named(tmp_path: Path) -> None:
    """Would catch an error that does not tell the folder and what was looked for."""
    with pytest.raises(FileNotFoundError, match="looked for tokenizer.json and vocab.txt") as error:
        Tokenizer.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)
    with pytest.raises(FileNotFoundError, match="absent"):
        Tokenizer.from_pretrained(tmp_path / "absent")


def write_vocab(path: Path, *tokens: str) -> Path:
    path.write_text("\n".join(tokens) + "\n", encoding="utf-8")
    return path


def test_vocab_txt_is_checked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Would catch special tokens that are absent or ambiguous, and ids shifted by odd lines of vocab.txt."""
    path = tmp_path / "my_vocab.txt"
    ours = Tokenizer.from_pretrained(write_vocab(path, *FIVE, "a", "x\u2028\ry", "", "b"))
    assert ours("A b")["input_ids"] == [2, 5, 8, 3]
    assert not caplog.records
    ours = Tokenizer.from_pretrained(write_vocab(path, *FIVE, "a", "b", "a", "c"))
    assert (ours.convert_tokens_to_ids("a"), ours.vocab_size) == (7, 9)
    assert "1 lines repeat a token" in caplog.text
    ours.save_pretrained(tmp_path / "saved")
    assert Tokenizer.from_pretrained(tmp_path / "saved" / "vocab.txt")("a b c") == ours("a b c")

    with pytest.raises(ValueError, match=r"sep_token: '\[SEP\]' stands 2 times in .*my_vocab.txt, expected once"):
        Tokenizer.from_pretrained(write_vocab(path, *FIVE, "[SEP]"))
    with pytest.raises(ValueError, match=r"cls_token: got '\[CLS\]', which the vocabulary in .* lacks"):
        Tokenizer.from_pretrained(write_vocab(path, "[PAD]", "[UNK]", "[SEP]", "[MASK]"))
    without_mask = write_vocab(path, *FIVE[:4], "a")
    with pytest.raises(ValueError, match="mask_token"):
        Tokenizer.from_pretrained(without_mask)
    assert Tokenizer.from_pretrained(without_mask, mask_token=None).mask_token_id is None
    with pytest.raises(ValueError, match="no pad_token"):
        Tokenizer.from_pretrained(without_mask, mask_token=None, pad_token=None)("a", padding=True)
    with pytest.raises(ValueError, match="unk_token: got None"):
        Tokenizer.from_pretrained(without_mask, unk_token=None)
    path.write_bytes(b"[PAD]\n\xff\n")
    with pytest.raises(ValueError, match="my_vocab.txt is not UTF-8"):
        Tokenizer.from_pretrained(path)


def test_broken_json_is_named(minilm: Path, tmp_path: Path) -> None:
    """Would catch a half-written tokenizer.json that gives an error without a file name."""
    file = tmp_path / "tokenizer.json"
    for content, message in (("{", "JSON"), ("[]", "JSON"), ('{"model": {"type": "WordPiece"}}', "no vocabulary")):
        file.write_text(content)
        with pytest.raises(ValueError, match=f"tokenizer.json.*{message}"):
            Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ValueError, match="tokenizer.json is no tokenizer"):
        Tokenizer.from_pretrained(tmp_path)


# Saving


@pytest.mark.parametrize("which", ["ours", "korean"])
def test_saved_tokenizers_load_here_and_in_transformers(
    request: pytest.FixtureRequest, tmp_path: Path, texts: list[str], which: str
) -> None:
    """Would catch a saved file that lacks or contradicts something, for each of the ways to load the folder."""
    saved: Tokenizer = request.getfixturevalue(which)
    saved.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "tokenizer.json",
        "vocab.txt",
        "tokenizer_config.json",
        "special_tokens_map.json",
    }
    batch = texts + KOREAN
    expected = saved(batch, max_length=512)
    again = Tokenizer.from_pretrained(tmp_path)
    assert again(batch, max_length=512) == expected
    assert again.model_max_length == saved.model_max_length
    assert Tokenizer.from_pretrained(tmp_path / "vocab.txt")(batch, max_length=512) == expected
    fast = BertTokenizerFast.from_pretrained(tmp_path)
    assert_same_ids(saved, fast, batch, max_length=512)
    fast.save_pretrained(tmp_path / "theirs")
    assert Tokenizer.from_pretrained(tmp_path / "theirs")(batch, max_length=512) == expected
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert_same_ids(saved, AutoTokenizer.from_pretrained(tmp_path), batch, max_length=512)
    (tmp_path / "tokenizer.json").unlink()
    assert_same_ids(saved, BertTokenizerFast.from_pretrained(tmp_path), batch, max_length=512)


# Training


def syllables(text: str) -> str:
    return "".join(SYLLABLE.findall(text))


def test_hangul_survives_a_round_trip(korean: Tokenizer) -> None:
    """Would catch accent stripping in a vocabulary learned from Korean text: it decomposes Hangul."""
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
    """Would catch the option being overruled or obeyed in silence, and shows what it does to Korean."""
    stripped = Tokenizer.train(KOREAN * 3, vocab_size=600, strip_accents=True)
    assert "strip_accents=True" in caplog.text and "Hangul" in caplog.text
    assert any(JAMO.search(token) for token in stripped.get_vocab())
    assert not any(SYLLABLE.search(token) for token in stripped.get_vocab())
    decoded = stripped.decode(stripped("다람쥐 헌")["input_ids"])
    assert syllables(decoded) == "" and decoded == unicodedata.normalize("NFD", "다람쥐 헌")


def test_accents_follow_lowercase_without_hangul(caplog: pytest.LogCaptureFixture) -> None:
    """Would catch accents kept in uncased training, stripped in cased, and Hangul missed in a stream's last text."""
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
    """Would catch the random order of the trainer's hash maps, and sources that are not read as the same texts."""
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
    """Would catch rare characters that crowd out words, ties broken at random, and marks that get a useless ## twin."""
    corpus, special = ["aaaa bbbb cc dd . 漢"] * 2, [*FIVE, "<x>"]
    trained = Tokenizer.train(corpus, vocab_size=40, limit_alphabet=3, special_tokens=special)
    assert trained.convert_ids_to_tokens(range(12)) == [*special, "a", "b", "c", "##a", "##b", "##c"]
    assert trained.tokenize("<x> dd aaaa") == ["<x>", "[UNK]", "aaaa"]
    assert 5 in trained.all_special_ids
    whole = Tokenizer.train(["ab. 漢字"] * 2, vocab_size=40).get_vocab()
    assert {".", "漢", "##a", "##b"} <= whole.keys() and not {"##.", "##漢"} & whole.keys()


def test_training_refuses_what_it_cannot_use(tmp_path: Path) -> None:
    """Would catch a path taken for a text's characters, a vocabulary larger than asked, and unclear errors."""
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
    """Would catch a trained tokenizer without template, decoder or special ids."""
    assert korean("서울", "dog")["input_ids"][0] == korean.cls_token_id == 2
    assert korean("서울", "dog")["token_type_ids"][-1] == 1
    assert [korean.pad_token_id, korean.unk_token_id, korean.sep_token_id, korean.mask_token_id] == [0, 1, 3, 4]
    assert korean.model_max_length is None
    shuffled = random.Random(0).sample(KOREAN, 4)
    assert korean.decode_batch(korean(shuffled, padding=True, return_tensors="pt").input_ids) == [
        korean.decode(korean(text).input_ids) for text in shuffled
    ]


def test_loading_logs_and_changes_nothing(minilm: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Would catch noise on an ordinary checkpoint."""
    with caplog.at_level(logging.DEBUG, logger="fastbert"):
        Tokenizer.from_pretrained(str(minilm))
    assert not caplog.records


def test_one_thread_of_pytorch_is_one_thread(minilm: Path) -> None:
    """Catches the tokenizer's own threads where PyTorch is allowed one, in servers with a process for each core."""
    tokenizer, texts = Tokenizer.from_pretrained(minilm), docstrings(200) * 8
    expected = tokenizer.encode_packed(texts, warn=False).input_ids
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        started, used = time.perf_counter(), time.process_time()
        found = tokenizer.encode_packed(texts, warn=False).input_ids
        cores = (time.process_time() - used) / (time.perf_counter() - started)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, expected)
    assert cores < 1.3
