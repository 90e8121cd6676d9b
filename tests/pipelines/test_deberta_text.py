"""A folder of DeBERTa-v3 as it is published gives texts the ids, scores and vectors of transformers' libraries."""

from __future__ import annotations

import copy
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import fastbert
from family_cases import SIZES, make_batch, randomised, run, theirs
from family_text_cases import PAIRS, TEXTS
from model_cases import assert_close, valid_of

TYPE = "deberta-v2"
PIECES: dict[str, Any] = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "pad_piece": "[PAD]",
                          "bos_piece": "[CLS]", "eos_piece": "[SEP]", "unk_piece": "[UNK]"}  # fmt: skip
LABELS = ("entailment", "neutral", "contradiction")
NLI = {"id2label": dict(enumerate(LABELS)), "label2id": {label: i for i, label in enumerate(LABELS)}}
V3: dict[str, Any] = {"relative_attention": True, "position_buckets": 8, "max_relative_positions": 16,
                      "share_att_key": True, "pos_att_type": "p2c|c2p", "norm_rel_ebd": "layer_norm",
                      "position_biased_input": False, "type_vocab_size": 0, "max_position_embeddings": 64}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """spm.model, config.json and weights of a random model for entailment, without tokenizer.json."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece trains the model; extra test has it")
    folder, model = tmp_path_factory.mktemp("deberta"), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*TEXTS, *PAIRS] * 4), model_writer=model, vocab_size=120, minloglevel=2,
        hard_vocab_limit=False, num_threads=1, **PIECES,
    )  # fmt: skip
    (folder / "spm.model").write_bytes(model.getvalue())
    settings = {"do_lower_case": False, "vocab_type": "spm"}  # of tokenizer_config.json of microsoft/deberta-v3-base
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = transformers.DebertaV2Config(**{**SIZES, **V3, **NLI, "vocab_size": 128})
    randomised(transformers.DebertaV2ForSequenceClassification(config)).save_pretrained(folder)
    return folder


def test_tokenizer(folder: Path) -> None:
    """Catches another template or another place of [MASK], whose id is the one after the last piece."""
    ours = fastbert.Tokenizer.from_pretrained(folder)
    other = transformers.AutoTokenizer.from_pretrained(folder)
    for texts, pairs in ((TEXTS, None), (TEXTS, PAIRS)):
        mine, expected = (each(texts, pairs, padding=True, truncation=True) for each in (ours, other))
        for key in ("input_ids", "attention_mask", "token_type_ids"):
            assert mine[key] == expected[key]


def test_sentence_encoder(folder: Path, tmp_path: Path) -> None:
    """Catches vectors of other layers than sentence-transformers gives, accelerated ones too."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    original = sentence_transformers.SentenceTransformer(str(folder), device="cpu")  # with mean pooling
    original.save(str(tmp_path / "sentences"))
    texts = [*TEXTS, " ".join(TEXTS) * 3]
    expected = torch.from_numpy(original.encode(texts))
    ours = fastbert.SentenceEncoder.from_pretrained(tmp_path / "sentences", dtype="float32")
    assert_close("encode", torch.from_numpy(ours.encode(texts)), expected, 2e-6)
    fastbert.accelerate(original, strict=True)
    assert_close("accelerated", torch.from_numpy(original.encode(texts)), expected, 2e-6)
    fastbert.restore(original)
    assert torch.equal(torch.from_numpy(original.encode(texts)), expected)


def test_cross_encoder(folder: Path) -> None:
    """Catches scores of a head without DeBERTa's pooler, whose segments no table has."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    pairs = list(zip(TEXTS, PAIRS, strict=False))
    expected = sentence_transformers.CrossEncoder(str(folder), device="cpu").predict(pairs)
    ours = fastbert.CrossEncoder.from_pretrained(folder, dtype="float32").predict(pairs)
    assert_close("predict", torch.as_tensor(ours), torch.as_tensor(expected), 2e-6)


# Live models of transformers


def test_zero_shot(folder: Path) -> None:
    """Catches labels in another order, or scores of a text's hypotheses that depend on the acceleration."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    classify = transformers.pipeline("zero-shot-classification", model=model, tokenizer=tokenizer)
    labels = ["fish", "boats", "mornings"]
    expected = classify(TEXTS[3:5], labels, batch_size=4)
    fastbert.accelerate(classify, strict=True)
    for mine, other in zip(classify(TEXTS[3:5], labels, batch_size=4), expected, strict=True):
        assert mine["labels"] == other["labels"]
        assert_close("scores", torch.tensor(mine["scores"]), torch.tensor(other["scores"]), 1e-6)


class _Spans(nn.Module):
    """Scores of spans from words' states, as GLiNER has an encoder inside another module."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.token_rep_layer = nn.ModuleDict({"bert_layer": encoder})
        self.rnn = nn.LSTM(32, 8, batch_first=True, bidirectional=True)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        output = self.token_rep_layer["bert_layer"](input_ids=input_ids, attention_mask=attention_mask)
        return self.rnn(output.last_hidden_state * attention_mask[..., None])[0]


def test_an_encoder_inside_another_module() -> None:
    """Catches an encoder that is only found where a class of transformers is around it."""
    model = _Spans(theirs(TYPE, **V3).float())
    batch = make_batch(TYPE, "right")
    with torch.no_grad():
        expected = model(**batch)
        fastbert.accelerate(model, strict=True)
        assert_close("spans", model(**batch), expected, 2e-6)


@pytest.mark.parametrize("options", [V3, {**V3, "conv_kernel_size": 3, "share_att_key": False}], ids=["v3", "v2"])
@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM", "BertForSequenceClassification",
                                  "BertForTokenClassification"])  # fmt: skip
def test_accelerate(name: str, options: dict[str, Any]) -> None:
    """Catches a live model whose outputs or gradients change, or that does not run here."""
    model = theirs(TYPE, name, **options)
    original, batch = copy.deepcopy(model), make_batch(TYPE, "right")
    fastbert.accelerate(model, strict=True)
    valid = valid_of(batch["attention_mask"])
    rows: Any = valid if name != "BertForSequenceClassification" else slice(None)
    mine, expected = run(model, batch, output_hidden_states=True), run(original, batch, output_hidden_states=True)
    assert_close(name, mine[0][rows], expected[0][rows], 1e-6)  # theirs rounds the scale to float32
    assert list(mine.keys()) == list(expected.keys()) and len(mine.hidden_states) == 3
    for each in (model, original):
        each.train()
        for module in each.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        each(**batch)[0][rows].square().sum().backward()
    for (key, parameter), other in zip(model.named_parameters(), original.parameters(), strict=True):
        if other.grad is not None and not key.endswith("pos_key_proj.bias"):  # which has none but rounding
            assert_close(key, parameter.grad, other.grad, 1e-5)
    fastbert.restore(model)
    assert type(model) is type(original)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: setattr(m, "z_steps", 2), "z_steps is 2: the last layer runs again"),
        (lambda m: setattr(m.encoder.layer[0].attention.self, "attention_head_size", 3), "attention_head_size was ch"),
        (lambda m: setattr(m.encoder.layer[1].attention.self, "pos_dropout", nn.ReLU()), "pos_dropout is a ReLU"),
    ],
)
def test_accelerate_declines(change: Any, reason: str) -> None:
    """Catches a live model that computes something else than its config says, which runs as if not."""
    model = theirs(TYPE, **V3)
    change(model)
    fastbert.accelerate(model, strict=True)
    with pytest.raises(fastbert.BackendError, match=re.escape(reason)):
        run(model, make_batch(TYPE, "right"))
