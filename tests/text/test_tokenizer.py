"""The tokenizer gives what transformers' BertTokenizerFast gives, and names bad input."""

from __future__ import annotations

import pickle
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertTokenizerFast

from fastbert.text.encoding import Encoding
from fastbert.text.tokenizer import Tokenizer
from helpers import docstrings, minilm_folder
from tokenizer_cases import KEYS, assert_same_ids


@pytest.fixture(scope="module")
def adjustable() -> tuple[Tokenizer, BertTokenizerFast]:
    """Tokenizers of their own for the tests that set padding_side and truncation_side."""
    return Tokenizer.from_pretrained(minilm_folder()), BertTokenizerFast.from_pretrained(minilm_folder())


def test_ids_are_those_of_transformers(ours: Tokenizer, theirs: BertTokenizerFast, texts: list[str]) -> None:
    """Catches any difference in cleaning, splitting, word pieces, special tokens or default truncation."""
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
    """Catches a wrong split of the budget between two texts, odd budgets, ties and impossible limits included."""
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
    """Catches a wrong pad id, segment id or mask at padding, on either side, in each kind of result."""
    ours, theirs = adjustable
    ours.truncation_side = theirs.truncation_side = "right"
    ours.padding_side = theirs.padding_side = side
    options: dict[str, Any] = {"padding": padding, "max_length": 40, "truncation": True, "return_tensors": kind}
    for batch in (texts[::25], texts[0]):
        encoding, expected = ours(batch, **options), theirs(batch, **options)
        assert tuple(encoding) == KEYS
        for key in KEYS:
            assert type(encoding[key]) is type(expected[key])
            assert np.array_equal(np.asarray(encoding[key]), np.asarray(expected[key])), key
            if kind is not None:
                assert str(encoding[key].dtype).removeprefix("torch.") == "int64"


def test_results_have_the_shape_of_the_input(ours: Tokenizer) -> None:
    """Catches a batch dimension too many or too few, and an empty batch or text that crashes."""
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
    """Catches rows out of order, offsets off by one, wrong dtypes, and a seam between chunks."""
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
    """Catches the 128 tokens of padding and truncation that MiniLM's tokenizer.json asks for."""
    assert len(ours("a " * 300)["input_ids"]) == 302
    assert len(ours("a")["input_ids"]) == 3
    assert ours.model_max_length == 512


def test_threads_with_different_limits_do_not_interfere(ours: Tokenizer, texts: list[str]) -> None:
    """Catches truncation or padding kept as state of the shared Rust tokenizer."""
    texts = texts[:120]
    limits = [5, 17, 64, 200] * 8
    expected = {limit: ours(texts, max_length=limit)["input_ids"] for limit in set(limits)}
    with ThreadPoolExecutor(4) as pool:
        for limit, encoding in zip(limits, pool.map(lambda n: ours(texts, max_length=n), limits), strict=True):
            assert encoding["input_ids"] == expected[limit]


def test_cut_tokens_are_counted_in_one_warning(ours: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    """Catches silent truncation, a warning per text, wrong counts, and a warning where the caller set the limit."""
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
    """Catches a limit ignored, or an error that does not say which of many texts and how long it is."""
    with pytest.raises(ValueError, match=r"texts\[2\] has 613 tokens, expected at most 512"):
        ours(["a", "b", "c " * 611], truncation=False)
    with pytest.raises(ValueError, match=r"texts\[1\] has 9 tokens, expected at most 8"):
        ours.encode_packed(["a", "b b b"], ["a", "b b b"], truncation=False, max_length=8)
    assert len(ours("c " * 6, truncation=False, max_length=8)["input_ids"]) == 8


def test_a_megabyte_in_one_text_takes_seconds(ours: Tokenizer) -> None:
    """Catches quadratic time in text length, for ordinary text and for the worst of each kind."""
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
    """Catches surrogates replaced in silence, an error without the place, and advice that does not help."""
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
    """Catches a NUL that ends or splits a text, where BERT's clean_text drops it."""
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
    """Catches an error from deep inside Rust or numpy that does not name the argument and what came."""
    with pytest.raises(error, match=message):
        call(ours)


# Results and back
def test_encoding_gives_attributes_moves_and_unpacks(ours: Tokenizer) -> None:
    """Catches an Encoding that cannot stand for transformers' BatchEncoding in `model(**encoding.to(device))`."""
    encoding = ours(["a", "b"], return_tensors="pt")
    assert encoding.input_ids is encoding["input_ids"]
    assert {**encoding}.keys() == set(KEYS)
    moved = encoding.to("meta")
    assert moved is encoding and all(value.device.type == "meta" for value in moved.values())
    with pytest.raises(AttributeError, match="no 'labels', only input_ids"):
        _ = encoding.labels
    assert isinstance(pickle.loads(pickle.dumps(ours("a"))), Encoding)


def test_decoding_is_that_of_transformers(ours: Tokenizer, theirs: BertTokenizerFast, texts: list[str]) -> None:
    """Catches other rules for ##, spaces or special tokens on the way back, for lists, arrays and tensors."""
    rows = ours(texts)["input_ids"]
    for skip in (True, False):
        expected = [theirs.decode(row, skip_special_tokens=skip) for row in rows]
        assert [ours.decode(row, skip_special_tokens=skip) for row in rows] == expected
        assert ours.decode_batch(rows, skip_special_tokens=skip) == expected
    assert ours.decode(torch.tensor(rows[0])) == ours.decode(np.array(rows[0])) == ours.decode(rows[0])
    assert ours.decode([]) == ""
    assert ours.decode(ours("Hello, World!")["input_ids"]) == "hello, world!"


def test_tokens_and_ids_convert(ours: Tokenizer, theirs: BertTokenizerFast) -> None:
    """Catches special tokens, sizes and unknown tokens that differ from transformers'."""
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
    """Catches state that worker processes of a DataLoader cannot receive."""
    again = pickle.loads(pickle.dumps(ours))
    assert again("Hello world", "pair") == ours("Hello world", "pair")
    assert again.model_max_length == 512


def test_one_thread_of_pytorch_is_one_thread(minilm: Path) -> None:
    """Catches the tokenizer's own threads where PyTorch is allowed one, in servers with a process for each core."""
    tokenizer, texts = Tokenizer.from_pretrained(minilm), docstrings(200) * 8
    expected = tokenizer.encode_packed(texts, warn=False).input_ids
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        started, used = time.perf_counter(), time.process_time()
        input_ids = tokenizer.encode_packed(texts, warn=False).input_ids
        cores = (time.process_time() - used) / (time.perf_counter() - started)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(input_ids, expected)
    assert cores < 1.3


def test_raw_text_holds_no_special_tokens(ours: Tokenizer) -> None:
    """Catches a [MASK] of running text that becomes the mask, and a copy that changes the tokenizer it is made of."""
    raw = ours.for_raw_text()
    ids = raw.encode("[MASK] a[SEP]", add_special_tokens=False).ids
    assert not set(ids) & set(ours.all_special_ids) and raw.truncation is None and raw.padding is None
    assert ours.mask_token_id in ours("[MASK]")["input_ids"]
    assert raw.encode("a river", add_special_tokens=False).ids == ours("a river", add_special_tokens=False)["input_ids"]
