"""Hooks on modules inside our own models see the shapes, numbers and gradients of transformers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import fastbert

SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
IDS = torch.arange(5, 15).view(2, 5)
MASK = torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
INSIDE = [
    "embeddings", "embeddings.word_embeddings", "embeddings.token_type_embeddings", "embeddings.LayerNorm",
    "embeddings.dropout", "encoder", "encoder.layer.0", "encoder.layer.1.attention", "encoder.layer.0.attention.self",
    "encoder.layer.0.attention.self.query", "encoder.layer.0.attention.output",
    "encoder.layer.1.attention.output.dense",
    "encoder.layer.0.attention.output.LayerNorm", "encoder.layer.0.attention.output.dropout",
    "encoder.layer.0.intermediate", "encoder.layer.0.intermediate.dense", "encoder.layer.1.output",
    "encoder.layer.1.output.dense", "encoder.layer.1.output.LayerNorm", "pooler", "pooler.dense",
]  # fmt: skip


def pair(name: str = "BertModel", **settings: Any) -> tuple[Any, Any]:
    """A model of transformers and ours with its weights, in float64."""
    torch.manual_seed(0)
    theirs = getattr(transformers, name)(transformers.BertConfig(**SIZES, **settings)).double().eval()
    config = fastbert.BertConfig.from_dict(theirs.config.to_dict())
    ours = getattr(fastbert, name)(config).double().eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def valid(x: Tensor) -> Tensor:
    return x[MASK.bool()] if x.shape[:2] == MASK.shape else x


@pytest.mark.parametrize("name", INSIDE)
def test_shapes_and_numbers_of_a_hook(name: str) -> None:
    """Catches packed rows in a hook, a module that is never called, or a result that changes with who listens."""
    models = pair()
    plain = models[1](IDS, MASK)[0]
    seen = []
    for model in models:
        model.get_submodule(name).register_forward_hook(lambda m, i, o: seen.append((type(o), first(o), i)))
        result = model(IDS, MASK)[0]
    (their_type, theirs, their_inputs), (our_type, ours, our_inputs) = seen
    assert ours.shape == theirs.shape and issubclass(our_type, tuple) == issubclass(their_type, tuple)
    torch.testing.assert_close(valid(ours), valid(theirs), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(result, plain, rtol=1e-9, atol=1e-11)
    if their_inputs and their_inputs[0].is_floating_point():
        torch.testing.assert_close(valid(our_inputs[0]), valid(their_inputs[0]), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", INSIDE)
def test_replaced_output(name: str) -> None:
    """Catches an output of a hook that is dropped, or that does not broadcast as in transformers."""
    models, results = pair(), []
    for model in models:
        width = 40 if name.endswith("intermediate") or name.endswith("intermediate.dense") else 32
        shape = (2, width) if "pooler" in name else (1, 5, width)
        added = torch.linspace(-1, 1, shape[0] * shape[1] * (shape[2] if len(shape) > 2 else 1)).double().view(shape)

        def replace(module: Any, inputs: Any, output: Any, added: Tensor = added) -> Any:
            if isinstance(output, Tensor):
                return output + added
            if isinstance(output, tuple):
                return (output[0] + added, *output[1:])
            return type(output)(last_hidden_state=output[0] + added)

        model.get_submodule(name).register_forward_hook(replace)
        results.append(model(IDS, MASK))
    torch.testing.assert_close(valid(results[1][0]), valid(results[0][0]), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-9, atol=1e-11)


def test_pre_hooks() -> None:
    """Catches pre-hooks, with and without keyword arguments, that see or give packed rows."""
    models, results = pair(), []
    for model in models:
        layer = model.encoder.layer[1]
        layer.register_forward_pre_hook(lambda m, args: (2 * args[0], *args[1:]))
        layer.output.register_forward_pre_hook(
            lambda m, args, kwargs: ((args[0], args[1] + 1), kwargs), with_kwargs=True
        )
        results.append(model(IDS, MASK)[0])
    torch.testing.assert_close(valid(results[1]), valid(results[0]), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["encoder.layer.0", "encoder.layer.1.output.dense", "embeddings.LayerNorm"])
def test_backward_hooks(name: str) -> None:
    """Catches gradients of packed rows, or none, in a backward hook."""
    seen = []
    for model in pair():
        model.get_submodule(name).register_full_backward_hook(lambda m, i, o: seen.append((i[0], o[0])))
        (model(IDS, MASK)[0] * MASK[..., None]).square().sum().backward()
    for theirs, ours in zip(*seen, strict=True):
        torch.testing.assert_close(valid(ours), valid(theirs), rtol=1e-8, atol=1e-10)


def test_hooks_of_packed_texts() -> None:
    """Catches forward_packed, whose texts never were padded, failing under a hook."""
    _, ours = pair()
    ids, cu_seqlens, seen = torch.arange(5, 13), torch.tensor([0, 5, 5, 8], dtype=torch.int32), []
    before = ours.forward_packed(ids, cu_seqlens)
    ours.encoder.layer[0].register_forward_hook(lambda m, i, o: seen.append(o.shape))
    torch.testing.assert_close(ours.forward_packed(ids, cu_seqlens), before)
    assert seen == [(3, 5, 32)]


def test_global_hooks() -> None:
    """Catches hooks on all modules that see packed rows, or a fast path that goes around them."""
    _, ours = pair()
    shapes = []
    handle = register_module_forward_hook(lambda m, i, o: shapes.append((type(m).__name__, first(o).shape)))
    try:
        ours(IDS, MASK)
    finally:
        handle.remove()
    assert shapes.count(("BertLayer", (2, 5, 32))) == 2 and ("Linear", (2, 5, 40)) in shapes
    assert all(len(shape) == 3 for name, shape in shapes if name in ("LayerNorm", "Embedding", "BertSelfAttention"))


def test_patched_forward() -> None:
    """Catches a forward that was replaced on the object, as accelerate and instrumentation do, and sees packed rows."""
    _, ours = pair()
    before = ours(IDS, MASK)[0]
    layer, shapes = ours.encoder.layer[0], []
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: shapes.append(args[0].shape) or forward(*args, **kwargs)
    torch.testing.assert_close(ours(IDS, MASK)[0], before)
    assert shapes == [(2, 5, 32)]


HEADS = {
    "BertForSequenceClassification": ["bert", "classifier", "dropout"],
    "BertForTokenClassification": ["bert", "classifier", "dropout"],
    "BertForQuestionAnswering": ["bert", "qa_outputs"],
    "BertForMaskedLM": ["bert", "cls", "cls.predictions", "cls.predictions.transform", "cls.predictions.decoder",
                        "cls.predictions.transform.LayerNorm", "cls.predictions.transform.dense"],
    "BertForNextSentencePrediction": ["bert", "bert.pooler", "cls", "cls.seq_relationship"],
    "BertForPreTraining": ["bert", "cls", "cls.predictions", "cls.seq_relationship"],
}  # fmt: skip


@pytest.mark.parametrize(("model", "name"), [(model, name) for model, names in HEADS.items() for name in names])
def test_hooks_of_heads(model: str, name: str) -> None:
    """Catches a module of a head, or the encoder as a whole, that is not called or sees packed rows."""
    seen, results = [], []
    for one in pair(model):
        one.get_submodule(name).register_forward_hook(lambda m, i, o: seen.append(first(o)))
        results.append(one(IDS, MASK)[0])
    assert len(seen) == 2 and seen[0].shape == seen[1].shape
    torch.testing.assert_close(valid(seen[1]), valid(seen[0]), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(valid(results[1]), valid(results[0]), rtol=1e-9, atol=1e-11)


def test_hook_on_the_encoder_of_a_head_changes_the_logits() -> None:
    """Catches an output of `model.bert` that a hook replaced, and the head did not read."""
    results = []
    for one in pair("BertForSequenceClassification"):

        def double(module: Any, inputs: Any, output: Any) -> Any:
            output.pooler_output = 2 * output.pooler_output
            return output

        one.bert.register_forward_hook(double)
        results.append(one(IDS, MASK).logits)
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-11)


def test_a_module_that_mixes_rows_is_called_with_padded_ones() -> None:
    """Catches a recurrent classifier that takes the tokens of all texts for one text."""

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.out = nn.LSTM(32, 16, batch_first=True), nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.lstm(x)[0])

    theirs, ours = pair("BertForTokenClassification")
    theirs.classifier = Tagger().double()
    ours.classifier = copy.deepcopy(theirs.classifier)
    expected, came = theirs(IDS, MASK).logits, ours(IDS, MASK).logits
    torch.testing.assert_close(valid(came), valid(expected), rtol=1e-9, atol=1e-11)


def test_attentions_with_hooks() -> None:
    """Catches output_attentions that leaves out a hook or an adapter, because the reference reads parameters alone."""
    models, results = pair(attn_implementation="eager"), []
    for model in models:
        model.encoder.layer[0].attention.self.query.register_forward_hook(lambda m, i, o: 2 * o)
        results.append(model(IDS, MASK, output_attentions=True, output_hidden_states=True))
    for theirs, ours in zip(results[0].attentions, results[1].attentions, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(ours[1, :, :3], theirs[1, :, :3], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(valid(results[1][0]), valid(results[0][0]), rtol=1e-9, atol=1e-11)


def test_explain_names_the_cost() -> None:
    """Catches a hook that slows a model down and is not mentioned."""
    _, ours = pair()
    ours.encoder.layer[0].register_forward_hook(lambda *args: None)
    ours.embeddings.LayerNorm.register_forward_hook(lambda *args: None)
    report = str(fastbert.explain(ours))
    assert "embeddings.LayerNorm, encoder.layer.0 has hooks" in report


def test_submodules_called_from_outside() -> None:
    """Catches a layer or a pooler that can only be called with a packing."""
    theirs, ours = pair()
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    torch.testing.assert_close(ours.pooler(x), theirs.pooler(x))
    torch.testing.assert_close(ours.encoder.layer[0](x), first(theirs.encoder.layer[0](x)))
