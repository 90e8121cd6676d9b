"""The reference models give what transformers gives, in float64."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import transformers
from torch import Tensor

from fastbert import reference
from fastbert.checkpoint.config import BertConfig
from reference_cases import error, generator, randn

MODEL_BOUND = 1e-10
SHAPES = {
    "64x4": {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 256, "num_hidden_layers": 3},
    "96x3": {"hidden_size": 96, "num_attention_heads": 3, "intermediate_size": 97, "num_hidden_layers": 2},
    "320x5": {"hidden_size": 320, "num_attention_heads": 5, "intermediate_size": 131, "num_hidden_layers": 2},
}
HEADS = {
    "pre_training": transformers.BertForPreTraining,
    "masked_lm": transformers.BertForMaskedLM,
    "next_sentence": transformers.BertForNextSentencePrediction,
    "sequence_classification": transformers.BertForSequenceClassification,
    "multiple_choice": transformers.BertForMultipleChoice,
    "token_classification": transformers.BertForTokenClassification,
    "question_answering": transformers.BertForQuestionAnswering,
}
BATCH, LENGTH, VOCAB, POSITIONS = 4, 13, 101, 40


@cache
def make(cls: type, shape: str = "64x4", **options):
    """A transformers model in float64 with every parameter random, LayerNorms and biases too, and our config of it."""
    labels = 2 if cls is transformers.BertForQuestionAnswering else 3
    hf_config = transformers.BertConfig(
        vocab_size=VOCAB,
        max_position_embeddings=POSITIONS,
        type_vocab_size=3,
        num_labels=labels,
        attn_implementation="eager",
        **SHAPES[shape],
        **options,
    )
    model = cls(hf_config).double().eval()
    random = generator(1)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 2 * parameter.shape[1] ** -0.5 if parameter.dim() == 2 else 0.5
            parameter.normal_(generator=random).mul_(scale)
    return model, BertConfig.from_dict(hf_config.to_dict())


def mask(kind: str) -> Tensor | None:
    """(BATCH, LENGTH) int64; None for no mask."""
    lengths = torch.tensor([13, 9, 1, 5])[:, None]
    columns = torch.arange(LENGTH)[None]
    if kind == "none":
        return None
    if kind == "right":
        return (columns < lengths).long()
    if kind == "left":
        return (columns >= LENGTH - lengths).long()
    holes = torch.rand(BATCH, LENGTH, generator=generator(2)) < 0.6
    holes[:2, 0] = True
    holes[2:, 0] = False
    return holes.long()


def valid_rows(attention_mask: Tensor | None) -> Tensor:
    if attention_mask is None:
        return torch.ones(BATCH, LENGTH, dtype=torch.bool)
    return attention_mask != 0


def make_inputs(kind: str, embeds_size: int | None = None) -> dict[str, Tensor | None]:
    """Every input of the model but for the one of input_ids and inputs_embeds that is not wanted."""
    random = generator(3)
    inputs = {
        "attention_mask": mask(kind),
        "token_type_ids": torch.randint(3, (BATCH, LENGTH), generator=random),
        "position_ids": torch.stack([torch.randperm(POSITIONS, generator=random)[:LENGTH] for _ in range(BATCH)]),
    }
    if embeds_size is None:
        return inputs | {"input_ids": torch.randint(VOCAB, (BATCH, LENGTH), generator=random)}
    return inputs | {"inputs_embeds": randn(BATCH, LENGTH, embeds_size, seed=4)}


def assert_encoder_matches(ours: reference.BertReference, theirs, valid: Tensor) -> None:
    """Hidden states, attentions and pooled vectors agree wherever transformers defines them; zeros elsewhere."""
    assert error(ours.last_hidden_state[valid], theirs.last_hidden_state[valid]) < MODEL_BOUND
    assert len(ours.hidden_states) == len(theirs.hidden_states)
    for mine, other in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert error(mine[valid], other[valid]) < MODEL_BOUND
        assert (mine[~valid] == 0).all()
    assert len(ours.attentions) == len(theirs.attentions)
    for mine, other in zip(ours.attentions, theirs.attentions, strict=True):
        queries = valid[:, None, :].expand(mine.shape[:3])
        assert error(mine[queries], other[queries]) < MODEL_BOUND
        assert (mine[~queries] == 0).all()
        keys = valid[:, None, None, :].expand(mine.shape)
        assert (mine[~keys] == 0).all()
    first_valid = valid[:, 0]
    assert error(ours.pooler_output[first_valid], theirs.pooler_output[first_valid]) < MODEL_BOUND


def run_hf(model, **inputs):
    with torch.no_grad():
        return model(**inputs, output_hidden_states=True, output_attentions=True)


@pytest.mark.parametrize("kind", ["none", "right", "left", "holes"])
@pytest.mark.parametrize("shape", SHAPES)
def test_bert_matches_transformers(shape: str, kind: str) -> None:
    """Catches any wrong step of the encoder or the pooler, and a mask that is read wrongly."""
    model, config = make(transformers.BertModel, shape)
    inputs = make_inputs(kind)
    ours = reference.bert(model.state_dict(), config, **inputs)
    assert_encoder_matches(ours, run_hf(model, **inputs), valid_rows(inputs["attention_mask"]))


@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_python", "gelu_new", "gelu_pytorch_tanh", "relu"])
def test_hidden_act(hidden_act: str) -> None:
    """Catches erf and tanh exchanged, or an activation missing from the encoder or the language-model head."""
    model, config = make(transformers.BertForMaskedLM, "96x3", hidden_act=hidden_act)
    inputs = make_inputs("right")
    valid = valid_rows(inputs["attention_mask"])
    # Our configuration gives synonyms one name; that of transformers keeps the name as it came.
    for either in (config, model.config):
        ours = reference.head("masked_lm", model.state_dict(), either, **inputs)["logits"]
        assert error(ours[valid], run_hf(model, **inputs).logits[valid]) < MODEL_BOUND


@pytest.mark.parametrize("left_out", [("token_type_ids",), ("position_ids",), ("token_type_ids", "position_ids")])
@pytest.mark.parametrize("embeds", [False, True])
def test_inputs_left_out(left_out: tuple[str, ...], embeds: bool) -> None:
    """Catches wrong defaults of positions and types, and inputs_embeds that skip a part of the embeddings."""
    model, config = make(transformers.BertModel)
    inputs = make_inputs("holes", config.hidden_size if embeds else None)
    inputs = {name: value for name, value in inputs.items() if name not in left_out}
    ours = reference.bert(model.state_dict(), config, **inputs)
    assert_encoder_matches(ours, run_hf(model, **inputs), valid_rows(inputs["attention_mask"]))


def test_position_ids_of_one_row() -> None:
    """Catches (1, S) positions, which transformers broadcasts, that are refused or misread."""
    model, config = make(transformers.BertModel)
    inputs = make_inputs("right")
    inputs["position_ids"] = inputs["position_ids"][:1]
    ours = reference.bert(model.state_dict(), config, **inputs)
    assert_encoder_matches(ours, run_hf(model, **inputs), valid_rows(inputs["attention_mask"]))


def test_layer_norm_eps() -> None:
    """Catches an epsilon that is not the configuration's, in any of the LayerNorms."""
    model, config = make(transformers.BertForMaskedLM, layer_norm_eps=0.05)
    inputs = make_inputs("none")
    ours = reference.head("masked_lm", model.state_dict(), config, **inputs)["logits"]
    assert error(ours, run_hf(model, **inputs).logits) < MODEL_BOUND


@pytest.mark.parametrize("convert", [Tensor.bool, Tensor.int, Tensor.float, Tensor.half])
def test_mask_dtypes(convert) -> None:
    """Catches a mask whose dtype changes its meaning."""
    model, config = make(transformers.BertModel)
    inputs = make_inputs("holes")
    expected = reference.bert(model.state_dict(), config, **inputs)
    ours = reference.bert(model.state_dict(), config, **inputs | {"attention_mask": convert(inputs["attention_mask"])})
    assert torch.equal(ours.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(ours.pooler_output, expected.pooler_output)


@pytest.mark.parametrize("kind", ["left", "holes"])
def test_padded_row_is_the_row_alone(kind: str) -> None:
    """Catches renumbered positions, or a pooler that reads column 0 where that is padding."""
    model, config = make(transformers.BertModel)
    inputs = make_inputs(kind)
    del inputs["position_ids"]
    ours = reference.bert(model.state_dict(), config, **inputs)
    for row, valid in enumerate(valid_rows(inputs["attention_mask"])):
        columns = valid.nonzero()[:, 0][None]
        alone = {name: inputs[name][row, valid][None] for name in ("input_ids", "token_type_ids")}
        theirs = run_hf(model, position_ids=columns, **alone)
        assert error(ours.last_hidden_state[row, valid], theirs.last_hidden_state[0]) < MODEL_BOUND
        assert error(ours.pooler_output[row], theirs.pooler_output[0]) < MODEL_BOUND


@pytest.mark.parametrize("embeds", [False, True])
def test_nothing_is_read_at_padding(embeds: bool) -> None:
    """Catches a value at padding, an id outside the vocabulary or a NaN, reaching an output or a gradient."""
    model, config = make(transformers.BertModel)
    clean = make_inputs("holes", config.hidden_size if embeds else None)
    padding = ~valid_rows(clean["attention_mask"])
    dirty = {name: value.clone() for name, value in clean.items()}
    garbage = {"input_ids": 10**6, "token_type_ids": 77, "position_ids": -(10**6), "inputs_embeds": torch.nan}
    for name in garbage.keys() & dirty.keys():
        dirty[name][padding] = garbage[name]
    parameters = dict(model.named_parameters())
    expected, ours = (reference.bert(parameters, config, **inputs) for inputs in (clean, dirty))
    for part in ("hidden_states", "attentions"):
        assert all(torch.equal(*pair) for pair in zip(getattr(ours, part), getattr(expected, part), strict=True))
    assert torch.equal(ours.pooler_output, expected.pooler_output)
    used = [parameter for name, parameter in parameters.items() if not (embeds and "word" in name)]
    gradients = (torch.autograd.grad(output.pooler_output.sum(), used) for output in (ours, expected))
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_all_zero_mask_row() -> None:
    """Catches NaN from a softmax over nothing, forward or backward, and a masked row touching the others."""
    model, config = make(transformers.BertForPreTraining)
    inputs = make_inputs("right")
    kept = torch.tensor([True, False, True, True])
    expected = reference.head("pre_training", model.state_dict(), config, **inputs)
    inputs["attention_mask"][1] = 0
    parameters = dict(model.named_parameters())
    ours = reference.head("pre_training", parameters, config, **inputs)
    assert (ours["prediction_logits"][1] == 0).all()
    for name, value in ours.items():
        assert value.isfinite().all()
        assert torch.equal(value[kept], expected[name][kept])
    encoded = reference.bert(parameters, config, **inputs, prefix="bert.")
    assert all((states[1] == 0).all() for states in encoded.hidden_states + encoded.attentions)
    assert torch.equal(encoded.pooler_output[1], torch.tanh(parameters["bert.pooler.dense.bias"]))
    with torch.autograd.set_detect_anomaly(True):
        total = sum(x.square().sum() for x in reference.head("pre_training", parameters, config, **inputs).values())
        gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (3, 0), (0, 0)])
def test_empty_batch_and_empty_rows(batch: int, length: int) -> None:
    """Catches a crash on a batch without rows or without columns."""
    model, config = make(transformers.BertForPreTraining)
    ids = torch.zeros(batch, length, dtype=torch.long)
    ours = reference.head("pre_training", model.state_dict(), config, ids)
    assert ours["prediction_logits"].shape == (batch, length, VOCAB)
    assert ours["seq_relationship_logits"].shape == (batch, 2)
    assert ours["seq_relationship_logits"].isfinite().all()


def test_gradients_match_transformers() -> None:
    """Catches a right forward with a wrong gradient, by which the gradients of our operations are judged."""
    model, config = make(transformers.BertForPreTraining, "96x3")
    inputs = make_inputs("right")
    valid = valid_rows(inputs["attention_mask"])
    parameters = dict(model.named_parameters())
    ours = reference.head("pre_training", parameters, config, **inputs)
    theirs = model(**inputs)
    token_weights, row_weights = randn(int(valid.sum()), VOCAB, seed=5), randn(BATCH, 2, seed=6)
    gradients = []
    for output in (ours, theirs):
        total = (output["prediction_logits"][valid] * token_weights).sum()
        total = total + (output["seq_relationship_logits"] * row_weights).sum()
        gradients.append(torch.autograd.grad(total, list(parameters.values()), allow_unused=True))
    # A key bias shifts a query's scores all alike: its gradient is rounding alone, beside that of a query bias.
    floor = {
        name: gradient.abs().max()
        for name, gradient in zip(parameters, gradients[1], strict=True)
        if name.endswith("query.bias")
    }
    for name, mine, other in zip(parameters, *gradients, strict=True):
        if name.endswith("key.bias"):
            assert (mine - other).abs().max() < MODEL_BOUND * floor[name.replace("key", "query")]
        elif other is None:
            assert mine is None
        else:
            assert error(mine, other) < MODEL_BOUND, name


@pytest.mark.parametrize("kind", ["none", "right"])
@pytest.mark.parametrize("shape", ["64x4", "96x3"])
@pytest.mark.parametrize("task", HEADS)
def test_heads_match_transformers(task: str, shape: str, kind: str) -> None:
    """Catches a wrong step in a head, a field under another name, or logits left at padding positions."""
    model, config = make(HEADS[task], shape)
    inputs = make_inputs(kind)
    if task == "multiple_choice":
        inputs = {n: None if x is None else x.unflatten(0, (2, BATCH // 2)) for n, x in inputs.items()}
    ours = reference.head(task, model.state_dict(), config, **inputs)
    with torch.no_grad():
        theirs = model(**inputs)
    assert list(ours) == list(theirs.keys())
    valid = valid_rows(inputs["attention_mask"])
    for name, logits in ours.items():
        if logits.shape[:2] == (BATCH, LENGTH):
            assert (logits[~valid] == 0).all()
            assert error(logits[valid], theirs[name][valid]) < MODEL_BOUND
        else:
            assert error(logits, theirs[name]) < MODEL_BOUND


def test_multiple_choice_of_embeddings() -> None:
    """Catches (B, choices, S, H) embeddings folded along the wrong dimensions."""
    model, config = make(transformers.BertForMultipleChoice)
    inputs = {n: x.unflatten(0, (2, 2)) for n, x in make_inputs("right", config.hidden_size).items()}
    ours = reference.head("multiple_choice", model.state_dict(), config, **inputs)["logits"]
    with torch.no_grad():
        assert error(ours, model(**inputs).logits) < MODEL_BOUND


def test_untied_decoder() -> None:
    """Catches the word embeddings, or the unused bias beside the decoder's, used under an untied decoder."""
    model, config = make(transformers.BertForMaskedLM, tie_word_embeddings=False)
    assert not torch.equal(model.cls.predictions.decoder.weight, model.bert.embeddings.word_embeddings.weight)
    inputs = make_inputs("none")
    ours = reference.head("masked_lm", model.state_dict(), config, **inputs)["logits"]
    assert error(ours, run_hf(model, **inputs).logits) < MODEL_BOUND


def test_tied_decoder_left_out() -> None:
    """Catches a checkpoint without the tied tensors, as safetensors files are, that is refused or misread."""
    model, config = make(transformers.BertForMaskedLM)
    params = {name: value for name, value in model.state_dict().items() if "decoder" not in name}
    inputs = make_inputs("none")
    ours = reference.head("masked_lm", params, config, **inputs)["logits"]
    assert error(ours, run_hf(model, **inputs).logits) < MODEL_BOUND


def test_without_pooler() -> None:
    """Catches a crash on a model without a pooler, or a head that pools regardless."""
    model, config = make(transformers.BertForTokenClassification)
    params, inputs = model.state_dict(), make_inputs("none")
    assert reference.bert(params, config, **inputs, prefix="bert.").pooler_output is None
    with pytest.raises(KeyError, match="bert.pooler.dense.weight.*sequence_classification"):
        reference.head("sequence_classification", params, config, **inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    """Catches a step that leaves the asked dtype, or weights of another dtype that are not cast."""
    model, config = make(transformers.BertModel)
    inputs = make_inputs("holes")
    exact = reference.bert(model.state_dict(), config, **inputs)
    ours = reference.bert(model.state_dict(), config, **inputs, dtype=dtype)
    assert {x.dtype for x in (*ours.hidden_states, *ours.attentions, ours.pooler_output)} == {dtype}
    assert error(ours.last_hidden_state.double(), exact.last_hidden_state) < 30 * torch.finfo(dtype).eps


def test_attentions_on_request() -> None:
    """Catches attentions kept, at (B, N, S, S) a layer, when nobody wants them."""
    model, config = make(transformers.BertModel)
    ours = reference.bert(model.state_dict(), config, **make_inputs("none"), output_attentions=False)
    assert ours.attentions == () and len(ours.hidden_states) == config.num_hidden_layers + 1


def test_bad_arguments() -> None:
    """Catches a message that does not say which argument was wrong, what came and what was expected."""
    model, config = make(transformers.BertModel)
    params, ids = model.state_dict(), torch.zeros(2, 5, dtype=torch.long)
    with pytest.raises(ValueError, match="got neither"):
        reference.bert(params, config)
    with pytest.raises(ValueError, match="got both"):
        reference.bert(params, config, ids, inputs_embeds=randn(2, 5, 64))
    with pytest.raises(ValueError, match=r"attention_mask: got shape \(2, 4\), expected \(2, 5\)"):
        reference.bert(params, config, ids, torch.ones(2, 4))
    with pytest.raises(ValueError, match="task: got 'summary', expected one of pre_training"):
        reference.head("summary", params, config, ids)
    with pytest.raises(KeyError, match="embeddings.word_embeddings.weight"):
        reference.bert({}, config, ids)
    with pytest.raises(ValueError, match="mode: got 'median', expected one of cls"):
        reference.pool(randn(3, 4), torch.tensor([0, 3]), "median")
    with pytest.raises(ValueError, match="activation: got 'prelu'"):
        reference.linear(randn(3, 4), randn(5, 4), activation="prelu")
    with pytest.raises(ValueError, match="approximate: got 'erf'"):
        reference.gelu(randn(3), "erf")
