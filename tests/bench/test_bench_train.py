"""The train suite runs in small on a CPU: gradients are compared, laps timed, memory counted and bars noted."""

from __future__ import annotations

import dataclasses
import gc
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import peers_train  # noqa: E402
import suite_train  # noqa: E402
import suites  # noqa: E402
import train_attention  # noqa: E402
import workloads  # noqa: E402
from laps import BACKWARD, FORWARD, STEP, TOKENS, Bar, Lapped  # noqa: E402
from peers_train import CLASSES, PRETRAINING, WORDS, FastBert, TrainTask  # noqa: E402
from suites import Built, Case, Recorder, Work, run_case  # noqa: E402

import models  # noqa: E402
from fastbert.bench.memory import saved_for_backward  # noqa: E402
from fastbert.bench.peers import OURS  # noqa: E402
from fastbert.bench.results import MISSING, OK, WRONG, Results  # noqa: E402
from fastbert.bench.tables import contest_table, contests  # noqa: E402

CPU = torch.device("cpu")
SETTINGS = [STEP, FORWARD, BACKWARD]


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
    models.random_head_folder.cache_clear()
    yield
    models.random_head_folder.cache_clear()


def rows_of(plan, peers_of=peers_train.train_peers):
    case = dataclasses.replace(
        suite_train._case(plan, "cpu"), build=lambda device: suite_train.build(plan, device, peers_of)
    )
    return run_case(case, CPU, quick=False, max_seconds=0.0).rows


def task_of(lengths=(9, 4, 1), dtype=torch.float32, objective=CLASSES):
    return TrainTask("MiniLM", lengths, dtype, CPU, objective)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("objective", [CLASSES, WORDS, PRETRAINING])
def test_all_train_the_same_model(objective, dtype):
    """Catches a competitor whose gradients are another function's, and a setting or a number that is missing."""
    plan = suite_train.Plan("MiniLM", workloads.half_padded(20, 6), dtype, objective)
    rows = rows_of(plan)
    assert [(row.competitor, row.status, row.detail) for row in rows if row.status not in (OK, MISSING)] == []
    by_setting = {setting: [row for row in rows if row.extra["setting"] == setting] for setting in SETTINGS}
    assert len({tuple(row.competitor for row in group) for group in by_setting.values()}) == 1
    names = [row.competitor for row in rows if row.status == OK and row.extra["setting"] == STEP]
    own32 = [f"{OURS} float32"] if dtype == "bfloat16" else []
    assert names == [OURS, "transformers eager", "transformers SDPA", f"{OURS} accelerated", *own32]
    for step, forward, backward in zip(*by_setting.values(), strict=True):
        if step.status == OK:
            assert forward.seconds > 0 and backward.seconds > 0 and step.rounds == forward.rounds == backward.rounds
            assert step.tokens == backward.tokens == plan.workload.tokens and step.extra["saved_bytes"] > 0
            assert "saved_bytes" not in forward.extra and forward.rate is not None
    assert {contest.setting: len(contest.rows) for contest in contests(rows)} == dict.fromkeys(SETTINGS, len(rows) // 3)
    assert by_setting[STEP][0].extra["padding_waste"] == 0.0 and by_setting[STEP][1].extra["padding_waste"] > 0.4


def test_a_wrong_gradient_is_not_timed():
    """Catches a competitor that is timed though the gradients of one layer are not the model's."""

    class Wrong(peers_train.SDPA):
        def load(self):
            model = super().load()
            model.bert.encoder.layer[1].output.dense.weight.register_hook(lambda grad: 1.2 * grad)
            return model

    plan = suite_train.Plan("MiniLM", workloads.fixed(8, 3), "float32")
    right = peers_train.FastBert, peers_train.Eager
    rows = rows_of(plan, lambda task: [*(kind(task) for kind in right), Wrong(task)])
    assert [(row.competitor, row.status) for row in rows if row.extra["setting"] == STEP] == [
        (OURS, OK), ("transformers eager", OK), ("transformers SDPA", WRONG),
    ]  # fmt: skip
    assert all(row.seconds is None for row in rows if row.status == WRONG)


def test_gradients_are_checked_without_dropout_and_timed_with_it():
    """Catches a check that dropout spoils, a model left without dropout, and a step that changes no weight."""
    task = task_of()
    peer = FastBert(task)
    peer.prepare()
    before = [p.detach().clone() for p in peer.model.parameters()]
    exact = task.reference()
    assert peer._gradients().sub(exact).square().mean().sqrt() < 1e-5
    assert all(torch.equal(p, q) for p, q in zip(peer.model.parameters(), before, strict=True))
    assert {module.p for module in peer.model.modules() if isinstance(module, nn.Dropout)} == {0.1}
    assert peer.model.training and peer.run(0) != peer.run(2)
    assert not any(torch.equal(p, q) for p, q in zip(peer.model.parameters(), before, strict=True))
    assert exact.isfinite().all() and len(exact) > 1000


def test_batches_rotate_and_have_padding_where_lengths_differ():
    """Catches one set of ids for all runs, labels beyond the classes, or a mask where all lengths are equal."""
    first, second = task_of().inputs
    assert not torch.equal(first["input_ids"], second["input_ids"]) and set(first["labels"].tolist()) <= {0, 1}
    assert first["attention_mask"].sum(1).tolist() == [9, 4, 1]
    assert "attention_mask" not in task_of((5, 5)).inputs[0]
    words = task_of((9, 4, 1), objective=PRETRAINING).inputs[0]
    asked = words["labels"] != peers_train.IGNORED
    assert asked.sum() > 0 and not asked[words["attention_mask"] == 0].any()
    assert torch.equal(words["labels"][asked], words["input_ids"][asked])


@pytest.mark.parametrize(("longest", "n"), [(128, 16), (128, 4), (512, 32)])
def test_half_of_the_batch_is_padding(longest, n):
    """Catches a workload whose share of padding is not the one that the bar is for."""
    workload = workloads.half_padded(longest, n)
    assert len(workload.lengths) == n and max(workload.lengths) == longest and min(workload.lengths) >= 1
    assert workload.padding_waste() == pytest.approx(0.5, abs=0.01)
    assert workload == workloads.half_padded(longest, n)


def test_saved_bytes_are_counted_once():
    """Catches a storage counted twice or by the size of a view, parameters counted, or a hook that stays."""
    linear = nn.Linear(8, 4)
    x = torch.randn(5, 8, requires_grad=True)
    held = list(linear.parameters())
    assert saved_for_backward(lambda: linear(x), held) == 5 * 8 * 4
    assert saved_for_backward(lambda: linear(x)) == 5 * 8 * 4 + 4 * 8 * 4
    assert saved_for_backward(lambda: linear(x) + F.linear(x[:2], linear.weight).sum(), held) == 5 * 8 * 4
    assert saved_for_backward(lambda: torch.relu(linear(x)), held) == 5 * 8 * 4 + 5 * 4 * 4
    with torch.no_grad():
        assert saved_for_backward(lambda: linear(x)) == 0
    linear(x).sum().backward()


def test_counting_keeps_nothing_alive():
    """Catches a graph that holds itself, and with it every parameter of each model that was ever counted."""
    layers = [nn.Linear(8, 4)]
    weight = weakref.ref(layers[0].weight)
    saved_for_backward(lambda: torch.softmax(layers[0](torch.randn(5, 8)), -1))
    layers.clear()
    gc.collect()
    assert weight() is None


def test_saved_bytes_of_plain_bert():
    """Catches a count in H bytes a token and layer that differs from the one by hand, for transformers in float32."""
    task = task_of((16,) * 12)
    peer = peers_train.Eager(task)
    peer.prepare()
    hidden, inner, heads, keys = 64, 96, 4, 16
    # Input, q, k, v, context, two sums before norms, one norm's output, two masks of dropout; GELU's input and output.
    kept = 4 * (10 * hidden + 2 * inner)
    kept += 3 * 4 * heads * keys  # the softmax of the scores, its mask, and what dropout makes of it
    kept += 4 * 2 * hidden / 2  # half of the embeddings' sum and of their mask, since there are two layers
    facts = peer.facts()
    assert facts["saved_h"] == pytest.approx(kept / hidden, rel=0.05)
    assert facts["saved_bytes"] > 192 * 2 * kept


class Stepping(Lapped):
    """A stand-in whose laps take known times, by a clock of its own."""

    def __init__(self, name, seconds, now):
        super().__init__(CPU)
        self.name, self.seconds, self.now = name, seconds, now

    def run(self, i):
        self.start()
        for seconds in self.seconds:
            self.now[0] += seconds * (10 if i == 0 else 1)  # the first run is no lap of a contest that warms up
            self.mark()

    def output(self):
        self.run(0)
        return torch.ones(3)


@pytest.fixture
def now(monkeypatch):
    """The clock of stand-ins, in seconds."""
    seconds = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: seconds[0])
    return seconds


def test_laps_and_bars(tmp_path, now):
    """Catches laps of the check among those timed, a ratio upside down, or a bar said to be reached that was missed."""
    peers = Stepping(OURS, (0.002, 0.004, 0.002), now), Stepping("eager", (0.012, 0.008, 0.004), now)
    bars = Bar(OURS, 2.0, "eager"), Bar(OURS, 1e9, TOKENS), Bar(OURS, 1.0, "absent"), Bar("absent", 1.0, "eager")
    laps = {FORWARD: Work(1e6), BACKWARD: Work(2e6)}

    def build(device):
        timing = {"warmup": 2, "rounds": 3}
        return Built(peers, "eager", torch.ones(3), 100, 4, Work(3e6), {}, timing, laps, bars)

    case = Case("train", "w", "Tiny", "float32", "cpu", (), build, setting=STEP)
    rows = run_case(case, CPU).rows
    assert [(row.competitor, row.extra["setting"]) for row in rows] == [
        (name, setting) for setting in SETTINGS for name in (OURS, "eager")
    ]
    assert all(row.rounds == 3 for row in rows)
    assert [row.seconds for row in rows if row.competitor == OURS] == pytest.approx([0.008, 0.002, 0.004])
    assert [row.speedup for row in rows if row.competitor == "eager"] == pytest.approx([3.0, 6.0, 2.0])
    assert rows[4].rate == pytest.approx(2e6 / rows[4].seconds / 1e12)
    assert rows[0].extra["bars"].keys() == {"over eager", "tokens/s"} and "bars" not in rows[2].extra
    assert "over eager: " in str(contest_table(contests(rows)[0]))
    Recorder(tmp_path / "r.json", CPU).add(rows)
    notes = Results.load(tmp_path / "r.json").notes["bars"]
    assert len(notes) == 2 and notes[0].startswith("Tiny, w, float32: fastbert over eager: ")
    assert notes[0].endswith("the bar is 2.00: reached") and notes[1].endswith("the bar is 1000000000: missed")


def test_a_peer_that_fails_has_no_laps(now):
    """Catches laps of a competitor that raised while it was timed, or none of the others because of it."""

    class Failing(Stepping):
        def run(self, i):
            super().run(i)
            if i == 1:
                raise RuntimeError("planted")

    peers = [kind(name, (1.0, 1.0), now) for kind, name in ((Stepping, OURS), (Failing, "eager"), (Stepping, "other"))]
    built = Built(peers, "eager", torch.ones(3), timing={"rounds": 3}, laps={FORWARD: Work(), BACKWARD: Work()})
    rows = run_case(Case("train", "w", "Tiny", "float32", "cpu", (), lambda device: built), CPU).rows
    assert [(row.competitor, row.status, row.seconds is not None) for row in rows[3:6]] == [
        (OURS, OK, True), ("eager", "failed", False), ("other", OK, True),
    ]  # fmt: skip


def test_attention_compares_the_same_function():
    """Catches a competitor of attention with another gradient, dropout in the check, or none in what is timed."""
    built = train_attention.build(2, 16, (12,) * 3, torch.float32, CPU)
    rows = run_case(Case("train", "a", "m", "float32", "cpu", (), lambda device: built), CPU, max_seconds=0.0).rows
    assert [(row.competitor, row.detail) for row in rows if row.status not in (OK, MISSING)] == []
    assert len(rows) == 12 and rows[0].rate > 0
    assert built.work.flops == 14 * 32 * 3 * 12**2 == sum(work.flops for work in built.laps.values())
    for peer in built.peers[:3]:
        outs = [peer.attend(peer.qkv, p).detach() for p in (0.0, 0.0, 0.5, 0.5)]
        torch.testing.assert_close(outs[0], outs[1])
        assert not torch.allclose(outs[2], outs[3]) and not torch.allclose(outs[0], outs[2])


def test_plans_cover_what_the_bars_are_for(monkeypatch):
    """Catches a bar without a case, compiled competitors in short runs, or slow cases before the other suites."""
    monkeypatch.setattr(suite_train, "fast_at_bfloat16", lambda device: True)
    plans = suite_train.cpu_plans()
    bars = {(plan.model, plan.dtype, plan.workload.name): suite_train.bars_of(plan, "cpu") for plan in plans}
    for model in ("MiniLM", "BERT-base"):
        of_model = {key[1:]: value for key, value in bars.items() if key[0] == model}
        assert len(of_model) == 4
        assert sorted({bar.least for value in of_model.values() for bar in value}) == [1.25, 1.8, 2.2]
    cases = suite_train.cases("cpu")
    assert [case.late for case in cases] == [case.model == "BERT-base" for case in cases]
    cuda = suite_train.cuda_plans()
    tokens = {
        (plan.model, plan.objective) for plan in cuda if any(b.of == TOKENS for b in suite_train.bars_of(plan, "cuda"))
    }
    assert tokens == set(suite_train.BARS_TOKENS)
    built = {long: suite_train.build(dataclasses.replace(plans[0], compiled=long), CPU) for long in (False, True)}
    left_out = {
        long: [peer.name for peer in case.peers if isinstance(peer, suites.LeftOut)] for long, case in built.items()
    }
    assert left_out == {False: ["transformers compiled"], True: []}
