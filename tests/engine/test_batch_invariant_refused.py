"""Batch invariance is refused where it cannot be kept, and explain shows it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastbert import (
    BackendError,
    BertConfig,
    BertForTokenClassification,
    BertModel,
    SentenceEncoder,
    ops,
)
from fastbert.diagnostics.explain.entry import explain
from fastbert.engine import cpu_encoder
from fastbert.ops import Policy, dispatch
from fastbert.ops.packing import from_cu_seqlens
from fastbert.pipelines.modules import Dense, Dropout
from fastbert_kernels import cpu
from helpers import cu_seqlens_of
from invariance_cases import CPU, INVARIANT, SIZES, make, skip_without

pytestmark = [
    pytest.mark.skipif(cpu.obstacle() is not None, reason=str(cpu.obstacle())),
    pytest.mark.usefixtures("number_of_threads"),
]


def test_refused_without_the_kernels(minilm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a promise that rests on PyTorch's own products, whose bits depend on the number of rows."""
    ready = make(), make(precision="int8")
    monkeypatch.setattr(cpu.library, "load", lambda: (None, "the C++ kernels were not compiled"))
    for cls in (BertModel, SentenceEncoder):
        for options in ({}, {"backend": "cpu"}, {"precision": "int8"}):
            with pytest.raises(
                BackendError, match="needs the C.. kernels for CPUs.*: the C.. kernels were not compiled"
            ):
                cls.from_pretrained(minilm, device="cpu", batch_invariant=True, **options)
    ids = torch.ones(1, 9, dtype=torch.int64)
    for model in ready:
        with pytest.raises(BackendError, match="were not compiled"), torch.no_grad():
            model(ids)
    with pytest.raises(BackendError, match="batch_invariant: pooling: the C.. kernels were not compiled"):
        ops.pool(torch.randn(3, 16), cu_seqlens_of([3]), policy=INVARIANT)


def test_refused_without_vnni(minilm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the unquantised path, or the emulation, taken in the place of missing 8-bit kernels."""
    monkeypatch.setattr(cpu, "int8_obstacle", lambda: "the processor has no AVX-512 VNNI")
    with pytest.raises(BackendError, match="batch_invariant: needs the C.. kernels for CPUs.*no AVX-512 VNNI"):
        BertModel.from_pretrained(minilm, batch_invariant=True, precision="int8")
    with pytest.raises(BackendError, match="strict=True: the processor has no AVX-512 VNNI"), torch.no_grad():
        make(precision="int8")(torch.ones(1, 9, dtype=torch.int64))


@pytest.mark.parametrize("backend", ["auto", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_refused_in_other_dtypes(dtype: torch.dtype, backend: str, minilm: Path) -> None:
    """Catches PyTorch's products taken in a dtype that the kernels do not have."""
    with pytest.raises(BackendError, match=f"batch_invariant: the C.. kernels .* do not multiply {dtype}"):
        BertModel.from_pretrained(minilm, dtype=dtype, backend=backend, batch_invariant=True)
    model = make(options={"batch_invariant": True, "backend": backend}).to(dtype)
    with pytest.raises(BackendError, match=f"batch_invariant: linear: .* do not multiply {dtype}"), torch.no_grad():
        model(torch.ones(1, 9, dtype=torch.int64))


def test_refused_sizes() -> None:
    """Catches PyTorch's attention or product taken for a size that the kernels do not have."""
    ids = torch.ones(1, 9, dtype=torch.int64)
    with pytest.raises(BackendError, match="attention: head size 24 is not a multiple"), torch.no_grad():
        make(hidden_size=48)(ids)
    config = BertConfig(**{**SIZES, "hidden_size": 48})
    assert "head size 24 is not a multiple" in str(cpu_encoder.invariant_obstacle(config, torch.float32))
    skip_without(torch.bfloat16)
    config = BertConfig(**{**SIZES, "intermediate_size": 97})
    assert "there are 97 features" in str(cpu_encoder.invariant_obstacle(config, torch.bfloat16))
    assert cpu_encoder.invariant_obstacle(config, torch.float32) is None
    with pytest.raises(BackendError, match="batch_invariant: linear: .* there are 97 features"), torch.no_grad():
        make(torch.bfloat16, intermediate_size=97)(ids)


def test_refused_in_training() -> None:
    """Catches accepted gradients, which go through PyTorch's products, or dropout, which is drawn for a batch."""
    ids, model = torch.ones(1, 9, dtype=torch.int64), make()
    with pytest.raises(BackendError, match="batch_invariant: linear: gradients are needed .torch.no_grad"):
        model(ids)
    with pytest.raises(BackendError, match=r"batch_invariant: embedding: dropout \(p = 0.1\)"), torch.no_grad():
        model.train()(ids)
    x = torch.randn(9, 3 * 64, requires_grad=True)
    with pytest.raises(BackendError, match="batch_invariant: attention: dropout"):
        ops.varlen_attention(x, from_cu_seqlens(cu_seqlens_of([9]), 9, CPU), 2, dropout=0.1, policy=INVARIANT)
    with pytest.raises(BackendError, match="batch_invariant: pooling: gradients are needed"):
        ops.pool(x, cu_seqlens_of([9]), policy=INVARIANT)
    with pytest.raises(BackendError, match="batch_invariant: layer_norm: dropout"):
        w = torch.randn(64)
        ops.linear_residual_layer_norm(x, torch.randn(64, 192), w, x[:, :64], w, w, 1e-12, dropout=0.1,
                                       policy=INVARIANT)  # fmt: skip


def test_refused_under_autocast() -> None:
    """Catches products that autocast hands to PyTorch in bfloat16."""
    ids, model, refused = torch.ones(1, 9, dtype=torch.int64), make(), "batch_invariant: linear: mixed dtypes"
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), pytest.raises(BackendError, match=refused):
        model(ids)


def test_refused_where_a_module_is_called_as_it_is() -> None:
    """Catches an adapter, a hook or attention weights accepted though nothing is known of their bits."""
    ids = torch.ones(1, 4, dtype=torch.int64)
    for path in ("encoder.layer.0.output.dense", "encoder.layer.0.attention.self.key", "pooler.dense",
                 "embeddings.word_embeddings"):  # fmt: skip
        for precision in (None, "int8"):
            if precision is not None and (path.startswith("pooler") or cpu.int8_obstacle() is not None):
                continue
            model = make(precision=precision)
            model.get_submodule(path).register_forward_hook(lambda *args: None)
            with pytest.raises(BackendError, match="adapter"), torch.no_grad():
                model(ids)
    with pytest.raises(BackendError, match="strict=True"):
        make()(ids, output_attentions=True)


@pytest.mark.parametrize("options", [{"precision": "fp8"}, {"precision": "int8", "backend": "triton"}], ids=str)
def test_refused_in_8_bits_of_triton(options: dict[str, str]) -> None:
    """Catches 8-bit kernels of Triton, or their emulation, accepted though nobody has promised anything of them."""
    with pytest.raises(ValueError, match="batch_invariant: not supported together with precision="):
        BertModel(BertConfig(**SIZES), batch_invariant=True, **options)
    q, weight = (ops.quantized.quantize(torch.randn(9, 64), options["precision"]) for _ in range(2))
    with pytest.raises(BackendError, match="batch_invariant: linear: neither the kernels in"):
        ops.quantized.linear(q, weight, None, torch.float32, policy=Policy(batch_invariant=True))
    model = make(precision="int8", options={"batch_invariant": True, "backend": "cpu"})
    model.policy = Policy("triton", batch_invariant=True)  # as it would be on a GPU
    with pytest.raises(BackendError, match="only the C.. kernels for CPUs support it in 8 bits"), torch.no_grad():
        model(torch.ones(1, 9, dtype=torch.int64))


def test_refused_when_traced() -> None:
    """Catches a compiled or exported program that is accepted, whose sums are what the compiler makes of them."""
    ids, model = torch.ones(1, 9, dtype=torch.int64), make()
    refused = "batch_invariant: embedding: torch.compile and torch.export would"
    with pytest.raises(Exception, match=refused):
        torch.export.export(model, (ids,), strict=False)
    with torch.no_grad(), pytest.raises(Exception, match=refused):
        torch.compile(model, backend="eager")(ids)


def test_refused_elsewhere() -> None:
    """Catches the mode accepted for a backend that is PyTorch under another name, or for devices without any kernel."""
    with pytest.raises(ValueError, match="batch_invariant: expected backend 'auto', 'triton' or 'cpu', got 'torch'"):
        Policy("torch", batch_invariant=True)
    there = torch.device("mps")
    assert dispatch.decide("linear", INVARIANT, there, None).backend == "torch"
    with pytest.raises(BackendError, match="batch_invariant: linear: the tensors are neither on a GPU nor on a CPU"):
        dispatch.check_invariant("linear", INVARIANT, "torch")
    policy = Policy("cpu", batch_invariant=True)
    with pytest.raises(BackendError, match="strict=True: the tensors are on mps"):
        dispatch.choose("linear", policy.backend, policy.strict, there, None)
    for options, why in (
        ({"backend": "cpu"}, "backend 'cpu' is set"),
        ({"precision": "int8"}, "no other 8-bit kernels support it"),
    ):
        with pytest.raises(BackendError, match=why):
            BertModel.from_pretrained("nowhere", device="cuda", batch_invariant=True, **options)


def test_explain_shows_the_mode() -> None:
    """Catches a report that shows PyTorch's products, or that does not show what is refused."""
    model = make(kind=BertForTokenClassification)
    report = explain(model)
    assert report.batch_invariant and report.strict and not any(row.raises for row in report.rows)
    kernels = {row.kernel for row in report.rows if row.op in ("linear", "attention")}
    assert all(kernel.startswith("fastbert_kernels.cpu") for kernel in kernels)
    assert any("with gradients running raises BackendError" in note for note in report.notes)
    assert any(note.startswith("one call: without gradients") for note in report.notes)
    refused = explain(model, dtype="float16")
    assert all(row.raises == (row.op in ("linear", "attention")) for row in refused.rows)
    assert "batch_invariant: the C++ kernels" in str(refused) and json.dumps(refused.to_dict())
    trained = explain(model.train())
    assert {row.op for row in trained.rows if row.raises} == {"embedding", "attention", "layer_norm"}
    on_gpu = explain(make(precision="int8"), arch=90)
    assert any("running raises BackendError: batch_invariant" in note for note in on_gpu.notes)


def test_explain_of_a_sentence_encoder(minilm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches modules after the pooling that are shown as called, or oneDNN shown on a processor with AMX."""
    encoder = SentenceEncoder.from_pretrained(minilm, device="cpu", batch_invariant=True, num_hidden_layers=1)
    encoder.tail.extend([Dense(384, 20), Dropout()])
    rows = {row.module: row for row in explain(encoder).rows}
    assert [rows[name].backend for name in ("pooling", "tail.1", "tail.2")] == ["cpu", "cpu", "module"]
    assert all(rows[name].kernel.startswith("fastbert_kernels.cpu") for name in ("pooling", "tail.1"))
    skip_without(torch.bfloat16)
    monkeypatch.setattr(cpu, "has_amx", lambda: True)
    products = [row for row in explain(encoder.to(torch.bfloat16)).rows if row.op == "linear"]
    assert products and all(row.kernel.startswith("fastbert_kernels.cpu") for row in products)
