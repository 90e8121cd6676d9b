"""BertModel gives what transformers gives: outputs, masks, dtypes and backends."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import transformers

import fastbert
from helpers import assert_as_accurate
from model_cases import (
    BATCH,
    LENGTH,
    MASKS,
    assert_close,
    first_tokens,
    in_dtype,
    make_batch,
    mask,
    place,
    pooled,
    randn,
    run,
    theirs,
    twin,
    valid_of,
)


def assert_matches(ours: Any, model: Any, batch: dict[str, Any]) -> None:
    """Both outputs and all hidden states equal transformers' at valid positions and are zero at the others."""
    valid = valid_of(batch["attention_mask"])
    mine = run(ours, batch, output_hidden_states=True)
    other = run(model, batch, output_hidden_states=True)
    assert_close("last_hidden_state", mine.last_hidden_state.cpu()[valid], other.last_hidden_state[valid])
    assert len(mine.hidden_states) == len(other.hidden_states)
    for i, (state, expected) in enumerate(zip(mine.hidden_states, other.hidden_states, strict=True)):
        assert_close(f"hidden_states[{i}]", state.cpu()[valid], expected[valid])
        assert (state.cpu()[~valid] == 0).all()
    assert torch.equal(mine.last_hidden_state, mine.hidden_states[-1])
    assert_close("pooler_output", mine.pooler_output.cpu(), pooled(model, other.last_hidden_state, valid))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("shape", ["base", "large", "minilm", "96x3", "320x5"])
def test_float64_matches_transformers(shape: str, kind: str, backend: str, device: torch.device) -> None:
    """Catches a wrong step in the encoder or pooler, or a mask, type or position that lands on the wrong token."""
    model = theirs("BertModel", shape)
    assert_matches(twin(model, backend=backend, device=place(backend, device)), model, make_batch(kind))


def assert_accurate(model: Any, ours: Any, batch: dict[str, Any]) -> None:
    """The numerical policy, on each output: our error against float64 beside that of transformers in our dtype."""
    valid = valid_of(batch["attention_mask"])
    eager = in_dtype(model, ours.dtype, ours.device)
    reference = in_dtype(in_dtype(model, ours.dtype), torch.float64)
    mine, other, expected = run(ours, batch), run(eager, batch), run(reference, batch)
    hidden = [output.last_hidden_state.cpu()[valid] for output in (mine, other, expected)]
    assert_as_accurate("last_hidden_state", *hidden)
    assert (mine.last_hidden_state.cpu()[~valid] == 0).all()
    on_device = valid.to(ours.device)
    vectors = mine.pooler_output, pooled(eager, other.last_hidden_state, on_device)
    assert_as_accurate("pooler_output", *vectors, pooled(reference, expected.last_hidden_state, valid))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", ["base", "large", "minilm", "96x3", "320x5"])
def test_lower_precision_is_as_accurate(shape: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """Catches a sum, a softmax or a statistic that is kept in less precision than transformers keeps it."""
    model = theirs("BertModel", shape)
    assert_accurate(model, twin(model, dtype, backend, place(backend, device)), make_batch("right"))


@pytest.mark.parametrize(
    ("shape", "dtype", "kind"),
    [
        ("minilm", torch.float32, "right"),
        ("minilm", torch.bfloat16, "holes"),
        ("96x3", torch.float32, "holes"),
        ("96x3", torch.bfloat16, "left"),
        ("96x3", torch.float16, "zero_row"),
        ("320x5", torch.float32, "none"),
        ("320x5", torch.bfloat16, "right"),
        ("tiny", torch.float32, "left"),
        ("tiny", torch.bfloat16, "none"),
    ],
)
def test_kernels_are_as_accurate(shape: str, dtype: torch.dtype, kind: str, device: torch.device, poisoned) -> None:
    """Catches kernels that are right one by one but are fed the wrong thing, or leave part of an output unwritten."""
    model = theirs("BertModel", shape)
    assert_accurate(model, twin(model, dtype, "triton", device), make_batch(kind))
    poisoned.check()


@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu"])
def test_hidden_act(hidden_act: str) -> None:
    """Catches the erf and the tanh form of GELU exchanged."""
    model = theirs("BertModel", "tiny", hidden_act=hidden_act)
    assert_matches(twin(model), model, make_batch("right"))


def test_layer_norm_eps() -> None:
    """Catches an epsilon that is not the config's, in any of the LayerNorms."""
    model = theirs("BertModel", "tiny", layer_norm_eps=0.05)
    assert_matches(twin(model), model, make_batch("right"))


@pytest.mark.parametrize(
    "names", [("token_type_ids",), ("position_ids",), ()], ids=["without positions", "without types", "neither"]
)
@pytest.mark.parametrize("kind", ["none", "left", "holes"])
def test_defaults_of_types_and_positions(names: tuple[str, ...], kind: str) -> None:
    """Catches positions that packing renumbered, where the default is the column, also behind padding and holes."""
    model = theirs()
    batch = make_batch(kind)
    batch = {n: t for n, t in batch.items() if n in ("input_ids", "attention_mask", *names)}
    assert_matches(twin(model), model, batch)


def test_positions_of_one_row() -> None:
    """Catches (1, S) positions, which transformers takes for every row, refused or misread."""
    model = theirs()
    batch = make_batch("right")
    batch["position_ids"] = batch["position_ids"][:1]
    assert_matches(twin(model), model, batch)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float32, torch.float16, torch.float64])
def test_mask_dtypes(dtype: torch.dtype) -> None:
    """Catches a mask whose dtype changes its meaning."""
    ours, batch = twin(theirs()), make_batch("holes")
    expected = run(ours, batch)
    same = run(ours, {**batch, "attention_mask": batch["attention_mask"].to(dtype)})
    assert torch.equal(same.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(same.pooler_output, expected.pooler_output)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_id_dtypes(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    """Catches int32 ids, or ids of mixed dtypes, read as something else."""
    ours, batch = twin(theirs(), torch.float32, backend, place(backend, device)), make_batch("right")
    expected = run(ours, batch)
    for names in (("input_ids",), ("token_type_ids", "position_ids"), ("input_ids", "token_type_ids", "position_ids")):
        same = run(ours, {n: t.to(dtype) if n in names else t for n, t in batch.items()})
        assert torch.equal(same.last_hidden_state, expected.last_hidden_state)


def test_a_mask_of_ones_is_no_mask() -> None:
    """Catches the path that looks at no mask computing something else."""
    ours, batch = twin(theirs()), make_batch("none")
    ones = torch.ones(BATCH, LENGTH, dtype=torch.long)
    assert torch.equal(run(ours, batch)[0], run(ours, {**batch, "attention_mask": ones})[0])


@pytest.mark.parametrize("kind", ["none", "holes"])
def test_strided_inputs(kind: str) -> None:
    """Catches inputs that are views, such as a transpose or every second column, read as if they were contiguous."""
    ours, batch = twin(theirs()), make_batch(kind)
    expected = run(ours, batch)
    views = {
        n: None if t is None else torch.stack([t.T, t.T + 1], dim=1).flatten(0, 1)[::2].T for n, t in batch.items()
    }
    assert not views["input_ids"].is_contiguous()
    assert torch.equal(run(ours, views)[0], expected[0])


@pytest.mark.parametrize("kind", ["none", "right", "holes"])
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_inputs_embeds(kind: str, backend: str, device: torch.device) -> None:
    """Catches inputs_embeds that skip a part of the embeddings, or take rows at padding for tokens."""
    model = theirs()
    batch = make_batch(kind) | {"inputs_embeds": randn(BATCH, LENGTH, 32)}
    del batch["input_ids"]
    if backend == "cpu":
        assert_matches(twin(model), model, batch)
    else:
        batch["inputs_embeds"] = batch["inputs_embeds"].float()
        ours = twin(model, torch.float32, backend, device)
        valid = valid_of(batch["attention_mask"])
        expected = run(model, batch | {"inputs_embeds": batch["inputs_embeds"].double()})
        eager = run(in_dtype(model, torch.float32, device), batch)
        outputs = (output[0].cpu()[valid] for output in (run(ours, batch), eager, expected))
        assert_as_accurate("last_hidden_state", *outputs)


def test_inputs_embeds_of_the_ids() -> None:
    """Catches get_input_embeddings giving another table than the model reads."""
    ours, batch = twin(theirs()), make_batch("right")
    embeds = ours.get_input_embeddings()(batch["input_ids"])
    expected = run(ours, batch)
    batch |= {"inputs_embeds": embeds, "input_ids": None}
    assert_close("last_hidden_state", run(ours, batch)[0], expected[0], 1e-15)


def without_decoder(keys: Iterable[str]) -> list[str]:
    """transformers adds the attentions of a decoder, an empty tuple in an encoder; we have no decoder."""
    return [key for key in keys if key != "cross_attentions"]


@pytest.mark.parametrize("kind", MASKS)
def test_output_attentions(kind: str) -> None:
    """Catches attentions that are not the model's probabilities, or that differ in shape from transformers'."""
    model, batch = theirs(), make_batch(kind)
    valid = valid_of(batch["attention_mask"])
    ours = twin(model, strict=False)
    mine = run(ours, batch, output_attentions=True, output_hidden_states=True)
    other = run(model, batch, output_attentions=True, output_hidden_states=True)
    assert list(mine.keys()) == without_decoder(other.keys())
    assert len(mine.attentions) == len(other.attentions) == 2
    queries = valid[:, None, :].expand(BATCH, 2, LENGTH)
    for probabilities, expected in zip(mine.attentions, other.attentions, strict=True):
        assert probabilities.shape == expected.shape
        assert_close("attentions", probabilities[queries], expected[queries])
        assert (probabilities[~queries] == 0).all()
    plain = run(ours, batch, output_hidden_states=True)
    assert_close("last_hidden_state", mine.last_hidden_state, plain.last_hidden_state)
    assert_close("pooler_output", mine.pooler_output, plain.pooler_output)
    for state, expected in zip(mine.hidden_states, plain.hidden_states, strict=True):
        assert_close("hidden_states", state, expected)


def test_output_attentions_is_no_silent_fallback(caplog: pytest.LogCaptureFixture) -> None:
    """Catches another path that gives attentions without a word, or under strict."""
    model, batch = theirs(), make_batch("right")
    from fastbert.models.attention_weights import _log_reference

    _log_reference.cache_clear()
    ours = twin(model, strict=False)
    with caplog.at_level(logging.WARNING, "fastbert"):
        run(ours, batch, output_attentions=True)
        run(ours, batch, output_attentions=True)
    messages = [r.getMessage() for r in caplog.records if r.name == "fastbert"]
    assert messages == [
        "output_attentions: backend 'cpu' falls back to 'reference': fused attention does not store the probabilities"
    ]
    with pytest.raises(fastbert.BackendError, match=r"^output_attentions: .* strict=True: fused attention does"):
        run(twin(model, strict=True), batch, output_attentions=True)


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("attentions", [False, True])
def test_output_forms(attentions: bool, hidden: bool) -> None:
    """Catches keys or a tuple of another order or length than transformers', or a key that was not asked for."""
    model, batch = theirs(), make_batch("none")
    ours = twin(model, strict=False)
    options = {"output_attentions": attentions, "output_hidden_states": hidden}
    mine, other = run(ours, batch, **options), run(model, batch, **options)
    assert list(mine.keys()) == without_decoder(other.keys())
    as_tuple = run(ours, batch, return_dict=False, **options)
    expected = [part for part in run(model, batch, return_dict=False, **options) if len(part)]
    assert type(as_tuple) is tuple and len(as_tuple) == len(expected)
    for i, value in enumerate(as_tuple):
        if isinstance(expected[i], tuple):
            assert type(value) is tuple and [t.shape for t in value] == [t.shape for t in expected[i]]
        else:
            assert_close(f"[{i}]", value, expected[i])
    assert mine.last_hidden_state is mine["last_hidden_state"] is mine[0]
    assert mine.pooler_output is mine[1]


def test_output_settings_of_the_config() -> None:
    """Catches output_hidden_states, output_attentions and return_dict of a config.json ignored."""
    config = fastbert.BertConfig.from_dict(
        {**theirs().config.to_dict(), "output_hidden_states": True, "output_attentions": True, "return_dict": False}
    )
    ours = fastbert.BertModel(config).eval()
    ids = make_batch()["input_ids"]
    output = ours(ids)
    assert type(output) is tuple and [len(part) for part in output[2:]] == [3, 2]
    named = ours(ids, output_hidden_states=False, output_attentions=False, return_dict=True)
    assert list(named.keys()) == ["last_hidden_state", "pooler_output"]


def test_order_of_arguments() -> None:
    """Catches positional arguments in another order than transformers'."""
    names = ["input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds"]
    for cls in (fastbert.BertModel, transformers.BertModel):
        assert list(inspect.signature(cls.forward).parameters)[1:6] == names
    ours, batch = twin(theirs()), make_batch("right")
    assert torch.equal(ours(*(batch[n] for n in names[:4]))[0], run(ours, batch)[0])


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("kind", ["right", "left", "holes", "zero_row"])
def test_nothing_is_read_at_padding(kind: str, backend: str, device: torch.device) -> None:
    """Catches a value at padding, an id outside the vocabulary or a NaN, that reaches an output or raises."""
    ours = twin(theirs(), torch.float32, backend, place(backend, device))
    clean = make_batch(kind)
    padding = ~valid_of(clean["attention_mask"])
    expected = run(ours, clean)
    for garbage in (-100, -1, 10**6):
        dirty = {n: t if n == "attention_mask" else t.masked_fill(padding, garbage) for n, t in clean.items()}
        output = run(ours, dirty)
        assert torch.equal(output.last_hidden_state, expected.last_hidden_state)
        assert torch.equal(output.pooler_output, expected.pooler_output)
    embeds = randn(BATCH, LENGTH, 32, dtype=torch.float32)
    clean |= {"input_ids": None, "inputs_embeds": embeds}
    dirty = {**clean, "inputs_embeds": embeds.masked_fill(padding[:, :, None], torch.nan)}
    assert torch.equal(run(ours, dirty)[0], run(ours, clean)[0])


@pytest.mark.parametrize("kind", ["left", "holes"])
def test_a_padded_row_is_the_row_alone(kind: str) -> None:
    """Catches a row that changes with the padding around it, or a pooler that reads padding in column 0."""
    model = theirs()
    ours, batch = twin(model), make_batch(kind)
    output = run(ours, batch)
    for row, valid in enumerate(valid_of(batch["attention_mask"])):
        alone = {n: batch[n][row, valid][None] for n in ("input_ids", "token_type_ids", "position_ids")}
        right_padded = {n: torch.nn.functional.pad(t, (0, 3)) for n, t in alone.items()}
        right_padded["attention_mask"] = torch.nn.functional.pad(torch.ones_like(alone["input_ids"]), (0, 3))
        n = int(valid.sum())
        for other in (run(model, alone), run(model, right_padded), run(ours, right_padded)):
            assert_close("last_hidden_state", output.last_hidden_state[row, valid], other.last_hidden_state[0, :n])
            assert_close("pooler_output", output.pooler_output[row], other.pooler_output[0])


def test_an_empty_row_is_finite_and_alone() -> None:
    """Catches NaN from a softmax over nothing, or an empty row that touches the others."""
    ours = twin(theirs())
    expected, output = run(ours, make_batch("right")), run(ours, make_batch("zero_row"))
    others = torch.tensor([0, 2, 3])
    assert (output.last_hidden_state[1] == 0).all()
    assert_close("pooler_output", output.pooler_output[1], ours.pooler.dense.bias.tanh(), 1e-14)
    assert_close("other rows", output.last_hidden_state[others], expected.last_hidden_state[others], 1e-14)
    nothing = run(ours, {**make_batch("right"), "attention_mask": torch.zeros(BATCH, LENGTH)})
    assert (nothing.last_hidden_state == 0).all() and nothing.pooler_output.isfinite().all()


def test_without_pooler() -> None:
    """Catches add_pooling_layer=False leaving a pooler, or a None in the tuple."""
    model = theirs()
    ours = fastbert.BertModel(fastbert.BertConfig.from_dict(model.config.to_dict()), add_pooling_layer=False).double()
    bare = transformers.BertModel(model.config, add_pooling_layer=False).double().eval()
    assert set(ours.state_dict()) == set(bare.state_dict())
    bare.load_state_dict(model.state_dict(), strict=False)
    ours.load_state_dict(bare.state_dict())
    output = run(ours.eval(), make_batch())
    assert output.pooler_output is None and list(output.keys()) == ["last_hidden_state"]
    assert len(run(ours, make_batch(), return_dict=False)) == 1


def test_first_tokens_helper() -> None:
    """Catches a wrong expectation of the pooler, which is to take the first valid token, and zeros without one."""
    hidden, valid = randn(BATCH, LENGTH, 2), valid_of(mask("holes")).clone()
    valid[3] = False
    rows = [hidden[b, int(valid[b].nonzero()[0])] for b in range(3)]
    assert torch.equal(first_tokens(hidden, valid), torch.stack([*rows, torch.zeros(2).double()]))


def test_fresh_weights() -> None:
    """Catches fresh weights of a wrong spread, LayerNorms that are not 1 and 0, or a [PAD] row that is not 0."""
    config = fastbert.BertConfig.from_dict(theirs("BertModel", "96x3").config.to_dict() | {"initializer_range": 0.05})
    model = fastbert.BertModel(config)
    for name, parameter in model.named_parameters():
        if name.endswith("LayerNorm.weight"):
            assert (parameter == 1).all()
        elif name.endswith("bias"):
            assert (parameter == 0).all()
        elif parameter.numel() > 5000:
            assert parameter.std().item() == pytest.approx(0.05, rel=0.05), name
    assert (model.embeddings.word_embeddings.weight[0] == 0).all()
