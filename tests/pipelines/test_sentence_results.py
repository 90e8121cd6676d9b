"""SentenceEncoder gives what sentence-transformers gives for the same arguments."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastbert import BertModel, SentenceEncoder, Tokenizer
from fastbert.pipelines.modules import Dense, LayerNorm, Normalize
from fastbert.pipelines.pipeline import Pooling
from sentence_cases import TEXTS, assert_close, theirs, tiny


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("plain"))


@pytest.fixture
def encoder(plain: Path) -> SentenceEncoder:
    return SentenceEncoder.from_pretrained(plain, device="cpu")


@pytest.mark.parametrize(
    "modes", ["mean", "cls", "weightedmean", ("mean", "weightedmean"), ("max", "lasttoken", "mean_sqrt_len_tokens")]
)
def test_prompts(plain: Path, tmp_path: Path, modes: Any) -> None:
    """Catches a prompt that is not put in front, and prompt tokens pooled where the settings leave them out."""
    model, tokenizer = BertModel.from_pretrained(plain), Tokenizer.from_pretrained(plain)
    prompts = {"query": "query: ", "passage": "passage: "}
    pooling = Pooling(modes, include_prompt=False)
    SentenceEncoder(model, tokenizer, pooling, prompts=prompts, default_prompt_name="query").save_pretrained(tmp_path)
    ours, other = SentenceEncoder.from_pretrained(tmp_path, device="cpu"), theirs(tmp_path)
    texts = [text for text in TEXTS if text]
    for arguments in ({}, {"prompt_name": "passage"}, {"prompt": "the river: "}, {"prompt": ""}):
        assert_close(ours.encode(texts, **arguments), other.encode(texts, **arguments))
    assert np.abs(ours.encode(texts) - ours.encode(texts, prompt="")).max() > 1e-3
    assert_close(ours.encode_query(texts), other.encode_query(texts))
    assert_close(ours.encode_document(texts), other.encode_document(texts))
    with pytest.raises(ValueError, match="prompt_name: got 'nope', expected one of"):
        ours.encode(texts, prompt_name="nope")


def test_prompt_left_out_of_a_normalised_weighted_mean(plain: Path, tmp_path: Path) -> None:
    """Catches a normalisation before the weights are put right."""
    model, tokenizer = BertModel.from_pretrained(plain), Tokenizer.from_pretrained(plain)
    pooling = Pooling("weightedmean", include_prompt=False)
    ours = SentenceEncoder(model, tokenizer, pooling, [Normalize()])
    ours.save_pretrained(tmp_path)
    texts = [text for text in TEXTS if text]
    assert_close(ours.encode(texts, prompt="query: "), theirs(tmp_path).encode(texts, prompt="query: "))
    assert np.isfinite(ours.encode(["", *texts], prompt="query: ")).all()


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"convert_to_tensor": True},
        {"convert_to_numpy": False},
        {"normalize_embeddings": True},
        {"truncate_dim": 5},
        {"truncate_dim": 5, "normalize_embeddings": True},
        {"output_value": "token_embeddings"},
        {"precision": "binary"},
        {"precision": None},
        {"precision": "ubinary", "convert_to_tensor": True},
        {"precision": "ubinary", "convert_to_numpy": False},
    ],
    ids=str,
)
def test_results_are_those_of_sentence_transformers(plain: Path, encoder: SentenceEncoder, arguments: Any) -> None:
    """Catches another type, shape, dtype or value than SentenceTransformer.encode gives for the same arguments."""
    other = theirs(plain)
    for texts in (TEXTS, TEXTS[3]):
        result, expected = encoder.encode(texts, **arguments), other.encode(texts, **arguments)
        assert type(result) is type(expected)
        pairs = list(zip(result, expected, strict=True)) if isinstance(expected, list) else [(result, expected)]
        for got, want in pairs:
            assert type(got) is type(want) and got.dtype == want.dtype
            assert_close(got, want)


def test_output_value_none(plain: Path, encoder: SentenceEncoder) -> None:
    """Catches a dict without the ids, token vectors or sentence vector that sentence-transformers puts there."""
    expected = theirs(plain).encode(TEXTS, output_value=None)
    for got, want in zip(encoder.encode(TEXTS, output_value=None), expected, strict=True):
        n = len(got["input_ids"])
        for name in ("input_ids", "token_type_ids", "attention_mask", "token_embeddings"):
            assert_close(got[name], want[name][:n])
        assert_close(got["sentence_embedding"], want["sentence_embedding"])
    assert encoder.encode("boats", output_value=None)["token_embeddings"].shape[1] == 32


def test_signature_is_that_of_sentence_transformers() -> None:
    """Catches an argument in another place or under another name than where callers of SentenceTransformer put it."""
    from sentence_transformers import SentenceTransformer

    ours = list(inspect.signature(SentenceEncoder.encode).parameters)
    expected = list(inspect.signature(SentenceTransformer.encode).parameters)
    assert ours[2 : len(expected) - 1] == expected[2:-1], "all but self, the texts and **kwargs"
    assert ours[1] == "sentences" and expected[1] in (*ours, "sentences")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pool": {}}, "pool: got 'dict', expected the result of start_multi_process_pool"),
        ({"precision": "int4"}, "precision: got 'int4', expected one of 'float32', 'int8', 'uint8', 'binary'"),
        ({"precision": "binary", "output_value": None}, "precision: got 'binary'"),
        ({"output_value": "vectors"}, "output_value: got 'vectors'"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"truncate_dim": -1}, "truncate_dim: got -1"),
    ],
)
def test_unsupported_arguments(encoder: SentenceEncoder, arguments: dict[str, Any], message: str) -> None:
    """Catches an argument that is ignored in silence."""
    with pytest.raises(ValueError, match=message):
        encoder.encode(TEXTS, **arguments)
    with pytest.raises(TypeError, match="normalise"):
        encoder.encode(TEXTS, normalise=True)  # type: ignore[call-arg]


def test_inputs_is_another_name_for_sentences(encoder: SentenceEncoder) -> None:
    """Catches the name `inputs`, which sentence-transformers 6 has for the texts, refused."""
    assert_close(encoder.encode(inputs=TEXTS), encoder.encode(sentences=TEXTS))
    for arguments in ({}, {"sentences": "a", "inputs": "b"}):
        with pytest.raises(TypeError, match="^sentences: expected"):
            encoder.encode(**arguments)


@pytest.mark.parametrize("name", ["cosine", "dot", "euclidean", "manhattan"])
def test_similarity(plain: Path, encoder: SentenceEncoder, name: str) -> None:
    """Catches a function that differs from the one sentence-transformers has under that name."""
    other = theirs(plain)
    encoder.similarity_fn_name = other.similarity_fn_name = name
    vectors = encoder.encode(TEXTS)
    assert_close(encoder.similarity(vectors, vectors[:3]), other.similarity(vectors, vectors[:3]), 1e-4)
    assert encoder.similarity(vectors[0], list(torch.from_numpy(vectors))).shape == (1, len(TEXTS))
    for a, b in ((vectors, vectors[::-1].copy()), (torch.from_numpy(vectors), list(torch.from_numpy(vectors)))):
        assert_close(encoder.similarity_pairwise(a, b), other.similarity_pairwise(a, b), 1e-4)
    with pytest.raises(ValueError, match=r"embeddings2: expected shape \(8, 32\), as embeddings1, got \(3, 32\)"):
        encoder.similarity_pairwise(vectors, vectors[:3])
    with pytest.raises(ValueError, match="similarity_fn_name: got 'chebyshev'"):
        encoder.similarity_fn_name = "chebyshev"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_vectors_are_at_least_float32(plain: Path, encoder: SentenceEncoder, dtype: torch.dtype) -> None:
    """Catches vectors in the model's 16-bit dtype, and a Dense module that does not take them."""
    torch.manual_seed(1)
    tail = [Dense(32, 8), LayerNorm(8)]
    vectors = SentenceEncoder(encoder.model, encoder.tokenizer, "mean", tail).encode(TEXTS)
    halved = SentenceEncoder(encoder.model, encoder.tokenizer, "mean", tail).to(dtype)
    result = halved.encode(TEXTS, convert_to_tensor=True)
    assert halved.dtype == dtype
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(result, vectors, 0.1)


def test_vectors_can_be_used_in_training(encoder: SentenceEncoder) -> None:
    """Catches inference tensors, which autograd refuses."""
    weight = torch.ones(32, requires_grad=True)
    (encoder.encode(TEXTS, convert_to_tensor=True) * weight).sum().backward()
    assert weight.grad is not None and weight.grad.abs().sum() > 0


def test_truncate_dim_of_the_settings(plain: Path, tmp_path: Path, encoder: SentenceEncoder) -> None:
    """Catches the stored truncation lost in a round trip, and a wrong dimension reported."""
    encoder.truncate_dim = 6
    encoder.save_pretrained(tmp_path)
    again = SentenceEncoder.from_pretrained(tmp_path, device="cpu")
    assert again.get_embedding_dimension() == again.get_sentence_embedding_dimension() == 6
    assert_close(again.encode(TEXTS), theirs(tmp_path).encode(TEXTS))
    assert again.encode(TEXTS, truncate_dim=50).shape == (len(TEXTS), 32)
    with again.truncate_embeddings(4):
        assert again.get_embedding_dimension() == 4 and again.encode(TEXTS).shape == (len(TEXTS), 4)
    assert again.truncate_dim == 6


def test_pooling_can_leave_the_prompt_out(plain: Path, encoder: SentenceEncoder) -> None:
    """Catches a change that sentence-transformers makes to its pooling and that ours does not follow."""
    other = theirs(plain)
    for include in (False, True):
        encoder.set_pooling_include_prompt(include)
        other.set_pooling_include_prompt(include)
        texts = [text for text in TEXTS if text]
        assert_close(encoder.encode(texts, prompt="query: "), other.encode(texts, prompt="query: "))
