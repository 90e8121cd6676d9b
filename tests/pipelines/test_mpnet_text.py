"""A download of all-mpnet-base-v2, in its published layout, becomes the vectors of sentence-transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from sentence_transformers import CrossEncoder as TheirCrossEncoder
from sentence_transformers import SentenceTransformer

import fastbert
from fastbert import CrossEncoder, MPNetModel, SentenceEncoder, Tokenizer

TEXTS = ["Hello world, the cat sat <mask>.", "", "héllo \ud55c\uad6d", "a <mask> cat </s> sat", "the " * 60, "w1 w2"]
PAIRS = ["the cat", "b", "", "hello", "world", "w3"]
WORDS = ["hello", "world", "the", "cat", "sat", "##s", "<mask>"]
# As on the hub but for the sizes: hidden 768, 12 layers and heads, intermediate 3072, 30,527 words there.
CONFIG: dict[str, Any] = {
    "_name_or_path": "microsoft/mpnet-base", "architectures": ["MPNetForMaskedLM"],
    "attention_probs_dropout_prob": 0.1, "bos_token_id": 0, "eos_token_id": 2, "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1, "hidden_size": 48, "initializer_range": 0.02, "intermediate_size": 96,
    "layer_norm_eps": 1e-05, "max_position_embeddings": 514, "model_type": "mpnet", "num_attention_heads": 3,
    "num_hidden_layers": 2, "pad_token_id": 1, "relative_attention_num_buckets": 32, "transformers_version": "4.8.2",
}  # fmt: skip
TOKENIZER = {
    "do_lower_case": True, "bos_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "cls_token": "<s>",
    "unk_token": "[UNK]", "pad_token": "<pad>", "mask_token": "<mask>", "tokenize_chinese_chars": True,
    "strip_accents": None, "model_max_length": 512, "tokenizer_class": "MPNetTokenizer",
}  # fmt: skip
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]
POOLING = {
    "word_embedding_dimension": 48, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True,
    "pooling_mode_max_tokens": False, "pooling_mode_mean_sqrt_len_tokens": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published files with random weights: names without a prefix, and the buffer of positions."""
    path = tmp_path_factory.mktemp("all-mpnet-base-v2")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<s>", "<pad>", "</s>", "[UNK]", *(f"w{i}" for i in range(9)), *letters, *(f"##{c}" for c in letters)]
    words += [".", ",", *WORDS]
    (path / "vocab.txt").write_text("\n".join(words) + "\n")
    config = transformers.MPNetConfig(**{**CONFIG, "vocab_size": len(words)})
    torch.manual_seed(0)
    state = transformers.MPNetModel(config).state_dict()
    state = {name: torch.randn_like(tensor) * 0.2 for name, tensor in state.items()}
    state |= {name: tensor + 1.0 for name, tensor in state.items() if name.endswith("LayerNorm.weight")}
    state["embeddings.position_ids"] = torch.arange(514)[None]
    torch.save(state, path / "pytorch_model.bin")
    transformers.MPNetTokenizer(str(path / "vocab.txt"), **TOKENIZER).backend_tokenizer.save(
        str(path / "tokenizer.json")
    )
    for name, content in {
        "config.json": {**CONFIG, "vocab_size": len(words)}, "tokenizer_config.json": TOKENIZER,
        "modules.json": MODULES, "1_Pooling/config.json": POOLING,
        "sentence_bert_config.json": {"max_seq_length": 384, "do_lower_case": False},
    }.items():  # fmt: skip
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(json.dumps(content))
    return path


def test_ids(folder: Path, tmp_path: Path) -> None:
    """Catches BERT's special tokens, one separator in a pair, a mask that keeps its space, or segments."""
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    (tmp_path / "vocab.txt").write_bytes((folder / "vocab.txt").read_bytes())
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    for source in (folder, tmp_path):  # the second is a vocab.txt alone
        ours = Tokenizer.from_pretrained(source)
        assert ours(TEXTS).input_ids == theirs(TEXTS).input_ids
        assert ours(TEXTS, PAIRS).input_ids == theirs(TEXTS, PAIRS).input_ids
        assert not any(map(any, ours(TEXTS, PAIRS).token_type_ids)) and ours.mask_token == "<mask>"
    ours.save_pretrained(tmp_path / "ours")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert again(TEXTS, PAIRS).input_ids == theirs(TEXTS, PAIRS).input_ids


def test_vectors(folder: Path, tmp_path: Path) -> None:
    """Catches any error from the published files to vectors, and files that sentence-transformers cannot read back."""
    ours = SentenceEncoder.from_pretrained(folder, dtype="float32")
    assert type(ours.model) is MPNetModel and ours.max_seq_length == 384
    expected = SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
    assert np.abs(ours.encode(TEXTS) - expected).max() < 2e-6
    ours.save_pretrained(tmp_path)
    back = SentenceTransformer(str(tmp_path), device="cpu").encode(TEXTS)
    assert np.abs(back - expected).max() < 2e-6


def test_accelerated_vectors(folder: Path) -> None:
    """Catches a SentenceTransformer whose MPNet stays as it is, or that does not come back."""
    theirs = SentenceTransformer(str(folder), device="cpu")
    expected = theirs.encode(TEXTS)
    fast = fastbert.accelerate(theirs, strict=True)
    assert np.abs(fast.encode(TEXTS) - expected).max() < 2e-6
    assert np.array_equal(fastbert.restore(fast).encode(TEXTS), expected)


def test_cross_encoder(folder: Path, tmp_path: Path) -> None:
    """Catches a head over the wrong token, or pairs with segment ids that the model does not take."""
    config = transformers.MPNetConfig.from_pretrained(folder, num_labels=1)
    torch.manual_seed(1)
    transformers.MPNetForSequenceClassification(config).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    pairs = list(zip(TEXTS, PAIRS, strict=True))
    expected = TheirCrossEncoder(str(tmp_path), device="cpu").predict(pairs)
    assert np.abs(CrossEncoder.from_pretrained(tmp_path, dtype="float32").predict(pairs) - expected).max() < 2e-6


def test_reports(folder: Path) -> None:
    """Catches a report that does not name the bias, or judges MPNet by BERT's formulas."""
    model = fastbert.BertModel.from_pretrained(folder)
    assert fastbert.verify(model, [[0, 5, 6, 2], [0, 7, 2]]).ok
    rows = {row.module: row for row in fastbert.explain(model, arch=90).rows}
    assert rows["encoder.layer.0-1.attention"].backend == "triton"
    assert "position bias" in rows["encoder.layer.0-1.attention"].shapes
