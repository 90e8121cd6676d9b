"""Each competitor computes what the reference does, on exactly the texts and sequences that it covers."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import fastbert
from fastbert.bench import exact
from fastbert.bench.engines import Compiled, Eager, Engine, Padded, Source
from fastbert.bench.peers import OURS, contest
from fastbert.bench.results import MISSING, OK, Row
from fastbert.bench.text_encoders import FastBert, Pooled, TextEncoder
from fastbert.bench.text_peers import Latency, Throughput
from fastbert.bench.text_task import TextTask, known_warnings_hidden
from fastbert.pipelines.modules import Normalize
from helpers import docstrings, rms_error

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import peers_cpu  # noqa: E402
import peers_int8  # noqa: E402
import peers_model  # noqa: E402
import peers_text  # noqa: E402
import peers_torch  # noqa: E402

CPU = torch.device("cpu")
LENGTHS = ((13, 2, 40, 7), (9, 9), (1,))


def save(folder, pooling="mean", normalize=True, lowercase=True, **overrides):
    """A sentence encoder with random weights in which no part is near zero, so that a mistake in any shows."""
    texts = docstrings(60)
    tokenizer = fastbert.Tokenizer.train(texts, vocab_size=300, lowercase=lowercase)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    config = fastbert.BertConfig(vocab_size=300, max_position_embeddings=80, **(shape | overrides))
    model = fastbert.BertModel(config).eval()
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = parameter.shape[1] ** -0.5 if parameter.dim() == 2 else 0.3
            centre = 1.0 if name.endswith("LayerNorm.weight") else 0.0
            parameter.copy_(centre + torch.randn(parameter.shape, generator=random) * scale)
    tail = [Normalize()] if normalize else []
    fastbert.SentenceEncoder(model, tokenizer, pooling, tail).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def texts():
    return ["", "One.", *docstrings(20)]


def task_of(folder, texts, dtype="float32"):
    return TextTask(folder, texts, dtype=dtype, device="cpu")


def hold(peers, reference, dtype, **timing):
    """The rows by competitor, after a check that those that could run are right."""
    rows = contest(
        peers, lambda peer: Row("test", "tiny", peer.name, peer.dtype or dtype), reference,
        device=CPU, eager=Eager.name, **{"rounds": 2, "warmup": 0, **timing},
    )  # fmt: skip
    assert len({row.competitor for row in rows}) == len(rows), "two peers of one name"
    for row in rows:
        assert row.status in (OK, MISSING), f"{row.competitor}: {row.status}: {row.detail}"
        assert row.status == OK or row.detail
    assert rows[0].competitor == OURS and rows[0].status == OK
    return {row.competitor: row for row in rows}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_text_peer_is_right(folder, texts, dtype):
    """Catches a peer that pools, sorts, pads or converts weights wrongly, or whose vectors come in another order."""
    task = task_of(folder, texts, dtype)
    encoders = peers_text.text_encoders(task)
    if dtype == "bfloat16":  # compiled for one dtype is enough, and takes long
        encoders = [encoder for encoder in encoders if encoder.name != Compiled.name]
    rows = hold([Throughput(encoder) for encoder in encoders], task.reference(), dtype, tokens=task.n_tokens)
    for name, row in rows.items():
        packages = {"ONNX": "onnxruntime", "OpenVINO": "openvino", "CTranslate2": "ctranslate2", "zentorch": "zentorch"}
        package = packages.get(name.split()[0])
        if row.status == MISSING:
            assert package is not None, f"{name}: {row.detail}"
            assert row.detail.endswith(("is not installed", "on this processor")), f"{name}: {row.detail}"
        elif row.dtype == "float32":
            assert row.error < 2e-6, name
    short = task.short_texts()
    latency = [Latency(encoder, short) for encoder in encoders if encoder.name != Compiled.name]
    hold(latency, task.vectors(short), dtype, items=1)


class Hungry(FastBert):
    """fastbert with 400 MB more, or an error where it fails."""

    name = "hungry"

    def encode(self, texts):
        self.held = torch.ones(100_000_000)
        return super().encode(texts)


class Broken(FastBert):
    """fastbert that raises an error in another process."""

    name = "broken"

    def __init__(self, task):
        super().__init__(task)
        self.process = os.getpid()

    def load(self):
        if os.getpid() != self.process:
            raise ValueError("planted")
        super().load()


def test_peak_memory_of_a_process_of_its_own(folder, texts):
    """Catches the memory of the contest's own process, or a failure that stops the contest or has no reason."""
    task = task_of(folder, texts)
    encoders = [FastBert(task), Hungry(task), Broken(task)]
    eager = Pooled(task, Eager)
    peers = [*map(Throughput, encoders), Latency(eager, [task.texts[i] for i in task.checked])]
    rows = hold(peers, task.reference(), "float32", memory=True)
    assert rows[Eager.name].peak_bytes is None  # nor is that of the latency setting measured
    more = rows["hungry"].peak_bytes - rows[OURS].peak_bytes
    assert 390e6 < more < 450e6
    assert rows["broken"].status == OK and rows["broken"].peak_bytes is None
    assert rows["broken"].detail == "peak memory not measured: RuntimeError: ValueError: planted"


@pytest.mark.parametrize("pooling", [("cls", False), ("mean", False)])
def test_pooling_is_that_of_the_folder(pooling, texts, tmp_path):
    """Catches a peer that pools and normalises as MiniLM wants it, whatever the checkpoint says."""
    task = task_of(save(tmp_path, *pooling, num_hidden_layers=1), texts)
    encoders = [FastBert(task), Pooled(task, Eager)]
    if importlib.util.find_spec("openvino"):  # whose memory a view of its output would share
        encoders.append(Pooled(task, peers_cpu.OpenVINO))
    hold([Throughput(encoder) for encoder in encoders], task.reference(), "float32")


def test_other_pooling_is_said_not_to_be_there(texts, tmp_path):
    """Catches a peer whose pooling does not exist called wrong instead of missing."""
    task = task_of(save(tmp_path, "max"), texts)
    reason = "this checkpoint pools by max, Normalize; only mean or cls, and normalisation, are supported here"
    assert Pooled(task, Eager).obstacle() == reason
    assert FastBert(task).obstacle() is None


def test_prompt_and_lower_case_reach_every_peer(texts, tmp_path):
    """Catches a default prompt, or the lower-casing of a checkpoint, that only some competitors apply."""
    folder = save(tmp_path, lowercase=False, num_hidden_layers=1)
    encoder = fastbert.SentenceEncoder.from_pretrained(folder)
    encoder.prompts, encoder.default_prompt_name = {"say": "say: "}, "say"
    encoder.save_pretrained(folder)
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 60, "do_lower_case": true}')
    task = task_of(folder, [text.upper() for text in texts])
    encoders = [encoder for encoder in peers_text.text_encoders(task) if encoder.name != Compiled.name]
    hold([Throughput(encoder) for encoder in encoders], task.reference(), "float32")
    assert task.lengths.max() == 60
    cased = fastbert.Tokenizer.from_pretrained(folder)
    assert cased.tokenize("ONE") != cased.tokenize("one"), "nothing to lower"


def test_reference_is_that_of_the_encoder_in_float64(folder, texts):
    """Catches a reference in another order, or with other tokens, pooling or modules than the encoder's."""
    encoder = fastbert.SentenceEncoder.from_pretrained(folder, dtype="float64")
    vectors = exact.reference_vectors(encoder, texts, batch_size=5)
    assert vectors.dtype == torch.float64
    assert rms_error(torch.from_numpy(encoder.encode(texts)), vectors) < 1e-10


def test_what_the_reference_covers_is_bounded():
    """Catches minutes of float64 for long texts or large models, or a check of short texts only."""
    base, tiny = fastbert.BertConfig(), fastbert.BertConfig(hidden_size=48, intermediate_size=48)
    lengths = [512] * 500 + [4] * 500
    for config, device, budget in ((base, "cpu", 2400), (base, "cuda", 6000), (tiny, "cpu", 6000)):
        chosen = exact.choose_checked(lengths, config, torch.device(device))
        taken = [lengths[i] for i in chosen]
        assert 0.5 * budget < sum(taken) <= budget and len(set(chosen)) == len(chosen) <= 64
        assert set(taken) == {4, 512}
    assert exact.choose_checked([512], fastbert.BertConfig(num_hidden_layers=400), CPU) == [0]
    assert sorted(exact.choose_checked([3] * 10, tiny, CPU)) == list(range(10))


def test_short_texts_are_the_shortest(folder):
    """Catches a latency setting that times long texts, or none where all are long."""
    long = [text for text in docstrings(60) if len(text) > 300][:5]
    task = task_of(folder, [*long, "One.", "Two."])
    assert sorted(task.short_texts()) == ["One.", "Two."]
    task.use(long)
    assert len(task.short_texts()) == 1 and task.checked


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_model_peer_is_right(folder, dtype):
    """Catches hidden states of other tokens than the reference's, or of padding, or mixed-up sequences."""
    task = peers_model.ModelTask(folder, LENGTHS, dtype=dtype, device="cpu")
    assert task.varied and task.n_tokens == sum(map(sum, LENGTHS)) and task.n_sequences == 7
    peers = [peer for peer in peers_model.model_peers(task) if peer.name != Compiled.name]
    exact_states = task.reference()
    assert exact_states.shape == (task.n_tokens, 64)
    rows = hold(peers, exact_states, dtype, tokens=task.n_tokens)
    assert rows[OURS].extra["padding_waste"] == 0.0
    assert rows[Eager.name].extra["padding_waste"] == pytest.approx(1 - task.n_tokens / (4 * 40 + 18 + 1))


@pytest.mark.parametrize("engine", [peers_model.FastBertInt8, peers_model.FastBertFp8])
def test_8_bit_engines_are_right(folder, engine, monkeypatch):
    """Catches an 8-bit row that is not fastbert's 8-bit model, or that errs by more than a peer in 8 bits may."""
    monkeypatch.setattr(engine, "backend", "torch")
    task = peers_model.ModelTask(folder, LENGTHS, dtype="bfloat16", device="cpu")
    peer = peers_model.Hidden(task, engine)
    assert peer.obstacle() is None and peer.dtype == engine.precision and peer.name == f"fastbert {engine.precision}"
    peer.prepare()
    assert peer.engine.model.precision == engine.precision and peer.engine.model.policy.strict
    assert 1e-3 < rms_error(peer.output(), task.reference().float()) < 0.1


def test_inputs_of_the_model_level_rotate(folder):
    """Catches a peer that sees the same ids in every round."""
    task = peers_model.ModelTask(folder, [(5, 5)], dtype="float32", device="cpu")
    assert not task.varied
    peer = peers_model.Hidden(task, Eager)
    peer.prepare()
    first, second, third = (peer.run(i) for i in range(3))
    assert torch.equal(first, third) and not torch.equal(first, second)
    assert all(mask is None for batches in peer.inputs for _, mask in batches)


def test_sequences_beyond_the_positions_are_refused(folder):
    """Catches a length that some engines cut, wrap around or crash on."""
    with pytest.raises(ValueError, match="batches: got a sequence of 81, but the model has 80 positions"):
        peers_model.ModelTask(folder, [(3, 81)], dtype="float32", device="cpu")


def attend(q, k, v, cu_q, cu_k, max_q, max_k):
    """Runs varlen_attn a sequence at a time."""
    assert torch.equal(cu_q, cu_k) and max_q == max_k == int(cu_q.diff().max()) and cu_q.dtype == torch.int32
    bounds = zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True)
    parts = [[x[start:end].transpose(0, 1)[None] for x in (q, k, v)] for start, end in bounds]
    outputs = [torch.nn.functional.scaled_dot_product_attention(*part)[0].transpose(0, 1) for part in parts]
    return torch.cat(outputs)


def test_packed_bert_around_varlen_attention(folder, texts, monkeypatch):
    """Catches a mistake in the packed model that would otherwise show on a GPU alone."""
    module = types.SimpleNamespace(varlen_attn=attend)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    monkeypatch.setattr(peers_torch.VarlenAttention, "obstacle", Engine.obstacle)
    model_task = peers_model.ModelTask(folder, LENGTHS, dtype="float32", device="cpu")
    engines = peers_model.FastBertPacked, Eager, peers_torch.VarlenAttention
    hold([peers_model.Hidden(model_task, engine) for engine in engines], model_task.reference(), "float32")
    task = task_of(folder, texts)
    encoders = FastBert(task), Pooled(task, Eager), Pooled(task, peers_torch.VarlenAttention)
    rows = hold([Throughput(encoder) for encoder in encoders], task.reference(), "float32")
    assert rows[peers_torch.VarlenAttention.name].extra["padding_waste"] == 0.0


def test_reasons_of_what_cannot_run_here(folder, tmp_path):
    """Catches a competitor for GPUs that fails on a machine without one, or is left out of the table."""
    on_cpu = Source(folder, torch.float32, CPU)
    for engine in peers_torch.GPU_ENGINES[:-1]:
        assert engine(on_cpu).obstacle() == "needs an NVIDIA GPU"
    on_gpu = Source(folder, torch.float32, torch.device("cuda"))
    assert peers_torch.VarlenAttention(on_gpu).obstacle() == "varlen_attn takes bfloat16 and float16, not float32"
    for engine in (*peers_cpu.engines(torch.float32), *peers_int8.engines(torch.bfloat16)):
        assert engine(on_gpu).obstacle() == "is compared on CPUs only"
    odd = save(tmp_path, num_attention_heads=1, hidden_act="gelu_new")
    reason = peers_torch.NestedTransformer(Source(odd, torch.float32, CPU)).obstacle()
    assert reason == "the fast path has gelu and relu, not gelu_new"


def test_package_that_is_missing_is_named(folder, texts, monkeypatch):
    """Catches a traceback, or a name left out of the table, where an optional package is not installed."""
    there = importlib.util.find_spec
    names = {"transformers", "sentence_transformers", "onnxruntime", "openvino", "ctranslate2", "zentorch", "nncf"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in names else there(name, *a))
    task = task_of(folder, texts)
    encoders = peers_text.text_encoders(task)
    rows = hold([Throughput(encoder) for encoder in encoders], task.reference(), "float32")
    reasons = {row.detail for row in rows.values() if row.status == MISSING}
    packages = "transformers", "sentence-transformers"
    assert {f"the package {package} is not installed" for package in packages} <= reasons
    assert [row.status for row in rows.values()] == [OK] + [MISSING] * (len(rows) - 1)


@pytest.mark.parametrize("engine", [peers_int8.ONNXRuntimeInt8, peers_int8.OpenVINOInt8], ids=lambda e: e.__name__)
def test_int8_of_others_shows_its_accuracy(engine, folder, texts):
    """Catches a quantised peer that is not quantised, or whose cosine is not beside its speed."""
    task = task_of(folder, texts, dtype="bfloat16")
    quantised = Pooled(task, engine)
    if quantised.obstacle() is not None:
        pytest.skip(str(quantised.obstacle()))
    rows = hold([Throughput(e) for e in (FastBert(task), Pooled(task, Eager), quantised)], task.reference(), "bfloat16")
    row = rows[engine.name]
    assert row.status == OK and row.dtype == "int8" and row.error > 1e-3
    assert 0.9 < row.extra["low_cosine"] < rows[OURS].extra["low_cosine"] <= 1


def test_backend_that_rejects_says_why(folder):
    """Catches a forced backend that cannot run, reported with the speed of another one or without a reason."""
    engine = peers_torch.CudnnSDPA(Source(folder, torch.float32, CPU))
    assert engine._rejected().startswith("rejected: No viable backend")


class Sleeper(TextEncoder):
    """A peer that takes its time by the batch size, and has no memory for large batches."""

    batch_sizes = (1, 4, 8, 64)
    seconds = {1: 0.05, 4: 0.001, 8: 0.05}

    def __init__(self, task):
        super().__init__(task)
        self.tried = []

    def encode(self, texts):
        self.tried.append(self.batch_size)
        if self.batch_size not in self.seconds:
            raise torch.OutOfMemoryError("out of memory")
        time.sleep(self.seconds[self.batch_size])
        return torch.zeros(len(texts), 1)


def test_fastest_batch_size_is_taken(folder, texts):
    """Catches a competitor held to a bad batch size, or lost because its largest batch needs too much memory."""
    encoder = Sleeper(task_of(folder, texts * 4))
    encoder.choose_batch_size()
    assert encoder.batch_size == 4 and set(encoder.tried) == {1, 4, 8, 64}
    tried = len(encoder.tried)
    encoder.choose_batch_size()
    assert len(encoder.tried) == tried, "chosen a second time"
    few = Sleeper(task_of(folder, texts[:3]))
    few.choose_batch_size()
    assert set(few.tried) == {1, 4}, "batch sizes beyond the number of texts"


def test_padded_batches(folder):
    """Catches a mask that is not that of the tokens, or a width beyond the model's positions."""
    engine = Padded(Source(folder, torch.float32, CPU))
    rows = [np.arange(1, n + 1) for n in (70, 3)]
    ids, mask = engine.batch(rows)
    assert ids.shape == mask.shape == (2, 70) and mask.sum(1).tolist() == [70, 3] and ids[1, 3:].sum() == 0
    assert engine.positions((ids, mask)) == 140
    engine.pad_to = 64
    ids, mask = engine.batch(rows)
    assert ids.shape == (2, 80) and mask.sum(1).tolist() == [70, 3]
    assert engine.batch([rows[1]])[1] is None
    engine.always_masked = True
    assert engine.batch([rows[1]])[1].tolist() == [[1, 1, 1]]


def test_cut_texts_are_told_of_once_at_most(folder, caplog):
    """Catches a warning that is repeated in every round of timing."""
    task = task_of(folder, ["word " * 500])
    encoder = FastBert(task)
    encoder.prepare()
    with known_warnings_hidden():
        encoder.encode(task.texts)
    assert not caplog.records
    encoder.encode(task.texts)
    assert len(caplog.records) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lengths", [LENGTHS, ((32, 32), (32, 32))], ids=["varied", "fixed"])
def test_every_model_peer_is_right_on_a_gpu(folder, lengths, dtype, monkeypatch):
    """Catches wrong hidden states of peers that need a GPU: masks, graphs, forced backends."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    device = torch.device("cuda")
    task = peers_model.ModelTask(folder, lengths, dtype=dtype, device=device)
    peers = peers_model.model_peers(task)
    rows = contest(
        peers, lambda peer: Row("test", "tiny", peer.name, dtype), task.reference(), device=device, eager=Eager.name
    )
    assert [row.status for row in rows[:3]] == [OK] * 3
    assert all(row.status in (OK, MISSING) for row in rows), [(row.competitor, row.detail) for row in rows]
    assert all(row.peak_bytes > 0 for row in rows if row.status == OK)


@pytest.mark.gpu
def test_every_text_peer_is_right_on_a_gpu(folder, texts):
    """Catches wrong vectors of peers that need a GPU."""
    device = torch.device("cuda")
    task = TextTask(folder, texts, dtype="bfloat16", device=device)
    encoders = peers_text.text_encoders(task)
    for peers, reference in (
        ([Throughput(encoder) for encoder in encoders], task.reference()),
        ([Latency(encoder, task.short_texts()) for encoder in encoders], task.vectors(task.short_texts())),
    ):
        rows = contest(
            peers, lambda peer: Row("test", "tiny", peer.name, peer.dtype), reference, device=device, eager=Eager.name
        )
        assert all(row.status in (OK, MISSING) for row in rows), [(row.competitor, row.detail) for row in rows]
