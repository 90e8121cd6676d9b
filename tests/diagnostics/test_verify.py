"""verify passes a right model, takes it in every form, and leaves it as it was."""

from __future__ import annotations

import inspect
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastbert
from fastbert import BertForSequenceClassification, BertModel, Tokenizer, reference
from fastbert.diagnostics.verify import run as verify_run
from fastbert.diagnostics.verify.eager import eager_bert
from fastbert.diagnostics.verify.entry import DEFAULT_TEXTS, verify
from fastbert.pipelines.modules import Dense
from helpers import docstrings
from verify_cases import IDS, config, wrong_in_layer


@pytest.fixture
def model(device: torch.device) -> BertModel:
    return BertModel(config()).eval().to(device)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A tokenizer of some 300 tokens, trained on the built-in texts."""
    return Tokenizer.train(list(DEFAULT_TEXTS), vocab_size=300, min_frequency=1)


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
    """Catches a wrong plain PyTorch, which makes the bound too wide to find anything."""
    model = BertModel(config(hidden_act=hidden_act)).double()
    ids, mask = torch.randint(101, (3, 7)), torch.ones(3, 7, dtype=torch.int64)
    mask[1, 4:], mask[2] = 0, 0
    token_type_ids = torch.randint(2, (3, 7))
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        exact = reference.bert(parameters, model.config, ids, mask, token_type_ids)
        *states, pooled = eager_bert(parameters, model.blocks(), model.config, ids, mask, token_type_ids)
    for state, expected in zip(states, exact.hidden_states, strict=True):
        torch.testing.assert_close(state[mask == 1], expected[mask == 1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(pooled[:, 0], exact.pooler_output, rtol=1e-12, atol=1e-12)


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
    """Catches a crash or an alarm for texts without tokens, for many texts, or for ids in a tensor."""
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
    right = eager_bert
    overflowing = lambda *args: [state * math.inf for state in right(*args)]  # noqa: E731
    monkeypatch.setattr(verify_run, "eager_bert", overflowing)
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
    names = [("1_Pooling", "Pooling"), ("0_Transformer", "Transformer")]
    modules = [{"idx": int(path[0]), "path": path, "type": f"sentence_transformers.models.{k}"} for path, k in names]
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
    with pytest.raises(TypeError, match="texts: got strings and lists of token ids, expected one of the two"):
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
    lines = str(report).split("\n\n")[0].splitlines()[1:]
    end = next(line for line in lines if "error ÷" in line).index("error ÷") + len("error ÷")
    assert all(line[end - 1] != " " == line[end] for line in lines[2:])
    assert "4 texts, 27 tokens: ok" in str(report)
    assert list(inspect.signature(fastbert.verify).parameters)[:3] == ["model_or_path", "texts", "tokenizer"]
