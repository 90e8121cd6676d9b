"""The output classes are read, built and copied as those of transformers."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import dataclass, fields

import pytest
import torch
import transformers.modeling_outputs
from torch.utils import _pytree as pytree
from transformers.models.bert.modeling_bert import BertForPreTrainingOutput as HfPreTrainingOutput

from fastbert.models import outputs

NAMES = [
    "BaseModelOutputWithPooling",
    "BertForPreTrainingOutput",
    "MaskedLMOutput",
    "NextSentencePredictorOutput",
    "SequenceClassifierOutput",
    "MultipleChoiceModelOutput",
    "TokenClassifierOutput",
    "QuestionAnsweringModelOutput",
]
PAIRS = {
    name: (getattr(outputs, name), getattr(transformers.modeling_outputs, name, HfPreTrainingOutput)) for name in NAMES
}
BOTH = pytest.mark.parametrize("cls", PAIRS["MaskedLMOutput"], ids=["fastbert", "transformers"])


def make_fields(cls: type, skip: int = 0) -> dict:
    """A value for each field from the one at `skip` on: a tuple of tensors for the last two, else a tensor."""
    values = {}
    for i, field in enumerate(fields(cls)):
        tensor = torch.full((2, 2), float(i))
        values[field.name] = (tensor, -tensor) if field.name in ("hidden_states", "attentions") else tensor
    return dict(list(values.items())[skip:])


@pytest.mark.parametrize("name", NAMES)
def test_fields_match_transformers(name: str) -> None:
    """Catches a field that is misnamed, misplaced or required."""
    ours, theirs = PAIRS[name]
    assert [field.name for field in fields(ours)] == [field.name for field in fields(theirs)]
    assert all(field.default is None for field in fields(ours))
    assert ours.__doc__ and all(f"{field.name}: " in ours.__doc__ for field in fields(ours))


@pytest.mark.parametrize("skip", [0, 1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_access_matches_transformers(name: str, skip: int) -> None:
    """Catches any difference of reading: by key, integer, slice, iteration, length, membership, unpacking."""
    ours, theirs = (cls(**make_fields(cls, skip)) for cls in PAIRS[name])
    values = make_fields(type(ours), skip)
    assert list(ours) == list(theirs) == list(values)
    assert list(ours.keys()) == list(theirs.keys()) and len(ours) == len(theirs)
    for output in (ours, theirs):
        for i in range(-len(values), len(values)):
            assert output[i] is output.to_tuple()[i]
        for key in values:
            assert output[key] is getattr(output, key) is output.get(key)
            assert key in output
        assert isinstance(output.to_tuple(), tuple) and len(output.to_tuple()) == len(values)
        assert output[1:] == output.to_tuple()[1:] and output[::-1][0] is output[-1] and output[5:] == ()
        first, *_ = output
        assert first == next(iter(values))
        assert "absent" not in output and output.get("absent", 3) == 3
        with pytest.raises(KeyError):
            output["absent"]
        with pytest.raises(IndexError):
            output[len(values)]
        assert isinstance(output, dict) and dict(output).keys() == {**output}.keys() == values.keys()
    for mine, value in zip(ours.values(), values.values(), strict=True):
        assert torch.equal(torch.stack(list(mine)), torch.stack(list(value)))
    assert [k for k, _ in ours.items()] == [k for k, _ in theirs.items()]
    assert repr(ours) == repr(theirs)


@pytest.mark.parametrize("name", NAMES)
def test_absent_fields(name: str) -> None:
    """Catches a None field that is counted, or that is no attribute."""
    for cls in PAIRS[name]:
        output = cls()
        assert output.to_tuple() == () and len(output) == 0
        for field in fields(cls):
            assert getattr(output, field.name) is None and field.name not in output
            with pytest.raises(KeyError):
                output[field.name]


@BOTH
def test_positional_arguments(cls: type) -> None:
    """Catches an order of construction other than that of transformers."""
    loss, logits = torch.zeros(()), torch.ones(2)
    output = cls(loss, logits)
    assert output.loss is loss and output[1] is logits and list(output) == ["loss", "logits"]


@BOTH
def test_setting(cls: type) -> None:
    """Catches attributes and keys that drift apart, or an order of keys other than that of transformers."""
    output = cls(logits=torch.ones(2))
    loss, logits, extra = torch.zeros(()), torch.full((2,), 2.0), torch.full((2,), 3.0)
    output.loss = loss
    assert output["loss"] is loss and list(output) == ["logits", "loss"] and output[1] is loss
    output["logits"] = logits
    assert output.logits is logits and output[0] is logits
    output["extra"] = extra
    assert output.extra is extra and output[-1] is extra
    output.note = "not a field"
    assert "note" not in output and output.note == "not a field"


def test_setting_none_takes_the_key_away() -> None:
    """Catches a stale key under a field set to None, which transformers keeps and we take away."""
    output = outputs.MaskedLMOutput(loss=torch.zeros(()), logits=torch.ones(2))
    output.loss = None
    assert output.loss is None and list(output) == ["logits"]
    output["logits"] = None
    assert output.logits is None and len(output) == 0
    output["attentions"] = None
    assert len(output) == 0
    with pytest.raises(TypeError, match="key: got 0, expected a string"):
        output[0] = torch.ones(2)


@BOTH
def test_deletion_is_refused(cls: type) -> None:
    """Catches an entry that can be removed where transformers forbids it."""
    output = cls(logits=torch.ones(2))
    for attempt in (
        lambda: output.__delitem__("logits"),
        lambda: output.pop("logits"),
        lambda: output.setdefault("loss", 1),
        lambda: output.update(loss=1),
    ):
        with pytest.raises(Exception, match=cls.__name__):
            attempt()
    assert list(output) == ["logits"]


def test_other_deletions_are_refused() -> None:
    """Catches a way of removing a key that leaves its attribute behind."""
    output = outputs.MaskedLMOutput(logits=torch.ones(2))
    output.note = 1
    for attempt in (
        output.clear,
        output.popitem,
        lambda: delattr(output, "logits"),
        lambda: output.pop("absent", None),
    ):
        with pytest.raises(TypeError, match="MaskedLMOutput: .* is not supported"):
            attempt()
    del output.note
    assert output[0] is output.logits


@BOTH
def test_built_from_items(cls: type) -> None:
    """Catches outputs that DataParallel, accelerate or a Trainer cannot rebuild: type(out)(pairs or mapping)."""
    output = cls(logits=torch.ones(2), hidden_states=(torch.ones(1),))
    for items in (
        ((key, output[key]) for key in output),
        [(key, output[key]) for key in output],
        dict(output),
        output,
    ):
        again = cls(items)
        assert list(again) == ["logits", "hidden_states"] and again.loss is None
        assert again.logits is output.logits and again.hidden_states is output.hidden_states
    assert list(output.copy()) == list(output) and type(output.copy()) is cls
    assert len(cls(())) == 0 and len(cls({})) == 0


@BOTH
def test_first_field_that_is_no_items(cls: type) -> None:
    """Catches a tensor, number or plain tuple in the first field that is taken apart as items."""
    for value in (torch.ones(3, 2), 0.5, "text", (torch.ones(1), torch.ones(1)), [1, 2]):
        output = cls(value)
        assert output.loss is value and output[0] is value and len(output) == 1


def test_iterator_that_is_no_items() -> None:
    """Catches an iterator in the first field that arrives used up."""
    assert outputs.MaskedLMOutput(iter([1, 2])).loss == [1, 2]


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_pickles(name: str) -> None:
    """Catches an output that does not survive pickle or copy, as between processes."""
    output = PAIRS[name][0](**make_fields(PAIRS[name][0], 1))
    output.note = "kept"
    for again in (pickle.loads(pickle.dumps(output)), copy.deepcopy(output), copy.copy(output)):
        assert type(again) is type(output) and list(again) == list(output) and again.note == "kept"
        for key in output:
            assert again[key] is getattr(again, key)
            torch.testing.assert_close(again[key], output[key])
    assert copy.copy(output)[0] is output[0] and copy.deepcopy(output)[0] is not output[0]


@pytest.mark.parametrize("name", NAMES)
def test_pytree(name: str) -> None:
    """Catches an output that torch sees as one leaf, or rebuilds as another type or with other keys."""
    cls = PAIRS[name][0]
    output = cls(**make_fields(cls, 1))
    leaves, spec = pytree.tree_flatten(output)
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)
    doubled = pytree.tree_map(lambda x: 2 * x, output)
    assert type(doubled) is cls and list(doubled) == list(output)
    assert torch.equal(doubled[0], 2 * output[0]) and torch.equal(doubled.attentions[1], 2 * output.attentions[1])
    shapes = pytree.tree_map(lambda x: x.shape, output)
    assert shapes[0] == torch.Size((2, 2)) and list(shapes) == list(output)
    assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec
    paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(output)[0]]
    assert paths[0] == f"['{next(iter(output))}']" and len(paths) == len(leaves)


class MakesOutput(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> outputs.MaskedLMOutput:
        output = outputs.MaskedLMOutput(logits=x + 1, hidden_states=(x,))
        output.loss = output[0].sum() + output["logits"].sum()
        return output


class TakesOutput(torch.nn.Module):
    def forward(self, output: outputs.MaskedLMOutput) -> tuple[torch.Tensor, ...]:
        assert "loss" not in output and len(output) == 2
        return outputs.TokenClassifierOutput(logits=output.logits * 2 + output.hidden_states[0]).to_tuple()


def test_compile_and_export() -> None:
    """Catches an output that breaks the graph of torch.compile, or that torch.export cannot return or save."""
    x = torch.ones(3)
    own = MakesOutput()(x)
    programs = [torch.compile(MakesOutput(), fullgraph=True, backend="eager")]
    exported = torch.export.export(MakesOutput(), (x,))
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    programs += [exported.module(), torch.export.load(file).module()]
    for program in programs:
        again = program(x)
        assert type(again) is outputs.MaskedLMOutput
        assert list(again) == list(own) == ["logits", "hidden_states", "loss"]
        assert torch.equal(again.loss, own.loss) and torch.equal(again[0], own[0])
    output = outputs.MaskedLMOutput(logits=x, hidden_states=(x,))
    for program in (
        torch.compile(TakesOutput(), fullgraph=True, backend="eager"),
        torch.export.export(TakesOutput(), (output,)).module(),
    ):
        assert torch.equal(program(output)[0], 3 * x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_p_is_next(dtype: torch.dtype) -> None:
    """Catches the two classes of the next-sentence head exchanged, or a probability in 16 bits."""
    logits = torch.tensor([[4.0, -1.0], [-3.0, 2.5], [0.0, 0.0], [-1000.0, 1000.0]], dtype=dtype)
    expected = torch.sigmoid((logits[:, 0] - logits[:, 1]).double())
    for output in (
        outputs.NextSentencePredictorOutput(logits=logits),
        outputs.BertForPreTrainingOutput(seq_relationship_logits=logits, prediction_logits=torch.ones(4, 2, 9)),
    ):
        assert output.p_is_next.shape == (4,)
        assert output.p_is_next.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(output.p_is_next.double(), expected, rtol=1e-6, atol=1e-7)
        assert "p_is_next" not in output


def test_p_is_next_without_logits() -> None:
    """Catches an obscure failure where the logits are absent."""
    with pytest.raises(AttributeError, match="p_is_next: needs seq_relationship_logits, which is None"):
        _ = outputs.BertForPreTrainingOutput().p_is_next
    assert not hasattr(outputs.NextSentencePredictorOutput(), "p_is_next")


def test_subclass_must_be_a_dataclass() -> None:
    """Catches a subclass without the decorator, whose fields would be lost in silence."""

    class Bare(outputs.ModelOutput):
        logits: torch.Tensor | None = None

    with pytest.raises(TypeError, match="Bare: not a dataclass"):
        Bare(logits=torch.ones(2))
    with pytest.raises(TypeError, match="ModelOutput: not a dataclass"):
        outputs.ModelOutput()


def test_subclass_of_a_user() -> None:
    """Catches a base class that only serves the classes of its own file."""

    @dataclass
    class Scores(outputs.MaskedLMOutput):
        scores: torch.Tensor | None = None

    output = Scores(logits=torch.ones(2), scores=torch.zeros(2))
    assert list(output) == ["logits", "scores"]
    assert type(pytree.tree_map(lambda x: x + 1, output)) is Scores
