"""Answers are exact pieces of their context, with the numbers of transformers 4's pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastbert import BertForQuestionAnswering, QuestionAnswerer
from fastbert.pipelines.answers import best_spans
from helpers import tiny_bert

PAIRS = [
    ("Where was Ada born?", "Ada Lovelace was born in London, near the river Thames. London loved her numbers."),
    ("누구를 만났나요?", "서울에서 만난 김철수 씨는 부산으로 갔다."),
    ("river", "the river the river the river"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random reader and its tokenizer."""
    torch.manual_seed(0)
    config, tokenizer = tiny_bert([text for pair in PAIRS for text in pair], 120, max_position_embeddings=120)
    path = tmp_path_factory.mktemp("reader")
    BertForQuestionAnswering(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def reader(folder: Path, **arguments: Any) -> QuestionAnswerer:
    return QuestionAnswerer.from_pretrained(folder, device="cpu", **arguments)


@pytest.mark.parametrize("whole_words", [True, False])
def test_answers_are_those_of_the_pipeline(folder: Path, whole_words: bool) -> None:
    """Catches other scores, places or orders than those of the pipeline question-answering of transformers 4."""
    from transformers import pipeline
    from transformers.pipelines import PIPELINE_REGISTRY

    if "question-answering" not in PIPELINE_REGISTRY.get_supported_tasks():
        pytest.skip("transformers 5 has no pipeline question-answering; make test-transformers runs it with 4")
    theirs = pipeline("question-answering", model=str(folder), device="cpu")  # type: ignore[call-overload]
    for k, no_answer in ((1, False), (4, True)):
        ours = reader(folder, top_k=k, no_answer=no_answer, whole_words=whole_words, max_length=120)
        for question, context in PAIRS:
            expected = theirs(
                question=question, context=context, top_k=k, handle_impossible_answer=no_answer,
                align_to_words=whole_words, max_seq_len=120,
            )  # fmt: skip
            expected = [expected] if isinstance(expected, dict) else expected
            found = ours(question, context)
            for name in ("start", "end", "answer"):
                assert [each[name] for each in found] == [each[name] for each in expected]
            np.testing.assert_allclose(
                [each["score"] for each in found], [each["score"] for each in expected], atol=1e-6
            )


def test_a_score_by_hand(folder: Path) -> None:
    """Catches a softmax over question or special tokens, a start after its end, and an answer that is too long."""
    question, context = PAIRS[0]
    ours = reader(folder, max_answer_length=3, whole_words=False)
    encoding = ours.tokenizer([question], [context], return_tensors="pt")
    with torch.no_grad():
        output = ours.model(**encoding)
    of_context = encoding.token_type_ids[0].bool()
    of_context[-1] = False
    kept = of_context.clone()
    kept[0] = True
    start, end = (
        logits[0].double().masked_fill(~kept, -torch.inf).softmax(-1)
        for logits in (output.start_logits, output.end_logits)
    )
    products = (start[:, None] * end).triu().tril(2)
    products[0] = 0
    best = divmod(int(products.argmax()), len(start))
    (tokens,) = ours.tokenizer.encode_with_offsets([context])
    places, before = tokens.offsets, int(of_context.nonzero()[0])
    (answer,) = ours(question, context)
    assert (answer["start"], answer["end"]) == (places[best[0] - before, 0], places[best[1] - before, 1])
    assert answer["score"] == pytest.approx(products.max().item(), rel=1e-4)
    assert answer["answer"] == context[answer["start"] : answer["end"]]


def test_windows_reach_all_of_a_long_context(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an answer at a seam, or in the last window, that is lost, doubled, or has the place of another."""
    context = " ".join(f"{PAIRS[0][1]} {PAIRS[1][1]}" for _ in range(6))
    ours = reader(folder, max_length=48, stride=12, top_k=3)
    (tokens,) = ours.tokenizer.encode_with_offsets([context])
    (question,) = ours.tokenizer.encode_with_offsets([PAIRS[0][0]])
    n_question = len(question.ids)
    for place in (5, 33, 40, len(tokens.ids) - 1):

        def planted(model: Any, rows: Any, budget: Any, place: int = place) -> np.ndarray:
            logits = np.full((len(rows.input_ids), 2), -5.0, np.float32)
            ids, offsets = rows.input_ids.tolist(), rows.cu_seqlens.tolist()
            first = 0
            for row, end in zip(offsets, offsets[1:], strict=False):
                some = ids[row + n_question + 2 : end - 1]
                while tokens.ids[first : first + len(some)] != some:
                    first += 1
                if first <= place < first + len(some):
                    logits[row + n_question + 2 + place - first] = 9.0
            return logits

        monkeypatch.setattr("fastbert.pipelines.answers.token_logits", planted)
        answers = ours(PAIRS[0][0], context)
        first, last = tokens.offsets[place]
        assert answers[0]["start"] <= first < last <= answers[0]["end"] and 0.9 < answers[0]["score"] <= 1.0
        assert len({each["answer"].lower() for each in answers}) == len(answers) == 3


def test_no_answer(folder: Path) -> None:
    """Catches a threshold on anything but the difference of logits, and an empty answer nobody asked for."""
    question, context = PAIRS[0]
    assert all(each["answer"] for each in reader(folder, top_k=5)(question, context))
    assert reader(folder, no_answer=True, threshold=-1e9)(question, context)[0] == {
        "answer": "", "start": 0, "end": 0, "score": pytest.approx(0.0, abs=1.0),
    }  # fmt: skip
    best = reader(folder)(question, context)
    assert reader(folder, no_answer=True, threshold=1e9)(question, context) == best
    ours = reader(folder, whole_words=False)
    with torch.no_grad():
        output = ours.model(**ours.tokenizer([question], [context], return_tensors="pt"))
    n = len(ours.tokenizer.tokenize(question)) + 2
    spans = (output.start_logits[0, n:-1, None] + output.end_logits[0, n:-1]).triu().tril(14)
    spans[spans == 0] = -torch.inf
    difference = float(output.start_logits[0, 0] + output.end_logits[0, 0] - spans.max())
    for shift, empty in ((-0.01, True), (0.01, False)):
        (answer,) = reader(folder, no_answer=True, threshold=difference + shift, whole_words=False)(question, context)
        assert (answer["answer"] == "") == empty
    assert reader(folder)(question, " ") == []
    assert [each["answer"] for each in reader(folder, no_answer=True)(question, "")] == [""]


@pytest.mark.parametrize("n", [1, 2, 9, 30])
def test_best_spans(n: int) -> None:
    """Catches a span past the end, an order that is not that of the products, and one left out."""
    random = np.random.default_rng(n)
    start, end = random.random(n), random.random(n)
    every = sorted(((start[i] * end[j], i, j) for i in range(n) for j in range(i, min(n, i + 5))), reverse=True)
    assert best_spans(start, end, 5, 7) == [(i, j) for _, i, j in every[:7]]


def test_bad_arguments_of_answers(folder: Path) -> None:
    """Catches a question without room for its context, and lists of different lengths, that pass."""
    with pytest.raises(ValueError, match=r"questions\[0\]: has \d+ tokens, which leaves room for"):
        reader(folder, max_length=24)("why " * 30, "because")
    with pytest.raises(ValueError, match="contexts: got 1 for 2 questions"):
        reader(folder)(["a", "b"], ["c"])
    with pytest.raises(TypeError, match="got str and list"):
        reader(folder)("a", ["c"])
    with pytest.raises(ValueError, match="threshold: got 0.5, expected None"):
        reader(folder, threshold=0.5)
