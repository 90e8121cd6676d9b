"""Modules in odd states give the numbers of before, or their original forward runs and is counted."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import fastbert
from fastbert.adapters import counts, versions
from fastbert.ops import packing
from model_cases import LENGTH, in_dtype, make_batch, run, theirs, valid_of
from odd_cases import ODD

# Those that our path computes itself: the promise is speed, too.
FOLLOWED = {
    "no_query_bias", "no_key_bias_in_the_last_layer", "no_biases_in_attention", "linears_made_without_bias",
    "no_bias_in_intermediate", "no_bias_in_outputs", "no_bias_in_pooler", "weight_norm", "spectral_norm", "orthogonal",
    "parametrized_bias", "parametrized_words", "pruned_for_good", "packed_module", "packed_linear",
    "subclass_with_a_forward", "query_is_key", "one_layer_for_all", "shared_linears_and_norms", "shared_parameters",
    "linear_is_identity", "dropout_is_identity", "pooler_is_none", "wrapped_linear", "fewer_layers",
    "weights_not_contiguous", "weights_with_gaps", "other_eps", "other_eps_everywhere", "compiled_in_place",
    "word_embeddings_of_the_user", "frozen", "weights_made_in_inference_mode", "traced_linear",
}  # fmt: skip
# What encoders of transformers 4 do not read: both ways to run give the same numbers.
UNREAD = frozenset(
    ("other_scaling", "causal_attention", "attention_of_the_user") if versions.attention_interfaces() is None else ()
)


def outcome(odd: Callable[[Any], Any], model: Any) -> tuple[Any, Any]:
    """What the model gives after `odd`, or what it raises, and the kind of either."""
    batch = {name: value for name, value in make_batch("right").items() if name != "token_type_ids"}
    torch.manual_seed(0)
    undo = odd(model)
    try:
        output = run(model, batch)
        return type(output), [t.detach().as_subclass(Tensor) for t in output.to_tuple()]
    except Exception as error:
        return type(error), str(error)
    finally:
        if callable(undo):
            undo()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("odd", list(ODD.values()), ids=list(ODD))
def test_odd_modules(odd: Callable[[Any], Any], when: str) -> None:
    """Catches an error where the original runs, other numbers in silence, and a change that is not seen."""
    if odd.__name__.startswith("offloaded"):
        pytest.importorskip("accelerate", reason="accelerate is not installed")
    original, model = (in_dtype(theirs(), torch.float32) for _ in range(2))
    if when == "after":
        run(fastbert.accelerate(model), make_batch("right"))
    expected, numbers = outcome(odd, original)
    before = counts(model)

    def late(model: Any) -> Any:
        undo = odd(model)
        fastbert.accelerate(model)
        return undo

    kind, ours = outcome(late if when == "before" else odd, model)
    assert kind is expected, ours
    done = {reason for reason, n in counts(model).items() if n > before.get(reason, 0)}
    if isinstance(numbers, str):
        assert ours == numbers
        return
    assert len(ours) == len(numbers)
    valid = valid_of(make_batch("right")["attention_mask"])
    for one, other in zip(ours, numbers, strict=True):
        if not other.is_meta:
            one, other = (t[valid] if t.shape[:2] == valid.shape else t for t in (one, other))
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    late_config = odd is ODD["config_says_otherwise"] and when == "after"  # which the modules do not read
    if odd.__name__ not in UNREAD:
        assert (done == {"fastbert"}) == (odd.__name__ in FOLLOWED or late_config), done
    assert not any("raised" in reason for reason in done)


def test_many_odd_modules() -> None:
    """Catches a list of odd modules that shrinks."""
    assert len(ODD) >= 80 and ODD.keys() >= FOLLOWED


def test_states_that_come_and_go() -> None:
    """Catches numbers of a state that is over: settings, biases and weights that are changed back."""
    original, model = (in_dtype(theirs(), torch.float32) for _ in range(2))
    fastbert.accelerate(model)
    for each in (original, model):
        each.outputs = [run(each, make_batch("none"))[0]]
        norm, query = each.encoder.layer[0].output.LayerNorm, each.encoder.layer[1].attention.self.query
        bias, eps = query.bias, norm.eps
        query.bias, norm.eps = None, 0.25
        each.outputs.append(run(each, make_batch("none"))[0])
        query.bias = nn.Parameter(bias.detach() + 1.0)
        each.outputs.append(run(each, make_batch("none"))[0])
        query.bias, norm.eps = bias, eps
        each.outputs.append(run(each, make_batch("none"))[0])
    for one, other in zip(model.outputs, original.outputs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert counts(model) == {"fastbert": 4}


@pytest.mark.parametrize("error", [KeyError("a name"), RuntimeError("something else"), ValueError("a shape")])
def test_an_error_of_ours(error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Catches an error of our path that reaches the user, or is passed over in silence."""
    original, model = (in_dtype(theirs(), torch.float32) for _ in range(2))
    fastbert.accelerate(model)

    def failing(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(packing, "pad", failing)
    with caplog.at_level(logging.WARNING, "fastbert"):
        for _ in range(2):
            assert torch.equal(run(model, make_batch("right"))[0], run(original, make_batch("right"))[0])
    reason = f"our path raised {type(error).__name__}"
    assert counts(model) == {reason: 2}
    assert caplog.text.count(reason) == 1 and "Traceback" in caplog.text and "failing" in caplog.text
    with pytest.raises(type(error)):
        run(fastbert.accelerate(model, strict=True), make_batch("right"))


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory")])  # fmt: skip
def test_memory_at_an_end_is_no_reason_to_go_on(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an error for want of memory that is answered with a computation that needs more of it."""
    model = fastbert.accelerate(in_dtype(theirs(), torch.float32))

    def failing(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(packing, "pad", failing)
    with pytest.raises(type(error)):
        run(model, make_batch("right"))
    assert counts(model) == {}


def test_the_errors_of_users() -> None:
    """Catches a user's own mistake that gives another error than before, or is logged as one of ours."""
    original, model = (in_dtype(theirs(), torch.float32) for _ in range(2))
    fastbert.accelerate(model)
    ids = make_batch("none")["input_ids"]
    wrong: list[dict[str, Any]] = [
        {"input_ids": ids.float()}, {"input_ids": ids + 10_000}, {"input_ids": ids, "position_ids": ids + 10_000},
        {"input_ids": ids, "token_type_ids": torch.ones(3, 3)}, {"input_ids": "text"}, {"input_ids": ids[0][0]},
        {"input_ids": ids, "attention_mask": torch.ones(4, LENGTH + 1)}, {"inputs_embeds": torch.ones(4, LENGTH, 5)},
        {"input_ids": ids, "unknown_argument": object()}, {},
    ]  # fmt: skip
    for inputs in wrong:
        outcomes = []
        for each in (original, model):
            try:
                outcomes.append(type(run(each, inputs)))
            except Exception as error:
                outcomes.append(type(error))
        assert outcomes[0] is outcomes[1], inputs.keys()
    assert not any("raised" in reason for reason in counts(model))


def test_classes_that_are_patched() -> None:
    """Catches a class of transformers whose forward is exchanged, before and after the first call."""
    original, model = (in_dtype(theirs(), torch.float32) for _ in range(2))
    fastbert.accelerate(model)
    kind = type(model.encoder.layer[0].output)
    before = kind.forward
    run(model, make_batch("none"))
    try:
        kind.forward = lambda self, hidden_states, input_tensor: before(self, 2 * hidden_states, input_tensor)
        assert torch.equal(run(model, make_batch("none"))[0], run(original, make_batch("none"))[0])
    finally:
        kind.forward = before
    run(model, make_batch("none"))
    assert counts(model)["fastbert"] == 2 and any("was patched" in reason for reason in counts(model))


def test_offloaded_to_the_disk(tmp_path: Any) -> None:
    """Catches the placeholders of an offloaded model read as its weights."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    plain = in_dtype(theirs("BertForSequenceClassification"), torch.float32)
    expected = run(plain, make_batch("right")).logits
    for late in (False, True):
        model = in_dtype(theirs("BertForSequenceClassification"), torch.float32)
        if late:
            run(fastbert.accelerate(model), make_batch("right"))
        places = {"bert.embeddings": "cpu", "bert.encoder": "disk", "bert.pooler": "cpu", "classifier": "disk"}
        accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path / str(late)))
        fastbert.accelerate(model)
        assert torch.equal(run(model, make_batch("right")).logits, expected)


@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM", "BertForSequenceClassification"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_our_own_models(name: str, dtype: torch.dtype) -> None:
    """Catches an AttributeError for a bias or a weight that is None, in the C++ encoder or in the operations."""
    names = [odd for odd in ODD if odd.startswith(("no_", "layer_norm_without", "other_eps"))]
    names += ["embedding_norm_without_weight", "query_is_key", "weight_norm"]
    names += ["weights_with_gaps", "parametrized_bias", "one_layer_for_all"]
    batch = make_batch("right")
    valid = valid_of(batch["attention_mask"])
    for odd in (ODD[each] for each in names):
        if odd is ODD["no_bias_in_pooler"] and name != "BertModel":
            continue
        original = in_dtype(theirs(name), dtype)
        ours = getattr(fastbert, name)(fastbert.BertConfig.from_dict(original.config.to_dict())).to(dtype).eval()
        ours.load_state_dict(original.state_dict())
        run(ours, batch)
        for each in (original, ours):
            torch.manual_seed(0)
            odd(each.base_model if isinstance(each, transformers.PreTrainedModel) else getattr(each, "bert", each))
        output, expected = run(ours, batch)[0], run(original, batch)[0]
        if output.shape[:2] == valid.shape:
            output, expected = output[valid], expected[valid]
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5, msg=odd.__name__)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", ["no_biases_in_attention", "weight_norm", "quantised_dynamically", "other_eps_everywhere", "pruned",
             "forward_that_mixes", "layer_norm_without_anything", "tensor_subclass", "hook_on_all_modules",
             "weight_is_a_plain_tensor", "compiled_layer", "packed_module", "causal_attention"],
)  # fmt: skip
def test_sentence_encoders(name: str, minilm: Any) -> None:
    """Catches vectors of an odd model that differ, or an error where the original encodes."""
    st = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    texts = ["a cat", "a longer sentence about the river", "yes"]
    plain, model = (st.SentenceTransformer(str(minilm), device="cpu") for _ in range(2))
    fastbert.accelerate(model).encode(texts)
    vectors = []
    for each in (plain, model):
        torch.manual_seed(0)
        undo = ODD[name](each[0].auto_model)
        vectors.append(torch.tensor(each.encode(texts)))
        if callable(undo):
            undo()
    torch.testing.assert_close(vectors[1], vectors[0], rtol=1e-3, atol=1e-4)
    assert not any("raised" in reason for reason in counts(model))


def test_an_error_of_ours_in_encode(minilm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an error of the packed pipeline that reaches the user of `encode`, and is not counted."""
    st = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    from fastbert.adapters import sentences

    model = st.SentenceTransformer(str(minilm), device="cpu")
    expected = torch.tensor(model.encode("a cat"))
    fastbert.accelerate(model)

    def failing(*args: Any, **kwargs: Any) -> Any:
        raise KeyError("something")

    monkeypatch.setattr(sentences.Run, "windows", failing)
    torch.testing.assert_close(torch.tensor(model.encode("a cat")), expected, rtol=1e-4, atol=1e-5)
    assert counts(model)["our path raised KeyError"] == 1
    with pytest.raises(KeyError):
        fastbert.accelerate(model, strict=True).encode("a cat")
