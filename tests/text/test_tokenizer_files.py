"""Tokenizers are loaded from the files of a checkpoint and saved to them."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, BertTokenizerFast

from fastbert.text.tokenizer import Tokenizer
from tokenizer_cases import FIVE, KEYS, KOREAN, NASTY, assert_same_ids


@pytest.fixture(scope="module")
def korean() -> Tokenizer:
    return Tokenizer.train(KOREAN * 3, vocab_size=600)


def copy_files(source: Path, target: Path, *names: str, **config: Any) -> Path:
    for name in names:
        shutil.copy(source / name, target)
    (target / "tokenizer_config.json").write_text(json.dumps(config))
    return target


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
    """Catches tokenizer.json's normalizer winning over the config, ignored options, and other defaults."""
    copy_files(minilm, tmp_path, *names, **config)
    ours, theirs = Tokenizer.from_pretrained(tmp_path), BertTokenizerFast.from_pretrained(tmp_path)
    batch = [*NASTY, *texts[:20], "a [unused3] b <new> c DomainWord d domainword LOWERED [unused7][unused2] Café"]
    assert_same_ids(ours, theirs, batch)
    assert_same_ids(ours, theirs, batch, padding=True)
    assert ours.vocab_size == len(theirs)
    assert ours.model_max_length == (None if theirs.model_max_length > 1e12 else theirs.model_max_length)
    assert ours.mask_token_id == theirs.mask_token_id


def test_older_files_for_special_and_added_tokens_are_read(minilm: Path, tmp_path: Path) -> None:
    """Catches special_tokens_map.json or added_tokens.json ignored where the config is an old one."""
    copy_files(minilm, tmp_path, "vocab.txt", mask_token="[unused9]")
    mask = {"content": "[MASK]", "lstrip": True, "rstrip": False, "single_word": False, "normalized": False}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"mask_token": mask, "sep_token": "[unused8]"}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"newword": 30523, "otherword": 30522}))
    ours, theirs = Tokenizer.from_pretrained(tmp_path), BertTokenizerFast.from_pretrained(tmp_path)
    assert_same_ids(ours, theirs, ["a newword, NEWWORD otherword x", "the   [MASK] sat", "a [unused8] [SEP]"])
    assert (ours.mask_token, ours.sep_token) == ("[MASK]", "[unused8]")
    assert ours.convert_tokens_to_ids(["otherword", "newword"]) == [30522, 30523]


def test_other_tokenizer_classes_take_tokenizer_json_as_it_stands(minilm: Path, tmp_path: Path) -> None:
    """Catches BERT's pipeline forced on a tokenizer.json that says otherwise and whose class is not BERT's."""
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
    """Catches an override that is dropped, or a misspelt one that passes."""
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
    """Catches an error that does not tell the folder and what was looked for."""
    with pytest.raises(FileNotFoundError, match="looked for tokenizer.json and vocab.txt") as error:
        Tokenizer.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)
    with pytest.raises(FileNotFoundError, match="absent"):
        Tokenizer.from_pretrained(tmp_path / "absent")


def write_vocab(path: Path, *tokens: str) -> Path:
    path.write_text("\n".join(tokens) + "\n", encoding="utf-8")
    return path


def test_vocab_txt_is_checked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches special tokens that are absent or ambiguous, and ids shifted by odd lines of vocab.txt."""
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
    """Catches a half-written tokenizer.json that gives an error without a file name."""
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
    """Catches a saved file that lacks or contradicts something, for each of the ways to load the folder."""
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


def test_loading_logs_and_changes_nothing(minilm: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches noise on an ordinary checkpoint."""
    with caplog.at_level(logging.DEBUG, logger="fastbert"):
        Tokenizer.from_pretrained(str(minilm))
    assert not caplog.records
