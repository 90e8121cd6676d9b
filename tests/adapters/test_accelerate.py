"""accelerate and restore keep a live model of transformers: the same object, outputs and shared weights.

What they do not know is left to the original forward, counted and logged once.
"""

from __future__ import annotations

import copy
import inspect
import io
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import fastbert
from accelerate_cases import with_first_column
from fastbert.adapters import counts, versions
from fastbert.adapters.live_encoder import LiveEncoder
from helpers import assert_as_accurate
from model_cases import (
    FLOAT64_BOUND,
    HEADS,
    LENGTH,
    MASKS,
    assert_close,
    assert_gradients,
    in_dtype,
    make_batch,
    pooled,
    run,
    theirs,
    valid_of,
    weighted_sum,
)

TEXTS = ["hello world", "a much longer text with more words in it than the first one", "hi"]


def pair(name: str = "BertModel", dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, Any]:
    """A random tiny model of transformers, and an accelerated copy."""
    original = in_dtype(theirs(name, **options), dtype)
    return original, fastbert.accelerate(copy.deepcopy(original))


def assert_same(model: Any, original: Any, kind: str = "right", bound: float = FLOAT64_BOUND, **options: Any) -> Any:
    """Both give the same at tokens; returns the accelerated one's output."""
    batch = make_batch(kind)
    output, expected = run(model, batch, **options), run(original, batch, **options)
    valid = valid_of(batch["attention_mask"])
    assert_close("last_hidden_state", output[0][valid], expected[0][valid], bound)
    return output


@pytest.fixture(scope="module")
def minilm_batch(minilm: Path) -> dict[str, Tensor]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    return dict(tokenizer(TEXTS, padding=True, return_tensors="pt"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_real_weights_in_three_lines(minilm: Path, minilm_batch: dict[str, Any], dtype: torch.dtype) -> None:
    """Catches a new user's first three lines failing, or giving other numbers than before."""
    model = transformers.AutoModel.from_pretrained(minilm).eval()
    with torch.no_grad():
        reference = model.double()(**minilm_batch).last_hidden_state
        eager = model.to(dtype)(**minilm_batch).last_hidden_state

    model = fastbert.accelerate(model)
    with torch.no_grad():
        output = model(**minilm_batch)

    real = minilm_batch["attention_mask"].bool()
    assert_as_accurate("last_hidden_state", output.last_hidden_state[real], eager[real], reference[real])
    assert not output.last_hidden_state[~real].any()
    assert counts(model) == {"fastbert": 1}


@pytest.mark.parametrize("kind", MASKS)
def test_outputs_of_every_mask(kind: str) -> None:
    """Catches padding that leaks, positions that are renumbered, a wrong first token for the pooler, other types."""
    original, model = pair()
    batch = with_first_column(make_batch(kind))
    output, expected = (run(each, batch, output_hidden_states=True) for each in (model, original))
    valid = valid_of(batch["attention_mask"])
    assert_close("last_hidden_state", output[0][valid], expected[0][valid])

    assert type(output) is type(expected) and list(output.keys()) == list(expected.keys())
    assert len(output.hidden_states) == len(expected.hidden_states) == model.config.num_hidden_layers + 1
    for ours, other in zip(output.hidden_states, expected.hidden_states, strict=True):
        assert_close("hidden_states", ours[valid], other[valid])
        assert not ours[~valid].any()
    assert_close("pooler_output", output.pooler_output, pooled(original, expected.last_hidden_state, valid))
    assert counts(model) == {"fastbert": 1}


@pytest.mark.parametrize("name", HEADS)
def test_heads_keep_outputs_and_losses(name: str) -> None:
    """Catches a head that is touched, or reads something of the encoder that is no longer there."""
    original, model = pair(name)
    batch = make_batch("none", name)
    n = 2 if name == "BertForMultipleChoice" else 4
    rows, tokens = torch.arange(n) % 2, torch.arange(4 * LENGTH).view(4, LENGTH) % 3
    labels: dict[str, dict[str, Tensor]] = {
        "BertForPreTraining": {"labels": tokens, "next_sentence_label": rows},
        "BertForMaskedLM": {"labels": tokens},
        "BertForTokenClassification": {"labels": tokens},
        "BertForQuestionAnswering": {"start_positions": rows, "end_positions": rows + 1},
    }
    wanted = {**batch, **labels.get(name, {"labels": rows})}
    output, expected = run(model, wanted, output_hidden_states=True), run(original, wanted, output_hidden_states=True)
    assert type(output) is type(expected) and list(output.keys()) == list(expected.keys())
    for ours, other in zip(output.to_tuple(), expected.to_tuple(), strict=True):
        for one, two in zip(*((t,) if isinstance(t, Tensor) else t for t in (ours, other)), strict=True):
            assert_close(name, one, two)
    assert counts(model) == {"fastbert": 1}
    assert type(model).__module__.startswith("transformers.") and isinstance(model, getattr(transformers, name))


def test_inputs_embeds_positions_types_and_tuples() -> None:
    """Catches an input that is ignored, and a tuple of another length or order than transformers'."""
    for with_pooler in (True, False):
        original = transformers.BertModel(theirs().config, add_pooling_layer=with_pooler).double().eval()
        model = fastbert.accelerate(copy.deepcopy(original))
        batch = make_batch("none")
        batch["inputs_embeds"] = original.embeddings.word_embeddings(batch.pop("input_ids")).detach()
        batch["position_ids"] = batch["position_ids"][:1]
        for options in ({}, {"output_hidden_states": True}):
            output = run(model, batch, return_dict=False, **options)
            expected = run(original, batch, return_dict=False, **options)
            assert type(output) is tuple and len(output) == len(expected)
            assert [None if t is None else type(t) for t in output] == [
                None if t is None else type(t) for t in expected
            ]
            assert_close("last_hidden_state", output[0], expected[0])
        assert counts(model) == {"fastbert": 2}


def test_positional_callers_and_the_signature() -> None:
    """Catches bare *args, **kwargs, by which Trainer drops columns, and arguments in the order of another version."""
    original, model = pair()
    assert inspect.signature(model.forward) == inspect.signature(original.forward)
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    assert names[:4] == ["input_ids", "attention_mask", "token_type_ids", "position_ids"]
    assert names[4] == ("head_mask" if versions.transformers_version()[0] < 5 else "inputs_embeds")
    batch = make_batch("right")
    with torch.no_grad():
        ours = model(*(batch[name] for name in names[:4]))
    assert_close("positional", ours[0], assert_same(model, original)[0])
    with pytest.raises(TypeError):
        model(batch["input_ids"], input_ids=batch["input_ids"])


DEFERRED: dict[str, tuple[dict[str, Any], str]] = {
    "attentions": ({"output_attentions": True}, "attentions are requested"),
    "3-D mask": ({"attention_mask": torch.ones(4, LENGTH, LENGTH)}, "a 3-D attention_mask"),
    "4-D mask": ({"attention_mask": torch.zeros(4, 1, LENGTH, LENGTH, dtype=torch.float64)}, "a 4-D attention_mask"),
    "soft mask": (
        {"attention_mask": torch.full((4, LENGTH), 0.5)},
        "an attention_mask with numbers other than 0 and 1",
    ),
    "head mask": ({"head_mask": torch.ones(2, 2, dtype=torch.float64)}, "the argument head_mask"),
    "memory": ({"encoder_hidden_states": torch.ones(4, 3, 32)}, "the argument encoder_hidden_states"),
    "no input": ({"input_ids": None}, "both or none of input_ids and inputs_embeds"),
}


@pytest.mark.parametrize("case", DEFERRED)
def test_what_is_not_known_runs_as_before(case: str, caplog: pytest.LogCaptureFixture) -> None:
    """Catches an argument that is ignored in silence, an error other than the original's, a log line at every call."""
    original, model = pair()
    changes, reason = DEFERRED[case]
    batch = {**make_batch("right"), **changes}
    results = []
    with caplog.at_level(logging.WARNING, "fastbert"):
        for tried in (original, model, model):
            try:
                results.append(run(tried, batch)[0])
            except Exception as error:
                results.append(type(error))
    assert torch.equal(results[0], results[1]) if isinstance(results[0], Tensor) else results[0] is results[1]
    assert counts(model) == {reason: 2}
    assert [record.getMessage() for record in caplog.records if record.name == "fastbert"] == [
        f"accelerate: BertModel.forward runs by the original code: {reason}"
    ]
    with pytest.raises(fastbert.BackendError, match="strict"):
        run(fastbert.accelerate(model, strict=True), batch)
    assert run(fastbert.accelerate(model), make_batch("right"))[0].shape == (4, LENGTH, 32)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"is_decoder": True}, "decoder mode"),
        ({"is_decoder": True, "add_cross_attention": True}, "decoder mode"),
        ({"hidden_act": "prelu"}, "the config: hidden_act"),
        ({"chunk_size_feed_forward": LENGTH}, "the config: chunk_size_feed_forward"),
        ({"position_embedding_type": "relative_key"}, "the config: position_embedding_type"),
    ],
)
def test_configs_that_are_not_known(options: dict[str, Any], reason: str) -> None:
    """Catches an encoder that computes what BERT does where the config asks for something else."""
    original, model = pair(**options)
    assert torch.equal(run(model, make_batch())[0], run(original, make_batch())[0])
    assert [key.split(" got")[0].rstrip(":") for key in counts(model)] == [reason]
    report = fastbert.explain(model)
    assert reason in str(report) and report.calls == counts(model)


def test_hidden_states_after_attentions() -> None:
    """Catches transformers' own hooks, installed when outputs are first recorded, taken for the user's."""
    original, model = pair()
    run(model, make_batch(), output_attentions=True, output_hidden_states=True)
    output = assert_same(model, original, output_hidden_states=True)
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    assert counts(model) == {"attentions are requested": 1, "fastbert": 1}


def test_recorded_outputs_of_the_original_forward() -> None:
    """Catches a class that the recorders of transformers 5 do not know: empty hidden states and attentions."""
    original, model = pair()
    output = run(model, make_batch(), output_attentions=True, output_hidden_states=True)
    expected = run(original, make_batch(), output_attentions=True, output_hidden_states=True)
    assert len(output.attentions) == len(expected.attentions) == 2
    assert len(output.hidden_states) == len(expected.hidden_states) == 3


def test_gradients_in_eval_mode() -> None:
    """Catches gradients that stop at the engine, or go to a copy of the weights."""
    original, model = pair()
    batch, weights = make_batch("right"), valid_of(make_batch("right")["attention_mask"])
    for each in (original, model):
        output = each(**batch)
        weighted_sum({"tokens": output.last_hidden_state[weights], "pooled": output.pooler_output}).backward()
    assert_gradients(model, original, 1e-8)
    assert counts(model) == {"fastbert": 1}


def test_nothing_else_changes() -> None:
    """Catches a second copy of the weights, other names, another class for those who ask by name, random numbers."""
    original = in_dtype(theirs("BertForMaskedLM"), torch.float32)
    parameters, state = list(original.parameters()), list(original.state_dict())
    names, shown = [name for name, _ in original.named_modules()], str(original)
    kind, inner = type(original), type(original.bert)
    before = torch.get_rng_state()
    model = fastbert.accelerate(original)
    run(model, make_batch())
    assert torch.equal(torch.get_rng_state(), before)
    assert model is original and type(model) is kind
    assert isinstance(model.bert, inner) and str(type(model.bert)) == str(inner)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert list(model.state_dict()) == state and [name for name, _ in model.named_modules()] == names
    assert str(model) == shown
    assert model.get_input_embeddings() is model.bert.embeddings.word_embeddings
    encoder = model.bert.__dict__["_fastbert"].encoder(model.bert)
    shared = {id(p) for p in parameters}
    assert isinstance(encoder, LiveEncoder) and all(id(p) in shared for p in encoder.model.parameters())

    assert fastbert.accelerate(model) is model and counts(model) == {"fastbert": 1}
    assert fastbert.restore(model) is original
    assert type(model.bert) is inner and "_fastbert" not in model.bert.__dict__
    assert fastbert.restore(model) is original


def test_what_cannot_be_accelerated() -> None:
    """Catches an error that does not say what is covered, and a model that is half changed after it."""
    for model, error in ((object(), TypeError), ("bert", TypeError), (nn.Linear(2, 2), ValueError)):
        with pytest.raises(error, match="BertModel"):
            fastbert.accelerate(model)
    with pytest.raises(ValueError, match="backend"):
        fastbert.accelerate(copy.deepcopy(theirs()), backend="tpu")

    class Other(transformers.BertModel):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return None

    with pytest.raises(ValueError, match="covered"):
        fastbert.accelerate(Other(theirs().config))


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_accelerated_and_can_be_restored(way: str) -> None:
    """Catches a copy that shares modules with the first, runs as before in silence, or cannot be restored."""
    original, model = pair("BertForTokenClassification")
    for module in model.modules():  # recorders that another test's call has left, which have no pickle
        module._forward_hooks.clear()
    run(model, make_batch())
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert counts(twin) == {}
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    with torch.no_grad():
        twin.bert.encoder.layer[0].output.dense.weight.add_(1.0)
        original.bert.encoder.layer[0].output.dense.weight.add_(1.0)
    assert_close(way, run(twin, make_batch("none"))[0], run(original, make_batch("none"))[0])
    assert counts(twin) == {"fastbert": 1} and counts(model) == {"fastbert": 1}
    assert type(fastbert.restore(twin).bert) is transformers.BertModel
    assert type(model.bert) is not transformers.BertModel


def test_save_and_load(tmp_path: Path) -> None:
    """Catches a config.json that names our class, weights under other names, and a loaded model that is no original."""
    original, model = pair("BertForPreTraining", dtype=torch.float32)
    model.save_pretrained(tmp_path / "head")
    model.bert.save_pretrained(tmp_path / "base")
    for folder, name in (("head", "BertForPreTraining"), ("base", "BertModel")):
        loaded = getattr(transformers, name).from_pretrained(tmp_path / folder)
        assert loaded.config.architectures == [name] and counts(loaded) == {}
        encoder = model if folder == "head" else model.bert
        for key, value in loaded.state_dict().items():
            assert torch.equal(value, encoder.state_dict()[key]), key
    again = type(model.bert).from_pretrained(tmp_path / "base")
    for n_calls in (0, 1):  # first as it is
        assert_close("its class", run(again, make_batch("none"))[0], run(original.bert, make_batch("none"))[0], 1e-6)
        assert sum(counts(again).values()) == n_calls
        fastbert.accelerate(again)
    assert type(fastbert.restore(again)) is transformers.BertModel
    assert type(fastbert.restore(type(model.bert)(model.config))) is transformers.BertModel
