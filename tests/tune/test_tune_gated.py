"""`fastbert tune` times the products of layers with a gate, and models follow the table that it writes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from family_cases import config_of_transformers
from fastbert import BertConfig, BertModel
from fastbert.diagnostics.explain.entry import explain
from fastbert.tune import search
from fastbert.tune.candidates import Candidate
from fastbert.tune.jobs import Job, jobs_of
from fastbert.tune.work import Work
from fastbert_kernels import few_rows, launch, quantized_configs, tables

GPU = "Test GPU 80GB"


@pytest.fixture(autouse=True)
def cache(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An empty cache of tables."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tables.use_table(None)
    yield
    monkeypatch.undo()
    tables.use_table(None)


def config_of(model_type: str, **sizes: int) -> BertConfig:
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 160, "num_hidden_layers": 1, **sizes}
    return BertConfig.from_dict(config_of_transformers(model_type, **sizes).to_dict())


def gated_jobs(config: BertConfig, arch: int, precision: str) -> list[Job]:
    jobs = jobs_of([("tiny", config)], [], arch, precisions=[precision])
    return [job for job in jobs if job.op == "quantized_gated_gemm"]


@pytest.mark.parametrize("model_type", ["modernbert", "gte"])
def test_products_are_those_of_the_layers(model_type: str) -> None:
    """Catches a shape that no layer with a gate has, and an epilogue that its kernels do not run."""
    jobs = jobs_of([("tiny", config_of(model_type))], [torch.bfloat16], 90, only=["gemm"], precisions=["fp8"])
    assert [(job.op, job.key) for job in jobs] == [
        ("gemm", "float16/32x96/none"), ("gemm", "float16/32x32/none"), ("gemm", "float16/32x320/gated"),
        ("gemm", "float16/160x32/none"),
        *(("few_rows", f"float16/32x320/gated/{n_rows}") for n_rows in few_rows.BUCKETS),
        ("quantized_gemm", "float8/32x96/row"),
        ("quantized_gemm", "float8/32x32/group16"), ("quantized_gated_gemm", "float8/32x160"),
        ("quantized_gemm", "float8/160x32/group128"),
    ]  # fmt: skip


@pytest.mark.parametrize("arch", sorted(launch.SHARED_MEMORY))
def test_candidates(arch: int) -> None:
    """Catches a comparison without today's tile, a tile of other columns, or descriptors where there are none."""
    for precision, dtype in (("int8", torch.int8), ("fp8", torch.float8_e4m3fn)):
        jobs = gated_jobs(config_of("modernbert", hidden_size=768, intermediate_size=1152), arch, precision)
        assert len(jobs) == (precision == "int8" or arch >= 89)
        for job in jobs:
            assert len(set(job.candidates)) == len(job.candidates) > 3
            persistent = (arch, dtype == torch.int8) in quantized_configs.GATED_ON_DESCRIPTORS
            kernels = {"quantized_gated_linear"} | ({"quantized_gated_linear_persistent"} if persistent else set())
            assert {c.kernel for c in job.candidates} == kernels
            assert all(c.sizes["BLOCK_COLS"] == 128 for c in job.candidates)
            today = quantized_configs.quantized_gated_gemm(dtype, arch, job.sizes)
            assert today.choice is None and today.ours == max(kernels, key=len)
            assert Candidate(today.ours, tuple(sorted(today.config.block_sizes.items()))) in job.candidates


def test_a_choice_is_right_and_followed(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Catches a candidate that computes something else than the model does, or a choice that is not followed."""
    precision, arch = "fp8", 90
    monkeypatch.setattr(launch, "arch", lambda device: arch)
    monkeypatch.setattr(tables, "gpus", lambda: [(GPU, arch)])
    config = config_of("modernbert", num_attention_heads=1)
    (job,) = gated_jobs(config, arch, precision)
    fastest = job.candidates[1]  # on pointers, with another tile than today's

    def timer(runs: Any, device: torch.device) -> dict[str, float]:
        return {name: 1.0 if name == str(fastest) else 2.0 for name in runs}

    (outcome,) = search.tune([job], device, [40], timer=timer, say=lambda text: None)
    assert outcome.rejected == {} and list(outcome.seconds) == list(job.candidates)
    assert "quantized_gated_linear" in str(outcome)
    tuned = search.table_of([outcome], GPU, arch, [40], date="2026-01-02")
    search.write(tuned, tables.cache_folder() / tables.file_name(GPU))
    chosen = quantized_configs.quantized_gated_gemm(job.dtype, arch, job.sizes)
    assert (chosen.choice, chosen.ours) == ("quantized_gated_linear",) * 2
    assert chosen.config.block_sizes == fastest.sizes == tuned["quantized_gated_linear"][job.key]
    report = explain(BertModel(config, precision=precision).eval(), arch=arch, dtype="bfloat16")
    (row,) = [row for row in report.rows if row.op == f"gated in {precision}" or "gated" in row.kernel]
    assert row.kernel == "fastbert_kernels.quantized_gated_linear"
    assert row.source.count("measured on Test GPU") == 2
    assert search.table_of([], GPU, arch, [40], before=tuned)["quantized_gated_gemm"] == tuned["quantized_gated_gemm"]


def test_16_bits_are_timed_with_their_gate(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Catches a candidate in 16 bits that computes something else, is timed without its gate, or is not followed."""
    monkeypatch.setattr(launch, "arch", lambda device: 90)
    monkeypatch.setattr(tables, "gpus", lambda: [(GPU, 90)])
    config = config_of("modernbert", num_attention_heads=1)
    jobs = [job for job in jobs_of([("tiny", config)], [torch.bfloat16], 90, only=["gemm"]) if job.epilogue == "gated"]
    assert [job.title for job in jobs][:2] == ["tiny up and gate", "tiny up and gate, 64 tokens"]
    kernels = {candidate.kernel for candidate in jobs[0].candidates}
    assert kernels == {"cublas", "linear", "linear_persistent"}  # with warps that only load there is no such kernel
    cublas, pointer, *_, last = jobs[0].candidates
    first, few = (
        replace(jobs[0], candidates=(cublas, pointer, last)),
        replace(jobs[1], candidates=jobs[1].candidates[:2]),
    )

    def timer(runs: Any, device: torch.device) -> dict[str, float]:
        return {name: 1.0 if name == str(cublas) else 2.0 for name in runs}

    outcomes = search.tune([first, few], device, [40], timer=timer, say=lambda text: None)
    assert [outcome.rejected for outcome in outcomes] == [{}, {}]
    tuned = search.table_of(outcomes, GPU, 90, [40], date="2026-01-02")
    assert tuned["gemm"][first.key]["kernel"] == "cublas"
    model = BertModel(config).eval()
    assert any("gated_linear" in row.kernel for row in explain(model, arch=90, dtype="bfloat16").rows)
    search.write(tuned, tables.cache_folder() / tables.file_name(GPU))
    tables.use_table(None)
    rows = explain(model, arch=90, dtype="bfloat16").rows
    assert not any("gated_linear" in row.kernel for row in rows) and any(row.op == "gated" for row in rows)


def test_a_wrong_gate_is_left_out(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Catches a check in which the halves of the product could change places."""
    monkeypatch.setattr(launch, "arch", lambda device: 80)
    (job,) = gated_jobs(config_of("gte"), 80, "int8")
    job = replace(job, candidates=job.candidates[:2])
    call = Work.call

    def swapped(self: Work, candidate: Candidate) -> Any:
        if candidate == job.candidates[0]:
            n = job.sizes[1]
            self.q_weight.data.copy_(self.q_weight.data.roll(n, 0))
            self.q_weight.scale.copy_(self.q_weight.scale.roll(n, 0))
            self.bias.copy_(self.bias.roll(n, 0))
            run = call(self, candidate)
            out = run()
            for tensor in (self.q_weight.data, self.q_weight.scale, self.bias):
                tensor.copy_(tensor.roll(n, 0))
            return lambda: out
        return call(self, candidate)

    monkeypatch.setattr(Work, "call", swapped)
    (outcome,) = search.tune([job], device, [16], timer=lambda runs, d: dict.fromkeys(runs, 1.0), say=lambda text: None)
    (reason,) = outcome.rejected.values()
    assert list(outcome.rejected) == [job.candidates[0]] and reason.startswith("wrong: error")
