"""Several devices give what one gives, in its order and with its bits. Two CPUs stand for two GPUs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastbert import BertForSequenceClassification, BertModel, CrossEncoder, SentenceEncoder
from fastbert.pipelines.modules import Normalize
from fastbert.pipelines.pool import Pool
from fastbert.pipelines.token_heads import TokenVectors, TokenWeights
from helpers import tiny_bert
from sentence_cases import TEXTS

MANY = [f"{text}{' fish' * (i % 7)}" for i in range(12) for text in TEXTS]


def make_encoder(**options: Any) -> SentenceEncoder:
    """An encoder with dense vectors, sparse ones and vectors of tokens, as bge-m3 has them."""
    torch.manual_seed(0)
    config, tokenizer = tiny_bert([*TEXTS, "query: boats"] * 3, 150)
    heads = {
        "sparse": TokenWeights(nn.Linear(32, 1), tokenizer.all_special_ids, config.vocab_size),
        "multi": TokenVectors([Normalize()], without_first=True),
    }
    model = BertModel(config, **options)
    return SentenceEncoder(model, tokenizer, prompts={"query": "query: "}, heads=heads, token_budget=60)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> SentenceEncoder:
    """An encoder with its weights from a file, as users have them."""
    encoder, folder = make_encoder(), tmp_path_factory.mktemp("model")
    encoder.model.save_pretrained(folder)
    encoder.model = BertModel.from_pretrained(folder, device="cpu")
    return encoder


@pytest.fixture(scope="module")
def pool(encoder: SentenceEncoder) -> Iterator[Pool]:
    with encoder.start_multi_process_pool(["cpu", "cpu"]) as pool:
        yield pool


def same(ours: Any, expected: Any) -> bool:
    """Tells whether two results are equal in type, form and bits."""
    if isinstance(expected, torch.Tensor):
        dense = [x.to_dense() for x in (ours, expected)]
        return ours.device == expected.device and ours.dtype == expected.dtype and torch.equal(*dense)
    if isinstance(expected, np.ndarray):
        return ours.dtype == expected.dtype and np.array_equal(ours, expected)
    if isinstance(expected, dict):
        return ours.keys() == expected.keys() and all(same(ours[key], expected[key]) for key in expected)
    return type(ours) is type(expected) and len(ours) == len(expected) and all(map(same, ours, expected))


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "a tensor": {"convert_to_tensor": True, "normalize_embeddings": True, "truncate_dim": 8},
    "a list": {"convert_to_numpy": False, "prompt_name": "query"},
    "few texts a batch": {"batch_size": 3, "processing_kwargs": {"text": {"max_length": 6}}},
    "tokens": {"output_value": "token_embeddings"},
    "everything": {"output_value": None},
    "int8": {"precision": "int8"},
    "sparse": {"output": "sparse", "max_active_dims": 4},
    "multi": {"output": "multi", "task": "query", "normalize_embeddings": True},
}


@pytest.mark.parametrize("name", CALLS)
def test_bits_and_order(encoder: SentenceEncoder, pool: Pool, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Catches texts that change places, batches that one process would not make, and an argument that is lost."""
    monkeypatch.setattr("fastbert.pipelines.run.WINDOW", 40)
    assert same(encoder.encode(MANY, pool=pool, **CALLS[name]), encoder.encode(MANY, **CALLS[name]))
    assert encoder.device == torch.device("cpu") and encoder.last_timings is not None


def test_other_forms(encoder: SentenceEncoder, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches one text, no texts, an iterator, a stream and the older name treated in another manner."""
    assert same(encoder.encode(MANY[3], pool=pool), encoder.encode(MANY[3]))
    assert same(encoder.encode([], pool=pool), encoder.encode([]))
    assert same(encoder.encode([], pool=pool, convert_to_tensor=True), torch.tensor([]))
    assert same(encoder.encode(iter(MANY), pool=pool), encoder.encode(MANY))
    assert same(encoder.encode_query(MANY[:5], pool=pool), encoder.encode_query(MANY[:5]))
    assert same(encoder.encode_multi_process(MANY, pool, chunk_size=7), encoder.encode(MANY))
    pooling, encoder.pooling = encoder.pooling, type(encoder.pooling)("max")
    try:
        assert same(encoder.encode(MANY, pool=pool), encoder.encode(MANY)), "pooling of the call, not of the start"
    finally:
        encoder.pooling = pooling
    monkeypatch.setattr("fastbert.pipelines.run.WINDOW", 40)
    parts = list(encoder.encode_stream(iter(MANY), pool=pool))
    assert [len(part) for part in parts] == [40, 40, 16] and same(np.concatenate(parts), encoder.encode(MANY))


def test_errors_and_counts(encoder: SentenceEncoder, pool: Pool, caplog: pytest.LogCaptureFixture) -> None:
    """Catches an error that names another place, a count of cut texts for each process, and progress that is lost."""
    with pytest.raises(TypeError, match=r"^sentences\[30\]: got int"):
        encoder.encode([*MANY[:30], 5], pool=pool)
    with caplog.at_level(logging.WARNING, "fastbert"):
        encoder.encode(["fish " * 100, *MANY], pool=pool)
    assert [record.getMessage().split(" texts")[0] for record in caplog.records] == ["encode: 1 of 97"]
    counts: list[int] = []
    list(encoder.encode_stream(MANY, pool=pool, progress=counts.append))
    assert sum(counts) == len(MANY) and len(counts) > 4
    stream = encoder.encode_stream(MANY * 4, pool=pool)
    next(stream)
    stream.close()
    assert same(encoder.encode(MANY, pool=pool), encoder.encode(MANY))


def test_batch_invariant_bits() -> None:
    """Catches neighbours that change a bit where none may, and `workers` that stay after the call."""
    import multiprocessing

    before = len(multiprocessing.active_children())
    encoder = make_encoder(batch_invariant=True)
    alone = np.stack([encoder.encode(text) for text in MANY])
    assert same(encoder.encode(MANY, workers=2), alone)
    assert len(multiprocessing.active_children()) == before


def test_cross_encoder() -> None:
    """Catches scores that change places or bits, and an argument of `predict` or `rank` that is lost."""
    torch.manual_seed(0)
    config, tokenizer = tiny_bert(TEXTS * 3, 150, id2label={0: "a", 1: "b", 2: "c"})
    encoder = CrossEncoder(BertForSequenceClassification(config), tokenizer, token_budget=60)
    encoder.activation_fn = lambda x: x.sigmoid()  # is not sent
    pairs = [(a, b) for a in TEXTS for b in TEXTS]
    with encoder.start_multi_process_pool(["cpu"]) as pool:
        for options in ({}, {"apply_softmax": True, "convert_to_tensor": True}, {"convert_to_numpy": False}):
            assert same(encoder.predict(pairs, pool=pool, **options), encoder.predict(pairs, **options))
        assert same(encoder.predict(pairs[0], pool=pool), encoder.predict(pairs[0]))
        assert same(encoder.predict([], pool=pool), encoder.predict([]))
        with pytest.raises(ValueError, match="pool: got 'one of another model'"):
            make_encoder().encode(TEXTS, pool=pool)


def test_bad_arguments(encoder: SentenceEncoder) -> None:
    """Catches a list of no devices that is taken for none, and arguments that contradict one another."""
    for arguments, message in (
        ({"device": []}, r"device: got \[\], expected a list of at least one device"),
        ({"device": ["cpu", "cuda"]}, "expected devices of one type"),
        ({"workers": 0}, "workers: got 0, expected a positive whole number"),
        ({"workers": 2, "device": ["cpu"]}, "workers, beside device or pool"),
        ({"pool": {}}, "pool: got 'dict', expected the result of start_multi_process_pool"),
        ({"device": ["cpu"], "chunk_size": 0}, "chunk_size: got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            encoder.encode(["a"], **arguments)  # type: ignore[arg-type]
    stopped = Pool(["cpu"], encoder._work(), encoder)
    encoder.stop_multi_process_pool(stopped)
    with pytest.raises(ValueError, match="device: got None, expected a list"):
        Pool(None, encoder._work(), encoder)  # type: ignore[arg-type]
