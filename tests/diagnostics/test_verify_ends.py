"""verify looks at what follows the encoder: vectors, heads and the page."""

from __future__ import annotations

import importlib.util
import math
import re
import sys
from typing import Any

import pytest
import torch

import fastbert
from fastbert import BertForSequenceClassification, BertModel, Tokenizer, ops, reference
from fastbert.diagnostics.verify import ends as verify_ends
from fastbert.diagnostics.verify import measures
from fastbert.diagnostics.verify import run as verify_run
from fastbert.diagnostics.verify.entry import DEFAULT_TEXTS, verify
from fastbert.pipelines.modules import Dense
from verify_cases import IDS, config, off_by, wrong_in_layer


@pytest.fixture
def model(device: torch.device) -> BertModel:
    return BertModel(config()).eval().to(device)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A tokenizer of some 300 tokens, trained on the built-in texts."""
    return Tokenizer.train(list(DEFAULT_TEXTS), vocab_size=300, min_frequency=1)


def test_weights_of_a_head_are_looked_at(device: torch.device) -> None:
    """Catches a head left out of the search, and states of an encoder under a head named without its prefix."""
    model = BertForSequenceClassification(config()).eval().to(device)
    assert verify(model, IDS).states[1].name == "bert.encoder.layer.0"
    with torch.no_grad():
        model.classifier.bias[1] = math.inf
    assert verify(model, IDS).problems == ["classifier.bias: 1 infinite of 2 values"]


def test_errors_of_parts_alone(model: BertModel) -> None:
    """Catches errors of a part alone that hold what came before, or a part that has none."""
    report = verify(model, IDS)
    assert report.states[0].alone is None
    for state in report.states[1:]:
        assert state.alone is not None and 0 < state.alone.error <= state.alone.bound
        assert state.times_eager == state.error / state.eager_error
    assert "part alone: error ÷ eager's" in report.table().header
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
    monkeypatch.setattr(measures, "MOST_COMPARED", 4)
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
    assert wrong.problems[0].startswith("vectors is the first wrong output")
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
    rows = verify_run.padded([(torch.tensor(ids), torch.zeros(len(ids), dtype=torch.int64)) for ids in IDS])
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
        place.register_forward_hook(lambda module, args, out: off_by(1e-2, out))
        wrong = verify(model, IDS)
        assert wrong.problems and wrong.problems[0].startswith(f"{HEADS[name][-1]} is the first wrong output")


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
    assert "encoder.layer.1 is the first wrong output" in page and "FAILED" in page and "4 texts, 27 tokens" in page
    for state in report.states:
        assert f'<th scope="row">{state.name}</th>' in page
    with monkeypatch.context() as context:
        context.setitem(sys.modules, "matplotlib", None)
        assert "matplotlib is not installed" in report.to_html()
    with torch.no_grad():
        model.encoder.layer[0].output.dense.bias[0] = math.nan
    assert "1 NaN of 32 values" in verify(model, IDS).to_html()
