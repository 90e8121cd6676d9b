"""The task `qa` finds answers in contexts, as exact pieces of them, or finds that there is none, as in SQuAD 2.

A record has `question`, `context` and `answers`, in the forms of `squad.answers_of`. Longer contexts are split into
windows. A window that does not contain the whole answer has the classification token as its answer.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastbert.pipelines.answers import best_spans
from fastbert.text.overlap import overlapping
from fastbert.training.finetuning.columns import SHOWN, Record, RecordError
from fastbert.training.finetuning.rows import RowMaker
from fastbert.training.finetuning.settings import FinetuneSettings
from fastbert.training.finetuning.squad import answers_of
from fastbert.training.finetuning.tasks import Task

logger = logging.getLogger("fastbert")

NOWHERE = 1 << 20  # a position outside of every row, which the loss ignores


class QuestionAnswering(Task):
    """The task finds answers to questions, as pieces of a context."""

    name, headline, head, windows = "qa", "f1", "AutoModelForQuestionAnswering", True
    label_names = ("start_positions", "end_positions")
    may_have_none = False  # whether a training record has no answer
    _left_out: Sequence[Record] = ()  # training records whose answers are not in their context
    settings: FinetuneSettings

    def prepare(self, records: Sequence[Record], settings: FinetuneSettings) -> dict[str, Any]:
        """Counts answers, and logs answers that are not in their context; their records are excluded from training.

        Raises RecordError for a record without question or context, and ValueError if no record has an answer.
        """
        self.settings = settings
        lost: list[Record] = []
        without = 0
        for record in records:
            texts_of(record)
            answers = answers_of(record)
            without += not answers
            if answers and place_of(record) is None:
                lost.append(record)
        self.may_have_none = without > 0
        self._left_out = lost
        if lost:
            logger.warning(
                "answers: those of %d of %d records are not in their context, and the records are left out: %s",
                len(lost), len(records), ", ".join(record.place for record in lost[:SHOWN]),
            )  # fmt: skip
        if len(lost) + without == len(records):
            raise ValueError(f"answers: none of {len(records)} records has an answer that is in its context")
        return {"questions": len(records), "without an answer": without, "answers not in their context": len(lost)}

    def check(self, records: Sequence[Record]) -> None:
        """Warns of evaluation answers that are not in their context: they count, but no prediction can be right."""
        lost = [record.place for record in records if answers_of(record) and place_of(record) is None]
        if lost:
            logger.warning(
                "answers: those of %d of %d records for evaluation are not in their context, and no answer to them is "
                "right: %s", len(lost), len(records), ", ".join(lost[:SHOWN]),
            )  # fmt: skip

    def model(self, settings: FinetuneSettings, **options: Any) -> Any:
        from fastbert.training.finetuning.loading import pretrained

        return pretrained(self.head, settings, ["start", "end"], **options)

    def features(self, records: Sequence[Record], tokenizer: Any, settings: FinetuneSettings) -> list[dict[str, Any]]:
        """Returns the windows of all records.

        Each window has the inputs of forward, and: record, before (the index of the context's first token), places (the
        positions of its tokens, in characters). Raises RecordError for a question that leaves no room for the context.
        """
        maker = RowMaker(tokenizer, pair=True)
        left_out = set(map(id, self._left_out))
        kept = [(i, record) for i, record in enumerate(records) if id(record) not in left_out]
        questions = maker.tokenize([texts_of(record)[0] for _, record in kept])
        contexts = maker.tokenize([texts_of(record)[1] for _, record in kept])
        length = settings.max_length or 384
        firsts, seconds, extra = [], [], []
        for (number, record), question, context in zip(kept, questions, contexts, strict=True):
            capacity = length - maker.n_special - len(question.ids)
            if capacity < 2:
                raise RecordError(f"{record.place}: question: its {len(question.ids)} tokens leave no room in {length}")
            before = maker.before + len(question.ids)
            place = place_of(record)
            for first, last in overlapping(len(context.ids), capacity, min(settings.stride, capacity // 2)):
                start, end = (0, 0) if place or not answers_of(record) else (NOWHERE, NOWHERE)
                if place is not None:
                    inside = _tokens_within(context.offsets, *place)
                    if inside is not None and first <= inside[0] and inside[1] < last:
                        start, end = (i - first + before for i in inside)
                firsts.append(question.ids)
                seconds.append(context.ids[first:last])
                places = context.offsets[first:last].tolist()
                positions = {"start_positions": start, "end_positions": end}
                full = len(question.ids) + len(context.ids) + maker.n_special
                extra.append({**positions, "record": number, "before": before, "places": places, "full_length": full})
        return [{**row, **more} for row, more in zip(maker.rows(firsts, seconds), extra, strict=True)]

    def predictions(self, logits: Any, features: Sequence[Mapping[str, Any]], records: Sequence[Record]) -> Any:
        """Returns the answer to each question, "" for none.

        It is the span with the highest sum of its two logits in any window, with at most `answer_length` tokens. The
        answer is "" if some training records have no answer, and the lowest sum of a classification token's logits
        exceeds the span's sum by more than `no_answer_threshold`, as in SQuAD's scripts.
        """
        best = np.full(len(records), -np.inf)
        null = np.full(len(records), np.inf)
        answers = [""] * len(records)
        for start, end, feature in zip(*map(np.asarray, logits[:2]), features, strict=True):
            number, before, places = feature["record"], feature["before"], feature["places"]
            null[number] = min(null[number], float(start[0] + end[0]))
            starts, ends = (row[before : before + len(places)].astype(np.float64) for row in (start, end))
            if not places:
                continue
            shares = np.exp(starts - starts.max()), np.exp(ends - ends.max())
            for i, j in best_spans(*shares, self.settings.answer_length, 1):
                if starts[i] + ends[j] > best[number]:
                    best[number] = starts[i] + ends[j]
                    answers[number] = texts_of(records[number])[1][places[i][0] : places[j][1]]
        if self.may_have_none:
            for i in np.flatnonzero(null - best > self.settings.no_answer_threshold).tolist():
                answers[i] = ""
        return answers

    def score(self, predictions: Any, records: Sequence[Record]) -> dict[str, Any]:
        from fastbert.training.finetuning import metrics

        return metrics.squad(predictions, _references(records))

    def interval(self, predictions: Any, records: Sequence[Record]) -> tuple[float, float] | None:
        from fastbert.training.finetuning import metrics

        return metrics.interval(np.mean, metrics.squad_each(predictions, _references(records))[1])


def texts_of(record: Record) -> tuple[str, str]:
    """Returns question and context. Raises RecordError if one is missing or is no text."""
    question, context = record.value("question"), record.value("context")
    for name, value in (("question", question), ("context", context)):
        if not isinstance(value, str):
            raise RecordError(f"{record.place}: {name}: got {value!r:.80}, expected a text")
    return question, context


def place_of(record: Record) -> tuple[int, int] | None:
    """Returns the start and the end (exclusive), in characters, of the first answer that is in its context, or None.

    The stored start is used if the answer stands there. Otherwise the occurrence nearest to it is returned; a missing
    start counts as 0.
    """
    _, context = texts_of(record)
    for text, start in answers_of(record):
        if not text:
            continue
        start = 0 if start is None else start
        if start < 0 or not context.startswith(text, start):
            earlier, later = context.rfind(text, 0, max(start, 0) + len(text)), context.find(text, max(start, 0))
            starts = [at for at in (earlier, later) if at >= 0]
            if not starts:
                continue
            start = min(starts, key=lambda at, start=start: abs(at - start))  # type: ignore[misc]
        return start, start + len(text)
    return None


def _tokens_within(offsets: np.ndarray, start: int, end: int) -> tuple[int, int] | None:
    """Returns the first and the last of the tokens that overlap the range of characters, or None."""
    inside = np.flatnonzero((offsets[:, 1] > start) & (offsets[:, 0] < end))
    return (int(inside[0]), int(inside[-1])) if len(inside) else None


def _references(records: Sequence[Record]) -> list[list[str]]:
    return [[text for text, _ in answers_of(record)] for record in records]
