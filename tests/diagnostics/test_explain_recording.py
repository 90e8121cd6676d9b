"""The dry run of explain records what a run does, and nothing of the model or the process notices it."""

from __future__ import annotations

import copy
import dataclasses
import logging
import re
import threading
from typing import Any

import pytest
import torch
from torch import nn

import fastbert
from family_cases import config_of_transformers
from fastbert import BertConfig, BertModel, SentenceEncoder, Tokenizer
from fastbert.diagnostics.explain import above
from fastbert.diagnostics.explain.dry_run import N_SEQUENCES, N_TOKENS, Question, dry_run, recorder_for
from fastbert.engine import cpu_encoder
from fastbert.models import tasks
from fastbert.ops import attention_plan, recording
from fastbert.ops.recording import Record
from fastbert.pipelines.modules import Dense, Normalize


def config(**changes: Any) -> BertConfig:
    sizes: dict[str, Any] = {
        "vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "max_position_embeddings": 40,
    }  # fmt: skip
    return BertConfig(**{**sizes, **changes})


def records_of_a_dry_run(model: Any, outer: Any = None) -> list[Record]:
    question = Question(model, model if outer is None else outer, model.policy, model.device, None, None)
    eight_bit = above.eight_bit_decision(above_bert(model), model.policy, model.device, model.dtype, None)
    encoder, others = dry_run(question, recorder_for(question), eight_bit)
    return in_letters([*encoder, *others])


def above_bert(model: Any) -> Any:
    return model if isinstance(model, BertModel) else model.bert


def in_letters(records: list[Record]) -> list[Record]:
    """The same records with "T" and "B" for numbers of rows, of which oneDNN may be given some more."""

    def shape(rows: Any) -> Any:
        return None if rows is None else ("B" if rows[0] == N_SEQUENCES else "T", *rows[1:])

    return [dataclasses.replace(r, before=shape(r.before), after=shape(r.after)) for r in records]


def run_of(model: Any) -> list[Record]:
    """What a run of as many sequences records."""
    ids = torch.randint(1, 100, (N_SEQUENCES, N_TOKENS // N_SEQUENCES), device=model.device)
    if isinstance(model, tasks.BertForMultipleChoice):
        ids = ids.view(N_SEQUENCES // 2, 2, -1)
    with torch.no_grad(), recording.recorded() as recorder:
        model(ids)
    return in_letters(recorder.records)


@pytest.fixture(autouse=True)
def operation_by_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_encoder, "obstacles", lambda *args: iter(["planted"]))


@pytest.mark.parametrize("settings", [{}, {"batch_invariant": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["auto", "triton", "torch"])
@pytest.mark.parametrize("head", [BertModel, tasks.BertForPreTraining, tasks.BertForMultipleChoice])
def test_a_dry_run_records_what_a_run_does(
    head: Any, backend: str, dtype: torch.dtype, settings: dict[str, Any], device: torch.device
) -> None:
    """Catches an operation that decides otherwise on stand-ins than on tensors, or is not reached."""
    if settings and backend == "torch":
        pytest.skip("batch_invariant excludes the backend 'torch'")
    model = head(config(), backend=backend, **settings).eval().to(device, dtype)
    dry = records_of_a_dry_run(model)
    try:
        assert run_of(model) == dry
    except fastbert.BackendError:
        assert any(record.raises for record in dry)
    else:
        assert not any(record.raises for record in dry)


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu_new"])
@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert", "electra"])
def test_families_and_activations(model_type: str, activation: str, device: torch.device) -> None:
    """Catches a head of another family, or an activation without a kernel, that the dry run passes by."""
    changes: dict[str, Any] = {"pad_token_id": 1} if model_type == "roberta" else {}
    changes |= {"embedding_size": 16} if model_type == "electra" else {}
    for backend in ("torch", "triton"):
        settings = config(model_type=model_type, hidden_act=activation, **changes)
        model = tasks.BertForSequenceClassification(settings, backend=backend).eval().to(device)
        assert run_of(model) == records_of_a_dry_run(model)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_8_bits(precision: str, backend: str, device: torch.device) -> None:
    """Catches an operation on 8-bit operands that is recorded otherwise than it runs."""
    model = BertModel(config(), backend=backend, precision=precision).eval().to(device)
    records = records_of_a_dry_run(model)
    assert run_of(model) == records and sum(record.op.startswith("linear in") for record in records) == 8


def test_training_mode(device: torch.device) -> None:
    """Catches weights that are said to be packed, or a fused dropout, in training mode."""
    model = BertModel(config(), backend="torch").to(device)
    assert run_of(model) == records_of_a_dry_run(model)


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("pooling", ["mean", "cls", ("max", "weightedmean")])
def test_sentence_encoder(pooling: Any, batch_invariant: bool, device: torch.device) -> None:
    """Catches a pooling, or a module after it, that is recorded otherwise than it runs."""
    tokenizer = Tokenizer.train(["some texts", "and more of them"], vocab_size=60)
    settings = config(vocab_size=tokenizer.vocab_size)
    model = BertModel(settings, batch_invariant=batch_invariant, backend="triton").to(device)
    width = 32 if isinstance(pooling, str) else 64
    encoder = SentenceEncoder(model, tokenizer, pooling, [Dense(width, 16), Normalize()])
    dry = [record for record in records_of_a_dry_run(model, encoder) if record.backend != "module"]
    with recording.recorded() as recorder:
        encoder.encode(["some texts and more of them"] * N_SEQUENCES)
    assert in_letters(recorder.records) == dry


@pytest.mark.parametrize("precision", [None, "int8"])
@pytest.mark.parametrize(("dtype", "arch"), [(torch.float32, 80), (torch.bfloat16, 80), (torch.bfloat16, 90)])
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_kernels_are_those_that_are_launched(
    batch_invariant: bool, dtype: torch.dtype, arch: int, precision: str | None, device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Catches a report of other kernels or block sizes than those that a recorded operation launches."""
    from fastbert_kernels import few_rows, launch

    if batch_invariant and precision is not None:
        pytest.skip("no 8-bit Triton kernel is batch-invariant")
    if device.type == "cpu":
        monkeypatch.setattr(launch, "arch", lambda device: arch)
    elif launch.arch(device) != arch:
        pytest.skip("this GPU is another")
    how = {"backend": "triton", "precision": precision, "batch_invariant": batch_invariant}
    model = tasks.BertForMaskedLM(config(num_hidden_layers=1), **how).eval().to(device, dtype)
    launched: list[Any] = []
    real_run = launch.run

    def run(kernel: Any, grid: Any, sizes: dict[str, int], **arguments: Any) -> None:
        launched.append((kernel.fn.__module__, sizes))
        real_run(kernel, grid, sizes, **arguments)

    monkeypatch.setattr(launch, "run", run)
    for name in ("SHORT_BATCH", "SHORT_TEXTS"):  # the report has the tile of other batches, and names that of these
        monkeypatch.setattr(attention_plan, name, 0)
    monkeypatch.setattr(attention_plan, "_tile_sizes", attention_plan._tile_sizes.__wrapped__)  # remembers nothing
    monkeypatch.setattr(few_rows, "BUCKETS", ())
    report = fastbert.explain(model)
    assert not launched
    run_of(model)
    assert [(row.kernel, row.block_sizes) for row in report.rows if row.block_sizes is not None] == launched


@pytest.mark.parametrize("hooked", [False, True])
def test_sums_are_in_norms_where_layers_are_launched(
    hooked: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a report of a module's norm where the kernel of the layers adds a residual too, or the reverse."""
    from fastbert_kernels import few_rows, launch

    theirs = config_of_transformers("modernbert", num_hidden_layers=3)
    model: Any = BertModel(BertConfig.from_dict(theirs.to_dict()), backend="triton").eval().to(device)
    model.cuda_graphs = False
    if hooked:
        model.encoder.layer[2].register_forward_hook(lambda *_: None)
    launched: list[str] = []
    real_run = launch.run

    def run(kernel: Any, *others: Any, **arguments: Any) -> None:
        launched.append(kernel.fn.__module__)
        real_run(kernel, *others, **arguments)

    monkeypatch.setattr(launch, "run", run)
    monkeypatch.setattr(few_rows, "BUCKETS", ())
    kernels = [row.kernel for row in fastbert.explain(model).rows if row.op == "layer_norm" for _ in _layers_of(row)]
    with torch.no_grad():
        model(torch.randint(1, 100, (2, 5), device=device))
    norms = [name for name in launched if name.endswith(("layer_norm", "sum_norm"))]
    assert sorted(kernels) == sorted(norms)
    assert set(norms) == {f"fastbert_kernels.{'layer_norm' if hooked else 'sum_norm'}"}
    elsewhere = fastbert.explain(model, device="cuda:0", arch=90, dtype="bfloat16").rows  # a GPU that is not there
    assert {row.kernel for row in elsewhere if row.op == "layer_norm"} == set(norms)


def _layers_of(row: Any) -> range:
    """Returns as many numbers as the row stands for layers."""
    found = re.search(r"layer\.(\d+)(?:-(\d+))?", row.module)
    return range(1) if found is None or found[2] is None else range(int(found[2]) - int(found[1]) + 1)


def boom(*args: Any) -> None:
    raise AssertionError("a hook was called")


@pytest.mark.parametrize("everywhere", [False, True])
def test_nothing_notices(everywhere: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a dry run that calls hooks or modules of the user, draws random numbers, logs, or leaves something."""
    model = tasks.BertForMaskedLM(config(hidden_act="silu"), backend="triton")
    model.bert.encoder.layer[0].attention.self.query = nn.Sequential(nn.Linear(32, 32))
    for module in model.modules():
        module.register_forward_hook(boom)
    before = copy.copy({name: dict(module.__dict__) for name, module in model.named_modules()})
    random, events = torch.get_rng_state(), fastbert.compile_events()
    handle = nn.modules.module.register_module_forward_pre_hook(boom) if everywhere else None
    try:
        with caplog.at_level(logging.DEBUG):
            for how in ({}, {"arch": 90}, {"backend": "torch"}, {"strict": True}):
                fastbert.explain(model, [3, 4], **how)
    finally:
        if handle is not None:
            handle.remove()
    assert not caplog.records and torch.equal(random, torch.get_rng_state())
    assert fastbert.compile_events() == events and recording.on == 0
    for name, module in model.named_modules():
        attributes = before[name]
        assert attributes.keys() == module.__dict__.keys()
        for key, value in module.__dict__.items():
            assert key == "_watch" or value is attributes[key], (name, key)


def test_recorders_are_of_one_thread() -> None:
    """Catches a run of another thread that a dry run records, or that computes nothing because of it."""
    model = BertModel(config(), backend="torch").eval()
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        expected = model(ids).last_hidden_state
    outputs: list[Any] = []

    def run() -> None:
        with torch.no_grad():
            outputs.append(model(ids).last_hidden_state)

    with recording.recorded(recording.Recorder(dry=True)) as recorder:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert torch.equal(outputs[0], expected) and recorder.records == []


def test_a_recorder_goes_when_a_run_fails() -> None:
    """Catches operations that record for ever after an error."""
    model = BertModel(config(), backend="torch").eval()
    with pytest.raises(IndexError), recording.recorded():
        model(torch.tensor([[1000]]))
    assert recording.on == 0
    with recording.recorded() as outer, recording.recorded() as inner, torch.no_grad():
        model(torch.tensor([[1]]))
    assert inner.records and not outer.records


def test_a_layer_of_another_kind() -> None:
    """Catches a layer that the user put in the place of ours, and that runs in the dry run or is missing."""

    class Layer(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError("called")

    model = BertModel(config(num_hidden_layers=3)).eval()
    model.encoder.layer[1] = Layer()
    rows = {row.module: row for row in fastbert.explain(model).rows}
    assert rows["encoder.layer.1"].backend == "module" and rows["encoder.layer.1"].kernel.endswith("Layer")
    assert "encoder.layer.2.output.LayerNorm" in rows and "encoder.layer.0.output.LayerNorm" in rows


def test_inference_tensors() -> None:
    """Catches a weight that is said to be packed though its changes are not counted."""
    with torch.inference_mode():
        model = BertModel(config()).eval().to(torch.float64).to(torch.float32)
    assert run_of(model) == records_of_a_dry_run(model)
