"""Each setting of a tokenizer's folder gives the ids of AutoTokenizer, or is refused by name."""

from __future__ import annotations

import json
import logging
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import normalizers, pre_tokenizers, processors

from family_text_cases import KINDS, PAIRS, TEXTS
from fastbert import Tokenizer
from fastbert.text.settings import FOLLOWED, LOGGED, NO_EFFECT

FAMILIES = {
    "bert": "BertTokenizer",
    "distilbert": "DistilBertTokenizer",
    "electra": "ElectraTokenizerFast",
    "roberta": "RobertaTokenizer",
    "xlm-roberta": "XLMRobertaTokenizer",
    "camembert": "CamembertTokenizerFast",
    "plain": "PreTrainedTokenizerFast",  # a byte-level tokenizer.json, taken as it stands
    "plain-bert": "TokenizersBackend",  # BERT's, taken as it stands
}
WORDPIECE = ("bert", "distilbert", "electra", "plain-bert")
PROBES = [
    "", " ", "river", " river", "  the   river ", "The RIVER, Caf\u00e9 \u00dcberma\u00df!", *TEXTS,
    "boats<mask>boats <mask> boats [MASK] fish", "a <s> b</s> [CLS] the [SEP]x <pad> [PAD] <unk>",
    "the <new> river<own>fish <Own> old new", "\ufb01ne \u2460 \u6f22\u5b57 \ud55c\uad6d\uc5b4 \U0001f600",
    "\u00a0fish\u3000boats\n\tfish", "<s>NOTUSED boats RIVER River river", "e\u0301vening every\u0301",
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each of FAMILIES, with tokenizer.json, config.json and the class alone in tokenizer_config.json."""
    folder_of = {}
    words = Tokenizer.train([*TEXTS, *PAIRS, "The River [NEW] caf\u00e9"] * 3, vocab_size=150, lowercase=False)
    for name, kind in FAMILIES.items():
        folder = folder_of[name] = tmp_path_factory.mktemp(name)
        if name in WORDPIECE:
            words.save_pretrained(folder)
            (folder / "special_tokens_map.json").unlink()
        else:
            KINDS.get(name, KINDS["roberta"])().save(str(folder / "tokenizer.json"))
        model_type = {"plain": "roberta", "plain-bert": "bert"}.get(name, name)
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    return folder_of


def copied(folder: Path, to: Path, config: dict[str, Any], **files: Any) -> Path:
    """The folder again, with settings of tokenizer_config.json replaced, and with other JSON files."""
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    old = json.loads((to / "tokenizer_config.json").read_text())
    (to / "tokenizer_config.json").write_text(json.dumps({**old, **config}))
    for name, content in files.items():
        (to / f"{name}.json").write_text(json.dumps(content))
    return to


def assert_same(folder: Path) -> Tokenizer:
    """Ids, segment ids, sides, limits and decoded texts are those of AutoTokenizer, also after saving."""
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.from_pretrained(folder)
    saved = folder / "saved"
    ours.save_pretrained(saved)
    again = Tokenizer.from_pretrained(saved)
    for tokenizer in (ours, again, pickle.loads(pickle.dumps(ours))):
        for arguments in ((PROBES,), (PROBES, PROBES[::-1])):
            expected, encoding = theirs(*arguments), tokenizer(*arguments, truncation=True, max_length=1000)
            for text, a, b in zip(PROBES, encoding["input_ids"], expected["input_ids"], strict=True):
                assert a == b, f"{text!r}: {ours.convert_ids_to_tokens(a)}, not {theirs.convert_ids_to_tokens(b)}"
            if "token_type_ids" in expected:
                assert encoding["token_type_ids"] == expected["token_type_ids"]
            else:
                assert not any(i for row in encoding["token_type_ids"] for i in row)
            assert (
                tokenizer(*arguments, max_length=9)["input_ids"]
                == theirs(*arguments, truncation=True, max_length=9)["input_ids"]
            )
        limit = theirs.model_max_length
        assert tokenizer.model_max_length == (None if limit > 1e12 else limit)
        assert (tokenizer.padding_side, tokenizer.truncation_side) == (theirs.padding_side, theirs.truncation_side)
        if theirs.pad_token is not None:
            row = tokenizer(["river", "the river is"], padding=True)["input_ids"]
            assert row == theirs(["river", "the river is"], padding=True)["input_ids"]
        rows = theirs(PROBES)["input_ids"]
        for skip in (True, False):
            decoded = [tokenizer.decode(ids, skip_special_tokens=skip) for ids in rows]
            assert decoded == [theirs.decode(ids, skip_special_tokens=skip) for ids in rows]
    assert transformers.AutoTokenizer.from_pretrained(saved)(PROBES)["input_ids"] == theirs(PROBES)["input_ids"]
    return ours


NEW = {"content": "<new>", "lstrip": True, "rstrip": False, "normalized": False, "single_word": False, "special": False}
OWN = {"content": "<Own>", "lstrip": False, "rstrip": True, "normalized": True, "single_word": True, "special": True}
FISH = {"content": "fish", "lstrip": False, "rstrip": False, "normalized": True, "single_word": True, "special": False}

# A value that changes something in one family at least, for every key that is followed; and some that must not.
FOLLOWED_VALUES: dict[str, list[Any]] = {
    "add_prefix_space": [True, False],
    "added_tokens_decoder": [{"7": NEW}, {"200": OWN, "30": FISH}, {}],
    "additional_special_tokens": [["<new>", "river"], []],
    "bos_token": ["<new>", "<s>", None],
    "clean_up_tokenization_spaces": [True, False],
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": [True],
    "cls_token": ["a"],
    "do_lower_case": [True, False],
    "eos_token": ["<own>", "</s>"],
    "extra_special_tokens": [["<new>"], {"own_token": "<own>"}, [], {}],
    "fast_tokenizer_files": [["tokenizer.json"]],
    "keep_accents": [True],  # of ALBERT's: tests/text/test_sentencepiece.py
    "mask_token": [{"__type": "AddedToken", **NEW, "content": "a"}, None],
    "max_len": [17, None],
    "model_input_names": [["input_ids", "attention_mask"], ["input_ids", "token_type_ids", "attention_mask"]],
    "model_max_length": [17, 1e30, None],
    "model_specific_special_tokens": [{"own": "<own>"}],
    "pad_token": ["a"],
    "padding_side": ["left", "right"],
    "sep_token": ["a"],
    "split_by_punct": [True],  # of DeBERTa-v2's
    "split_special_tokens": [True, False],
    "strip_accents": [True, False, None],
    "tokenize_chinese_chars": [True, False],
    "tokenizer_class": ["BertTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend", "NoSuchTokenizer"],
    "truncation_side": ["left", "right"],
    "unk_token": ["a"],
}
NO_EFFECT_VALUES: dict[str, Any] = {
    "pad_token_type_id": 3, "max_length": 5, "stride": 2, "padding": "max_length", "truncation": True,
    "trim_offsets": False,
    "errors": "strict", "add_bos_token": True, "add_eos_token": True, "legacy": False, "name_or_path": "other",
    "tokenizer_file": "/nowhere/tokenizer.json", "vocab_file": "/nowhere/vocab.txt", "unk_id": 5,
    "pad_to_multiple_of": 8, "chat_template": "{{ x }}", "use_fast": False,
    "spaces_between_special_tokens": False, "verbose": True, "device_map": "cpu",
}  # fmt: skip
TOLD_VALUES: dict[str, Any] = {
    "do_basic_tokenize": False, "never_split": ["river"], "from_slow": True, "fix_mistral_regex": True,
    "auto_map": {"AutoTokenizer": ["x.Slow", None]},
}  # fmt: skip


def test_every_followed_key_has_a_case() -> None:
    """Catches a key that is said to be followed and that no case below tries."""
    assert set(FOLLOWED_VALUES) == FOLLOWED
    assert set(TOLD_VALUES) == set(LOGGED) and set(NO_EFFECT_VALUES) <= NO_EFFECT


@pytest.mark.parametrize("key", FOLLOWED_VALUES)
@pytest.mark.parametrize("name", FAMILIES)
def test_followed_keys(name: str, key: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Catches a setting that is not read, or not as transformers 5 reads it for this class of tokenizers."""
    for i, value in enumerate(FOLLOWED_VALUES[key]):
        (tmp_path / str(i)).mkdir()
        folder = copied(folders[name], tmp_path / str(i), {key: value})
        unigram = name in ("xlm-roberta", "camembert")
        if (unigram and key == "bos_token" and value is None) or (
            value == "BertTokenizerFast" and name not in WORDPIECE
        ):
            with pytest.raises(ValueError, match="_token: got None"):
                Tokenizer.from_pretrained(folder)
            continue  # transformers fails, too, or makes nonsense of it
        try:
            assert_same(folder)
        except ValueError as error:
            stored = json.loads((folder / "tokenizer.json").read_text())
            assert str(error).startswith(f"{key}: ") and key.endswith("_token")
            assert value is None or value not in (token for token, *_ in stored["model"]["vocab"])


@pytest.mark.parametrize("name", FAMILIES)
def test_keys_without_effect(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Catches a key taken for a setting that transformers does not read: a limit, a side, a padding id."""
    assert_same(copied(folders[name], tmp_path, NO_EFFECT_VALUES))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("key", TOLD_VALUES)
def test_keys_that_are_told(
    name: str, key: str, folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a setting that transformers had, that is not followed, and that nobody hears of."""
    folder = copied(folders[name], tmp_path, {key: TOLD_VALUES[key]})
    with caplog.at_level(logging.WARNING, "fastbert"):
        assert_same(folder)
    assert f"{key}={TOLD_VALUES[key]!r} is not followed" in caplog.text


def test_other_keys_are_named(folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a key of a later transformers, or of somebody's own, that is passed over in silence."""
    copied(folders["bert"], tmp_path, {"fold_case": True, "model_input_names": ["input_ids", "token_type_ids"]})
    with caplog.at_level(logging.INFO, "fastbert"):
        Tokenizer.from_pretrained(tmp_path)
    assert "fold_case: not known, and without effect" in caplog.text
    assert "there is always an attention_mask" in caplog.text


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"init_inputs": ["vocab.txt"]}, "init_inputs: got"),
        ({"tokenizer_class": "BertJapaneseTokenizer"}, "'BertJapaneseTokenizer' runs in Python"),
        ({"tokenizer_class": "BertTokenizerLegacy"}, "'BertTokenizerLegacy' runs in Python"),
        ({"max_len": 0}, "max_len: got 0"),
        ({"max_len": "17"}, "max_len: got '17'"),
        ({"model_max_length": True}, "model_max_length: got True"),
        ({"split_special_tokens": "yes"}, "split_special_tokens: got 'yes'"),
        ({"truncation_side": "top"}, "truncation_side: got 'top'"),
    ],
)
def test_refused_settings(config: dict[str, Any], message: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Catches a setting that cannot be followed and gives other ids in silence."""
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_pretrained(copied(folders["bert"], tmp_path, config))


@pytest.mark.parametrize("with_decoder", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_older_files(name: str, with_decoder: bool, folders: dict[str, Path], tmp_path: Path) -> None:
    """Catches special_tokens_map.json and added_tokens.json ignored, or read where the config is complete."""
    mask = "[MASK]" if name in WORDPIECE else "<mask>"
    special_map = {
        "mask_token": {"content": mask, "lstrip": True, "rstrip": True, "normalized": False, "single_word": False},
        "bos_token": "river" if name not in ("xlm-roberta", "camembert") else "<s>",
        "additional_special_tokens": ["<own>", "fish"],
        "own_token": "<new>",
    }
    stored = json.loads((folders[name] / "tokenizer.json").read_text())
    decoder = {str(token.pop("id")): token for token in stored["added_tokens"]}
    config = {"added_tokens_decoder": decoder} if with_decoder else {"mask_token": mask, "own_token": "old"}
    assert_same(
        copied(folders[name], tmp_path, config, special_tokens_map=special_map, added_tokens={"<Own>": 99, "old": 98})
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_sides_stored_in_tokenizer_json(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Catches stored sides of truncation and padding that are ignored, or the rest of them applied."""
    rust = RustTokenizer.from_file(str(folders[name] / "tokenizer.json"))
    rust.enable_truncation(5, direction="left")
    rust.enable_padding(direction="left", pad_id=3, pad_token="a", pad_type_id=1, length=9)
    ours = assert_same(copied(folders[name], tmp_path, {}, tokenizer=json.loads(rust.to_str())))
    assert (ours.truncation_side, ours.padding_side) == ("left", "left")
    (tmp_path / "other").mkdir()
    config = {"truncation_side": "right", "padding_side": "right"}
    assert_same(copied(folders[name], tmp_path / "other", config, tokenizer=json.loads(rust.to_str())))


def pieces_of(name: str) -> list[dict[str, Any]]:
    """Parts of a tokenizer.json that are not what the class of the family builds."""
    prefix = pre_tokenizers.ByteLevel(add_prefix_space=True)
    others: list[tuple[str, Any]] = [
        ("normalizer", normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])),
        ("pre_tokenizer", prefix if name not in WORDPIECE else pre_tokenizers.WhitespaceSplit()),
        ("post_processor", processors.TemplateProcessing(single="$A", pair="$B $A")),
    ]
    return [{key: json.loads(part.__getstate__())} for key, part in others]


@pytest.mark.parametrize("part", range(3), ids=["normalizer", "pre_tokenizer", "post_processor"])
@pytest.mark.parametrize("name", FAMILIES)
def test_tokenizer_json_that_says_otherwise(
    name: str, part: int, folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a pipeline of tokenizer.json taken where transformers 5 does not, or without a word where 4 did."""
    change = pieces_of(name)[part]
    stored = {**json.loads((folders[name] / "tokenizer.json").read_text()), **change}
    folder = copied(folders[name], tmp_path, {}, tokenizer=stored)
    with caplog.at_level(logging.WARNING, "fastbert"):
        Tokenizer.from_pretrained(folder)
    told = [record.message for record in caplog.records if "transformers 4" in record.message]
    if name == "plain":
        assert bool(told) == (part == 1) and all("add_prefix_space=False" in message for message in told)
    elif (name, part) == ("roberta", 1):
        assert not told  # all versions take add_prefix_space from the config
    elif name != "plain-bert":
        assert len(told) == 1 and next(iter(change)) in told[0].split(": as")[0]
    assert_same(folder)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("plain-bert", "xlm-roberta", "camembert")])
def test_folders_that_all_versions_read_alike(
    name: str, folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a warning about a folder that transformers itself has written, and about settings that both follow."""
    with caplog.at_level(logging.WARNING, "fastbert"):
        Tokenizer.from_pretrained(folders[name])
        config = {"do_lower_case": False, "add_prefix_space": name != "plain", "strip_accents": True}
        Tokenizer.from_pretrained(copied(folders[name], tmp_path, config))
        transformers.AutoTokenizer.from_pretrained(folders[name]).save_pretrained(tmp_path / "saved")
        (tmp_path / "saved" / "config.json").write_bytes((folders[name] / "config.json").read_bytes())
        Tokenizer.from_pretrained(tmp_path / "saved")
    assert not caplog.records


def test_vocabulary_and_merges_without_a_tokenizer_json(folders: dict[str, Path], tmp_path: Path) -> None:
    """Catches RoBERTa's older files, which transformers reads, refused or read as WordPiece."""
    folder = copied(folders["roberta"], tmp_path, {"add_prefix_space": True})
    RustTokenizer.from_file(str(folder / "tokenizer.json")).model.save(str(folder))
    vocab = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps({**vocab, "<mask>": len(vocab)}))
    (folder / "tokenizer.json").unlink()
    assert_same(folder)


def test_the_newest_of_several_tokenizer_files(folders: dict[str, Path], tmp_path: Path) -> None:
    """Catches tokenizer.json read where the config names a newer file of another name."""
    stored = json.loads((folders["plain"] / "tokenizer.json").read_text())
    newer = {**stored, "normalizer": {"type": "Lowercase"}}
    files = ["tokenizer.json", "tokenizer.4.0.0.json"]
    folder = copied(folders["plain"], tmp_path, {"fast_tokenizer_files": files}, **{"tokenizer.4.0.0": newer})
    ours, theirs = Tokenizer.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert ours(PROBES)["input_ids"] == theirs(PROBES)["input_ids"]


@pytest.mark.parametrize("name", FAMILIES)
def test_settings_together(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Catches settings that are right one by one and that spoil each other together."""
    draw = random.Random(name)
    keys = [
        key
        for key in FOLLOWED_VALUES
        if key not in ("tokenizer_class", "cls_token", "sep_token", "unk_token", "pad_token")
    ]
    for i in range(12):
        config = {key: draw.choice(FOLLOWED_VALUES[key]) for key in draw.sample(keys, 6)}
        if config.get("bos_token", "") is None or "mask_token" in config:
            config.pop("bos_token", None), config.pop("mask_token", None)
        (tmp_path / str(i)).mkdir()
        assert_same(copied(folders[name], tmp_path / str(i), config))
