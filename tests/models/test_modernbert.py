"""ModernBERT, which has a text of its own, gives what transformers' classes and the reference give."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import fastbert
from family_cases import head_batch, make_batch, run, theirs, twin
from fastbert import reference
from fastbert.checkpoint.families import FAMILIES
from fastbert.checkpoint.rotary import modernbert_layers
from fastbert_kernels import cpu
from helpers import assert_as_accurate, cu_seqlens_of
from model_cases import BATCH, MASKS, VOCAB, assert_close, generator, in_dtype, randn, valid_of

NAMES = [f"BertFor{task}" for task in FAMILIES["modernbert"].heads]
WINDOW = 6  # columns on either side, of tests/family_cases.py
PUBLISHED = {  # config.json of answerdotai/ModernBERT-base as it was published, but for the sizes
    "architectures": ["ModernBertForMaskedLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
    "classifier_activation": "gelu", "classifier_bias": False, "classifier_dropout": 0.0, "classifier_pooling": "mean",
    "cls_token_id": 1, "decoder_bias": True, "deterministic_flash_attn": False, "embedding_dropout": 0.0,
    "eos_token_id": 2, "global_attn_every_n_layers": 3, "global_rope_theta": 160000.0, "gradient_checkpointing": False,
    "hidden_activation": "gelu", "hidden_size": 32, "initializer_cutoff_factor": 2.0, "initializer_range": 0.02,
    "intermediate_size": 37, "layer_norm_eps": 1e-05, "local_attention": 12, "local_rope_theta": 10000.0,
    "max_position_embeddings": 8192, "mlp_bias": False, "mlp_dropout": 0.0, "model_type": "modernbert",
    "norm_bias": False, "norm_eps": 1e-05, "num_attention_heads": 2, "num_hidden_layers": 4, "pad_token_id": 0,
    "position_embedding_type": "absolute", "sep_token_id": 2, "tie_word_embeddings": True, "torch_dtype": "float32",
    "transformers_version": "4.47.0.dev0", "vocab_size": VOCAB,
}  # fmt: skip


@pytest.fixture(autouse=True)
def exact_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes away transformers' cast to float32, which would hide errors below 1e-8."""
    from transformers.models.gte.modeling_gte import apply_rotary_pos_emb
    from transformers.models.modernbert import modeling_modernbert

    monkeypatch.setattr(modeling_modernbert, "apply_rotary_pos_emb", apply_rotary_pos_emb)


def mask_of(kind: str, length: int) -> Tensor | None:
    """(BATCH, length) int64; None for no mask."""
    lengths, columns = torch.tensor([length, length * 2 // 3, 1, 5])[:, None], torch.arange(length)[None]
    if kind == "none":
        return None
    if kind == "holes":
        mask = torch.rand(BATCH, length, generator=generator(9)) < 0.7
        mask[:, 0] = True
        return mask.long()
    mask = columns >= length - lengths if kind == "left" else columns < lengths
    return (mask & (torch.arange(BATCH) != 2)[:, None] if kind == "zero_row" else mask).long()


def batch_of(kind: str, length: int) -> dict[str, Any]:
    ids = torch.randint(1, VOCAB, (BATCH, length), generator=generator(4))
    return {"input_ids": ids, "attention_mask": mask_of(kind, length)}


def check(ours: Any, model: Any, batch: dict[str, Any]) -> None:
    """Hidden states equal transformers' at tokens, are zero elsewhere, and are those of the reference."""
    mine, other = (run(m, batch, output_hidden_states=True) for m in (ours, model))
    judge = reference.encode(dict(ours.named_parameters()), ours.config, **batch)
    valid = valid_of(batch["attention_mask"]) if batch["attention_mask"] is not None else None
    valid = torch.ones(mine[0].shape[:2], dtype=torch.bool) if valid is None else valid
    triples = zip(mine.hidden_states, other.hidden_states, judge.hidden_states, strict=True)
    for i, (state, expected, judged) in enumerate(triples):
        assert_close(f"hidden_states[{i}]", state[valid], expected[valid])
        assert_close(f"reference, hidden_states[{i}]", state, judged)
        assert (state[~valid] == 0).all()
    assert torch.equal(mine.last_hidden_state, mine.hidden_states[-1]) and "pooler_output" not in mine


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("length", [WINDOW, WINDOW + 1, WINDOW + 2, 2 * WINDOW, 2 * WINDOW + 1, 129, 200])
def test_float64_matches_transformers(length: int, kind: str) -> None:
    """Catches a base, window, gate, half, norm or block of queries that is off, also at the edges of windows."""
    model = theirs("modernbert")
    check(twin(model), model, batch_of(kind, length))


@pytest.mark.parametrize(
    "options",
    [
        {"local_attention": 200},  # blocks as long as the window
        {"local_attention": 0},
        {"attention_bias": True, "mlp_bias": True, "norm_bias": True, "hidden_activation": "silu"},
        {"layer_types": ["sliding_attention"] * 2 + ["full_attention"] * 2},
        {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 41},
    ],
    ids=str,
)
def test_settings(options: dict[str, Any]) -> None:
    """Catches a setting of the config that is not read, and shapes that no block size divides."""
    model = theirs("modernbert", **{name: tuple(v) if isinstance(v, list) else v for name, v in options.items()})
    check(twin(model), model, batch_of("holes", 230))


def test_positions_embeds_and_packed_texts() -> None:
    """Catches positions of the caller's that are not taken or stay for the next call, and texts that see others."""
    model, batch = theirs("modernbert"), batch_of("right", 40)
    ours = twin(model)
    position_ids = torch.randperm(500, generator=generator(5))[:40].expand(BATCH, -1)
    check(ours, model, {**batch, "position_ids": position_ids})
    check(ours, model, {"inputs_embeds": randn(BATCH, 40, 32), "attention_mask": batch["attention_mask"]})
    check(ours, model, batch)
    lengths = [5, 0, 1, 300, 131, 131]
    ids = torch.randint(VOCAB, (sum(lengths),), generator=generator(6))
    packed = ours.forward_packed(ids, cu_seqlens_of(lengths))
    alone = [run(model, {"input_ids": text[None]})[0][0] for text in ids.split(lengths) if len(text)]
    assert_close("forward_packed", packed, torch.cat(alone))


def test_long_text() -> None:
    """Catches a window whose cost is the square of the length: (S, S) numbers of one head would be 256 MiB here."""
    ours = twin(theirs("modernbert", num_hidden_layers=2), dtype=torch.float32)
    ours.encoder.layer = ours.encoder.layer[1:]  # the one with a window
    ids = torch.randint(1, VOCAB, (1, 8192), generator=generator(7))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        last = run(ours, {"input_ids": ids}).last_hidden_state
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest < 64 * 2**20
    alone = run(ours, {"input_ids": ids[:, 4000:4200], "position_ids": torch.arange(4000, 4200)[None]})
    assert_close("the middle", last[:, 4050:4150].double(), alone.last_hidden_state[:, 50:150].double(), 1e-5)


@pytest.mark.parametrize("kind", ["right", "left", "holes"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("name", NAMES)
def test_heads(name: str, pooling: str, kind: str) -> None:
    """Catches a head with another activation, norm or pooling, or a tied decoder that is not."""
    if pooling == "mean" and name not in ("BertForSequenceClassification", "BertForMultipleChoice"):
        return
    model = theirs("modernbert", name, classifier_pooling=pooling)
    if kind in ("left", "holes") and pooling == "cls" and name == "BertForSequenceClassification":
        return  # transformers reads the first column, whether there is a token or not
    ours, batch = twin(model, name), head_batch("modernbert", name, kind)
    mine, other = run(ours, batch), run(model, batch)
    mask = batch["attention_mask"]
    params = dict(ours.named_parameters(remove_duplicate=False))
    task = {v: k for k, v in reference.heads._CLASSES.items()}[name.removeprefix("BertFor")]
    judge = reference.head(task, params, ours.config, **batch)
    for key, judged in judge.items():
        assert_close(f"reference, {key}", mine[key], judged)
        expected = other[key]
        per_token = expected.shape[:2] == mask.shape[:2] and mask.dim() == 2
        expected = (
            expected * valid_of(mask).reshape(*mask.shape, *[1] * (expected.dim() - 2)) if per_token else expected
        )
        assert_close(key, mine[key], expected)


@pytest.mark.parametrize("length", [9, 150])
def test_gradients(length: int) -> None:
    """Catches a parameter that is trained on another one's gradient, or on none; and one of rows beyond the text."""
    model = copy.deepcopy(theirs("modernbert"))
    ours, batch = twin(model).train(), batch_of("none", length)
    model.train()
    weights = randn(BATCH, length, 32)
    for m in (ours, model):
        (m(**batch).last_hidden_state * weights).sum().backward()
    expected = dict(model.named_parameters())
    for name, parameter in ours.named_parameters():
        assert_close(name, parameter.grad, expected[ours.config.family.to_theirs(name)].grad, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_numerical_policy(dtype: torch.dtype) -> None:
    """Catches angles, products or a gate that are rounded more often than in plain PyTorch."""
    model, batch = theirs("modernbert"), batch_of("right", 150)
    valid = valid_of(batch["attention_mask"])
    eager, exact = in_dtype(model, dtype), in_dtype(in_dtype(model, dtype), torch.float64)
    outputs = [run(m, batch)[0].cpu()[valid] for m in (twin(model, dtype=dtype), eager, exact)]
    assert_as_accurate("modernbert", *outputs)


def test_attentions_and_hooks() -> None:
    """Catches weights outside of the window, and a hooked module that gets or gives something else than padded."""
    model, batch = theirs("modernbert"), batch_of("left", 20)
    valid = valid_of(batch["attention_mask"])
    ours = twin(model, strict=False)
    plain = run(ours, batch).last_hidden_state
    shapes = []
    for module in (ours.embeddings, ours.encoder, ours.encoder.layer[1], ours.encoder.layer[1].attn,
                   ours.encoder.layer[2].mlp, ours.encoder.layer[2].mlp.Wi, ours.encoder.final_norm):  # fmt: skip
        module.register_forward_hook(lambda module, inputs, output: shapes.append(output[0].shape[-2:]))
    by_reference = run(twin(model, strict=False), batch, output_attentions=True)
    hooked = run(ours, batch, output_attentions=True)
    assert len(shapes) == 7 and set(shapes) >= {(20, 32), (20, 74)}
    columns = torch.arange(20)
    outside = (columns - columns[:, None]).abs() > WINDOW
    for output in (by_reference, hooked):
        assert_close("last_hidden_state", output.last_hidden_state[valid], plain[valid])
        assert (output.attentions[1][:, :, outside] == 0).all() and (output.attentions[0][0, 0] > 0).all()


def test_export() -> None:
    """Catches a program that has kept the lengths, or the masks, of the batch that it was exported with."""
    ours = twin(theirs("modernbert", num_hidden_layers=2), strict=False)
    batch, other = (tuple(batch_of("right", length).values()) for length in (20, 33))
    length = torch.export.Dim("S", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(ours, batch, dynamic_shapes=({1: length}, {1: length}), strict=False).module()
        for inputs in (batch, other):
            assert_close("exported", program(*inputs)[0], ours(*inputs)[0])


# config.json and files


def test_published_config(tmp_path: Path) -> None:
    """Catches one of the two published forms that is read as other layers, or a setting lost on the way."""
    older = fastbert.BertConfig.from_dict(PUBLISHED)
    newer = fastbert.BertConfig.from_dict(transformers.ModernBertConfig(**PUBLISHED).to_dict())
    assert modernbert_layers(older) == modernbert_layers(newer)
    assert [layer.window for layer in modernbert_layers(older)] == [None, WINDOW, WINDOW, None]
    assert [layer.base for layer in modernbert_layers(older)] == [160_000, 10_000, 10_000, 160_000]
    one_base = fastbert.BertConfig.from_dict({**PUBLISHED, "local_rope_theta": None, "global_rope_theta": 7.0})
    assert {layer.base for layer in modernbert_layers(one_base)} == {7.0}
    none_slides = {"global_attn_every_n_layers": 1, "rope_parameters": {"sliding_attention": {"rope_theta": None}}}
    assert len(modernbert_layers(fastbert.BertConfig.from_dict({**PUBLISHED, **none_slides}))) == 4
    # Keys of mmBERT and Ettin, and one that transformers takes for the half of local_attention.
    others = {**PUBLISHED, "position_embedding_type": "sans_pos", "sparse_prediction": True, "sliding_window": 2}
    windows = {layer.window for layer in modernbert_layers(fastbert.BertConfig.from_dict(others))}
    assert windows == {None, 2} and transformers.ModernBertConfig(**others).sliding_window == 2
    for config in (older, newer):
        config.save_pretrained(tmp_path)
        again = transformers.AutoConfig.from_pretrained(tmp_path)
        assert again.rope_parameters == transformers.ModernBertConfig(**PUBLISHED).rope_parameters
        assert again.layer_types == transformers.ModernBertConfig(**PUBLISHED).layer_types
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["hidden_activation"] == "gelu" and "hidden_act" not in written


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"local_attention": -2}, "local_attention: got -2, expected a whole number"),
        ({"layer_types": ["full_attention"]}, "layer_types: got"),
        ({"sliding_window": -1}, "sliding_window: got -1, expected a whole number"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type: got 'dynamic', expected 'default'"),
        ({"global_rope_theta": 0}, "rope_theta: got 0, expected a positive number"),
    ],
)
def test_layers_that_are_refused(settings: dict[str, Any], message: str) -> None:
    """Catches angles or layers that fastbert does not compute, and that run as if they were others."""
    with pytest.raises(ValueError, match=message):
        fastbert.BertModel(fastbert.BertConfig.from_dict({**PUBLISHED, **settings}))


@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM", "BertForSequenceClassification",
                                  "BertForQuestionAnswering"])  # fmt: skip
def test_files_both_ways(name: str, tmp_path: Path) -> None:
    """Catches a tensor lost or misnamed between transformers' files and ours."""
    model = theirs("modernbert", name)
    model.save_pretrained(tmp_path / "theirs")
    ours = getattr(fastbert, name).from_pretrained(tmp_path / "theirs", backend="cpu")
    assert ours.missing_names == [] and ours.dtype == torch.float64
    batch = make_batch("modernbert", "right")
    ours.save_pretrained(tmp_path / "ours")
    again, info = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True, dtype=torch.float64)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for (name, tensor), (_, expected) in zip(again.state_dict().items(), model.state_dict().items(), strict=True):
        assert torch.equal(tensor, expected), name
    mine, other = run(ours, batch), run(model, batch)
    valid = valid_of(batch["attention_mask"])
    rows: Any = valid if mine[0].shape[:2] == valid.shape else slice(None)
    assert_close(name, mine[0][rows], other[0][rows])


# Engines


def test_what_no_kernel_does_is_named() -> None:
    """Catches a kernel that is silently not there under strict, and an engine that runs these layers as BERT's."""
    ours = twin(theirs("modernbert"), dtype=torch.float32)
    obstacles = ours.engine.arithmetic_obstacles(ours)["layers with gradients"]
    assert obstacles == [], "gradients are on"
    triton = twin(theirs("modernbert"), dtype=torch.float32, backend="triton")
    assert not any(row.raises for row in fastbert.explain(triton, device="cuda:0", arch=90).rows)
    shapes_of = [row.shapes for row in fastbert.explain(ours).rows if row.op == "attention"]
    assert [f"within {WINDOW} columns" in shapes for shapes in shapes_of] == [False, True, False]
    eight_bit = twin(theirs("modernbert"), dtype=torch.float32, precision="int8")
    with pytest.raises(fastbert.BackendError, match="precision='int8'.*intermediate size 37 is not a multiple of 32"):
        run(eight_bit, batch_of("none", 20))


@pytest.mark.skipif(cpu.obstacle() is not None, reason=str(cpu.obstacle()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batch_invariance(dtype: torch.dtype) -> None:
    """Catches a text whose bits depend on the others, on their lengths or on their order."""
    ours = twin(theirs("modernbert", hidden_size=64, intermediate_size=48), dtype=dtype, batch_invariant=True)
    lengths = [3, 70, 1, 7, 300, 193]
    texts = torch.randint(VOCAB, (sum(lengths),), generator=generator(6)).split(lengths)
    with torch.no_grad():
        together = ours.forward_packed(torch.cat(texts), cu_seqlens_of(lengths)).split(lengths)
        turned = ours.forward_packed(torch.cat(texts[::-1]), cu_seqlens_of(lengths[::-1])).split(lengths[::-1])
        for text, mine, other in zip(texts, together, turned[::-1], strict=True):
            alone = ours.forward_packed(text, cu_seqlens_of([len(text)]))
            assert torch.equal(alone, mine) and torch.equal(alone, other)
