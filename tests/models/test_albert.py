"""ALBERT's layers share weights: outputs, gradients, masks of dropout, what engines keep, and what cannot be."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import fastbert
from family_cases import VOCAB, make_batch, randomised, run, theirs, twin
from fastbert import reference
from fastbert.adapters import counts
from fastbert.adapters.state import STATE
from fastbert.ops import packed_linear
from fastbert_kernels import cpu
from model_cases import assert_close, in_dtype, is_zero, valid_of

COMPILED = pytest.mark.skipif(cpu.obstacle() is not None, reason=str(cpu.obstacle()))
INT8 = pytest.mark.skipif(cpu.int8_obstacle() is not None, reason=str(cpu.int8_obstacle()))


def shared(n_groups: int = 1, **options: Any) -> Any:
    """transformers' model in float64 whose four layers have n_groups sets of weights."""
    return theirs("albert", num_hidden_groups=n_groups, **options)


def outputs(ours: Any, model: Any) -> tuple[Tensor, Tensor]:
    """What both give at tokens."""
    batch = make_batch("albert")
    valid = valid_of(batch["attention_mask"])
    return run(ours, batch)[0][valid], run(model, batch)[0][valid]


@pytest.mark.parametrize("n_groups", [1, 2, 4])
def test_gradients_sum_over_the_uses(n_groups: int) -> None:
    """Catches a gradient of one use alone, or of another group, by operations or by the layers' own kernels."""
    model = shared(n_groups).train()
    batch = make_batch("albert")
    valid = valid_of(batch["attention_mask"])
    weight = torch.randn(32, dtype=torch.float64)
    for options in ({}, {"backend": "torch"}):
        ours = twin(model, **options).train()
        assert ours.encoder.sharing == f"4 layers share {'one set' if n_groups == 1 else f'{n_groups} sets'} of weights"
        for each in (model, ours):
            each.zero_grad()
            (each(**batch)[0][valid] @ weight).square().sum().backward()
        expected = {ours.config.family.to_ours(name): p.grad for name, p in model.named_parameters()}
        largest = max(p.grad.abs().max() for p in model.parameters() if p.grad is not None)
        for name, parameter in ours.named_parameters():
            if name.endswith("key.bias"):  # which moves all scores of a query alike
                assert is_zero(parameter.grad / largest)
            elif not name.startswith("pooler."):
                assert_close(name, parameter.grad, expected[name], 1e-9)
        assert len({name for name, _ in ours.named_parameters() if ".layer." in name}) == 16 * n_groups


@pytest.mark.parametrize("checkpointed", [False, True])
def test_each_use_has_masks_of_its_own(checkpointed: bool) -> None:
    """Catches masks of dropout that repeat from one use of a layer to the next, or that are others when recomputed."""
    model = shared(2, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.2)
    gradients = []
    for backend in ("auto", "torch"):
        ours = twin(model, backend=backend, strict=False).train()
        if checkpointed:
            ours.gradient_checkpointing_enable()
        torch.manual_seed(5)
        seed = int(torch.randint(1 << 62, (), dtype=torch.int64))
        torch.manual_seed(5)
        batch = make_batch("albert")
        states = ours(**batch, output_hidden_states=True).hidden_states
        params = dict(ours.named_parameters())
        judge = reference.encode(params, ours.config, **batch, dropout_seed=seed)
        for i, (state, expected) in enumerate(zip(states, judge.hidden_states, strict=True)):
            assert_close(f"hidden_states[{i}]", state, expected)
        states[-1].square().sum().backward()
        gradients.append([p.grad for p in ours.encoder.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert_close("gradient", one, other, 1e-9)


def test_copies_share_too() -> None:
    """Catches a copy, a pickle or a state dict in which each layer has weights of its own."""
    ours = twin(shared())
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), ours.to(torch.float64)):
        assert len(other.encoder.layer) == 1 and len(other.encoder.in_order) == len(list(other.blocks())) == 4
        assert torch.equal(*(run(each, make_batch("albert"))[0] for each in (ours, other)))
    assert len(ours.state_dict()) == len(list(ours.named_parameters()))


def test_an_adapter_is_in_every_use() -> None:
    """Catches a module in the place of a shared linear that the first layer alone calls."""
    model, ours = shared(), twin(shared())
    scale = torch.nn.Parameter(torch.full((32,), 0.5, dtype=torch.float64))

    class Scaled(torch.nn.Module):
        """A linear whose output is multiplied by numbers."""

        def __init__(self, linear: torch.nn.Module) -> None:
            super().__init__()
            self.linear, self.scale = linear, scale

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * self.scale

    layer = model.encoder.albert_layer_groups[0].albert_layers[0]
    layer.attention.query = Scaled(layer.attention.query)
    own = ours.encoder.layer[0].attention.self
    own.query = Scaled(own.query)
    assert_close("with an adapter", *outputs(ours, model))


@COMPILED
def test_shared_weights_are_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches memory for each use of a layer, and another result of the one C++ call."""
    model = shared(2, hidden_size=320, num_attention_heads=10, intermediate_size=64)
    ours = twin(model, dtype=torch.float32)
    packed: list[int] = []
    pack = cpu.pack_weight

    def counted(weight: Tensor) -> Tensor:
        packed.append(weight.shape[0])
        return pack(weight)

    monkeypatch.setattr(packed_linear.cpu, "pack_weight", counted)
    mine, expected = outputs(ours, model)
    assert ours.engine.one_call.encoder._kept[1] is not None
    weights = ours.engine.one_call.encoder._kept[1]
    assert len(weights.layers) == 4 and weights.layers[0] is weights.layers[1] is not weights.layers[2]
    assert sorted(n for n in packed if n != 320) == [64, 64, 960, 960]  # up, up, qkv, qkv
    eager = outputs(in_dtype(model, torch.float32), model)[0].double()
    error, of_eager = ((x.double() - expected).norm() / expected.norm() for x in (mine, eager))
    assert error <= 1.25 * of_eager + 4 * torch.finfo(torch.float32).eps


@INT8
def test_8_bits_on_a_cpu() -> None:
    """Catches a projection that the 8-bit C++ call leaves out, or 8-bit weights for each use."""
    ours = twin(shared(hidden_size=64, intermediate_size=96), dtype=torch.float32, precision="int8")
    exact = twin(shared(hidden_size=64, intermediate_size=96), dtype=torch.float32)
    mine, expected = outputs(ours, exact)
    assert ours.engine.int8_call.encoder._kept[1].layers[0] is ours.engine.int8_call.encoder._kept[1].layers[3]
    assert not torch.equal(mine, expected) and torch.cosine_similarity(mine, expected).min() > 0.98


def test_layers_that_cannot_be() -> None:
    """Catches groups of other layers than transformers', or repeated layers in a group, taken for something else."""
    for settings, message in (
        ({"num_hidden_groups": 5}, r"num_hidden_groups: got 5, expected a divisor of num_hidden_layers \(12\)"),
        ({"num_hidden_groups": 0}, "num_hidden_groups: got 0"),
        ({"inner_group_num": 2}, "inner_group_num: got 2, expected 1: Albert has no other"),
    ):
        with pytest.raises(ValueError, match=message):
            fastbert.BertConfig.from_dict({"model_type": "albert", **settings})
    with pytest.raises(ValueError, match="next_sentence_label: 'albert' has sentence_order_label in its place"):
        ours = twin(theirs("albert", "BertForPreTraining"), "BertForPreTraining")
        ours(torch.tensor([[1]]), labels=torch.tensor([[1]]), next_sentence_label=torch.tensor([0]))


def test_published_config_and_names(tmp_path: Any) -> None:
    """Catches a published ALBERT's config.json, or a checkpoint as it is stored, that does not load."""
    published = {
        "architectures": ["AlbertForMaskedLM"], "attention_probs_dropout_prob": 0, "bos_token_id": 2,
        "classifier_dropout_prob": 0.1, "down_scale_factor": 1, "embedding_size": 128, "eos_token_id": 3, "gap_size": 0,
        "hidden_act": "gelu_new", "hidden_dropout_prob": 0, "hidden_size": 768, "initializer_range": 0.02,
        "inner_group_num": 1, "intermediate_size": 3072, "layer_norm_eps": 1e-12, "max_position_embeddings": 512,
        "model_type": "albert", "net_structure_type": 0, "num_attention_heads": 12, "num_hidden_groups": 1,
        "num_hidden_layers": 12, "num_memory_blocks": 0, "pad_token_id": 0, "type_vocab_size": 2, "vocab_size": 30000,
    }  # fmt: skip
    small = {**published, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 37, "vocab_size": VOCAB}
    model = randomised(transformers.AlbertForPreTraining(transformers.AlbertConfig(**small)).eval())
    model.save_pretrained(tmp_path)
    ours = fastbert.BertForMaskedLM.from_pretrained(tmp_path)
    with torch.no_grad():
        ids = torch.randint(5, VOCAB, (2, 9))
        assert torch.allclose(ours(ids).logits, model(ids).prediction_logits, atol=1e-4)
    assert "12 layers share one set of weights" in str(fastbert.explain(ours))


def test_dropouts_of_an_accelerated_model() -> None:
    """Catches the dropout that transformers makes and does not call behind the feed-forward part, taken for one."""
    model = fastbert.accelerate(theirs("albert", hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.2)).train()
    model(**make_batch("albert", "none"))
    assert counts(model) == {"fastbert": 1}
    inner = model.__dict__[STATE].encoder(model).model
    probabilities = {name: module.p for name, module in inner.named_modules() if isinstance(module, torch.nn.Dropout)}
    layer = "encoder.layer.1"
    assert probabilities["embeddings.dropout"] == probabilities[f"{layer}.attention.output.dropout"] == 0.3
    assert probabilities[f"{layer}.attention.self.dropout"] == 0.2 and probabilities[f"{layer}.output.dropout"] == 0.0
