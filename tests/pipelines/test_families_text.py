"""Models of BERT's family read text: tokenizers, sentence vectors, cross-encoders, the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules

import fastbert
from family_text_cases import KINDS, NAMES, PAIRS, TEXTS, make_folders
from fastbert import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel, SentenceEncoder, Tokenizer
from fastbert.cli.main import main
from fastbert.pipelines.modules import Normalize
from helpers import assert_as_accurate
from model_cases import assert_close


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_folders(tmp_path_factory.mktemp("families"))


def their_tokenizer(folder: Path) -> Any:
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **NAMES)


# Tokenizers


@pytest.mark.parametrize("model_type", KINDS)
def test_ids_are_those_of_transformers(model_type: str, folders: dict[str, Path]) -> None:
    """Catches BERT's special tokens, template or normalisation in the place of what tokenizer.json says."""
    ours, theirs = Tokenizer.from_pretrained(folders[model_type]), their_tokenizer(folders[model_type])
    assert (ours.cls_token_id, ours.pad_token_id, ours.sep_token_id, ours.unk_token_id) == (0, 1, 2, 3)
    assert ours.mask_token == "<mask>" and ours.model_max_length == 512
    assert ours(TEXTS).input_ids == theirs(TEXTS).input_ids
    assert ours(TEXTS, PAIRS).input_ids == theirs(TEXTS, PAIRS).input_ids
    pair = ours("a", "b").input_ids
    assert pair.count(2) == 3 and pair[0] == 0 and ours.num_special_tokens(True) == 4
    for side in ("right", "left"):
        ours.padding_side = ours.truncation_side = theirs.padding_side = theirs.truncation_side = side
        options: dict[str, Any] = {"padding": True, "truncation": True, "max_length": 9, "return_tensors": "pt"}
        for texts in ((TEXTS,), (TEXTS, PAIRS)):
            mine, other = ours(*texts, **options), theirs(*texts, **options)
            for name in ("input_ids", "attention_mask"):
                assert torch.equal(mine[name], other[name])
            assert not mine.token_type_ids.any()
    assert ours.decode(ours(TEXTS[0]).input_ids) == TEXTS[0]


@pytest.mark.parametrize("model_type", KINDS)
def test_packed_ids(model_type: str, folders: dict[str, Path]) -> None:
    """Catches the two separators of a pair taken for one, or a packed row that differs from the padded one."""
    ours = Tokenizer.from_pretrained(folders[model_type])
    for texts in ((TEXTS,), (TEXTS, PAIRS)):
        packed, rows = ours.encode_packed(*texts), ours(*texts).input_ids
        assert packed.input_ids.tolist() == [i for row in rows for i in row]
        assert packed.cu_seqlens.diff().tolist() == [len(row) for row in rows]


@pytest.mark.parametrize("model_type", KINDS)
def test_tokenizer_round_trip(model_type: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Catches a special token, a flag such as the mask's, or a template that saving loses."""
    ours = Tokenizer.from_pretrained(folders[model_type])
    ours.save_pretrained(tmp_path)
    again, theirs = Tokenizer.from_pretrained(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again(TEXTS, PAIRS) == ours(TEXTS, PAIRS)
    assert theirs(TEXTS, PAIRS).input_ids == ours(TEXTS, PAIRS).input_ids
    assert theirs.pad_token_id == 1 and theirs.model_max_length == 512


@pytest.mark.parametrize("name", ["RobertaTokenizer", "RobertaTokenizerFast"])
def test_tokenizer_class(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Catches a class named in transformers' config that we take for BERT's or do not know."""
    (tmp_path / "tokenizer.json").write_bytes((folders["roberta"] / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    expected = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert Tokenizer.from_pretrained(tmp_path)(TEXTS, PAIRS).input_ids == expected(TEXTS, PAIRS).input_ids


def test_without_a_tokenizer_json(folders: dict[str, Path], tmp_path: Path) -> None:
    """Catches a vocabulary of byte pairs that is read as WordPiece."""
    (tmp_path / "config.json").write_bytes((folders["roberta"] / "config.json").read_bytes())
    with pytest.raises(FileNotFoundError, match="tokenizer_class 'RobertaTokenizer' needs a tokenizer.json"):
        Tokenizer.from_pretrained(tmp_path)


def test_segments_of_a_pair(folders: dict[str, Path], tmp_path: Path) -> None:
    """Catches segment ids for a model that has none and refuses them, or none for a model that has them."""
    distilbert, electra = (Tokenizer.from_pretrained(folders[name]) for name in ("distilbert", "electra"))
    assert distilbert("a", "fish").input_ids == electra("a", "fish").input_ids
    assert set(electra("a", "fish").token_type_ids) == {0, 1} and set(distilbert("a", "fish").token_type_ids) == {0}
    distilbert.save_pretrained(tmp_path)
    assert set(Tokenizer.from_pretrained(tmp_path)("a", "fish").token_type_ids) == {0}
    assert "token_type_ids" not in transformers.AutoTokenizer.from_pretrained(tmp_path)("a", "fish")
    model = BertModel.from_pretrained(folders["distilbert"])
    model(**distilbert("a", "fish", return_tensors="pt"))


# Sentence vectors


def their_encoder(folder: Path, pooling: str) -> Any:
    transformer = modules.Transformer(str(folder), max_seq_length=24)
    parts = [transformer, modules.Pooling(32, pooling_mode=pooling), modules.Normalize()]
    return SentenceTransformer(modules=parts, device="cpu")


@pytest.mark.parametrize(
    ("model_type", "pooling"),
    [("xlm-roberta", "cls"), ("xlm-roberta", "mean"), ("roberta", "mean"), ("distilbert", "mean"), ("electra", "cls")],
)
def test_vectors_agree_with_sentence_transformers(
    model_type: str, pooling: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Catches any error from text to vector: tokens, positions (a text holds <pad>), truncation, pooling, order."""
    theirs = their_encoder(folders[model_type], pooling)
    theirs.save(str(tmp_path / "theirs"))
    ours = SentenceEncoder.from_pretrained(tmp_path / "theirs", device="cpu")
    assert ours.max_seq_length == 24
    vectors, eager = (torch.from_numpy(encoder.encode(TEXTS)) for encoder in (ours, theirs))
    ours.save_pretrained(tmp_path / "ours")
    again = SentenceEncoder.from_pretrained(tmp_path / "ours", device="cpu")
    assert np.array_equal(again.encode(TEXTS), vectors)
    back = SentenceTransformer(str(tmp_path / "ours"), device="cpu", local_files_only=True)
    # The random weights magnify roundings: the float32 vectors of both are held against float64.
    exact = torch.from_numpy(theirs.double().encode(TEXTS))
    assert_as_accurate(model_type, vectors, eager, exact)
    assert_close(model_type, torch.from_numpy(back.double().encode(TEXTS)), exact)
    exactly = SentenceEncoder.from_pretrained(tmp_path / "theirs", device="cpu", dtype="float64")
    assert_close(model_type, torch.from_numpy(exactly.encode(TEXTS)), exact)


def test_long_texts_are_cut_to_the_positions_that_are_left(
    folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a text as long as the table, which is two tokens too long for positions behind the padding id."""
    encoder = SentenceEncoder.from_pretrained(folders["roberta"], device="cpu")
    assert encoder.max_seq_length == 24 and encoder.model.config.max_position_embeddings == 26
    assert np.isfinite(encoder.encode(["boats " * 60])).all()
    assert "1 of 1 texts were longer than max_seq_length = 24" in caplog.text
    with pytest.raises(ValueError, match="max_seq_length: got 25, but the model has 24 positions"):
        encoder.max_seq_length = 25


def test_cross_encoder(folders: dict[str, Path], tmp_path: Path) -> None:
    """Catches scores of pairs from wrong separators, positions or segments, as a reranker on XLM-RoBERTa has them."""
    config = transformers.AutoConfig.from_pretrained(folders["xlm-roberta"], num_labels=1)
    model = transformers.XLMRobertaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    encoding = their_tokenizer(folders["xlm-roberta"])(
        TEXTS, PAIRS, padding=True, truncation=True, max_length=24, return_tensors="pt"
    )
    ours = BertForSequenceClassification.from_pretrained(tmp_path)
    mine = Tokenizer.from_pretrained(folders["xlm-roberta"])(
        TEXTS, PAIRS, padding=True, max_length=24, return_tensors="pt"
    )
    with torch.no_grad():
        expected = model(encoding.input_ids, encoding.attention_mask).logits
        assert_close("logits", ours(**mine).logits, expected, 1e-5)


# The command line


def test_command_line(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a subcommand that knows BERT's classes, tokens or positions alone."""
    (tmp_path / "texts.txt").write_text("a river\nboats and fish\n" + "boats " * 60 + "\n")
    for model_type, folder in folders.items():
        out = tmp_path / f"{model_type}.npy"
        assert main(["embed", str(tmp_path / "texts.txt"), "--model", str(folder), "--output", str(out)]) == 0
        expected = SentenceEncoder.from_pretrained(folder, device="cpu").encode(["a river", "boats and fish"])
        assert np.abs(np.load(out)[:2] - expected).max() < 1e-5
    head = tmp_path / "mlm"
    config = BertConfig.from_pretrained(folders["roberta"])
    BertForMaskedLM(config).save_pretrained(head)
    Tokenizer.from_pretrained(folders["roberta"]).save_pretrained(head)
    capsys.readouterr()
    assert main(["info", "--model", str(head)]) == 0
    assert "BertForMaskedLM, model type roberta" in capsys.readouterr().out
    assert main(["fill-mask", "the <mask> is wide", "--model", str(head), "--top-k", "2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert main(["next-sentence", "a", "b", "--model", str(head)]) == 1
    assert "BertForNextSentencePrediction: not covered for model_type 'roberta'" in capsys.readouterr().err


def test_saved_encoder_of_our_own(folders: dict[str, Path], tmp_path: Path) -> None:
    """Catches a model made here, not loaded, that is saved as a BERT."""
    config = BertConfig.from_dict(
        {"model_type": "distilbert"}, vocab_size=Tokenizer.from_pretrained(folders["distilbert"]).vocab_size,
        hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=37, max_position_embeddings=26,
    )  # fmt: skip
    tokenizer = Tokenizer.from_pretrained(folders["distilbert"])
    encoder = SentenceEncoder(BertModel(config), tokenizer, "mean", [Normalize()])
    encoder.save_pretrained(tmp_path)
    assert type(transformers.AutoModel.from_pretrained(tmp_path)).__name__ == "DistilBertModel"
    loaded = fastbert.SentenceEncoder.from_pretrained(tmp_path, device="cpu")
    assert np.array_equal(loaded.encode(TEXTS), encoder.encode(TEXTS))
