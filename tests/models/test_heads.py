"""The seven models with heads give what transformers gives: logits, output classes, losses, gradients."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastbert
from helpers import assert_as_accurate
from model_cases import (
    BATCH,
    FLOAT64_BOUND,
    HEADS,
    LABELS,
    LENGTH,
    TYPES,
    VOCAB,
    assert_close,
    assert_gradients,
    assert_gradients_as_accurate,
    in_dtype,
    make_batch,
    mask,
    randn,
    run,
    theirs,
    to_device,
    twin,
    valid_of,
)

GRADIENT_BOUND = 1e-9
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# Column 0 is a token in these: transformers' pooler reads it whatever the mask says.
FIRST_VALID = ("none", "right", "first_and_holes")
PER_TOKEN = ("logits", "prediction_logits", "start_logits", "end_logits")
CHOICES = 2


def head_batch(name: str, kind: str) -> dict[str, Any]:
    batch = make_batch("none" if kind == "first_and_holes" else kind)
    if kind == "first_and_holes":
        batch["attention_mask"] = mask("holes").index_fill(1, torch.tensor(0), 1)
    if name == "BertForMultipleChoice":
        batch = {n: None if t is None else t.unflatten(0, (BATCH // CHOICES, CHOICES)) for n, t in batch.items()}
    return batch


def head_valid(batch: dict[str, Any]) -> Tensor:
    attention_mask = batch["attention_mask"]
    return valid_of(None if attention_mask is None else attention_mask.reshape(BATCH, LENGTH))


def head_labels(name: str) -> dict[str, Tensor]:
    """Labels for every position, so that some stand at padding; every third is not asked for."""
    random = torch.Generator().manual_seed(7)
    per_token = torch.randint(LABELS if "Token" in name else VOCAB, (BATCH, LENGTH), generator=random)
    per_token.view(-1)[::3] = -100
    per_row = torch.tensor([1, 0, 0, 1])
    return {
        "BertForPreTraining": {"labels": per_token, "next_sentence_label": per_row},
        "BertForMaskedLM": {"labels": per_token},
        "BertForNextSentencePrediction": {"labels": per_row},
        "BertForSequenceClassification": {"labels": torch.tensor([2, 0, 1, 2])},
        "BertForMultipleChoice": {"labels": torch.tensor([1, 0])},
        "BertForTokenClassification": {"labels": per_token},
        # A start at every row's first token, ends at a token, at the last token, and outside.
        "BertForQuestionAnswering": {
            "start_positions": torch.tensor([3, 8, 0, 2]), "end_positions": torch.tensor([12, 8, 99, 4]),
        },
    }[name]  # fmt: skip


def is_per_token(value: Tensor) -> bool:
    return value.shape[:2] == (BATCH, LENGTH)


def assert_logits_match(mine: Any, other: Any, valid: Tensor, bound: float = FLOAT64_BOUND) -> None:
    """Every logit agrees with transformers' at valid positions and is zero at the others."""
    for key in other:
        if key not in (*PER_TOKEN, "seq_relationship_logits"):
            continue
        assert mine[key].shape == other[key].shape
        if is_per_token(other[key]):
            assert_close(key, mine[key][valid], other[key][valid], bound)
            assert (mine[key][~valid] == 0).all(), key
        else:
            assert_close(key, mine[key], other[key], bound)


@pytest.mark.parametrize("kind", FIRST_VALID)
@pytest.mark.parametrize("shape", ["96x3", "320x5"])
@pytest.mark.parametrize("name", HEADS)
def test_float64_matches_transformers(name: str, shape: str, kind: str) -> None:
    """Catches a wrong step in a head, an output class or key of another name or order, or logits left at padding."""
    model, batch = theirs(name, shape), head_batch(name, kind)
    ours = twin(model)
    mine, other = run(ours, batch), run(model, batch)
    assert type(mine).__name__ == type(other).__name__
    assert list(mine.keys()) == list(other.keys())
    assert_logits_match(mine, other, head_valid(batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", HEADS)
def test_lower_precision_is_as_accurate(name: str, dtype: torch.dtype) -> None:
    """Catches a head that computes in less precision than transformers' does."""
    assert_head_accurate(name, "96x3", twin(theirs(name, "96x3"), dtype), 256)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", HEADS)
def test_kernels_are_as_accurate(name: str, dtype: torch.dtype, device: torch.device, poisoned) -> None:
    """Catches a head that gives the kernels another layout than the encoder does."""
    assert_head_accurate(name, "tiny", twin(theirs(name), dtype, "triton", device), 64)
    poisoned.check()


def many_rows(name: str, n_rows: int) -> dict[str, Any]:
    """Rows of 1 to 4 tokens: enough of the numbers that heads give once a row for an RMS to mean something."""
    shape = (n_rows // CHOICES, CHOICES, 4) if name == "BertForMultipleChoice" else (n_rows, 4)
    random = torch.Generator().manual_seed(11)
    lengths = torch.randint(1, 5, (*shape[:-1], 1), generator=random)
    return {
        "input_ids": torch.randint(VOCAB, shape, generator=random),
        "attention_mask": (torch.arange(4) < lengths).long(),
        "token_type_ids": torch.randint(TYPES, shape, generator=random),
    }


def assert_head_accurate(name: str, shape: str, ours: Any, n_rows: int) -> None:
    model, batch = theirs(name, shape), many_rows(name, n_rows)
    eager = in_dtype(model, ours.dtype, ours.device)
    reference = in_dtype(in_dtype(model, ours.dtype), torch.float64)
    valid = batch["attention_mask"] != 0
    outputs = [run(each, batch) for each in (ours, eager, reference)]
    for key in outputs[0]:
        values = [output[key].cpu() for output in outputs]
        if values[0].shape[:2] == valid.shape:
            assert (values[0][~valid] == 0).all()
            values = [value[valid] for value in values]
        assert_as_accurate(key, *values)


@pytest.mark.parametrize("kind", ["left", "holes", "zero_row"])
@pytest.mark.parametrize("name", HEADS)
def test_padding_at_the_start(name: str, kind: str) -> None:
    """Catches a head that reads column 0 where that is padding."""
    ours, batch = twin(theirs(name)), head_batch(name, kind)
    output = run(ours, batch)
    assert all(value.isfinite().all() for value in output.values())
    flat = {n: t.reshape(BATCH, LENGTH) for n, t in batch.items()}
    for row, valid in enumerate(head_valid(batch)):
        alone = {n: flat[n][row, valid][None] for n in ("input_ids", "token_type_ids", "position_ids")}
        if not valid.any():
            continue
        if name == "BertForMultipleChoice":
            expected = run(theirs(name), {n: t[:, None] for n, t in alone.items()})
            assert_close("logits", output.logits.flatten()[row][None, None], expected.logits)
            continue
        expected = run(theirs(name), alone)
        for key in expected:
            value = output[key][row, valid] if is_per_token(output[key]) else output[key][row]
            assert_close(key, value, expected[key][0])


@pytest.mark.parametrize("name", HEADS)
def test_hidden_states_and_attentions(name: str) -> None:
    """Catches a head that drops hidden states or attentions on their way out."""
    model, batch = theirs(name), head_batch(name, "none")
    ours = twin(model, strict=False)
    for options in (
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"output_hidden_states": True, "output_attentions": True},
    ):
        mine, other = run(ours, batch, **options), run(model, batch, **options)
        assert list(mine.keys()) == list(other.keys())
        for key in ("hidden_states", "attentions"):
            if key in other:
                assert len(mine[key]) == len(other[key])
                for value, expected in zip(mine[key], other[key], strict=True):
                    assert_close(key, value, expected)
        assert_logits_match(mine, other, head_valid(batch))


@pytest.mark.parametrize("with_labels", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_tuples(name: str, with_labels: bool) -> None:
    """Catches a tuple of another order or length than transformers', or one with a None for an absent loss."""
    model, batch = theirs(name), head_batch(name, "none")
    labels = head_labels(name) if with_labels else {}
    mine = run(twin(model), {**batch, **labels}, return_dict=False, output_hidden_states=True)
    other = run(model, {**batch, **labels}, return_dict=False, output_hidden_states=True)
    assert type(mine) is tuple and len(mine) == len(other)
    assert type(mine[-1]) is tuple and len(mine[-1]) == len(other[-1])
    for i, (value, expected) in enumerate(zip(mine[:-1], other[:-1], strict=True)):
        assert_close(f"[{i}]", value, expected)


@pytest.mark.parametrize("name", HEADS)
def test_inputs_embeds(name: str) -> None:
    """Catches a head that does not pass inputs_embeds on, or loses the choices in its shape."""
    model, batch = theirs(name), head_batch(name, "right")
    shape = batch.pop("input_ids").shape
    batch["inputs_embeds"] = randn(*shape, 32)
    assert_logits_match(run(twin(model), batch), run(model, batch), head_valid(batch))


@pytest.mark.parametrize("hidden_act", ["gelu_new", "gelu_pytorch_tanh", "relu"])
def test_activation_of_the_language_model_head(hidden_act: str) -> None:
    """Catches a head's transform that takes erf-GELU whatever the config says."""
    model, batch = theirs("BertForMaskedLM", "tiny", hidden_act=hidden_act), head_batch("BertForMaskedLM", "right")
    assert_logits_match(run(twin(model), batch), run(model, batch), head_valid(batch))


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("name", ["BertForPreTraining", "BertForMaskedLM"])
def test_decoder(name: str, tie: bool) -> None:
    """Catches a decoder that is tied against the config, or not tied with it, or an untied one without a bias."""
    model, batch = theirs(name, "tiny", tie_word_embeddings=tie), head_batch(name, "right")
    ours = twin(model)
    predictions = ours.cls.predictions
    assert ours.get_output_embeddings() is predictions.decoder
    assert (predictions.decoder.weight is ours.get_input_embeddings().weight) == tie
    assert (predictions.decoder.bias is predictions.bias) == tie
    assert_logits_match(run(ours, batch), run(model, batch), head_valid(batch))
    with torch.no_grad():
        before = run(ours, batch)[0]
        ours.get_input_embeddings().weight[5] += 1
        moved = (run(ours, batch)[0] - before)[head_valid(batch)][:, 5].abs().max()
    # Word 5 is not in the batch, so that only a tie moves its logit.
    assert not (batch["input_ids"] == 5)[head_valid(batch)].any()
    assert (moved > 0) == tie


# Losses


@pytest.mark.parametrize("name", HEADS)
def test_loss_matches_transformers(name: str) -> None:
    """Catches a loss of another reduction, sum or ignored label than transformers', where nothing is padded."""
    model, batch = theirs(name), {**head_batch(name, "none"), **head_labels(name)}
    mine, other = run(twin(model), batch), run(model, batch)
    assert list(mine)[0] == "loss" and list(mine) == list(other)
    assert mine.loss.shape == ()
    assert_close("loss", mine.loss, other.loss)


def expected_loss(name: str, other: Any, labels: dict[str, Tensor], valid: Tensor) -> Tensor:
    """The loss over valid tokens alone, from transformers' logits."""
    if name in ("BertForPreTraining", "BertForMaskedLM", "BertForTokenClassification"):
        logits = other.prediction_logits if name == "BertForPreTraining" else other.logits
        loss = F.cross_entropy(logits[valid], labels["labels"][valid])
        if name == "BertForPreTraining":
            loss = loss + F.cross_entropy(other.seq_relationship_logits, labels["next_sentence_label"])
        return loss
    if name != "BertForQuestionAnswering":
        return F.cross_entropy(other.logits, labels["labels"])
    losses = []
    for part in ("start", "end"):
        rows = []
        for logits, position, row in zip(
            other[f"{part}_logits"], labels[f"{part}_positions"].tolist(), valid, strict=True
        ):
            if position < LENGTH and row[position]:
                rows.append(logits[row].logsumexp(0) - logits[position])
        losses.append(torch.stack(rows).mean())
    return (losses[0] + losses[1]) / 2


@pytest.mark.parametrize("kind", ["right", "first_and_holes"])
@pytest.mark.parametrize("name", HEADS)
def test_loss_is_over_tokens_alone(name: str, kind: str) -> None:
    """Catches padding that enters a loss by its labels, or by its logits in the softmax over an answer's positions."""
    model, labels, batch = theirs(name), head_labels(name), head_batch(name, kind)
    expected = expected_loss(name, run(model, batch), labels, head_valid(batch))
    assert_close("loss", run(twin(model), {**batch, **labels}).loss, expected)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForTokenClassification", "BertForPreTraining"])
def test_labels_at_padding_are_as_good_as_ignored(name: str) -> None:
    """Catches a loss that changes with what stands at padding, even if it is no label at all."""
    ours, labels, batch = twin(theirs(name)), head_labels(name), head_batch(name, "right")
    expected = run(ours, {**batch, **labels}).loss
    for garbage in (-100, -1, 10**6):
        dirty = {**labels, "labels": labels["labels"].masked_fill(~head_valid(batch), garbage)}
        assert torch.equal(run(ours, {**batch, **dirty}).loss, expected)


@pytest.mark.parametrize(
    ("problem", "num_labels", "labels"),
    [
        (None, 3, torch.tensor([2, 0, 1, 2])),
        (None, 3, torch.tensor([[2], [0], [1], [2]])),
        (None, 3, torch.tensor([2, 0, 1, 2]).int()),
        (None, 1, torch.tensor([0.5, -1.0, 2.0, 0.0]).double()),
        (None, 1, torch.tensor([[0.5], [-1.0], [2.0], [0.0]]).double()),
        (None, 3, torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]]).double()),
        ("regression", 3, randn(4, 3)),
        ("regression", 1, randn(4)),
        ("single_label_classification", 3, torch.tensor([2, 0, -100, 2])),
        ("multi_label_classification", 3, torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]]).double()),
    ],
)
def test_problem_types(problem: str | None, num_labels: int, labels: Tensor) -> None:
    """Catches a loss chosen otherwise than transformers chooses it, by the config or by the form of the labels."""
    name = "BertForSequenceClassification"
    model = copy.deepcopy(theirs(name, "tiny", num_labels=num_labels, problem_type=problem))
    ours, batch = twin(model), head_batch(name, "right")
    # transformers feeds int32 labels to a cross entropy that takes int64 alone.
    other = run(model, {**batch, "labels": labels.long() if labels.dtype == torch.int32 else labels})
    mine = run(ours, {**batch, "labels": labels})
    assert_close("loss", mine.loss, other.loss)
    assert_close("logits", mine.logits, other.logits)


def test_answers_outside() -> None:
    """Catches a position above S - 1 or at padding entering the loss, or making it infinite."""
    name = "BertForQuestionAnswering"
    model, batch = theirs(name), head_batch(name, "right")
    ours = twin(model)
    inside = {"start_positions": torch.tensor([3, 8, 0, 2]), "end_positions": torch.tensor([12, 8, 0, 4])}
    for outside in (9, 12, 13, 10**6):  # row 1 has 9 tokens of 13
        moved = {n: t.index_fill(0, torch.tensor(1), outside) for n, t in inside.items()}
        others = {n: t[[0, 2, 3]] for n, t in {**batch, **inside}.items()}
        assert_close("loss", run(ours, {**batch, **moved}).loss, run(ours, others).loss, 1e-13)
    columns = {n: t[:, None] for n, t in inside.items()}
    assert torch.equal(run(ours, {**batch, **columns}).loss, run(ours, {**batch, **inside}).loss)
    assert run(ours, {**batch, "start_positions": inside["start_positions"]}).loss is None


def test_pretraining_needs_both_labels() -> None:
    """Catches a loss of half the task, where transformers gives one only with both labels."""
    name = "BertForPreTraining"
    ours, labels, batch = twin(theirs(name)), head_labels(name), head_batch(name, "right")
    for label in labels:
        assert run(ours, {**batch, label: labels[label]}).loss is None
    assert run(ours, {**batch, **labels}).loss is not None


def test_next_sentence_says_is_next() -> None:
    """Catches p_is_next read from the wrong logit: 0 is "is next" in the checkpoints."""
    for name, key in (
        ("BertForNextSentencePrediction", "logits"),
        ("BertForPreTraining", "seq_relationship_logits"),
    ):
        ours = twin(theirs(name))
        with torch.no_grad():
            ours.cls.seq_relationship.bias.copy_(torch.tensor([50.0, -50.0]))
        output = run(ours, head_batch(name, "right"))
        assert (output[key][:, 0] > output[key][:, 1]).all() and (output.p_is_next > 0.99).all()


# Gradients and dropout


@pytest.mark.parametrize(
    ("name", "tie"), [*((name, True) for name in HEADS), ("BertForMaskedLM", False), ("BertForPreTraining", False)]
)
def test_gradients_match_transformers(name: str, tie: bool) -> None:
    """Catches a loss whose gradient is not transformers', through the tie to the word embeddings too."""
    model = copy.deepcopy(theirs(name, "tiny", tie_word_embeddings=tie, **NO_DROPOUT)).train()
    batch = {**head_batch(name, "none"), **head_labels(name)}
    ours = twin(model)
    for each in (ours, model):
        each(**batch).loss.backward()
    assert_gradients(ours, model, GRADIENT_BOUND)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForTokenClassification", "BertForQuestionAnswering"])
def test_gradients_of_padded_batches(name: str) -> None:
    """Catches a loss over tokens alone whose gradient is not its own."""
    model = copy.deepcopy(theirs(name, "tiny", **NO_DROPOUT)).train()
    labels, batch = head_labels(name), head_batch(name, "right")
    ours = twin(model)
    ours(**batch, **labels).loss.backward()
    expected_loss(name, model(**batch), labels, head_valid(batch)).backward()
    assert_gradients(ours, model, GRADIENT_BOUND)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("name", ["BertForPreTraining", "BertForQuestionAnswering"])
def test_gradients_are_as_accurate(name: str, backend: str, device: torch.device) -> None:
    """Catches a backward pass of a head that loses precision against transformers'."""
    model = copy.deepcopy(theirs(name, "tiny", **NO_DROPOUT)).train()
    at = torch.device("cpu") if backend == "cpu" else device
    ours, eager = twin(model, torch.float32, backend, at), in_dtype(model, torch.float32, at)
    reference = in_dtype(in_dtype(model, torch.float32), torch.float64)
    batch = {**head_batch(name, "none"), **head_labels(name)}
    for each in (ours, eager, reference):
        each(**to_device(batch, each.device)).loss.backward()
    assert_gradients_as_accurate(ours, eager, reference)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"hidden_dropout_prob": 0.25}, 0.25),
        ({"hidden_dropout_prob": 0.25, "classifier_dropout": 0.5}, 0.5),
        ({"hidden_dropout_prob": 0.25, "classifier_dropout": 0.0}, 0.0),
    ],
)
@pytest.mark.parametrize(
    "name", ["BertForSequenceClassification", "BertForTokenClassification", "BertForMultipleChoice"]
)
def test_classifier_dropout(name: str, settings: dict[str, float], expected: float) -> None:
    """Catches classifier_dropout that is ignored, whose 0.0 counts as None, or that runs in eval mode."""
    model = theirs(name, "tiny", **settings)
    ours, batch = twin(model), head_batch(name, "right")
    assert ours.dropout.p == model.dropout.p == expected
    for module in ours.bert.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    fixed = run(ours, batch).logits
    ours.train()
    assert torch.equal(run(ours, batch).logits, fixed) == (expected == 0.0)


# Labels and settings that do not fit


@pytest.mark.parametrize("name", HEADS)
def test_labels_of_the_wrong_shape(name: str) -> None:
    """Catches labels that broadcast, or that fail inside of PyTorch without the name of the argument."""
    ours, batch, labels = twin(theirs(name)), head_batch(name, "right"), head_labels(name)
    for label, tensor in labels.items():
        for wrong in (tensor[:1], tensor[None], torch.cat([tensor, tensor], -1)):
            with pytest.raises(ValueError, match=rf"^{label}: expected shape \(.*\), got \(.*\)$"):
                run(ours, {**batch, **labels, label: wrong})


@pytest.mark.parametrize(
    ("num_labels", "labels", "message"),
    [
        (1, torch.zeros(3), r"labels: expected shape \(4, 1\), got \(3,\)"),
        (3, torch.zeros(4), r"labels: expected shape \(4, 3\), got \(4,\)"),
        (3, torch.zeros(4, 2), r"labels: expected shape \(4, 3\), got \(4, 2\)"),
    ],
)
def test_regression_labels_of_the_wrong_shape(num_labels: int, labels: Tensor, message: str) -> None:
    """Catches (4,) labels against (4, 3) logits, which a mean squared error broadcasts in silence."""
    name = "BertForSequenceClassification"
    ours = twin(theirs(name, "tiny", num_labels=num_labels, problem_type="regression"))
    with pytest.raises(ValueError, match=message):
        run(ours, {**head_batch(name, "right"), "labels": labels.double()})


def test_question_answering_has_two_labels() -> None:
    """Catches a checkpoint with three labels whose third logit is lost in silence."""
    config = fastbert.BertConfig.from_dict(theirs().config.to_dict() | {"num_labels": 3, "id2label": None})
    with pytest.raises(ValueError, match=r"num_labels: expected 2 for question answering \(start and end\), got 3"):
        fastbert.BertForQuestionAnswering(config)


@pytest.mark.parametrize("inputs", [{}, {"input_ids": torch.zeros(4, 13).long()}, {"inputs_embeds": torch.zeros(4, 3)}])
def test_choices_of_the_wrong_shape(inputs: dict[str, Tensor]) -> None:
    """Catches choices without their dimension, taken for sequences."""
    with pytest.raises(ValueError, match=r"expected shape \(B, C, S\) or \(B, C, S, H\), got"):
        run(twin(theirs("BertForMultipleChoice")), inputs)


def test_heads_share_backend_and_strict(device: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a head that keeps backend or strict to itself, so that the encoder below runs on another."""
    model = theirs("BertForMaskedLM")
    ours = twin(model, torch.float32, "torch")
    assert ours.policy == ours.bert.policy and ours.policy.backend == "torch" and ours.policy.strict
    with pytest.raises(fastbert.BackendError, match="there are no Triton kernels for torch.float64"):
        run(twin(model, torch.float64, "triton", device), head_batch("BertForMaskedLM", "right"))
    with caplog.at_level(logging.WARNING, "fastbert"):
        run(twin(model, torch.float32, "torch", strict=True), head_batch("BertForMaskedLM", "right"))
    assert caplog.text == ""
