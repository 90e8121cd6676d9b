"""Competitors that are rarely installed compute what the reference does, by stand-ins, or say why they are missing."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import fastbert
from fastbert.bench import engines, text_encoders
from fastbert.bench.peers import OURS, contest
from fastbert.bench.results import MISSING, OK, Row
from fastbert.bench.text_encoders import FlashSentenceTransformers
from fastbert.bench.text_peers import Throughput
from fastbert.bench.text_task import TextTask
from helpers import docstrings, rms_error

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import peers_pairs  # noqa: E402
import peers_servers  # noqa: E402
import peers_text  # noqa: E402
import suite_text  # noqa: E402

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}


def tokenizer_of() -> fastbert.Tokenizer:
    return fastbert.Tokenizer.train(docstrings(60), vocab_size=300)


def randomize(model: torch.nn.Module) -> None:
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = parameter.shape[1] ** -0.5 if parameter.dim() == 2 else 0.3
            centre = 1.0 if name.endswith("LayerNorm.weight") else 0.0
            parameter.copy_(centre + torch.randn(parameter.shape, generator=random) * scale)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cross-encoder with one label."""
    config = fastbert.BertConfig(vocab_size=300, max_position_embeddings=80, id2label={0: "score"}, **SHAPE)
    model = fastbert.BertForSequenceClassification(config).eval()
    randomize(model)
    path = tmp_path_factory.mktemp("cross")
    fastbert.CrossEncoder(model, tokenizer_of()).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence encoder."""
    model = fastbert.BertModel(fastbert.BertConfig(vocab_size=300, max_position_embeddings=80, **SHAPE)).eval()
    randomize(model)
    path = tmp_path_factory.mktemp("sentences")
    fastbert.SentenceEncoder(model, tokenizer_of(), "mean").save_pretrained(path)
    return path


def pairs(n: int = 30) -> list[tuple[str, str]]:
    texts = docstrings(2 * n)
    return [("", texts[0]), *zip(texts[:n], texts[n:], strict=True)]


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    """Installs a module of this name for a test."""
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__dict__.update(members)
    monkeypatch.setitem(sys.modules, name, module)


def outputs_of(name: str, values: Any) -> list[Any]:
    return [types.SimpleNamespace(outputs=types.SimpleNamespace(**{name: value})) for value in values]


def test_scorers_of_pairs_are_right(folder: Path) -> None:
    """Catches a scorer with other segments, cuts or order, or a sigmoid, and one that is missing without reason."""
    task = peers_pairs.PairTask(folder, pairs(), dtype="float32", device=CPU)
    peers = [scorer(task) for scorer in peers_pairs.PAIR_SCORERS]
    rows = contest(
        peers, lambda peer: Row("text", "pairs", peer.name, peer.dtype), task.reference(),
        device=CPU, eager=engines.EAGER, rounds=1, min_rounds=1, warmup=0,
    )  # fmt: skip
    by_name = {row.competitor: row for row in rows}
    assert len(by_name) == len(rows) and by_name[OURS].status == OK
    for name, row in by_name.items():
        assert row.status == (MISSING if {"FlashAttention-2", "vLLM", "TensorRT-LLM"} & set(name.split()) else OK), row
        assert row.status == OK or row.detail == peers_servers.NO_GPU


def test_vllm_pairs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches scores of vLLM that are compared as if they were logits, or an engine that remembers what it computed."""
    made: dict[str, Any] = {}
    encoder = fastbert.CrossEncoder.from_pretrained(folder)

    class LLM:
        def __init__(self, **options: Any) -> None:
            made.update(options)

        def score(self, firsts: list[str], seconds: list[str], use_tqdm: bool) -> Any:
            return outputs_of("score", encoder.predict(list(zip(firsts, seconds, strict=True))).tolist())

    stand_in(monkeypatch, "vllm", LLM=LLM)
    task = peers_pairs.PairTask(folder, pairs(), dtype="float32", device=CPU)
    peer = peers_pairs.VllmPairs(task)
    peer.prepare()
    assert rms_error(peer.output(), task.reference()) < 1e-4
    assert made["runner"] == "pooling" and not made["enable_prefix_caching"] and made["model"] == str(folder)


def test_tensorrt_llm_pairs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches ids of TensorRT-LLM that are cut or ordered otherwise, and an old version that is called all the same."""
    model = fastbert.BertForSequenceClassification.from_pretrained(folder).eval()

    class LLM:
        def __init__(self, **options: Any) -> None:
            assert options["encode_only"]

        def encode(self, prompts: list[dict[str, list[int]]]) -> Any:
            with torch.no_grad():
                logits = [model(torch.tensor([prompt["prompt_token_ids"]])).logits[0] for prompt in prompts]
            return [types.SimpleNamespace(logits=row) for row in logits]

    stand_in(monkeypatch, "tensorrt_llm", LLM=LLM)
    task = peers_pairs.PairTask(folder, pairs(), dtype="float32", device=CPU)
    task.device = CUDA
    peer = peers_pairs.TensorRtLlmPairs(task)
    assert peer.obstacle() is None
    peer.prepare()
    logits = torch.tensor(peer.logits())
    ids = task.exact.tokenizer([task.pairs[3][0]], [task.pairs[3][1]], max_length=task.longest)["input_ids"]
    with torch.no_grad():
        assert torch.allclose(logits[3], model(torch.tensor(ids)).logits[0, 0], atol=1e-5)
    stand_in(monkeypatch, "tensorrt_llm", LLM=object)
    assert peer.obstacle() == "this version of TensorRT-LLM has no LLM.encode"


def test_vllm_embeddings(sentences: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches vectors of vLLM of other tokens, in another order, or from a folder that pools otherwise."""
    encoder = fastbert.SentenceEncoder.from_pretrained(sentences)

    class LLM:
        def __init__(self, **options: Any) -> None:
            pass

        def embed(self, prompts: list[dict[str, list[int]]], use_tqdm: bool) -> Any:
            with torch.no_grad():
                states = [encoder.model(torch.tensor([p["prompt_token_ids"]])).last_hidden_state for p in prompts]
            return outputs_of("embedding", [state[0].mean(0).tolist() for state in states])

    stand_in(monkeypatch, "vllm", LLM=LLM)
    task = TextTask(sentences, ["", *docstrings(9)], dtype="float32", device="cpu")
    peer = Throughput(peers_servers.VllmEmbeddings(task))
    peer.prepare()
    assert rms_error(peer.output(), task.reference()) < 1e-5


@pytest.fixture
def no_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    engines.flash_obstacle.cache_clear()
    monkeypatch.setattr(engines, "package_obstacle", lambda name: f"no {name}")
    yield
    engines.flash_obstacle.cache_clear()


def test_flash_attention_says_why_it_is_missing(
    sentences: Path, no_flash: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches FlashAttention that ends a contest where it cannot be fetched, or is missing without a reason."""
    task = TextTask(sentences, ["One."], dtype="bfloat16", device="cpu")
    peer = FlashSentenceTransformers(task)
    assert peer.obstacle() == "FlashAttention-2 needs an NVIDIA GPU" and peer.dtype == "float16"
    task.device = CUDA
    monkeypatch.setattr(text_encoders, "package_obstacle", lambda name: None)
    assert peer.obstacle() == "no flash-attn; no kernels"
    monkeypatch.setattr(engines, "package_obstacle", lambda name: "no flash-attn" if name == "flash-attn" else None)
    engines.flash_obstacle.cache_clear()

    def load(name: str) -> None:
        raise OSError(f"no network for {name}\nmore")

    stand_in(monkeypatch, "transformers.modeling_flash_attention_utils", lazy_import_flash_attention=load)
    expected = f"{engines.HUB_FLASH} could not be loaded: OSError: no network for {engines.HUB_FLASH}"
    assert peer.obstacle() == expected


def test_flash_sentence_transformers_settings(sentences: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches FlashAttention in another dtype than float16, or padding that the row does not own up to."""
    asked: dict[str, Any] = {}

    class SentenceTransformer:
        def __init__(self, folder: str, device: str, **settings: Any) -> None:
            asked.update(settings["model_kwargs"])

        def __getitem__(self, i: int) -> Any:
            return types.SimpleNamespace(can_flatten_inputs=asked["dtype"] == torch.float16)

    stand_in(monkeypatch, "sentence_transformers", SentenceTransformer=SentenceTransformer)
    peer = FlashSentenceTransformers(TextTask(sentences, ["One."], dtype="bfloat16", device="cpu"))
    peer.load()
    assert asked == {"dtype": torch.float16, "attn_implementation": engines.flash_implementation()}
    assert peer.facts()["padding_waste"] == 0.0


def test_broken_packages_are_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Catches a package whose import fails that ends the whole benchmark."""
    assert peers_servers.import_obstacle("not-there", "not_there") == "the package not-there is not installed"
    (tmp_path / "broken_server.py").write_text("raise RuntimeError('needs CUDA 99')")
    monkeypatch.syspath_prepend(str(tmp_path))
    reason = peers_servers.import_obstacle("broken-server", "broken_server")
    assert reason == "broken-server cannot be imported: RuntimeError: needs CUDA 99"


def test_who_takes_part(sentences: Path) -> None:
    """Catches a competitor that no GPU suite has, and one that CPUs are asked for."""
    task = TextTask(sentences, ["One."], dtype="float32", device="cpu")
    on_cpu = {encoder.name for encoder in peers_text.text_encoders(task)}
    task.device = CUDA
    on_gpu = {encoder.name for encoder in peers_text.text_encoders(task)}
    assert {FlashSentenceTransformers.name, "vLLM"} <= on_gpu - on_cpu
    names = [case.name for case in suite_text.cases("cuda")]
    assert "text MiniLM cross-encoder pairs of docstrings throughput bfloat16" in names
    assert not any("pairs" in case.name for case in suite_text.cases("cpu"))
