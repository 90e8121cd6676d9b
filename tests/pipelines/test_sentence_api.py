"""The rest of sentence-transformers' interface works: evaluators, tools that take a model, refused names."""

from __future__ import annotations

import copy
import inspect
import json
import logging
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastbert import BertForSequenceClassification, BertModel, CrossEncoder, SentenceEncoder
from fastbert.pipelines.api import MISSING
from fastbert.pipelines.modules import Dense, Normalize
from fastbert.pipelines.pipeline import Pooling
from helpers import tiny_bert

FIRST = [
    "a cat sits on the mat", "a dog runs in the park", "the weather is sunny", "it rains a lot today",
    "stocks fell sharply", "markets went down", "he plays the guitar", "she sings a song",
]  # fmt: skip
SECOND = [
    "the cat is on a rug", "a puppy plays outside", "sunshine all day", "heavy rain", "shares dropped",
    "trading was poor", "music by strings", "a melody",
]  # fmt: skip
SCORES = [0.9, 0.7, 0.8, 0.8, 0.9, 0.7, 0.5, 0.6]
QUERIES, CORPUS = {f"q{i}": t for i, t in enumerate(FIRST)}, {f"d{i}": t for i, t in enumerate(SECOND)}
RANKING = [
    {"query": a, "positive": [b], "negative": [c for c in SECOND if c != b]} for a, b in zip(FIRST, SECOND, strict=True)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    config, tokenizer = tiny_bert([*FIRST, *SECOND] * 3, 150)
    tail = [Dense(32, 24), Normalize()]
    SentenceEncoder(BertModel(config), tokenizer, Pooling("mean", False), tail).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ours(folder: Path) -> SentenceEncoder:
    return SentenceEncoder.from_pretrained(folder, device="cpu")


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu", local_files_only=True)


@pytest.fixture(scope="module")
def cross(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[CrossEncoder, Any]]:
    """Our cross-encoder and theirs, by the number of labels."""
    from sentence_transformers import CrossEncoder as Theirs

    encoders = {}
    for n_labels in (1, 3):
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("cross")
        labels = {i: f"LABEL_{i}" for i in range(n_labels)}
        config, tokenizer = tiny_bert([*FIRST, *SECOND] * 3, 150, id2label=labels)
        tokenizer.save_pretrained(folder)
        BertForSequenceClassification(config).save_pretrained(folder)
        encoders[n_labels] = CrossEncoder.from_pretrained(folder, device="cpu"), Theirs(str(folder), device="cpu")
    return encoders


def assert_same_numbers(result: dict[str, float], expected: dict[str, float]) -> None:
    assert result.keys() == expected.keys() and result
    for name, value in expected.items():
        assert result[name] == pytest.approx(value, abs=1e-5) or math.isnan(result[name]) and math.isnan(value), name


def evaluators() -> dict[str, Any]:
    from sentence_transformers import SimilarityFunction
    from sentence_transformers import evaluation as e

    pairs, relevant = (FIRST, SECOND), {f"q{i}": {f"d{i}"} for i in range(8)}
    all_texts = {f"s{i}": text for i, text in enumerate(FIRST + SECOND)}
    duplicates = [(f"s{i}", f"s{i + 8}") for i in range(8)]
    small = {"accuracy_at_k": [1, 3], "precision_recall_at_k": [1], "mrr_at_k": [3], "ndcg_at_k": [3], "map_at_k": [5]}
    return {
        "similarity": lambda: e.EmbeddingSimilarityEvaluator(*pairs, SCORES),
        "similarity of bits": lambda: e.EmbeddingSimilarityEvaluator(
            *pairs, SCORES, main_similarity=SimilarityFunction.DOT_PRODUCT, truncate_dim=16, precision="binary"
        ),
        "retrieval": lambda: e.InformationRetrievalEvaluator(QUERIES, CORPUS, relevant, **small),
        "retrieval with prompts": lambda: e.InformationRetrievalEvaluator(
            QUERIES, CORPUS, relevant, query_prompt="music ", corpus_prompt_name="document", truncate_dim=9, **small
        ),
        "classification": lambda: e.BinaryClassificationEvaluator(FIRST * 2, SECOND + SECOND[::-1], [1] * 8 + [0] * 8),
        "triplets": lambda: e.TripletEvaluator(*pairs, SECOND[::-1]),
        "paraphrases": lambda: e.ParaphraseMiningEvaluator(all_texts, duplicates_list=duplicates),
        "reranking": lambda: e.RerankingEvaluator(RANKING, at_k=3),
        "reranking one by one": lambda: e.RerankingEvaluator(RANKING, at_k=3, use_batched_encoding=False),
        "translation": lambda: e.TranslationEvaluator(*pairs),
        "several": lambda: e.SequentialEvaluator([e.TripletEvaluator(*pairs, FIRST), e.TranslationEvaluator(*pairs)]),
    }  # fmt: skip


EVALUATORS = (
    "similarity", "similarity of bits", "retrieval", "retrieval with prompts", "classification", "triplets",
    "paraphrases", "reranking", "reranking one by one", "translation", "several",
)  # fmt: skip


@pytest.mark.parametrize("name", EVALUATORS)
def test_evaluators(ours: SentenceEncoder, theirs: Any, name: str) -> None:
    """Catches an evaluator of sentence-transformers that fails on ours, or has other numbers for it."""
    make = evaluators()[name]
    assert_same_numbers(make()(ours), make()(theirs))


def test_evaluators_are_all_here() -> None:
    """Catches an evaluator that the test before does not run."""
    assert set(EVALUATORS) == set(evaluators())


@pytest.mark.parametrize("name", ["classes", "correlation", "reranking", "classification"])
def test_evaluators_of_cross_encoders(cross: dict[int, tuple[CrossEncoder, Any]], name: str) -> None:
    """Catches an evaluator that fails on our CrossEncoder, or has other numbers for it."""
    from sentence_transformers.cross_encoder import evaluation as e

    pairs = list(zip(FIRST, SECOND, strict=True))
    ours, theirs = cross[3 if name == "classes" else 1]
    make: Any = {
        "classes": lambda: e.CrossEncoderClassificationEvaluator(pairs, [0, 1, 2, 0, 1, 2, 0, 1]),
        "classification": lambda: e.CrossEncoderClassificationEvaluator(pairs, [0, 1] * 4),
        "correlation": lambda: e.CrossEncoderCorrelationEvaluator(pairs, SCORES),
        "reranking": lambda: e.CrossEncoderRerankingEvaluator(RANKING, at_k=3),
    }[name]
    assert_same_numbers(make()(ours), make()(theirs))
    assert ours.model_card_data.metrics


def test_evaluate_writes_where_it_is_told(ours: SentenceEncoder, theirs: Any, tmp_path: Path) -> None:
    """Catches numbers that the model does not keep, and a folder that is not made."""
    ours = copy.copy(ours)
    make = evaluators()["similarity"]
    evaluator = make()
    result = ours.evaluate(evaluator, str(tmp_path / "a" / "b"))
    assert_same_numbers(result, theirs.evaluate(make()))
    assert list((tmp_path / "a" / "b").glob("*.csv"))
    name, numbers, _, _ = ours.model_card_data.metrics[-1]
    assert name == "EmbeddingSimilarityEvaluator" and numbers == result
    assert not hasattr(ours.model_card_data, "train_datasets")


def test_tools_that_take_a_model(ours: SentenceEncoder, theirs: Any) -> None:
    """Catches a function of sentence_transformers.util that fails on ours, or finds something else."""
    from sentence_transformers import util

    def found(model: Any) -> Any:
        return [(round(score, 4), a, b) for score, a, b in util.paraphrase_mining(model, FIRST + SECOND)[:9]]

    assert found(ours) == found(theirs)
    vectors = [model.encode(FIRST + SECOND, convert_to_tensor=True) for model in (ours, theirs)]
    communities = [util.community_detection(v, min_community_size=2, threshold=0.9) for v in vectors]
    assert communities[0] == communities[1]
    hits = [util.semantic_search(v[:3], v[3:], top_k=2) for v in vectors]
    assert [[hit["corpus_id"] for hit in row] for row in hits[0]] == [[h["corpus_id"] for h in row] for row in hits[1]]
    assert util.similarity_fct_name(ours.similarity) if hasattr(util, "similarity_fct_name") else True


@pytest.mark.parametrize("inputs", [FIRST, [("a cat", "a dog"), ("rain", "it rains a lot")], [{"text": "rain"}]])
@pytest.mark.parametrize("prompt", [None, "music by "])
def test_features(ours: SentenceEncoder, theirs: Any, inputs: Any, prompt: str | None) -> None:
    """Catches features that differ from those of sentence-transformers, and other vectors made of them."""
    features, expected = ours.preprocess(inputs, prompt=prompt), theirs.preprocess(inputs, prompt=prompt)
    assert features.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(features[name], value) if isinstance(value, torch.Tensor) else features[name] == value
    assert torch.equal(ours.tokenize(inputs)["input_ids"], theirs.tokenize(inputs)["input_ids"])
    out, other = ours(dict(features)), theirs(dict(expected))
    assert torch.allclose(out["sentence_embedding"], other["sentence_embedding"], atol=3e-6)
    mask = features["attention_mask"] != 0
    assert torch.allclose(out["token_embeddings"][mask], other["token_embeddings"][mask], atol=1e-5)
    assert torch.allclose(out["sentence_embedding"], torch.from_numpy(ours.encode(inputs, prompt=prompt)), atol=3e-6)


def test_gradients_through_features(ours: SentenceEncoder, theirs: Any) -> None:
    """Catches a forward pass that autograd does not see, or other gradients than in sentence-transformers."""
    for model in (ours, theirs):
        model.zero_grad()
        (model(model.tokenize(FIRST))["sentence_embedding"] ** 3).sum().backward()
    got = ours.model.embeddings.word_embeddings.weight.grad
    want = theirs[0].auto_model.embeddings.word_embeddings.weight.grad
    assert got is not None and torch.allclose(got, want, atol=1e-5) and got.abs().max() > 1e-3
    ours.zero_grad()


def test_features_that_are_refused(ours: SentenceEncoder, cross: dict[int, tuple[CrossEncoder, Any]]) -> None:
    """Catches one text taken for a list of letters, and a mixture that cannot be one padded batch here."""
    assert ours.preprocess([]) == {}
    with pytest.raises(TypeError, match="inputs: got str, expected a list"):
        ours.preprocess("a cat")
    with pytest.raises(TypeError, match="inputs: got pairs and single texts"):
        ours.preprocess(["a", ("b", "c")])
    mine, other = cross[1]
    pairs = list(zip(FIRST, SECOND, strict=True))
    assert torch.equal(mine.preprocess(pairs)["token_type_ids"], other.preprocess(pairs)["token_type_ids"])


def test_save_and_its_arguments(ours: SentenceEncoder, theirs: Any, tmp_path: Path) -> None:
    """Catches the other name of save_pretrained, and arguments of theirs that are unknown here."""
    ours.save(str(tmp_path / "a"), "name", create_model_card=True, safe_serialization=True)
    ours.save_pretrained(path=str(tmp_path / "b"), model_name=None, train_datasets=None, safe_serialization=False)
    ours.save(None)
    for name in ("a", "b"):
        again = SentenceEncoder.from_pretrained(tmp_path / name, device="cpu")
        assert np.array_equal(again.encode(FIRST), ours.encode(FIRST))
    assert json.loads((tmp_path / "a" / "config_sentence_transformers.json").read_text())["prompts"] == theirs.prompts


def test_small_questions(ours: SentenceEncoder, theirs: Any, cross: dict[int, tuple[CrossEncoder, Any]]) -> None:
    """Catches an answer that differs from that of sentence-transformers."""
    for mine, other in ((ours, theirs), cross[1], cross[3]):
        assert len(mine) == len(other) and bool(mine) and mine.modalities == other.modalities == ["text"]
        assert mine.supports("text") and not mine.supports("image") and mine.get_backend() == other.get_backend()
        assert mine.get_max_seq_length() == other.get_max_seq_length() == mine.max_seq_length
        assert mine.get_model_kwargs() == other.get_model_kwargs() == []
        assert mine.config.hidden_size == other.config.hidden_size
        for inputs in ("a", ["a"], ("a", "b"), [], [("a", "b")], np.array(["a", "b"]), np.array([["a", "b"]])):
            assert mine.is_singular_input(inputs) == other.is_singular_input(inputs), inputs
    with ours.truncate_sentence_embeddings(5):
        assert ours.encode("a").shape == (5,)
    with pytest.warns(FutureWarning), theirs.truncate_sentence_embeddings(5):
        assert theirs.encode("a").shape == (5,)
    assert isinstance(cross[3][0].default_activation_function, nn.Identity)


def test_names_that_are_refused_say_what_to_do(ours: SentenceEncoder, cross: dict[int, Any]) -> None:
    """Catches a name of theirs that ours has not, without a word of what to do instead."""
    for model in (ours, cross[1][0]):
        for name, hint in MISSING.items():
            assert not hasattr(model, name) or name in dir(type(model))
            if name not in dir(type(model)):
                with pytest.raises(AttributeError) as error:
                    getattr(model, name)
                assert str(error.value).endswith(hint) and repr(name) in str(error.value)
        with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
            _ = model.nonsense
        with pytest.raises(TypeError, match="is not a sequence of modules: its parts are encoder.model"):
            _ = model[0]
        model.add_module("nothing", None)
        with pytest.raises(TypeError, match="takes no further module, got 'norm': its parts are encoder.model"):
            model.add_module("norm", torch.nn.LayerNorm(3))
    with pytest.raises(TypeError, match="model: got str, expected a BertModel; from_pretrained takes names"):
        SentenceEncoder("all-MiniLM-L6-v2", None)  # type: ignore[arg-type]


def test_every_public_name_of_theirs_is_answered(ours: SentenceEncoder, cross: dict[int, Any]) -> None:
    """Catches a public name that a version of sentence-transformers adds, and that is neither here nor refused."""
    from sentence_transformers import CrossEncoder as Theirs
    from sentence_transformers import SentenceTransformer

    for kind, model in ((SentenceTransformer, ours), (Theirs, cross[1][0])):
        # But for constants of the classes, which say of what kind they are.
        names = {name for name in dir(kind) if not name.startswith("_")} - set(dir(nn.Module))
        names = {name for name in names if inspect.isroutine(v := getattr(kind, name)) or isinstance(v, property)}
        assert {name for name in names - set(MISSING) if not hasattr(model, name)} == set()


def test_copies_and_casts(ours: SentenceEncoder, caplog: pytest.LogCaptureFixture) -> None:
    """Catches an interface that does not survive a copy, a pickle or a cast of the model."""
    expected = ours.encode(FIRST)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert np.array_equal(other.encode(FIRST), expected) and other.prompts == ours.prompts
        half = other.half()
        assert half.encode(FIRST).dtype == np.float32 and np.abs(half.encode(FIRST) - expected).max() < 2e-2
        assert np.abs(half.float().train().encode(FIRST) - expected).max() < 2e-3
    with caplog.at_level(logging.WARNING, "fastbert"):
        ours.compile()
    assert "compile: has no effect" in caplog.text and np.array_equal(ours.encode(FIRST), expected)


def test_arguments_of_query_and_document(ours: SentenceEncoder) -> None:
    """Catches an argument in another place than where callers of sentence-transformers put it."""
    from sentence_transformers import SentenceTransformer

    for name in ("encode_query", "encode_document", "save_pretrained"):
        expected = list(inspect.signature(getattr(SentenceTransformer, name)).parameters)
        got = list(inspect.signature(getattr(SentenceEncoder, name)).parameters)
        n = min(got.index("args"), 5) if "args" in got else len(got)
        assert got[2:n] == expected[2:n]
    assert ours.encode_query("a", None, None, 4, False, "token_embeddings").dim() == 2
