"""SentenceEncoder.encode tokenises beside computing, here on a CPU that is made to overlap."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fastbert import BertModel, SentenceEncoder
from fastbert.pipelines.run import HeadItems, Run, Timings, _Result
from helpers import tiny_bert

TEXTS = [f"text {i}" + " and more of it" * (i % 5) for i in range(23)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    config, tokenizer = tiny_bert(TEXTS, 80, num_hidden_layers=1, max_position_embeddings=64)
    tokenizer.save_pretrained(folder)
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def encoder(folder: Path) -> SentenceEncoder:
    return SentenceEncoder.from_pretrained(folder, device="cpu")


@pytest.fixture
def overlapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes windows of 2, 4, 8, 8, ... texts, as with a GPU."""
    monkeypatch.setattr("fastbert.pipelines.run.overlaps", lambda device: True)
    monkeypatch.setattr("fastbert.pipelines.run.FIRST_WINDOW", 2)
    monkeypatch.setattr("fastbert.pipelines.run.WINDOW", 8)


def tokenizer_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("fastbert-tokenizer")]


def test_overlap_changes_no_result(encoder: SentenceEncoder, overlapped: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a window lost, doubled or in the wrong place, and a thread that outlives the call."""
    with monkeypatch.context() as plain:
        plain.setattr("fastbert.pipelines.run.overlaps", lambda device: False)
        expected = encoder.encode(TEXTS)
    np.testing.assert_allclose(encoder.encode(TEXTS), expected, atol=1e-6)
    np.testing.assert_allclose(encoder.encode(iter(TEXTS), convert_to_tensor=True), expected, atol=1e-6)
    np.testing.assert_allclose(np.concatenate(list(encoder.encode_stream(TEXTS))), expected, atol=1e-6)
    assert encoder.encode([]).shape == (0,)
    assert len(encoder.encode(TEXTS, output_value="token_embeddings")) == len(TEXTS)
    assert tokenizer_threads() == []


def test_windows_grow(encoder: SentenceEncoder, overlapped: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a device that waits for 16,384 texts to be tokenised, and chunks of a stream that are not even."""
    sizes: list[int] = []
    tokenize = Run._tokenize
    monkeypatch.setattr(Run, "_tokenize", lambda self, window: sizes.append(len(window)) or tokenize(self, window))
    encoder.encode(TEXTS)
    assert sizes == [2, 4, 8, 8, 1]
    assert [len(part) for part in encoder.encode_stream(TEXTS)] == [8, 8, 7]


def test_tokenizing_runs_ahead_in_a_thread(
    encoder: SentenceEncoder, overlapped: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches tokenizing in turn with computing, texts taken in a thread that they may not be used in, and reading a
    window before the next one's work is launched."""
    this_thread, order, taken_in = threading.get_ident(), [], set()
    second = threading.Event()
    tokenize, compute, read = Run._tokenize, Run.compute, Run._read

    def tokenized(self: Run, window: list[str]) -> Any:
        assert threading.get_ident() != this_thread
        if len(window) == 4:
            second.set()
        return tokenize(self, window)

    def computed(self: Run, tokens: Any) -> Any:
        assert second.wait(10), "the second window is not tokenised while the first one is computed"
        order.append("compute")
        return compute(self, tokens)

    monkeypatch.setattr(Run, "_tokenize", tokenized)
    monkeypatch.setattr(Run, "compute", computed)
    monkeypatch.setattr(Run, "_read", lambda self, result: order.append("read") or read(self, result))

    def texts() -> Iterator[str]:
        for text in TEXTS:
            taken_in.add(threading.get_ident())
            yield text

    encoder.encode(texts())
    assert order == ["compute", *["compute", "read"] * 4, "read"]
    assert taken_in == {this_thread}


def test_errors_of_the_thread_reach_the_caller(encoder: SentenceEncoder, overlapped: None) -> None:
    """Catches an error that is swallowed, that counts from its window's start, or that leaves the thread waiting."""
    with pytest.raises(ValueError, match=r"^sentences\[15\]: lone surrogate"):
        encoder.encode([*TEXTS[:15], "half \ud83d", *TEXTS])
    stream = encoder.encode_stream(TEXTS * 20)
    next(stream)
    stream.close()
    deadline = time.monotonic() + 10
    while tokenizer_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert tokenizer_threads() == []


def test_timings_name_the_bottleneck(
    encoder: SentenceEncoder, overlapped: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches waits that are counted for the wrong side, or for nobody."""
    tokenize, get = Run._tokenize, _Result.get
    with monkeypatch.context() as slow, caplog.at_level(logging.INFO, "fastbert"):
        slow.setattr(Run, "_tokenize", lambda self, window: time.sleep(0.05) or tokenize(self, window))
        encoder.encode(TEXTS, show_progress_bar=False)
        timings = encoder.last_timings
        assert timings is not None and timings.bottleneck == "tokenizing" and timings.waiting_for_tokens > 0.1
        assert (timings.texts, timings.overlapped) == (len(TEXTS), True) and timings.tokens > 3 * len(TEXTS)
        assert "the bottleneck is tokenizing" in caplog.text
    monkeypatch.setattr(_Result, "get", lambda self: time.sleep(0.05) or get(self))
    encoder.encode(TEXTS)
    timings = encoder.last_timings
    assert timings is not None and timings.bottleneck == "model" and timings.waiting_for_device > 0.2
    assert timings.total >= timings.waiting_for_device
    assert "the bottleneck is the model" in str(timings)


def test_taking_turns() -> None:
    """Catches a CPU whose bottleneck is judged by waits that it does not have."""
    assert Timings(tokenizing=0.6, total=1.0).bottleneck == "tokenizing"
    assert Timings(tokenizing=0.4, total=1.0).bottleneck == "model"


def test_two_threads_on_one_encoder(encoder: SentenceEncoder, overlapped: None) -> None:
    """Catches state of a call that lies in the encoder."""
    expected = encoder.encode(TEXTS)
    vectors: dict[int, Any] = {}
    threads = [threading.Thread(target=lambda i=i: vectors.update({i: encoder.encode(TEXTS)})) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        np.testing.assert_allclose(vectors[i], expected, atol=1e-6)


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu_but_reading(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a synchronising call among those that tokenise, copy and launch; in debug mode PyTorch raises there."""
    monkeypatch.setattr("fastbert.pipelines.run.FIRST_WINDOW", 2)
    encoder = SentenceEncoder.from_pretrained(folder, device="cuda", dtype="float16")
    expected = encoder.encode(TEXTS * 3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        vectors = encoder.encode(TEXTS * 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    np.testing.assert_array_equal(vectors, expected)


def test_heads_get_ids_on_the_device() -> None:
    """Catches ids that stay on the host, where a head compares them with hidden states on a GPU."""
    seen: list[Any] = []
    head = SimpleNamespace(items=lambda model, batch, *ids, **options: seen.extend([*ids, options]) or [])
    batch = SimpleNamespace(cu_seqlens=torch.empty(2, device="meta"))
    HeadItems("multi", head, {"task": "query"})(None, batch, torch.arange(3), torch.zeros(3))  # type: ignore[arg-type]
    assert [ids.device.type for ids in seen[:2]] == ["meta", "meta"] and seen[2] == {"task": "query"}
