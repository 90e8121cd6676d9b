"""A folder of ModernBERT as it is published gives texts the ids, vectors and scores of transformers' libraries."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import AddedToken, decoders, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as RustTokenizer
from tokenizers.models import BPE

import fastbert
from family_cases import MODERNBERT_SIZES, SIZES, make_batch, randomised, run, theirs
from family_text_cases import PAIRS, TEXTS
from model_cases import assert_close, valid_of

SPECIAL = ["[CLS]", "[PAD]", "[SEP]", "[UNK]"]
SETTINGS = {  # of tokenizer_config.json of answerdotai/ModernBERT-base
    "clean_up_tokenization_spaces": True, "cls_token": "[CLS]", "mask_token": "[MASK]", "model_max_length": 8192,
    "model_input_names": ["input_ids", "attention_mask"], "pad_token": "[PAD]", "sep_token": "[SEP]",
    "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer's files, config.json and weights of a random model for sequences."""
    folder = tmp_path_factory.mktemp("modernbert")
    rust = RustTokenizer(BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    rust.train_from_iterator([*TEXTS, *PAIRS] * 3, trainer)
    rust.add_special_tokens([AddedToken("[MASK]", lstrip=True)])
    rust.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 2)]
    )
    rust.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS))
    config = transformers.ModernBertConfig(
        **(SIZES | MODERNBERT_SIZES | {"pad_token_id": 1, "vocab_size": rust.get_vocab_size(), "num_labels": 1})
    )
    randomised(transformers.ModernBertForSequenceClassification(config)).save_pretrained(folder)
    return folder


def test_tokenizer(folder: Path) -> None:
    """Catches special tokens, a template or segments of BERT's in the place of those of tokenizer.json."""
    ours = fastbert.Tokenizer.from_pretrained(folder)
    other = transformers.AutoTokenizer.from_pretrained(folder)
    for texts, pairs in ((TEXTS, None), (TEXTS, PAIRS)):
        pairs = None if pairs is None else pairs[: len(texts)]
        mine, expected = (each(texts, pairs, padding=True, truncation=True) for each in (ours, other))
        assert mine["input_ids"] == expected["input_ids"] and mine["attention_mask"] == expected["attention_mask"]
        assert not any(map(any, mine.get("token_type_ids", ())))
    assert ours.model_max_length == other.model_max_length == 8192


def test_sentence_encoder(folder: Path, tmp_path: Path) -> None:
    """Catches vectors of other layers, windows or pooling than sentence-transformers gives, accelerated ones too."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    original = sentence_transformers.SentenceTransformer(str(folder), device="cpu")  # with mean pooling
    original.save(str(tmp_path / "sentences"))
    texts = [*TEXTS, " ".join(TEXTS) * 3]
    expected = torch.from_numpy(original.encode(texts))
    ours = fastbert.SentenceEncoder.from_pretrained(tmp_path / "sentences", dtype="float32")
    assert_close("encode", torch.from_numpy(ours.encode(texts)), expected, 2e-6)
    ours.save_pretrained(tmp_path / "again")
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "again"), device="cpu")
    assert_close("saved", torch.from_numpy(again.encode(texts)), expected, 2e-6)
    fastbert.accelerate(original, strict=True)
    assert_close("accelerated", torch.from_numpy(original.encode(texts)), expected, 2e-6)
    fastbert.restore(original)
    assert torch.equal(torch.from_numpy(original.encode(texts)), expected)


def test_cross_encoder(folder: Path) -> None:
    """Catches scores of a head without ModernBERT's dense layer and norm, or of another pooling."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    pairs = list(zip(TEXTS, PAIRS, strict=False))
    expected = sentence_transformers.CrossEncoder(str(folder), device="cpu").predict(pairs)
    ours = fastbert.CrossEncoder.from_pretrained(folder, dtype="float32").predict(pairs)
    assert_close("predict", torch.as_tensor(ours).flatten(), torch.as_tensor(expected).flatten(), 2e-6)


# Live models of transformers


@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM", "BertForSequenceClassification"])
def test_accelerate(name: str) -> None:
    """Catches a live model whose outputs or gradients change, or that does not run here."""
    model = theirs("modernbert", name, attention_dropout=0.1, mlp_dropout=0.1)
    original, batch = copy.deepcopy(model), make_batch("modernbert", "right")
    fastbert.accelerate(model, strict=True)
    valid = valid_of(batch["attention_mask"])
    rows: Any = valid if name != "BertForSequenceClassification" else slice(None)
    mine, expected = run(model, batch, output_hidden_states=True), run(original, batch, output_hidden_states=True)
    assert_close(name, mine[0][rows], expected[0][rows], 1e-6)  # theirs rounds to float32 on the way
    assert list(mine.keys()) == list(expected.keys()) and len(mine.hidden_states) == 5
    for each in (model, original):
        each.train()
        for module in each.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
        each(**batch)[0][rows].square().sum().backward()
    for (key, parameter), other in zip(model.named_parameters(), original.parameters(), strict=True):
        assert_close(key, parameter.grad, other.grad, 1e-5)
    fastbert.restore(model)
    assert type(model) is type(original)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.rotary_emb.full_attention_inv_freq.mul_(2), "rotary_emb.full_attention_inv_freq differs from"),
        (lambda m: setattr(m.layers[1].attn, "sliding_window", 3), "layers.1.attn.sliding_window is not what the con"),
        (lambda m: setattr(m.layers[1].mlp, "act", torch.nn.Tanh()), "layers.1.mlp.act is not 'gelu'"),
    ],
)
def test_accelerate_declines(change: Any, reason: str) -> None:
    """Catches a live model with other angles, windows or activations than its config says, which runs as if not."""
    model = theirs("modernbert")
    with torch.no_grad():
        change(model)
    fastbert.accelerate(model, strict=True)
    with pytest.raises(fastbert.BackendError, match=re.escape(reason)):
        run(model, make_batch("modernbert", "right"))
