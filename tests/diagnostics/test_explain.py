"""explain says what runs, and runs nothing itself."""

from __future__ import annotations

import inspect
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastbert
from fastbert import BertConfig, BertModel
from fastbert.diagnostics.explain.entry import Report, explain
from fastbert.models import tasks
from fastbert.ops import dispatch, onednn, packed_linear
from fastbert.pipelines.modules import Dense, Normalize
from fastbert_kernels import cpu
from helpers import source_env

HEADS = [
    tasks.BertForPreTraining,
    tasks.BertForMaskedLM,
    tasks.BertForNextSentencePrediction,
    tasks.BertForSequenceClassification,
    tasks.BertForMultipleChoice,
    tasks.BertForTokenClassification,
    tasks.BertForQuestionAnswering,
]


def config(**changes: Any) -> BertConfig:
    sizes: dict[str, Any] = {
        "vocab_size": 101,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 56,
        "max_position_embeddings": 40,
    }
    return BertConfig(**{**sizes, **changes})


def rows_of(report: Report, op: str) -> list[Any]:
    return [row for row in report.rows if row.op == op]


def reasons(report: Report, op: str) -> set[str | None]:
    return {row.reason for row in rows_of(report, op)}


def test_cpu_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a missing operation, a wrong order or a reason without a fallback, on PyTorch's CPU operations."""
    monkeypatch.setattr(cpu.library, "load", lambda: (None, "planted"))
    monkeypatch.setattr(onednn, "packing_obstacle", lambda dtype: "planted")
    report = explain(BertModel(config()).eval())
    ops = ["linear", "attention", "linear", "layer_norm", "linear", "linear", "layer_norm"]
    assert [row.op for row in report.rows] == ["embedding", *ops, "pooling", "linear"]
    assert {row.backend for row in report.rows} == {"cpu"}
    assert {row.reason for row in report.rows} == {None}
    assert all(row.block_sizes is None and not row.raises for row in report.rows)
    assert report.rows[2].module == "encoder.layer.0-2.attention.self"
    assert report.rows[1].shapes == "(T, 32) -> (T, 96), + bias"
    assert report.rows[5].kernel == "torch.nn.functional.linear, torch.nn.functional.gelu"
    assert (report.model, report.device, report.dtype, report.backend) == ("BertModel", "cpu", "float32", "auto")


@pytest.mark.skipif(cpu.obstacle() is not None, reason=str(cpu.obstacle()))
def test_cpu_encoder_is_explained() -> None:
    """Catches an encoder said to run in one call that does not, or not said where it does."""
    model = BertModel(config()).eval()
    assert "one call: without gradients, the encoder's operations run in one call" in str(explain(model))
    assert "one call: no: the backend is 'torch'" in str(explain(model, backend="torch"))
    assert "one call: no: the C++ kernels do not multiply torch.float64" in str(explain(model, dtype="float64"))
    model.train()
    assert "one call: no: a module of the encoder" in str(explain(model))
    assert "one call" not in str(explain(model, arch=90))


@pytest.mark.parametrize("kernels", ["C++", "oneDNN"])
def test_cpu_rows_of_packed_weights(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a product or an attention named as PyTorch's where it is not, a residual added where it is not."""
    if kernels == "oneDNN":
        monkeypatch.setattr(cpu.library, "load", lambda: (None, "planted"))
    if packed_linear.packing_obstacle(torch.float32) is not None or (kernels == "C++" and cpu.obstacle() is not None):
        pytest.skip(f"{packed_linear.packing_obstacle(torch.float32)}, {cpu.obstacle()}")
    rows = explain(BertModel(config()).eval()).rows
    products = [row for row in rows if row.op == "linear"]
    named = {
        "C++": f"fastbert_kernels.cpu, {cpu.instructions()}, weights packed",
        "oneDNN": "torch.ops.mkldnn._linear_pointwise, weights packed",
    }
    assert {row.kernel for row in products} == {named[kernels]}
    (attention,) = (row for row in rows if row.op == "attention")
    assert attention.kernel.startswith("fastbert_kernels.cpu, AVX") == (kernels == "C++")
    assert (attention.source == "PyTorch's: planted") == (kernels == "oneDNN")
    assert products[1].shapes == "(T, 32) -> (T, 32), + bias + residual"
    assert [row.shapes for row in rows if row.op == "layer_norm"] == ["(T, 32) -> (T, 32)"] * 2
    double = explain(BertModel(config()).double().eval()).rows
    assert "torch.nn.functional.linear" in {row.kernel for row in double}


def test_fallback_shows_its_reason(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a fallback without its reason, and a question that logs or raises as running does."""
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    model = BertModel(config())
    with caplog.at_level(logging.DEBUG, logger="fastbert"):
        report = explain(model, backend="triton")
        strict = explain(model, backend="triton", strict=True)
    assert not caplog.records
    dispatched = [row for row in report.rows if row.reason]
    assert {row.op for row in dispatched} == {"embedding", "attention", "layer_norm", "linear", "pooling"}
    assert {row.backend for row in dispatched} == {"cpu"} and not any(row.raises for row in dispatched)
    assert "Triton's interpreter is off" in dispatched[0].reason
    assert "falls back: the tensors are on the CPU" in str(report)
    assert [row.raises for row in strict.rows] == [row.reason is not None for row in strict.rows]
    assert "raises BackendError: the tensors are on the CPU" in str(strict) and "strict" in str(strict)


@pytest.mark.parametrize(
    ("changes", "op", "reason"),
    [
        ({"hidden_size": 320, "num_attention_heads": 2}, "attention", "head size 160 is not from 16 to 128"),
        ({"hidden_size": 32, "num_attention_heads": 4}, "attention", "head size 8 is not from 16 to 128"),
        ({"hidden_size": 5000, "num_attention_heads": 50}, "layer_norm", "hidden size 5000 is above 4096"),
        ({"hidden_size": 5000, "num_attention_heads": 50}, "embedding", "hidden size 5000 is above 4096"),
        ({"hidden_size": 5000, "num_attention_heads": 50}, "pooling", "hidden size 5000 is above 4096"),
    ],
)
def test_shapes_that_kernels_cannot_take(changes: dict[str, int], op: str, reason: str) -> None:
    """Catches an obstacle of an op that the report does not ask about."""
    with torch.device("meta"):
        model = BertModel(config(**changes))
    report = explain(model.eval(), arch=90, dtype=torch.bfloat16)
    assert reasons(report, op) == {reason}
    assert {row.backend for row in rows_of(report, op)} == {"torch"}


def test_other_obstacles() -> None:
    """Catches a report that overlooks training mode, autocast, mixed dtypes or an activation without a kernel."""
    model = BertModel(config(attention_probs_dropout_prob=0.2))
    assert {row.reason for row in explain(model, arch=90).rows} == {None}  # dropout has kernels
    model.eval()
    assert {row.reason for row in explain(model, arch=90).rows} == {None}
    with torch.autocast("cuda", dtype=torch.bfloat16) if torch.cuda.is_available() else torch.autocast("cpu"):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        assert "autocast is on" in reasons(explain(model, device=device, backend="triton"), "attention")
    assert {"there are no Triton kernels for torch.float64"} == reasons(
        explain(model, arch=90, dtype="float64"), "embedding"
    )
    relu = explain(BertModel(config(hidden_act="relu")).eval(), arch=90)
    assert "there is no Triton kernel for 'relu'" in reasons(relu, "linear")
    model.bfloat16()
    model.encoder.layer[1].output.LayerNorm.float()
    mixed = [row for row in explain(model, arch=90).rows if row.reason is not None]
    assert [(row.module, row.reason) for row in mixed] == [
        ("encoder.layer.1.output.LayerNorm", "mixed dtypes: torch.bfloat16, torch.float32")
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_arch_of_a_gpu_that_is_not_there(dtype: torch.dtype) -> None:
    """Catches block sizes of another architecture than the one asked about, or without their source."""
    from fastbert_kernels import configs

    report = explain(BertModel(config()).eval(), arch=90, dtype=dtype)
    (attention,) = rows_of(report, "attention")
    expected = configs.attention_config(dtype, 16, 90)
    assert attention.backend == "triton" and attention.kernel == "fastbert_kernels.attention"
    small = "" if dtype == torch.float32 else "; short texts and short batches take 64 x 64"
    assert (attention.block_sizes, attention.source) == (expected.block_sizes, expected.source + small)
    assert attention.source.startswith("tuned/sm_90.json (")
    assert "tuned/sm_90.json" in str(report) and "compute capability 9.0" in report.device
    norm = rows_of(report, "layer_norm")[0]
    assert norm.block_sizes == configs.rowwise_config(32) and norm.source.endswith("configs.rowwise_config")
    intermediate = [row for row in report.rows if row.module == "encoder.layer.0-2.intermediate.dense"]
    if dtype == torch.float32:
        assert [row.kernel for row in intermediate] == ["torch.nn.functional.linear (cuBLAS)", "fastbert_kernels.gelu"]
        assert "IEEE float32 has no tensor cores" in intermediate[0].source
        assert any("IEEE float32" in note for note in report.notes)
    else:
        (gemm,) = intermediate
        assert gemm.kernel == "fastbert_kernels.linear_persistent"
        assert gemm.block_sizes == configs.linear_persistent_config(dtype, 90, epilogue="gelu").block_sizes
        assert "the activation is in the epilogue; tuned/sm_90.json" in gemm.source
        assert gemm.source.endswith("; up to 512 tokens others by fastbert_kernels.few_rows")


def test_arch_too_old_or_too_new() -> None:
    """Catches an old GPU shown with kernels that it cannot run, and a new one without any."""
    model = BertModel(config()).eval()
    assert "the kernels need compute capability 8.0, and this GPU has 7.5" in reasons(
        explain(model, arch=75), "pooling"
    )
    assert rows_of(explain(model, arch=103), "attention")[0].source.startswith("tuned/sm_100.json")
    assert {row.backend for row in explain(model, arch=90, backend="torch").rows} == {"torch"}
    assert reasons(explain(model, arch=90, backend="cpu"), "attention") == {"the tensors are on cuda"}


class Adapter(nn.Linear):
    """Stands for an adapter that took a linear's place."""


class WordAdapter(nn.Embedding):
    """Stands for an adapter that took the word embeddings' place."""


def test_modules_that_are_called_as_they_are() -> None:
    """Catches an adapter or a hook whose linear is reported as fused."""
    model = BertModel(config(num_hidden_layers=4)).eval()
    model.encoder.layer[1].attention.self.key = Adapter(32, 32)
    model.encoder.layer[2].intermediate.dense.register_forward_hook(lambda *args: None)
    model.encoder.layer[2].output.dense = Adapter(56, 32)
    model.encoder.layer[3].attention.output.dense = nn.Linear(32, 32, bias=False)
    model.embeddings.word_embeddings = WordAdapter(101, 32)
    report = explain(model, arch=90, dtype=torch.bfloat16)
    called = {row.module: row for row in report.rows if row.backend == "module"}
    assert list(called) == [
        "embeddings.word_embeddings",
        "encoder.layer.1.attention.self.query",
        "encoder.layer.1.attention.self.key",
        "encoder.layer.1.attention.self.value",
        "encoder.layer.2.intermediate.dense",
        "encoder.layer.2.output.dense",
        "encoder.layer.3.attention.output.dense",
    ]
    assert called["embeddings.word_embeddings"].kernel.endswith("WordAdapter")
    assert "without a bias" in called["encoder.layer.3.attention.output.dense"].reason
    assert called["encoder.layer.1.attention.self.key"].kernel.endswith("Adapter")
    assert "not a plain torch.nn.Linear" in called["encoder.layer.1.attention.self.key"].reason
    assert "hooks" in called["encoder.layer.2.intermediate.dense"].reason
    modules = [row.module for row in report.rows]
    assert "encoder.layer.0.attention.self.query+key+value" in modules
    assert "encoder.layer.1.attention.self.query" in modules
    after_hook = next(row for row in rows_of(report, "bias_gelu"))
    assert after_hook.module == "encoder.layer.2.intermediate.dense"
    assert after_hook.kernel == "fastbert_kernels.gelu" and "+ bias" not in after_hook.shapes
    norm = next(row for row in report.rows if row.module == "encoder.layer.2.output.LayerNorm")
    assert norm.shapes == "(T, 32) -> (T, 32), + residual"


@pytest.mark.parametrize("head", HEADS)
def test_heads(head: Any) -> None:
    """Catches a linear of a head that the report lacks, or gives a wrong shape."""
    model = head(config(num_hidden_layers=1)).eval()
    report = explain(model)
    modules = {row.module.removesuffix(".query+key+value") for row in report.rows if row.op == "linear"}
    expected = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    apart = ("query", "key", "value")
    expected = {name.rpartition(".")[0] if name.endswith(apart) else name for name in expected}
    assert modules == expected
    assert bool(rows_of(report, "pooling")) == (model.bert.pooler is not None)
    last = report.rows[-1]
    in_rows = "T" if head in (tasks.BertForMaskedLM, *HEADS[-2:]) else "B"
    assert last.shapes.startswith(f"({in_rows}, 32) -> ({in_rows}, ")


def test_wrapped_models_are_found() -> None:
    """Catches a wrapper, such as an adapter library's, whose model is not seen, or an explanation of anything else."""
    inner = tasks.BertForMaskedLM(config())
    report = explain(nn.Sequential(nn.Identity(), inner))
    assert report.model == "Sequential"
    assert [row.module for row in report.rows] == [f"1.{row.module}" for row in explain(inner).rows]
    for other in (nn.Linear(2, 2), "path", None):
        with pytest.raises(TypeError, match="model: expected a BertModel, a model with a head or a SentenceEncoder"):
            explain(other)


def test_sentence_encoder(minilm: Path) -> None:
    """Catches the pooling of a SentenceEncoder left out, or BERT's own pooler shown where it does not run."""
    encoder = fastbert.SentenceEncoder.from_pretrained(minilm, device="cpu")
    report = explain(encoder, arch=90, dtype=torch.bfloat16)
    assert report.model == "SentenceEncoder"
    assert report.rows[0].module == "model.embeddings"
    *_, norm, pooling = report.rows
    assert norm.module == "model.encoder.layer.0-5.output.LayerNorm"
    assert pooling.op == "pooling" and pooling.shapes == "(T, 384) -> (B, 384), mean, L2 normalized, in float32"
    assert pooling.kernel == "fastbert_kernels.pooling" and pooling.block_sizes is not None
    tail = [Dense(768, 5), Normalize()]
    several = fastbert.SentenceEncoder(encoder.model, encoder.tokenizer, ("cls", "lasttoken"), tail)
    rows = explain(several).rows[-4:]
    assert [(row.op, row.module) for row in rows] == [
        ("pooling", "pooling"), ("pooling", "pooling"), ("dense", "tail.0"), ("normalize", "tail.1"),
    ]  # fmt: skip
    assert "cls" in rows[0].shapes and "last" in rows[1].shapes


def test_bad_arguments() -> None:
    """Catches a question about something that does not exist and is answered all the same."""
    model = BertModel(config())
    for arch in (9, 9.0, "90", True):
        with pytest.raises(ValueError, match="arch: expected a compute capability as one integer"):
            explain(model, arch=arch)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="arch: asks about an NVIDIA GPU, but device is 'cpu'"):
        explain(model, arch=90, device="cpu")
    with pytest.raises(ValueError, match="device: got 'cuda:99', but there are"):
        explain(model, device="cuda:99")
    with pytest.raises(ValueError, match="backend: expected one of"):
        explain(model, backend="fast")
    with pytest.raises(ValueError, match="dtype: expected"):
        explain(model, dtype="int8x")
    with torch.device("meta"):
        nowhere = BertModel(config())
    with pytest.raises(ValueError, match="device: the model is on 'meta'"):
        explain(nowhere)


def test_report_as_text_and_json() -> None:
    """Catches columns out of line, a remark printed twice, and values that JSON cannot hold."""
    model = BertModel(config(extra={"output_attentions": True})).eval()
    report = explain(model, arch=90, dtype=torch.bfloat16)
    d = report.to_dict()
    assert json.loads(json.dumps(d)) == d
    assert d["rows"][0]["block_sizes"]["BLOCK_COLS"] == 32
    text = str(report)
    table = text.split("\n\n")[1].splitlines()
    column = table[0].index("backend")
    assert all(line[column - 2 : column] == "  " and line[column] != " " for line in table)
    assert text.count("configs.rowwise_config") == 1
    assert "slow reference path" in text


def test_explain_changes_nothing() -> None:
    """Catches a question that alters the model, or the answer's block sizes altering the launcher's table."""
    model = BertModel(config())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = explain(model, arch=90)
    for row in report.rows:
        if row.block_sizes is not None:
            row.block_sizes.clear()
    assert all(row.block_sizes for row in explain(model, arch=90).rows if row.block_sizes is not None)
    assert model.training and model.policy == dispatch.AUTO
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("first", ["module", "function"])
def test_function_and_module_share_a_name(first: str) -> None:
    """Catches `fastbert.explain(...)` failing after something imported the package of that name."""
    modules = (
        "from fastbert.diagnostics.explain.report import Report as E\n"
        "from fastbert.diagnostics.verify.report import Report as V"
    )
    functions = "assert callable(fastbert.explain) and callable(fastbert.verify)"
    code = "\n".join(
        [
            "import fastbert, inspect, sys",
            *([modules, functions] if first == "module" else [functions, modules]),
            "config = fastbert.BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,",
            "    intermediate_size=8, max_position_embeddings=8)",
            "model = fastbert.BertModel(config)",
            "assert type(fastbert.explain(model)) is E and type(fastbert.verify(model)) is V",
            "assert list(inspect.signature(fastbert.explain).parameters)[0] == 'model'",
            "assert list(inspect.signature(fastbert.verify).parameters)[0] == 'model_or_path'",
            "assert not {'triton', 'fastbert_kernels.launch'} & set(sys.modules), 'nothing here needs a Triton kernel'",
        ]
    )
    env = source_env(TRITON_INTERPRET="0", CUDA_VISIBLE_DEVICES="")
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_public_name() -> None:
    """Catches a public name that is not this function, and one without its signature."""
    model = BertModel(config())
    assert fastbert.explain(model) == explain(model)
    assert list(inspect.signature(fastbert.explain).parameters) == [
        "model", "batch", "device", "dtype", "backend", "strict", "arch", "tokenizer",
    ]  # fmt: skip
