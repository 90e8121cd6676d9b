"""This module reads questions from SQuAD's JSON, versions 1 and 2, and answers in each of the common forms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fastbert.training.finetuning.columns import Record, RecordError


def is_squad(whole: Any) -> bool:
    """Tells whether a JSON value has SQuAD's form: articles that contain paragraphs."""
    data = whole.get("data") if isinstance(whole, dict) else None
    return isinstance(data, list) and bool(data) and all(isinstance(a, dict) and "paragraphs" in a for a in data)


def squad_rows(whole: Mapping[str, Any], name: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Yields ({"id", "title", "question", "context", "answers"}, place) for each question.

    answers: {"text": [...], "answer_start": [...]}, with empty lists for a question without an answer, as in datasets.
    Raises RecordError, with article, paragraph and question, counted from 1, for missing values and wrong types.
    """
    for a, article in enumerate(whole["data"], start=1):
        for p, paragraph in enumerate(_list(article, "paragraphs", f"{name}, article {a}"), start=1):
            where = f"{name}, article {a}, paragraph {p}"
            context = _text(paragraph, "context", where)
            for q, question in enumerate(_list(paragraph, "qas", where), start=1):
                place = f"{where}, question {q}"
                question_text = _text(question, "question", place)
                answers = [] if question.get("is_impossible") else _list(question, "answers", place)
                for answer in answers:
                    _text(answer, "text", f"{place}, answers")
                starts = [answer.get("answer_start") for answer in answers]
                row = {"id": str(question.get("id", place)), "title": article.get("title", "")}
                row |= {"question": question_text, "context": context}
                yield {**row, "answers": {"text": [x["text"] for x in answers], "answer_start": starts}}, place


def _list(holder: Any, key: str, place: str) -> list[Any]:
    value = holder.get(key) if isinstance(holder, dict) else None
    if not isinstance(value, list):
        raise RecordError(f"{place}: expected a list under {key!r}, got {type(value).__name__}")
    return value


def _text(holder: Any, key: str, place: str) -> str:
    value = holder.get(key) if isinstance(holder, dict) else None
    if not isinstance(value, str):
        raise RecordError(f"{place}: expected a text under {key!r}, got {type(value).__name__}")
    return value


def answers_of(record: Record) -> list[tuple[str, int | None]]:
    """Returns (text, first character or None) for each answer of a record; an empty list for a question without answer.

    "answers" may be a text, a list of texts, a list of {"text", "answer_start"}, or {"text": [...], "answer_start":
    [...]}; "start" is accepted as "answer_start". Raises RecordError for any other form.
    """
    value = record.values.get("answers")
    if value is None or value == "":
        return []
    if isinstance(value, Mapping):
        texts, starts = value.get("text"), value.get("answer_start", value.get("start"))
        texts = [texts] if isinstance(texts, str) else texts
        starts = [starts] if isinstance(starts, int) else starts
        if not isinstance(texts, list):
            raise _unknown(record, value)
        starts = [None] * len(texts) if starts is None else starts
        if not isinstance(starts, list) or len(starts) != len(texts):
            raise RecordError(f"{record.place}: answers have {len(texts)} texts and not as many starts")
        pairs = list(zip(texts, starts, strict=True))
    else:
        each = value if isinstance(value, list) else [value]
        pairs = [
            (x.get("text"), x.get("answer_start", x.get("start"))) if isinstance(x, dict) else (x, None) for x in each
        ]
    for text, start in pairs:
        if not isinstance(text, str) or isinstance(start, bool) or not isinstance(start, (int, type(None))):
            raise _unknown(record, value)
    return pairs


def _unknown(record: Record, value: Any) -> RecordError:
    shown = repr(value)
    return RecordError(
        f"{record.place}: answers: got {shown if len(shown) < 80 else shown[:79] + '…'}, expected a text, a list of "
        'texts, or {"text": [...], "answer_start": [...]}'
    )
