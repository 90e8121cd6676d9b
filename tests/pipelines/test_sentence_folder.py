"""Folders of sentence-transformers are read and written."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fastbert import BertModel, SentenceEncoder, Tokenizer
from fastbert.pipelines.folder import read_layout
from fastbert.pipelines.modules import Dense, Dropout, LayerNorm, Normalize
from fastbert.pipelines.pipeline import Pooling
from sentence_cases import TEXTS, assert_close, theirs, tiny


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("plain"))


TAILS: dict[str, tuple[Any, list[Any]]] = {
    "mean, normalised": ("mean", [Normalize()]),
    "cls, dense": ("cls", [Dense(32, 7)]),
    "all modes": (("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"), []),
    "another order": (("mean", "cls"), [Dropout(0.3), Dense(64, 9, False, "GELU"), LayerNorm(9), Normalize()]),
    "identity": ("weightedmean", [Dense(32, 9, activation="Identity")]),
    "sigmoid": ("max", [Dense(32, 5, activation="Sigmoid"), Dense(5, 4, activation="ReLU")]),
}  # fmt: skip


@pytest.mark.parametrize("name", TAILS)
def test_saved_folder_loads_in_sentence_transformers(plain: Path, tmp_path: Path, name: str) -> None:
    """Catches a module, setting or limit that sentence-transformers reads otherwise, or that we do not read again."""
    pooling, tail = TAILS[name]
    torch.manual_seed(1)
    model, tokenizer = BertModel.from_pretrained(plain), Tokenizer.from_pretrained(plain)
    ours = SentenceEncoder(model, tokenizer, pooling, tail, prompts={"query": "query: "}, similarity_fn_name="dot")
    ours.max_seq_length = 12
    expected = ours.encode(TEXTS)
    assert expected.shape == (len(TEXTS), ours.get_embedding_dimension())
    ours.save_pretrained(tmp_path)
    again, other = SentenceEncoder.from_pretrained(tmp_path, device="cpu"), theirs(tmp_path)
    for loaded in (again, other):
        assert loaded.max_seq_length == 12 and len(loaded) == len(ours) and loaded.similarity_fn_name == "dot"
        assert loaded.prompts["query"] == "query: "
        assert_close(loaded.encode(TEXTS), expected)
        assert_close(loaded.encode(TEXTS, prompt_name="query"), ours.encode(TEXTS, prompt="query: "))
    other.save_pretrained(str(tmp_path / "theirs"))
    back = SentenceEncoder.from_pretrained(tmp_path / "theirs", device="cpu")
    assert back.max_seq_length == 12 and back.pooling.modes == ours.pooling.modes
    assert_close(back.encode(TEXTS), expected)


def test_earlier_names_and_pickled_dense(plain: Path, tmp_path: Path) -> None:
    """Catches a folder of earlier versions, with 0_Transformer and pytorch_model.bin, that is not read."""
    torch.manual_seed(1)
    dense = Dense(64, 6)
    write(tmp_path / "modules.json", modules("0_Transformer:Transformer", "1_Pooling:Pooling", "2_Dense:Dense"))
    shutil.copytree(plain, tmp_path / "0_Transformer")
    write(tmp_path / "0_Transformer" / "sentence_bert_config.json", {"max_seq_length": 11, "do_lower_case": False})
    flags = {"word_embedding_dimension": 32, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}
    write(tmp_path / "1_Pooling" / "config.json", {**flags, "pooling_mode_max_tokens": False})
    write(tmp_path / "2_Dense" / "config.json", dense.settings())
    torch.save(dense.state_dict(), tmp_path / "2_Dense" / "pytorch_model.bin")
    ours = SentenceEncoder.from_pretrained(tmp_path, device="cpu")
    assert ours.max_seq_length == 11 and ours.pooling == Pooling(("cls", "mean"))
    assert_close(ours.encode(TEXTS), theirs(tmp_path).encode(TEXTS))


def write(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def modules(*entries: str) -> list[dict[str, Any]]:
    """modules.json from "path:Type" or "path:full.name"."""
    listed = []
    for i, entry in enumerate(entries):
        path, _, kind = entry.partition(":")
        kind = kind if "." in kind else f"sentence_transformers.models.{kind}"
        listed.append({"idx": i, "name": str(i), "path": path, "type": kind})
    return listed


def test_plain_folder_gets_mean_pooling(plain: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a plain checkpoint refused, normalised, or pooled without a word."""
    with caplog.at_level(logging.WARNING, "fastbert"):
        ours = SentenceEncoder.from_pretrained(plain, device="cpu")
    assert any("mean pooling without normalisation" in r.getMessage() for r in caplog.records)
    assert_close(ours.encode(TEXTS), theirs(plain).encode(TEXTS))


def test_do_lower_case(tmp_path: Path) -> None:
    """Catches do_lower_case ignored, and accents stripped along with it."""
    tiny(tmp_path, lowercase=False)
    SentenceEncoder.from_pretrained(tmp_path, device="cpu").save_pretrained(tmp_path)
    write(tmp_path / "sentence_bert_config.json", {"max_seq_length": 20, "do_lower_case": True})
    texts = ["A River Is Wide", "Fïsh RIVER", "small boats"]
    ours = SentenceEncoder.from_pretrained(tmp_path, device="cpu")
    assert ours.tokenizer.tokenize("A River") == ours.tokenizer.tokenize("a river")
    assert_close(ours.encode(texts), theirs(tmp_path).encode(texts))
    ours.save_pretrained(tmp_path / "again")
    assert_close(SentenceEncoder.from_pretrained(tmp_path / "again", device="cpu").encode(texts), ours.encode(texts))


DENSE = {"in_features": 32, "out_features": 7}
BROKEN: list[tuple[str, Any, str]] = [
    ("modules.json", {}, "expected a list of modules"),
    ("modules.json", modules(":Transformer", "1_Pooling:Pooling", "2_CNN:CNN"), "type .*models.CNN' is not supported"),
    ("modules.json", modules(":Transformer", "1_Pooling:my_code.Pooling"), "type 'my_code.Pooling' is not supported"),
    ("modules.json", modules(":Transformer"), "expected a Transformer, a Pooling and what follows it"),
    ("modules.json", modules(":Transformer", "1_Pooling:Pooling", "1_Pooling:Pooling"), "a second Pooling"),
    ("modules.json", modules(":Transformer", "../1_Pooling:Pooling"), "leads out of the folder"),
    ("1_Pooling/config.json", {"pooling_mode": "median"}, r"pooling: got \['median'\]"),
    ("2_Dense/config.json", {**DENSE, "activation_function": "torch.nn.PReLU"}, "'torch.nn.PReLU'"),
    ("2_Dense/config.json", {**DENSE, "activation_function": "torch.SiLU"}, "'torch.SiLU'"),
    ("2_Dense/config.json", {**DENSE, "use_residual": True}, "the weights lack residual.weight"),
    ("2_Dense/config.json", {**DENSE, "dropout": 0.5}, "the key 'dropout' is not supported"),
    ("2_Dense/config.json", {**DENSE, "module_input_name": "token_embeddings"}, "module_input_name"),
    ("2_Dense/config.json", {"out_features": 5}, "lacks 'in_features'"),
    ("2_Dense/config.json", {**DENSE, "out_features": 5}, r"linear.weight: came \(7, 32\), expected \(5, 32\)"),
    ("sentence_bert_config.json", {"max_seq_length": "long"}, "max_seq_length is 'long'"),
    ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, "transformer_task is 'fill-mask'"),
    ("sentence_bert_config.json", {"query_length": 32}, "query_length is 32"),
    ("config_sentence_transformers.json", {"model_type": "CrossEncoder"}, "model_type is 'CrossEncoder'"),
    ("config_sentence_transformers.json", {"similarity_fn_name": "maxsim"}, "similarity_fn_name: got 'maxsim'"),
    ("config_sentence_transformers.json", {"default_prompt_name": "nope"}, "default_prompt_name: got 'nope'"),
    ("config.json", {"model_type": "funnel"}, "model_type: got 'funnel'"),
]


@pytest.fixture(scope="module")
def with_dense(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    model, tokenizer = BertModel.from_pretrained(plain), Tokenizer.from_pretrained(plain)
    SentenceEncoder(model, tokenizer, "mean", [Dense(32, 7)]).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("file", "content", "message"), BROKEN, ids=[f"{b[0]}-{b[2][:30]}" for b in BROKEN])
def test_what_is_not_supported_is_named(
    with_dense: Path, tmp_path: Path, file: str, content: Any, message: str
) -> None:
    """Catches a folder whose settings are ignored in silence, which would give other vectors."""
    folder = tmp_path / "folder"
    shutil.copytree(with_dense, folder)
    write(folder / file, content)
    with pytest.raises(ValueError, match=message):
        SentenceEncoder.from_pretrained(folder, device="cpu")


def test_missing_files_are_named(with_dense: Path, tmp_path: Path) -> None:
    """Catches a module whose weights or settings are gone and that starts afresh."""
    folder = tmp_path / "folder"
    shutil.copytree(with_dense, folder)
    (folder / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no weights in .*2_Dense"):
        SentenceEncoder.from_pretrained(folder, device="cpu")
    (folder / "1_Pooling" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="1_Pooling"):
        SentenceEncoder.from_pretrained(folder, device="cpu")


def test_layout_of_a_plain_folder(plain: Path) -> None:
    """Catches a plain checkpoint taken for a sentence-transformers folder."""
    assert read_layout(plain) is None
