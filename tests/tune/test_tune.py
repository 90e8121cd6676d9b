"""`fastbert tune` times candidates, here with a made-up clock, and models follow the table that it writes."""

from __future__ import annotations

import errno
import json
import logging
import re
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from fastbert import BertConfig, BertModel
from fastbert.cli.main import main
from fastbert.diagnostics.explain.entry import explain
from fastbert.tune import search
from fastbert.tune.candidates import Candidate
from fastbert.tune.jobs import Job, default_models, jobs_of
from fastbert.tune.work import Work
from fastbert_kernels import configs, launch, quantized_configs, tables

CONFIG = BertConfig(hidden_size=32, intermediate_size=48, num_attention_heads=2, num_hidden_layers=1, vocab_size=50)
GPU, ARCH = "Test GPU 80GB", 80
TILE = {"BLOCK_ROWS": 64, "BLOCK_COLS": 32, "BLOCK_K": 32, "GROUP_ROWS": 4, "num_warps": 4, "num_stages": 2}
SMALL = Candidate("linear", tuple(sorted(TILE.items())))


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """A machine with one GPU, by its tables, and an empty cache; `machine(...)` makes it another."""

    def change(*gpus):
        monkeypatch.setattr(tables, "gpus", lambda: list(gpus))
        tables.use_table(None)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    change((GPU, ARCH))
    yield change
    monkeypatch.undo()
    tables.use_table(None)


def jobs(**changes):
    return jobs_of([("tiny", CONFIG)], [torch.bfloat16], **{"arch": ARCH, **changes})


def job(epilogue, candidates):
    """One GEMM of the tiny model with a few candidates."""
    all_jobs = [j for j in jobs(only=["gemm"]) if j.op == "gemm"]
    (only_job,) = [j for j in all_jobs if j.epilogue == epilogue and j.sizes != (48, 32)]
    return Job(only_job.op, only_job.key, only_job.title, only_job.dtype, only_job.sizes, epilogue, tuple(candidates))


def clock(seconds):
    """A timer that gives each candidate `seconds(name, number of calls before)`, and runs nothing."""
    calls = []

    def timer(runs, device):
        calls.append(list(runs))
        return {name: seconds(name, len(calls) - 1) for name in runs}

    return timer


def table(**changes):
    content = {"version": 1, "arch": ARCH, "device": GPU, "date": "2026-01-02", "source": "a test"}
    entries = {
        "linear": {"float16/32x96/none": TILE},
        "gemm": {
            "float16/32x96/none": {"kernel": "linear", "ours": "linear"},
            "float16/32x48/gelu": {"kernel": "cublas"},
        },
    }
    return {**content, **entries, **changes}


def cache(content, name=GPU):
    path = tables.cache_folder() / tables.file_name(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    tables.forget()
    return path


def test_jobs():
    """Catches a shape of a layer that is not tuned, one that is tuned twice, or a key with a number of tokens in it."""
    all_jobs = jobs()
    few = [j for j in all_jobs if j.op == "few_rows"]
    shapes, buckets = ("32x32/residual", "32x48/gelu", "48x32/residual"), (64, 128, 256, 512)
    assert {j.key for j in few} == {f"float16/{shape}/{bucket}" for shape in shapes for bucket in buckets}
    assert all(j.key.endswith(f"/{j.tokens[0]}") for j in few)
    assert [(j.op, j.key) for j in all_jobs if j not in few] == [
        ("gemm", "float16/32x96/none"),
        ("gemm", "float16/32x32/residual"),
        ("gemm", "float16/32x48/gelu"),
        ("gemm", "float16/48x32/residual"),
        ("attention", "float16/16"),
    ]
    assert len(jobs_of([("a", CONFIG), ("b", CONFIG)], [torch.bfloat16, torch.float16], ARCH)) == len(all_jobs)
    assert len(jobs_of(default_models(), [torch.bfloat16, torch.float32], 90)) == 2 * (3 * 4 + 2) + 3 * 3 * 4
    assert {j.op for j in jobs(only=["attention"])} == {"attention"}


@pytest.mark.parametrize("arch", sorted(launch.SHARED_MEMORY))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_candidates(arch, dtype):
    """Catches a comparison without cuBLAS or today's tile, a tile twice, or descriptors where there are none."""
    for each in jobs_of(default_models(), [dtype], arch):
        candidates = each.candidates
        assert len(set(candidates)) == len(candidates) > 3
        kernels = {c.kernel for c in candidates}
        if each.op == "attention":
            today = configs.attention_config(dtype, each.sizes[1], arch).block_sizes
            assert candidates[0].sizes == {k: v for k, v in today.items() if k != "BLOCK_D"}
            continue
        if each.op == "few_rows":
            assert kernels == {"cublas", "split_linear" if each.epilogue == "residual" else "linear"}
            continue
        descriptors = {"linear_persistent"} if arch in (90, 100) and dtype.itemsize == 2 else set()
        specialized = {"linear_specialized"} if arch == 90 and dtype.itemsize == 2 else set()
        assert kernels == {"cublas", "linear"} | descriptors | specialized
        ours = configs.gemm(dtype, arch, each.sizes, each.epilogue)
        assert Candidate(ours.ours, tuple(sorted(ours.config.block_sizes.items()))) in candidates
        assert all(c.sizes["num_warps"] == 4 for c in candidates if c.kernel == "linear_specialized")
        # Whether epilogues have a tile of which each thread holds 128 sums.
        whole = [c.sizes for c in candidates[1:] if c.kernel != "linear_specialized"]
        sums = {sizes["BLOCK_ROWS"] * sizes["BLOCK_COLS"] // (32 * sizes["num_warps"]) for sizes in whole}
        assert (max(sums) >= 128) == (dtype.itemsize == 2 and each.epilogue != "residual")


@pytest.mark.parametrize("arch", sorted(launch.SHARED_MEMORY))
def test_candidates_of_8_bit_linears(arch):
    """Catches a comparison without today's kernel and tile, or descriptors or fp8 on a GPU without them."""
    all_jobs = jobs_of(default_models(), [], arch, precisions=("fp8", "int8"))
    classes = {"int8"} | ({"float8"} if arch >= 89 else set())
    assert {j.key.split("/")[0] for j in all_jobs} == classes and {j.op for j in all_jobs} == {"quantized_gemm"}
    assert len(all_jobs) == 12 * len(classes)
    for job in all_jobs:
        assert len(set(job.candidates)) == len(job.candidates) > 3
        persistent = arch == 90 or (arch == 100 and job.dtype != torch.int8)
        kernels = {"quantized_linear"} | ({"quantized_linear_persistent"} if persistent else set())
        kernels |= {"quantized_linear_specialized"} if arch == 90 else set()
        assert {c.kernel for c in job.candidates} == kernels
        out_dtype = job.dtype if job.epilogue == "gelu" else torch.bfloat16
        ours = quantized_configs.quantized_gemm(job.dtype, arch, job.sizes, job.group, out_dtype)
        assert ours.ours == ("quantized_linear_persistent" if persistent else "quantized_linear")
        assert Candidate(ours.ours, tuple(sorted(ours.config.block_sizes.items()))) in job.candidates
        for candidate in job.candidates:
            step = candidate.sizes["BLOCK_K"]
            assert job.group is None or job.group % step == 0 or step == 32
            assert job.epilogue != "gelu" or candidate.sizes["BLOCK_COLS"] % 128 == 0


@pytest.mark.parametrize(("precision", "arch"), [("fp8", 90), ("int8", 90), ("int8", ARCH)])
def test_8_bit_linears(precision, arch, monkeypatch, device):
    """Catches a candidate that computes something else than the model does, or a choice that is not followed."""
    config = BertConfig(hidden_size=32, intermediate_size=160, num_attention_heads=1)
    monkeypatch.setattr(launch, "arch", lambda device: arch)
    monkeypatch.setattr(tables, "gpus", lambda: [(GPU, arch)])
    all_jobs = jobs_of([("tiny", config)], [], arch, precisions=[precision])
    first = "quantized_linear"  # the slower one without a table
    timer = clock(lambda name, call: 1.0 if name.startswith(f"{first} ") else 2.0)
    outcomes = search.tune(all_jobs, device, [40], timer=timer, say=lambda text: None)
    for outcome in outcomes:
        assert outcome.rejected == {} and list(outcome.seconds) == list(outcome.job.candidates)
        assert "quantized_linear" in str(outcome)
    tuned = search.table_of(outcomes, GPU, arch, [40], date="2026-01-02")
    search.write(tuned, tables.cache_folder() / tables.file_name(GPU))
    assert len(tuned["quantized_gemm"]) == len(tuned[first]) == 4 and tuned["gemm"] == {}
    for job in all_jobs:
        out_dtype = job.dtype if job.epilogue == "gelu" else torch.bfloat16
        chosen = quantized_configs.quantized_gemm(job.dtype, arch, job.sizes, job.group, out_dtype)
        assert (chosen.choice, chosen.ours) == (first, first) and "measured on" in chosen.choice_source
        assert chosen.config.block_sizes == tuned[first][job.key]
    report = explain(BertModel(config, precision=precision).eval(), arch=arch, dtype="bfloat16")
    rows = [row for row in report.rows if row.op == "quantized_linear"]
    assert {row.kernel for row in rows} == {f"fastbert_kernels.{first}"}
    assert all(row.source.count("measured on Test GPU") == 2 for row in rows)
    again = search.table_of(outcomes[:1], GPU, arch, [40], before=tuned)
    assert again["quantized_gemm"] == tuned["quantized_gemm"]


def test_every_candidate_of_a_layer_is_right(capsys, device):
    """Catches a way of running a candidate that computes something else than the model does, in any op."""
    outcomes = search.tune(jobs(), device, [64], timer=clock(lambda name, call: 1.0), say=lambda text: None)
    for outcome in outcomes:
        assert outcome.rejected == {} and list(outcome.seconds) == list(outcome.job.candidates)


def test_the_clock(device, monkeypatch):
    """Catches a clock that times another candidate, or none."""
    monkeypatch.setattr(search, "ROUNDS", 3)
    runs = {str(n): (lambda n=n: time.sleep(n / 1000)) for n in (1, 4)}
    seconds = search.cuda_timer(runs, torch.device("cpu"))
    assert 0.001 <= seconds["1"] < 0.004 <= seconds["4"]
    (outcome,) = search.tune([job("none", [Candidate("cublas"), SMALL])], device, [16], say=lambda text: None)
    assert all(len(times) == 1 and times[0] > 0 for times in outcome.seconds.values()) and len(outcome.seconds) == 2


@pytest.mark.gpu
def test_on_a_gpu():
    """Catches a candidate that the GPU refuses, or a clock that gives nothing."""
    arch = launch.arch(torch.device("cuda"))
    config = BertConfig(hidden_size=384, intermediate_size=1536, num_attention_heads=12)
    all_jobs = jobs_of([("MiniLM", config)], [torch.bfloat16], arch)
    for outcome in search.tune(all_jobs, torch.device("cuda"), [256], say=lambda text: None):
        assert outcome.best() is not None and all(seconds[0] > 0 for seconds in outcome.seconds.values())
        assert not any(reason.startswith("wrong") for reason in outcome.rejected.values())


def test_choice_over_numbers_of_tokens(device):
    """Catches a choice by one number of tokens, or by the sum, in which the largest alone counts."""
    # Twice as fast at the two small sizes, a third slower at the large one.
    times = {"cublas": (2e-6, 4e-6, 3e-4), str(SMALL): (1e-6, 2e-6, 4e-4)}
    (outcome,) = search.tune(
        [job("none", [Candidate("cublas"), SMALL])], device, [16, 32, 48], timer=clock(lambda n, i: times[n][i]),
        say=lambda text: None,
    )  # fmt: skip
    assert outcome.best() == SMALL and outcome.best("cublas") == Candidate("cublas")
    assert outcome.seconds[SMALL] == [1e-6, 2e-6, 4e-4]
    tuned = search.table_of([outcome], GPU, ARCH, [16, 32, 48], date="2026-01-02")
    entry = tuned["gemm"]["float16/32x96/none"]
    assert entry == {
        "kernel": "linear", "ours": "linear",
        "microseconds": {"cublas": [2.0, 4.0, 300.0], "linear": [1.0, 2.0, 400.0]},
    }  # fmt: skip
    assert tuned["linear"] == {"float16/32x96/none": TILE}
    assert (tuned["device"], tuned["arch"], tuned["date"]) == (GPU, ARCH, "2026-01-02") and "tokens" in tuned["source"]


def test_wrong_and_failing_candidates_are_left_out(monkeypatch, device):
    """Catches a kernel that is fastest because it is wrong, or one broken tile that ends the command."""
    tiles = {n: Candidate("linear", tuple(sorted({**TILE, "GROUP_ROWS": n}.items()))) for n in (1, 2, 4)}
    call = Work.call

    def planted(self, candidate):
        run = call(self, candidate)
        if candidate == tiles[1]:
            return lambda: run() * 1.02
        return (
            run if candidate != tiles[2] else lambda: (_ for _ in ()).throw(RuntimeError("no room\nout of resources"))
        )

    monkeypatch.setattr(Work, "call", planted)
    said = []
    (outcome,) = search.tune(
        [job("gelu", [Candidate("cublas"), *tiles.values()])], device, [16],
        timer=clock(lambda n, i: 1.0 if n == "cublas" else 0.5), say=said.append,
    )  # fmt: skip
    assert list(outcome.seconds) == [Candidate("cublas"), tiles[4]] and outcome.best() == tiles[4]
    assert outcome.rejected[tiles[1]].startswith("wrong: error 0.0") and "bound" in outcome.rejected[tiles[1]]
    assert outcome.rejected[tiles[2]] == "RuntimeError: out of resources"
    assert "left out" in said[0]


def test_table_is_gone_by(monkeypatch, device):
    """Catches a table that is written and not read, or read for another shape, or a report without its source."""
    times = {"cublas": 3.0, str(SMALL): 2.0}
    outcomes = search.tune(
        [job("none", [Candidate("cublas"), SMALL]), job("gelu", [Candidate("cublas"), SMALL])], device, [16, 32],
        timer=clock(lambda n, i: times[n] if i < 2 else 1.0 / times[n]), say=lambda text: None,
    )  # fmt: skip
    before = configs.gemm(torch.bfloat16, ARCH, (32, 96), "none")
    path = tables.cache_folder() / tables.file_name(GPU)
    search.write(search.table_of(outcomes, GPU, ARCH, [16, 32], date="2026-01-02"), path)
    assert path.name == "test-gpu-80gb.json" and before.choice is None
    choice = configs.gemm(torch.bfloat16, ARCH, (32, 96), "none")
    assert (choice.choice, choice.ours, choice.config.block_sizes) == ("linear", "linear", TILE)
    assert choice.choice_source == f"{path} (measured on {GPU}, 2026-01-02)"
    # cuBLAS was the faster one here; ours is known all the same, for where cuBLAS may not be taken.
    choice = configs.gemm(torch.float16, ARCH, (32, 48), "gelu_tanh")
    assert (choice.choice, choice.config.block_sizes) == ("cublas", TILE)
    assert configs.gemm(torch.bfloat16, ARCH, (32, 97), "none").config.block_sizes != TILE
    assert configs.gemm(torch.float32, ARCH, (32, 96), "none").choice is None
    report = explain(BertModel(CONFIG).eval(), arch=ARCH, dtype="bfloat16")
    rows = {row.module: row for row in report.rows if row.op == "linear"}
    qkv, up = rows["encoder.layer.0.attention.self.query+key+value"], rows["encoder.layer.0.intermediate.dense"]
    assert (qkv.kernel, qkv.block_sizes) == ("fastbert_kernels.linear", TILE) and str(path) in qkv.source
    assert "cuBLAS" in up.kernel and "measured on Test GPU" in up.source
    with launch.recording(ARCH):
        assert "tuned/sm_80.json" in configs.linear_config(torch.bfloat16, ARCH, (32, 96)).source


def test_attention_table(device):
    """Catches a tile of the attention that is timed but not taken."""
    (only_job,) = jobs(only=["attention"])
    fastest = only_job.candidates[3]
    (outcome,) = search.tune(
        [only_job], device, [64], timer=clock(lambda n, i: 1.0 if n == str(fastest) else 2.0), say=lambda text: None
    )
    search.write(search.table_of([outcome], GPU, ARCH, [64]), tables.cache_folder() / tables.file_name(GPU))
    assert configs.attention_config(torch.float16, 16, ARCH).block_sizes == {**fastest.sizes, "BLOCK_D": 16}
    assert "sm_80.json" in configs.attention_config(torch.float16, 64, ARCH).source


def test_earlier_shapes_stay(caplog, device):
    """Catches a second run, for another model, that forgets the first, or a broken table that stops the command."""
    (outcome,) = search.tune(
        [job("gelu", [Candidate("cublas"), SMALL])], device, [16], timer=clock(lambda n, i: 1.0), say=lambda text: None
    )
    path = cache(table())
    tuned = search.table_of([outcome], GPU, ARCH, [16], before=search.read_earlier(path, GPU, ARCH))
    assert tuned["linear"]["float16/32x96/none"] == TILE and set(tuned["gemm"]) == set(table()["gemm"])
    assert tuned["gemm"]["float16/32x48/gelu"] != table()["gemm"]["float16/32x48/gelu"]
    for content in ("{", table(device="Another GPU"), table(version=0)):
        caplog.clear()
        assert search.read_earlier(cache(content), GPU, ARCH) is None
        assert str(path) in caplog.text and "it will be replaced" in caplog.text
    path.unlink()
    assert search.read_earlier(path, GPU, ARCH) is None


BAD = {
    "not a readable table": "{",
    "expected a table of block sizes of version 1": {**table(), "version": 99},
    "made for Another GPU (sm_80), but this GPU is Test GPU 80GB (sm_80)": table(device="Another GPU"),
    "made for Test GPU 80GB (sm_90)": table(arch=90),
    "linear: expected an object": table(linear=[]),
    "linear -> x: lacks BLOCK_COLS": table(linear={"x": {k: 1 for k in TILE if k != "BLOCK_COLS"}}),
    "linear -> x: expected whole numbers, got BLOCK_K = '32'": table(linear={"x": {**TILE, "BLOCK_K": "32"}}),
    "gemm -> x: expected kernel of": table(gemm={"x": {"kernel": "mkl"}}),
}


@pytest.mark.parametrize("problem", BAD)
def test_bad_table_in_the_cache(problem, caplog):
    """Catches a broken table in the cache that stops a model, or is left without a word."""
    path = cache(BAD[problem])
    with caplog.at_level(logging.WARNING, "fastbert"):
        assert "tuned/sm_80.json" in configs.linear_config(torch.bfloat16, ARCH).source
        configs.attention_config(torch.bfloat16, 64, ARCH)
    (record,) = caplog.records
    assert str(path) in record.getMessage() and problem in record.getMessage()
    assert "taking the table that ships" in record.getMessage()


@pytest.mark.parametrize("problem", BAD)
def test_bad_table_that_was_named(problem, tmp_path):
    """Catches a table that the user names and that is ignored without a word."""
    path = tmp_path / "mine.json"
    path.write_text(BAD[problem] if isinstance(BAD[problem], str) else json.dumps(BAD[problem]))
    with pytest.raises(ValueError, match=re.escape(str(path))) as error:
        search.use_table(path)
    assert problem.partition(", but")[0] in str(error.value)
    assert "tuned/sm_80.json" in configs.linear_config(torch.bfloat16, ARCH).source
    with pytest.raises(ValueError, match="not a readable table"):
        search.use_table(tmp_path / "missing.json")


def test_named_table_goes_before_the_cache(tmp_path):
    """Catches a table in the cache that wins over the one that the user named."""
    cache(table())
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(table(linear={"float16": {**TILE, "GROUP_ROWS": 7}}, gemm={})))
    search.use_table(str(path))
    assert configs.linear_config(torch.bfloat16, ARCH, (32, 96)).block_sizes["GROUP_ROWS"] == 7
    search.use_table(None)
    assert configs.linear_config(torch.bfloat16, ARCH, (32, 96)).block_sizes == TILE


def test_whose_table(machine, caplog):
    """Catches a table of another GPU that is taken, or two different GPUs that nothing tells apart."""
    cache(table())
    assert configs.linear_config(torch.bfloat16, ARCH, (32, 96)).block_sizes == TILE
    assert "sm_90.json" in configs.linear_config(torch.bfloat16, 90, (32, 96)).source
    machine(("Another GPU", ARCH))
    assert "sm_80.json" in configs.linear_config(torch.bfloat16, ARCH, (32, 96)).source
    machine()
    assert "sm_80.json" in configs.linear_config(torch.bfloat16, ARCH, (32, 96)).source
    machine((GPU, ARCH), (GPU, ARCH), ("Old GPU", 75))
    assert configs.linear_config(torch.bfloat16, ARCH, (32, 96)).block_sizes == TILE
    assert not caplog.records
    machine((GPU, ARCH), ("Another GPU", ARCH))
    assert "sm_80.json" in configs.linear_config(torch.bfloat16, ARCH, (32, 96)).source
    assert "different GPUs of sm_80" in caplog.text


def test_cache_folder(monkeypatch):
    """Catches a cache that does not follow the XDG base directory specification."""
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert tables.cache_folder() == Path("/elsewhere/fastbert/tuned")
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert tables.cache_folder() == Path("/home/someone/.cache/fastbert/tuned")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tables.cache_folder() == Path("/home/someone/.cache/fastbert/tuned")


def test_full_disk(monkeypatch):
    """Catches a full disk that leaves half a table, loses the old one, or is found out after minutes of timing."""
    path = cache(table())
    content = path.read_text()

    def full(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    for attempt, text in (
        (lambda: search.write(table(date="2027-01-01"), path), "cannot be written .No space left on device.*unchanged"),
        (lambda: search.check_writable(path), "No space left on device.*nothing was measured"),
    ):
        with pytest.raises(OSError, match=text) as error:
            attempt()
        assert error.value.filename == str(path) and error.value.errno == errno.ENOSPC
    assert path.read_text() == content and list(path.parent.iterdir()) == [path]


def test_command_without_a_gpu(monkeypatch, capsys):
    """Catches a command that tunes a CPU, passes without a GPU, or does not say why."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for argv in ([], ["--dry-run"], ["--device", "cpu"], ["--device", "cuda:1"]):
        assert main(["tune", *argv]) == 2
        out, err = capsys.readouterr()
        assert out == "" and "there is nothing to tune here: tables are of NVIDIA GPUs, and there is none here" in err
    with pytest.raises(SystemExit) as stop:
        main(["tune", "--arch", "90"])
    assert stop.value.code == 2 and "--arch: expected only with --dry-run" in capsys.readouterr().err


def test_dry_run(capsys):
    """Catches a dry run that leaves out what would be timed, or writes."""
    assert main(["tune", "--dry-run", "--arch", "90", "--tokens", "64", "128", "--only", "gemm"]) == 0
    out = capsys.readouterr().out
    assert "compute capability 9.0: 48 shapes, each at 64, 128 tokens" in out
    assert (
        "BERT-base up, gemm float16/768x3072/gelu: " in out
        and "\n  cublas\n" in out
        and "linear_specialized BLOCK_COLS" in out
    )
    assert str(tables.cache_folder()) in out and not tables.cache_folder().exists()


def test_command(tmp_path, monkeypatch, capsys, device):
    """Catches a command that loses the model's shapes or its options on the way to the table."""
    monkeypatch.setattr(search, "device_obstacle", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(launch, "arch", lambda device: ARCH)
    run = search.tune
    monkeypatch.setattr(
        search, "tune", lambda j, where, n: run(j, device, n, timer=clock(lambda name, i: float(len(name))))
    )
    BertModel(CONFIG).save_pretrained(tmp_path / "model")
    assert (
        main(["tune", str(tmp_path / "model"), "--only", "gemm", "--tokens", "16", "--out", str(tmp_path / "t.json")])
        == 0
    )
    out = capsys.readouterr().out
    assert "float16/32x96/none" in out and f"written: {tmp_path / 't.json'}" in out
    tuned = tables.read_table_for(tmp_path / "t.json", GPU, ARCH)
    assert len(tuned["gemm"]) == 4 and tuned["attention"] == {} and not tables.cache_folder().exists()
    assert main(["tune", str(tmp_path / "model"), "--only", "attention", "--tokens", "16"]) == 0
    assert set(tables.read_table_for(tables.cache_folder() / "test-gpu-80gb.json", GPU, ARCH)["attention"]) == {
        "float16/16"
    }
    assert main(["tune", "--check", str(tmp_path / "t.json")]) == 0 and GPU in capsys.readouterr().out
    (tmp_path / "t.json").write_text(json.dumps(table(device="Another GPU")))
    assert main(["tune", "--check", str(tmp_path / "t.json")]) == 1
    assert f"{tmp_path / 't.json'}: made for Another GPU" in capsys.readouterr().err


def test_no_tuning_at_run_time(monkeypatch, device):
    """Catches a model that times anything by itself."""
    monkeypatch.setattr(search.measure, "interleave", lambda *args, **kwargs: pytest.fail("timed at run time"))
    model = BertModel(CONFIG, backend="triton").to(device).eval()
    for n in (1, 7):
        model(torch.ones(1, n, dtype=torch.int64, device=device))
    assert not tables.cache_folder().exists()


def test_part_of_the_gpu_run(tmp_path, monkeypatch, device):
    """Catches a run on a GPU that tunes nothing, writes into the user's cache, or does not stop when its time is up."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    import gpu_options
    import gpu_parts

    from fastbert.bench.results import Results

    options = gpu_options.Options(tmp_path, device.type, quick=True)
    monkeypatch.setattr(search, "device_obstacle", lambda device: "there is none here")
    assert gpu_parts.run("tune", options, 60.0) == 0
    assert "there is none here" in Results.load(tmp_path / "tune.json").notes["tuned_table"]
    monkeypatch.setattr(search, "device_obstacle", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU)
    monkeypatch.setattr(launch, "arch", lambda device: ARCH)
    monkeypatch.setattr(gpu_parts, "_precisions", lambda device: [])
    monkeypatch.setattr(gpu_parts, "default_models", lambda: [("tiny", CONFIG)])
    run, timer = search.tune, clock(lambda name, i: float(len(name)))
    monkeypatch.setattr(search, "tune", lambda j, device, n, say: run(j, device, n, timer=timer, say=say))
    assert gpu_parts.run("tune", options, 60.0) == 0
    tuned = tables.read_table_for(tmp_path / "tuned" / "test-gpu-80gb.json", GPU, ARCH)
    assert len(tuned["gemm"]) == 4 and len(tuned["attention"]) == 1 and not tables.cache_folder().exists()
    assert Results.load(tmp_path / "tune.json").notes["tuned_shapes"] == "17 of 17"
    assert gpu_parts.run("tune", options, 0.0) == 1
