"""verify: a right model passes, and what is wrong with a wrong one is named."""

from __future__ import annotations

import importlib.util
import inspect
import json
import logging
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastbert
from fastbert import BertConfig, BertForSequenceClassification, BertModel, Tokenizer, ops, reference
from fastbert.diagnostics.verify import ends as verify_ends
from fastbert.diagnostics.verify import run as verify_run
from fastbert.diagnostics.verify.entry import DEFAULT_TEXTS, verify
from fastbert.diagnostics.verify.run import _eager
from fastbert.pipelines.modules import Dense
from fastbert_kernels import cpu
from helpers import docstrings

IDS = [[2, 17, 33, 3], [2, 3], [2, *range(20, 36), 3], [2, 50, 3]]


def config(**changes: Any) -> BertConfig:
    sizes: dict[str, Any] = {
        "vocab_size": 101,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 56,
        "max_position_embeddings": 300,
        "initializer_range": 0.2,
    }
    return BertConfig(**{**sizes, **changes})


@pytest.fixture
def model(device: torch.device) -> BertModel:
    return BertModel(config()).eval().to(device)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Of some 300 tokens, trained on the built-in texts."""
    return Tokenizer.train(list(DEFAULT_TEXTS), vocab_size=300, min_frequency=1)


def wrong_in_layer(monkeypatch: pytest.MonkeyPatch, layer: int, n_layers: int, change: Callable[[Tensor], Any]) -> None:
    """Lets `change` work on the result of the attention of one layer, in place."""
    calls = []
    right = ops.varlen_attention

    def wrong(*args: Any, **kwargs: Any) -> Tensor:
        out = right(*args, **kwargs)
        calls.append(None)
        if (len(calls) - 1) % n_layers == layer:
            change(out)
        return out

    monkeypatch.setattr(ops, "varlen_attention", wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
def test_right_model_passes(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    """Catches a false alarm, and a report that does not cover every layer and the pooler."""
    model = BertModel(config(), backend=backend, strict=True).eval().to(device, dtype)
    report = verify(model, IDS)
    assert report.ok and bool(report), str(report)
    assert [state.name for state in report.states] == ["embeddings", "encoder.layer.0", "encoder.layer.1", "pooler"]
    for state in report.states:
        assert 0 < state.error <= state.bound == 1.25 * state.eager_error + 0.5 * torch.finfo(dtype).eps
        assert 0.999 < state.worst_token_cosine <= state.worst_sentence_cosine + 1e-3
        assert state.worst_text_error <= state.worst_text_bound and state.problem is None
    assert (report.n_texts, report.n_tokens) == (4, sum(map(len, IDS)))
    assert (report.backend, report.dtype, report.problems) == (backend, str(dtype).removeprefix("torch."), [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_weights(minilm: Path, dtype: torch.dtype, device: torch.device) -> None:
    """Catches an alarm over real weights and texts, loaded from a path, and cosines that are not those promised."""
    report = fastbert.verify(minilm, ["", *docstrings(5)], dtype=dtype, device=device)
    assert report.ok, str(report)
    assert len(report.states) == 8 and report.n_texts == 6
    least = 0.99999 if dtype == torch.float32 else 0.999
    assert min(state.worst_sentence_cosine for state in report.states) >= least
    assert min(state.worst_token_cosine for state in report.states) >= least


@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_new", "relu"])
def test_eager_is_bert(hidden_act: str) -> None:
    """Catches a wrong plain PyTorch, which would make the bound too wide to find anything."""
    model = BertModel(config(hidden_act=hidden_act)).double()
    ids, mask = torch.randint(101, (3, 7)), torch.ones(3, 7, dtype=torch.int64)
    mask[1, 4:], mask[2] = 0, 0
    kinds = torch.randint(2, (3, 7))
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        exact = reference.bert(parameters, model.config, ids, mask, kinds)
        *states, pooled = _eager(parameters, model.config, ids, mask, kinds)
    for state, expected in zip(states, exact.hidden_states, strict=True):
        torch.testing.assert_close(state[mask == 1], expected[mask == 1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(pooled[:, 0], exact.pooler_output, rtol=1e-12, atol=1e-12)


def test_weights_that_are_not_finite_are_named(model: BertModel) -> None:
    """Catches NaN or infinite weights that pass, or whose layer the user must find."""
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight[3, :2] = math.nan
        model.encoder.layer[0].attention.self.key.bias[0] = -math.inf
        model.encoder.layer[0].attention.self.key.bias[1] = math.nan
    report = verify(model)
    assert not report.ok and not report
    assert report.problems == [
        "encoder.layer.0.attention.self.key.bias: 1 NaN and 1 infinite of 32 values",
        "encoder.layer.1.output.dense.weight: 2 NaN of 1792 values",
    ]
    assert report.states == () and report.weights[1].n_nan == 2
    assert all(problem in str(report) for problem in report.problems) and "FAILED" in str(report)


def test_weights_of_a_head_are_looked_at(device: torch.device) -> None:
    """Catches a head left out of the search, and states of an encoder under a head named without its prefix."""
    model = BertForSequenceClassification(config()).eval().to(device)
    assert verify(model, IDS).states[1].name == "bert.encoder.layer.0"
    with torch.no_grad():
        model.classifier.bias[1] = math.inf
    assert verify(model, IDS).problems == ["classifier.bias: 1 infinite of 2 values"]


@pytest.mark.parametrize("layer", [0, 1])
def test_an_operation_that_is_off_is_found(model: BertModel, layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an error of 2 % in one layer that passes, or is put down to another layer."""
    wrong_in_layer(monkeypatch, layer, 2, lambda out: out.mul_(1.02))
    report = verify(model, IDS)
    assert not report.ok
    assert report.problems[0].startswith(f"encoder.layer.{layer} is the first that is wrong: error ")
    assert [state.ok for state in report.states] == [True, layer > 0, False, False]


def test_an_error_in_one_short_text_is_found(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an error in 2 of a thousand tokens that drowns in the rounding of bf16 in the others."""
    model = BertModel(config()).eval().to(device, torch.bfloat16)
    texts = [torch.randint(101, (250,)).tolist() for _ in range(4)]
    texts.insert(1, [2, 3])
    assert verify(model, texts).ok

    def change(out: Tensor) -> None:
        out[250:252] *= 1.3

    wrong_in_layer(monkeypatch, 0, 2, change)
    report = verify(model, texts)
    state = report.states[1]
    assert state.error <= state.bound, "this test wants an error that the sum over all texts hides"
    assert not report.ok and state.worst_text == 1
    assert "encoder.layer.0 is the first that is wrong: error" in report.problems[0]
    assert "for text 1 alone" in report.problems[0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_output_that_is_not_finite_is_found(model: BertModel, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches NaN from finite weights that passes a comparison, or that JSON cannot hold."""

    def change(out: Tensor) -> None:
        out[sum(map(len, IDS)) - 1] = value  # rows of padding may follow

    wrong_in_layer(monkeypatch, 1, 2, change)
    report = verify(model, IDS)
    assert report.problems == ["encoder.layer.1 is the first that is wrong: its output is not finite (text 3)"]
    assert [state.finite for state in report.states] == [True, True, False, True]
    d = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert d["ok"] is False and d["states"][2]["error"] is None and d["states"][1]["ok"] is True
    assert "FAILED" in str(report)


def test_weights_that_the_model_does_not_follow_are_found(model: BertModel) -> None:
    """Catches fused weights that are not those of the parameters."""
    with torch.no_grad():
        model(torch.tensor([[5, 6]], device=model.device))  # fuses the projections
        weight, _ = model.encoder.layer[1].attention.self.derived.tensors()
        weight[2 * weight.shape[1] :].mul_(1.02)
    report = verify(model, IDS)
    assert report.problems and report.problems[0].startswith("encoder.layer.1 is the first that is wrong")


def test_default_texts(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    """Catches built-in texts that do not run, and a text that is cut to the model's positions in silence."""
    assert "" in DEFAULT_TEXTS and len(DEFAULT_TEXTS) >= 12
    model = BertModel(config(vocab_size=tokenizer.vocab_size, max_position_embeddings=64)).eval()
    with caplog.at_level(logging.WARNING, logger="fastbert"):
        report = verify(model, tokenizer=tokenizer)
    assert not caplog.records
    assert report.ok and report.n_texts == len(DEFAULT_TEXTS), str(report)
    assert any("texts were cut to 64 tokens" in note for note in report.notes)
    assert report.notes[0] in str(report)
    assert verify(model, "One text.", tokenizer=tokenizer).n_texts == 1


def test_without_tokenizer(model: BertModel) -> None:
    """Catches ids outside the model's tables where they are drawn at random, and a report that hides it."""
    small = BertModel(config(vocab_size=7, type_vocab_size=1, max_position_embeddings=3)).eval()
    for each in (model, small):
        report = verify(each)
        assert report.ok and any("random token ids" in note for note in report.notes), str(report)
    assert verify(model).states == verify(model).states


@pytest.mark.parametrize("texts", [[[]], [[], [2, 3], []], [[2]] * 70, torch.randint(101, (3, 5))])
def test_shapes_of_batches(model: BertModel, texts: Any) -> None:
    """Catches a crash or an alarm for texts without tokens, more texts than a batch takes, and ids in a tensor."""
    report = verify(model, texts)
    assert report.ok and report.n_texts == len(texts), str(report)
    if report.n_tokens == 0:
        assert all(state.error == 0 for state in report.states[:-1])


def test_batching_changes_nothing(model: BertModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a text that is compared with another's reference when the texts do not fit one batch."""
    texts = [torch.randint(101, (n,)).tolist() for n in (30, 1, 17, 4, 30, 9)]
    whole = verify(model, texts)
    for name, value in (("MODEL_ROWS", 4), ("MODEL_TOKENS", 70), ("REFERENCE_ROWS", 2), ("REFERENCE_TOKENS", 31)):
        monkeypatch.setattr(verify_run, name, value)
    pieces = verify(model, texts)
    assert whole.ok and pieces.ok, str(pieces)
    for one, other in zip(whole.states, pieces.states, strict=True):
        assert other.error == pytest.approx(one.error, rel=0.3)


def test_bounds_where_eager_gives_none(model: BertModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an infinite or a zero bound where plain PyTorch overflows or is the reference itself."""
    double = verify(BertModel(config()).double(), IDS)
    assert double.ok and {state.bound for state in double.states} == {1e-10}
    right = _eager
    overflowing = lambda *args: [state * math.inf for state in right(*args)]  # noqa: E731
    monkeypatch.setattr(verify_run, "_eager", overflowing)
    report = verify(model, IDS)
    assert report.ok and {state.bound for state in report.states} == {0.0447}
    assert any("plain PyTorch is not finite" in note for note in report.notes)
    wrong_in_layer(monkeypatch, 0, 2, lambda out: out.neg_())
    assert not verify(model, IDS).ok


def test_model_is_left_as_it_was(model: BertModel) -> None:
    """Catches a change of mode, of weights or of gradients, and dropout in what is compared."""
    model.train()
    model.encoder.layer[0].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert verify(model, IDS).ok
    assert model.training and model.encoder.layer[1].training and not model.encoder.layer[0].training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    with pytest.raises(IndexError):
        verify(model, [[101]])
    assert model.training


def test_paths(tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a folder whose model, tokenizer or sentence-transformers layout is not found."""
    model = BertModel(config(vocab_size=tokenizer.vocab_size), add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path / "plain")
    report = verify(tmp_path / "plain")
    assert report.ok and report.states[-1].name == "encoder.layer.1"
    assert any("random token ids" in note for note in report.notes) and report.model == str(tmp_path / "plain")

    inside = tmp_path / "sentence" / "0_Transformer"
    model.save_pretrained(inside)
    tokenizer.save_pretrained(inside)
    kinds = [("1_Pooling", "Pooling"), ("0_Transformer", "Transformer")]
    modules = [{"idx": int(path[0]), "path": path, "type": f"sentence_transformers.models.{k}"} for path, k in kinds]
    (tmp_path / "sentence" / "modules.json").write_text(json.dumps(modules))
    report = verify(str(tmp_path / "sentence"), ["One.", "Two."], dtype="bfloat16", backend="torch")
    assert report.ok and (report.dtype, report.backend, report.n_texts) == ("bfloat16", "torch", 2)

    (tmp_path / "sentence" / "modules.json").write_text("{}")
    with pytest.raises(ValueError, match="modules.json: expected a list of modules with idx and path"):
        verify(tmp_path / "sentence")
    with pytest.raises(FileNotFoundError):
        verify(tmp_path / "nothing")


def test_sentence_encoder(tokenizer: Tokenizer) -> None:
    """Catches a SentenceEncoder whose tokenizer, or whose modules after pooling, are not looked at."""
    bert = BertModel(config(vocab_size=tokenizer.vocab_size)).eval()
    encoder = fastbert.SentenceEncoder(bert, tokenizer, "mean", [Dense(32, 5)])
    report = verify(encoder, ["One.", "", "Two."])
    assert report.ok and report.states[1].name == "model.encoder.layer.0"
    with torch.no_grad():
        encoder.tail[0].linear.bias[0] = math.nan
    assert verify(encoder).problems == ["tail.0.linear.bias: 1 NaN of 5 values"]


def test_cross_encoder(tokenizer: Tokenizer) -> None:
    """Catches a CrossEncoder whose tokenizer or head is not found."""
    model = BertForSequenceClassification(config(vocab_size=tokenizer.vocab_size, id2label={0: "score"})).eval()
    report = verify(fastbert.CrossEncoder(model, tokenizer), ["One.", "Two."])
    assert report.ok and [s.name for s in report.states][-2:] == ["model.bert.pooler", "model.classifier"]


class Adapter(nn.Module):
    """Stands for an adapter that took a linear's place, and its parameters other names."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x)


def test_adapters_are_refused(model: BertModel) -> None:
    """Catches a KeyError that does not say what to do about it."""
    part = model.encoder.layer[1].attention.self
    part.query = Adapter(part.query)  # type: ignore[assignment]
    with pytest.raises(ValueError, match="layer.1.attention.self.query.weight.*adapters have to be merged"):
        verify(model, IDS)


def test_bad_arguments(model: BertModel, tokenizer: Tokenizer) -> None:
    """Catches an argument that is ignored, or an error that does not name it."""
    with pytest.raises(ValueError, match="tokenizer: needed for texts"):
        verify(model, ["A text."])
    with pytest.raises(ValueError, match="texts: expected at least one"):
        verify(model, [])
    with pytest.raises(ValueError, match="dtype, device: expected only with a path, got a loaded BertModel"):
        verify(model, dtype="float32", device="cpu")
    with pytest.raises(TypeError, match="texts: expected strings or lists of token ids, got both"):
        verify(model, ["A text.", [2, 3]], tokenizer=tokenizer)  # type: ignore[list-item]
    for ids in ([[1.5]], [[[1]]], [[True]], [3]):
        with pytest.raises(TypeError, match="texts: expected strings or lists of token ids, got torch"):
            verify(model, ids)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model: expected a BertModel"):
        verify(nn.Linear(2, 2))
    with torch.device("meta"):
        nowhere = BertModel(config())
    with pytest.raises(ValueError, match="model: its parameters are on 'meta'"):
        verify(nowhere)
    with pytest.raises(IndexError, match="input_ids: expected values from 0 to 100, got 101"):
        verify(model, [[101]])


def test_report_as_text_and_json(model: BertModel) -> None:
    """Catches columns out of line, and values that JSON cannot hold."""
    report = verify(model, IDS)
    d = report.to_dict()
    assert json.loads(json.dumps(d, allow_nan=False)) == d
    assert d["ok"] is True and [state["name"] for state in d["states"]][0] == "embeddings"
    lines = str(report).split("\n\n")[1].splitlines()
    column = lines[0].index("bound")
    assert all(line[column - 1] == " " != line[column] for line in lines)
    assert "4 texts, 27 tokens: ok" in str(report)
    assert list(inspect.signature(fastbert.verify).parameters)[:3] == ["model_or_path", "texts", "tokenizer"]


def off_by(relative: float, out: Tensor) -> Tensor:
    """The tensor with noise of that share of its RMS."""
    noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out)
    return out + relative * out.float().square().mean().sqrt().to(out.dtype) * noise


OPS_OF_A_LAYER = {"linear": 2, "varlen_attention": 1, "linear_residual_layer_norm": 2}  # how often a layer calls them


@pytest.mark.parametrize("layer", [0, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_percent_in_the_output_of_a_layer_is_put_down_to_it(
    dtype: torch.dtype, layer: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a fault of 1e-2 that drowns in what bf16 rounds away in the layers before, or is blamed on another."""
    model = BertModel(config(num_hidden_layers=6)).eval().to(device, dtype)
    assert verify(model, IDS).ok
    right, calls = ops.linear_residual_layer_norm, []

    def wrong(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(None)
        out = right(*args, **kwargs)
        return off_by(1e-2, out) if (len(calls) - 1) % 12 == 2 * layer + 1 else out

    monkeypatch.setattr(ops, "linear_residual_layer_norm", wrong)
    report = verify(model, IDS)
    assert not report.ok
    assert report.problems[0].startswith(f"encoder.layer.{layer} is the first that is wrong: ")
    at_fault = [s.name for s in report.states if s.alone is not None and s.alone.problem is not None]
    assert at_fault == [f"encoder.layer.{layer}"], str(report)
    assert report.states[layer + 1].alone.error == pytest.approx(1e-2, rel=0.3)  # type: ignore[union-attr]


@pytest.mark.parametrize("op", OPS_OF_A_LAYER)
def test_one_percent_in_the_output_of_an_operation_is_put_down_to_its_layer(
    op: str, model: BertModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a fault of 1e-2 in what one operation gives, in float32, which the residual makes smaller."""
    right, calls = getattr(ops, op), []
    in_a_layer = OPS_OF_A_LAYER[op]

    def wrong(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(None)
        out = right(*args, **kwargs)
        return off_by(1e-2, out) if in_a_layer <= (len(calls) - 1) < 2 * in_a_layer else out

    model.pooler = None  # which calls ops.linear too
    assert verify(model, IDS).ok
    monkeypatch.setattr(ops, op, wrong)
    report = verify(model, IDS)
    assert report.problems[0].startswith("encoder.layer.1 is the first that is wrong: error ")
    assert [s.alone is None or s.alone.problem is None for s in report.states] == [True, True, False]


@pytest.mark.parametrize("part", ["attention.self.query", "attention.self.value", "output.dense", "intermediate.dense"])
def test_one_percent_in_the_weights_as_they_are_used(
    part: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a copy of the weights, fused or in another layout, that is 1e-2 off from the parameters."""
    model = BertModel(config(), backend="torch").eval().to(device)
    right = ops.linear if "self" in part or "intermediate" in part else ops.linear_residual_layer_norm
    calls: list[None] = []
    # The calls of layer 1: the projections, then the intermediate; the attention's output, then the layer's.
    place = 2 if "self" in part else 3
    h, rows = 32, {"attention.self.query": slice(0, 32), "attention.self.value": slice(64, 96)}.get(part, slice(None))

    def wrong(x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(None)
        if len(calls) - 1 == place:
            weight = weight.clone()
            assert weight.shape[0] == {"self": 3 * h, "intermediate": 56}.get(
                part.split(".")[-2 if "self" in part else 0], h
            )
            weight[rows] = off_by(1e-2, weight[rows])
        return right(x, weight, *args, **kwargs)

    monkeypatch.setattr(ops, right.__name__, wrong)
    report = verify(model, IDS)
    assert report.problems and report.problems[0].startswith("encoder.layer.1 is the first that is wrong: error ")


def test_a_stale_fused_copy_one_percent_off(model: BertModel) -> None:
    """Catches a fused copy that is 1e-2 from its parameter, in bf16 too."""
    for dtype in (torch.float32, torch.bfloat16):
        part = model.to(dtype).eval().encoder.layer[1].attention.self
        with torch.no_grad():
            model(torch.tensor([[5, 6]], device=model.device))
        assert verify(model, IDS).ok
        value = part.derived.tensors()[0][2 * part.value.weight.shape[1] :]
        with torch.no_grad():
            value.copy_(off_by(1e-2 if dtype == torch.float32 else 5e-2, value))
        assert verify(model, IDS).problems[0].startswith("encoder.layer.1 is the first that is wrong")
        model.train()  # drops the copy


def test_errors_of_parts_alone(model: BertModel) -> None:
    """Catches errors of a part alone that hold what came before, or a part that has none."""
    report = verify(model, IDS)
    assert report.states[0].alone is None
    for state in report.states[1:]:
        assert state.alone is not None and 0 < state.alone.error <= state.alone.bound
        assert state.times_eager == state.error / state.eager_error
    assert "alone, times" in str(report)
    assert report.to_dict()["states"][1]["alone"]["times_eager"] == report.states[1].alone.times_eager  # type: ignore


def test_vectors_and_their_neighbours(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches vectors that are not those of encode, an order of neighbours that is not held against the reference."""
    bert = BertModel(config(vocab_size=tokenizer.vocab_size)).eval()
    encoder = fastbert.SentenceEncoder(bert, tokenizer, ("cls", "mean"), [Dense(64, 5)])
    texts = [text for text in DEFAULT_TEXTS if text]
    report = verify(encoder, texts)
    v = report.vectors
    assert report.ok and report.states[-1].name == "vectors" and v is not None and v.what == "encode's"
    assert v.n_texts == v.n_compared == len(texts) and v.spearman > 0.999 and v.same_nearest == 1
    assert 0.9999999 < v.cosine[0] <= v.cosine[1] <= v.cosine[2] <= v.cosine[3] <= 1.0000001
    monkeypatch.setattr(verify_run, "MOST_COMPARED", 4)
    fewer = verify(encoder, texts).vectors
    assert fewer is not None and fewer.n_compared == 4
    assert verify(bert, IDS[:2]).to_dict()["vectors"]["spearman"] is None

    right = Dense.forward
    monkeypatch.setattr(Dense, "forward", lambda self, x: right(self, x) * (1 if x.dtype == torch.double else 1.01))
    assert verify(encoder, texts).ok, "plain PyTorch runs the same module"
    monkeypatch.undo()
    pool = ops.pool
    monkeypatch.setattr(ops, "pool", lambda *args, **kwargs: off_by(1e-2, pool(*args, **kwargs)))
    bert.pooler = None
    wrong = verify(encoder, texts)
    assert wrong.problems[0].startswith("vectors is the first that is wrong")
    assert wrong.vectors is not None and wrong.vectors.cosine[0] < v.cosine[0]


HEADS = {
    "BertForPreTraining": ["bert.pooler", "cls.seq_relationship", "cls.predictions"],
    "BertForMaskedLM": ["bert.encoder.layer.1", "cls.predictions"],
    "BertForNextSentencePrediction": ["bert.pooler", "cls.seq_relationship"],
    "BertForSequenceClassification": ["bert.pooler", "classifier"],
    "BertForMultipleChoice": ["bert.pooler", "classifier"],
    "BertForTokenClassification": ["bert.encoder.layer.1", "classifier"],
    "BertForQuestionAnswering": ["bert.encoder.layer.1", "qa_outputs"],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", HEADS)
def test_logits_of_heads(name: str, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a head that is not looked at, is looked at in the wrong place, or raises a false alarm."""
    model = getattr(fastbert, name)(config()).eval().to(device, dtype)
    report = verify(model, IDS)
    assert report.ok, str(report)
    assert [state.name for state in report.states][-len(HEADS[name]) :] == HEADS[name]
    last = report.states[-1]
    assert last.eager_error > 0 and last.alone is not None
    task = re.sub(r"(?<!^)(?=[A-Z])", "_", name.removeprefix("BertFor")).lower().replace("masked_l_m", "masked_lm")
    task = task.replace("next_sentence_prediction", "next_sentence").replace("pre_training", "pre_training")
    rows = verify_run._padded([(torch.tensor(ids), torch.zeros(len(ids), dtype=torch.int64)) for ids in IDS])
    inputs = tuple(x[:, None] for x in rows) if task == "multiple_choice" else rows
    parameters = {n: p.detach().cpu().double() for n, p in model.named_parameters()}
    parameters |= {n: p for n, p in parameters.items() if not n.startswith("bert.")}
    expected = reference.head(task, parameters, model.config, *inputs)
    with torch.no_grad():
        states = verify_run._reference(
            {n.removeprefix("bert."): p for n, p in parameters.items()}, model.bert, rows, [len(i) for i in IDS],
            list(verify_ends.ends_of(model, model.bert, "")),
        )  # fmt: skip
    logits = next(iter(expected.values())) if "qa_outputs" not in HEADS[name] else torch.stack([*expected.values()], -1)
    if task == "multiple_choice":
        logits = logits.view(4, 1)
    for i, ids in enumerate(IDS):
        row = logits[i, : len(ids)] if logits.dim() == 3 else logits[i : i + 1]
        torch.testing.assert_close(states[-1][i], row, rtol=1e-9, atol=1e-11)

    if dtype == torch.float32:
        place = dict(model.named_modules())[HEADS[name][-1]]
        place = getattr(place, "decoder", place)
        place.register_forward_hook(lambda module, given, out: off_by(1e-2, out))
        wrong = verify(model, IDS)
        assert wrong.problems and wrong.problems[0].startswith(f"{HEADS[name][-1]} is the first that is wrong")


@pytest.mark.parametrize("seed", range(8))
def test_few_logits_raise_no_alarm(seed: int, device: torch.device) -> None:
    """Catches a bound for a single logit of a few texts that chance alone goes beyond."""
    torch.manual_seed(seed)
    for dtype in (torch.float32, torch.bfloat16):
        model = BertForSequenceClassification(config(id2label={0: "a"})).eval().to(device, dtype)
        for texts in (IDS, IDS[:1], [torch.randint(101, (n,)).tolist() for n in (3, 9, 27, 5, 14)]):
            last = verify(model, texts).states[-1]
            assert last.ok and last.name == "classifier" and last.bound == math.inf, last


def test_page(model: BertModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a page that is no HTML, that refers to something outside, or that leaves out what is wrong."""
    from html.parser import HTMLParser

    wrong_in_layer(monkeypatch, 1, 2, lambda out: out.mul_(1.02))
    report = verify(model, IDS)
    page = report.to_html()
    opened: list[str] = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag: str, attrs: Any) -> None:
            if tag not in ("meta", "path", "use", "rect"):
                opened.append(tag)
            assert not any(name in ("src", "href") and not (value or "").startswith("#") for name, value in attrs), (
                attrs
            )

        def handle_endtag(self, tag: str) -> None:
            if tag not in ("path", "use", "rect"):
                assert opened.pop() == tag

    Parser().feed(page)
    drawn = importlib.util.find_spec("matplotlib") is not None
    assert not opened and page.count("<svg") == (3 if drawn else 0)
    assert "encoder.layer.1 is the first that is wrong" in page and "FAILED" in page and "4 texts, 27 tokens" in page
    for state in report.states:
        assert f'<th scope="row">{state.name}</th>' in page
    with monkeypatch.context() as context:
        context.setitem(sys.modules, "matplotlib", None)
        assert "matplotlib is not installed" in report.to_html()
    with torch.no_grad():
        model.encoder.layer[0].output.dense.bias[0] = math.nan
    assert "1 NaN of 32 values" in verify(model, IDS).to_html()


@pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
def test_fault_of_what_runs_where_nobody_asks_for_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a model verified operation by operation alone, where users get the encoder that runs in one call."""
    model = BertModel(
        BertConfig(
            vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
            max_position_embeddings=40,
        )
    ).eval()  # fmt: skip
    assert verify(model).ok
    right = cpu.encoder_forward
    monkeypatch.setattr(cpu, "encoder_forward", lambda *args: right(*args).mul_(1.01))
    report = verify(model)
    assert not report.ok and all(state.ok for state in report.states)
    assert "the last hidden state, as it runs by itself" in report.problems[0]
