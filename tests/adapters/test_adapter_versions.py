"""Each entry of versions.py, a difference between versions of other libraries, has a test of its own."""

from __future__ import annotations

import functools
import inspect
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch.utils.checkpoint import checkpoint

from fastbert.adapters import versions
from fastbert.adapters.covered import COVERED, find
from fastbert.adapters.forward import parameter_names
from model_cases import make_batch, run, theirs

MAJOR = versions.transformers_version()[0]


@pytest.fixture(params=[4, 5])
def major(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Takes both sides of a difference, whatever is installed."""
    monkeypatch.setattr(versions, "transformers_version", lambda: (request.param, 0))
    number: int = request.param
    return number


def test_every_entry_has_a_test() -> None:
    """Catches a difference that is added without a test here."""
    names = [name for name, value in vars(versions).items() if inspect.isfunction(value)]
    source = inspect.getsource(inspect.getmodule(test_every_entry_has_a_test))  # type: ignore[arg-type]
    assert not [name for name in names if f"versions.{name}" not in source]


def test_the_installed_version() -> None:
    """Catches a version that is not parsed, and one outside what is supported."""
    assert (4, 48) <= versions.transformers_version() < (6, 0)


def test_covered_classes_are_there() -> None:
    """Catches a class that has another name here: nothing would be accelerated, or every call deferred."""
    import importlib

    for mapping in COVERED:
        try:
            module = importlib.import_module(mapping.module)
        except ModuleNotFoundError:
            assert mapping.family.text == "gated_rotary_bert"  # which older versions do not have
            continue
        assert find(getattr(module, mapping.model)) is mapping
        missing = {name for name in mapping.containers if not hasattr(module, name)}
        in_4 = {"MultiHeadSelfAttention", "DistilBertSdpaAttention", "AlbertSdpaAttention"}
        in_4 |= {f"{mapping.family.classes}SdpaSelfAttention"}
        assert missing <= (in_4 if MAJOR >= 5 else {"DistilBertSelfAttention"}), missing
        assert hasattr(importlib.import_module("transformers.modeling_outputs"), mapping.output)


def test_tuples_of_a_model_without_pooler(major: int) -> None:
    """Catches a tuple that is one shorter than what 4.x gives."""
    output = SimpleNamespace(pooler_output=None, to_tuple=lambda: (1, 2))
    assert versions.tuple_of(output) == ((1, None, 2) if major == 4 else (1, 2))
    assert versions.tuple_of(SimpleNamespace(pooler_output=3, to_tuple=lambda: (1, 3))) == (1, 3)
    assert versions.tuple_of(SimpleNamespace(to_tuple=lambda: (1, 2))) == (1, 2)  # of a family without poolers
    config = theirs().config
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    if major == MAJOR:
        assert len(run(model, make_batch(), return_dict=False)) == len(versions.tuple_of(run(model, make_batch())))


def test_flags_that_are_none(major: int) -> None:
    """Catches None, which heads of 4.x pass on, taken for False where the config says True, and the reverse."""
    config = SimpleNamespace(output_hidden_states=True)
    assert versions.flag({}, config, "output_hidden_states") is True
    assert versions.flag({"output_hidden_states": False}, config, "output_hidden_states") is False
    assert bool(versions.flag({"output_hidden_states": None}, config, "output_hidden_states")) == (major == 4)
    assert versions.flag({}, config, "output_attentions") is False


def test_order_of_arguments() -> None:
    """Catches head_mask, the fifth argument in 4.x, taken for inputs_embeds."""
    names = parameter_names(transformers.BertModel.forward)
    assert names[4] == ("head_mask" if MAJOR < 5 else "inputs_embeds")


def test_hooks_of_transformers_itself() -> None:
    """Catches the user's hooks taken for transformers' own, or the reverse."""

    def users(*_: Any) -> None:
        """Somebody's hook."""

    def make_inputs_require_grad(*_: Any) -> None:
        """PEFT's, for models that have no `enable_input_require_grads`."""

    assert not versions.is_harmless(users) and versions.is_harmless(make_inputs_require_grad)
    model = transformers.BertModel(theirs().config)
    model.eval()
    run(model, make_batch(), output_attentions=True, output_hidden_states=True)
    model.enable_input_require_grads()
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    assert hooks and all(map(versions.is_harmless, hooks))


def test_forwards_put_back() -> None:
    """Catches a module that 5.0 has recorded taken for one with a forward of its own, and the reverse."""
    one, other = torch.nn.Tanh(), torch.nn.Tanh()
    one.forward = one.forward
    assert versions.is_own_forward(one)
    for foreign in (other.forward, lambda x: x):
        one.forward = foreign
        assert not versions.is_own_forward(one)


def test_interfaces_of_attention(major: int) -> None:
    """Catches a registration in 4.x, whose encoders do not read it, that passes without an error."""
    if major > MAJOR:
        pytest.skip("transformers 4 is installed")
    assert (versions.attention_interfaces() is None) == (major == 4)


def test_lengths_given_to_mask_functions() -> None:
    """Catches an argument of the first 5.x that is passed over, so that every mask goes to SDPA."""
    assert versions.query_length({"q_length": 7}) == 7
    assert versions.query_length({"cache_position": torch.arange(7)}) == 7
    assert versions.query_length({}) is None


def test_pooling_modes() -> None:
    """Catches the flags of sentence-transformers before 6 read in another order than they are concatenated."""
    flags = ("cls_token", "max_tokens", "mean_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    old = SimpleNamespace(**{f"pooling_mode_{name}": name in ("max_tokens", "cls_token") for name in flags})
    assert versions.pooling_modes(old) == ("cls", "max")
    assert versions.pooling_modes(SimpleNamespace(pooling_mode="mean")) == ("mean",)
    assert versions.pooling_modes(SimpleNamespace(pooling_mode=("mean", "cls"))) == ("mean", "cls")


def test_cls_without_the_prompt() -> None:
    """Catches the two meanings of "cls" pooling that leaves a prompt out taken for one."""
    from sentence_transformers.models import Pooling  # under a new name from 6 on, and found under this one as well

    takes_prompt = versions.takes_prompt_for_cls(Pooling(8, "cls", include_prompt=False))
    modern = hasattr(Pooling(8, "cls"), "pooling_mode")
    assert takes_prompt != modern


def test_texts_become_features() -> None:
    """Catches texts that are stripped and lower-cased where the version does not, or the reverse."""
    old = SimpleNamespace(do_lower_case=True, tokenize=lambda texts: ["old", *texts])
    new = SimpleNamespace(do_lower_case=True, preprocess=lambda texts: ["new", *texts])
    assert versions.preprocess(old, ["a"]) == ["old", "a"] and versions.preprocess(new, ["a"]) == ["new", "a"]
    assert versions.cleaned(old, [" A "]) == ["a"] and versions.cleaned(new, [" A "]) == [" A "]


def test_quantised_vectors() -> None:
    """Catches a function that is not found where version 6 moved it, or a warning about its old place."""
    vectors = versions.quantize_embeddings(torch.eye(8).numpy(), "ubinary")
    assert vectors.shape == (8, 1) and vectors.dtype == "uint8"


needs_5 = pytest.mark.skipif(MAJOR < 5, reason="encoders of transformers 4 do not read the interface")


@needs_5
def test_checks_of_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a check that is not made, is made with other names, or is put around itself again and again."""
    kind, checked = transformers.PreTrainedModel, []
    monkeypatch.setattr(kind, "get_correct_attn_implementation", kind.get_correct_attn_implementation)
    versions.check_attention("eager", checked.append)
    once = kind.get_correct_attn_implementation
    versions.check_attention("eager", checked.append)
    assert kind.get_correct_attn_implementation is once
    for name in ("sdpa", "eager"):
        transformers.BertModel(transformers.BertConfig(hidden_size=12, intermediate_size=9, attn_implementation=name))
    assert checked == [transformers.BertModel]


@needs_5
def test_classes_that_read_the_attention_interface() -> None:
    """Catches a class with attention of its own that counts as a reader of the interface, or the reverse."""

    class Mine(transformers.BertModel):
        """A class whose file has no attention."""

    class Other(transformers.MPNetModel):
        """A class whose file has no attention."""

    read = (transformers.BertModel, transformers.AlbertForMaskedLM, transformers.EncoderDecoderModel, Mine)
    assert all(map(versions.reads_attention_interface, read))
    assert not any(map(versions.reads_attention_interface, (transformers.MPNetModel, transformers.IBertModel, Other)))


@needs_5
def test_masks_of_other_states() -> None:
    """Catches the mask of cross-attention taken for that of the tokens themselves, where lengths are equal."""
    from transformers import masking_utils

    outputs = []

    def mask(*args: Any, **kwargs: Any) -> Any:
        outputs.append(versions.is_mask_of_other_states(sys._getframe(1)))

    x = torch.zeros(2, 3, 4)
    config = transformers.BertConfig(attn_implementation="eager")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "eager", mask)
        for states in (None, x):
            masking_utils.create_bidirectional_mask(
                config=config, inputs_embeds=x, attention_mask=torch.ones(2, 3), encoder_hidden_states=states
            )
    assert outputs == [False, True]


def test_registries_of_attention() -> None:
    """Catches registries that are not found, so that a function somebody has registered is not seen."""
    import transformers.models.bert.modeling_bert as module

    registries = versions.attention_registries(module)
    assert (len(registries) == 2) == (MAJOR >= 5)
    assert all("sdpa" in {**everywhere, **local} for local, everywhere in registries)
    assert versions.attention_registries(torch) == ()


def test_where_the_probability_of_attention_is(major: int) -> None:
    """Catches dropout of attention with another probability than the original's, or in another module's mode."""
    plain = SimpleNamespace(dropout=SimpleNamespace(p=0.3))
    assert versions.attention_dropout(plain, plain.dropout) == (
        plain.dropout,
        "p",
        plain.dropout if major == 4 else plain,
    )
    of_sdpa = SimpleNamespace(dropout=SimpleNamespace(p=0.3), dropout_prob=0.2)
    assert versions.attention_dropout(of_sdpa, of_sdpa.dropout) == (of_sdpa, "dropout_prob", of_sdpa)


def test_where_the_original_drops_out_in_attention() -> None:
    """Catches an entry that names another mode, or another probability, than the installed version reads."""
    model = transformers.BertModel(theirs().config).eval()
    attention = model.encoder.layer[0].attention.self
    holder, name, moded = versions.attention_dropout(attention, attention.dropout)
    setattr(holder, name, 0.5)
    outputs = []
    for mode in (False, True):
        moded.training = mode
        outputs += [run(model, make_batch())[0] for _ in range(2)]
    assert torch.equal(*outputs[:2]) and not torch.equal(*outputs[2:])


def test_which_layers_are_checkpointed() -> None:
    """Catches checkpointing that is overlooked, that happens in eval mode, or that goes on when it is switched off."""
    model = transformers.BertModel(theirs().config)
    layers = list(model.encoder.layer)
    assert [versions.checkpointing(model.encoder, layer) for layer in layers] == [None, None]
    model.train().gradient_checkpointing_enable()
    functions = [versions.checkpointing(model.encoder, layer) for layer in layers]
    assert None not in functions
    assert versions.checkpointing(model.eval().encoder, layers[0]) is None
    model.train().gradient_checkpointing_disable()
    assert versions.checkpointing(model.encoder, layers[0]) is None
    old = SimpleNamespace(training=True, gradient_checkpointing=True, _gradient_checkpointing_func=len)
    assert versions.checkpointing(old, torch.nn.Identity()) is len


def test_checkpointing_is_not_reentrant() -> None:
    """Catches the reentrant kind, under which no gradient reaches the layers above frozen embeddings."""
    for function in (checkpoint, functools.partial(checkpoint, use_reentrant=True), functools.partial(checkpoint)):
        partial = versions.non_reentrant(function)
        assert isinstance(partial, functools.partial)
        assert partial.func is checkpoint and partial.keywords == {"use_reentrant": False}
    assert versions.non_reentrant(None) is None and versions.non_reentrant(len) is len
