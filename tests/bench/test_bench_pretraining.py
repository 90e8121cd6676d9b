"""A step of pre-training and its input pipeline run in small on a CPU, the step beside transformers."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import input_pipeline  # noqa: E402
import suite_train  # noqa: E402
import synthetic_corpus  # noqa: E402
import train_pretraining  # noqa: E402
from laps import BACKWARD, FORWARD, STEP, TOKENS  # noqa: E402
from peers_train import IGNORED, N_INPUTS, SDPA, Compiled, Flattened  # noqa: E402
from suites import run_case  # noqa: E402
from synthetic_corpus import SPECIAL  # noqa: E402
from train_pretraining import Pretrained, PretrainTask  # noqa: E402

import models  # noqa: E402
from fastbert.bench.peers import OURS  # noqa: E402
from fastbert.bench.results import MISSING, OK, Results  # noqa: E402
from fastbert.training.distributed import Processes  # noqa: E402
from fastbert.training.loop import Loop, State  # noqa: E402
from fastbert.training.settings import Settings  # noqa: E402

CPU = torch.device("cpu")
LENGTH, TOKENS_OF_A_STEP = 32, 256


@pytest.fixture(autouse=True)
def compiled_kernels(monkeypatch):
    """Without a GPU these tests run in a process where Triton interprets; nothing here runs a Triton kernel."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """MiniLM in small, in a folder of its own."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    config = dataclasses.replace(models.CONFIGS["MiniLM"], vocab_size=300, **sizes)
    monkeypatch.setitem(models.CONFIGS, "MiniLM", config)
    monkeypatch.setattr(models, "workdir", lambda: tmp_path)
    caches = models.random_head_folder, train_pretraining.corpus_of
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def task_of(dtype=torch.float32):
    return PretrainTask("MiniLM", LENGTH, TOKENS_OF_A_STEP, dtype, CPU)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_take_the_same_step(dtype):
    """Catches a competitor with other gradients than the reference's, and a lap, fact or bar that is missing."""
    plan = suite_train.PretrainPlan("MiniLM", LENGTH, TOKENS_OF_A_STEP, dtype)
    rows = run_case(suite_train._pretrain_case(plan, "cpu"), CPU, max_seconds=0.0).rows
    assert [(row.competitor, row.status, row.detail) for row in rows if row.status not in (OK, MISSING)] == []
    steps = [row for row in rows if row.extra["setting"] == STEP]
    own32 = [f"{OURS} float32"] if dtype == "bfloat16" else []
    names = [row.competitor for row in steps if row.status == OK]
    assert names == [OURS, "transformers SDPA", f"{OURS} accelerated", *own32]
    assert [row.competitor for row in steps if row.status == MISSING] == ["transformers compiled"]
    ours, theirs = steps[:2]
    laps = {row.extra["setting"]: row for row in rows if row.competitor == OURS}
    assert 0 < laps[FORWARD].seconds + laps[BACKWARD].seconds < 2 * ours.seconds and ours.rate is not None
    assert TOKENS_OF_A_STEP * 0.8 < ours.tokens == theirs.tokens <= TOKENS_OF_A_STEP
    assert ours.extra["padding_waste"] == 0.0 < theirs.extra["padding_waste"] < 0.6
    assert ours.extra["saved_bytes"] < theirs.extra["saved_bytes"]
    assert 0 <= ours.extra["waiting"] < 1 and ours.extra["loop_tokens_per_second"] > 0
    assert "waits for data" in ours.extra["note"] and "waiting" not in laps[FORWARD].extra
    assert list(ours.extra["bars"]) == [f"over {OURS} float32" if own32 else "over transformers SDPA"]


def test_a_timed_step_is_one_of_the_run():
    """Catches a step that computes something else than the loop of `fastbert pretrain` does on the same data."""
    task = task_of()
    timed, plain = Pretrained(task), Pretrained(task)
    for peer in timed, plain:
        peer.prepare()
    for i in range(N_INPUTS):
        timed.run(i)
    alone = Processes(0, 1, 0, CPU)
    Loop(
        objective=plain.objective, optimizer=plain.optimizer, steps_of_data=task.steps, processes=alone,
        learning_rate=lambda step: Settings.learning_rate, steps=N_INPUTS, seed=train_pretraining.SEED,
        clip=Settings.clip, after_step=lambda *_: None, at_rest=lambda _: None, is_due=lambda _: False,
        counts_right=lambda _: False,
    ).run(State())  # fmt: skip
    for (name, mine), other in zip(timed.model.named_parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(mine, other), name
    assert timed.optimizer.defaults["fused"] and [group["weight_decay"] for group in timed.optimizer.param_groups] == [
        Settings.weight_decay, 0.0,
    ]  # fmt: skip


def test_every_competitor_clips_and_decays_alike():
    """Catches a peer that is timed with less work in its update than a run of pre-training has."""
    task = task_of()
    peer = SDPA(task)
    peer.prepare()
    assert [group["weight_decay"] for group in peer.optimizer.param_groups] == [Settings.weight_decay, 0.0]
    norms = []
    peer.optimizer.register_step_pre_hook(
        lambda *_: norms.append(torch.stack([p.grad.norm() for p in peer.model.parameters()]).norm().item())
    )
    peer.run(0)
    assert 0 < norms[0] <= Settings.clip * 1.001


def test_padded_sequences_are_the_packed_ones():
    """Catches a label, a token type or a mask that stands at another token in the padded batch."""
    task = task_of()
    for packed, batch in zip(task.packed, task.inputs, strict=True):
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])) != 0
        assert mask.sum(1).tolist() == np.diff(packed.cu_seqlens).tolist() and packed.n_tokens <= TOKENS_OF_A_STEP
        assert np.array_equal(batch["input_ids"][mask], packed.input_ids)
        assert np.array_equal(batch["token_type_ids"][mask], packed.token_type_ids)
        labels = batch["labels"][mask]
        assert np.array_equal(np.flatnonzero(labels != IGNORED), packed.rows)
        assert np.array_equal(labels[packed.rows], packed.labels) and (batch["labels"][~mask] == IGNORED).all()
    few = task.packed_few
    lengths = np.diff(few.cu_seqlens)
    assert 0 < len(lengths) <= 4 and (few.next_sentence_label == 0).all() and lengths.max() >= LENGTH - 2


def test_flattened_transformers_get_token_types(monkeypatch):
    """Catches a flattened competitor that is given the first segment alone, and so computes another loss."""
    task = task_of()
    monkeypatch.setattr(Flattened, "attention", "sdpa")
    peer = Flattened(task)
    peer.prepare()
    given = {}

    def stop(**arguments):
        given.update(arguments)
        raise InterruptedError

    monkeypatch.setattr(peer.model.bert, "forward", lambda *_, **arguments: stop(**arguments))
    with pytest.raises(InterruptedError):
        peer.compute(task.inputs[0])
    assert np.array_equal(given["token_type_ids"][0], task.packed[0].token_type_ids)
    assert np.array_equal(given["cu_seq_lens_q"], task.packed[0].cu_seqlens)


def test_the_corpus_is_realistic_and_always_the_same(tmp_path):
    """Catches documents of one length, ids that are special, or another corpus at the next call."""
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    corpus, again = (synthetic_corpus.write_corpus(folder, 300, 200_000) for folder in folders)
    assert (folders[0] / "ids-00000.bin").read_bytes() == (folders[1] / "ids-00000.bin").read_bytes()
    assert corpus.n_tokens == again.n_tokens == pytest.approx(200_000, rel=0.4)
    lengths = np.diff(corpus.document_offsets)
    assert np.percentile(lengths, 90) > 6 * np.percentile(lengths, 10) and lengths.min() >= 6
    assert corpus.counts[list(SPECIAL.all)].sum() == 0 and corpus.counts[5] > 5 * corpus.counts[50] > 0
    corpus.check()


def test_operations_count_the_head_on_masked_tokens():
    """Catches a floor that counts logits of all tokens, or leaves the head out."""
    config = dataclasses.replace(models.CONFIGS["BERT-large"], vocab_size=1000)
    without, some = (train_pretraining.forward_flops(config, [512, 512], n) for n in (0, 10))
    assert some - without == 2 * 10 * 1024 * (1024 + 1000)
    assert without - models.flops(config, [512, 512]) == 2 * 2 * 1024 * 1024


def test_cases_of_pretraining(monkeypatch):
    """Catches a shape that the issue asks for left out, its bars, or a CPU case that comes after the slow ones."""
    monkeypatch.setattr(suite_train, "fast_at_bfloat16", lambda device: True)
    cuda = suite_train.pretrain_plans("cuda")
    assert [(plan.model, plan.max_length) for plan in cuda] == [("BERT-large", 512), ("BERT-base", 512)]
    bars = {plan.model: suite_train.pretrain_bars(plan, "cuda") for plan in cuda}
    assert {bar.of: bar.least for bar in bars["BERT-large"]} == {
        TOKENS: 270e3, SDPA.name: 2.0, Compiled.name: 2.0, Flattened.name: 1.2,
    }  # fmt: skip
    assert next(bar.least for bar in bars["BERT-base"] if bar.of == TOKENS) == 700e3
    cases = suite_train.cases("cpu")
    pretraining = [case for case in cases if "pretrain" in case.name]
    assert [case.dtype for case in pretraining] == ["float32", "bfloat16"] and not any(c.late for c in pretraining)
    assert cases.index(pretraining[-1]) < min(i for i, case in enumerate(cases) if case.late)


def test_input_pipeline(tmp_path, capsys):
    """Catches tokens/s that are not those of the seconds measured, or a result file that reports do not read."""
    out = tmp_path / "input.json"
    input_pipeline.main(["--megabytes", "0.2", "--rounds", "1", "--out", str(out)])
    rows = Results.load(out).rows
    assert {row.workload for row in rows} == {input_pipeline.SHARDS, input_pipeline.BATCHES}
    one_core = [row for row in rows if row.extra["cores"] == 1]
    assert len(one_core) == 2 and all(row.extra["setting"] == "1 core" for row in one_core)
    for row in rows:
        assert row.tokens_per_second == pytest.approx(row.tokens / row.seconds) and row.extra["cpu_seconds"] > 0
        assert row.extra["tokens_per_second_and_core"] == pytest.approx(row.tokens_per_second / row.extra["cores"])
    assert "text to shards · 1 core" in capsys.readouterr().out
