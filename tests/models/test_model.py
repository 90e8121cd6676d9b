"""BertModel against transformers: outputs, masks, dtypes, backends, gradients, dropout, packing."""

from __future__ import annotations

import copy
import inspect
import io
import logging
import operator
import pickle
import shutil
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastbert
from fastbert.ops import dispatch, packing
from helpers import assert_as_accurate, cu_seqlens_of, rms_error
from model_cases import (
    BATCH,
    LENGTH,
    MASKS,
    TYPES,
    VOCAB,
    assert_close,
    assert_gradients,
    assert_gradients_as_accurate,
    first_tokens,
    in_dtype,
    make_batch,
    mask,
    pooled,
    randn,
    run,
    theirs,
    to_device,
    twin,
    valid_of,
    weighted_sum,
)

GRADIENT_BOUND = 1e-9


def place(backend: str, device: torch.device) -> torch.device:
    """The "cpu" backend is for the CPU; the others run where the kernels run."""
    return torch.device("cpu") if backend == "cpu" else device


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
    """A wrong step anywhere in the encoder or pooler, and a mask, type or position that lands on the wrong token."""
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
    """A sum, a softmax or a statistic that is kept in less precision than transformers keeps it."""
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
    """Kernels that are right one by one but are fed the wrong thing, or leave part of an output unwritten."""
    model = theirs("BertModel", shape)
    assert_accurate(model, twin(model, dtype, "triton", device), make_batch(kind))
    poisoned.check()


@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu"])
def test_hidden_act(hidden_act: str) -> None:
    """The erf and the tanh form exchanged."""
    model = theirs("BertModel", "tiny", hidden_act=hidden_act)
    assert_matches(twin(model), model, make_batch("right"))


def test_layer_norm_eps() -> None:
    """An epsilon that is not the config's, in any of the LayerNorms."""
    model = theirs("BertModel", "tiny", layer_norm_eps=0.05)
    assert_matches(twin(model), model, make_batch("right"))


@pytest.mark.parametrize(
    "given", [("token_type_ids",), ("position_ids",), ()], ids=["without positions", "without types", "neither"]
)
@pytest.mark.parametrize("kind", ["none", "left", "holes"])
def test_defaults_of_types_and_positions(given: tuple[str, ...], kind: str) -> None:
    """Positions that packing renumbered: the default is the column, also behind padding and holes."""
    model = theirs()
    batch = make_batch(kind)
    batch = {n: t for n, t in batch.items() if n in ("input_ids", "attention_mask", *given)}
    assert_matches(twin(model), model, batch)


def test_positions_of_one_row() -> None:
    """(1, S) positions, which transformers takes for every row, refused or misread."""
    model = theirs()
    batch = make_batch("right")
    batch["position_ids"] = batch["position_ids"][:1]
    assert_matches(twin(model), model, batch)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float32, torch.float16, torch.float64])
def test_mask_dtypes(dtype: torch.dtype) -> None:
    """A mask whose dtype changes its meaning."""
    ours, batch = twin(theirs()), make_batch("holes")
    expected = run(ours, batch)
    same = run(ours, {**batch, "attention_mask": batch["attention_mask"].to(dtype)})
    assert torch.equal(same.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(same.pooler_output, expected.pooler_output)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_id_dtypes(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    """int32 ids, or ids of mixed dtypes, read as something else."""
    ours, batch = twin(theirs(), torch.float32, backend, place(backend, device)), make_batch("right")
    expected = run(ours, batch)
    for names in (("input_ids",), ("token_type_ids", "position_ids"), ("input_ids", "token_type_ids", "position_ids")):
        same = run(ours, {n: t.to(dtype) if n in names else t for n, t in batch.items()})
        assert torch.equal(same.last_hidden_state, expected.last_hidden_state)


def test_a_mask_of_ones_is_no_mask() -> None:
    """The path that looks at no mask computing something else."""
    ours, batch = twin(theirs()), make_batch("none")
    ones = torch.ones(BATCH, LENGTH, dtype=torch.long)
    assert torch.equal(run(ours, batch)[0], run(ours, {**batch, "attention_mask": ones})[0])


@pytest.mark.parametrize("kind", ["none", "holes"])
def test_strided_inputs(kind: str) -> None:
    """Inputs that are views, such as a transpose or every second column, read as if they were contiguous."""
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
    """inputs_embeds that skip a part of the embeddings, or take rows at padding for tokens."""
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
    """get_input_embeddings giving another table than the model reads."""
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
    """Attentions that are not the probabilities the model computed, or that differ in shape from transformers'."""
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
    """Fused attention has no probabilities to give: another path serving them unsaid, or under strict."""
    model, batch = theirs(), make_batch("right")
    from fastbert.models.bert import _log_reference

    _log_reference.cache_clear()
    ours = twin(model, strict=False)
    with caplog.at_level(logging.WARNING, "fastbert"):
        run(ours, batch, output_attentions=True)
        run(ours, batch, output_attentions=True)
    messages = [r.getMessage() for r in caplog.records if r.name == "fastbert"]
    assert messages == [
        "output_attentions: backend 'cpu' falls back to 'reference': fused attention keeps no probabilities"
    ]
    with pytest.raises(fastbert.BackendError, match=r"^output_attentions: .* strict=True: fused attention keeps no"):
        run(twin(model, strict=True), batch, output_attentions=True)


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("attentions", [False, True])
def test_output_forms(attentions: bool, hidden: bool) -> None:
    """Keys or a tuple of another order or length than transformers', or a key present that was not asked for."""
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
    """output_hidden_states, output_attentions and return_dict of a config.json ignored."""
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
    """Positional arguments in another order than transformers'."""
    names = ["input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds"]
    for cls in (fastbert.BertModel, transformers.BertModel):
        assert list(inspect.signature(cls.forward).parameters)[1:6] == names
    ours, batch = twin(theirs()), make_batch("right")
    assert torch.equal(ours(*(batch[n] for n in names[:4]))[0], run(ours, batch)[0])


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("kind", ["right", "left", "holes", "zero_row"])
def test_nothing_is_read_at_padding(kind: str, backend: str, device: torch.device) -> None:
    """What stands at padding, an id outside the vocabulary or a NaN, reaching an output or raising."""
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
    """A row that changes with the padding around it, or a pooler that reads padding in column 0."""
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
    """NaN from a softmax over nothing, or an empty row that touches the others."""
    ours = twin(theirs())
    expected, output = run(ours, make_batch("right")), run(ours, make_batch("zero_row"))
    others = torch.tensor([0, 2, 3])
    assert (output.last_hidden_state[1] == 0).all()
    assert_close("pooler_output", output.pooler_output[1], ours.pooler.dense.bias.tanh(), 1e-14)
    assert_close("other rows", output.last_hidden_state[others], expected.last_hidden_state[others], 1e-14)
    nothing = run(ours, {**make_batch("right"), "attention_mask": torch.zeros(BATCH, LENGTH)})
    assert (nothing.last_hidden_state == 0).all() and nothing.pooler_output.isfinite().all()


def test_without_pooler() -> None:
    """add_pooling_layer=False leaving a pooler, or a None in the tuple."""
    model = theirs()
    ours = fastbert.BertModel(fastbert.BertConfig.from_dict(model.config.to_dict()), add_pooling_layer=False).double()
    bare = transformers.BertModel(model.config, add_pooling_layer=False).double().eval()
    assert set(ours.state_dict()) == set(bare.state_dict())
    bare.load_state_dict(model.state_dict(), strict=False)
    ours.load_state_dict(bare.state_dict())
    output = run(ours.eval(), make_batch())
    assert output.pooler_output is None and list(output.keys()) == ["last_hidden_state"]
    assert len(run(ours, make_batch(), return_dict=False)) == 1


# Gradients


def both_with_gradients(ours: Any, models: list[Any], batch: dict[str, Any], **options: Any) -> None:
    """Backpropagates one scalar, in which every valid element counts, through each model."""
    valid = valid_of(batch["attention_mask"])
    for model in (ours, *models):
        output = model(**to_device(batch, model.device), **options)
        hidden = output.last_hidden_state
        first = valid[:, :1].to(hidden.device)
        weighted_sum({"hidden": hidden[valid.to(hidden.device)], "pooled": output.pooler_output * first}).backward()


def without_dropout(model: Any) -> Any:
    """A copy of a model in training mode whose dropout probabilities are 0."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def trainable(shape: str, **options: Any) -> Any:
    """transformers' model in training mode, without dropout."""
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return copy.deepcopy(theirs("BertModel", shape, **none, **options)).train()


@pytest.mark.parametrize("kind", ["none", "right", "holes"])
@pytest.mark.parametrize("shape", ["minilm", "96x3"])
def test_gradients_match_transformers(shape: str, kind: str) -> None:
    """A forward that is right with a backward that is not, for any parameter."""
    model, batch = trainable(shape), make_batch(kind)
    ours = twin(model)
    assert ours.training
    both_with_gradients(ours, [model], batch)
    assert_gradients(ours, model, GRADIENT_BOUND)


def test_gradients_of_the_reference_path() -> None:
    """output_attentions cutting the graph: its path must train too."""
    model, batch = trainable("tiny"), make_batch("right")
    ours = twin(model, strict=False)
    both_with_gradients(ours, [model], batch, output_attentions=True)
    assert_gradients(ours, model, GRADIENT_BOUND)


def test_gradients_of_inputs_embeds() -> None:
    """No gradient, or one at padding, for inputs_embeds."""
    model, batch = trainable("tiny"), make_batch("holes")
    embeds = randn(BATCH, LENGTH, 32)
    gradients = []
    for each in (twin(model), model):
        leaf = embeds.clone().requires_grad_()
        both_with_gradients(each, [], batch | {"input_ids": None, "inputs_embeds": leaf})
        gradients.append(leaf.grad)
    assert_close("inputs_embeds.grad", *gradients, GRADIENT_BOUND)
    assert (gradients[0][~valid_of(batch["attention_mask"])] == 0).all()


def test_gradients_of_an_empty_row_are_finite() -> None:
    """NaN flowing back from a row without tokens."""
    ours = twin(trainable("tiny"))
    output = ours(**make_batch("zero_row"))
    (output.last_hidden_state.square().sum() + output.pooler_output.square().sum()).backward()
    assert all(p.grad.isfinite().all() for p in ours.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["cpu", "torch", "triton"])
def test_gradients_are_as_accurate(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    """A backward pass that recomputes or sums in less precision than transformers'."""
    model, batch = trainable("tiny" if backend == "triton" else "96x3"), make_batch("right")
    at = place(backend, device)
    ours, eager = twin(model, dtype, backend, at), in_dtype(model, dtype, at)
    reference = in_dtype(in_dtype(model, dtype), torch.float64)
    both_with_gradients(ours, [eager, reference], batch)
    assert_gradients_as_accurate(ours, eager, reference)


@pytest.mark.parametrize("frozen", ["embeddings", "encoder.layer.0", "query", "pooler"])
def test_frozen_parameters(frozen: str) -> None:
    """A frozen part that stops the gradient of the parts below it, or that gets one."""
    model, batch = trainable("tiny"), make_batch("right")
    ours = twin(model)
    for each in (model, ours):
        for name, parameter in each.named_parameters():
            parameter.requires_grad_(frozen not in name)
    both_with_gradients(ours, [model], batch)
    assert_gradients(ours, model, GRADIENT_BOUND)


def test_padding_id_gets_no_gradient() -> None:
    """A [PAD] that the mask leaves in: nn.Embedding's padding_idx keeps its row as it is, in transformers."""
    model, batch = trainable("tiny"), make_batch("none")
    batch["input_ids"][:, 5:] = 0
    ours = twin(model)
    both_with_gradients(ours, [model], batch)
    assert_gradients(ours, model, GRADIENT_BOUND)


def test_gradient_modes_agree() -> None:
    """A fused weight that is made differently, or not remade, with gradients on, off or in inference mode."""
    model, batch = theirs(), make_batch("right")
    ours = twin(model)
    expected = run(model, batch)[0][valid_of(batch["attention_mask"])]
    modes = [torch.enable_grad, torch.no_grad, torch.inference_mode]
    for first in modes:
        for second in modes:
            fresh = copy.deepcopy(ours)
            for mode in (first, second):
                with mode():
                    output = fresh(**batch).last_hidden_state
                assert output.requires_grad == (mode is torch.enable_grad)
                assert_close(f"{first} {mode}", output[valid_of(batch["attention_mask"])], expected)
    with torch.inference_mode():
        inside = twin(model)
        assert_close("made in inference mode", run(inside, batch)[0], run(ours, batch)[0])


# Dropout


def moments(model: Any, ids: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of every hidden state over n passes of one text, as one batch: 2 x ((L + 1) * S * H,)."""
    with torch.no_grad():
        states = model(ids.expand(n, -1), output_hidden_states=True).hidden_states
    samples = torch.stack(states, 1).flatten(1).double()
    return samples.mean(0), samples.var(0)


@pytest.mark.parametrize(("hidden", "attention"), [(0.3, 0.0), (0.0, 0.4), (0.1, 0.1)])
def test_dropout_has_the_moments_of_transformers(hidden: float, attention: float) -> None:
    """A dropout that is missing, in the wrong place, of the wrong probability or not rescaled."""
    model = theirs("BertModel", "tiny", hidden_dropout_prob=hidden, attention_probs_dropout_prob=attention)
    training = in_dtype(model, torch.float32).train()
    ours = twin(training, torch.float32)
    n, ids = 4000, make_batch()["input_ids"][:1, :5]
    (mean, variance), (other_mean, other_variance) = moments(ours, ids, n), moments(training, ids, n)
    varies = other_variance > 1e-9
    assert torch.equal(variance > 1e-9, varies)
    z = (mean - other_mean)[varies] / ((variance + other_variance)[varies] / n).sqrt()
    assert z.abs().max() < 5 and z.square().mean() < 1.5
    assert (variance / other_variance)[varies].log().abs().max() < 0.25


def test_dropout_differs_between_calls_and_not_in_eval() -> None:
    """Dropout that is the same on every call, or that runs in eval mode."""
    ours, batch = twin(theirs()), make_batch("right")
    expected = run(ours, batch)[0]
    ours.train()
    first, second = run(ours, batch)[0], run(ours, batch)[0]
    assert not torch.equal(first, second) and not torch.equal(first, expected)
    torch.manual_seed(1)
    again = run(ours, batch)[0]
    torch.manual_seed(1)
    assert torch.equal(run(ours, batch)[0], again)
    assert torch.equal(run(ours.eval(), batch)[0], expected)


def test_dropout_falls_back_aloud(device: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    """Kernels without dropout that skip it, or hand over to another backend without a word."""
    model, batch = copy.deepcopy(theirs()).train(), make_batch("right")
    ours = twin(model, torch.float32, "triton", device, strict=False)
    dispatch._log_once.cache_clear()
    with caplog.at_level(logging.WARNING, "fastbert"):
        first, second = run(ours, batch)[0], run(ours, batch)[0]
    assert not torch.equal(first, second)
    messages = [r.getMessage() for r in caplog.records if r.name == "fastbert"]
    elsewhere = "cpu" if device.type == "cpu" else "torch"
    for op in ("attention", "layer_norm"):
        reason = "dropout (p = 0.1) has no Triton kernel yet"
        assert messages.count(f"{op}: backend 'triton' falls back to '{elsewhere}': {reason}") == 1
    strict = twin(model, torch.float32, "triton", device, strict=True)
    with pytest.raises(fastbert.BackendError, match=r"'triton' cannot run it, and strict=True: dropout \(p = 0.1\)"):
        run(strict, batch)
    run(strict.eval(), batch)


def test_dropout_beside_attentions_warns(caplog: pytest.LogCaptureFixture) -> None:
    """The reference path drops nothing out: that must be said in training."""
    ours = twin(copy.deepcopy(theirs()).train(), strict=False)
    with caplog.at_level(logging.WARNING, "fastbert"):
        run(ours, make_batch(), output_attentions=True)
    assert "output_attentions takes the reference path, which applies no dropout" in caplog.text


def test_autocast_is_as_accurate(device: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    """Kernels that take autocast's mixture of dtypes for one dtype, or a fallback that is not logged."""
    model, batch = theirs("BertModel", "96x3"), make_batch("right")
    valid = valid_of(batch["attention_mask"])
    ours = twin(model, torch.float32, "triton", device, strict=False)
    dispatch._log_once.cache_clear()
    eager = in_dtype(model, torch.float32, device)
    with torch.autocast(device.type, torch.bfloat16), caplog.at_level(logging.WARNING, "fastbert"):
        mine, other = run(ours, batch), run(eager, batch)
    assert "autocast is on" in caplog.text
    expected = run(in_dtype(eager, torch.float64, "cpu"), batch)
    outputs = [output.last_hidden_state.cpu()[valid] for output in (mine, other, expected)]
    # Both end in a LayerNorm of float32, but behind bfloat16 matrices.
    assert rms_error(outputs[0], outputs[2]) <= 1.25 * rms_error(outputs[1], outputs[2]) + torch.finfo().eps


# Packed


@pytest.fixture(scope="module")
def long_model() -> Any:
    """One layer, with the 512 positions of BERT."""
    return theirs("BertModel", "tiny", num_hidden_layers=1, max_position_embeddings=512)


def padded_batch(lengths: list[int], seed: int = 0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    longest = max(lengths, default=0)
    shape = len(lengths), longest
    return {
        "input_ids": torch.randint(VOCAB, shape, generator=random),
        "token_type_ids": torch.randint(TYPES, shape, generator=random),
        "attention_mask": (torch.arange(longest)[None] < torch.tensor(lengths)[:, None]).long(),
    }


def packed_matches(model: Any, lengths: list[int]) -> None:
    batch = padded_batch(lengths)
    valid = batch["attention_mask"] != 0
    ours = twin(model)
    with torch.no_grad():
        packed = ours.forward_packed(batch["input_ids"][valid], cu_seqlens_of(lengths), batch["token_type_ids"][valid])
        assert packed.shape == (sum(lengths), 32) and packed.dtype == torch.float64
        if sum(lengths):
            filled = torch.tensor(lengths) > 0
            other = run(model, {n: t[filled] for n, t in batch.items()})
            assert_close("packed", packed, other.last_hidden_state[valid[filled]])
        padded = run(ours, batch)
    assert_close("padded", padded.last_hidden_state[valid], packed)
    assert (padded.last_hidden_state[~valid] == 0).all()
    expected = pooled(model, padded.last_hidden_state, valid)
    assert_close("pooler_output", padded.pooler_output, expected)


short_lengths = st.lists(st.integers(0, 40), min_size=1, max_size=12)
many_ones = st.lists(st.integers(0, 2), min_size=20, max_size=80)
edge_lengths = st.lists(st.sampled_from([0, 1, 2, 15, 16, 17, 127, 128, 129, 511, 512]), min_size=1, max_size=4)
one_long = st.builds(
    lambda long, short, at: [*short[:at], long, *short[at:]],
    st.integers(256, 512),
    st.lists(st.integers(0, 9), min_size=3, max_size=8),
    st.integers(0, 8),
)


@settings(deadline=None, max_examples=40)
@given(st.one_of(short_lengths, many_ones, edge_lengths, one_long))
def test_packed_matches_transformers(long_model: Any, lengths: list[int]) -> None:
    """Lengths at which a token is lost, doubled or sees a neighbouring sequence."""
    packed_matches(long_model, lengths)


@pytest.mark.parametrize(
    "lengths",
    [[1], [512], [511, 512], [1] * 70, [400, 1, 2, 3], [0, 5, 0, 0, 3, 0], [0], [0, 0], [], [7, 3, 7, 3, 7], [4, 4, 4]],
    ids=str,
)
def test_packed_lengths(long_model: Any, lengths: list[int]) -> None:
    """The lengths that break packings, named, whatever hypothesis draws."""
    packed_matches(long_model, lengths)


@pytest.mark.parametrize("lengths", [[511, 1, 0, 2], [1] * 40, [0, 17, 130, 0], [64, 63, 65]], ids=str)
def test_packed_kernels_are_as_accurate(long_model: Any, lengths: list[int], device: torch.device) -> None:
    """The same for the kernels, whose tiles hold several short sequences or part of a long one."""
    batch = padded_batch(lengths)
    valid = batch["attention_mask"] != 0
    ours, eager = twin(long_model, torch.float32, "triton", device), in_dtype(long_model, torch.float32, device)
    filled = torch.tensor(lengths) > 0
    batch = {n: t[filled] for n, t in batch.items()}
    reference = in_dtype(in_dtype(long_model, torch.float32), torch.float64)
    other, expected = (run(each, batch).last_hidden_state.cpu()[valid[filled]] for each in (eager, reference))
    input_ids, types = (batch[n][valid[filled]].to(device) for n in ("input_ids", "token_type_ids"))
    with torch.no_grad():
        packed = ours.forward_packed(input_ids, cu_seqlens_of(lengths, device), types)
    assert_as_accurate("packed", packed.cpu(), other, expected)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_packed_is_each_sequence_alone(backend: str, device: torch.device) -> None:
    """A sequence that changes with its neighbours, beyond rounding."""
    model, lengths = theirs(), [5, 0, 1, 17, 1, 33]
    at = place(backend, device)
    ours = twin(model, torch.float32, backend, at)
    ids = torch.randint(VOCAB, (sum(lengths),), device=at)
    with torch.no_grad():
        packed = ours.forward_packed(ids, cu_seqlens_of(lengths, at))
        for part, expected in zip(ids.split(lengths), packed.split(lengths), strict=True):
            if len(part):
                assert_close("alone", ours(part[None])[0][0], expected, 1e-6)
                assert_close("transformers", model(part[None].cpu())[0][0].float(), expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_cu_seqlens_dtype_and_device(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    """Offsets that must be of one dtype or on one device, though from_cu_seqlens promises both."""
    at = place(backend, device)
    ours = twin(theirs(), torch.float32, backend, at)
    ids = torch.randint(VOCAB, (12,), device=at)
    with torch.no_grad():
        expected = ours.forward_packed(ids, cu_seqlens_of([3, 0, 9], at))
        for offsets_at in ("cpu", at):
            offsets = cu_seqlens_of([3, 0, 9]).to(offsets_at, dtype)
            assert torch.equal(ours.forward_packed(ids, offsets), expected)


def test_packed_positions_and_types() -> None:
    """Explicit positions or types that packed execution ignores."""
    ours, batch = twin(theirs()), make_batch("holes")
    valid = valid_of(batch["attention_mask"])
    packed = ours.forward_packed(
        batch["input_ids"][valid],
        cu_seqlens_of(valid.sum(1).tolist()),
        batch["token_type_ids"][valid],
        batch["position_ids"][valid],
    )
    assert_close("packed", packed, run(ours, batch)[0][valid])


def test_packed_trains() -> None:
    """forward_packed without a graph, or with gradients of its own."""
    model, batch = trainable("tiny"), make_batch("right")
    ours, padded = twin(model), twin(model)
    valid = valid_of(batch["attention_mask"])
    input_ids, types, positions = (batch[n][valid] for n in ("input_ids", "token_type_ids", "position_ids"))
    packed = ours.forward_packed(input_ids, cu_seqlens_of([13, 9, 1, 5]), types, positions)
    weighted_sum({"hidden": packed}).backward()
    weighted_sum({"hidden": padded(**batch).last_hidden_state[valid]}).backward()
    assert_gradients(ours, padded, GRADIENT_BOUND)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_pack_and_pad_are_inverse(data: st.DataObject) -> None:
    """A token that lands in another row or column on its way through packing."""
    rows, columns = data.draw(st.integers(0, 6)), data.draw(st.integers(0, 9))
    cells = data.draw(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns))
    attention_mask = torch.tensor(cells, dtype=torch.bool).reshape(rows, columns)
    batch = packing.unpad(attention_mask)
    x = torch.arange(1.0, rows * columns * 3 + 1).reshape(rows, columns, 3)
    packed = packing.pack(x, batch)
    assert torch.equal(packed, x[attention_mask])
    assert torch.equal(packing.pad(packed, batch), x * attention_mask[:, :, None])
    assert batch.cu_seqlens.tolist() == [0, *attention_mask.sum(1).cumsum(0).tolist()]
    assert batch.cu_seqlens.dtype == batch.cu_seqlens_cpu.dtype == torch.int32
    assert torch.equal(batch.position_ids, attention_mask.nonzero()[:, 1])
    assert torch.equal(batch.seq_ids.long(), attention_mask.nonzero()[:, 0])


# The fused QKV matrix


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
    """As accelerate does to move weights between devices."""
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
    """A fused matrix, or a module used without being called, that does not notice a change to what it was made from."""
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
    """A new parameter in the memory of the one it replaces: the same address and version, other numbers.

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
    """The fused path not coming back, or coming back stale, when a hook goes."""
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
    """A linear whose weight is used without calling it, though somebody listens to its gradients."""
    ours, seen = twin(trainable("tiny")), []
    ours.get_submodule(name).register_full_backward_hook(lambda *args: seen.append(args[2][0].shape))
    ours(**make_batch("none"))[0].sum().backward()
    assert seen == [(BATCH, LENGTH, 32 if "query" in name else 37)]


def test_the_fused_matrix_is_kept() -> None:
    """A fused matrix that is made anew on every call, which would cost more than it saves."""
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
    """deepcopy, pickle or torch.save failing on the fused matrix, carrying it along, or sharing it with the copy."""
    ours, batch = twin(theirs()), make_batch("right")
    expected = run(ours, batch)[0]
    assert len(pickle.dumps(ours)) <= len(pickle.dumps(twin(theirs()))) + 1000
    for other in copies(ours):
        assert torch.equal(run(other, batch)[0], expected)
        with torch.no_grad():
            attention(other).query.weight.mul_(2)
        assert not torch.equal(run(other, batch)[0], expected)
        assert torch.equal(run(ours, batch)[0], expected)


# torch.compile


@pytest.mark.parametrize(("compiler", "backend"), [("eager", "cpu"), ("aot_eager", "triton")])
def test_compiled_is_the_same(compiler: str, backend: str, device: torch.device) -> None:
    """A shape, a mask or a length that a compiled model keeps from the batch before."""
    model = theirs("BertModel", "tiny", num_hidden_layers=1)
    ours = twin(model, torch.float32, backend, place(backend, device))
    compiled = torch.compile(ours, backend=compiler)
    wide, narrow = make_batch("right"), {n: t[:3, :7] for n, t in make_batch("holes").items()}
    try:
        for batch in (wide, narrow, wide | {"attention_mask": mask("left")}):
            output, expected = run(compiled, batch), run(ours, batch)
            assert_close("last_hidden_state", output.last_hidden_state, expected.last_hidden_state, 1e-6)
            assert_close("pooler_output", output.pooler_output, expected.pooler_output, 1e-6)
    finally:
        torch._dynamo.reset()


def test_compiled_trains() -> None:
    """A compiled model whose gradients are not those of the model."""
    model = trainable("tiny", num_hidden_layers=1)
    ours, batch = twin(model), make_batch("right")
    try:
        compiled = torch.compile(ours, backend="aot_eager")
        both_with_gradients(compiled, [model], batch)
    finally:
        torch._dynamo.reset()
    assert_gradients(ours, model, GRADIENT_BOUND)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler for the CPU")
def test_inductor_is_the_same() -> None:
    """Code that inductor generates for the plain path computing something else."""
    model = theirs("BertModel", "tiny", num_hidden_layers=1)
    ours = twin(model, torch.float32)
    compiled = torch.compile(ours)
    try:
        for kind in ("right", "holes"):
            batch = make_batch(kind)
            assert_close("last_hidden_state", run(compiled, batch)[0], run(ours, batch)[0], 1e-6)
    finally:
        torch._dynamo.reset()


# The tests' own expectations, and fresh weights


def test_first_tokens_helper() -> None:
    """The expectation of the pooler being wrong: it must be the first valid token, and zeros without one."""
    hidden, valid = randn(BATCH, LENGTH, 2), valid_of(mask("holes")).clone()
    valid[3] = False
    rows = [hidden[b, int(valid[b].nonzero()[0])] for b in range(3)]
    assert torch.equal(first_tokens(hidden, valid), torch.stack([*rows, torch.zeros(2).double()]))


def test_fresh_weights() -> None:
    """Fresh weights that are not BERT's: a wrong spread, LayerNorms that are not 1 and 0, a [PAD] row that is not 0."""
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
