"""accelerate covers the other families: RoBERTa, XLM-RoBERTa, CamemBERT, DistilBERT, ELECTRA and MPNet."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import fastbert
from accelerate_cases import with_first_column
from family_cases import KINDS, OTHERS, WITH_HEADS, make_batch, run, their_class, theirs
from fastbert.adapters import counts
from fastbert.adapters.covered import COVERED
from model_cases import (
    LENGTH,
    MASKS,
    VOCAB,
    assert_close,
    assert_gradients,
    in_dtype,
    pooled,
    valid_of,
    weighted_sum,
)

ROTARY = ("modernbert", "gte", "nomic_bert")
FIRST = "padding in the first column"


def pair(model_type: str, name: str = "BertModel", **options: Any) -> tuple[Any, Any]:
    """A random tiny model of transformers, and an accelerated copy."""
    original = copy.deepcopy(theirs(model_type, name, **options))
    return original, fastbert.accelerate(copy.deepcopy(original))


def assert_same(model: Any, original: Any, batch: dict[str, Any] | None = None, bound: float = 1e-10) -> None:
    """Both give the same at tokens."""
    batch = make_batch(original.config.model_type) if batch is None else batch
    valid = valid_of(batch["attention_mask"])
    assert_close("last_hidden_state", run(model, batch)[0][valid], run(original, batch)[0][valid], bound)


@pytest.mark.parametrize("model_type", OTHERS)
@pytest.mark.parametrize("kind", MASKS)
def test_outputs_of_every_family_and_mask(model_type: str, kind: str) -> None:
    """Catches positions or segments of BERT's, padding that leaks, a part left out, another class of output."""
    original, model = pair(model_type)
    for padded in (True, False):
        batch = with_first_column(make_batch(model_type, kind, padded))
        valid = valid_of(batch["attention_mask"])
        output, expected = (run(each, batch, output_hidden_states=True) for each in (model, original))
        assert type(output) is type(expected) and list(output.keys()) == list(expected.keys())
        assert len(output.hidden_states) == len(expected.hidden_states) == original.config.num_hidden_layers + 1
        for ours, other in zip(output.hidden_states, expected.hidden_states, strict=True):
            assert_close("hidden_states", ours[valid], other[valid])
            assert not ours[~valid].any()
        assert output.hidden_states[-1] is output.last_hidden_state
        if "pooler_output" in output:
            assert_close("pooler", output.pooler_output, pooled(original, expected.last_hidden_state, valid))
    assert counts(model) == {"fastbert": 2}


@pytest.mark.parametrize(
    ("model_type", "name"),
    [*WITH_HEADS, ("electra", "BertForPreTraining"), ("electra", "BertForMultipleChoice"),
     ("distilbert", "BertForMultipleChoice")],
)  # fmt: skip
def test_heads_stay_as_they_are(model_type: str, name: str) -> None:
    """Catches a head that is touched, or reads something of the encoder that is no longer there."""
    original, model = pair(model_type, name)
    batch = make_batch(model_type, "right")
    if name == "BertForMultipleChoice":
        if getattr(original.base_model, "pooler", "") is None:
            pytest.skip("transformers 5.0 makes it without the pooler that it reads, and fails by itself")
        batch = {key: value.unflatten(0, (2, 2)) for key, value in batch.items()}
    output, expected = (run(each, batch, output_hidden_states=True) for each in (model, original))
    assert type(output) is type(expected) and list(output.keys()) == list(expected.keys())
    valid = batch["attention_mask"].bool()
    for key in set(output.keys()) - {"hidden_states"}:
        of_tokens = output[key].shape[:2] == valid.shape and name != "BertForMultipleChoice"
        ours, other = (each[key][valid] if of_tokens else each[key] for each in (output, expected))
        assert_close(key, ours, other)
    assert counts(model) == {"fastbert": 1}
    assert isinstance(model, their_class(model_type, name))


@pytest.mark.parametrize("model_type", KINDS)
def test_heads_that_read_the_first_column(model_type: str) -> None:
    """Catches logits of a row of zeros where texts are padded on the left, and a copy that forgets."""
    original, model = pair(model_type, "BertForSequenceClassification")
    left = make_batch(model_type, "left")
    expected = run(original, left).logits
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(each, left).logits, expected)
        assert_close("right", run(each, make_batch(model_type)).logits, run(original, make_batch(model_type)).logits)
        assert counts(each) == {FIRST: 1, "fastbert": 1}

    class Mine(their_class(model_type, "BertForSequenceClassification")):  # type: ignore[misc]
        """A user's class, derived from the head."""

    mine = Mine(original.config).double().eval()
    mine.load_state_dict(original.state_dict())
    inner = fastbert.accelerate(mine.base_model)
    fastbert.accelerate(mine)
    assert torch.equal(run(mine, left).logits, expected) and counts(inner) == {FIRST: 1}
    original, tokens = pair(model_type, "BertForTokenClassification")
    assert torch.equal(run(tokens, left).logits, run(original, left).logits) and counts(tokens) == {FIRST: 1}


@pytest.mark.parametrize("model_type", KINDS)
def test_embeddings_positions_and_tuples(model_type: str) -> None:
    """Catches the width or the positions of BERT's inputs_embeds, ids that are ignored, tuples of another length."""
    original, model = pair(model_type)
    ids = make_batch(model_type, "none")["input_ids"]
    words = original.get_input_embeddings()(ids).detach()
    positions = torch.arange(LENGTH).flip(0)[None] + 3
    calls: list[dict[str, Any]] = [{"inputs_embeds": words}, {"input_ids": ids}]
    if "position_ids" in inspect.signature(original.forward).parameters:
        calls += [{**call, "position_ids": positions} for call in calls]
    if model_type not in ("distilbert", "mpnet"):
        n_types = original.config.type_vocab_size
        calls += [{"input_ids": ids, "token_type_ids": torch.arange(LENGTH).expand(4, -1) % n_types}]
    for call in calls:
        for options in ({}, {"output_hidden_states": True}):
            output = run(model, call, return_dict=False, **options)
            expected = run(original, call, return_dict=False, **options)
            assert type(output) is tuple and len(output) == len(expected)
            assert_close("last_hidden_state", output[0], expected[0])
    assert counts(model) == {"fastbert": 2 * len(calls)}
    wrong = torch.zeros(2, 3, words.shape[-1] + 1, dtype=torch.float64)
    for each in (model, original):
        with pytest.raises(Exception):  # noqa: B017, PT011
            run(each, {"inputs_embeds": wrong})


def test_electra_without_a_projection() -> None:
    """Catches a projection that is expected where the widths are equal, and one that is put there later passed over."""
    original, model = pair("electra", embedding_size=32)
    assert_same(model, original)
    original, model = pair("electra")
    for each in (original, model):
        each.embeddings_project = nn.Sequential(each.embeddings_project, nn.Tanh())
    assert_same(model, original)
    assert counts(model) == {"fastbert": 1}
    del model.embeddings_project, original.embeddings_project
    for each in (original, model):
        with pytest.raises(RuntimeError):
            run(each, make_batch("electra"))
    assert counts(model) == {"fastbert": 1, "embeddings_project is missing": 1}


@pytest.mark.parametrize("model_type", KINDS)
def test_what_is_not_known_runs_as_before(model_type: str) -> None:
    """Catches an argument that is ignored in silence, and an error other than the original's."""
    original, model = pair(model_type)
    batch = make_batch(model_type)
    cases: dict[str, dict[str, Any]] = {
        "attentions are requested": {"output_attentions": True},
        "a 4-D attention_mask": {"attention_mask": torch.zeros(4, 1, LENGTH, LENGTH, dtype=torch.float64)},
        "the argument head_mask": {"head_mask": torch.ones(2, 2, dtype=torch.float64)},
    }
    if model_type == "distilbert":
        cases["the argument token_type_ids"] = {"token_type_ids": torch.zeros_like(batch["input_ids"])}
        if "position_ids" not in inspect.signature(original.forward).parameters:  # 4.x
            cases["the argument position_ids"] = {"position_ids": torch.zeros_like(batch["input_ids"])}
    for changes in cases.values():
        results = []
        for each in (original, model):
            try:
                results.append(run(each, {**batch, **changes})[0])
            except Exception as error:
                results.append(type(error))
        assert torch.equal(*results) if isinstance(results[0], Tensor) else results[0] is results[1]
    assert counts(model) == dict.fromkeys(cases, 1)
    assert inspect.signature(model.forward) == inspect.signature(original.forward)
    with pytest.raises(fastbert.BackendError, match="strict"):
        run(fastbert.accelerate(model, strict=True), batch, output_attentions=True)


@pytest.mark.parametrize("model_type", KINDS)
def test_same_object_copies_and_restore(model_type: str) -> None:
    """Catches a second copy of the weights, other names, a copy that runs as before or cannot be restored."""
    original = in_dtype(theirs(model_type, "BertForTokenClassification"), torch.float64)
    kind, expected = type(original.base_model), run(original, make_batch(model_type, "none")).logits
    parameters, state = list(original.parameters()), list(original.state_dict())
    model = fastbert.accelerate(original)
    assert_close("logits", run(model, make_batch(model_type, "none")).logits, expected)
    assert model is original and isinstance(model.base_model, kind)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert list(model.state_dict()) == state
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_close("copy", run(twin, make_batch(model_type, "none")).logits, expected)
        assert counts(twin) == {"fastbert": 1}
        assert type(fastbert.restore(twin).base_model) is kind
    assert "fastbert" not in str(type(model.base_model)) and fastbert.accelerate(model) is model
    assert fastbert.restore(model) is original and type(model.base_model) is kind
    assert torch.equal(run(model, make_batch(model_type, "none")).logits, expected) and counts(model) == {}


@pytest.mark.parametrize("model_type", KINDS)
def test_gradients_in_eval_mode(model_type: str) -> None:
    """Catches gradients that stop at the engine, or go to a copy of the weights."""
    original, model = pair(model_type)
    batch = make_batch(model_type)
    batch["input_ids"][batch["attention_mask"] != 0] += (
        2  # past the padding id, whose position transformers never trains
    )
    batch["input_ids"] %= VOCAB - 2
    for each in (original, model):
        weighted_sum({"tokens": each(**batch).last_hidden_state[valid_of(batch["attention_mask"])]}).backward()
    assert_gradients(model, original, 1e-8)
    assert counts(model) == {"fastbert": 1}


@pytest.mark.parametrize("model_type", KINDS)
def test_changes_are_seen(model_type: str) -> None:
    """Catches weights, tables or modules of before, under this family's names."""
    original, model = pair(model_type)
    names = {"roberta": "encoder.layer.0.attention.self.query", "distilbert": "transformer.layer.0.attention.q_lin",
             "mpnet": "encoder.layer.0.attention.attn.q",
             "albert": "encoder.albert_layer_groups.0.albert_layers.0.attention.query"}  # fmt: skip
    path = names.get(model_type, names["roberta"])
    parent, _, name = path.rpartition(".")
    steps: list[Any] = [
        lambda m: None,
        lambda m: (m.get_submodule(path).weight.data.mul_(2), m.eval()),
        lambda m: m.get_submodule(path).weight.detach().mul_(0.5),
        lambda m: setattr(m.get_submodule(parent), name, nn.Sequential(m.get_submodule(path)).eval()),
        lambda m: setattr(m.get_submodule(parent), name, m.get_submodule(path)[0]),
        lambda m: m.resize_token_embeddings(VOCAB + 5, mean_resizing=False),
        lambda m: m.to(torch.float32).to(torch.float64),
    ]
    for step in steps:
        torch.manual_seed(0)
        step(original)
        step(model)
        model.load_state_dict(original.state_dict()) if step is steps[5] else None
        assert_same(model, original)
    assert counts(model) == {"fastbert": len(steps)}
    if model_type != "albert":  # whose groups have no shorter list
        last = model.get_submodule(path.split(".layer.")[0])
        last.layer = last.layer[:1]
    n_states = 5 if model_type == "albert" else 2
    assert len(run(model, make_batch(model_type), output_hidden_states=True).hidden_states) == n_states
    handle = model.get_submodule(path).register_forward_hook(lambda *_: None)
    run(model, make_batch(model_type))
    handle.remove()
    assert counts(model) == {"fastbert": len(steps) + 1, "a module inside has hooks": 1}


@pytest.mark.parametrize("model_type", KINDS)
def test_buffers_of_default_ids(model_type: str) -> None:
    """Catches buffers that the original reads and we do not, and a deferral for one that it does not read."""
    original, model = pair(model_type)
    for each in (original, model):
        each.embeddings.position_ids = each.embeddings.position_ids.flip(1)
    run_both = [run(each, make_batch(model_type, "none"))[0] for each in (model, original)]
    assert_close("positions", *run_both)
    reason = (
        "fastbert" if model_type in ("roberta", "mpnet") else "embeddings.position_ids differs from that of a new model"
    )
    assert counts(model) == {reason: 1}


def test_positions_count_from_the_id_that_the_module_has() -> None:
    """Catches a config.pad_token_id that is set afterwards, as many do, taken for the one that positions count from."""
    original, model = pair("roberta")
    for each in (original, model):
        each.config.pad_token_id = 7
    assert_same(model, original)
    for each in (original, model):
        each.embeddings.padding_idx = 4
    assert_same(model, original)
    assert counts(model) == {"fastbert": 2}


@pytest.mark.parametrize("model_type", KINDS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_any_attention_of_transformers(model_type: str, attention: str) -> None:
    """Catches a class of attention, of 4.x, that is not known."""
    if attention == "sdpa" and not their_class(model_type, "BertModel")._supports_sdpa:
        pytest.skip("ELECTRA of transformers 4 has no such attention")
    _, model = pair(model_type, attn_implementation=attention)
    assert_same(model, theirs(model_type))
    assert counts(model) == {"fastbert": 1}


def test_masks_of_other_whole_numbers() -> None:
    """Catches a mask that DeBERTa multiplies its embeddings by, taken for one of zeros and ones."""
    for model_type, reason in (
        ("bert", "fastbert"),
        ("deberta-v2", "an attention_mask with numbers other than 0 and 1"),
    ):
        original, batch = theirs(model_type), make_batch(model_type)
        model, batch["attention_mask"] = fastbert.accelerate(theirs(model_type)), 2 * batch["attention_mask"]
        tokens = batch["attention_mask"] > 0
        assert_close(model_type, run(model, batch)[0][tokens], run(original, batch)[0][tokens])
        assert counts(model) == {reason: 1}


def test_explain_and_verify() -> None:
    """Catches a report that knows BERT alone."""
    for model_type in KINDS:
        model = fastbert.accelerate(in_dtype(theirs(model_type), torch.float32))
        run(model, make_batch(model_type))
        report = fastbert.explain(model)
        assert report.calls == {"fastbert": 1} and report.model == type(model).__name__
        assert {row.op for row in report.rows} >= {"embedding", "linear", "attention", "layer_norm"}
        assert fastbert.verify(model, [[7, 8, 9, 10], [11, 12]]).ok


def test_what_is_covered_is_said() -> None:
    """Catches an error that does not list every family, and a model of a family that is not covered half changed."""
    config = transformers.ErnieConfig(vocab_size=30, hidden_size=32, num_attention_heads=2, num_hidden_layers=1,
                                      intermediate_size=37)  # fmt: skip
    model = transformers.ErnieModel(config)
    with pytest.raises(ValueError, match="ErnieModel") as raised:
        fastbert.accelerate(model)
    covered = "bert", *OTHERS, *ROTARY, "deberta-v2"
    names = {their_class(model_type, "BertModel").__name__ for model_type in covered}
    assert names == {mapping.model for mapping in COVERED}
    assert all(name in str(raised.value) for name in names)
    assert type(model) is transformers.ErnieModel
