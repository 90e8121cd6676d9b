"""MPNet has a text of its own: distances at the edges, what engines make of them, and its public names."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

import fastbert
from family_cases import run, theirs, twin
from fastbert import BertConfig, BertModel, MPNetModel, reference
from fastbert.engine import capture
from fastbert.models import mpnet
from fastbert_kernels import cpu
from graph_cases import StandIn
from helpers import assert_as_accurate, cu_seqlens_of
from model_cases import VOCAB, assert_close, in_dtype, randn, valid_of

COMPILED = pytest.mark.skipif(cpu.obstacle() is not None, reason=str(cpu.obstacle()))
LENGTH = 290  # beyond the farthest distance on both sides
LONG: dict[str, Any] = {"max_position_embeddings": LENGTH + 2, "hidden_size": 64, "intermediate_size": 96}


def long_batch(kind: str) -> dict[str, Any]:
    """Three rows up to LENGTH: whole, with tokens on the right alone, and with holes."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(5, VOCAB, (3, LENGTH), generator=generator)
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    mask[1, : LENGTH // 3] = 0
    if kind == "holes":
        mask[2] = torch.rand(LENGTH, generator=generator) > 0.4
        mask[2, 0] = 1
    return {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}


# Distances


def test_buckets_are_those_of_transformers() -> None:
    """Catches a logarithm that is rounded otherwise at an edge between two buckets, or a sign."""
    distances = torch.arange(-700, 701)
    expected = MPNetEncoder.relative_position_bucket(distances).tolist()
    assert [mpnet.relative_position_bucket(d) for d in distances.tolist()] == expected
    assert [reference.relative_position_bucket(d) for d in distances.tolist()] == expected


@pytest.mark.parametrize("kind", ["left", "holes"])
def test_far_tokens(kind: str) -> None:
    """Catches a table that ends too early, or distances in packed rows where columns count."""
    model, batch = theirs("mpnet", **LONG), long_batch(kind)
    ours, valid = twin(model), valid_of(batch["attention_mask"])
    expected = run(model, batch)[0][valid]
    assert_close("last_hidden_state", run(ours, batch)[0][valid], expected)
    judge = reference.encode(dict(ours.named_parameters()), ours.config, **batch, output_attentions=False)
    assert_close("reference", judge.last_hidden_state[valid], expected)
    with pytest.MonkeyPatch.context() as patch:  # a pooler that is heard, attention that keeps its weights
        patch.setattr(ours, "policy", fastbert.ops.Policy("torch"))
        ours.encoder.layer[0].attention.attn.register_forward_hook(lambda *_: None)
        assert_close("with a hook", run(ours, batch)[0][valid], expected)
        output = run(ours, batch, output_attentions=True)
    weights = run(model, batch, output_attentions=True).attentions
    queries = valid[:, None, :].expand(-1, 2, -1)
    for mine, other in zip(output.attentions, weights, strict=True):
        assert_close("attentions", mine[queries], other[queries])


@COMPILED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["left", "holes"])
def test_one_call(kind: str, dtype: torch.dtype) -> None:
    """Catches an encoder in one call that leaves out the bias, or reads the columns of another text."""
    model, batch = theirs("mpnet", **LONG), long_batch(kind)
    ours, valid = twin(model, dtype=dtype), valid_of(batch["attention_mask"])
    if cpu.multiplies(dtype):
        with torch.no_grad():
            assert ours.engine.choose_arithmetic(ours, 64) is ours.engine.one_call
    exact = in_dtype(in_dtype(model, dtype), torch.float64)
    outputs = [run(each, batch)[0][valid] for each in (ours, in_dtype(model, dtype), exact)]
    assert_as_accurate("one call", *outputs)


@pytest.mark.skipif(cpu.int8_obstacle() is not None, reason=str(cpu.int8_obstacle()))
def test_int8_in_one_call() -> None:
    """Catches the 8-bit encoder without the bias."""
    model, batch = theirs("mpnet", **LONG), long_batch("holes")
    ours, valid = twin(model, dtype=torch.float32, precision="int8"), valid_of(batch["attention_mask"])
    with torch.no_grad():
        assert ours.engine.choose_arithmetic(ours, 64) is ours.engine.int8_call
    plain = twin(model, dtype=torch.float32, precision="int8", backend="torch")
    expected = run(model, batch)[0][valid]
    for each in (ours, plain):
        assert torch.cosine_similarity(run(each, batch)[0][valid].double(), expected).min() > 0.98


@COMPILED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_of_a_text_alone(dtype: torch.dtype) -> None:
    """Catches a text whose vector changes with its neighbours in batch-invariant mode."""
    if not cpu.multiplies(dtype):
        pytest.skip(f"the C++ kernels do not multiply {dtype} here")
    ours = twin(theirs("mpnet", **LONG), dtype=dtype, batch_invariant=True)
    lengths = [7, 200, 1, 33]
    ids = torch.randint(5, VOCAB, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        together = ours.forward_packed(ids, cu_seqlens_of(lengths)).split(lengths)
        alone = [ours.forward_packed(part, cu_seqlens_of([len(part)])) for part in ids.split(lengths)]
    assert all(map(torch.equal, together, alone))


@pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning")
def test_holes_and_graphs(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Catches a graph that replays without the columns of a mask with holes, or with an old table of biases."""
    capturer = StandIn()
    monkeypatch.setattr(capture, "capturer", lambda device: capturer)
    model = theirs("mpnet")
    ours = twin(model, dtype=torch.float32, backend="triton", device=device)
    batch = {"input_ids": torch.arange(5, 17).view(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    run(ours, batch)
    assert capturer.replays == 1
    with torch.no_grad():
        ours.encoder.relative_attention_bias.weight.mul_(2.0)
        model.encoder.relative_attention_bias.weight.mul_(2.0)
    plain = twin(model, dtype=torch.float32, backend="triton", device=device)
    plain.cuda_graphs = False
    for i, hole in enumerate((None, 2, 4, None)):  # two of them leave texts of the same lengths
        mask = torch.ones(2, 6, dtype=torch.long)
        if hole is not None:
            mask[0, hole] = 0
        batch["attention_mask"] = mask
        replays = capturer.replays + (i == 0)  # the old graph is launched, and then looked at
        valid, mine = valid_of(mask), run(ours, batch)[0]
        error = mine[valid.to(device)].cpu().double() - run(model, batch)[0][valid]
        assert error.abs().max() < 1e-5 and capturer.replays == replays + 1
        assert torch.equal(run(plain, batch)[0], mine)


# Training


@COMPILED
@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_training_on_kernels(use_reentrant: bool | None) -> None:
    """Catches layers that each add to the shared table but for the last, with and without checkpointing."""
    model, batch = theirs("mpnet", **LONG), long_batch("left")
    ours = twin(model, dtype=torch.float32).train()
    for module in (*ours.modules(), *model.train().modules()):
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert next(ours.engine.training.obstacles(ours, None, False, False), None) is None
    if use_reentrant is not None:
        ours.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        ours.enable_input_require_grads()
    weights = randn(3, LENGTH, 64) * batch["attention_mask"][..., None]
    gradients = []
    for each in (ours, in_dtype(model, torch.float32).train(), model):
        (each(**batch).last_hidden_state * weights.to(each.dtype)).sum().backward()
        gradients.append(dict(each.named_parameters()))
    for name in ("encoder.relative_attention_bias.weight", "encoder.layer.0.attention.attn.q.weight"):
        assert_as_accurate(name, *(each[name].grad for each in gradients))


def test_gradients_with_holes_are_exact() -> None:
    """Catches a gradient of the table in float64 that is another one than transformers'."""
    model, batch = theirs("mpnet", **LONG), long_batch("holes")
    ours, weights = twin(model, backend="auto"), randn(3, LENGTH, 64) * batch["attention_mask"][..., None]
    for each in (ours, model):
        (each(**batch).last_hidden_state * weights).sum().backward()
    name = "encoder.relative_attention_bias.weight"
    assert_close(name, ours.get_parameter(name).grad, model.get_parameter(name).grad, 1e-9)


# Names


def test_public_names(tmp_path: Any) -> None:
    """Catches BertModel that builds BERT's layers for MPNet, and copies, pickles or heads that do."""
    config = BertConfig.from_dict(theirs("mpnet").config.to_dict())
    model = BertModel(config, add_pooling_layer=False)
    assert type(model) is MPNetModel and model.pooler is None
    assert type(copy.deepcopy(model)) is type(pickle.loads(pickle.dumps(model))) is MPNetModel
    head = fastbert.BertForMaskedLM(config)
    assert type(head.bert) is MPNetModel and type(BertModel(BertConfig(num_hidden_layers=1))) is BertModel
    head.save_pretrained(tmp_path)
    assert type(transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)).__name__ == "MPNetForMaskedLM"
    with pytest.raises(ValueError, match="MPNetModel: got a config of model_type 'bert', expected BertModel"):
        MPNetModel(BertConfig())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pad_token_id": 3}, "pad_token_id: got 3, expected 1: MPNet has no other"),
        ({"relative_attention_num_buckets": 16}, "relative_attention_num_buckets: got 16, expected 32 or more"),
    ],
)
def test_settings_that_its_code_does_not_read(settings: dict[str, Any], message: str) -> None:
    """Catches a setting that transformers' code ignores and ours would follow."""
    with pytest.raises(ValueError, match=message):
        BertModel(BertConfig.from_dict({**theirs("mpnet").config.to_dict(), **settings}))


def test_export() -> None:
    """Catches a look at a mask's holes, or at the size of a batch, that an exporter cannot follow."""
    model, batch = theirs("mpnet"), long_batch("holes")
    batch = {name: tensor[:, :12] for name, tensor in batch.items()}
    ours, valid = twin(model, backend="auto", strict=False), valid_of(batch["attention_mask"])
    with torch.no_grad():
        exported = torch.export.export(ours, tuple(batch.values())).module()
        assert_close("exported", exported(*batch.values())[0][valid], run(model, batch)[0][valid])
