"""Models train layer by layer: masks follow the seed alone, and hooks, checkpoints and autocast change no number."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastbert
from fastbert.ops import dropout
from helpers import rms_error
from model_cases import in_dtype, theirs, twin

IDS = torch.arange(3, 51).view(4, 12)
MASK = torch.ones_like(IDS)
MASK[0, 7:] = MASK[2, 3:] = 0


def make(**changes: Any) -> fastbert.BertModel:
    """A model in training mode, whose layers run by kernels where the processor has some."""
    options = {name: changes.pop(name) for name in ("backend",) if name in changes}
    settings = {
        "vocab_size": 101, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 96, "max_position_embeddings": 40, "initializer_range": 0.2,
    }  # fmt: skip
    torch.manual_seed(1)
    return fastbert.BertModel(fastbert.BertConfig(**(settings | changes)), **options).train()


def step(model: Any, seed: int = 0, ids: Tensor = IDS, mask: Tensor = MASK) -> tuple[Tensor, dict[str, Tensor]]:
    """The last hidden state after a seed, and the gradients of a scalar of it by parameter."""
    model.zero_grad()
    torch.manual_seed(seed)
    output = model(ids, mask)
    (output.last_hidden_state.float().pow(3).sum() + output.pooler_output.float().sum()).backward()
    return output.last_hidden_state.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(first: Any, second: Any) -> None:
    assert torch.equal(first[0], second[0])
    for name, gradient in first[1].items():
        assert torch.equal(gradient, second[1][name]), name


def test_layers_run_as_one() -> None:
    """Catches a training step that goes operation by operation though nothing is in the way."""
    model = make()
    assert model.engine.choose_arithmetic(model) is model.engine.training
    assert model.engine.choose_arithmetic(model.eval()) is model.engine.training
    model.requires_grad_(False)
    assert model.engine.choose_arithmetic(model) is not model.engine.training
    with torch.no_grad():
        assert model.engine.choose_arithmetic(model.train()) is model.engine.training


def test_same_masks_on_every_backend() -> None:
    """Catches masks that depend on the backend, or on whether layers run as one."""
    ours, plain = make(), make(backend="torch")
    (first, gradients), (second, others) = step(ours), step(plain)
    assert rms_error(first, second) < 1e-5
    for name, gradient in gradients.items():
        assert "key.bias" in name or rms_error(gradient, others[name]) < 1e-4, name
    hooked = make()
    hooked.encoder.layer[1].output.register_forward_hook(lambda *_: None)
    assert hooked.engine.choose_arithmetic(hooked) is not hooked.engine.training
    third, gradients = step(hooked)
    assert rms_error(third, second) < 1e-5


def test_the_seed_governs_masks() -> None:
    """Catches masks that repeat from call to call, or that torch.manual_seed does not bring back."""
    model = make()
    first = step(model)
    assert_same(first, step(model))
    assert not torch.equal(first[0], step(model, seed=1)[0])
    torch.manual_seed(0)
    with torch.no_grad():
        assert torch.equal(model(IDS, MASK).last_hidden_state, first[0])
        assert not torch.equal(model(IDS, MASK).last_hidden_state, first[0])


def test_masks_do_not_depend_on_padding() -> None:
    """Catches masks that follow padded columns, and so the longest text of a batch."""
    model, more = make(), torch.zeros(4, 5, dtype=torch.int64)
    wide = step(model, ids=torch.cat([IDS, more], 1), mask=torch.cat([MASK, more], 1))
    narrow = step(model)
    assert torch.equal(wide[0][:, :12], narrow[0])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_replay_masks(use_reentrant: bool) -> None:
    """Catches other masks, or other gradients, when layers are computed again in the backward pass."""
    model = make()
    expected = step(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_same(step(model), expected)
    whole = make()

    def run(model: Any) -> Tensor:
        return torch.utils.checkpoint.checkpoint(lambda: model(IDS, MASK).last_hidden_state, use_reentrant=False)

    torch.manual_seed(0)
    last = run(whole)
    last.pow(3).sum().backward()
    torch.manual_seed(0)
    model.zero_grad()
    model(IDS, MASK).last_hidden_state.pow(3).sum().backward()
    for (name, p), q in zip(whole.named_parameters(), model.parameters(), strict=True):
        assert p.grad is None or torch.equal(p.grad, q.grad), name


def test_autocast() -> None:
    """Catches outputs or gradients of masters in less than float32, and masks that autocast changes."""
    model = make()
    expected, expected_gradients = step(model)
    with torch.autocast("cpu", torch.bfloat16):
        last, gradients = step(model)
    assert last.dtype == torch.float32 and 1e-6 < rms_error(last, expected) < 0.05
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    assert (
        rms_error(
            gradients["encoder.layer.0.output.dense.weight"], expected_gradients["encoder.layer.0.output.dense.weight"]
        )
        < 0.1
    )


def test_steps_follow_weights() -> None:
    """Catches weights that a later step, or a pass in eval mode, reads as they were packed before."""
    model = make(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    plain = make(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, backend="torch")
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2, fused=True) for m in (model, plain)]
    for _ in range(3):
        for m, optimizer in zip((model, plain), optimizers, strict=True):
            step(m)
            optimizer.step()
        with torch.no_grad():
            ours, others = model.eval()(IDS, MASK)[0], plain.eval()(IDS, MASK)[0]
        assert rms_error(ours, others) < 1e-3
        model.train(), plain.train()


def test_a_part_in_eval_mode_drops_nothing() -> None:
    """Catches a dropout in eval mode that drops, inside a model in training mode."""
    model = make()
    for module in model.modules():
        if isinstance(module, nn.Dropout) or "dropout_site" in module.__dict__ or hasattr(module, "word_embeddings"):
            module.training = False
    evaluated = copy.deepcopy(model).eval()
    assert rms_error(step(model)[0], step(evaluated)[0]) < 1e-6


def test_loss_statistics_are_eagers() -> None:
    """Catches a dropout that is biased, or varies less or more than PyTorch's: the loss over 200 seeds."""
    original = in_dtype(
        theirs("BertModel", "tiny", hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2), torch.float32
    )
    ours = twin(original.train(), torch.float32)
    losses = []
    for model in (ours.train(), original):
        with torch.no_grad():
            values = []
            for seed in range(200):
                torch.manual_seed(seed)
                values.append(model(IDS, MASK)[0][MASK.bool()].pow(2).mul(torch.arange(32)).mean())
        losses.append(torch.stack(values).double())
    z = (losses[0].mean() - losses[1].mean()) / ((losses[0].var() + losses[1].var()) / 200).sqrt()
    assert z.abs() < 4 and 0.6 < losses[0].std() / losses[1].std() < 1.6


def test_probability_of_nothing_and_of_all() -> None:
    """Catches a threshold that is off by one, or a division by zero where everything is dropped."""
    rows = torch.arange(50)
    assert dropout.keep(rows, 40, dropout.Dropout(0, 1, 2)).all()
    assert not dropout.keep(rows, 40, dropout.Dropout(1 << 16, 1, 2)).any()
    assert dropout.Dropout(1 << 16, 1, 2).scale == 0.0


def test_passes_without_gradients_agree() -> None:
    """Catches other numbers where a model in training mode runs without gradients, as gradient caching does."""
    model = make(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    expected = model(IDS, MASK).last_hidden_state
    with torch.no_grad():
        assert torch.equal(model(IDS, MASK).last_hidden_state, expected)
