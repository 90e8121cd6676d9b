"""accelerate covers the classes that transformers has for GTE and Nomic."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

import fastbert
from family_cases import config_of_transformers, make_batch, randomised, run, their_class, theirs
from fastbert.adapters import counts
from model_cases import BATCH, LENGTH, MASKS, assert_close, generator, valid_of

pytestmark = pytest.mark.skipif(not hasattr(transformers, "GteModel"), reason="this transformers has no GteModel")
FAMILY = pytest.mark.parametrize("model_type", ["gte", "nomic_bert"])
LINEAR = {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}}


def pair(model_type: str, name: str = "BertModel", **options: Any) -> tuple[Any, Any]:
    """A random tiny model of transformers, and an accelerated copy."""
    original = theirs(model_type, name, **options)
    return original, fastbert.accelerate(copy.deepcopy(original))


@FAMILY
@pytest.mark.parametrize("kind", MASKS)
def test_outputs(model_type: str, kind: str) -> None:
    """Catches an angle, a gate or a norm of the other family, segments left out, another class of output."""
    original, model = pair(model_type)
    batch = make_batch(model_type, kind)
    if batch["attention_mask"] is not None:
        batch["attention_mask"][:, 0] = 1
    if original.config.type_vocab_size > 1:
        batch["token_type_ids"] = torch.randint(2, (BATCH, LENGTH), generator=generator(8))
    valid = valid_of(batch["attention_mask"])
    output, expected = (run(each, batch, output_hidden_states=True) for each in (model, original))
    assert type(output) is type(expected) and list(output.keys()) == list(expected.keys())
    for ours, other in zip(output.hidden_states, expected.hidden_states, strict=True):
        # The angles of transformers are rounded to float32 before they turn anything.
        assert_close("hidden_states", ours[valid], other[valid], 1e-6)
    assert counts(model) == {"fastbert": 1}


@FAMILY
def test_heads_gradients_and_modes(model_type: str) -> None:
    """Catches a gradient that is lost, a dropout of ours that theirs lacks, and a head that is touched."""
    settings = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    original, model = pair(model_type, "BertForTokenClassification", **settings)
    batch = make_batch(model_type, "none") | {"labels": torch.randint(3, (BATCH, LENGTH), generator=generator(2))}
    for each in (original.train(), model.train()):
        each.zero_grad()
        each(**batch).loss.backward()
    expected = dict(original.named_parameters())
    for name, parameter in model.named_parameters():
        if not name.endswith("k_proj.bias"):
            assert_close(name, parameter.grad, expected[name].grad, 1e-5)
    dropping = fastbert.accelerate(copy.deepcopy(theirs(model_type, hidden_dropout_prob=0.5))).train()
    ids = make_batch(model_type, "none")
    assert not torch.equal(dropping(**ids)[0], dropping(**ids)[0])
    assert torch.equal(dropping.eval()(**ids)[0], dropping(**ids)[0])


@FAMILY
def test_other_angles(model_type: str) -> None:
    """Catches angles that are scaled and are not followed, or frequencies that somebody has written to."""
    cls = their_class(model_type, "BertModel")
    original = randomised(cls(config_of_transformers(model_type, **LINEAR)).double().eval())
    model = fastbert.accelerate(copy.deepcopy(original))
    batch = make_batch(model_type, "none")
    assert_close("linear", run(model, batch)[0], run(original, batch)[0], 1e-6)
    for each in (original, model):
        each.rotary_emb.inv_freq.mul_(0.5)
    assert torch.equal(run(model, batch)[0], run(original, batch)[0])
    assert counts(model) == {"fastbert": 1, "rotary_emb.inv_freq differs from that of a new model": 1}
    assert type(fastbert.restore(model)) is type(original)


def test_code_from_the_hub_is_named() -> None:
    """Catches an error for a custom class that has the name of a covered one, and leaves the user to guess."""
    kind = type(
        "NomicBertModel", (torch.nn.Linear,), {"__module__": "transformers_modules.nomic.modeling_hf_nomic_bert"}
    )
    with pytest.raises(ValueError, match=r"hf_nomic_bert.NomicBertModel is Python code .*fastbert.BertModel may"):
        fastbert.accelerate(kind(2, 2))
