"""Tokenizers are made of SentencePiece's files where there is no tokenizer.json."""

from __future__ import annotations

import io
import json
import logging
import random
import re
import struct
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import transformers

from fastbert import Tokenizer
from fastbert.text.sentencepiece import BPE, Piece, read_pieces
from tokenizer_cases import KOREAN, NASTY

TRAINING = [*KOREAN * 5, "The quick brown fox, and 3.14 apples, 12, 13, 14, 2,", *NASTY] * 2
# Characters on which normalisers and splits differ.
ALPHABET = "abc XYZ  한국어다\u1100\u1161é\u0301ﬁ①😀\t\n,.''``12 ½Å\u200b\x07"
BERT_PIECES: dict[str, Any] = {
    "pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "pad_piece": "[PAD]", "bos_piece": "[CLS]",
    "eos_piece": "[SEP]", "unk_piece": "[UNK]",
}  # fmt: skip
ALBERT_PIECES: dict[str, Any] = {
    "pad_id": 0, "unk_id": 1, "bos_id": -1, "eos_id": -1, "pad_piece": "<pad>", "unk_piece": "<unk>",
    "control_symbols": ["[CLS]", "[SEP]", "[MASK]"],
}  # fmt: skip
KOBERT_PIECES: dict[str, Any] = {
    "unk_id": 0, "pad_id": 1, "bos_id": -1, "eos_id": -1, "unk_piece": "[UNK]", "pad_piece": "[PAD]",
    "control_symbols": ["[CLS]", "[SEP]", "[MASK]"],
}  # fmt: skip
# The class of transformers: its file, and how the model was trained.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "XLMRoberta": ("sentencepiece.bpe.model", {}),
    "Camembert": ("sentencepiece.bpe.model", {}),
    "Albert": ("spiece.model", ALBERT_PIECES),
    "DebertaV2": ("spm.model", BERT_PIECES),
}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"do_lower_case": True, "keep_accents": True, "split_by_punct": True},
    {"do_lower_case": False, "add_prefix_space": False},
]


def random_texts(n_texts: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(ALPHABET, k=rng.randrange(60))) for _ in range(n_texts)]


TEXTS = [*NASTY, *KOREAN, *random_texts(80, 0), "<u>a한국 어 <mask> b [MASK] </s> [CLS]x<s>", "w" * 3000]


def train(path: Path, **options: Any) -> Path:
    """Trains a small SentencePiece model."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece trains the models; extra test has it")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TRAINING), model_writer=model, vocab_size=300, minloglevel=2, hard_vocab_limit=False,
        num_threads=1, **options,
    )  # fmt: skip
    path.write_bytes(model.getvalue())
    return path


def write_config(folder: Path, **config: Any) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def assert_same_tokens(ours: Tokenizer, theirs: Any, texts: list[str]) -> None:
    """Compares ids, offsets, special tokens and pairs."""
    for text, tokens in zip(texts, ours.encode_with_offsets(texts), strict=True):
        expected = theirs(text, return_offsets_mapping=True, add_special_tokens=False)
        assert tokens.ids == expected["input_ids"], f"{text[:80]!r}: {ours.convert_ids_to_tokens(tokens.ids)[:40]}"
        assert list(map(tuple, tokens.offsets.tolist())) == list(map(tuple, expected["offset_mapping"])), text[:80]
    assert ours(texts)["input_ids"] == theirs(texts)["input_ids"]
    pair, expected = ours("a b", "한국"), theirs("a b", "한국")
    assert pair["input_ids"] == expected["input_ids"]
    assert pair["token_type_ids"] == expected.get("token_type_ids", [0] * len(pair["input_ids"]))
    assert (ours.vocab_size, ours.pad_token_id) == (len(theirs), theirs.pad_token_id)
    assert theirs.mask_token_id in (ours.mask_token_id, None)
    # transformers lists user-defined pieces as well, and skips none of them.
    skipped = [i for i, token in theirs.added_tokens_decoder.items() if token.special]
    assert ours.all_special_ids == sorted(skipped)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_offsets_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    """Catches a shifted id, another normalizer, split or template, and a special token that is not one."""
    name, options = KINDS[kind]
    for i, symbols in enumerate(([], ["<u>", "한국"])):
        folder = tmp_path / str(i)
        folder.mkdir()
        train(folder / name, **options, **({"user_defined_symbols": symbols} if symbols else {}))
        for settings in SETTINGS[i:]:
            write_config(folder, tokenizer_class=f"{kind}Tokenizer", **settings)
            ours = Tokenizer.from_pretrained(folder)
            assert_same_tokens(ours, getattr(transformers, f"{kind}Tokenizer").from_pretrained(folder), TEXTS)
    ours.save_pretrained(tmp_path / "saved")
    assert Tokenizer.from_pretrained(tmp_path / "saved")(TEXTS, TEXTS[::-1]) == ours(TEXTS, TEXTS[::-1])


EXTRA: list[dict[str, Any]] = [
    {"additional_special_tokens": ["<u>"]},
    {"additional_special_tokens": []},
    {"extra_special_tokens": None},
    {"additional_special_tokens": ["<u>"], "extra_special_tokens": {"own_token": "quick"}},
    {"split_special_tokens": True},
]


@pytest.mark.parametrize("kind", KINDS)
def test_extra_tokens_of_the_config(kind: str, tmp_path: Path) -> None:
    """Catches tokens of tokenizer_config.json that the pieces hide, and pieces that decoding skips."""
    name, options = KINDS[kind]
    train(tmp_path / name, **options, user_defined_symbols=[",", "한국"])
    for settings in EXTRA:
        write_config(tmp_path, tokenizer_class=f"{kind}Tokenizer", **settings)
        ours, theirs = (cls.from_pretrained(tmp_path) for cls in (Tokenizer, getattr(transformers, f"{kind}Tokenizer")))
        texts = [*KOREAN[:3], "<u>a한국 어, <mask> quick [MASK],,, 한국b"]
        ids = ours(texts)["input_ids"]
        assert ids == theirs(texts)["input_ids"], settings
        assert ours.decode_batch(ids) == theirs.batch_decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizer_json_of_the_same_classes(kind: str, tmp_path: Path) -> None:
    """Catches a tokenizer.json of these classes that is taken as it stands, where transformers builds it anew."""
    name, options = KINDS[kind]
    train(tmp_path / name, **options)
    cls = getattr(transformers, f"{kind}Tokenizer")
    write_config(tmp_path, tokenizer_class=f"{kind}Tokenizer")
    cls.from_pretrained(tmp_path).save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    stored = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for settings in SETTINGS:
        write_config(tmp_path, **{**stored, **settings})
        assert_same_tokens(Tokenizer.from_pretrained(tmp_path), cls.from_pretrained(tmp_path), TEXTS)


def test_the_model_type_names_the_class(tmp_path: Path) -> None:
    """Catches a folder without tokenizer_config.json, as older ones are, that is read as BERT's."""
    train(tmp_path / "sentencepiece.bpe.model")
    (tmp_path / "config.json").write_text('{"model_type": "xlm-roberta"}')
    ours = Tokenizer.from_pretrained(tmp_path)
    assert_same_tokens(ours, transformers.AutoTokenizer.from_pretrained(tmp_path), TEXTS[:20])
    # fairseq's four tokens, then SentencePiece's pieces from the fourth on, moved by one.
    pieces = read_pieces(tmp_path / "sentencepiece.bpe.model").pieces
    assert ours.convert_ids_to_tokens(list(range(5))) == ["<s>", "<pad>", "</s>", "<unk>", pieces[3].text]
    assert ours.mask_token_id == len(pieces) + 1
    from_file = Tokenizer.from_pretrained(tmp_path / "sentencepiece.bpe.model")
    assert from_file(TEXTS) == ours(TEXTS)


def kobert_pieces(model: Any, text: str) -> list[str]:
    """Returns the pieces that KoBERT's class gives: XLNet's preparation, and numbers read without their comma."""
    text = " ".join(text.strip().split()).replace("``", '"').replace("''", '"')
    text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    pieces: list[str] = []
    for piece in model.encode(text, out_type=str):
        if len(piece) > 1 and piece[-1] == "," and piece[-2].isdigit():
            parts = model.encode(piece[:-1].replace("▁", ""), out_type=str)
            if piece[0] != "▁" and parts[0][0] == "▁":
                parts = parts[1:] if len(parts[0]) == 1 else [parts[0][1:], *parts[1:]]
            pieces += [*parts, ","]
        else:
            pieces.append(piece)
    return pieces


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
@pytest.mark.parametrize("layout", ["monologg", "skt", "spiece"])
def test_kobert(model_type: str, layout: str, tmp_path: Path) -> None:
    """Catches Jamo in the place of syllables, XLNet's order of the special tokens, and the ids of another file."""
    name = {"monologg": "tokenizer_78b3253a26.model", "skt": "spiece.model",
            "spiece": "kobert_news_wiki_ko_cased-1087f8699e.spiece"}[layout]  # fmt: skip
    path = train(tmp_path / name, model_type=model_type, **KOBERT_PIECES)
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is the judge here; extra test has it")
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ids = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    if layout == "monologg":  # its vocab.txt gives the ids
        words = [*list(ids)[:5], *sorted(list(ids)[5:])]
        ids = {word: i for i, word in enumerate(words)}
        (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
        write_config(tmp_path, do_lower_case=False, max_len=512)
    elif layout == "skt":
        write_config(tmp_path, tokenizer_class="XLNetTokenizer", do_lower_case=False, model_max_length=512)
    ours = Tokenizer.from_pretrained(tmp_path)
    texts = [*KOREAN, "서울 2024, 12, 그리고 3,000원", "``인용'' 값이  없다\t한국어", "한국어 Café", "", "1,2,3"]
    for text in texts:
        expected = [ids.get(piece, ids["[UNK]"]) for piece in kobert_pieces(model, text)]
        assert ours(text)["input_ids"] == [ids["[CLS]"], *expected, ids["[SEP]"]], text
    pair = ours("한국", "어")
    assert pair["input_ids"].count(ids["[SEP]"]) == 2 and pair["input_ids"][0] == ids["[CLS]"]
    assert pair["token_type_ids"][0] == 0 and pair["token_type_ids"][-1] == 1


def test_what_transformers_4_reads_otherwise_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches silence where a folder has other ids under transformers 4."""
    train(tmp_path / "spm.model", **BERT_PIECES)
    write_config(tmp_path, tokenizer_class="DebertaV2Tokenizer")
    Tokenizer.from_pretrained(tmp_path)
    assert "its normalizer: as DebertaV2Tokenizer of transformers 5 has it" in caplog.text


# The file


def varint(number: int) -> bytes:
    return bytes([number]) if number < 128 else bytes([number % 128 + 128]) + varint(number // 128)


def field(number: int, content: bytes) -> bytes:
    return varint(number * 8 + 2) + varint(len(content)) + content


def piece(text: str, score: float, kind: int | None = None) -> bytes:
    end = b"" if kind is None else b"\x18" + varint(kind)
    return field(1, field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + end)


def test_every_form_of_the_file(tmp_path: Path) -> None:
    """Catches fields in another order, unknown ones, and long pieces, which the quick way does not read."""
    path = tmp_path / "a.model"
    data = piece("<unk>", 0.0, 2) + piece("▁a", -1.5) + piece("b" * 200, -2.5) + piece("c", -3.0, 4)
    other = field(1, b"\x18\x06" + field(1, b"<0x0A>") + b"\x15" + struct.pack("<f", -4.0) + field(99, b"new"))
    trainer = b"\x18\x02" + b"\xc0\x02\x07" + field(45, b"<unk>")  # model_type, unk_id, unk_piece
    normalizer = field(1, b"nmt") + field(2, b"table" * 50)
    path.write_bytes(data + other + field(2, trainer) + field(3, normalizer) + field(4, b"self test"))
    model = read_pieces(path)
    assert model.pieces == [
        Piece("<unk>", 0.0, 2), Piece("▁a", -1.5, 1), Piece("b" * 200, -2.5, 1), Piece("c", -3.0, 4),
        Piece("<0x0A>", -4.0, 6),
    ]  # fmt: skip
    assert (model.model_type, model.unknown_id, model.charsmap) == (BPE, 7, b"table" * 50)


@pytest.mark.parametrize(
    "content", [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", piece("a", 0.0)[:-2], b"\x0b\x0b",
                b"\x0a\x80", piece("", 0.0), piece("a", 0.0, 9), field(1, field(1, b"\xff") + b"\x15\0\0\0\0")],
)  # fmt: skip
def test_a_file_that_is_none(content: bytes, tmp_path: Path) -> None:
    """Catches half a download, or a pointer to one, that is read as a vocabulary or fails without its name."""
    (tmp_path / "spiece.model").write_bytes(content)
    write_config(tmp_path, tokenizer_class="AlbertTokenizer")
    with pytest.raises(ValueError, match=r"spiece\.model is no SentencePiece model"):
        Tokenizer.from_pretrained(tmp_path)


def test_a_model_that_no_tokenizer_runs(tmp_path: Path) -> None:
    """Catches merges of BPE that are run as a Unigram model, and a missing file that is not named."""
    write_config(tmp_path, tokenizer_class="XLMRobertaTokenizer")
    with pytest.raises(FileNotFoundError, match=re.escape("tokenizer.json or a sentencepiece.bpe.model")):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "sentencepiece.bpe.model").write_bytes(piece("a", 0.0) + field(2, b"\x18\x03"))
    with pytest.raises(ValueError, match="its model is of type 'word', expected 'unigram'"):
        Tokenizer.from_pretrained(tmp_path)


# vocab.json and merges.txt


@pytest.mark.parametrize("kind", ["Roberta", "Deberta", "GPT2"])
def test_byte_level_files(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches vocab.json and merges.txt read with another class's special tokens, template or prefix."""
    from tokenizers import Tokenizer as RustTokenizer
    from tokenizers import models, pre_tokenizers, trainers

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", "<|endoftext|>"]
    rust = RustTokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    rust.train_from_iterator(TRAINING, trainer)
    rust.model.save(str(tmp_path))
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"} if kind == "GPT2" else {}
    for settings in ({}, {"add_prefix_space": True}):
        write_config(tmp_path, tokenizer_class=f"{kind}Tokenizer", **names, **settings)
        with caplog.at_level(logging.WARNING, "fastbert"):
            ours = Tokenizer.from_pretrained(tmp_path)
        assert_same_tokens(ours, getattr(transformers, f"{kind}Tokenizer").from_pretrained(tmp_path), TEXTS)
    assert not caplog.records
