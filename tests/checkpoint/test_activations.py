"""Hidden activations without a kernel give the numbers of transformers, and no promise that they are fused."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers.activations import ACT2FN

import fastbert
from fastbert.checkpoint.activations import ACTIVATIONS, OTHERS, activate
from fastbert.ops import BackendError

SIZES = {"vocab_size": 50, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
# Of parameters of their own, which a checkpoint holds.
LEARNED = {"prelu", "xielu"}
IDS, MASK = torch.arange(5, 15).view(2, 5), torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])


def test_every_elementwise_activation_is_known() -> None:
    """Catches an activation of transformers that is neither computed nor refused."""
    assert set(ACT2FN) - LEARNED <= set(ACTIVATIONS)


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name in ACT2FN])
def test_numbers(name: str) -> None:
    """Catches a formula or a constant that is not transformers'."""
    x = torch.linspace(-12, 12, 2001, dtype=torch.float64)
    torch.testing.assert_close(activate(x, ACTIVATIONS[name]), ACT2FN[name](x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["cpu", "torch", "triton"])
@pytest.mark.parametrize("name", ["silu", "quick_gelu", "gelu_fast", "linear", "laplace"])
def test_models(name: str, backend: str) -> None:
    """Catches an activation that a fast path leaves out or takes for another."""
    torch.manual_seed(0)
    theirs = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, hidden_act=name)).eval()
    ours = fastbert.BertForMaskedLM(fastbert.BertConfig.from_dict(theirs.config.to_dict()), backend=backend).eval()
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        expected, came = theirs(IDS, MASK).logits, ours(IDS, MASK).logits
    torch.testing.assert_close(came[MASK.bool()], expected[MASK.bool()], rtol=1e-4, atol=1e-5)
    report = str(fastbert.explain(ours))
    assert (name in report) == (name in OTHERS)


def test_reduced_precision_and_strict() -> None:
    """Catches 8-bit kernels, or strict=True, that run an activation which they do not have."""
    config = fastbert.BertConfig(**SIZES, hidden_act="mish")
    with pytest.raises(BackendError, match="mish"), torch.no_grad():
        fastbert.BertModel(config, backend="triton", strict=True).eval()(IDS)
    exact = fastbert.BertModel(config).eval()
    eight = fastbert.BertModel(config, precision="int8").eval()
    eight.load_state_dict(exact.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(eight(IDS)[0], exact(IDS)[0])
    assert "kernel for 'mish'" in str(fastbert.explain(eight))


def test_learned_ones_are_refused() -> None:
    """Catches parameters of an activation that are dropped."""
    for name in LEARNED:
        with pytest.raises(ValueError, match=f"hidden_act: got '{name}'"):
            fastbert.BertConfig(**SIZES, hidden_act=name)


def test_accelerated() -> None:
    """Catches an accelerated model with another activation, or with other limits than its name says."""
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**SIZES, hidden_act="mish")).eval()
    with torch.no_grad():
        expected = model(IDS, MASK)[0]
        fastbert.accelerate(model)
        torch.testing.assert_close(model(IDS, MASK)[0][MASK.bool()], expected[MASK.bool()], rtol=1e-4, atol=1e-5)
        assert model(IDS, MASK)[0][1, 3:].abs().max() == 0  # it ran on our side
    leaky = transformers.BertModel(transformers.BertConfig(**SIZES, hidden_act="leaky_relu")).eval()
    leaky.encoder.layer[0].intermediate.intermediate_act_fn.negative_slope = 0.3
    with torch.no_grad():
        expected = leaky(IDS)[0]
        torch.testing.assert_close(fastbert.accelerate(leaky)(IDS)[0], expected)
