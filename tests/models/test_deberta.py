"""DeBERTa-v2 and -v3, which have a text of their own, give what transformers' classes and the reference give."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastbert
from family_cases import head_batch, make_batch, run, theirs, twin
from fastbert import reference
from fastbert.checkpoint.families import FAMILIES
from fastbert.engine.block import feature_obstacles, features_of
from fastbert.ops.disentangled import rows_of_distances
from fastbert_kernels import cpu
from helpers import assert_as_accurate, cu_seqlens_of
from model_cases import BATCH, MASKS, VOCAB, assert_close, generator, in_dtype, randn, valid_of

TYPE = "deberta-v2"
NAMES = [f"BertFor{task}" for task in FAMILIES[TYPE].heads]
V3: dict[str, Any] = {"relative_attention": True, "position_buckets": 8, "max_relative_positions": 16,
                      "share_att_key": True, "pos_att_type": "p2c|c2p", "norm_rel_ebd": "layer_norm",
                      "position_biased_input": False, "type_vocab_size": 0, "embedding_size": 32}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "v3": V3,
    "v2-xlarge": {**V3, "conv_kernel_size": 3, "conv_act": "gelu", "attention_head_size": 16},
    "convolution in groups": {**V3, "conv_kernel_size": 5, "conv_groups": 4, "norm_rel_ebd": "none"},
    "own projections": {**V3, "share_att_key": False, "position_biased_input": True, "type_vocab_size": 2,
                        "max_position_embeddings": 300},
    "without buckets": {**V3, "position_buckets": -1, "share_att_key": False, "pos_att_type": "c2p"},
    "narrow embeddings": {**V3, "pos_att_type": "p2c", "norm_rel_ebd": "none", "embedding_size": 20},
    "without distances": {**V3, "relative_attention": False},
}  # fmt: skip
PUBLISHED = {  # config.json of microsoft/deberta-v3-base as it was published, but for the sizes
    "model_type": "deberta-v2", "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
    "hidden_size": 32, "initializer_range": 0.02, "intermediate_size": 37, "max_position_embeddings": 512,
    "relative_attention": True, "position_buckets": 256, "norm_rel_ebd": "layer_norm", "share_att_key": True,
    "pos_att_type": "p2c|c2p", "layer_norm_eps": 1e-07, "max_relative_positions": -1, "position_biased_input": False,
    "num_attention_heads": 2, "num_hidden_layers": 2, "type_vocab_size": 0, "vocab_size": VOCAB,
}  # fmt: skip


@pytest.fixture(autouse=True)
def exact_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes away transformers' cast of the scale to float32, which would hide errors below 1e-8."""
    from transformers.models.deberta_v2 import modeling_deberta_v2

    def scaled(q: Tensor, n_terms: int) -> Tensor:
        return torch.tensor(float(q.shape[-1] * n_terms), dtype=torch.float64).sqrt()

    monkeypatch.setattr(modeling_deberta_v2, "scaled_size_sqrt", scaled)


def mask_of(kind: str, length: int) -> Tensor | None:
    """(BATCH, length) int64; None for no mask."""
    lengths, columns = torch.tensor([length, -(-length * 2 // 3), 1, min(5, length)])[:, None], torch.arange(length)
    if kind == "none":
        return None
    if kind == "holes":
        mask = torch.rand(BATCH, length, generator=generator(9)) < 0.7
        mask[:, 0] = True
        return mask.long()
    mask = columns >= length - lengths if kind == "left" else columns < lengths
    return (mask & (torch.arange(BATCH) != 2)[:, None] if kind == "zero_row" else mask).long()


def batch_of(kind: str, length: int, config: Any = None) -> dict[str, Any]:
    ids = torch.randint(1, VOCAB, (BATCH, length), generator=generator(4))
    batch = {"input_ids": ids, "attention_mask": mask_of(kind, length)}
    if config is not None and config.type_vocab_size:
        batch["token_type_ids"] = torch.randint(2, ids.shape, generator=generator(8))
    return batch


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
@pytest.mark.parametrize("name", KINDS)
def test_float64_matches_transformers(name: str, kind: str) -> None:
    """Catches a bucket, term, scale, projection, norm or convolution that is off, for each form of config.json."""
    model = theirs(TYPE, **KINDS[name])
    check(twin(model), model, batch_of(kind, 50, model.config))


@pytest.mark.parametrize("length", [1, 4, 5, 16, 17, 18, 600])
def test_lengths_at_the_edges_of_buckets(length: int) -> None:
    """Catches a text of one token, distances where buckets begin to grow or end, and one beyond 512 tokens."""
    sizes = {"hidden_size": 48, "num_attention_heads": 3, "embedding_size": 48}
    far = {"position_buckets": 256, "max_relative_positions": 512}
    model = theirs(TYPE, **{**V3, **(far if length > 512 else sizes)})
    check(twin(model), model, batch_of("none" if length < 5 else "holes", length))


def test_distances_are_in_their_buckets() -> None:
    """Catches a distance with another row than in transformers, also far beyond the farthest bucket."""
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

    for n_buckets, farthest in ((256, 512), (8, 16), (7, 40), (32, 128)):
        rows = torch.tensor(rows_of_distances(n_buckets, farthest))
        radius = len(rows) // 2
        distances = torch.arange(-radius - 500, radius + 501)
        expected = make_log_bucket_position(distances, n_buckets, farthest).long() + n_buckets
        mine = rows[distances.clamp(-radius, radius) + radius]
        assert torch.equal(mine, expected.clamp(0, 2 * n_buckets - 1))


def test_embeds_and_packed_texts() -> None:
    """Catches texts that see others, in attention or in the convolution, and embeddings that are not taken."""
    model, batch = theirs(TYPE, **KINDS["v2-xlarge"]), batch_of("right", 40)
    ours = twin(model)
    check(ours, model, {"inputs_embeds": randn(BATCH, 40, 32), "attention_mask": batch["attention_mask"]})
    lengths = [5, 0, 1, 131, 31, 131]
    ids = torch.randint(VOCAB, (sum(lengths),), generator=generator(6))
    packed = ours.forward_packed(ids, cu_seqlens_of(lengths))
    alone = [run(model, {"input_ids": text[None]})[0][0] for text in ids.split(lengths) if len(text)]
    assert_close("forward_packed", packed, torch.cat(alone))


@pytest.mark.parametrize("kind", ["right", "left", "holes"])
@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_heads(name: str, legacy: bool, kind: str) -> None:
    """Catches a head with another pooler, activation or norm, or a decoder that is not the embeddings."""
    if not legacy and name != "BertForMaskedLM":
        return
    model = theirs(TYPE, name, **V3, legacy=legacy, tie_word_embeddings=legacy)
    ours, batch = twin(model, name), head_batch(TYPE, name, kind)
    mine, other = run(ours, batch), run(model, batch)
    mask = batch["attention_mask"]
    params = dict(ours.named_parameters(remove_duplicate=False))
    task = {v: k for k, v in reference.heads._CLASSES.items()}[name.removeprefix("BertFor")]
    judge = reference.head(task, params, ours.config, **batch)
    for key, judged in judge.items():
        assert_close(f"reference, {key}", mine[key], judged)
        if kind != "right" and name in ("BertForSequenceClassification", "BertForMultipleChoice"):
            continue  # transformers reads the first column, whether there is a token or not
        expected = other[key]
        if expected.shape[:2] == mask.shape[:2] and mask.dim() == 2:
            expected = expected * valid_of(mask).reshape(*mask.shape, *[1] * (expected.dim() - 2))
        assert_close(key, mine[key], expected)


@pytest.mark.parametrize("kind", ["v3", "v2-xlarge", "own projections"])
def test_gradients(kind: str) -> None:
    """Catches a parameter that is trained on another one's gradient, or on none."""
    model = copy.deepcopy(theirs(TYPE, **KINDS[kind], hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    ours, batch = twin(model).train(), batch_of("holes", 30, model.config)
    model.train()
    weights = randn(BATCH, 30, 32) * batch["attention_mask"][..., None]
    for m in (ours, model):
        (m(**batch).last_hidden_state * weights).sum().backward()
    expected = dict(model.named_parameters())
    for name, parameter in ours.named_parameters():
        if name.endswith("pos_key_proj.bias"):  # which moves all scores of a query alike
            assert parameter.grad.abs().max() < 1e-12
        else:
            assert_close(name, parameter.grad, expected[name].grad, 1e-9)


def test_dropout_of_distances() -> None:
    """Catches training that keeps the projections of distances, or that drops nothing out of them."""
    ours = twin(theirs(TYPE, **V3), strict=False).train()
    attention, table = ours.encoder.layer[0].attention.self, ours.encoder.table()
    assert table is not None
    torch.manual_seed(0)
    first, second = (attention.positions(table).keys for _ in range(2))
    assert not torch.equal(first, second)
    batch = batch_of("right", 20)
    ours.gradient_checkpointing_enable()
    ours(**batch).last_hidden_state.sum().backward()
    assert (ours.encoder.rel_embeddings.weight.grad.abs().sum(1) > 0).any()
    ours.eval()
    kept = attention.positions(ours.encoder.table())
    with torch.no_grad():
        kept = attention.positions(ours.encoder.table()).keys
        assert attention.positions(ours.encoder.table()).keys is kept
        before = run(ours, batch)[0]
        ours.encoder.rel_embeddings.weight.mul_(2.0)
        assert not torch.equal(run(ours, batch)[0], before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_numerical_policy(dtype: torch.dtype) -> None:
    """Catches terms or products that are rounded more often than in plain PyTorch."""
    model, batch = (
        theirs(TYPE, **{**KINDS["v2-xlarge"], "hidden_size": 64, "embedding_size": 64, "attention_head_size": 32}),
        batch_of("right", 150),
    )
    valid = valid_of(batch["attention_mask"])
    eager, exact = in_dtype(model, dtype), in_dtype(in_dtype(model, dtype), torch.float64)
    outputs = [run(m, batch)[0].cpu()[valid] for m in (twin(model, dtype=dtype), eager, exact)]
    assert_as_accurate("deberta", *outputs)


def test_attentions_and_hooks() -> None:
    """Catches weights that lack a term, and a hooked module that gets or gives something else than padded."""
    model, batch = theirs(TYPE, **KINDS["v2-xlarge"]), batch_of("left", 20)
    valid = valid_of(batch["attention_mask"])
    ours = twin(model, strict=False)
    plain = run(ours, batch).last_hidden_state
    shapes = []
    layer = ours.encoder.layer[1]
    for module in (ours.embeddings, ours.encoder, ours.encoder.conv, ours.encoder.conv.conv, layer, layer.attention,
                   layer.attention.self, layer.intermediate, layer.output):  # fmt: skip
        module.register_forward_hook(lambda module, inputs, output: shapes.append(output[0].shape[-2:]))
    by_reference = run(twin(model, strict=False), batch, output_attentions=True)
    hooked = run(ours, batch, output_attentions=True)
    assert len(shapes) == 9 and set(shapes) >= {(20, 32), (20, 37)}
    expected = run(model, batch, output_attentions=True).attentions
    queries = valid[:, None, :].expand(-1, 2, -1)
    for output in (by_reference, hooked):
        assert_close("last_hidden_state", output.last_hidden_state[valid], plain[valid])
        for mine, other in zip(output.attentions, expected, strict=True):
            assert_close("attentions", mine[queries], other[queries])


def test_export() -> None:
    """Catches a program that has kept the lengths, or the masks, of the batch that it was exported with."""
    ours = twin(theirs(TYPE, **KINDS["v2-xlarge"]), strict=False)
    batch, other = (tuple(batch_of("right", length).values()) for length in (20, 33))
    length = torch.export.Dim("S", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(ours, batch, dynamic_shapes=({1: length}, {1: length}), strict=False).module()
        for inputs in (batch, other):
            assert_close("exported", program(*inputs)[0], ours(*inputs)[0])


# config.json and files


def test_published_config(tmp_path: Path) -> None:
    """Catches a published setting that is read as another, or lost on the way to transformers and back."""
    config = fastbert.BertConfig.from_dict(PUBLISHED)
    config.save_pretrained(tmp_path)
    again = transformers.AutoConfig.from_pretrained(tmp_path)
    expected = transformers.DebertaV2Config(**PUBLISHED).to_dict()
    written = again.to_dict()
    assert {name: written[name] for name in PUBLISHED} == {name: expected[name] for name in PUBLISHED}
    model = fastbert.BertModel(config)
    assert type(model).__name__ == "DebertaModel" and model.encoder.rel_embeddings.weight.shape == (512, 32)
    bare = fastbert.BertConfig.from_dict({"model_type": TYPE})
    assert (bare.vocab_size, bare.hidden_size, bare.layer_norm_eps, bare.type_vocab_size) == (128100, 1536, 1e-7, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"conv_kernel_size": 4}, "conv_kernel_size: got 4, expected 0 or an odd whole number"),
        ({"position_buckets": 32, "max_relative_positions": 16}, "position_buckets: got 32, expected from 2"),
        ({"attention_head_size": 8}, "attention_head_size: got 8, expected 16"),
        ({"pooler_hidden_act": "no such"}, "pooler_hidden_act: got 'no such', expected one of gelu"),
        ({"conv_groups": 5}, "conv_groups: got 5, expected a divisor of hidden_size"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    """Catches a setting that fastbert does not compute, and that runs as if it were another."""
    with pytest.raises(ValueError, match=message):
        fastbert.BertModel(fastbert.BertConfig.from_dict({**PUBLISHED, **settings}))


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("name", ["BertModel", *NAMES])
def test_files_both_ways(name: str, legacy: bool, tmp_path: Path) -> None:
    """Catches a tensor lost or misnamed between transformers' files and ours."""
    if not legacy and name != "BertForMaskedLM":
        return
    model = theirs(TYPE, name, **KINDS["v2-xlarge"], legacy=legacy)
    model.save_pretrained(tmp_path / "theirs")
    ours = getattr(fastbert, name).from_pretrained(tmp_path / "theirs", backend="cpu")
    assert ours.missing_names == [] and ours.dtype == torch.float64
    batch = head_batch(TYPE, name) if name != "BertModel" else make_batch(TYPE)
    ours.save_pretrained(tmp_path / "ours")
    again, info = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True, dtype=torch.float64)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for (key, tensor), (_, expected) in zip(again.state_dict().items(), model.state_dict().items(), strict=True):
        assert torch.equal(tensor, expected), key
    mine, other, valid = run(ours, batch), run(model, batch), valid_of(batch["attention_mask"])
    rows: Any = valid if mine[0].shape[:2] == valid.shape else slice(None)
    assert_close(name, mine[0][rows], other[0][rows])


def test_published_checkpoint_for_masked_tokens(tmp_path: Path) -> None:
    """Catches the head of microsoft/deberta-v3-base, which its config.json does not name, started afresh."""
    model = theirs(TYPE, "BertForMaskedLM", **V3, legacy=False)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    more = {"mask_predictions.dense.weight": randn(32, 32), "deberta.embeddings.word_embeddings._weight": randn(3, 32)}
    save_file(state | more, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    del config["legacy"], config["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = fastbert.BertForMaskedLM.from_pretrained(tmp_path, backend="cpu").eval()
    assert ours.missing_names == []
    batch = make_batch(TYPE, "none")
    assert_close("logits", run(ours, batch).logits, run(model, batch).logits)
    assert type(fastbert.BertModel.from_pretrained(tmp_path)).__name__ == "DebertaModel"


# Engines


def test_what_no_kernel_does_is_named() -> None:
    """Catches an engine that runs these layers as BERT's, and a report without the terms of distances."""
    ours = twin(theirs(TYPE, **{**KINDS["v2-xlarge"], "conv_act": "tanh"}), dtype=torch.float32)
    obstacles = ours.engine.arithmetic_obstacles(ours)["one C++ call"]
    activation = "'tanh', the activation of a layer's convolution"
    assert cpu.obstacle() is not None or any(activation in each for each in obstacles)
    ours = twin(theirs(TYPE, **KINDS["v2-xlarge"]), dtype=torch.float32)
    features = list(feature_obstacles(features_of(list(ours.blocks())), frozenset(), "an engine"))
    for feature in ("its own attention scale", "disentangled attention", "a convolution beside a layer"):
        assert any(feature in obstacle for obstacle in features), feature
    for types in ("p2c|c2p", None):  # BERT's layers, but for the scale
        model = theirs(TYPE, **{**KINDS["without distances"], "pos_att_type": types})
        without = twin(model, dtype=torch.float32)
        assert_close("without", run(without, batch_of("none", 9))[0].double(), run(model, batch_of("none", 9))[0], 2e-6)
    rows = fastbert.explain(ours).rows
    assert any("terms of 2 x 16 distances" in row.shapes for row in rows if row.op == "attention")
    assert any("(T, 96) -> (T, 32)" in row.shapes for row in rows if row.op == "linear")
    counted = [row.flops for row in fastbert.explain(ours, [[1] * 5, [1] * 90]).rows if row.op == "attention"]
    products = 5 * (2 * 5 + 2 * 9) + 90 * (2 * 90 + 2 * 16)  # keys twice, and rows of two terms: all that there are
    assert counted == [2 * 32 * products] * 2


def test_verify() -> None:
    """Catches `verify` that compares with another arithmetic, or cannot read the layers as data."""
    ours = twin(theirs(TYPE, **KINDS["v2-xlarge"]), dtype=torch.float32, strict=False)
    lengths = [3, 40, 1, 7]
    texts = [ids.tolist() for ids in torch.randint(VOCAB, (sum(lengths),), generator=generator(6)).split(lengths)]
    report = fastbert.verify(ours, texts, gradients=True)
    assert report.ok, str(report)


@pytest.mark.skipif(cpu.obstacle() is not None, reason=str(cpu.obstacle()))
@pytest.mark.parametrize("kind", ["v2-xlarge", "own projections"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batch_invariance(dtype: torch.dtype, kind: str) -> None:
    """Catches a text whose bits depend on the others, on their lengths or on their order."""
    if not cpu.multiplies(dtype):
        pytest.skip(f"the C++ kernels do not multiply {dtype} here")
    sizes = {"hidden_size": 64, "embedding_size": 64, "intermediate_size": 48, "attention_head_size": 32}
    ours = twin(theirs(TYPE, **{**KINDS[kind], **sizes}), dtype=dtype, batch_invariant=True)
    lengths = [3, 70, 1, 7, 230, 193]
    texts = torch.randint(VOCAB, (sum(lengths),), generator=generator(6)).split(lengths)
    with torch.no_grad():
        together = ours.forward_packed(torch.cat(texts), cu_seqlens_of(lengths)).split(lengths)
        turned = ours.forward_packed(torch.cat(texts[::-1]), cu_seqlens_of(lengths[::-1])).split(lengths[::-1])
        for text, mine, other in zip(texts, together, turned[::-1], strict=True):
            alone = ours.forward_packed(text, cu_seqlens_of([len(text)]))
            assert torch.equal(alone, mine) and torch.equal(alone, other)


def test_kernels_run_the_model(device: torch.device) -> None:
    """Catches layers on Triton kernels that give something else than transformers, with holes in the mask too."""
    model, batch = theirs(TYPE, **V3), batch_of("holes", 20)
    ours = twin(model, dtype=torch.float32, backend="triton", device=device)
    valid = valid_of(batch["attention_mask"])
    assert_close("triton", run(ours, batch)[0].cpu().double()[valid], run(model, batch)[0][valid], 2e-6)
    rows = [row for row in fastbert.explain(ours, device="cuda:0", arch=90).rows if row.op == "attention"]
    assert [row.kernel for row in rows] == ["fastbert_kernels.disentangled"] and rows[0].launches == 1
