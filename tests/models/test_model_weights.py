"""Fused weights follow every change of the parameters they are made from."""

from __future__ import annotations

import copy
import io
import operator
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import rms_error
from model_cases import (
    BATCH,
    LENGTH,
    VOCAB,
    assert_close,
    make_batch,
    randn,
    run,
    theirs,
    trainable,
    twin,
    valid_of,
)


def attention(model: Any) -> Any:
    return model.encoder.layer[1].attention.self


def optimizer_step(model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def set_data_twice(model: Any) -> None:
    for factor in (2.0, 0.75):
        attention(model).query.weight.data = attention(model).query.weight.data * factor


def write_through_data(model: Any) -> None:
    attention(model).key.weight.data.mul_(1.5)
    model.eval()


def cast_to(dtype: torch.dtype) -> Any:
    return lambda model: model.to(dtype).double()


class Adapter(nn.Module):
    """A low-rank adapter around a module, as PEFT has them."""

    def __init__(self, base: nn.Module, n_in: int, n_out: int = 32) -> None:
        super().__init__()
        self.base_layer = base
        self.down = nn.Parameter(randn(4, n_in, seed=8) * n_in**-0.5)
        self.up = nn.Parameter(randn(n_out, 4, seed=9))

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + x @ self.down.T @ self.up.T


class EmbeddingAdapter(Adapter):
    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.down.T[x] @ self.up.T


def patch_forward(module: nn.Module) -> None:
    """Patches a forward as accelerate does it to move weights between devices."""
    plain = module.forward
    module.forward = lambda x: plain(x) * 1.5


def no_grad_(change: Any) -> Any:
    def changed(model: Any) -> None:
        with torch.no_grad():
            change(model)

    return changed


def load(assign: bool) -> Any:
    def changed(model: Any) -> None:
        state = {name: tensor * 1.25 for name, tensor in model.state_dict().items()}
        model.load_state_dict(state, assign=assign)

    return changed


CHANGES = {
    "weight in place": no_grad_(lambda model: attention(model).query.weight.mul_(1.5)),
    "bias in place": no_grad_(lambda model: attention(model).value.bias.add_(1)),
    "one element": no_grad_(lambda model: attention(model).key.weight[3, 4].add_(5)),
    "copy_ under inference mode": torch.inference_mode()(lambda model: attention(model).key.weight.mul_(1.5)),
    "optimizer step": optimizer_step,
    "load_state_dict": load(assign=False),
    "load_state_dict with assign": load(assign=True),
    "half": cast_to(torch.float16),
    "bfloat16": cast_to(torch.bfloat16),
    "float": cast_to(torch.float32),
    "new parameter": lambda model: setattr(attention(model).key, "weight", nn.Parameter(randn(32, 32, seed=5))),
    "data set twice": set_data_twice,
    "written through data": write_through_data,
    "vector_to_parameters": lambda model: nn.utils.vector_to_parameters(
        nn.utils.parameters_to_vector(model.parameters()).detach() * 1.1, model.parameters()
    ),
    "tied parameters": lambda model: setattr(attention(model).key, "weight", attention(model).query.weight),
    "new linear": lambda model: setattr(attention(model), "value", nn.Linear(32, 32).double()),
    "linear without bias": lambda model: setattr(attention(model), "key", nn.Linear(32, 32, bias=False).double()),
    "adapter": lambda model: setattr(attention(model), "query", Adapter(attention(model).query, 32)),
    "forward hook": lambda model: attention(model).key.register_forward_hook(lambda *args: args[2] * 2),
    "forward pre-hook": lambda model: attention(model).value.register_forward_pre_hook(lambda m, args: (args[0] * 2,)),
    "patched forward": lambda model: patch_forward(attention(model).query),
    "parametrization": lambda model: (
        nn.utils.parametrizations.weight_norm(attention(model).query).parametrizations["weight"].original0.data.mul_(2)
    ),
}
ELSEWHERE = {
    "intermediate adapter": lambda model: setattr(
        model.encoder.layer[0].intermediate, "dense", Adapter(model.encoder.layer[0].intermediate.dense, 32, 37)
    ),
    "output adapter": lambda model: setattr(
        model.encoder.layer[0].output, "dense", Adapter(model.encoder.layer[0].output.dense, 37)
    ),
    "attention output hook": lambda model: model.encoder.layer[1].attention.output.dense.register_forward_hook(
        lambda *args: args[2] * 2
    ),
    "pooler hook": lambda model: model.pooler.dense.register_forward_hook(lambda *args: args[2] * 2),
    "embedding adapter": lambda model: setattr(
        model.embeddings, "word_embeddings", EmbeddingAdapter(model.embeddings.word_embeddings, VOCAB)
    ),
    "embedding hook": lambda model: model.embeddings.word_embeddings.register_forward_hook(lambda *args: args[2] * 2),
    "larger embedding": lambda model: model.set_input_embeddings(nn.Embedding(150, 32).double()),
    "LayerNorm in place": no_grad_(lambda model: model.encoder.layer[0].output.LayerNorm.weight.mul_(1.5)),
}


@pytest.mark.parametrize("change", [*CHANGES, *ELSEWHERE])
def test_weights_follow_changes(change: str) -> None:
    """Catches a fused matrix, or a module used without a call, that does not notice a change to its parameters."""
    apply = {**CHANGES, **ELSEWHERE}[change]
    model, batch = copy.deepcopy(theirs()), make_batch("right")
    ours = twin(model)
    valid = valid_of(batch["attention_mask"])
    before = run(ours, batch)
    for each in (model, ours):
        torch.manual_seed(0)
        apply(each)
    after = run(ours, batch)
    moved = max(rms_error(after[i], before[i]) for i in (0, 1))
    assert moved > 1e-9, "the change is too small to be seen"
    other = run(model, batch)
    assert_close("last_hidden_state", after[0][valid], other[0][valid])
    assert_close("pooler_output", after[1], other[1])


def test_new_parameters_in_old_memory() -> None:
    """Catches a new parameter that is taken for the old one, in whose memory it lies, with the same version.

    Whether the allocator places it there is chance, hence the many tries.
    """
    ours, in_the_way = twin(theirs()), []
    for seed in range(500):
        weight = randn(32, 32, seed=seed)
        in_the_way = [*in_the_way[-5:], torch.empty(32 * (seed % 37))]
        del attention(ours).query.weight
        attention(ours).query.weight = nn.Parameter(weight.clone())
        with torch.no_grad():
            assert torch.equal(attention(ours).fused_qkv()[0][:32], weight)


def test_removed_hook() -> None:
    """Catches the fused path not coming back, or coming back stale, when a hook goes."""
    ours, batch = twin(theirs()), make_batch("right")
    before = run(ours, batch)[0]
    handle = attention(ours).query.register_forward_hook(lambda *args: args[2] * 2)
    with torch.no_grad():
        attention(ours).query.weight.mul_(1.0)
        hooked = run(ours, batch)[0]
    handle.remove()
    assert not torch.equal(hooked, before)
    assert torch.equal(run(ours, batch)[0], before)


@pytest.mark.parametrize("name", ["encoder.layer.1.attention.self.query", "encoder.layer.0.intermediate.dense"])
def test_backward_hooks_fire(name: str) -> None:
    """Catches a linear whose weight is used without calling it, though somebody listens to its gradients."""
    ours, seen = twin(trainable("tiny")), []
    ours.get_submodule(name).register_full_backward_hook(lambda *args: seen.append(args[2][0].shape))
    ours(**make_batch("none"))[0].sum().backward()
    assert seen == [(BATCH, LENGTH, 32 if "query" in name else 37)]


def test_the_fused_matrix_is_kept() -> None:
    """Catches a fused matrix that is made anew on every call, which would cost more than it saves."""
    ours, batch = twin(theirs()), make_batch("right")
    run(ours, batch)
    first = attention(ours).derived.tensors()
    run(ours, batch)
    assert len(first) == 2 and all(map(operator.is_, attention(ours).derived.tensors(), first))


def copies(model: Any) -> list[Any]:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]


def test_copies_are_independent() -> None:
    """Catches deepcopy, pickle or torch.save that fails on the fused matrix, carries it along, or shares it."""
    ours, batch = twin(theirs()), make_batch("right")
    expected = run(ours, batch)[0]
    assert len(pickle.dumps(ours)) <= len(pickle.dumps(twin(theirs()))) + 1000
    for other in copies(ours):
        assert torch.equal(run(other, batch)[0], expected)
        with torch.no_grad():
            attention(other).query.weight.mul_(2)
        assert not torch.equal(run(other, batch)[0], expected)
        assert torch.equal(run(ours, batch)[0], expected)
