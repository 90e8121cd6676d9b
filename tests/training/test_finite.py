"""FiniteGuard names the step and the source of NaN or an infinity, and costs and changes little before."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import fastbert
import sentence_cases
from fastbert import BertConfig, BertForSequenceClassification, BertModel
from fastbert.adapters import counts
from fastbert.training import FiniteGuard, finite, finite_callback

SIZES = {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 56, "max_position_embeddings": 40}  # fmt: skip
IDS = torch.randint(1, 100, (4, 9), generator=torch.Generator().manual_seed(3))
MASK = (torch.arange(9) < torch.tensor([[9], [5], [2], [7]])).long()
LABELS = torch.tensor([0, 1, 1, 0])
BATCH = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}


def own() -> Any:
    return BertForSequenceClassification(BertConfig(**SIZES)).train()


def theirs() -> Any:
    config = transformers.BertConfig(**SIZES)
    return transformers.BertForSequenceClassification(config).train()


def accelerated() -> Any:
    return fastbert.accelerate(theirs())


MODELS = pytest.mark.parametrize("make", [own, theirs, accelerated])


class Changed(torch.autograd.Function):
    """The identity, whose gradient somebody changes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] * ctx.factor, None


def spoil_backward(module: nn.Module, factor: float = math.nan) -> None:
    """Makes what the module passes back not finite."""
    module.register_forward_hook(lambda module, args, output: Changed.apply(output, factor))


def steps(guard: FiniteGuard, model: Any, n: int = 3, spoil: Callable[[int], Any] = lambda step: None) -> None:
    """Trains for some steps; spoil: called before each with its number, from 1 on."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    for step in range(1, n + 1):
        spoil(step)
        loss = model(**BATCH).loss
        loss.backward()
        guard.check(loss)
        optimizer.step()
        optimizer.zero_grad()


@MODELS
def test_training_is_the_same_with_a_guard(make: Callable[[], Any]) -> None:
    """Catches a guard that draws from the generators, changes gradients, or has a model run another way."""
    weights, calls = [], []
    for guarded in (False, True):
        torch.manual_seed(0)
        model = make()
        guard = FiniteGuard(model)
        if not guarded:
            guard.close()
        steps(guard, model)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        calls.append(counts(model))
        assert guard.step == 3 and not guard._calls and not guard._losses
    assert torch.equal(*weights) and calls[0] == calls[1]


@MODELS
def test_a_module_whose_output_is_not_finite_is_named(make: Callable[[], Any]) -> None:
    """Catches a source that is not named, named with the modules after it, or put into another step."""
    torch.manual_seed(0)
    model = make()

    def spoil(step: int) -> None:
        if step == 2:  # so large that a product overflows
            model.bert.encoder.layer[1].intermediate.dense.bias.data.fill_(2.0)
            model.bert.encoder.layer[1].output.dense.weight.data.fill_(3e38)

    with FiniteGuard(model) as guard, pytest.raises(FloatingPointError) as caught:
        steps(guard, model, spoil=spoil)
    message = str(caught.value)
    assert message.startswith("step 2: the output of bert.encoder.layer.1.output.dense (Linear) is the first")
    assert "of 736 values" in message or "of 1,152 values" in message, message
    assert message.endswith("its inputs were finite")
    assert not model._forward_hooks and not model._forward_pre_hooks
    assert not any(module._forward_hooks for module in model.modules())


class Rare(nn.Linear):
    """A module that fails now and then, by the generator's numbers."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x + (math.nan if torch.rand(()) > 0.9 else 0.0)


class Sensitive(nn.Linear):
    """A module that fails with some inputs, which dropout decides on."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (math.nan if (50 * x.sum()) % 1 > 0.85 else 0.0)


def test_chance_is_the_same_when_the_step_is_made_again() -> None:
    """Catches a replay with other random numbers than the step had, in which the fault does not come."""
    torch.manual_seed(1)
    model = own()
    model.classifier = Rare(32, 2)
    with FiniteGuard(model) as guard, pytest.raises(FloatingPointError, match=r"the output of classifier \(Rare\)"):
        steps(guard, model, 100)
    assert guard.step > 1, "this test wants a fault that does not come at once"
    state = torch.get_rng_state()
    guard = FiniteGuard(model)
    with pytest.raises(FloatingPointError):
        for _ in range(100):
            loss = model(**BATCH).loss
            state = torch.get_rng_state()
            guard.check(loss)
    assert torch.equal(torch.get_rng_state(), state)


@MODELS
def test_masks_are_the_same_when_the_step_is_made_again(make: Callable[[], Any]) -> None:
    """Catches a replay that drops out other elements than the step did, because somebody listens to its modules."""
    for seed in range(4):
        torch.manual_seed(seed)
        model = make()
        model.classifier = Sensitive(32, 2)
        with (
            FiniteGuard(model) as guard,
            pytest.raises(FloatingPointError, match=r"output of classifier \(Sensitive\)"),
        ):
            steps(guard, model, 100)


@MODELS
@pytest.mark.parametrize("clip", [False, True])
def test_the_first_gradient_of_the_backward_pass_is_named(make: Callable[[], Any], clip: bool) -> None:
    """Catches a gradient that is blamed for one after it, and a source that is lost where gradients are clipped."""
    torch.manual_seed(0)
    model = make()
    spoil_backward(model.bert.encoder.layer[0].intermediate)
    with FiniteGuard(model) as guard, pytest.raises(FloatingPointError) as caught:
        loss = model(**BATCH).loss
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        guard.check(loss, step=17)
    expected = "step 17: the gradient of bert.encoder.layer.0.intermediate.dense.bias is the first that is not finite"
    assert str(caught.value) == f"{expected} in the backward pass: its norm is nan"


def test_an_infinity_is_told_from_nan() -> None:
    """Catches an overflow that is called NaN, which sends the reader to another cause."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    spoil_backward(model[1], math.inf)
    with FiniteGuard(model) as guard, pytest.raises(FloatingPointError, match=r"1.bias .*: its norm is inf"):
        loss = model(torch.randn(2, 3)).sum()
        loss.backward()
        guard.check(loss)


def test_the_loss_itself() -> None:
    """Catches a loss outside of the model that is blamed on a module."""
    model = own()
    with FiniteGuard(model) as guard:
        loss = model(**BATCH).logits.sum() * math.inf
        loss.backward()
        with pytest.raises(
            FloatingPointError, match="the loss is the first that is not finite: 1 infinite of 1 values"
        ):
            guard.check(loss)
    with FiniteGuard(model) as guard, pytest.raises(FloatingPointError, match="step 1: the loss is the first"):
        guard.check(torch.tensor(math.nan))


def test_parameters_and_inputs_come_first() -> None:
    """Catches a module that is blamed for its weight or for what it was given."""
    model = own()
    with FiniteGuard(model) as guard, pytest.raises(FloatingPointError) as caught:
        model.bert.encoder.layer[1].attention.self.key.bias.data[3] = math.nan
        steps(guard, model)
    source = "the parameter bert.encoder.layer.1.attention.self.key.bias is not finite: 1 NaN of 32 values"
    assert str(caught.value) == f"step 1: {source}"

    model = BertModel(BertConfig(**SIZES)).train()
    embeds = torch.randn(2, 5, 32)
    embeds[1, 2, :3] = math.inf
    with (
        FiniteGuard(model) as guard,
        pytest.raises(FloatingPointError, match="an input of the model is the first .*: 3 inf"),
    ):
        guard.check(model(inputs_embeds=embeds)[0].sum())


def test_a_module_between_modules_is_said_to_have_had_bad_inputs() -> None:
    """Catches a module that is blamed for what plain code before it computed."""

    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x) * math.nan).sum()

    model = Between()
    with (
        FiniteGuard(model) as guard,
        pytest.raises(FloatingPointError, match=r"second \(Linear\).* of its inputs, 6 NaN"),
    ):
        guard.check(model(torch.randn(2, 3)))


def test_the_loss_of_outputs_is_looked_at() -> None:
    """Catches a check without arguments that looks at gradients alone, or keeps the losses of earlier steps."""
    model = own()
    with FiniteGuard(model) as guard:
        model(**BATCH)
        guard.check()
        model.classifier.bias.data.fill_(3e38)
        model(**BATCH)
        model.classifier.bias.data.fill_(0.0)
        model(**BATCH)
        model.classifier.weight.data.fill_(3e38)
        model(**BATCH)
        with pytest.raises(FloatingPointError, match="step 2: "):
            guard.check()


def test_all_calls_since_the_last_check_are_looked_at() -> None:
    """Catches accumulation of gradients, or pairs of texts, of which only the last call is made again."""
    torch.manual_seed(0)
    model = own()
    model.classifier = Rare(32, 2)
    with FiniteGuard(model) as guard, pytest.raises(FloatingPointError, match="the output of classifier"):
        for _ in range(40):
            loss = sum(model(**BATCH).loss for _ in range(8))
            guard.check(loss)


@pytest.mark.parametrize("is_backward", [False, True])
def test_pairs_of_sentences(tmp_path: Path, is_backward: bool) -> None:
    """Catches a loss outside of a SentenceTransformer whose source, in the first or second text, is not found."""
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    model = fastbert.accelerate(sentence_cases.theirs(sentence_cases.tiny(tmp_path / "model"))).train()
    pairs = [model.tokenizer(texts, padding=True, return_tensors="pt") for texts in (["One.", "Two."], ["1", "2 and"])]
    loss_of = MultipleNegativesRankingLoss(model)
    layer = next(module for name, module in model.named_modules() if name.endswith("encoder.layer.1"))
    with FiniteGuard(model) as guard:
        loss = loss_of([dict(features) for features in pairs], None)
        loss.backward()
        guard.check(loss)
        if is_backward:
            spoil_backward(layer.intermediate)
            expected = r"gradient of .*encoder.layer.1.intermediate.dense.bias is the first"
        else:
            layer.intermediate.dense.bias.data.fill_(2.0)
            layer.output.dense.weight.data.fill_(3e38)
            expected = r"output of .*encoder.layer.1.output.dense \(Linear\) is the first"
        with pytest.raises(FloatingPointError, match=f"step 2: the {expected}"):
            loss = loss_of([dict(features) for features in pairs], None)
            loss.backward()
            guard.check(loss)


def test_evaluation_is_left_alone() -> None:
    """Catches calls in eval mode that are kept, whose outputs may hold anything."""
    model = own()
    with FiniteGuard(model) as guard:
        model.eval()
        model(**BATCH)
        assert not guard._calls and not guard._losses
        model.train()
        model(**BATCH)
        assert len(guard._calls) == 1
        guard.check()
        assert not guard._calls


def test_a_step_costs_one_pass_over_the_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches hooks on every module, or a look at each gradient by itself, in steps that are right."""
    passes = []
    right = torch._foreach_norm
    monkeypatch.setattr(torch, "_foreach_norm", lambda *args, **how: passes.append(len(args[0])) or right(*args, **how))
    monkeypatch.setattr(finite, "first_in_forward", lambda *args: pytest.fail("a right step was made again"))
    model = own()
    with FiniteGuard(model) as guard:
        steps(guard, model, 2)
        assert passes == [len(list(model.parameters()))] * 2
        assert [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks] == [model]


class Scaler:
    """Stands for a GradScaler."""

    def __init__(self, scale: float, enabled: bool = True) -> None:
        self.scale, self.enabled = scale, enabled

    def is_enabled(self) -> bool:
        return self.enabled

    def get_scale(self) -> float:
        return self.scale


def test_gradients_may_overflow_under_a_scaler() -> None:
    """Catches a step that the scaler would skip and that stops the training, or a scale that sinks unnoticed."""
    model = own()
    spoil_backward(model.bert.encoder.layer[0].intermediate, math.inf)
    with FiniteGuard(model) as guard:
        for scaler in (Scaler(1024.0), Scaler(0.5, enabled=False), Scaler(0.5)):
            loss = model(**BATCH).loss
            loss.backward()
            if scaler.enabled and scaler.scale > 1:
                guard.check(loss, scaler=scaler)
                continue
            with pytest.raises(FloatingPointError) as caught, FiniteGuard(model) as other:
                loss = model(**BATCH).loss
                loss.backward()
                other.check(loss, scaler=scaler)
            assert ("the scale of the loss is 0.5" in str(caught.value)) == scaler.enabled


def test_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a replay in another dtype than the step ran in, in which nothing overflows."""
    model = theirs()
    model.bert.encoder.layer[0].output.dense.weight.data.fill_(1e5)  # beyond float16 alone
    with FiniteGuard(model) as guard, pytest.raises(FloatingPointError, match=r"layer.0.output.dense \(Linear\)"):
        with torch.autocast("cpu", torch.float16):
            loss = model(**BATCH).loss
        guard.check(loss)


def test_wrapped_and_strict_models() -> None:
    """Catches names behind a wrapper's prefix, and a replay that a strict model refuses."""
    model = nn.DataParallel(own())
    model.module.classifier.weight.data.fill_(3e38)
    with FiniteGuard(model) as guard, pytest.raises(FloatingPointError, match=r"the output of classifier \(Linear\)"):
        guard.check(model(**BATCH).loss)
    strict = accelerated()
    strict.bert.encoder.layer[1].intermediate.dense.bias.data.fill_(2.0)
    strict.bert.encoder.layer[1].output.dense.weight.data.fill_(3e38)
    with FiniteGuard(strict) as guard, pytest.raises(FloatingPointError, match=r"layer.1.output.dense \(Linear\)"):
        loss = strict(**BATCH).loss
        before = counts(strict)
        fastbert.accelerate(strict, strict=True)
        guard.check(loss)
    assert counts(strict) == before
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got dict"):
        FiniteGuard({})  # type: ignore[arg-type]


def trainer(model: Any, folder: Path, **arguments: Any) -> Any:
    rows = [{name: tensor[i % 4] for name, tensor in BATCH.items()} for i in range(16)]
    settings = {"per_device_train_batch_size": 4, "max_steps": 4, "use_cpu": True, "report_to": [],
                "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no", **arguments}  # fmt: skip
    options = transformers.TrainingArguments(str(folder), **settings)
    return transformers.Trainer(model, options, train_dataset=rows, callbacks=[finite_callback()])


class FailsLate(nn.Linear):
    """A module that fails in one call, with a fault in the forward or in the backward pass."""

    calls, bad_call, is_backward = 0, 3, False

    def forward(self, x: Tensor) -> Tensor:
        FailsLate.calls += 1
        x = super().forward(x)
        if FailsLate.calls < self.bad_call:
            return x
        return Changed.apply(x, math.nan) if self.is_backward else x * math.nan


@pytest.mark.parametrize("is_backward", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_backward: bool, bf16: bool) -> None:
    """Catches a Trainer that goes on with NaN, or whose clipping of gradients hides where it came from."""
    monkeypatch.setattr(FailsLate, "calls", 0)
    monkeypatch.setattr(FailsLate, "is_backward", is_backward)
    model = accelerated()
    model.classifier = FailsLate(32, 2)
    source = "gradient of classifier.bias" if is_backward else r"output of classifier \(FailsLate\)"
    with pytest.raises(FloatingPointError, match=f"step 3: the {source} is the first that is not finite"):
        trainer(model, tmp_path, bf16=bf16).train()
    assert not any(module._forward_hooks for module in model.modules())


def test_trainer_that_accumulates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a fault in the first part of a step that is noticed only after it, or under another number."""
    monkeypatch.setattr(FailsLate, "calls", 0)
    model = theirs()
    model.classifier = FailsLate(32, 2)
    with pytest.raises(FloatingPointError, match=r"step 2: the output of classifier"):
        trainer(model, tmp_path, gradient_accumulation_steps=2, max_steps=2).train()
    assert FailsLate.calls == 5  # three in training, and the third again, as it was and with hooks everywhere


def test_trainer_without_a_fault(tmp_path: Path) -> None:
    """Catches a callback that a Trainer does not take, or that stays on the model."""
    model = accelerated()
    assert trainer(model, tmp_path).train().global_step == 4
    assert sum(counts(model).values()) == 4 and not model._forward_hooks
