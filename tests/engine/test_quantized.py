"""Models with precision="fp8" and "int8" are accurate, follow their weights, and fall back with a reason."""

from __future__ import annotations

import copy
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastbert
from fastbert import BackendError, BertConfig, BertModel, SentenceEncoder, ops
from fastbert.diagnostics.explain.entry import explain
from fastbert.diagnostics.verify.entry import QuantizedReport, verify
from fastbert.engine import quantized
from fastbert.models import tasks
from fastbert.ops import dispatch
from fastbert_kernels import cpu
from helpers import docstrings, rms_error

PRECISIONS = ("fp8", "int8")
HEADS = [getattr(tasks, name) for name in fastbert.__all__ if name.startswith("BertFor")]
IDS = [[2, 17, 33, 3], [2, 3], [2, *range(20, 36), 3], [2, 50, 3]]


def config(**changes: Any) -> BertConfig:
    sizes: dict[str, Any] = {
        "vocab_size": 101,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 160,
        "max_position_embeddings": 60,
        "initializer_range": 0.15,
    }
    return BertConfig(**{**sizes, **changes})


def inputs(device: Any = "cpu") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids, mask = torch.randint(101, (4, 17), generator=generator), torch.ones(4, 17)
    mask[0, 5:], mask[2, :3], mask[3] = 0, 0, 0
    return ids.to(device), mask.to(device)


def twins(kind: Any, device: Any, dtype: torch.dtype, *settings: dict[str, Any], **changes: Any) -> list[Any]:
    """Models of one kind with equal weights, one for each settings."""
    models = [kind(config(**changes), **options) for options in settings]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    return [model.eval().to(device, dtype) for model in models]


@pytest.fixture
def model(device: torch.device) -> BertModel:
    return BertModel(config(), backend="triton", precision="int8").eval().to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("sizes", [{}, {"hidden_size": 96, "num_attention_heads": 2, "intermediate_size": 288}])
def test_kernels_give_what_the_emulation_does(
    sizes: dict[str, int], precision: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Catches an operand in the wrong place, a weight of another layer, or an emulation unlike the kernels."""
    options = {"strict": True, "precision": precision}
    plain, emulated, ours = twins(
        BertModel, device, dtype, {}, {"backend": "torch", **options}, {"backend": "triton", **options}, **sizes
    )
    with torch.no_grad():
        expected = plain.to(torch.float64)(*inputs(device), output_hidden_states=True).hidden_states
        twin, kernels = (m(*inputs(device), output_hidden_states=True).hidden_states for m in (emulated, ours))
    assert len(kernels) == 3
    for state, (mine, theirs, exact) in enumerate(zip(kernels, twin, expected, strict=True)):
        assert mine.dtype == dtype
        error, emulations = rms_error(mine, exact), rms_error(theirs, exact)
        assert error <= 1.25 * emulations + 0.5 * torch.finfo(dtype).eps, f"state {state}: {error}, {emulations}"
        assert emulations < 0.15 if precision == "fp8" else emulations < 0.05
        if state:
            assert emulations > 1e-3, "nothing was quantised"
        if dtype == torch.float32:  # only values that a rounding error takes over a boundary differ
            assert rms_error(mine, theirs) <= 0.1 * emulations + 1e-6


@pytest.mark.parametrize("kind", [BertModel, *HEADS], ids=lambda kind: kind.__name__)
def test_heads(kind: Any, device: torch.device, tmp_path: Path) -> None:
    """Catches a model that loses precision on the way to its encoder, or saves other weights than it was given."""
    plain = kind(config()).eval()
    plain.save_pretrained(tmp_path / "plain")
    ours = kind.from_pretrained(tmp_path / "plain", precision="int8", backend="triton", device=device)
    bert = ours if kind is BertModel else ours.bert
    assert (ours.precision, bert.precision) == ("int8", "int8")
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    ids, mask = inputs(device)
    if kind is tasks.BertForMultipleChoice:
        ids, mask = ids.unflatten(0, (2, 2)), mask.unflatten(0, (2, 2))
    output = ours(ids, mask)
    expected = plain.to(device)(ids, mask)
    assert 1e-4 < rms_error(output[0], expected[0].detach()) < 0.2
    assert not output[0].requires_grad
    ours.save_pretrained(tmp_path / "ours")
    again = kind.from_pretrained(tmp_path / "ours")
    assert ours.state_dict().keys() == plain.state_dict().keys() == again.state_dict().keys()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(again.state_dict()[name].to(device), tensor.to(device)), name


def test_packed(model: BertModel) -> None:
    """Catches forward_packed, or embeddings given by the caller, that go around the 8-bit path."""
    ids, _ = inputs(model.device)
    expected = model(ids).last_hidden_state
    lengths = torch.arange(5, dtype=torch.int32) * 17
    assert torch.equal(model.forward_packed(ids.flatten(), lengths), expected.flatten(0, 1))
    embeds = model.embeddings.word_embeddings(ids)
    assert torch.equal(model(inputs_embeds=embeds).last_hidden_state, expected)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_nothing_to_do(precision: str, backend: str, device: torch.device) -> None:
    """Catches a crash or NaN for rows and batches without tokens."""
    model = BertModel(config(), backend=backend, precision=precision).eval().to(device)
    ids = torch.zeros(2, 3, dtype=torch.long, device=device)
    output = model(ids, torch.zeros_like(ids))
    assert (output.last_hidden_state == 0).all() and output.pooler_output.isfinite().all()
    assert model(ids[:0]).last_hidden_state.shape == (0, 3, 64)


def weights_made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []
    right = ops.quantized.quantize_weight

    def quantize_weight(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return right(*args, **kwargs)

    monkeypatch.setattr(ops.quantized, "quantize_weight", quantize_weight)
    return calls


def test_weights_are_quantised_once(model: BertModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a model that quantises its weights for every batch, or keeps them through pickle and copies."""
    calls = weights_made(monkeypatch)
    ids, mask = inputs(model.device)
    first = model(ids, mask).last_hidden_state
    assert len(calls) == 2 * 4
    assert torch.equal(model(ids, mask).last_hidden_state, first) and len(calls) == 8
    with torch.inference_mode():
        model(ids, mask)
    assert len(calls) == 8
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.engine.eight_bit.weights is not model.engine.eight_bit.weights
        assert torch.equal(other(ids, mask).last_hidden_state, first)
    assert len(calls) == 24


@pytest.mark.parametrize("name", ["attention.self.key", "attention.output.dense", "intermediate.dense", "output.dense"])
def test_weights_follow_their_parameters(model: BertModel, name: str) -> None:
    """Catches 8-bit weights that stay behind a parameter that is changed, replaced, loaded, or written silently."""
    ids, mask = inputs(model.device)
    dense = model.encoder.layer[1].get_submodule(name)

    def expected() -> Tensor:
        return copy.deepcopy(model)(ids, mask).last_hidden_state  # without anything kept

    before = model(ids, mask).last_hidden_state
    dense.weight.mul_(-0.5)
    assert not torch.equal(model(ids, mask).last_hidden_state, before)
    assert torch.equal(model(ids, mask).last_hidden_state, expected())
    dense.weight = torch.nn.Parameter(torch.randn_like(dense.weight) * 0.2, requires_grad=False)
    assert torch.equal(model(ids, mask).last_hidden_state, expected())
    model.load_state_dict(BertModel(config()).state_dict())
    assert torch.equal(model(ids, mask).last_hidden_state, expected())
    dense.weight.data.mul_(3)
    model.eval()
    assert torch.equal(model(ids, mask).last_hidden_state, expected())


def test_training_raises(model: BertModel) -> None:
    """Catches a quantised model that trains on something else in silence."""
    ids, mask = inputs(model.device)
    model.train()
    with pytest.raises(RuntimeError, match=r"precision='int8' is for inference: call eval\(\)"):
        model(ids, mask)
    model.eval().requires_grad_(True)
    with pytest.raises(RuntimeError, match="precision='int8' is for inference and has no gradient"):
        model(ids, mask)
    model.requires_grad_(False)
    embeds = model.embeddings.word_embeddings(ids).requires_grad_()
    with pytest.raises(RuntimeError, match="no gradient"):
        model(inputs_embeds=embeds)
    model.encoder.layer[0].attention.self.query.bias.requires_grad_()
    with pytest.raises(RuntimeError, match="no gradient"):
        model(ids, mask)
    with torch.no_grad():
        model(ids, mask)


def test_unknown_precision(tmp_path: Path) -> None:
    """Catches an unknown precision that is taken for none."""
    message = "precision: expected one of 'fp8', 'int8' or None, got 'fp4'"
    BertModel(config()).save_pretrained(tmp_path)
    for make in (
        lambda: BertModel(config(), precision="fp4"),
        lambda: BertModel.from_pretrained(tmp_path, precision="fp4"),
        lambda: tasks.BertForMaskedLM.from_pretrained(tmp_path, precision="fp4"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def reason_of(model: BertModel, **asked: Any) -> str:
    """The reason of the note that explain gives; there is one."""
    notes = [note for note in explain(model, **asked).notes if note.startswith("precision ")]
    assert len(notes) == 1
    return notes[0]


@pytest.mark.parametrize("backend", ["auto", "cpu", "triton"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_cpu_takes_the_unquantised_path(
    precision: str, backend: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a slow emulation or a silent fallback where there is no 8-bit kernel, or strict that does not raise."""
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    monkeypatch.setattr(cpu, "int8_obstacle", lambda: "planted")
    dispatch._log_once.cache_clear()
    plain, ours, strict = twins(
        BertModel, "cpu", torch.float32, {"backend": "cpu"}, {"backend": backend, "precision": precision},
        {"backend": backend, "precision": precision, "strict": True},
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, logger="fastbert"), torch.no_grad():
        for _ in range(2):
            assert torch.equal(ours(*inputs()).last_hidden_state, plain(*inputs()).last_hidden_state)
        logged = [record.getMessage() for record in caplog.records if "8-bit encoder" in record.getMessage()]
        assert len(logged) == 1 and precision in logged[0] and "falls back to 'unquantised'" in logged[0]
        with pytest.raises(BackendError, match=f"precision='{precision}': the backend '{backend}' cannot run it"):
            strict(*inputs())
    assert "falls back to the unquantised path" in reason_of(ours)
    assert "running raises BackendError" in reason_of(strict)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"hidden_act": "relu"}, "there is no Triton kernel for 'relu'"),
        ({"hidden_size": 80, "num_attention_heads": 5}, "hidden size 80 is not a multiple of 32"),
        ({"intermediate_size": 100}, "intermediate size 100 is not a multiple of 32"),
        ({"hidden_size": 96, "num_attention_heads": 4}, "head size 24 is not a multiple of 16"),
        ({"num_attention_heads": 8}, "head size 8 is no"),
    ],
)
def test_sizes_without_kernels(sizes: dict[str, Any], reason: str, device: torch.device) -> None:
    """Catches a model of sizes that the kernels cannot take and that crashes or is quantised otherwise."""
    for backend in ("triton", "torch"):
        if backend == "torch" and "hidden_act" in sizes:
            continue  # the emulation stands for kernels on CPUs too, which have more activations
        options = {"backend": backend, "precision": "int8"}
        plain, ours = twins(BertModel, device, torch.float32, {"backend": backend}, options, **sizes)
        with torch.no_grad():
            states = [m(*inputs(device)).last_hidden_state for m in (ours, plain)]
        assert torch.equal(*states)
        assert reason in reason_of(ours)


def test_altered_parts_take_the_unquantised_path(model: BertModel) -> None:
    """Catches a hook that never runs, or an adapter left out, because the 8-bit path goes around them."""
    ids, mask = inputs(model.device)
    calls: list[str] = []
    names = ["encoder", "embeddings", "encoder.layer.1", "encoder.layer.1.attention.self",
             "encoder.layer.0.attention.self.query", "encoder.layer.0.intermediate.dense"]  # fmt: skip
    for name in names:
        handle = model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
        model(ids, mask)
        assert "hooks" in reason_of(model)
        handle.remove()
    assert calls == names


def test_autocast_takes_the_unquantised_path(model: BertModel) -> None:
    """Catches 8-bit operands where autocast wants to choose dtypes itself."""
    with torch.autocast(model.device.type, torch.bfloat16):
        assert "autocast is on" in reason_of(model)


def test_attentions_take_the_reference(model: BertModel) -> None:
    """Catches a model with a precision that cannot give attentions any more."""
    output = model(*inputs(model.device), output_attentions=True)
    assert len(output.attentions) == 2


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_compiled_model(backend: str, device: torch.device) -> None:
    """Catches an encoder that a compiler cannot pass, or whose 8-bit weights it freezes."""
    model = BertModel(config(), backend=backend, precision="int8").eval().to(device)
    compiled = torch.compile(model, backend="aot_eager")
    ids, mask = inputs(device)
    for _ in range(2):
        assert torch.allclose(compiled(ids, mask).last_hidden_state, model(ids, mask).last_hidden_state, atol=1e-5)
        model.encoder.layer[0].output.dense.weight.mul_(-1)


@pytest.mark.parametrize("backend", ["triton", "torch", "cpu"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_exported_model(precision: str, backend: str, device: torch.device) -> None:
    """Catches a model that cannot be exported, or that is exported for one mask only."""
    model = BertModel(config(), backend=backend, precision=precision).eval().to(device)
    ids, mask = inputs(device)
    program = torch.export.export(model, (ids, mask), strict=False)
    mask[1, 2:] = 0
    if quantized.decide(model, model.policy, model.device, model.dtype).backend == "cpu":
        model.precision = None  # what the C++ kernels run is exported unquantised
    exported, expected = program.module()(ids, mask), model(ids, mask)
    assert torch.allclose(exported.last_hidden_state, expected.last_hidden_state, atol=1e-5)


@pytest.mark.parametrize("part", ["embeddings.LayerNorm", "embeddings.position_embeddings", "embeddings.dropout"])
def test_hooks_on_a_part_of_the_embeddings(part: str, device: torch.device) -> None:
    """Catches a hook that the 8-bit path passes by."""
    model = BertModel(config(), precision="int8").eval().to(device)
    model.get_submodule(part).register_forward_hook(lambda *_: None)
    assert f"{part} is an adapter, has hooks" in reason_of(model, arch=90)


def test_layer_norm_without_a_bias() -> None:
    """Catches a LayerNorm that the 8-bit kernels cannot take, in a layer or before the first."""
    for name in ("encoder.layer.0.output", "embeddings"):
        model = BertModel(config(), precision="int8").eval()
        model.get_submodule(name).LayerNorm = torch.nn.LayerNorm(model.config.hidden_size, bias=False)
        assert "has no bias" in reason_of(model, arch=90)


def test_explain_other_gpus() -> None:
    """Catches fp8 promised for a GPU that cannot multiply it, and a note missing in training mode."""
    fp8, int8 = (BertModel(config(), precision=precision).eval() for precision in PRECISIONS)
    assert "fp8 needs compute capability 8.9, and this GPU has 8.0" in reason_of(fp8, arch=80, dtype="bfloat16")
    for model, arch in ((fp8, 89), (fp8, 90), (fp8, 120), (int8, 80), (int8, 86), (int8, 90)):
        report = explain(model, arch=arch, dtype="bfloat16")
        launches, in_graphs, *_ = report.notes
        assert launches.startswith("launches: 7 kernels a layer, 15 from ids")
        assert in_graphs == "CUDA graphs: a batch of up to 16384 tokens is one launch, without gradients"
        rows = [row for row in report.rows if row.op == "quantized_linear"]
        assert len(rows) == 4 and {row.backend for row in rows} == {"triton"}
        assert all(f"tuned/sm_{arch}.json" in (row.source or "") for row in rows)
        assert rows[0].module == "encoder.layer.0-1.attention.self.query+key+value"
    assert any("training mode raises" in note for note in explain(fp8.train(), arch=90).notes)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_verify_right_models(precision: str, dtype: torch.dtype, device: torch.device) -> None:
    """Catches a false alarm over the error of 8 bits, and a report without the two figures."""
    model = BertModel(config(), backend="triton", precision=precision).eval().to(device, dtype)
    report = verify(model, IDS)
    assert report.ok, str(report)
    assert report.quantized is not None and report.quantized.n_texts == 4
    assert 0.9 < report.quantized.cosine_p1 < 1 and "Spearman of neighbours" in str(report)
    assert report.to_dict()["quantized"]["precision"] == precision
    assert verify(model, IDS[:2]).to_dict()["quantized"]["spearman"] is None
    assert verify(BertModel(config()).eval(), IDS).quantized is None


def test_verify_finds_what_is_wrong(model: BertModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches kernels that are off, or weights that stay behind, that are put down to quantisation."""
    assert verify(model, IDS).ok
    _, scale, _ = model.engine.eight_bit.weights._entries["1.down"].tensors
    scale.mul_(1.1)
    assert verify(model, IDS).problems[0].startswith("encoder.layer.1 is the first wrong output")
    model.eval()
    assert verify(model, IDS).ok
    right = ops.quantized.varlen_attention

    def wrong(*args: Any, policy: Any, **kwargs: Any) -> Any:
        q = right(*args, policy=policy, **kwargs)
        return q if policy.backend == "torch" else q._replace(scale=q.scale * 1.1)

    monkeypatch.setattr(ops.quantized, "varlen_attention", wrong)
    assert verify(model, IDS).problems[0].startswith("encoder.layer.0 is the first wrong output")


def test_verify_holds_the_figures_to_their_bounds() -> None:
    """Catches vectors that quantisation turned too far, or put into another order, and that pass."""
    assert QuantizedReport("fp8", 2000, 0.9981, 0.9991).problem is None
    for report in (QuantizedReport("fp8", 2000, 0.9979, 0.9991), QuantizedReport("fp8", 2000, 0.9981, 0.9989)):
        assert report.problem is not None and "expected at least 0.998 and 0.999" in report.problem
    assert QuantizedReport("fp8", 50, 0.5, 0.5).problem is None


def test_figures_of_verify() -> None:
    """Catches a cosine of the wrong percentile, or a rank correlation of something else than the neighbours."""
    from fastbert.diagnostics.verify.measures import vector_report

    angles = torch.tensor([0.0, 0.1, 0.3, 0.7, 1.5], dtype=torch.float64)
    exact = torch.stack([angles.cos(), angles.sin()], 1)
    same = vector_report("", 3 * exact, exact, exact)
    assert same.spearman == pytest.approx(1) and same.same_nearest == same.same_nearest_10 == 1
    report = vector_report("", exact[[0, 1, 2, 4, 3]], exact, exact)
    assert report.eager_spearman == pytest.approx(1) and report.eager_cosine == (1, 1, 1, 1)
    assert report.cosine[1] == pytest.approx(float(torch.cos(angles[4] - angles[3])), abs=1e-3)
    # For 0, 1 and 2, two of four others change places: 1 - 6 * 2 / (4 * 15) = 0.8. For 3 and 4 the farthest becomes the
    # nearest, or the other way round, and the rest move by one: 1 - 6 * (9 + 3) / (4 * 15) = -0.2.
    assert report.spearman == pytest.approx((3 * 0.8 - 2 * 0.2) / 5)
    # Nearest: of 0 it stays 1, of 1 it stays 0, of 2 it stays 1; of 3 it was 2 and is 2's farthest, of 4 the reverse.
    assert report.same_nearest == pytest.approx(0.6) and report.same_nearest_10 == 1


# What is asked, and what fp8 reaches of it with its 3 bits of mantissa: benchmarks/NOTES.md.
BOUNDS = {"int8": (0.998, 0.999), "fp8": (0.995, 0.996)}


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_accuracy_on_real_weights(precision: str, minilm: Path, device: torch.device) -> None:
    """Catches a scheme that turns vectors or reorders neighbours more than was measured when it was chosen."""
    texts = docstrings(300)
    backend = "triton" if device.type == "cuda" else "torch"
    vectors = [
        SentenceEncoder.from_pretrained(minilm, dtype="float32", device=device, backend=backend, **options).encode(
            texts, convert_to_tensor=True
        )
        for options in ({}, {"precision": precision})
    ]
    cosine = F.cosine_similarity(*vectors).quantile(0.01)
    others = ~torch.eye(len(texts), dtype=torch.bool, device=device)
    ranks = [(v @ v.T)[others].view(len(texts), -1).argsort(1).argsort(1).double() for v in vectors]
    spearman = F.cosine_similarity(*(r - r.mean(1, keepdim=True) for r in ranks)).mean()
    least_cosine, least_spearman = BOUNDS[precision]
    assert cosine >= least_cosine and spearman >= least_spearman, f"{cosine:.5f}, {spearman:.5f}"


def test_command_line(minilm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a --precision that does not reach the model."""
    from fastbert.cli.main import main

    assert main(["info", "--model", str(minilm), "--precision", "int8", "--backend", "torch", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "precision 'int8'" in printed and "quantized_linear" in printed


def test_fallback_name() -> None:
    """Catches a name of the unquantised path that is also a backend's."""
    assert quantized.UNQUANTISED not in ops.BACKENDS
