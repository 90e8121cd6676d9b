"""The task `tokens` gives every word a label. IOB2 labels form spans, such as names; other labels are tags.

A record has `tokens` and `labels`, or `text` and `spans` ([{"start", "end", "label"}, ...], in characters). Both are
converted to running text with word positions, because the model is used on running text. The first token of a word has
its label, and the other tokens have none. Longer texts are split into windows between words. Each word has its label
only in the window that gives it the most context, so that no word is lost or counted twice.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastbert.text.offsets import TokenizedText
from fastbert.text.overlap import overlapping, owners
from fastbert.training.distributed import n_processes
from fastbert.training.finetuning.class_weights import weighted_cross_entropy, weights_of
from fastbert.training.finetuning.columns import SHOWN, Record, RecordError
from fastbert.training.finetuning.labels import warn_of_unseen
from fastbert.training.finetuning.rows import RowMaker
from fastbert.training.finetuning.schemes import OUTSIDE, PLAIN, as_iob2, scheme_of
from fastbert.training.finetuning.settings import FinetuneSettings
from fastbert.training.finetuning.tasks import Task
from fastbert.training.finetuning.token_records import Span, has_spans, spans_in, tokens_of

logger = logging.getLogger("fastbert")

IGNORED = -100


@dataclass
class _Example:
    """An _Example is a record as running text, with labelled words or with spans."""

    text: str
    words: list[tuple[int, int]] | None  # positions of the words of `tokens`
    labels: list[str] | None  # in IOB2 or plain, one per word
    spans: list[Span] | None  # of `text` and `spans`, in order


class Tokens(Task):
    """The task predicts a label for each word. The scores count spans, or words if the labels are plain tags."""

    name, headline, head, windows = "tokens", "f1", "AutoModelForTokenClassification", True
    labels: list[str]
    scheme = "IOB2"
    pieces: bool | None = None  # whether each token counts as a word, which spans within words need
    counts: Counter[str] | None = None  # number of training words with each label, set by `features`

    def prepare(self, records: Sequence[Record], settings: FinetuneSettings) -> dict[str, Any]:
        """Finds the scheme and the types, or the tags.

        Raises RecordError for invalid labels or spans; ValueError if there are none, for fewer than two tags, and for
        weights with unknown names.
        """
        labelled = [record for record in records if not has_spans(record)]
        self.scheme = settings.scheme
        if settings.scheme == "auto":
            self.scheme = scheme_of([tokens_of(record)[1] for record in labelled], labelled)
        is_plain = self.scheme == PLAIN
        if is_plain and len(labelled) < len(records):
            place = next(record.place for record in records if has_spans(record))
            raise RecordError(
                f"{place}: spans: other records have plain tags, which make no spans; expected one of the two"
            )
        if self.scheme not in ("IOB2", PLAIN):
            logger.warning("labels: they are in %s, and are taken as IOB2 says the same", self.scheme)
        self.headline = "token_accuracy" if is_plain else "f1"
        places: dict[str, list[str]] = {}
        for record in records:
            for name in self._names(record):
                places.setdefault(name, []).append(record.place)
        if not places and not is_plain:
            raise ValueError("labels: no record has a span; expected types to learn")
        if is_plain and len(places) < 2:
            raise ValueError(f"labels: got the tags {sorted(places)}, expected 2 or more")
        names = sorted(places)
        self.labels = _label_order(
            names if is_plain else [OUTSIDE, *(f"{p}-{name}" for name in names for p in "BI")], settings
        )
        weights_of(self._weights(settings), self.labels, [1] * len(self.labels))  # raises for invalid weights
        if rare := [f"{name} ({places[name][0]})" for name in names if len(places[name]) == 1]:
            phrase = "tags have one word" if is_plain else "types have one span"
            logger.warning("labels: %d %s each: %s", len(rare), phrase, ", ".join(rare[:8]))
        facts = {"labels": self.labels, "counts": {name: len(places[name]) for name in names}, "scheme": self.scheme}
        if is_plain:
            return facts
        return {**facts, "records without a span": sum(not any(self._names(record)) for record in records)}

    def check(self, records: Sequence[Record]) -> None:
        known = {label if self.scheme == PLAIN else label[2:] for label in self.labels} - {""}
        seen = set()
        for record in records:
            for name in self._names(record):
                if name not in known:
                    raise self._unknown(name, record)
                seen.add(name)
        warn_of_unseen(sorted(known), seen, "labels")

    def loss(self, settings: FinetuneSettings) -> Callable[..., Any] | None:
        """Returns a loss with label weights; the weight of a type applies to its B- and its I-.

        If an update has several batches, the share of each depends on its number of words, as in one large batch.
        """
        counts = self.counts or Counter()
        weights = weights_of(self._weights(settings), self.labels, [counts[name] for name in self.labels])
        if weights is None and (settings.accumulate > 1 or n_processes() > 1):
            weights = np.ones(len(self.labels), np.float32)
        return None if weights is None else weighted_cross_entropy(weights)

    def _weights(self, settings: FinetuneSettings) -> str | dict[str, float]:
        """Returns the weights of the settings by label; a weight by type applies to both labels of the type."""
        if isinstance(settings.class_weights, str):
            return settings.class_weights
        weights: dict[str, float] = {}
        for name, weight in settings.class_weights.items():
            both = {f"B-{name}", f"I-{name}"} & set(self.labels) if name not in self.labels else set()
            weights |= dict.fromkeys(both or {name}, weight)
        return weights | {name: weight for name, weight in settings.class_weights.items() if name in self.labels}

    def _names(self, record: Record) -> Iterator[str]:
        """Yields the types of a record's spans, or its tags."""
        example = self._example(record)
        if self.scheme == PLAIN:
            yield from example.labels or ()
        else:
            yield from (span.type for span in self._spans(example))

    def _unknown(self, name: str, record: Record) -> RecordError:
        """Returns the error for a type or tag that training does not have, with the first word that has it."""
        words, labels = ([], []) if has_spans(record) else tokens_of(record)
        at = next((i for i, label in enumerate(labels) if label.endswith(name)), None)
        where = "" if at is None else f" (word {at + 1}, {words[at]!r:.40})"
        if self.scheme == PLAIN:
            return RecordError(
                f"{record.place}: {name!r} is not among the tags of training: {', '.join(self.labels)}{where}"
            )
        types = ", ".join(label[2:] for label in self.labels if label.startswith("B-"))
        return RecordError(f"{record.place}: {name!r} is not among the types of training: {types}{where}")

    def model(self, settings: FinetuneSettings, **options: Any) -> Any:
        from fastbert.training.finetuning.loading import pretrained

        return pretrained(self.head, settings, self.labels, **options)

    def features(self, records: Sequence[Record], tokenizer: Any, settings: FinetuneSettings) -> list[dict[str, Any]]:
        """Returns the windows of all records.

        Each window has the inputs of forward, the record, and the positions of labels with their words. One warning
        counts words without a token, such as control characters; another counts spans that are widened to whole tokens.
        """
        numbers = {name: i for i, name in enumerate(self.labels)}
        examples = [self._example(record) for record in records]
        maker = RowMaker(tokenizer, pair=False)
        tokenized = maker.tokenize([example.text for example in examples])
        if self.pieces is None:
            self.pieces = self._cuts_words(examples, tokenized)
        capacity = (settings.max_length or 512) - maker.n_special
        stride = min(settings.stride, capacity // 2)
        ids: list[list[int]] = []
        extra: list[dict[str, Any]] = []
        lost: list[str] = []
        widened: list[str] = []
        used: Counter[str] = Counter()
        for number, (record, example, tokens) in enumerate(zip(records, examples, tokenized, strict=True)):
            words, labels = self._words(example, tokens, record, widened)
            for name in labels:
                if name not in numbers:
                    raise self._unknown(name, record)
            used.update(labels)
            firsts = first_tokens(example.text, tokens, words)
            if (firsts < 0).any():
                lost.append(record.place)
            starts = np.zeros(len(tokens.ids), bool)
            starts[firsts[firsts >= 0]] = True
            spans = overlapping(len(tokens.ids), capacity, stride, starts)
            own = owners(spans, len(tokens.ids), starts)
            for window, (first, last) in enumerate(spans):
                mine = [
                    (int(place) - first + maker.before, word)
                    for word, place in enumerate(firsts.tolist())
                    if first <= place < last and own[place] == window
                ]
                row = [IGNORED] * (last - first + maker.n_special)
                for place, word in mine:
                    row[place] = numbers[labels[word]]
                ids.append(tokens.ids[first:last])
                full = len(tokens.ids) + maker.n_special
                extra.append({"labels": row, "record": number, "words": mine, "places": words, "full_length": full})
        self.counts = used if self.counts is None else self.counts
        _warn("words have no token, and no label that counts, in %d records: %s", lost)
        _warn("spans begin or end within tokens, and are widened to these, in %d records: %s", widened)
        return [{**row, **more} for row, more in zip(maker.rows(ids), extra, strict=True)]

    def collator(self, tokenizer: Any) -> Any:
        from transformers import DataCollatorForTokenClassification

        return DataCollatorForTokenClassification(tokenizer)

    def keep(self, logits: Any, labels: Any) -> Any:
        return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)

    def predictions(self, logits: Any, features: Sequence[Mapping[str, Any]], records: Sequence[Record]) -> Any:
        """Returns the labels of each record's words, in IOB2 or plain, or the spans if the record has spans."""
        best = np.asarray(logits)
        best = best.argmax(-1) if best.ndim == 3 else best
        named: list[list[str]] = [[] for _ in records]
        places: list[list[tuple[int, int]]] = [[] for _ in records]
        for row, feature in zip(best, features, strict=True):
            number = feature["record"]
            places[number] = feature["places"]
            missing = self.labels[0] if self.scheme == PLAIN else OUTSIDE  # label of a word without a token
            named[number] = named[number] or [missing] * len(feature["places"])
            for place, word in feature["words"]:
                named[number][word] = self.labels[int(row[place])]
        return [
            spans_of_words(labels, words) if has_spans(record) else labels
            for labels, words, record in zip(named, places, records, strict=True)
        ]

    def score(self, predictions: Any, records: Sequence[Record]) -> dict[str, Any]:
        from fastbert.training.finetuning import metrics, tag_metrics

        if self.scheme == PLAIN:
            return tag_metrics.tags(self._truth(records), predictions, self.labels)
        scores = metrics.spans(self._truth(records), predictions)
        pairs = [
            (true, label)
            for record, labels in zip(records, predictions, strict=True)
            if not has_spans(record)
            for true, label in zip(self._example(record).labels or [], labels, strict=True)
        ]
        if pairs:
            scores["token_accuracy"] = sum(true == label for true, label in pairs) / len(pairs)
        return scores

    def interval(self, predictions: Any, records: Sequence[Record]) -> tuple[float, float] | None:
        from fastbert.training.finetuning import metrics, tag_metrics

        if self.scheme == PLAIN:
            counts = tag_metrics.tag_counts(self._truth(records), predictions)
            return metrics.interval(tag_metrics.share_of_counts, counts)
        return metrics.interval(metrics.f1_of_counts, metrics.span_counts(self._truth(records), predictions))

    def _truth(self, records: Sequence[Record]) -> list[list[Any]]:
        examples = [self._example(record) for record in records]
        return [list(each.labels if each.spans is None else each.spans) for each in examples]  # type: ignore[arg-type]

    def _example(self, record: Record) -> _Example:
        if has_spans(record):
            text = record.value("text")
            return _Example(text, None, None, spans_in(record))
        words, labels = tokens_of(record)
        ends = np.cumsum([len(word) + 1 for word in words]).tolist()
        places = [(end - 1 - len(word), end - 1) for word, end in zip(words, ends, strict=True)]
        return _Example(" ".join(words), places, as_iob2(labels, self.scheme, record), None)

    @staticmethod
    def _spans(example: _Example) -> list[Span]:
        if example.spans is not None:
            return example.spans
        assert example.labels is not None and example.words is not None
        return spans_of_words(example.labels, example.words)

    @staticmethod
    def _cuts_words(examples: list[_Example], tokenized: list[TokenizedText]) -> bool:
        """Tells whether any span begins or ends within a word, as in languages that attach particles to words."""
        n_spans = n_within = 0
        for example, tokens in zip(examples, tokenized, strict=True):
            words = words_of(example.text, tokens, pieces=False)
            starts, ends = {start for start, _ in words}, {end for _, end in words}
            for span in example.spans or ():
                n_spans += 1
                n_within += span.start not in starts or span.end not in ends
        if n_within:
            logger.warning(
                "spans: %d of %d begin or end within words: every token has a label of its own, not words; to use the "
                "model: fastbert entities --strategy simple", n_within, n_spans,
            )  # fmt: skip
        return n_within > 0

    def _words(
        self, example: _Example, tokens: TokenizedText, record: Record, widened: list[str]
    ) -> tuple[list[tuple[int, int]], list[str]]:
        """Returns the positions of the words of an example, and their labels."""
        if example.spans is None:
            assert example.words is not None and example.labels is not None
            return example.words, example.labels
        words = words_of(example.text, tokens, bool(self.pieces))
        labels = [OUTSIDE] * len(words)
        first = 0
        for span in example.spans:
            while first < len(words) and words[first][1] <= span.start:
                first += 1
            last = first
            while last < len(words) and words[last][0] < span.end:
                if labels[last] != OUTSIDE:
                    text = example.text[words[last][0] : words[last][1]]
                    raise RecordError(f"{record.place}: two spans have parts in {text!r}, which cannot be cut there")
                labels[last] = f"{'B' if last == first else 'I'}-{span.type}"
                last += 1
            if first == last or (words[first][0], words[last - 1][1]) != (span.start, span.end):
                widened.append(record.place)
        return words, labels


def words_of(text: str, tokens: TokenizedText, pieces: bool) -> list[tuple[int, int]]:
    """Returns the positions of the words of a text, or of its tokens, without white space at their ends."""
    starts = np.ones(len(tokens.ids), bool) if pieces else tokens.starts_of_words()
    firsts = np.flatnonzero(starts).tolist()
    positions: list[tuple[int, int]] = []
    for first, following in zip(firsts, [*firsts[1:], len(tokens.ids)], strict=True):
        start, end = int(tokens.offsets[first, 0]), int(tokens.offsets[following - 1, 1])
        if positions:
            start = max(start, positions[-1][1])  # two tokens of one character
        while start < end and text[start].isspace():
            start += 1
        while start < end and text[end - 1].isspace():
            end -= 1
        if start < end:
            positions.append((start, end))
    return positions


def first_tokens(text: str, tokens: TokenizedText, words: Sequence[tuple[int, int]]) -> np.ndarray:
    """Returns (n,) int64: the index of the first token of each word, -1 for a word without a token."""
    firsts = np.full(len(words), -1, np.int64)
    places = tokens.offsets.tolist()
    i = 0
    for word, (start, end) in enumerate(words):
        while i < len(places) and (places[i][1] <= start or not text[places[i][0] : places[i][1]].strip()):
            i += 1
        if i < len(places) and places[i][0] < end:
            firsts[word] = i
            i += 1
    return firsts


def spans_of_words(labels: Sequence[str], words: Sequence[tuple[int, int]]) -> list[Span]:
    """Returns the spans of IOB2 labels, in characters. An I- that continues no span begins one, as in seqeval."""
    from fastbert.training.finetuning import metrics

    return [Span(kind, words[first][0], words[last][1]) for kind, first, last in metrics.spans_of(labels)]


def _label_order(labels: list[str], settings: FinetuneSettings) -> list[str]:
    """Returns the labels in the settings' order, or in that of the model's own head if it has exactly these labels."""
    if settings.label_order:
        if unknown := sorted(set(labels) - set(settings.label_order)):
            raise ValueError(f"label_order: {', '.join(unknown)} of the training data is not in it")
        return list(settings.label_order)
    import transformers

    own = transformers.AutoConfig.from_pretrained(settings.model).id2label or {}
    return [own[i] for i in sorted(own)] if set(own.values()) == set(labels) else labels


def _warn(message: str, places: list[str]) -> None:
    if places:
        distinct = list(dict.fromkeys(places))
        logger.warning(message, len(distinct), ", ".join(distinct[:SHOWN]))
