"""An accelerated model on a CPU runs in one call of a C++ kernel, and that call follows the weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

import fastbert
from family_cases import KINDS
from fastbert.adapters import counts, encoder_in
from fastbert.checkpoint.families import FAMILIES
from fastbert_kernels import cpu
from helpers import assert_as_accurate, docstrings, tokens_of_calls

pytestmark = pytest.mark.skipif(cpu.obstacle() is not None, reason=str(cpu.obstacle()))

SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 98}
DISTILBERT_SIZES = {"dim": 64, "n_heads": 2, "n_layers": 2, "hidden_dim": 98}
MASK = (torch.arange(20) < torch.tensor([20, 7, 12])[:, None]).long()


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return tokens_of_calls(monkeypatch)


def make(model_type: str = "bert", name: str = "BertModel") -> Any:
    """A random model of transformers in float32, in eval mode."""
    kind = getattr(transformers, FAMILIES[model_type].class_name(name))
    sizes = DISTILBERT_SIZES if model_type == "distilbert" else SIZES
    torch.manual_seed(1)
    extra = {"embedding_size": 48} if model_type == "electra" else {}
    model = kind(kind.config_class(vocab_size=101, max_position_embeddings=200, **sizes, **extra)).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.3)
    return model


def run(model: Any) -> Tensor:
    """The last hidden state, or the logits, at tokens."""
    ids = torch.randint(5, 100, MASK.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = model(ids, attention_mask=MASK)[0]
    return out[MASK.bool()] if out.shape[:2] == MASK.shape else out


class Followed:
    """An accelerated model, checked after each change against what it gives restored."""

    def __init__(self, model: Any, runs: list[int]) -> None:
        self.model, self.runs = fastbert.accelerate(model), runs

    def check(self, in_one_call: bool = True) -> None:
        before = len(self.runs)
        ours = run(self.model)
        assert self.runs[before:] == [int(MASK.sum())] * in_one_call
        original = fastbert.restore(copy.deepcopy(self.model))
        exact = run(copy.deepcopy(original).double())
        assert_as_accurate("accelerated", ours, run(original), exact)
        with torch.no_grad():
            encoder = encoder_in(self.model)
            obstacles = list(encoder.engine.one_call.obstacles(encoder, int(MASK.sum()), False, False))
            assert (not obstacles) == in_one_call


@pytest.mark.parametrize("name", ["BertModel", "BertForTokenClassification"])
@pytest.mark.parametrize("model_type", ["bert", *KINDS])
def test_runs_in_one_call(model_type: str, name: str, runs: list[int]) -> None:
    """Catches an accelerated model that goes operation by operation, and a part of one that the one call drops."""
    followed = Followed(make(model_type, name), runs)
    followed.check()
    assert counts(followed.model) == {"fastbert": 1}


@pytest.mark.parametrize("model_type", ["bert", "distilbert"])
def test_follows_the_weights(model_type: str, runs: list[int]) -> None:
    """Catches packed weights of before: written in place, through .data, loaded, replaced, resized, moved, trained."""
    followed = Followed(make(model_type), runs)
    model = followed.model
    layer = model.transformer.layer[1] if model_type == "distilbert" else model.encoder.layer[1]
    place, name = (layer.attention, "q_lin") if model_type == "distilbert" else (layer.attention.self, "query")
    last, norm = [module for module in layer.modules() if isinstance(module, (nn.Linear, nn.LayerNorm))][-2:]
    followed.check()
    with torch.no_grad():
        last.weight.mul_(1.5)
    followed.check()
    with torch.no_grad():
        norm.bias.add_(0.5)
        getattr(place, name).bias.add_(0.5)
    followed.check()
    for parameter in model.parameters():
        parameter.data.mul_(0.9)  # which nothing counts
    model.eval()
    followed.check()
    getattr(place, name).weight.data = torch.randn(64, 64) * 0.3
    followed.check()
    last.weight = nn.Parameter(torch.randn_like(last.weight) * 0.3)
    followed.check()
    setattr(place, name, nn.Linear(64, 64).eval())
    followed.check()
    model.load_state_dict(make(model_type).state_dict())
    followed.check()
    model.resize_token_embeddings(120, mean_resizing=False)
    followed.check()
    model.double().float()
    followed.check()
    optimiser = torch.optim.SGD(model.parameters(), 1e-3)
    model.train()(torch.ones(2, 5, dtype=torch.int64))[0].square().sum().backward()
    optimiser.step()
    model.eval()
    followed.check()


class Lora(nn.Module):
    """x W^T + b + x A^T B^T, by hand."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a, self.b = nn.Parameter(torch.randn(4, 64) * 0.1), nn.Parameter(torch.randn(64, 4) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


def test_adapters_added_after_a_first_call(runs: list[int]) -> None:
    """Catches an adapter that is passed over because weights were packed before, or stays after it was merged."""
    followed = Followed(make("bert", "BertForTokenClassification"), runs)
    followed.check()
    places = [layer.attention.self for layer in followed.model.bert.encoder.layer]
    for place in places:
        place.query, place.value = Lora(place.query).eval(), Lora(place.value).eval()
    followed.check(in_one_call=False)
    with torch.no_grad():
        places[0].query.a.mul_(2)
    followed.check(in_one_call=False)
    for place in places:
        for name in ("query", "value"):
            lora = getattr(place, name)
            lora.base.weight.data += lora.b @ lora.a
            setattr(place, name, lora.base)
    followed.check()
    followed.model.eval()
    followed.check()


def test_other_parameters_for_one_call(runs: list[int]) -> None:
    """Catches packed weights of the model in a functional call with others, and of those in the next call without."""
    followed = Followed(make(), runs)
    followed.check()
    ids, original = torch.randint(5, 100, (2, 9)), fastbert.restore(copy.deepcopy(followed.model))
    for factor in (1.2, 0.7):
        parameters = {name: (p * factor).detach() for name, p in followed.model.named_parameters()}
        with torch.no_grad():
            ours = torch.func.functional_call(followed.model, parameters, (ids,))[0]
            expected = torch.func.functional_call(original, parameters, (ids,))[0]
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    followed.check()


def test_what_asks_for_more_than_the_last_state(runs: list[int]) -> None:
    """Catches hidden states, gradients, autocast or hooks that the one call would drop."""
    model = fastbert.accelerate(make())
    ids = torch.randint(5, 100, (2, 9))
    with torch.no_grad():
        assert len(model(ids, output_hidden_states=True).hidden_states) == 3
        with torch.autocast("cpu", torch.bfloat16):
            model(ids)
    assert model(ids).last_hidden_state.requires_grad
    handle = model.encoder.layer[0].register_forward_hook(lambda *_: None)
    run(model)
    handle.remove()
    assert runs == [] and counts(model) == {"fastbert": 3, "a module inside has hooks": 1}
    run(model)
    assert runs == [int(MASK.sum())]


def test_sentences(minilm: Path, runs: list[int]) -> None:
    """Catches an accelerated SentenceTransformer that goes operation by operation, or keeps the weights of before."""
    model = SentenceTransformer(str(minilm), device="cpu")
    texts = [text[:200] for text in docstrings(4)]
    for change in (1.0, 0.8):
        model[0].auto_model.encoder.layer[2].output.dense.weight.data.mul_(change)
        model.eval()
        expected = fastbert.restore(model).encode(texts, convert_to_tensor=True)
        fastbert.accelerate(model)
        for _ in range(2):
            before = len(runs)
            torch.testing.assert_close(model.encode(texts, convert_to_tensor=True), expected, rtol=1e-4, atol=1e-5)
            assert len(runs) > before
        model[0].auto_model.encoder.layer[2].output.dense.weight.data.mul_(0.5)
        model.eval()
        halved = model.encode(texts, convert_to_tensor=True)
        torch.testing.assert_close(
            halved, fastbert.restore(copy.deepcopy(model)).encode(texts, convert_to_tensor=True), rtol=1e-4, atol=1e-5
        )
        assert not torch.allclose(halved, expected, atol=1e-3)
        model[0].auto_model.encoder.layer[2].output.dense.weight.data.mul_(2.0)
