"""The project's own suites run in small on a CPU, mostly with stand-ins for competitors."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import ceilings  # noqa: E402
import kernel_ops  # noqa: E402
import suite_kernels  # noqa: E402
import suite_model  # noqa: E402
import suite_quantized  # noqa: E402
import suite_start  # noqa: E402
import suite_text  # noqa: E402
import suite_train  # noqa: E402
import suites  # noqa: E402
from session import Session  # noqa: E402
from suites import Built, Case, Deadline, Recorder, Schedule, Work, run_case, run_cases  # noqa: E402

import models  # noqa: E402
from fastbert.bench import measure  # noqa: E402
from fastbert.bench.engines import Compiled  # noqa: E402
from fastbert.bench.measure import rms_error  # noqa: E402
from fastbert.bench.peers import OURS, Peer  # noqa: E402
from fastbert.bench.results import FAILED, MISSING, OK, WRONG, Results, Row  # noqa: E402
from fastbert.bench.text_encoders import SentenceTransformers  # noqa: E402

CPU = torch.device("cpu")
CEILINGS = {ceilings.COPY: 10.0, ceilings.matmul_key("float32"): 0.1}
TIMED_FIELDS = ("seconds", "tokens_per_second", "rate", "ceiling_fraction", "speedup")


@pytest.fixture(autouse=True)
def compiled_kernels(monkeypatch):
    """Without a GPU these tests run in a process where Triton interprets; nothing here runs a Triton kernel."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


class Fake(Peer):
    def __init__(self, name, seconds=0.001, factor=1.0, missing=None):
        self.name, self.seconds, self.factor, self.missing, self.ran = name, seconds, factor, missing, 0

    def obstacle(self):
        return self.missing

    def run(self, i):
        self.ran += 1
        time.sleep(self.seconds)

    def output(self):
        return torch.arange(1.0, 9.0) * self.factor


def case_of(*peers, needs=("attention",), workload="w", **built):
    def build(device):
        reference = torch.arange(1.0, 9.0, dtype=torch.float64)
        return Built(peers, peers[1].name, reference, extra={"length": 7}, **built)

    return Case("suite", workload, "Tiny", "float32", "cpu", needs, build, setting="throughput")


def rows_of(case, **options):
    return {row.competitor: row for row in run_case(case, CPU, ceilings=CEILINGS, **options).rows}


def test_rows_carry_status_ratio_and_rate():
    """Catches a row that lost its ratio, its share of the ceiling, its labels, or the reason why a peer did not run."""
    peers = Fake(OURS, 0.002), Fake("eager", 0.03), Fake("absent", missing="not installed"), Fake("off", factor=1.5)
    rows = rows_of(case_of(*peers, tokens=100, items=4, work=Work(flops=2e6, n_bytes=1e3)))
    assert [(name, row.status) for name, row in rows.items()] == [
        (OURS, OK), ("eager", OK), ("absent", MISSING), ("off", WRONG),
    ]  # fmt: skip
    ours, eager = rows[OURS], rows["eager"]
    assert eager.speedup > 1 and eager.speedup_low <= eager.speedup <= eager.speedup_high
    assert ours.tokens_per_second == pytest.approx(100 / ours.seconds) and ours.items == 4
    assert ours.rate == pytest.approx(2e6 / ours.seconds / 1e12) and ours.rate_unit == "TFLOP/s"
    assert ours.ceiling_fraction == pytest.approx(2e6 / 0.1e12 / ours.seconds)
    assert ours.extra | {"model": "Tiny", "setting": "throughput", "length": 7} == ours.extra
    assert all(getattr(rows["off"], name) is None for name in TIMED_FIELDS)


def test_refuses_speeds_of_what_failed_its_tests():
    """Catches a speed, fastbert's or a ratio to it, of an operation whose tests failed."""
    peers = Fake(OURS), Fake("eager")
    outcome = run_case(case_of(*peers, tokens=9), CPU, refused={"attention": "the tests of attention failed: x"})
    assert [row.competitor for row in outcome.rows] == [OURS] and outcome.ours is None
    assert outcome.rows[0].status == FAILED and "the tests of attention failed: x" in outcome.rows[0].detail
    assert all(getattr(outcome.rows[0], name) is None for name in TIMED_FIELDS)
    assert [peer.ran for peer in peers] == [0, 0]
    assert run_case(case_of(*peers), CPU, refused={"pooling": "x"}).rows[0].status == OK


def test_a_competitor_of_ours_that_failed_its_tests_has_no_speed():
    """Catches fastbert in 8 bits timed though its tests failed, or all of fastbert refused for it."""
    eight_bit = Fake("fastbert int8", 0.001)
    eight_bit.needs = ("quantized",)
    case = case_of(Fake("fastbert", 0.001), Fake("eager", 0.001), eight_bit)
    rows = {row.competitor: row for row in run_case(case, CPU, refused={"quantized": "planted"}).rows}
    assert rows["fastbert"].status == OK and rows["fastbert int8"].status == MISSING
    assert rows["fastbert int8"].detail == "not timed: planted"
    assert run_case(case, CPU, refused={"gelu": "planted"}).rows[2].status == OK


def test_wrong_fastbert_has_no_speed_and_no_second_timing():
    """Catches a benchmark that goes on to time a fastbert whose output is wrong."""
    ours = Fake(OURS, factor=1.1)
    outcome = run_case(case_of(ours, Fake("eager"), tokens=9, work=Work(flops=1.0)), CPU, ceilings=CEILINGS)
    assert outcome.rows[0].status == WRONG and outcome.ours is None and ours.ran == 0
    assert all(getattr(outcome.rows[0], name) is None for name in TIMED_FIELDS)


def test_nothing_is_timed_under_the_interpreter(monkeypatch):
    """Catches the speed of Triton's interpreter in a table."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    row = run_case(case_of(Fake(OURS), Fake("eager")), CPU).rows[0]
    assert row.status == FAILED and "TRITON_INTERPRET" in row.detail and row.seconds is None


def test_case_that_cannot_be_built_is_a_row():
    """Catches a case without enough memory that ends the whole run."""

    def build(device):
        raise torch.OutOfMemoryError("planted")

    row = run_case(Case("s", "w", "m", "float32", "cpu", (), build), CPU).rows[0]
    assert (row.status, row.detail) == (FAILED, "OutOfMemoryError: planted")


def test_least_time_is_that_of_the_tighter_ceiling():
    """Catches a share of the wrong ceiling, or one where a ceiling is unknown."""
    assert Work(1e9, 1e6).floor("float32", CEILINGS) == pytest.approx(0.01)
    assert Work(1e6, 1e9).floor("float32", CEILINGS) == pytest.approx(0.1)
    assert Work(1e9, 1e6).floor("bfloat16", CEILINGS) is None
    row = Row("s", "w", OURS, "float32", seconds=0.5)
    Work(n_bytes=1e9).fill(row, CEILINGS)
    assert (row.rate, row.rate_unit, row.ceiling_fraction) == (2.0, "GB/s", pytest.approx(0.2))


def test_flops_are_those_of_the_formulas():
    """Catches FLOPs off by a factor of two, or an attention term that is counted wrong."""
    base, large = models.CONFIGS["BERT-base"], models.CONFIGS["BERT-large"]
    for length in (128, 512):
        assert models.flops(base, [length] * 3) == pytest.approx(3 * length * (169.9e6 + 36864 * length), rel=1e-3)
        assert models.flops(large, [length]) == pytest.approx(length * (604e6 + 98304 * length), rel=1e-3)
    assert models.flops(base, [100, 300]) == models.flops(base, [100]) + models.flops(base, [300])


@pytest.mark.parametrize("lengths", [(9, 9, 9), (40, 3, 1, 12, 7, 30, 2, 5, 19, 8)], ids=["equal", "unequal"])
@pytest.mark.parametrize("name", kernel_ops.OPS)
def test_kernel_cases_compare_the_same_function(name, lengths):
    """Catches a competitor of a kernel that computes something else, or an output picked from the wrong rows."""
    built = suite_kernels.build(kernel_ops.OPS[name], (48, 80, 3), lengths, torch.float32, CPU)
    case = Case("kernels", "w", "m", "float32", "cpu", (), lambda device: built)
    rows = rows_of(case, quick=True, max_seconds=0.0)
    assert [(row.competitor, row.status, row.detail) for row in rows.values() if row.status != OK] == []
    assert set(rows) == {OURS, suite_kernels.EAGER} | ({"SDPA"} if name == "attention" else set())
    assert rows[OURS].rate > 0 and rows[OURS].ceiling_fraction > 0
    assert built.work.n_bytes > 0


@pytest.mark.parametrize("precision", ["fp8", "int8"])
@pytest.mark.parametrize("name", suite_quantized.linears(1, 1, 1))
def test_8_bit_cases_compare_the_same_function(name, precision):
    """Catches a competitor of an 8-bit linear that computes something else, or work that is miscounted."""
    linear = suite_quantized.linears(64, 160, 2)[name]
    built = suite_quantized.build(linear, 200, precision, CPU)
    case = Case("kernels", "w", "m", precision, "cpu", (), lambda device: built)
    rows = rows_of(case, quick=True, max_seconds=0.0)
    assert rows[OURS].status == rows[suite_kernels.EAGER].status == rows["bf16, F.linear"].status == OK, rows
    assert rows[OURS].rate > 0 and built.work.flops == 2 * 200 * linear.k * linear.m
    for peer in built.peers:
        if peer.obstacle() is None:
            error = measure.rms_error(peer.output(), built.reference)
            assert error < (0.05 if linear.gelu or peer.name.startswith("bf16") else 0.01), peer.name
    libraries = [peer for peer in built.peers if peer.name.startswith("torch._")]
    assert libraries and all(peer.obstacle() for peer in libraries) == (precision == "fp8" or linear.group is not None)


def test_work_of_kernels():
    """Catches bytes or operations that differ from a count by hand for 5 tokens of H = 4, I = 8 in 16 bits."""
    shape = kernel_ops.Shape(4, 8, 2, (2, 3), torch.bfloat16, CPU)
    ops = {name: op(shape) for name, op in kernel_ops.OPS.items()}
    assert ops["layer_norm"].work() == Work(0.0, 2 * (3 * 5 * 4 + 3 * 4))
    assert ops["bias_gelu"].work() == Work(0.0, 2 * (2 * 5 * 8 + 8))
    assert ops["mean pooling"].work() == Work(0.0, 2 * (5 * 4 + 2 * 4))
    assert ops["linear + GELU"].work() == Work(2 * 5 * 4 * 8, 2 * (5 * 4 + 4 * 8 + 5 * 8 + 8))
    assert ops["attention"].work() == Work(4 * 4 * (2 * 2 + 3 * 3), 2 * 4 * 5 * 4)
    ids = torch.tensor([1, 1, 7, 1, 7]), torch.tensor([0, 0, 0, 0, 1]), torch.tensor([0, 1, 0, 1, 2])
    assert ops["embedding + LayerNorm"].work(*ids) == Work(0.0, 2 * 4 * (2 + 2 + 3 + 5) + 24 * 5)


def test_kernel_lengths_fill_the_tokens():
    """Catches a GPU case that runs on more or fewer tokens than its name says."""
    for kind in ("S512", "S128", "squad", "queries"):
        for tokens in suite_kernels.CPU_TOKENS, 16384:
            assert sum(suite_kernels.lengths_of(kind, tokens)) == tokens


def test_every_case_has_its_own_name():
    """Catches two cases that a report or a baseline cannot tell apart."""
    for device_type in "cpu", "cuda":
        names = [
            case.name
            for suite in (suite_kernels, suite_quantized, suite_model, suite_text, suite_train)
            for case in suite.cases(device_type)
        ]
        assert len(set(names)) == len(names) > 0


def test_bert_base_from_text_comes_last(monkeypatch):
    """Catches BERT-base timed in a quick look, with a given model or on a GPU, or another dtype left out."""
    monkeypatch.setattr(suite_text, "fast_at_bfloat16", lambda device: True)
    for long in (False, True):
        cases = suite_text.cases("cpu", long=long)
        base = [case for case in cases if case.model == suite_text.BASE]
        assert cases[4:] == base and {case.model for case in cases[:4]} == {models.text_model_name()}
        assert [(case.dtype, case.setting) for case in base] == [
            ("bfloat16", suite_text.THROUGHPUT), ("float32", suite_text.THROUGHPUT),
        ]  # fmt: skip
        assert [case.late for case in base] == [False, True]
    on_gpu = [case for case in suite_text.cases("cuda") if not case.workload.startswith("pairs")]
    assert len(suite_text.cases("cpu", Path("given"))) == len(on_gpu) == 4
    monkeypatch.setattr(suite_text, "fast_at_bfloat16", lambda device: False)
    assert [(case.model, case.dtype, case.late) for case in suite_text.cases("cpu")][2:] == [
        (suite_text.BASE, "float32", False)
    ]


def test_late_cases_run_after_all_suites():
    """Catches a case that should be left out first in a short run and takes its time before the others."""
    spec = importlib.util.spec_from_file_location("benchmarks_conftest", ROOT / "benchmarks" / "conftest.py")
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    case = case_of(Fake(OURS), Fake("eager"))
    late = dataclasses.replace(case, late=True)
    items = [SimpleNamespace(callspec=SimpleNamespace(params={"case": one})) for one in (case, late, case)]
    without = SimpleNamespace()
    ordered = [*items, without]
    conftest.pytest_collection_modifyitems(ordered)
    assert ordered == [items[0], items[2], without, items[1]]


@pytest.fixture
def small_base(monkeypatch, tmp_path):
    """BERT-base in small, in a folder of its own, and a few short texts."""
    monkeypatch.setitem(models.CONFIGS, suite_text.BASE, dataclasses.replace(
        models.CONFIGS[suite_text.BASE], hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=96,
    ))  # fmt: skip
    monkeypatch.setattr(models, "workdir", lambda: tmp_path)
    monkeypatch.setattr(suite_text, "docstrings", lambda: [f"text {i}" + " and more" * i for i in range(40)])
    caches = models.random_folder, models.random_text_model, suite_text.all_texts, suite_text.prepared
    for function in caches:
        function.cache_clear()
    yield
    for function in caches:
        function.cache_clear()


def test_bert_base_from_text(small_base, monkeypatch):
    """Catches a case that cannot be built, competes on other texts, keeps its models in memory, or lacks its labels."""
    monkeypatch.setattr(suite_text, "fast_at_bfloat16", lambda device: True)
    for long, n_texts in ((False, suite_text.N_TEXTS_BASE), (True, 40)):
        case = next(case for case in suite_text.cases("cpu", long=long) if case.model == suite_text.BASE)
        built = case.build(CPU)
        assert suite_text.prepared.cache_info().currsize == 0
        assert built.items == n_texts and built.timing["min_rounds"] == 2
        left_out = [peer.name for peer in built.peers if isinstance(peer, suites.LeftOut)]
        assert left_out == ([] if long else [Compiled.name, SentenceTransformers.name])
        assert [peer.dtype for peer in built.peers if peer.name == SentenceTransformers.name] == ["float32"]
        running = [peer for peer in built.peers if peer.name not in left_out]
        assert not any(peer.with_memory for peer in running)
        assert {peer.encoder.batch_size for peer in running if peer.encoder.batch_sizes} == {suite_text.BASE_BATCH}
    rows = run_case(dataclasses.replace(case, build=lambda device: built), CPU, quick=True, max_seconds=0.0).rows
    assert [(row.competitor, row.status, row.detail) for row in rows if row.status != OK] == []
    assert {(row.extra["model"], row.workload, row.items) for row in rows} == {("BERT-base", "docstrings", 40)}


def test_models_level_shares_the_folder_of_the_text_level(small_base):
    """Catches ONNX exports of BERT-base made twice in a run, or weights that depend on which suite came first."""
    folder = models.random_text_model(suite_text.BASE)
    weights = (folder / "model.safetensors").read_bytes()
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert models.random_folder(suite_text.BASE) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written and (folder / "modules.json").exists()
    other = models.random_folder(suite_text.BASE, max_position_embeddings=600)
    assert other != folder and not (other / "modules.json").exists()
    models.random_model(suite_text.BASE).save_pretrained(folder / "again")
    assert (folder / "again" / "model.safetensors").read_bytes() == weights


def test_faults_show_in_random_models():
    """Catches random weights under which a competitor without queries, masks, positions or a layer passes as right."""

    base = models.random_model("BERT-base", vocab_size=500)

    def vectors(fault=None, masked=True):
        model = base if fault is None else copy.deepcopy(base)
        with torch.no_grad():
            if fault is not None:
                fault(model)
            hidden = model(input_ids=ids, attention_mask=mask if masked else None).last_hidden_state
        return (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)

    lengths = torch.tensor([[30], [11], [19], [5]])
    mask = (torch.arange(30) < lengths).long()
    ids = torch.randint(1, 500, mask.shape, generator=torch.Generator().manual_seed(2)) * mask
    right = vectors()
    loosest = 0.1  # of any competitor: bound_of

    def without_queries(model):
        for layer in model.encoder.layer:
            layer.attention.self.query.weight.zero_()

    def without_positions(model):
        model.embeddings.position_embeddings.weight.zero_()

    def without_a_layer(model):
        del model.encoder.layer[7]

    assert rms_error(right.roll(1, 0), right) > 2 * loosest, "texts are too much alike"
    assert rms_error(vectors(masked=False), right) > 2 * loosest
    for fault in (without_queries, without_positions, without_a_layer):
        assert rms_error(vectors(fault), right) > 2 * loosest, fault.__name__


def test_time_budget_and_file_after_each_case(tmp_path, monkeypatch):
    """Catches a run that overshoots its time, or keeps nothing until its end."""
    now, path, kept, limits = [0.0], tmp_path / "r.json", [], []

    def taking_ten_seconds(case, device, *, max_seconds, **rest):
        kept.append(len(Results.load(path).rows) if path.exists() else 0)
        limits.append(max_seconds)
        now[0] += 10.0
        return suites.Outcome([Row("s", case.workload, OURS, "float32")])

    monkeypatch.setattr(suites, "run_case", taking_ten_seconds)
    cases = [case_of(Fake(OURS), Fake("eager"), workload=f"w{i}") for i in range(5)]
    run_cases(cases, CPU, Recorder(path, CPU), deadline=Deadline(27.0, clock=lambda: now[0]))
    assert kept == [0, 1, 2] and limits == [27 / 5 / 3, 17 / 4 / 3, 7 / 3 / 3]
    results = Results.load(path)
    assert [row.workload for row in results.rows] == ["w0", "w1", "w2"]
    assert results.notes["not_reached"] == [case.name for case in cases[3:]]


def test_schedule_shares_what_is_left_by_weight():
    """Catches a late case that gets nothing though an early one was quick, or one begun that cannot end in time."""
    now = [100.0]
    case = case_of(Fake(OURS), Fake("eager"))
    cases = [dataclasses.replace(case, workload=f"w{i}", weight=weight) for i, weight in enumerate((1.0, 2.0, 1.0))]
    schedule = Schedule(cases, Deadline(60.0, clock=lambda: now[0]))
    with schedule.turn(cases[0]) as seconds:
        assert seconds == 60 * 1 / 4 / 3
        now[0] += 12.0
    with schedule.turn(cases[1]) as seconds:
        assert seconds == 48 * 2 / 3 / 3
        now[0] += 43.0
    with schedule.turn(cases[2]) as seconds:
        assert seconds is None  # five seconds left, and one like it took 43


def test_schedule_knows_how_long_other_models_take():
    """Catches a large model begun with no time left, because none of its cases has run, or MiniLM left out for it."""
    now = [0.0]
    case = dataclasses.replace(case_of(Fake(OURS), Fake("eager")), model="small")
    cases = [case, *(dataclasses.replace(case, model="large", scale=scale) for scale in (5.0, 1.5, 9.0)), case]
    schedule = Schedule(cases, Deadline(100.0, clock=lambda: now[0]))
    seconds = (20.0, None, 40.0, None, 5.0)
    for one, expected in zip(cases, seconds, strict=True):
        with schedule.turn(one) as share:
            assert (share is None) == (expected is None), one
            now[0] += expected or 0.0


def test_session_of_pytest_stops_and_says_what_is_missing(tmp_path, monkeypatch):
    """Catches `make bench` that overruns its time, or a case left out without a word."""
    monkeypatch.setattr(ceilings, "measure", lambda device, quick: CEILINGS)
    case = case_of(Fake(OURS), Fake("eager"))
    session = Session(CPU, tmp_path, 30.0, [case, case], quick=True)
    assert session.run(case).rows[0].status == OK
    session.schedule.deadline = Deadline(-1.0)
    assert session.run(case) is None
    results = Results.load(tmp_path / "suite.json")
    assert len(results.rows) == 2 and results.ceilings == CEILINGS and results.notes["not_reached"] == [case.name]


def test_documents_variable_over_fixed(tmp_path):
    """Catches a ratio of workload (d) that is upside down or between different competitors."""
    recorder = Recorder(tmp_path / "r.json", CPU)
    for workload, rates in (("documents fixed", {"a": 100.0, "b": 50.0}), ("documents variable", {"a": 90.0})):
        recorder.add([Row("model", workload, name, "float32", tokens_per_second=x) for name, x in rates.items()])
    ratios = {(row.workload, row.competitor): row.extra.get("variable_over_fixed") for row in recorder.results.rows}
    assert ratios == {
        ("documents fixed", "a"): None, ("documents fixed", "b"): None, ("documents variable", "a"): 0.9,
    }  # fmt: skip


def test_ceilings_are_measured_once(tmp_path, monkeypatch):
    """Catches ceilings of zero, measured anew for each suite, or taken over from another machine."""
    measured = ceilings.measure(CPU, quick=True, size=64)
    assert set(measured) == {ceilings.COPY, ceilings.matmul_key("float32"), ceilings.matmul_key("bfloat16")}
    assert all(value > 0 for value in measured.values())
    calls = []
    monkeypatch.setattr(ceilings, "measure", lambda device, quick: calls.append(1) or measured)
    assert ceilings.cached(CPU, tmp_path) == ceilings.cached(CPU, tmp_path) == measured and len(calls) == 1
    for n, (key, value) in enumerate((("device", "another"), ("commit", "0123456789")), start=2):
        other = Results.load(tmp_path / ceilings.FILE)
        other.environment[key] = value
        other.save(tmp_path / ceilings.FILE)
        ceilings.cached(CPU, tmp_path)
        assert len(calls) == n


def test_cold_start_times_processes(tmp_path, monkeypatch):
    """Catches a cold start of this process, a ratio upside down, or a failing library that takes the rest along."""
    script = tmp_path / "start.py"
    script.write_text(
        "import json, sys\n"
        "if sys.argv[1] == 'sentence-transformers': sys.exit('planted')\n"
        "print('noise'); print(json.dumps({'total': {'fastbert': 1.0, 'transformers': 3.0}[sys.argv[1]]}))"
    )
    monkeypatch.setattr(suite_start, "SCRIPT", script)
    rows = {row.competitor: row for row in suite_start.run(tmp_path, CPU, "float32", rounds=2, model="m")}
    assert rows[OURS].seconds == rows[OURS].extra["cold_start_seconds"] == 1.0 and rows[OURS].rounds == 2
    assert rows["transformers"].speedup == 3.0
    assert (rows["sentence-transformers"].status, rows["sentence-transformers"].detail) == (FAILED, "planted")


class Benchmark:
    """Stands for pytest-benchmark's fixture."""

    def __init__(self):
        self.extra_info, self.timed = {}, 0

    def pedantic(self, run, **settings):
        self.timed += 1


def test_benchmark_of_a_wrong_fastbert_fails(tmp_path, monkeypatch):
    """Catches a wrong fastbert whose speed pytest-benchmark shows."""
    import test_speed

    monkeypatch.setattr(ceilings, "measure", lambda device, quick: CEILINGS)
    good, wrong = (case_of(Fake(OURS, factor=factor), Fake("eager")) for factor in (1.0, 1.1))
    session = Session(CPU, tmp_path, 60.0, [good, wrong], quick=True)
    benchmark = Benchmark()
    test_speed.hold(good, session, benchmark)
    assert benchmark.timed == 1 and benchmark.extra_info["rows"][0]["status"] == OK
    benchmark = Benchmark()
    with pytest.raises(AssertionError, match="wrong: error"):
        test_speed.hold(wrong, session, benchmark)
    assert benchmark.timed == 0 and benchmark.extra_info["rows"][0]["seconds"] is None
