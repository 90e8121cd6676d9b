"""The losses of our own models in training: labelled tokens alone in the decoder, logits when asked for, odd labels."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import family_cases
import model_cases
from fastbert.checkpoint.families import FAMILIES
from fastbert.models import heads, losses
from fastbert.models.outputs import Later
from model_cases import BATCH, GRADIENT_BOUND, LENGTH, VOCAB, assert_close, is_zero, valid_of

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DECODERS = ("BertForMaskedLM", "BertForPreTraining")
LOGITS = {"BertForMaskedLM": "logits", "BertForPreTraining": "prediction_logits"}
FAMILY_MODELS = [("bert", name) for name in DECODERS] + [
    (model_type, "BertForMaskedLM") for model_type in family_cases.OTHERS
]


def without_dropout(model_type: str) -> dict[str, float]:
    return {"dropout": 0.0, "attention_dropout": 0.0} if model_type == "distilbert" else dict(NO_DROPOUT)


def pair(model_type: str, name: str, **options: Any) -> tuple[Any, Any]:
    """transformers' model in training mode, without dropout, and our twin."""
    options = {**without_dropout(model_type), **options}
    if model_type == "bert":
        model = model_cases.theirs(name, "tiny", **options).train()
        return model, model_cases.twin(model)
    model = family_cases.theirs(model_type, name, **options).train()
    return model, family_cases.twin(model, name).train()


def make_batch(model_type: str, name: str, kind: str = "right") -> dict[str, Any]:
    """A batch with labels at about half of its tokens, and none at padding; no token has the padding id."""
    batch = model_cases.make_batch(kind) if model_type == "bert" else family_cases.make_batch(model_type, kind)
    if model_type != "bert":
        pad = family_cases.config_of_transformers(model_type).pad_token_id
        batch["input_ids"][valid_of(batch["attention_mask"]) & (batch["input_ids"] == pad)] = pad + 1
    random = torch.Generator().manual_seed(7)
    labels = torch.randint(VOCAB, (BATCH, LENGTH), generator=random)
    labels[torch.rand(BATCH, LENGTH, generator=random) < 0.5] = -100
    batch["labels"] = labels.masked_fill(~valid_of(batch["attention_mask"]), -100)
    if name == "BertForPreTraining":
        batch["next_sentence_label"] = torch.tensor([1, 0, 0, 1])
    return batch


def is_pending(output: Any) -> bool:
    """Tells whether the logits of all tokens have not been asked for."""
    return any(isinstance(value, Later) for value in OrderedDict.values(output))


def assert_gradients(ours: Any, model: Any, model_type: str) -> None:
    """Every parameter's gradient agrees with transformers', under its family's names."""
    mine = dict(ours.named_parameters())
    theirs = {FAMILIES[model_type].state_to_ours(name, ours.task): p for name, p in model.named_parameters()}
    if "cls.predictions.decoder.bias" in mine.keys() - theirs.keys():  # untied, under one name in the family
        mine["cls.predictions.bias"] = mine["cls.predictions.decoder.bias"]
    checked = 0
    for name, parameter in mine.items():
        expected = theirs.get(name)
        if expected is None or expected.grad is None:
            assert parameter.grad is None or name not in theirs, name
        elif is_zero(expected.grad):
            assert is_zero(parameter.grad), name
        else:
            assert_close(name, parameter.grad, expected.grad, GRADIENT_BOUND)
            checked += 1
    assert checked > 20


@pytest.mark.parametrize("kind", ["none", "right"])
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize(("model_type", "name"), FAMILY_MODELS)
def test_labelled_tokens_alone_match_transformers(model_type: str, name: str, tie: bool, kind: str) -> None:
    """Catches a family whose loss or gradients change where its decoder sees labelled tokens alone."""
    model, ours = pair(model_type, name, tie_word_embeddings=tie)
    batch = make_batch(model_type, name, kind)
    mine, other = ours(**batch), model(**batch)
    mine.loss.backward()
    other.loss.backward()
    assert is_pending(mine)
    assert_close("loss", mine.loss, other.loss)
    assert_gradients(ours, model, model_type)
    valid = valid_of(batch["attention_mask"])
    assert_close("logits", mine[1][valid], other[1][valid])


def rows_of_head(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of each call of the transform of a head, from now on."""
    seen: list[int] = []
    plain = heads.BertPredictionHeadTransform.forward

    def forward(self: Any, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        seen.append(x.shape[0])
        return plain(self, x, *arguments, **options)

    monkeypatch.setattr(heads.BertPredictionHeadTransform, "forward", forward)
    return seen


@pytest.mark.parametrize("name", DECODERS)
def test_only_labelled_tokens_reach_the_head(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a transform or decoder of all tokens, in training, that nobody asked for."""
    _, ours = pair("bert", name)
    batch, seen = make_batch("bert", name), rows_of_head(monkeypatch)
    n_labelled, n_tokens = int((batch["labels"] != -100).sum()), int(batch["attention_mask"].sum())
    output = ours(**batch)
    assert output["loss"] is output.loss is output[0] is output.get("loss")
    assert seen == [n_labelled] and is_pending(output)
    output.loss.backward()
    assert seen == [n_labelled] and 0 < n_labelled < n_tokens
    assert output[LOGITS[name]] is output[1] and seen == [n_labelled, n_tokens]


WAYS: dict[str, Callable[[Any, str], Any]] = {
    "attribute": getattr,
    "key": lambda output, name: output[name],
    "index": lambda output, name: output[1],
    "slice": lambda output, name: output[:2][1],
    "negative": lambda output, name: output[1 - len(output)],
    "get": lambda output, name: output.get(name),
    "tuple": lambda output, name: output.to_tuple()[1],
    "values": lambda output, name: list(output.values())[1],
    "items": lambda output, name: dict(output.items())[name],
    "dict": lambda output, name: dict(output)[name],
    "unpacked": lambda output, name: {**output}[name],
    "rebuilt": lambda output, name: type(output)(dict(output))[name],
    "pairs": lambda output, name: getattr(type(output)((key, output[key]) for key in output), name),
    "copy": lambda output, name: copy.copy(output)[name],
    "mapped": lambda output, name: pytree.tree_map(lambda x: x, output)[name],
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", DECODERS)
def test_logits_when_asked_for(name: str, way: str) -> None:
    """Catches a way to ask for the logits that gives something else, or gives it twice."""
    _, ours = pair("bert", name)
    batch = make_batch("bert", name)
    expected = model_cases.run(copy.deepcopy(ours).eval(), batch)[LOGITS[name]]
    output = ours(**batch)
    keys = list(output)
    logits = WAYS[way](output, LOGITS[name])
    assert_close(way, logits, expected, 1e-13)
    assert list(output) == keys and getattr(output, LOGITS[name]) is output[LOGITS[name]]
    if way != "mapped":
        assert not is_pending(output)


@pytest.mark.parametrize("name", DECODERS)
def test_gradients_of_logits_asked_for_later(name: str) -> None:
    """Catches logits that carry no gradient, or that follow the gradient mode of who asks."""
    model, ours = pair("bert", name)
    batch = make_batch("bert", name, "none")
    mine, other = ours(**batch), model(**batch)
    with torch.no_grad():
        logits = mine[1]
    for output, values in ((mine, logits), (other, other[1])):
        (output.loss + model_cases.weighted_sum({"logits": values})).backward()
    assert_gradients(ours, model, "bert")
    with torch.no_grad():
        output = ours(**batch)
    assert not output[1].requires_grad and not output.loss.requires_grad


def test_logits_under_autocast_and_in_a_tuple() -> None:
    """Catches logits outside of the autocast of the forward pass, a placeholder in a tuple, or a pickle of one."""
    _, ours = pair("bert", "BertForMaskedLM")
    ours, batch = ours.float(), make_batch("bert", "BertForMaskedLM")
    with torch.autocast("cpu", torch.bfloat16):
        output = ours(**batch)
    assert output.loss.dtype == torch.float32 and output.logits.dtype == torch.bfloat16
    assert torch.equal(ours(**batch, return_dict=False)[1], ours(**batch).logits)
    with torch.no_grad():
        again, output = pickle.loads(pickle.dumps(ours(**batch))), ours(**batch)
    assert not is_pending(again) and torch.equal(again.logits, output.logits)


def replaced(ours: Any) -> None:
    ours.cls.predictions.decoder = nn.Sequential(ours.cls.predictions.decoder)


def hooked(ours: Any) -> None:
    ours.cls.predictions.transform.dense.register_forward_hook(lambda module, args, output: None)


def patched(ours: Any) -> None:
    ours.cls.forward = ours.cls.forward


@pytest.mark.parametrize("change", [replaced, hooked, patched])
@pytest.mark.parametrize("name", DECODERS)
def test_who_listens_to_the_head_sees_all_tokens(name: str, change: Callable[[Any], None]) -> None:
    """Catches a hook, an adapter or a patched forward in the head that is passed over."""
    model, ours = pair("bert", name)
    change(ours)
    seen: list[torch.Size] = []
    ours.cls.predictions.decoder.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    batch = make_batch("bert", name, "none")
    mine, other = ours(**batch), model(**batch)
    assert not is_pending(mine) and seen == [(BATCH, LENGTH, VOCAB)]
    assert_close("loss", mine.loss, other.loss)


@pytest.mark.parametrize("name", DECODERS)
def test_evaluation_has_logits_at_once(name: str) -> None:
    """Catches evaluation that computes its logits late, or from another batch of rows than before."""
    _, ours = pair("bert", name)
    batch = make_batch("bert", name)
    output = model_cases.run(ours.eval(), batch)
    assert not is_pending(output)
    packed = output[1][valid_of(batch["attention_mask"])]
    labels = batch["labels"][valid_of(batch["attention_mask"])]
    loss = nn.functional.cross_entropy(packed, labels)
    if name == "BertForPreTraining":
        loss = loss + nn.functional.cross_entropy(output[2], batch["next_sentence_label"])
    assert torch.equal(output.loss, loss)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_as_accurate(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """Catches a loss of labelled tokens that loses precision against transformers'."""
    name = "BertForMaskedLM"
    model, _ = pair("bert", name)
    at = model_cases.place(backend, device)
    ours, eager = model_cases.twin(model, dtype, backend, at), model_cases.in_dtype(model, dtype, at)
    reference = model_cases.in_dtype(model_cases.in_dtype(model, dtype), torch.float64)
    batch = make_batch("bert", name, "none")
    for each in (ours, eager, reference):
        each(**model_cases.to_device(batch, each.device)).loss.backward()
    model_cases.assert_gradients_as_accurate(ours, eager, reference)


@pytest.mark.parametrize("name", DECODERS)
def test_compiled_model_trains(name: str) -> None:
    """Catches a compiled model that computes all logits, or other gradients."""
    _, ours = pair("bert", name)
    batch = make_batch("bert", name)
    ours(**batch).loss.backward()
    expected = {n: p.grad.clone() for n, p in ours.named_parameters() if p.grad is not None}
    ours.zero_grad()
    try:
        output = torch.compile(ours, backend="aot_eager")(**batch)
        output.loss.backward()
    finally:
        torch._dynamo.reset()
    assert is_pending(output)
    for parameter_name, parameter in ours.named_parameters():
        if parameter_name in expected:
            assert torch.equal(parameter.grad, expected[parameter_name]), parameter_name
    assert output[1].shape == (BATCH, LENGTH, VOCAB)


# Labels


def all_ignored(name: str) -> dict[str, Tensor]:
    rows, tokens = torch.full((BATCH,), -100), torch.full((BATCH, LENGTH), -100)
    return {
        "BertForPreTraining": {"labels": tokens, "next_sentence_label": rows},
        "BertForMaskedLM": {"labels": tokens},
        "BertForTokenClassification": {"labels": tokens},
        "BertForMultipleChoice": {"labels": rows[:2]},
        "BertForQuestionAnswering": {"start_positions": rows + 1000, "end_positions": rows + 1000},
    }.get(name, {"labels": rows})


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", model_cases.HEADS)
def test_every_label_ignored(name: str, mode: str) -> None:
    """Catches a loss that is NaN where nothing is asked, or gradients that are not zero or not there."""
    model, ours = pair("bert", name)
    ours = model_cases.twin(model).train(mode == "train")
    batch = {**model_cases.make_batch("right", name), **all_ignored(name)}
    loss = ours(**batch).loss
    loss.backward()
    assert loss == 0 and loss.dtype == torch.float64
    gradients = {n: p.grad for n, p in ours.named_parameters()}
    assert gradients["bert.encoder.layer.0.output.dense.weight"] is not None
    assert all(gradient is None or not gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", [n for n in model_cases.HEADS if n != "BertForQuestionAnswering"])
def test_labels_out_of_range(name: str, mode: str) -> None:
    """Catches a label that is no class and reaches a kernel, or an error that does not name it."""
    model, ours = pair("bert", name)
    ours.train(mode == "train")
    batch = {**model_cases.make_batch("right", name), **all_ignored(name)}
    n_classes = {"BertForNextSentencePrediction": 2, "BertForMultipleChoice": 2}.get(name, 3)
    for argument in [key for key in batch if key in ("labels", "next_sentence_label")]:
        last = VOCAB if argument == "labels" and name in DECODERS else 2 if "next" in argument else n_classes
        wrong = batch[argument].clone()
        wrong.view(-1)[:2] = torch.tensor([-3, last])
        message = f"^{argument}: expected classes from 0 to {last - 1}, or -100 for none, got values from -3 to {last}$"
        with pytest.raises(ValueError, match=message):
            ours(**{**batch, argument: wrong})


def test_labels_of_several_classes() -> None:
    """Catches a share of a class that is none, which a sigmoid's cross entropy takes in silence."""
    name = "BertForSequenceClassification"
    _, ours = pair("bert", name, problem_type="multi_label_classification")
    batch = model_cases.make_batch("right")
    shares = torch.full((BATCH, 3), 0.5)
    assert ours(**batch, labels=shares).loss.isfinite()
    for wrong, shown in ((-100.0, "-100 to 0.5"), (1.5, "0.5 to 1.5"), (float("nan"), "nan to nan")):
        shares[1, 1] = wrong
        with pytest.raises(ValueError, match=f"^labels: expected numbers from 0 to 1, got values from {shown}$"):
            ours(**batch, labels=shares)


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_labels_under_autocast(problem: str) -> None:
    """Catches labels that are rounded to autocast's dtype, in which the loss is not computed."""
    logits, labels = torch.randn(BATCH, 3).bfloat16(), torch.rand(BATCH, 3)
    with torch.autocast("cpu", torch.bfloat16):
        loss = losses.sequence_loss(logits, labels, problem, 3)
    expected = losses.sequence_loss(logits.float(), labels, problem, 3)
    assert loss is not None and loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)


def test_masters_of_mixed_dtypes() -> None:
    """Catches parameters of two dtypes that fail without a name outside of autocast, or fail inside of it."""
    _, ours = pair("bert", "BertForMaskedLM")
    ours, batch = ours.float(), make_batch("bert", "BertForMaskedLM")
    with torch.autocast("cpu", torch.bfloat16):
        expected = ours(**batch).loss
    decoder = ours.cls.predictions.decoder
    decoder.weight, decoder.bias = (nn.Parameter(p.detach().bfloat16()) for p in (decoder.weight, decoder.bias))
    with pytest.raises(TypeError, match="expected one dtype, got torch.bfloat16, torch.float32"):
        ours(**batch)
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours(**batch).loss
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert decoder.weight.grad.dtype == torch.bfloat16


def test_transforms_of_a_whole_model() -> None:
    """Catches a transform of torch.func that meets a look at the labels, in training or without a label."""
    _, ours = pair("bert", "BertForMaskedLM")
    batch = make_batch("bert", "BertForMaskedLM")
    parameters = dict(ours.named_parameters())

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(ours, parameters, kwargs=batch).loss

    gradients = torch.func.grad(loss)(parameters)
    ours(**batch).loss.backward()
    name = "bert.encoder.layer.0.output.dense.weight"
    assert_close(name, gradients[name], parameters[name].grad, GRADIENT_BOUND)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    assert not torch.func.grad(loss)(parameters)[name].any()
