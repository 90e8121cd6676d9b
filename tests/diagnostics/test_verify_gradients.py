"""verify with gradients=True passes right gradients, names a wrong one, and leaves the model as it was."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastbert
from family_cases import OTHERS, theirs
from fastbert import BertForSequenceClassification, BertModel, Tokenizer
from fastbert.adapters import counts
from fastbert.diagnostics.verify import gradients as verify_gradients
from fastbert.diagnostics.verify.entry import DEFAULT_TEXTS, verify
from fastbert.diagnostics.verify.gradient_findings import GradientsReport
from verify_cases import IDS, config

PARTS = ["pooler", "encoder.layer.1", "encoder.layer.0", "embeddings"]  # in the order of the backward pass


@pytest.fixture
def model(device: torch.device) -> BertModel:
    return BertModel(config()).eval().to(device)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A tokenizer of some 300 tokens, trained on the built-in texts."""
    return Tokenizer.train(list(DEFAULT_TEXTS), vocab_size=300, min_frequency=1)


def gradients_of(model: Any, texts: Any = IDS, **arguments: Any) -> GradientsReport:
    report = verify(model, texts, gradients=True, **arguments)
    assert report.gradients is not None, report.notes
    return report.gradients


class Changed(torch.autograd.Function):
    """The identity, whose gradient somebody changes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.change(grads[0]), None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_right_gradients_pass(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    """Catches a false alarm, a parameter that is not looked at, and bounds that are not the policy's."""
    model = BertModel(config(), backend=backend).to(device, dtype)
    report = verify(model, IDS, gradients=True)
    gradients = report.gradients
    assert report.ok and gradients is not None and gradients.problem is None, str(report)
    assert [part.name for part in gradients.parts] == PARTS
    assert [p.name for p in gradients.parameters] == [name for name, _ in model.named_parameters()][::-1]
    epsilon = torch.finfo(dtype).eps * (2 if dtype == torch.float32 else 1)
    for part in (*gradients.parts, gradients.whole):
        assert 0 < part.error <= part.bound == 1.25 * part.eager_error + epsilon
    factor = 3 if dtype == torch.float32 else 2
    bounds = {part.name: part.bound for part in gradients.parts}
    for parameter in gradients.parameters:
        assert parameter.bound == factor * max(bounds[parameter.part], 1.25 * parameter.eager_error + epsilon)
    assert sum(part.n_values for part in gradients.parts) == gradients.whole.n_values


def test_gradients_are_looked_at_on_request(model: BertModel) -> None:
    """Catches a report that takes the time of a backward pass unasked."""
    report = verify(model, IDS)
    assert report.gradients is None and "Gradients" not in str(report) and report.to_dict()["gradients"] is None


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(
    "name", ["attention.output.dense.bias", "attention.self.key.weight", "output.LayerNorm.weight"]
)
def test_a_wrong_gradient_of_one_parameter_is_named(model: BertModel, layer: int, name: str) -> None:
    """Catches an error in one gradient that passes, is put down to another, or changes plain PyTorch's as well."""
    name = f"encoder.layer.{layer}.{name}"
    model.get_parameter(name).register_hook(lambda grad: grad * 1.001)
    report = verify(model, IDS, gradients=True)
    assert not report.ok and len(report.problems) == 1
    assert report.problems[0].startswith(f"the gradient of {name} is the first wrong gradient of the backward pass: ")
    gradients = report.gradients
    assert gradients is not None and gradients.worst_parameter.name == name
    assert gradients.worst_part.name == f"encoder.layer.{layer}"
    assert [p.name for p in gradients.parameters if not p.ok] == [name]
    assert gradients.worst_parameter.error == pytest.approx(1e-3, rel=0.02)
    page = report.to_html()
    for text in (f"the worst part is encoder.layer.{layer}, the worst parameter {name}", "gradients are wrong"):
        assert text in page
    assert f"the worst parameter {name}" in str(report) and "FAILED" in str(report)


def test_a_wrong_gradient_that_is_passed_on_is_put_down_to_its_layer(model: BertModel) -> None:
    """Catches an error of an activation's backward pass that is blamed on the layers below, which it makes wrong."""
    inner = model.encoder.layer[1].intermediate
    inner.register_forward_hook(lambda module, args, output: Changed.apply(output, lambda grad: grad * 1.01))
    gradients = gradients_of(model)
    assert gradients.problem is not None
    assert gradients.problem.startswith("the gradient of encoder.layer.1.intermediate.dense.bias is the first")
    by_name = {report.name: report.ok for report in (*gradients.parts, *gradients.parameters)}
    assert by_name["pooler"] and by_name["encoder.layer.1.output.dense.weight"]
    assert not by_name["encoder.layer.1.attention.self.value.weight"] and not by_name["encoder.layer.0"]


def test_a_gradient_that_is_not_finite_or_missing_is_named(model: BertModel) -> None:
    """Catches NaN that compares as right or that JSON cannot hold, and a gradient that is cut off."""
    name = "encoder.layer.0.output.dense.weight"
    hook = model.get_parameter(name).register_hook(lambda grad: grad * math.nan)
    report = verify(model, IDS, gradients=True)
    hook.remove()
    assert report.problems == [
        f"the gradient of {name} is the first wrong gradient of the backward pass: it is not finite"
    ]
    d = json.loads(json.dumps(report.to_dict(), allow_nan=False))["gradients"]
    assert d["worst_parameter"] == name and d["worst_part"] == "encoder.layer.0"
    entry = next(entry for entry in d["parameters"] if entry["name"] == name)
    assert entry["error"] is None and entry["ok"] is False
    assert "not finite" in report.to_html()

    model.embeddings.position_embeddings.register_forward_hook(lambda module, args, output: output.detach())
    problem = gradients_of(model).problem
    assert problem is not None and problem.startswith("the gradient of embeddings.position_embeddings.weight")
    assert problem.endswith("the model gives it no gradient")


def test_model_is_left_as_it_was(model: BertModel) -> None:
    """Catches a change of `.grad`, modes, dropouts, generators, or of what derives from weights."""
    model.train()
    model.encoder.layer[0].eval()
    model.encoder.layer[1].output.dropout.p = 0.7
    kept = {name: torch.full_like(p, 3.0) for name, p in model.named_parameters() if "bias" in name}
    for name, parameter in model.named_parameters():
        parameter.grad = kept.get(name)
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    device_state = torch.cuda.get_rng_state(model.device) if model.device.type == "cuda" else None
    with torch.no_grad():
        assert gradients_of(model).ok
    assert torch.equal(torch.get_rng_state(), state)
    if device_state is not None:
        assert torch.equal(torch.cuda.get_rng_state(model.device), device_state)
    assert [module.training for module in model.modules()] == modes
    dropouts = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    assert dropouts.count(0.7) == 1 and dropouts.count(0.1) == len(dropouts) - 1
    assert all(parameter.grad is kept.get(name) for name, parameter in model.named_parameters())
    assert all(bool((grad == 3.0).all()) for grad in kept.values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_dropout_is_off_and_training_is_on(model: BertModel) -> None:
    """Catches a path of inference that is looked at, and dropout that no reference can follow."""
    seen = []

    def watch(module: Any, args: Any) -> None:
        if torch.is_grad_enabled():
            seen.append((model.training, module.training, module.dropout.p))

    handle = model.encoder.layer[1].attention.self.register_forward_pre_hook(watch)
    assert gradients_of(model).ok and set(seen) == {(True, True, 0.0)}
    handle.remove()
    assert gradients_of(model.train()).ok


def test_frozen_parameters_are_left_out(model: BertModel) -> None:
    """Catches a gradient asked of a frozen parameter, and a model without any that passes in silence."""
    model.embeddings.requires_grad_(False)
    model.encoder.layer[1].output.dense.bias.requires_grad_(False)
    gradients = gradients_of(model)
    assert gradients.ok and [part.name for part in gradients.parts] == PARTS[:-1]
    assert "encoder.layer.1.output.dense.bias" not in [p.name for p in gradients.parameters]
    report = verify(model.requires_grad_(False), IDS, gradients=True)
    assert report.ok and report.gradients is None and any("no parameter" in note for note in report.notes)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("texts", [[[]], [[], [2, 3], []], [[0, 5, 0]], [[2]] * 40])
def test_odd_texts(model: BertModel, texts: Any) -> None:
    """Catches an alarm, or a division by zero, for texts without tokens, ids of padding and many texts of one token."""
    report = verify(model, texts, gradients=True)
    assert report.ok and report.gradients is not None, str(report)
    if texts == [[]]:
        assert report.gradients.n_steps == 0 and report.gradients.whole.error == 0


def test_steps_are_compared_one_by_one(model: BertModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches texts that are compared with the gradients of others where there are several steps."""
    texts = [torch.randint(1, 101, (n,)).tolist() for n in (30, 1, 17, 4, 30, 9)]
    assert gradients_of(model, texts).n_steps == 1
    monkeypatch.setattr(verify_gradients, "STEP_ROWS", 4)
    monkeypatch.setattr(verify_gradients, "STEP_TOKENS", 70)
    gradients = gradients_of(model, texts)
    assert gradients.ok and gradients.n_steps == 3, gradients.problem
    assert "Gradients of 3 steps" in str(verify(model, texts, gradients=True))


def test_float64_has_a_bound_of_its_own() -> None:
    """Catches a bound of zero where plain PyTorch is as exact as the reference."""
    gradients = gradients_of(BertModel(config()).double())
    assert gradients.ok and {report.bound for report in (*gradients.parts, *gradients.parameters)} == {1e-10}


def test_eager_that_overflows_gives_no_bound(model: BertModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an infinite bound where plain PyTorch's gradients are not finite."""
    right = verify_gradients.eager_bert
    monkeypatch.setattr(
        verify_gradients,
        "eager_bert",
        lambda *args: [Changed.apply(x, lambda grad: grad * math.inf) for x in right(*args)],
    )
    gradients = gradients_of(model)
    assert gradients.ok and {part.bound for part in gradients.parts} == {0.0447}
    assert all(math.isnan(part.eager_error) for part in gradients.parts)


def test_heads_and_encoders_of_sentences(tokenizer: Tokenizer, device: torch.device) -> None:
    """Catches names without the prefix of the model that was handed in, and texts that are not the encoder's."""
    bert = BertModel(config(vocab_size=tokenizer.vocab_size), add_pooling_layer=False).to(device)
    encoder = fastbert.SentenceEncoder(bert, tokenizer, "mean")
    gradients = gradients_of(encoder, ["One.", "", "Two and more."])
    assert gradients.ok and [part.name for part in gradients.parts] == [f"model.{name}" for name in PARTS[1:]]
    assert gradients.parameters[-1].name == "model.embeddings.word_embeddings.weight"
    classifier = BertForSequenceClassification(config()).to(device)
    gradients = gradients_of(classifier)
    assert gradients.ok and gradients.parts[0].name == "bert.pooler"
    assert gradients.parameters[0].name == "bert.pooler.dense.bias"


def test_paths(tmp_path: Any) -> None:
    """Catches a folder whose model is loaded without gradients."""
    BertModel(config()).save_pretrained(tmp_path)
    assert gradients_of(tmp_path, None, dtype="bfloat16").ok


@pytest.mark.parametrize("model_type", ["bert", *OTHERS])
def test_accelerated_models(model_type: str) -> None:
    """Catches gradients of our twin and not of the model itself, its names lost, or calls that its counts show."""
    model = fastbert.accelerate(theirs(model_type).float())
    before = counts(model)
    report = verify(model, [[6, 9, 11], [7, 8], [10, 12, 13, 14]], gradients=True)
    gradients = report.gradients
    assert report.ok and gradients is not None, str(report)
    assert {p.name for p in gradients.parameters} == {name for name, _ in model.named_parameters()}
    assert counts(model) == before and not model.training
    values = "value.bias", "v_lin.bias", "attn.v.bias"
    wrong = next(p for name, p in model.named_parameters() if name.endswith(values))
    wrong.register_hook(lambda grad: grad * 1.01)
    problem = verify(model, [[6, 9, 11], [7, 8]], gradients=True).problems[-1]
    name = next(name for name, p in model.named_parameters() if p is wrong)
    assert f"the gradient of {name} is the first" in problem


def test_gradients_of_the_original_forward_are_said_to_be() -> None:
    """Catches a report on gradients that does not say that the original forward made them."""
    model = fastbert.accelerate(theirs("bert").float())
    model.encoder.layer[0].register_forward_hook(lambda module, args, output: None)
    report = verify(model, [[6, 9, 11]], gradients=True)
    assert any(note.startswith("gradients were those of the original forward: ") for note in report.notes)


def test_eight_bits_have_no_gradients(model: BertModel) -> None:
    """Catches gradients of unquantised weights in the report of a quantised model."""
    eight_bit = BertModel(config(hidden_size=64, intermediate_size=128), precision="int8").eval()
    report = verify(eight_bit, IDS, gradients=True)
    assert report.gradients is None and any("8 bits" in note for note in report.notes)
