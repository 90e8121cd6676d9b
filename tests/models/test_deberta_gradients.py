"""DeBERTa's gradients are transformers', of every head's loss, and on every backend that has kernels for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_deberta import KINDS, NAMES, TYPE, V3, batch_of, exact_scale
from torch import Tensor

import fastbert
from family_cases import randomised, theirs, twin
from fastbert import ops
from fastbert.ops.training import disentangled as training
from fastbert_kernels import cpu
from gradient_cases import assert_gradient
from model_cases import assert_close, in_dtype, is_zero, randn
from train_cases import labelled, loss_of, step

__all__ = ["exact_scale"]
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
WITHOUT_EFFECT = "pos_key_proj.bias"  # which moves all scores of a query alike


@pytest.mark.parametrize("name", NAMES)
def test_losses_of_heads(name: str) -> None:
    """Catches a head whose loss trains its encoder, or the table of distances, on another gradient."""
    model = theirs(TYPE, name, **KINDS["v2-xlarge"], **NO_DROPOUT).train()
    ours, batch = twin(model, name).train(), labelled(TYPE, name)
    mine, other = step(ours, batch), step(model, batch)
    if other.dtype != torch.float64:  # transformers casts the logits of this loss to float32
        model.zero_grad()
        logits = model(**{key: t for key, t in batch.items() if key != "labels"}).logits
        other = torch.nn.functional.cross_entropy(logits, batch["labels"])
        other.backward()
    assert_close("loss", mine, other.detach())
    expected = dict(model.named_parameters())
    renamed = {ours_name: name for ours_name, name in zip(ours.state_dict(), model.state_dict(), strict=True)}
    for key, parameter in ours.named_parameters():
        other = expected[renamed[key]].grad
        assert other is not None and parameter.grad is not None, key
        if is_zero(other):  # which moves the logits of all tokens alike
            assert is_zero(parameter.grad)
        else:
            assert_close(key, parameter.grad, other, 1e-9)


def gradients(model: Any, batch: dict[str, Any], device: torch.device) -> dict[str, Tensor]:
    """The gradient of every parameter that has one, on the CPU."""
    model.zero_grad()
    loss_of(model, {key: None if t is None else t.to(device) for key, t in batch.items()}).backward()
    return {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.skipif(cpu.obstacle() is not None, reason=str(cpu.obstacle()))
@pytest.mark.parametrize(
    ("backend", "dtype", "kind"),
    [
        *(("cpu", dtype, kind) for dtype in (torch.float32, torch.bfloat16) for kind in ("v3", "own projections")),
        ("triton", torch.float16, "v3"),
    ],
    ids=str,
)
def test_kernels_train_the_model(
    backend: str, dtype: torch.dtype, kind: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a layer that trains without the kernels, and kernels whose gradients are worse than plain PyTorch's."""
    passes = training.KERNELS[backend]
    counts = {"forward": 0, "backward": 0}
    for name in counts:
        monkeypatch.setattr(passes, name, counted(counts, name, getattr(passes, name)), raising=True)
    place = device if backend == "triton" else torch.device("cpu")
    parts: tuple[list[Tensor], ...] = ([], [], [])
    seeds = range(4 if backend == "cpu" else 2)
    for seed in seeds:
        model = randomised(theirs(TYPE, **KINDS[kind], **NO_DROPOUT), seed).train()
        batch = batch_of("holes" if seed else "right", 24 if backend == "cpu" else 9, model.config)
        eager, exact = in_dtype(model, dtype), in_dtype(in_dtype(model, dtype), torch.float64)
        ours = twin(model, dtype=dtype, backend=backend, device=place).train()
        found = [gradients(m, batch, d) for m, d in ((ours, place), (eager, torch.device("cpu")), (exact, "cpu"))]
        for key, gradient in found[2].items():
            if key.endswith(WITHOUT_EFFECT):
                continue
            scale = gradient.square().mean().sqrt()
            for part, each in zip(parts, found, strict=True):
                part.append((each[key].double() / scale).flatten())
    joined = [torch.cat(part) for part in parts]
    assert_gradient(backend, joined[0], joined[1], joined[2], dtype)
    assert counts == {"forward": 2 * len(seeds), "backward": 2 * len(seeds)}


def counted(counts: dict[str, int], name: str, function: Any) -> Any:
    def call(*arguments: Any) -> Any:
        counts[name] += 1
        return function(*arguments)

    return call


@pytest.mark.skipif(not cpu.multiplies(torch.bfloat16), reason="the C++ kernels do not multiply bfloat16 here")
def test_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches projections of tokens and of distances in different dtypes, which no kernel takes."""
    counts = {"backward": 0}
    passes = training.KERNELS["cpu"]
    monkeypatch.setattr(passes, "backward", counted(counts, "backward", passes.backward), raising=True)
    ours = twin(theirs(TYPE, **V3, **NO_DROPOUT), dtype=torch.float32).train()
    batch, found = batch_of("right", 20), []
    for enabled in (False, True):
        ours.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = loss_of(ours, batch)
        loss.backward()
        found.append(ours.encoder.rel_embeddings.weight.grad.double())
    assert counts["backward"] == 4
    assert_close("table", found[1], found[0], 0.1)


@pytest.mark.skipif(cpu.obstacle() is not None, reason=str(cpu.obstacle()))
def test_dropout_of_probabilities() -> None:
    """Catches masks that depend on the backend, that two layers share, or that are drawn anew by checkpointing."""
    config = fastbert.BertConfig.from_dict({**theirs(TYPE, **V3).config.to_dict(), "hidden_dropout_prob": 0.0,
                                            "attention_probs_dropout_prob": 0.3})  # fmt: skip
    model = fastbert.BertModel(config, backend="cpu").train()
    batch = batch_of("right", 20)
    plain = fastbert.BertModel(config, backend="torch").train()
    plain.load_state_dict(model.state_dict())
    results, weights = [], randn(*batch["input_ids"].shape, 32).float()
    for each in (model, plain):
        for checkpointing in (False, True):
            torch.manual_seed(3)
            each.zero_grad()
            if checkpointing:
                each.gradient_checkpointing_enable()
            out = each(**batch).last_hidden_state
            (out * weights).sum().backward()
            results.append((out.detach(), each.encoder.rel_embeddings.weight.grad.clone()))
    for out, gradient in results[1:]:
        assert_close("output", out.double(), results[0][0].double(), 1e-5)
        assert_close("table", gradient.double(), results[0][1].double(), 1e-4)
    layers: Any = model.encoder.layer
    assert len({layer.attention.self.dropout_site for layer in layers}) == len(layers)


def test_embeddings_without_positions(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a table of zeros in the place of positions, and other bits where gradients are wanted."""
    ours = twin(theirs(TYPE, **V3), dtype=torch.float32, backend="triton", device=device)
    tables: list[Any] = []
    call = ops.embedding_layer_norm

    def spy(*arguments: Any, **more: Any) -> Tensor:
        tables.append(arguments[5])
        return call(*arguments, **more)

    monkeypatch.setattr(ops, "embedding_layer_norm", spy)
    ids = torch.tensor([5, 1, 100], device=device)
    with torch.no_grad():
        expected = ours.embeddings(ids, policy=ours.policy)
    assert torch.equal(ours.embeddings(ids, policy=ours.policy), expected)
    assert tables == [None, None]


@pytest.mark.skipif(cpu.obstacle() is not None, reason=str(cpu.obstacle()))
def test_explain_in_training() -> None:
    """Catches a report that says that dropout, or a gradient, takes attention from its kernels."""
    model = theirs(TYPE, **V3)
    ours = twin(model, dtype=torch.float32, strict=False).train()
    rows = [row for row in fastbert.explain(ours, [[1] * 5]).rows if row.op == "attention"]
    assert rows and all(row.kernel.startswith("fastbert_kernels.cpu") for row in rows)
    assert "training: each layer is one node of autograd" in str(fastbert.explain(ours))
    large = twin(theirs(TYPE, **KINDS["v2-xlarge"]), dtype=torch.float32, strict=False).train()
    assert "operation by operation: the model has a convolution beside a layer" in str(fastbert.explain(large))


@pytest.mark.skipif(cpu.obstacle() is not None, reason=str(cpu.obstacle()))
def test_second_derivatives_of_layers() -> None:
    """Catches a layer whose second derivative leaves the table of distances out."""
    model, batch = theirs(TYPE, **V3, **NO_DROPOUT), batch_of("right", 9)
    found = []
    for dtype, backend in ((torch.float64, "torch"), (torch.float32, "cpu")):
        ours = twin(model, dtype=dtype, backend=backend)
        table = ours.encoder.rel_embeddings.weight
        (first,) = torch.autograd.grad(loss_of(ours, batch), table, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), table)
        found.append(second.double())
    assert_close("second derivative", found[1], found[0], 1e-3)
