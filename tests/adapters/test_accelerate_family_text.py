"""SentenceTransformer and CrossEncoder around models of BERT's family are accelerated, and verify reads them."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentence_transformers
import torch
import transformers
from sentence_transformers import SentenceTransformer

import fastbert
from family_text_cases import PAIRS, TEXTS, make_folders
from fastbert.adapters import counts
from helpers import assert_as_accurate
from model_cases import assert_close

try:
    from sentence_transformers.sentence_transformer import modules
except ImportError:  # before version 6
    from sentence_transformers import models as modules

FAMILIES = ("roberta", "xlm-roberta", "camembert", "distilbert", "electra")
MEAN = "the mean of the last hidden states"  # which vectors a report compares where nothing makes others
LIMIT = 24  # positions that are left of 26 where they begin after the padding id


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_folders(tmp_path_factory.mktemp("families"))


def sentences(folder: Path, *after: Any, pooling: str = "mean") -> SentenceTransformer:
    transformer = modules.Transformer(str(folder))
    transformer.max_seq_length = LIMIT
    return SentenceTransformer(modules=[transformer, modules.Pooling(32, pooling), *after], device="cpu")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_sentence_vectors(model_type: str, folders: dict[str, Path]) -> None:
    """Catches positions, special tokens, truncation or segments of BERT's, and calls that are not packed."""
    model = sentences(
        folders[model_type], modules.Normalize(), pooling="cls" if model_type == "xlm-roberta" else "mean"
    )
    texts = [*TEXTS, "boats " * 60]

    def all_vectors(encoder: SentenceTransformer) -> dict[str, torch.Tensor]:
        vectors = {
            "texts": encoder.encode(texts),
            "prompts": encoder.encode(texts, prompt="the "),
            "text": encoder.encode(texts[0])[None],
        }
        tokens = torch.cat(encoder.encode(texts, output_value="token_embeddings"))
        return {**{name: torch.from_numpy(rows) for name, rows in vectors.items()}, "tokens": tokens}

    expected, exact = all_vectors(model), all_vectors(copy.deepcopy(model).double())
    assert fastbert.accelerate(model) is model
    vectors = all_vectors(model)
    assert counts(model) == {"fastbert": 4}
    in_float64 = all_vectors(fastbert.accelerate(copy.deepcopy(model).double()))
    for name, reference in exact.items():
        assert_close(name, in_float64[name], reference)
    # One text has too few numbers for errors to be compared.
    together = [torch.cat([*rows.values()]) for rows in (vectors, expected, exact)]
    assert_as_accurate(model_type, *together)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert np.array_equal(twin.encode(texts), vectors["texts"]) and counts(twin) == {"fastbert": 1}
    fastbert.restore(model)
    np.testing.assert_array_equal(model.encode(texts), expected["texts"])


@pytest.mark.parametrize("model_type", ["roberta", "electra"])
def test_texts_longer_than_the_positions(model_type: str, folders: dict[str, Path]) -> None:
    """Catches a limit above the positions that are left, whose last tokens have none: no kernel may look for them."""
    model = fastbert.accelerate(sentences(folders[model_type]))
    model.max_seq_length = 26
    vectors = model.encode(["boats"])
    after_padding = model_type == "roberta"
    assert np.isfinite(vectors).all()
    assert counts(model) == ({"max_seq_length is 26": 1, "fastbert": 1} if after_padding else {"fastbert": 1})


@pytest.mark.parametrize("model_type", FAMILIES)
def test_scores_of_pairs(model_type: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Catches scores that differ, as of a reranker on XLM-RoBERTa: separators, positions or segments of pairs."""
    config = transformers.AutoConfig.from_pretrained(folders[model_type], num_labels=1)
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(folders[model_type]).save_pretrained(tmp_path)
    model = sentence_transformers.CrossEncoder(str(tmp_path), device="cpu", max_length=LIMIT)
    pairs = list(zip(TEXTS, PAIRS, strict=True))
    expected = model.predict(pairs)
    fastbert.accelerate(model)
    np.testing.assert_allclose(model.predict(pairs), expected, rtol=1e-5, atol=2e-6)
    assert set(counts(model)) == {"fastbert"}


def test_verify_of_sentence_vectors(folders: dict[str, Path]) -> None:
    """Catches a SentenceTransformer whose texts cannot be verified, or whose vectors are not looked at."""
    model = fastbert.accelerate(sentences(folders["xlm-roberta"], modules.Dense(32, 12), modules.Normalize()))
    report = fastbert.verify(model, [*TEXTS, "boats " * 60])
    assert report.ok and report.model == "SentenceTransformer" and report.vectors.what.startswith("encode")
    assert "vectors" in [state.name for state in report.states]
    assert f"texts of {LIMIT} tokens, the most there are: 2; what was longer was cut" in report.notes
    assert report.n_tokens == sum(len(ids) for ids in model.tokenizer([*TEXTS, "boats " * 60], truncation=True,
                                                                      max_length=LIMIT).input_ids)  # fmt: skip
    for change in (lambda: setattr(model, "truncate_dim", 5), model.half, model.double):
        change()
        assert fastbert.verify(model, TEXTS).ok
    model.float()[2].linear.weight.data.mul_(torch.nan)
    assert [weight.name for weight in fastbert.verify(model, TEXTS).weights] == ["2.linear.weight"]


def test_verify_finds_a_fault_in_the_vectors(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches vectors that are compared with themselves."""
    from fastbert.adapters import live_pipeline

    model = fastbert.accelerate(sentences(folders["distilbert"], modules.Dense(32, 12)))
    assert fastbert.verify(model, TEXTS).ok
    plain = live_pipeline.Step.__call__
    monkeypatch.setattr(live_pipeline.Step, "__call__", lambda self, x: plain(self, x) * (1 + 1e-2 * (x.shape[0] > 1)))
    encode = fastbert.verify(model, TEXTS)
    assert encode.ok  # a fault of both sides alike
    monkeypatch.setattr(live_pipeline.Step, "in_dtype", lambda self, dtype: lambda x: plain(copy.deepcopy(self), x))
    assert not fastbert.verify(model, TEXTS).ok


def test_verify_with_a_tokenizer_of_transformers(folders: dict[str, Path]) -> None:
    """Catches a tokenizer of transformers that is refused, and an error that does not say what is taken."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["roberta"])
    model = transformers.AutoModel.from_pretrained(folders["roberta"]).eval()
    pipeline = fastbert.accelerate(transformers.pipeline("feature-extraction", model=model, tokenizer=tokenizer))
    for report in (fastbert.verify(model, TEXTS, tokenizer=tokenizer), fastbert.verify(pipeline, TEXTS)):
        assert report.ok and report.vectors.what == MEAN and report.n_texts == len(TEXTS)
    with pytest.raises(ValueError, match="tokenizer: needed for texts"):
        fastbert.verify(model, TEXTS)
    with pytest.raises(TypeError, match="tokenizer: expected a fastbert.Tokenizer or one of transformers, got int"):
        fastbert.verify(model, TEXTS, tokenizer=3)


def test_verify_of_sentences_that_are_not_packed(folders: dict[str, Path]) -> None:
    """Catches a pipeline that is not known ending in an error, or its vectors passed over in silence."""
    model = fastbert.accelerate(sentences(folders["roberta"]))
    model[1].register_forward_hook(lambda *_: None)
    report = fastbert.verify(model, TEXTS)
    assert report.ok and report.vectors.what == MEAN
    assert any(note.startswith("vectors were not checked") and "hooks" in note for note in report.notes)
