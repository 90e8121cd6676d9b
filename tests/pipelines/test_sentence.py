"""SentenceEncoder turns text into vectors: batches, limits and bad input."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastbert import BertConfig, BertModel, SentenceEncoder
from fastbert.pipelines.batching import batches
from fastbert.pipelines.modules import Dense
from helpers import docstrings
from sentence_cases import TEXTS, assert_close, theirs, tiny


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("plain"))


@pytest.fixture
def encoder(plain: Path) -> SentenceEncoder:
    return SentenceEncoder.from_pretrained(plain, device="cpu")


@pytest.fixture(scope="module")
def real_texts() -> list[str]:
    return [text[:200] for text in docstrings(500)]


@pytest.fixture(scope="module")
def real_vectors(real_texts: list[str], minilm: Path) -> np.ndarray:
    """What sentence-transformers makes of the texts in float32."""
    return theirs(minilm).encode(real_texts)


@pytest.mark.parametrize(("dtype", "least"), [("float32", 0.99999), ("bfloat16", 0.999)])
def test_real_weights_agree_with_sentence_transformers(
    minilm: Path, real_texts: list[str], real_vectors: np.ndarray, device: torch.device, dtype: str, least: float
) -> None:
    """Catches any error from text to vector on 500 real texts: tokens, weights, layers, pooling, order."""
    vectors = SentenceEncoder.from_pretrained(minilm, dtype=dtype, device=device).encode(real_texts)
    assert vectors.dtype == np.float32 and vectors.shape == real_vectors.shape
    norms = np.linalg.norm(vectors, axis=1)
    assert np.abs(norms - 1).max() < 1e-5, "MiniLM's folder ends in Normalize"
    assert ((vectors * real_vectors).sum(1) / norms).min() >= least


def test_single_list_and_order(encoder: SentenceEncoder) -> None:
    """Catches results in the order of the batches, and a text whose vector depends on its neighbours."""
    alone = np.stack([encoder.encode(text) for text in TEXTS])
    assert alone.shape == (len(TEXTS), 32)
    assert_close(encoder.encode(TEXTS), alone)
    assert_close(encoder.encode(TEXTS[::-1]), alone[::-1])


@pytest.mark.parametrize(
    "make", [tuple, iter, lambda texts: (t for t in texts), np.array, lambda texts: np.array(texts, dtype=object)]
)
def test_any_iterable_of_str(encoder: SentenceEncoder, make: Any) -> None:
    """Catches inputs that need a length or an index, or numpy's own kinds of str refused."""
    assert_close(encoder.encode(make(TEXTS)), encoder.encode(TEXTS))


@pytest.mark.parametrize(("budget", "batch_size"), [(1, None), (9, None), (20, 3), (None, 1), (None, None)])
def test_batches_are_packed_and_within_the_budget(
    plain: Path, encoder: SentenceEncoder, monkeypatch: pytest.MonkeyPatch, budget: int | None, batch_size: int | None
) -> None:
    """Catches a padded batch, a budget that is not kept, and vectors that depend on how texts are batched."""
    expected = encoder.encode(TEXTS)
    one = SentenceEncoder.from_pretrained(plain, device="cpu", token_budget=budget)
    seen: list[list[int]] = []
    run = one.model.encode_packed

    def spy(batch: Any, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        lengths = batch.cu_seqlens_cpu.diff().tolist()
        assert input_ids.shape == (sum(lengths),), "rows beyond the tokens"
        seen.append(lengths)
        return run(batch, input_ids, *args, **kwargs)

    monkeypatch.setattr(one.model, "encode_packed", spy)
    vectors = one.encode(TEXTS, batch_size=batch_size)
    lengths = [len(ids) for ids in one.tokenizer(TEXTS)["input_ids"]]
    assert sorted(sum(seen, [])) == sorted(lengths)
    for batch in seen:
        assert len(batch) == 1 or sum(batch) <= (budget or 2048)
        assert len(batch) <= (batch_size or len(TEXTS))
    assert_close(vectors, expected)


def test_batches_cover_all_texts_once() -> None:
    """Catches a text lost or doubled where a batch is cut: too long for the budget, of length 0, at the very limit."""
    ends = np.cumsum([50, 10, 10, 5, 5, 0, 0])
    assert list(batches(ends, 20, None)) == [(0, 1), (1, 3), (3, 7)]
    assert list(batches(ends, 20, 2)) == [(0, 1), (1, 3), (3, 5), (5, 7)]
    assert list(batches(np.cumsum([]), 20, None)) == []


def test_windows(encoder: SentenceEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a window boundary that loses or swaps texts, and an error that counts from the window's start."""
    texts = TEXTS * 5
    expected = encoder.encode(texts)
    monkeypatch.setattr("fastbert.pipelines.run.WINDOW", 7)
    assert_close(encoder.encode(texts), expected)
    assert_close(encoder.encode(iter(texts), convert_to_tensor=True), expected)
    tokens = encoder.encode(texts, output_value="token_embeddings")
    assert [len(t) for t in tokens] == [len(ids) for ids in encoder.tokenizer(texts)["input_ids"]]
    with pytest.raises(ValueError, match=r"^sentences\[23\]: lone surrogate U\+D83D"):
        encoder.encode([*texts[:23], "half \ud83d", *texts])


def test_stream_is_lazy_and_equal(encoder: SentenceEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a stream that reads everything first, and windows that differ from `encode`."""
    monkeypatch.setattr("fastbert.pipelines.run.WINDOW", 4)
    read, done = [], []

    def texts() -> Iterator[str]:
        for text in TEXTS * 10:
            read.append(text)
            yield text

    stream = encoder.encode_stream(texts(), normalize_embeddings=True, progress=done.append)
    parts = [next(stream)]
    assert len(read) <= 8
    parts.extend(stream)
    assert {len(part) for part in parts} == {4} and sum(done) == len(TEXTS) * 10
    assert_close(np.concatenate(parts), encoder.encode(TEXTS * 10, normalize_embeddings=True))


def test_nothing_to_encode(plain: Path, encoder: SentenceEncoder) -> None:
    """Catches a crash, or another shape or dtype than sentence-transformers gives, where there are no texts."""
    other = theirs(plain)
    for arguments in ({}, {"convert_to_tensor": True, "truncate_dim": 5}, {"precision": "binary"}, {"device": "cpu"}):
        for nothing in ([], (), np.array([], dtype=str)):
            result, expected = encoder.encode(nothing, **arguments), other.encode(nothing, **arguments)
            assert type(result) is type(expected)
            assert result.shape == expected.shape == (0,) and result.dtype == expected.dtype
    assert encoder.encode(iter(())).shape == (0,)
    assert encoder.encode([], convert_to_numpy=False) == [] == encoder.encode([], output_value="token_embeddings")
    assert list(encoder.encode_stream([])) == []


def test_odd_texts(encoder: SentenceEncoder) -> None:
    """Catches a crash or NaN on an empty text, on NUL, or on a megabyte of one word or of many."""
    vectors = encoder.encode(["", "\0", "a" * 2**20, "fish " * 200_000])
    assert np.isfinite(vectors).all()
    assert_close(vectors[0], vectors[1])


@pytest.mark.parametrize("bad", [5, b"boats", {"query": "boats"}, None])
def test_what_is_not_text_raises(encoder: SentenceEncoder, bad: Any) -> None:
    """Catches an item that is taken for text in silence, and an error that does not say where it stands."""
    with pytest.raises(TypeError, match=r"^sentences\[1\]: got \w+, expected str"):
        encoder.encode(["boats", bad])
    with pytest.raises(TypeError, match="^sentences: "):
        encoder.encode(bad)


def test_lone_surrogate_names_its_place(encoder: SentenceEncoder) -> None:
    """Catches a message about an index where one text came, and a prompt that is not looked at."""
    with pytest.raises(ValueError, match=r"^sentences: lone surrogate U\+DC00 at character 1"):
        encoder.encode("a\udc00")
    with pytest.raises(ValueError, match="^prompt: lone surrogate"):
        encoder.encode("a", prompt="\ud800")


def test_truncation_is_counted_once(
    encoder: SentenceEncoder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches texts cut in silence, a warning for each window, and wrong counts."""
    monkeypatch.setattr("fastbert.pipelines.run.WINDOW", 3)
    encoder.max_seq_length = 10
    lengths = [len(ids) for ids in encoder.tokenizer(TEXTS, max_length=10**6)["input_ids"]]
    cut = [length - 10 for length in lengths if length > 10]
    with caplog.at_level(logging.WARNING, "fastbert"):
        vectors = encoder.encode(TEXTS)
        encoder.encode(TEXTS[1])
    assert [r.getMessage() for r in caplog.records] == [
        f"encode: {len(cut)} of {len(TEXTS)} texts were longer than max_seq_length = 10 and truncated: "
        f"{sum(cut)} tokens cut"
    ]
    assert len(cut) >= 2
    longer = encoder.tokenizer.decode(encoder.tokenizer(TEXTS[3])["input_ids"])
    assert_close(encoder.encode(longer), vectors[3])


def test_max_seq_length(plain: Path, encoder: SentenceEncoder) -> None:
    """Catches a limit above the model's positions, and one that is not kept."""
    assert encoder.max_seq_length == 40, "the positions, where the tokenizer has no limit"
    with pytest.raises(ValueError, match="max_seq_length: got 41, but the model has 40 positions"):
        encoder.max_seq_length = 41
    with pytest.raises(ValueError, match="max_seq_length: got 0"):
        encoder.max_seq_length = 0
    encoder.tokenizer.model_max_length = 10**6
    assert encoder.encode("fish " * 100, output_value="token_embeddings").shape == (40, 32)
    encoder.max_seq_length = 12
    assert encoder.encode("fish " * 100, output_value="token_embeddings").shape == (12, 32)
    encoder.max_seq_length = None
    assert encoder.max_seq_length == 40


def test_progress_bar_only_where_asked_for(encoder: SentenceEncoder, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a bar that shows by default, goes to standard output, or counts batches."""
    encoder.encode(TEXTS)
    encoder.encode(TEXTS, show_progress_bar=False)
    assert capsys.readouterr() == ("", "")
    encoder.encode(TEXTS, show_progress_bar=True)
    out, err = capsys.readouterr()
    assert out == "" and f"{len(TEXTS)}/{len(TEXTS)}" in err


def test_triton_backend_under_strict(plain: Path, encoder: SentenceEncoder, device: torch.device) -> None:
    """Catches an operation of the sentence path that the kernels do not run, or run wrong."""
    expected = encoder.encode(TEXTS[:4], normalize_embeddings=True)
    kernels = SentenceEncoder.from_pretrained(plain, device=device, backend="triton", strict=True)
    assert_close(kernels.encode(TEXTS[:4], normalize_embeddings=True), expected, 1e-5)


@pytest.mark.gpu
def test_moves_to_the_gpu(plain: Path, encoder: SentenceEncoder) -> None:
    """Catches tensors left on the host, a race with an unfinished copy, and a device argument that is ignored."""
    expected = encoder.encode(TEXTS * 50)
    result = encoder.encode(TEXTS * 50, device="cuda", convert_to_tensor=True)
    assert result.device.type == encoder.device.type == "cuda"
    assert_close(result.cpu(), expected, 1e-4)


def test_modules_must_fit(encoder: SentenceEncoder) -> None:
    """Catches modules that fail in the middle of a run for their size."""
    with pytest.raises(ValueError, match=r"tail\[0\], Dense: takes vectors of 30, gets 32"):
        SentenceEncoder(encoder.model, encoder.tokenizer, "mean", [Dense(30, 5)])
    with pytest.raises(ValueError, match="pooling: got"):
        SentenceEncoder(encoder.model, encoder.tokenizer, ())
    with pytest.raises(ValueError, match="activation: got 'PReLU'"):
        Dense(3, 3, True, "PReLU")


def test_tokenizer_larger_than_the_model(plain: Path, encoder: SentenceEncoder) -> None:
    """Catches ids outside the embedding table, which on a GPU end the process."""
    config = BertConfig.from_pretrained(plain, vocab_size=30)
    with pytest.raises(IndexError, match="input_ids: expected values from 0 to 29"):
        SentenceEncoder(BertModel(config), encoder.tokenizer).encode(TEXTS)
