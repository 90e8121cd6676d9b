"""Methods and functions that somebody has patched run as patched, before and after accelerate."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer
from torch import nn
from transformers.models.bert import modeling_bert

import fastbert
from accelerate_cases import accelerated, check
from fastbert.adapters import counts, versions
from fastbert.adapters.covered import COVERED
from fastbert.adapters.patches import Watch, is_own
from model_cases import make_batch, run, theirs


def fresh() -> Any:
    return copy.deepcopy(theirs())


def test_what_the_libraries_wrote_is_their_own() -> None:
    """Catches a method of an installed version taken for a patch: no call would be fast."""
    for mapping in COVERED:
        module = importlib.import_module(mapping.module)
        classes = [getattr(module, name) for name in (mapping.model, *mapping.containers) if hasattr(module, name)]
        assert Watch([*classes, nn.Linear, nn.LayerNorm, nn.Embedding, nn.Dropout], module).obstacle() is None
    assert is_own(SentenceTransformer, "encode") and is_own(nn.Module, "__call__")


class Foreign(nn.Module):
    """Somebody's module."""

    def forward(self, *args: Any, **kwargs: Any) -> str:
        return "theirs"


def wrapper(before: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a function as instrumentation does it, with the name and the signature of the original."""

    @functools.wraps(before)
    def call(*args: Any, **kwargs: Any) -> Any:
        return before(*args, **kwargs), "seen"

    return call


class Proxy:
    """Has everything of the original but the call, as wrapt's FunctionWrapper."""

    def __init__(self, wrapped: Any) -> None:
        self.__wrapped__ = wrapped

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__wrapped__, name)

    def __get__(self, instance: Any, owner: Any) -> Any:
        return functools.partial(self, instance)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__wrapped__(*args, **kwargs), "seen"


FORWARD = transformers.BertModel.forward
PATCHES: dict[str, Any] = {
    "a function": lambda self, *args, **kwargs: "theirs",
    "a mock": mock.MagicMock(return_value="theirs"),
    "a wrapper": wrapper(FORWARD),
    "a proxy": Proxy(FORWARD),
    "a method of another class": Foreign.forward,
    "no_grad": torch.no_grad()(FORWARD),
    "static": staticmethod(lambda *args, **kwargs: "theirs"),
}


@pytest.mark.parametrize("name", PATCHES)
@pytest.mark.parametrize("order", ["patched before", "patched after", "patched between calls"])
def test_a_patched_forward(name: str, order: str) -> None:
    """Catches a patch that accelerated objects keep for good, or do not see."""
    kind, batch = transformers.BertModel, make_batch("right")
    model = fresh() if order == "patched before" else fastbert.accelerate(fresh())
    if order == "patched between calls":
        run(model, batch)
    with mock.patch.object(kind, "forward", PATCHES[name]):
        if order == "patched before":
            fastbert.accelerate(model)
        expected, output = run(fresh(), batch), run(model, batch)
    assert type(output) is type(expected)
    if not isinstance(expected, (str, tuple)):
        assert torch.equal(output[0], expected[0])
    elif isinstance(expected, tuple):
        assert output[1] == "seen"
    elif isinstance(expected, str):
        assert output == "theirs"
    calls = int(order == "patched between calls")
    assert counts(model) == {**({"fastbert": 1} if calls else {}), "forward of the class BertModel was patched": 1}
    check(model, {**counts(model), "fastbert": calls + 1})
    assert inspect.signature(model.forward) == inspect.signature(fresh().forward)
    later = fastbert.accelerate(fresh())
    check(later, 1)


def test_strict_refuses_a_patched_forward() -> None:
    """Catches a patch that runs where the user has asked for errors."""
    model = fastbert.accelerate(fresh(), strict=True)
    patched = mock.patch.object(transformers.BertModel, "forward", lambda *_, **__: None)
    with patched, pytest.raises(fastbert.BackendError, match="forward of the class BertModel was patched"):
        run(model, make_batch())


def test_patched_in_training_mode() -> None:
    """Catches the original run in the place of the patch in calls that are not ours anyway."""
    model = fastbert.accelerate(fresh()).train()
    with mock.patch.object(transformers.BertModel, "forward", lambda *_, **__: "theirs"):
        assert run(model, make_batch()) == "theirs"
    assert not isinstance(run(model, make_batch()), str)


@pytest.mark.parametrize("strict", [False, True])
def test_patches_of_one_object(strict: bool) -> None:
    """Catches a patch of an accelerated object that is passed over, or that outlives its end."""
    model = fastbert.accelerate(fresh(), strict=strict)
    with mock.patch.object(model, "forward", return_value="theirs"):
        assert run(model, make_batch()) == "theirs"
    with mock.patch.object(type(model), "forward", lambda *_, **__: "theirs"):
        assert run(model, make_batch()) == "theirs"
    before = model.forward
    model.forward = lambda *args, **kwargs: (before(*args, **kwargs), "seen")
    assert run(model, make_batch("right"))[1] == "seen"
    del model.forward
    check(model, 2)


def inner_patches() -> dict[str, tuple[Any, str]]:
    classes = (
        "BertLayer",
        "BertEncoder",
        "BertEmbeddings",
        "BertSelfOutput",
        "BertIntermediate",
        "BertPooler",
        "BertSelfAttention",
    )
    patches: dict[str, tuple[Any, str]] = {name: (getattr(modeling_bert, name), "forward") for name in classes}
    patches |= {
        kind.__name__: (kind, "forward") for kind in (nn.Linear, nn.LayerNorm, nn.Embedding, nn.Dropout, nn.Tanh)
    }
    patches["an activation"] = (transformers.activations.GELUActivation, "forward")
    patches["all modules"] = (nn.Module, "__call__")
    patches["a helper"] = (modeling_bert.BertLayer, "feed_forward_chunk")
    return patches


@contextmanager
def counted(owner: Any, name: str) -> Iterator[list[Any]]:
    """Calls of a method or a function, while a wrapper stands in for it."""
    calls: list[Any] = []
    before = getattr(owner, name)

    @functools.wraps(before)
    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return before(*args, **kwargs)

    with mock.patch.object(owner, name, call):
        yield calls


@pytest.mark.parametrize("name", inner_patches())
@pytest.mark.parametrize("first", [False, True])
def test_patches_inside(name: str, first: bool) -> None:
    """Catches a patch of a class inside, or of PyTorch's, that our path would leave out."""
    owner, method = inner_patches()[name]
    model = fastbert.accelerate(fresh()) if first else accelerated()
    before = counts(model).get("fastbert", 0)
    with counted(owner, method) as calls:
        run(model, make_batch())
        ours = len(calls)
        calls.clear()
        run(fresh(), make_batch())
        assert ours == len(calls) > 0
    assert counts(model).get("fastbert", 0) == before and len(counts(model)) == 1 + bool(before)
    check(model, {**counts(model), "fastbert": before + 1})


@pytest.mark.skipif(not hasattr(modeling_bert, "create_bidirectional_mask"), reason="of transformers 5")
def test_patched_functions_of_the_source() -> None:
    """Catches a function of modeling_bert that somebody has exchanged, as for another mask."""
    model = accelerated()
    with counted(modeling_bert, "create_bidirectional_mask") as calls:
        run(model, make_batch())
    assert (
        calls and counts(model)["create_bidirectional_mask in transformers.models.bert.modeling_bert was patched"] == 1
    )
    check(model, {**counts(model), "fastbert": 2})


@pytest.mark.parametrize("name", ["linear", "layer_norm", "embedding"])
def test_patched_functions_of_pytorch(name: str) -> None:
    """Catches a function of PyTorch that somebody has exchanged for all models, as for an attention of their own."""
    model = accelerated()
    with counted(torch.nn.functional, name) as calls:
        run(model, make_batch())
    assert calls and counts(model) == {"fastbert": 1, f"{name} in torch.nn.functional was patched": 1}
    check(model, {**counts(model), "fastbert": 2})


@pytest.mark.skipif(versions.attention_interfaces() is None, reason="encoders of transformers 4 do not read it")
def test_an_attention_that_somebody_has_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a registered function of attention, such as one with a bias, that our path leaves out."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def biased(module: Any, query: Any, key: Any, value: Any, mask: Any, **rest: Any) -> Any:
        return sdpa_attention_forward(module, 2 * query, key, value, mask, **rest)

    AttentionInterface.register("biased", biased)
    AttentionMaskInterface.register("biased", sdpa_mask)
    model = accelerated()
    model.set_attn_implementation("biased")
    check(model, {"fastbert": 1, "its attention is 'biased', a registered function": 1}, bound=1e-12)
    model.set_attn_implementation("sdpa")
    check(model, {**counts(model), "fastbert": 2})
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", biased)
    check(model, {**counts(model), "its attention is 'sdpa', a registered function": 1}, bound=1e-12)


def test_hooks_on_all_modules() -> None:
    """Catches hooks that PyTorch calls for every module and that our path, which calls no modules, leaves out."""
    model, names = accelerated(), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: names.append(type(module).__name__))
    run(model, make_batch())
    handle.remove()
    assert {"Linear", "BertLayer", "BertModel"} <= set(names) and counts(model) == {
        "fastbert": 1,
        "hooks on all modules": 1,
    }
    check(model, {**counts(model), "fastbert": 2})


SENTENCES: dict[str, tuple[str, str]] = {
    "encode": ("model", "encode"),
    "forward": ("model", "forward"),
    "tokens": ("transformer", "preprocess" if hasattr(SentenceTransformer, "preprocess") else "tokenize"),
    "forward of the first module": ("transformer", "forward"),
    "pooling": ("pooling", "forward"),
    "the encoder": ("encoder", "forward"),
    "a layer": ("layer", "forward"),
}


@pytest.mark.parametrize("of", ["class", "object"])
@pytest.mark.parametrize("name", SENTENCES)
def test_patches_of_sentence_transformers(name: str, of: str, minilm: Path) -> None:
    """Catches a spy or a mock that encode passes over."""
    model = fastbert.accelerate(SentenceTransformer(str(minilm), device="cpu"))
    plain = SentenceTransformer(str(minilm), device="cpu")
    expected = model.encode(["one", "two texts"])

    def owner(live: Any) -> Any:
        transformer = live[0]
        owners = {"model": live, "transformer": transformer, "pooling": live[1], "encoder": transformer.auto_model,
                 "layer": transformer.auto_model.encoder.layer[0]}[SENTENCES[name][0]]  # fmt: skip
        return owners if of == "object" else type(owners)

    with counted(owner(plain) if of == "class" else owner(model), SENTENCES[name][1]) as calls:
        vectors = model.encode(["one", "two texts"])
    assert calls and abs(vectors - expected).max() < 2e-6
    before = counts(model)["fastbert"]
    assert abs(model.encode(["one", "two texts"]) - expected).max() == 0 and counts(model)["fastbert"] == before + 1
