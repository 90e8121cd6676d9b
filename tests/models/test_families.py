"""Encoders of BERT's family give what transformers gives: config.json, hidden states, positions, graphs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

import fastbert
import fastbert.models.bert
from family_cases import (
    KINDS,
    OTHERS,
    config_of_transformers,
    make_batch,
    our_state,
    run,
    their_class,
    theirs,
    twin,
)
from fastbert import reference
from fastbert.checkpoint.families import FAMILIES, family_of, our_class
from fastbert.engine import capture
from fastbert_kernels import cpu
from graph_cases import StandIn
from helpers import assert_as_accurate, cu_seqlens_of
from model_cases import BATCH, LENGTH, MASKS, POSITIONS, VOCAB, assert_close, in_dtype, pooled, randn, valid_of

# Tables


def test_what_is_covered_is_listed() -> None:
    """Catches a model_type without a table that is taken for BERT, or an error that leaves the user to guess."""
    for model_type in ("deberta", "Roberta", None, ["bert"]):
        with pytest.raises(ValueError, match="model_type: got .*, expected one of albert, bert, camembert, deb"):
            family_of(model_type)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model_type: got 'deberta', expected one of albert, bert"):
        fastbert.BertConfig(model_type="deberta")


@pytest.mark.parametrize("model_type", ["bert", *OTHERS])
def test_names_there_and_back(model_type: str) -> None:
    """Catches a parameter that changes its place on the way, and a state dict in which one is missing or too many."""
    family, model = FAMILIES[model_type], theirs(model_type)
    for name in model.state_dict():
        assert family.to_theirs(family.to_ours(name)) == name
    ours = fastbert.BertModel(fastbert.BertConfig.from_dict(model.config.to_dict())).state_dict()
    assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in our_state(model).items()}


@pytest.mark.parametrize("model_type", ["bert", *OTHERS])
def test_module_paths(model_type: str) -> None:
    """Catches a path of a linear, an embedding or a LayerNorm that leads to no module, or to one of another kind."""
    family, model = FAMILIES[model_type], theirs(model_type)
    ours = dict(fastbert.BertModel(fastbert.BertConfig.from_dict(model.config.to_dict())).named_modules())
    classes = torch.nn.Linear, torch.nn.Embedding, torch.nn.LayerNorm
    modules = {name: module for name, module in model.named_modules() if isinstance(module, classes)}
    for name, module in modules.items():
        assert type(ours[family.to_ours(name)]) is type(module), name
    assert {family.to_theirs(name) for name, module in ours.items() if isinstance(module, classes)} == set(modules)


def test_paths_of_a_table() -> None:
    """Catches a rule that takes part of a name for the whole, a number that is cut in half, or a path left out."""
    family = FAMILIES["distilbert"]
    assert (
        family.to_ours("transformer.layer.11.attention.q_lin.weight") == "encoder.layer.11.attention.self.query.weight"
    )
    assert family.to_theirs("encoder.layer.3") == "transformer.layer.3"
    assert family.to_ours("transformers.layer.1.ffn.lin1") == "transformers.layer.1.ffn.lin1"
    assert (
        family.state_to_ours("distilbert.transformer.layer.0.ffn.lin2.bias") == "bert.encoder.layer.0.output.dense.bias"
    )
    assert our_class("XLMRobertaForMaskedLM") == "BertForMaskedLM" and our_class("T5Model") == "T5Model"


# config.json


@pytest.mark.parametrize("model_type", OTHERS)
def test_sparse_config(model_type: str) -> None:
    """Catches BERT's default in the place of the family's: the padding id and so every position, a width, a dropout."""
    config = fastbert.BertConfig.from_dict({"model_type": model_type})
    defaults = their_class(model_type, "BertModel").config_class()
    written = config.to_dict()
    for name, value in defaults.to_dict().items():
        if name in written and name not in ("id2label", "label2id"):
            assert written[name] == value, name
    assert config.max_length == config.max_position_embeddings - config.position_offset


@pytest.mark.parametrize("model_type", OTHERS)
def test_config_round_trip(model_type: str, tmp_path: Path) -> None:
    """Catches a setting that is lost, renamed or made up between transformers' config.json and ours."""
    before = config_of_transformers(model_type, initializer_range=0.3, a_setting_of_others=[1])
    before.save_pretrained(tmp_path)
    config = fastbert.BertConfig.from_pretrained(tmp_path)
    assert config.model_type == model_type and config.hidden_size == 32 and config.intermediate_size == 37
    assert config.embedding_width == (24 if model_type in ("electra", "albert") else 32)
    config.save_pretrained(tmp_path / "ours")
    after = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    assert type(after) is type(before)
    assert {k: v for k, v in after.to_dict().items() if k != "_name_or_path"} == {
        k: v for k, v in before.to_dict().items() if k != "_name_or_path"
    }


def test_config_overrides() -> None:
    """Catches overrides under the family's names that are refused or lost, or unknown ones that are accepted."""
    data = config_of_transformers("distilbert").to_dict()
    assert fastbert.BertConfig.from_dict(data, n_layers=1).num_hidden_layers == 1
    assert fastbert.BertConfig.from_dict(data, num_hidden_layers=1).to_dict()["n_layers"] == 1
    with pytest.raises(TypeError, match="unknown config override n_layer;"):
        fastbert.BertConfig.from_dict(data, n_layer=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pad_token_id": None}, "pad_token_id: got None, expected a token id, 0 or more: positions begin after it"),
        ({"pad_token_id": -1}, "pad_token_id: got -1, expected a token id"),
        ({"max_position_embeddings": 2}, r"max_position_embeddings: got 2, expected more than pad_token_id \+ 1 \(2\)"),
    ],
)
def test_config_without_positions(settings: dict[str, Any], message: str) -> None:
    """Catches a table without a row for the first token, or without a padding id, that ends in an index error."""
    with pytest.raises(ValueError, match=message):
        fastbert.BertConfig.from_dict({"model_type": "roberta", **settings})


# Hidden states


def assert_matches(ours: Any, model: Any, batch: dict[str, Any]) -> None:
    """Hidden states equal transformers' at tokens and are zero elsewhere; the pooler's vector where there is one."""
    valid = valid_of(batch["attention_mask"])
    mine, other = (run(m, batch, output_hidden_states=True) for m in (ours, model))
    assert len(mine.hidden_states) == len(other.hidden_states)
    for i, (state, expected) in enumerate(zip(mine.hidden_states, other.hidden_states, strict=True)):
        assert_close(f"hidden_states[{i}]", state[valid], expected[valid])
        assert (state[~valid] == 0).all()
    assert torch.equal(mine.last_hidden_state, mine.hidden_states[-1])
    assert ("pooler_output" in mine) is ("pooler_output" in other) is FAMILIES[model.config.model_type].pooler
    if "pooler_output" in mine:
        assert_close("pooler_output", mine.pooler_output, pooled(model, other.last_hidden_state, valid))


@pytest.mark.parametrize("padded", [True, False], ids=["padding id", "any id"])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("model_type", OTHERS)
def test_float64_matches_transformers(model_type: str, kind: str, padded: bool) -> None:
    """Catches a part of BERT that the family lacks or has otherwise, or a position decided by the mask, not the ids."""
    model, batch = theirs(model_type), make_batch(model_type, kind, padded)
    assert_matches(twin(model), model, batch)
    params = dict(twin(model).named_parameters())
    config = fastbert.BertConfig.from_dict(model.config.to_dict())
    valid = valid_of(batch["attention_mask"])
    judge = reference.encode(params, config, **batch)
    other = run(model, batch, output_hidden_states=True, output_attentions=True)
    for i, (state, expected) in enumerate(zip(judge.hidden_states, other.hidden_states, strict=True)):
        assert_close(f"reference, hidden_states[{i}]", state[valid], expected[valid])
    queries = valid[:, None, :].expand(BATCH, 2, LENGTH)
    for mine, expected in zip(judge.attentions, other.attentions, strict=True):
        assert_close("reference, attentions", mine[queries], expected[queries])


@pytest.mark.parametrize("model_type", KINDS)
def test_given_positions_embeds_and_types(model_type: str) -> None:
    """Catches positions of the caller's that are counted anew, embeddings counted by absent ids, or mixed-up types."""
    model, ours = theirs(model_type), twin(theirs(model_type))
    batch = make_batch(model_type, "holes")
    columns = torch.randperm(POSITIONS)[:LENGTH].expand(BATCH, -1)
    assert_matches(ours, model, {**batch, "position_ids": columns})
    token_type_ids = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    if model_type in ("electra", "albert"):
        token_type_ids[:, 4:] = 1
    if model_type != "distilbert":
        assert_matches(ours, model, {**batch, "token_type_ids": token_type_ids})
    assert torch.equal(run(ours, {**batch, "token_type_ids": token_type_ids * 0})[0], run(ours, batch)[0])
    embeds = randn(BATCH, LENGTH, 24 if model_type in ("electra", "albert") else 32)
    inputs = {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"]}
    assert_matches(ours, model, inputs)


@pytest.mark.parametrize("model_type", KINDS)
def test_packed_texts_are_those_texts_alone(model_type: str) -> None:
    """Catches positions that go on counting from the text before, or over a padding id within a text."""
    model, ours = theirs(model_type), twin(theirs(model_type))
    lengths = [5, 0, 1, 11]
    ids = torch.randint(VOCAB, (sum(lengths),))
    ids[7] = ids[8] = config_of_transformers(model_type).pad_token_id
    packed = ours.forward_packed(ids, cu_seqlens_of(lengths))
    alone = [run(model, {"input_ids": text[None]})[0][0] for text in ids.split(lengths) if len(text)]
    assert_close("forward_packed", packed, torch.cat(alone))


@pytest.mark.parametrize("model_type", KINDS)
def test_positions_outside_the_table(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a text longer than the positions left after the offset that is read from beyond the table."""
    ours = twin(theirs(model_type))
    longest = ours.config.max_length
    assert longest == POSITIONS - (2 if model_type in ("roberta", "mpnet") else 0)
    ids = torch.full((1, longest + 1), 7)
    run(ours, {"input_ids": ids[:, 1:]})
    monkeypatch.setattr(fastbert.models.bert.ops, "embedding_layer_norm", pytest.fail)
    message = f"position_ids: expected values from 0 to {POSITIONS - 1}, got {POSITIONS}"
    with torch.no_grad():
        for mask in (None, torch.ones_like(ids)):
            with pytest.raises(IndexError, match=message):
                ours(ids, mask)
        with pytest.raises(IndexError, match=message):
            ours.forward_packed(ids[0], cu_seqlens_of([longest + 1]))
        with pytest.raises(IndexError, match=message):
            ours(ids[:, 1:], position_ids=torch.full((1, longest), POSITIONS))


def test_one_segment() -> None:
    """Catches a segment id that a model without segments ignores in silence, or a table of zeros that is saved."""
    ours = twin(theirs("distilbert"))
    assert ours.embeddings.token_type_embeddings is None
    with pytest.raises(IndexError, match="token_type_ids: expected values from 0 to 0, got 1"):
        ours(torch.tensor([[3, 4]]), token_type_ids=torch.tensor([[0, 1]]))


def test_embedding_width() -> None:
    """Catches embeddings as wide as the layers where narrower ones are projected, or a needless projection."""
    ours = twin(theirs("electra"))
    with pytest.raises(ValueError, match=r"inputs_embeds: expected 24 \(embedding_size\) in the last dimension"):
        ours(inputs_embeds=randn(1, 3, 32))
    model = theirs("electra", embedding_size=32)
    assert twin(model).embeddings_project is None
    assert_matches(twin(model), model, make_batch("electra"))


@pytest.mark.parametrize("model_type", ["roberta", "electra"])
def test_output_attentions(model_type: str) -> None:
    """Catches the reference path with BERT's positions, or without the projection."""
    model, batch = theirs(model_type), make_batch(model_type, "left")
    valid = valid_of(batch["attention_mask"])
    mine = run(twin(model, strict=False), batch, output_attentions=True)
    other = run(model, batch, output_attentions=True)
    assert_close("last_hidden_state", mine.last_hidden_state[valid], other.last_hidden_state[valid])
    assert len(mine.attentions) == len(other.attentions) == 2


# Numbers


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", KINDS)
def test_numerical_policy(
    model_type: str, dtype: torch.dtype, backend: str, device: torch.device, poisoned: Any
) -> None:
    """Catches an embedding without segments, or a projection, that is rounded once more than in plain PyTorch."""
    model, batch = theirs(model_type), make_batch(model_type, "right")
    valid = valid_of(batch["attention_mask"])
    ours = twin(model, dtype=dtype, backend=backend, device="cpu" if backend == "cpu" else device)
    eager, exact = in_dtype(model, dtype), in_dtype(in_dtype(model, dtype), torch.float64)
    outputs = [run(m, batch)[0].cpu()[valid] for m in (ours, eager, exact)]
    assert_as_accurate(model_type, *outputs)
    if backend == "triton":
        poisoned.check()


@pytest.mark.parametrize("model_type", KINDS)
def test_gradients(model_type: str) -> None:
    """Catches a parameter that is trained on another one's gradient, or on none."""
    model = copy.deepcopy(theirs(model_type))
    ours, batch = twin(model).train(), make_batch(model_type, "none")
    for module in (*ours.modules(), *model.train().modules()):
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    weights = randn(BATCH, LENGTH, 32)
    for m in (ours, model):
        (m(**batch).last_hidden_state * weights).sum().backward()
    family, expected = FAMILIES[model_type], dict(model.named_parameters())
    for name, parameter in ours.named_parameters():
        gradient = expected[family.to_theirs(name)].grad
        if gradient is None or gradient.abs().max() < 1e-12:  # a key's bias: rounding alone
            assert parameter.grad is None or parameter.grad.abs().max() < 1e-12, name
        elif name == "embeddings.position_embeddings.weight" and model_type == "roberta":
            rows = torch.arange(POSITIONS) != ours.config.pad_token_id  # which transformers never trains
            assert_close(name, parameter.grad[rows], gradient[rows], 1e-9)
        else:
            assert_close(name, parameter.grad, gradient, 1e-9)


# CUDA graphs, 8 bits, reports


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    capturer = StandIn()
    monkeypatch.setattr(capture, "capturer", lambda device: capturer)
    return capturer


@pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning")
@pytest.mark.parametrize("model_type", KINDS)
def test_graphs(model_type: str, stand_in: StandIn, device: torch.device) -> None:
    """Catches a graph that replays positions, or a projection, of the batch or of the weights it was captured with."""
    ours = twin(theirs(model_type), dtype=torch.float32, backend="triton", device=device)

    def encode(seed: int) -> torch.Tensor:
        ids = torch.randint(VOCAB, (14,), generator=torch.Generator().manual_seed(seed)).to(device)
        with torch.no_grad():
            return ours.forward_packed(ids, cu_seqlens_of([3 + seed, 11 - seed]))

    for seed in range(2):
        with_graphs = encode(seed)
        ours.cuda_graphs = False
        assert torch.equal(with_graphs, encode(seed))
        ours.cuda_graphs = True
    assert stand_in.replays == 2
    before = encode(0)
    part = ours.embeddings.LayerNorm if ours.embeddings_project is None else ours.embeddings_project
    with torch.no_grad():
        part.bias.add_(1.0)
    captures = stand_in.captures
    changed = encode(0)
    assert stand_in.captures == captures + 1 and not torch.equal(changed, before)
    part.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        assert any("has hooks" in obstacle for obstacle in ours.engine.bucket_obstacles(ours))
    part._forward_hooks.clear()
    assert torch.equal(encode(0), changed)


def test_8_bits(device: torch.device) -> None:
    """Catches a projection that the 8-bit path leaves out without a word, or segments that are not there."""
    electra = theirs("electra", embedding_size=32, hidden_size=64, intermediate_size=64)
    for model_type, model in (("electra", electra), ("distilbert", theirs("distilbert", dim=64, hidden_dim=64))):
        ours, batch = twin(model, dtype=torch.float32, precision="int8", backend="torch"), make_batch(model_type)
        output, expected = run(ours, batch)[0], run(model, batch)[0]
        valid = valid_of(batch["attention_mask"])
        assert torch.cosine_similarity(output[valid].double(), expected[valid]).min() > 0.99
        assert not torch.allclose(output[valid].double(), expected[valid], atol=1e-4), "nothing was quantised"


@pytest.mark.parametrize("model_type", OTHERS)
def test_verify_and_explain(model_type: str) -> None:
    """Catches a report that judges a family by BERT's formulas, or that has no row for the projection."""
    ours = twin(theirs(model_type), dtype=torch.float32, backend="auto", strict=False)
    report = fastbert.verify(ours, [list(range(2, 9)), [1], [5, 1, 5, 1, 7, 8]])
    assert report.ok, str(report)
    rows = {row.module: row for row in fastbert.explain(ours, arch=90).rows}
    assert ("embeddings_project" in rows) is (model_type in ("electra", "albert"))
    notes = " ".join(fastbert.explain(ours, arch=90).notes)
    n_launches = {"electra": 18, "albert": 34}.get(model_type, 17)
    assert f"{n_launches} from ids to last hidden state" in notes
    assert ("4 layers share 2 sets of weights" in notes and "4 layers share" in str(report)) is (model_type == "albert")
    fastbert.warmup(ours)


def test_json_of_others_stays_json(tmp_path: Path) -> None:
    """Catches a stray `embedding_size` in a BERT's config.json, which transformers ignores, taken for a projection."""
    config = fastbert.BertConfig(**{**{"vocab_size": 20}, "hidden_size": 32, "num_attention_heads": 2})
    (tmp_path / "config.json").write_text(json.dumps({**config.to_dict(), "embedding_size": 16}))
    read = fastbert.BertConfig.from_pretrained(tmp_path)
    assert read.embedding_width == 32 and read.to_dict()["embedding_size"] == 16


@pytest.mark.skipif(cpu.int8_obstacle() is not None, reason=str(cpu.int8_obstacle()))
@pytest.mark.parametrize("model_type", ["roberta", "distilbert"])
def test_int8_on_a_cpu(model_type: str) -> None:
    """Catches a table of token types read where there is none, or positions of BERT, in the 8-bit encoder."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 96, "num_hidden_layers": 2}
    config = fastbert.BertConfig(vocab_size=99, max_position_embeddings=40, model_type=model_type, **sizes)
    exact = fastbert.BertModel(config, backend="cpu").eval()
    ours = fastbert.BertModel(config, backend="cpu", precision="int8").eval()
    ours.load_state_dict(exact.state_dict())
    ids = torch.randint(5, 99, (3, 20))
    with torch.no_grad():
        a, b = ours(ids).last_hidden_state, exact(ids).last_hidden_state
    assert fastbert.explain(ours).rows[1].op == "quantized_linear"
    assert not torch.equal(a, b) and F.cosine_similarity(a, b, dim=-1).min() > 0.99
