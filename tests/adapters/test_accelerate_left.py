"""Texts padded on the left give what they gave before accelerate, and are counted."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

import fastbert
from family_cases import KINDS, make_batch, theirs
from fastbert.adapters import counts
from model_cases import assert_close

FIRST = "padding in the first column"
LEFT = "its texts are padded on the left"
TEXTS = ["a cat", "a much longer sentence about the river that flows through the old town", "yes"]


def run(model: Any, batch: dict[str, Any], **options: Any) -> Any:
    with torch.no_grad():
        return model(**batch, **options)


@pytest.mark.parametrize("model_type", KINDS)
@pytest.mark.parametrize("name", ["BertForSequenceClassification", "BertForTokenClassification", "BertForMaskedLM"])
def test_an_encoder_alone_inside_its_head(model_type: str, name: str) -> None:
    """Catches a head that is not known, since the encoder alone was given, and reads zeros."""
    original = copy.deepcopy(theirs(model_type, name))
    model = copy.deepcopy(original)
    fastbert.accelerate(model.base_model)
    left, right = make_batch(model_type, "left"), make_batch(model_type, "right")
    assert torch.equal(run(model, left)[0], run(original, left)[0])
    real = right["attention_mask"].bool()
    ours, expected = run(model, right)[0], run(original, right)[0]
    if ours.shape[:2] == real.shape:
        ours, expected = ours[real], expected[real]
    assert_close("right", ours, expected)
    assert counts(model) == {FIRST: 1, "fastbert": 1}


class Head(nn.Module):
    """What users write around an encoder."""

    def __init__(self, encoder: Any, way: str) -> None:
        super().__init__()
        self.encoder, self.way = encoder, way
        self.linear = nn.Linear(encoder.config.hidden_size, 3).double()

    def forward(self, **batch: Tensor) -> Tensor:
        output = self.encoder(**batch, output_hidden_states=self.way == "states")
        if self.way == "states":
            return self.linear(output.hidden_states[1][:, 0])
        if self.way == "pooler":
            return self.linear(output.pooler_output)
        if self.way == "mean":
            mask = batch["attention_mask"][..., None]
            return self.linear((output[0] * mask).sum(1) / mask.sum(1))
        return self.linear(output[0][:, 0])


@pytest.mark.parametrize("kind", ["left", "holes", "zero_row"])
@pytest.mark.parametrize("way", ["first", "states", "pooler", "mean"])
@pytest.mark.parametrize("model_type", ["bert", *KINDS])
def test_heads_of_users(model_type: str, way: str, kind: str) -> None:
    """Catches a head of the user's that reads the first column, the pooler or a state, and gets zeros in silence."""
    encoder = copy.deepcopy(theirs(model_type))
    if way == "pooler" and getattr(encoder, "pooler", None) is None:
        return
    original = Head(encoder, way).eval()
    for inner in (False, True):
        model = copy.deepcopy(original)
        fastbert.accelerate(model.encoder if inner else model)
        for _ in range(2):
            batch = make_batch(model_type, kind)
            torch.testing.assert_close(run(model, batch), run(original, batch), rtol=0, atol=0, equal_nan=True)
        batch = make_batch(model_type, "right")
        assert_close("right", run(model, batch), run(original, batch))
        assert counts(model) == {FIRST: 2, "fastbert": 1}


def test_masks_of_every_dtype_and_none() -> None:
    """Catches padding that is seen in one dtype alone, and a batch without padding that is taken for one with it."""
    model = fastbert.accelerate(copy.deepcopy(theirs("roberta")))
    batch = make_batch("roberta", "left")
    for dtype in (torch.int64, torch.int32, torch.uint8, torch.bool, torch.float32):
        run(model, {**batch, "attention_mask": batch["attention_mask"].to(dtype)})
    assert counts(model) == {FIRST: 5}
    run(model, {**batch, "attention_mask": None})
    run(model, {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])})
    assert counts(model) == {FIRST: 5, "fastbert": 2}


def test_masks_on_the_host_need_no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a look at a mask on the host, or at its first column, that would wait for a GPU."""
    model, batch = fastbert.accelerate(copy.deepcopy(theirs("roberta"))), make_batch("roberta", "left")
    run(model, batch)  # which looks at buffers
    looks: list[str] = []
    for name in ("__bool__", "cpu", "item", "tolist"):
        before = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda self, name=name, before=before: looks.append(name) or before(self))
    run(model, batch)
    ours = list(looks)
    run(fastbert.restore(model), batch)
    assert sorted(ours) == sorted(looks[len(ours) :])


def sentences(minilm: Path, pooling: str = "mean", side: str = "left") -> Any:
    st = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    models = pytest.importorskip("sentence_transformers.models", reason="sentence-transformers is not installed")
    transformer = models.Transformer(str(minilm))
    transformer.tokenizer.padding_side = side
    return st.SentenceTransformer(
        modules=[transformer, models.Pooling(384, pooling_mode=pooling), models.Normalize()], device="cpu"
    )


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "weightedmean", "lasttoken", "mean_sqrt_len_tokens"])
def test_sentence_vectors(minilm: Path, pooling: str) -> None:
    """Catches vectors of right padding where the tokenizer pads on the left: positions there are other columns."""
    model = sentences(minilm, pooling)
    ways: list[dict[str, Any]] = [{}, {"batch_size": 2}, {"output_value": "token_embeddings"}]
    expected = [model.encode(TEXTS, **way) for way in ways]
    fastbert.accelerate(model)
    for way, before in zip(ways, expected, strict=True):
        for one, other in zip(model.encode(TEXTS, **way), before, strict=True):
            np.testing.assert_allclose(np.asarray(one), np.asarray(other), atol=1e-6)
    assert counts(model)[LEFT] == len(ways)


def test_a_side_that_changes(minilm: Path) -> None:
    """Catches a side that is looked at once, for all calls to come."""
    plain, model = sentences(minilm, side="right"), fastbert.accelerate(sentences(minilm, side="right"))
    for side in ("right", "left", "right", "left"):
        plain.tokenizer.padding_side = model.tokenizer.padding_side = side
        np.testing.assert_allclose(model.encode(TEXTS), plain.encode(TEXTS), atol=1e-5)
    assert counts(model)[LEFT] == 2
    strict = fastbert.accelerate(model, strict=True)
    with pytest.raises(fastbert.BackendError, match="left"):
        strict.encode(TEXTS)


def test_a_tokenizer_that_pads_by_itself(minilm: Path) -> None:
    """Catches a tokenizer that pads on the left whatever its attribute says."""
    plain, model = sentences(minilm, side="right"), sentences(minilm, side="right")
    for each in (plain, model):
        inner = type(each.tokenizer)

        class Leftist(inner):  # type: ignore[misc, valid-type]
            def __call__(self, *args: Any, **kwargs: Any) -> Any:
                return super().__call__(*args, **{**kwargs, "padding_side": "left"})

        each.tokenizer.__class__ = Leftist
    fastbert.accelerate(model)
    np.testing.assert_allclose(model.encode(TEXTS), plain.encode(TEXTS), atol=1e-5)
    assert counts(model)[LEFT] == 1


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_cross_encoders(model_type: str, minilm: Path, tmp_path: Path) -> None:
    """Catches scores that are read off the wrong token where pairs are padded on the left."""
    st = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    name = "BertForSequenceClassification"
    original = theirs(model_type, name)
    settings = {**original.config.to_dict(), "vocab_size": len(tokenizer), "num_labels": 1}
    settings["max_position_embeddings"] = 600
    settings["type_vocab_size"] = 2
    torch.manual_seed(0)
    type(original)(type(original.config)(**settings)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = st.CrossEncoder(str(tmp_path), device="cpu")
    model.tokenizer.padding_side = "left"
    pairs = [("a cat", text) for text in TEXTS]
    expected = model.predict(pairs)
    fastbert.accelerate(model)
    np.testing.assert_allclose(model.predict(pairs), expected, atol=1e-6)
    assert counts(model)[FIRST] >= 1
