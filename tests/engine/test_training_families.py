"""ModernBERT, Nomic and GTE train layer by layer as BERT does: each layer is one node of autograd, on every backend."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from family_cases import make_batch, theirs, twin
from fastbert.engine import training
from fastbert.ops.packing import from_lengths
from fastbert.ops.training.plain import PLAIN
from fastbert_kernels import launch
from helpers import rms_error
from model_cases import assert_close, in_dtype, valid_of

FAMILIES = ("modernbert", "nomic_bert", "gte")
FAMILY = pytest.mark.parametrize("model_type", FAMILIES)
DROPOUTS = {
    "modernbert": ("attention_dropout", "embedding_dropout", "mlp_dropout"),
    "nomic_bert": ("attention_dropout", "hidden_dropout_prob"),
    "gte": ("attention_dropout", "hidden_dropout_prob"),
}
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 48}  # for which C++ has kernels


def original(model_type: str, p: float = 0.0) -> Any:
    """A random model of transformers, all of whose dropouts have the probability p."""
    return theirs(model_type, **SIZES, **dict.fromkeys(DROPOUTS[model_type], p))


def make(model_type: str, dtype: torch.dtype = torch.float32, p: float = 0.0, **options: Any) -> Any:
    """Our model in training mode."""
    return twin(original(model_type, p), dtype=dtype, **options).train()


def step(model: Any, batch: dict[str, Any], seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """The last hidden state of tokens after a seed, and the gradients of a scalar of it by parameter."""
    model.zero_grad()
    torch.manual_seed(seed)
    on_device = {name: tensor.to(model.device) for name, tensor in batch.items()}
    rows = model(**on_device).last_hidden_state[valid_of(batch["attention_mask"]).to(model.device)]
    weights = torch.linspace(-1, 1, rows.shape[-1], device=rows.device)
    ((rows * weights.to(rows)).sum(-1) ** 2).mean().backward()
    grads = {name: p.grad.clone().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return rows.detach().cpu(), grads


def assert_near(first: Any, second: Any, bound: float = 1e-4) -> None:
    assert rms_error(first[0], second[0]) < bound
    assert first[1].keys() == second[1].keys()
    for name, gradient in first[1].items():
        assert rms_error(gradient, second[1][name]) < bound, name


@FAMILY
def test_layers_run_as_one(model_type: str) -> None:
    """Catches a training step that goes operation by operation though nothing is in the way."""
    model = make(model_type)
    assert model.engine.choose_arithmetic(model) is model.engine.training
    model.encoder.layer[1].register_forward_hook(lambda *_: None)
    assert model.engine.choose_arithmetic(model) is not model.engine.training


@FAMILY
@pytest.mark.parametrize("kind", ["right", "holes"])
def test_same_masks_on_every_backend(model_type: str, kind: str, device: torch.device) -> None:
    """Catches masks of dropout that depend on the backend, or on whether layers run as one."""
    batch = make_batch(model_type, kind)
    expected = step(make(model_type, p=0.2, backend="torch"), batch)
    assert not torch.equal(expected[0], step(make(model_type, p=0.2, backend="torch"), batch, seed=1)[0])
    assert_near(step(make(model_type, p=0.2, backend="cpu"), batch), expected)
    triton = make(model_type, p=0.2, backend="triton").to(device)
    assert triton.engine.choose_arithmetic(triton) is triton.engine.training
    assert_near(step(triton, batch), expected)
    hooked = make(model_type, p=0.2, backend="cpu")
    hooked.encoder.layer[0].register_forward_hook(lambda *_: None)
    assert_near(step(hooked, batch), expected)


@FAMILY
def test_embeddings_are_one_node(model_type: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches words, norm and dropout of embeddings without positions that run apart, or that lose a gradient."""
    model, launched = make(model_type, p=0.2, backend="triton").to(device), []
    plain = make(model_type, dtype=torch.float64, p=0.2, backend="torch")
    run = launch.run

    def noted(kernel: Any, *arguments: Any, **others: Any) -> None:
        launched.append(kernel.__name__)
        run(kernel, *arguments, **others)

    monkeypatch.setattr(launch, "run", noted)
    ids, batch = torch.tensor([5, 1, 7, 5], device=device), from_lengths([3, 1], device)
    torch.manual_seed(3)
    rows = model.embeddings(ids, batch=batch, policy=model.policy)
    assert launched == ["_embedding_norm_kernel"] and (rows == 0).any()
    rows.sin().sum().backward()
    torch.manual_seed(3)
    expected = plain.embeddings(ids.cpu(), batch=from_lengths([3, 1], torch.device("cpu")), policy=plain.policy)
    assert rms_error(rows.cpu(), expected) < 1e-6
    expected.sin().sum().backward()
    for name, parameter in model.embeddings.named_parameters():
        assert rms_error(parameter.grad.cpu(), plain.embeddings.get_parameter(name).grad) < 1e-6, name


@FAMILY
def test_gradient_checkpointing(model_type: str) -> None:
    """Catches a layer that is computed again with other masks or angles."""
    batch, model = make_batch(model_type, "right"), make(model_type, p=0.2)
    expected = step(model, batch)
    model.gradient_checkpointing_enable()
    found = step(model, batch)
    assert torch.equal(found[0], expected[0])
    for name, gradient in expected[1].items():
        assert torch.equal(found[1][name], gradient), name


@FAMILY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounding(model_type: str, dtype: torch.dtype) -> None:
    """Catches gradients that lose more to rounding than PyTorch's own, under the numerical policy."""
    model, batch = original(model_type), make_batch(model_type, "right")
    ours = step(make(model_type, dtype), batch)
    eager, exact = (step(in_dtype(model, to).train(), batch) for to in (dtype, torch.float64))
    name_of = twin(model).config.family.to_theirs
    parts: list[list[Tensor]] = [[], [], []]
    for name, gradient in ours[1].items():
        truth = exact[1][name_of(name)].double()
        for part, each in zip(parts, (gradient, eager[1][name_of(name)], truth), strict=True):
            part.append((each.double() / truth.square().mean().sqrt()).flatten())
    ours_all, eager_all, exact_all = map(torch.cat, parts)
    bound = 1.25 * rms_error(eager_all, exact_all) + 0.5 * torch.finfo(dtype).eps
    assert rms_error(ours_all, exact_all) <= bound


@FAMILY
def test_float64_layers_are_transformers(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a layer as one node whose gradients are not those of transformers, in float64 to 1e-9."""
    from transformers.models.gte import modeling_gte
    from transformers.models.modernbert import modeling_modernbert

    monkeypatch.setattr(training, "kernels_of", lambda *_: PLAIN)
    # ModernBERT's own function rounds queries and keys to float32.
    monkeypatch.setattr(modeling_modernbert, "apply_rotary_pos_emb", modeling_gte.apply_rotary_pos_emb)
    model, batch = original(model_type).train(), make_batch(model_type, "right")
    ours, expected = step(twin(model).train(), batch), step(model, batch)
    assert_close("state", ours[0], expected[0], 1e-10)
    for name, gradient in ours[1].items():
        theirs_name = twin(model).config.family.to_theirs(name)
        assert_close(name, gradient, expected[1][theirs_name], 1e-9)


@FAMILY
def test_autocast(model_type: str) -> None:
    """Catches gradients under autocast that are not the parameters', or a stream between layers in 16 bits."""
    batch, model = make_batch(model_type, "right"), make(model_type)
    expected = step(copy.deepcopy(model), batch)
    with torch.autocast("cpu", torch.bfloat16):
        found = step(model, batch)
    assert found[0].dtype == torch.float32 and all(g.dtype == torch.float32 for g in found[1].values())
    assert_near(found, expected, 0.05)


def test_weights_in_one_are_trained_in_one() -> None:
    """Catches a gradient that autograd puts together from three parts of a fused weight."""
    model = make("modernbert")
    block = next(iter(model.blocks()))
    parameters = training.parameters_of(block)
    assert parameters.query is model.encoder.layer[0].attn.Wqkv.weight and parameters.key is None
    assert parameters.up is model.encoder.layer[0].mlp.Wi.weight and parameters.gate is None
    separate = training.parameters_of(next(iter(make("gte").blocks())))
    assert separate.key is not None and separate.gate is not None


def test_strict_trains() -> None:
    """Catches a call in training mode that strict refuses."""
    for model_type in FAMILIES:
        step(make(model_type, backend="cpu", strict=True), make_batch(model_type, "right"))
