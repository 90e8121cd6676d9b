"""An EntityRecognizer finds entities in texts of any length, with their positions in the text."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from fastbert.checks import check_text, one_of, positive_or_none
from fastbert.models.tasks import BertForTokenClassification
from fastbert.pipelines.token_logits import load_head, longest_row, softmax, token_logits
from fastbert.text import offsets
from fastbert.text.encoding import PackedEncoding
from fastbert.text.overlap import overlapping, owners
from fastbert.text.tokenizer import Tokenizer

STRATEGIES = ("none", "simple", "first", "average", "max")
STRIDE = 128  # tokens, by default, and at most half a window
TEXTS = 256  # most texts with rows in memory at once
CHARACTERS = 2**20  # most characters of these texts, or one text

Entity = dict[str, Any]


class WindowedText(NamedTuple):
    """A WindowedText is a text whose tokens are read in windows, each a row of the model.

    starts: (n,) bool, whether a token begins a word. spans: (first, last) token of each window.
    """

    text: str
    tokens: offsets.TokenizedText
    starts: np.ndarray
    spans: list[tuple[int, int]]


class EntityRecognizer:
    """An EntityRecognizer is a token classifier and its tokenizer.

    strategy: the rule that joins tokens to entities, as in transformers' pipeline; `group` describes it. The default is
    "simple", or "first" if the labels are plain tags (`are_tags`), such as NOUN and VERB: then each word is an entity,
    and its group is its tag. ignore_labels: labels, or entity groups, to leave out. max_length: the greatest number of
    tokens in a window, with special tokens, by default the model's limit. stride: the overlap of two windows of a long
    text, by default 128, and at most half a window. token_budget: tokens in a batch, by default 16384 on a GPU and 2048
    on a CPU.

    A longer text is read in windows that begin and end between words. The scores of a word come from the window in
    which it has most context. Entities are joined after that, so none is cut, lost or doubled at the end of a window.
    """

    def __init__(
        self,
        model: BertForTokenClassification,
        tokenizer: Tokenizer,
        *,
        strategy: str | None = None,
        ignore_labels: Iterable[str] = ("O",),
        max_length: int | None = None,
        stride: int | None = None,
        token_budget: int | None = None,
    ) -> None:
        """Raises ValueError for an unknown strategy, and for a window or a stride that the model cannot have."""
        self.model, self.tokenizer = model, tokenizer
        self.has_tags = are_tags(model.config.id2label.values())
        default = "first" if self.has_tags else "simple"
        self.strategy = one_of("strategy", default if strategy is None else strategy, *STRATEGIES)
        self.ignore_labels = frozenset(ignore_labels)
        self.max_length = longest_row(model, tokenizer, max_length)
        self.capacity = self.max_length - tokenizer.num_special_tokens(False)
        self.stride = min(STRIDE, self.capacity // 2) if stride is None else stride
        overlapping(0, self.capacity, self.stride)  # checks both
        self.token_budget = positive_or_none("token_budget", token_budget)

    @classmethod
    def from_pretrained(
        cls,
        src: str | os.PathLike[str],
        *,
        strategy: str | None = None,
        ignore_labels: Iterable[str] = ("O",),
        max_length: int | None = None,
        stride: int | None = None,
        token_budget: int | None = None,
        device: str | torch.device | None = None,
        revision: str | None = None,
        **options: Any,
    ) -> EntityRecognizer:
        """Loads a folder or hub id. device: by default the GPU if there is one. options: as for the model.

        Raises the errors of BertForTokenClassification.from_pretrained, and ValueError for a checkpoint without the
        head.
        """
        model, tokenizer = load_head(BertForTokenClassification, "token-classification", src, device, revision, options)
        return cls(
            model, tokenizer, strategy=strategy, ignore_labels=ignore_labels, max_length=max_length, stride=stride,
            token_budget=token_budget,
        )  # fmt: skip

    def __call__(self, texts: str | Iterable[str]) -> list[Any]:
        """Returns the entities of a text as a list of dicts, or for an iterable of texts a list of such lists.

        An entity has "entity_group" (its label without B- or I-), "score" (float), "word" (its exact text), "start" and
        "end" (characters). With the strategy "none" it is a token: "entity" (its label), "score", "index" (its column
        in a row that would hold the whole text), "word" (the word piece), "start", "end".

        Raises TypeError for an item that is not a str, ValueError for lone surrogates.
        """
        if isinstance(texts, str):
            return next(self.stream([texts]))
        return list(self.stream(texts))

    def stream(self, texts: Iterable[str]) -> Iterator[list[Entity]]:
        """Yields the entities of each text, in the order of the texts; a few hundred texts are in memory at once."""
        chunk: list[str] = []
        n_characters = 0
        for i, text in enumerate(texts):
            check_text(f"texts[{i}]", text)
            chunk.append(text)
            n_characters += len(text)
            if len(chunk) == TEXTS or n_characters >= CHARACTERS:
                yield from self._of(chunk)
                chunk, n_characters = [], 0
        yield from self._of(chunk)

    def _of(self, texts: list[str]) -> Iterator[list[Entity]]:
        windowed = self.windows(texts)
        logits = token_logits(self.model, self.pack(windowed), self.token_budget)
        end = 0
        for text in windowed:
            start, end = end, end + sum(self._row_lengths(text))
            yield self.entities(text, logits[start:end])

    def windows(self, texts: list[str]) -> list[WindowedText]:
        """Returns the tokens of texts, and the windows in which they are read."""
        windowed = []
        for text, tokens in zip(texts, self.tokenizer.encode_with_offsets(texts), strict=True):
            starts = self._starts(tokens, text)
            spans = overlapping(len(tokens.ids), self.capacity, self.stride, starts)
            windowed.append(WindowedText(text, tokens, starts, list(spans)))
        return windowed

    def pack(self, windowed: list[WindowedText]) -> PackedEncoding:
        """Returns the rows that the model reads, a row for each window, end to end."""
        rows = [text.tokens.ids[i:j] for text in windowed for i, j in text.spans]
        return offsets.pack(self.tokenizer.template(False), rows)

    def _row_lengths(self, text: WindowedText) -> list[int]:
        n_special = offsets.n_special_tokens(self.tokenizer.template(False))
        return [j - i + n_special for i, j in text.spans]

    def entities(self, text: WindowedText, logits: np.ndarray) -> list[Entity]:
        """Returns the entities of a text. logits: (T, C) float32, of all tokens of its rows."""
        before = offsets.n_special_tokens(self.tokenizer.template(False), 0)
        own = owners(text.spans, len(text.tokens.ids), text.starts)
        scores = np.empty((len(text.tokens.ids), logits.shape[1]), np.float32)
        end = 0
        for number, ((first, last), length) in enumerate(zip(text.spans, self._row_lengths(text), strict=True)):
            mine = own[first:last] == number
            scores[first:last][mine] = logits[end + before : end + before + last - first][mine]
            end += length
        return self._entities(text.text, text.tokens, text.starts, softmax(scores), before)

    def _starts(self, tokens: offsets.TokenizedText, text: str) -> np.ndarray:
        """Returns (n,) bool: whether a token begins a word of `strategy`.

        The pre-tokenizer determines the words if tokens mark the continuation of a word, as in WordPiece. Otherwise a
        word begins after white space, and an unknown token is a word, as in transformers.
        """
        if self.tokenizer.marks_continuations:
            return tokens.starts_of_words()
        unknown = self.tokenizer.unk_token_id
        return np.array(
            [
                start == 0 or i == 0 or text[start - 1].isspace() or text[start : start + 1].isspace() or id_ == unknown
                for i, (id_, start) in enumerate(zip(tokens.ids, tokens.offsets[:, 0].tolist(), strict=True))
            ],
            bool,
        )

    def _entities(
        self, text: str, tokens: offsets.TokenizedText, starts: np.ndarray, scores: np.ndarray, before: int
    ) -> list[Entity]:
        labels = self.model.config.id2label
        if self.strategy == "none":
            best = scores.argmax(-1)
            words = self.tokenizer.convert_ids_to_tokens(tokens.ids) if tokens.ids else []
            return [
                {
                    "entity": labels[label], "score": float(scores[i, label]), "index": i + before, "word": words[i],
                    "start": start, "end": end,
                }
                for i, (label, (start, end)) in enumerate(zip(best.tolist(), tokens.offsets.tolist(), strict=True))
                if labels[label] not in self.ignore_labels
            ]  # fmt: skip
        entities = group(scores, tokens.offsets, starts, labels, self.strategy, has_tags=self.has_tags)
        return [
            {**entity, "word": text[entity["start"] : entity["end"]]}
            for entity in entities
            if entity["entity_group"] not in self.ignore_labels
        ]


def are_tags(labels: Iterable[str]) -> bool:
    """Tells whether labels are plain tags of words, such as NOUN and VERB, and not labels of spans.

    No plain tag is O, begins with B- or I-, or has a default name with LABEL_.
    """
    return not any(name == "O" or name.startswith(("B-", "I-", "LABEL_")) for name in labels)


def group(
    scores: np.ndarray, places: np.ndarray, starts: np.ndarray, labels: Any, strategy: str, *, has_tags: bool = False
) -> list[Entity]:
    """Returns all entities of a text, those of the label "O" among them: entity_group, score, start, end.

    scores: (n, C) probabilities of each token. places: (n, 2) characters. starts: (n,) bool, the beginnings of words.
    labels: the name of each class. strategy: "simple" gives each token its own best label. The others give all tokens
    of a word one label: that of its "first" token, the best label of the "average" of its tokens' scores, or the label
    of the token with the highest score ("max"). Neighbours of the same group make one entity, unless a B- begins a new
    one; its score is the mean of the scores of its words, or tokens. has_tags: labels are plain tags, and each word is
    an entity.
    """
    ends = starts if has_tags else np.zeros(len(starts), bool)
    if strategy != "simple":
        ends = np.full(len(starts), has_tags)
        scores, places = _words(scores, places, np.flatnonzero(starts), strategy)
    best = scores.argmax(-1)
    values = np.take_along_axis(scores, best[:, None], -1)[:, 0] if len(best) else best
    entities: list[Entity] = []
    tag, first = "", 0
    for i, label in enumerate(best.tolist()):
        begins, own_tag = (False, labels[label]) if has_tags else _prefix_and_tag(labels[label])
        if i and own_tag == tag and not begins and not ends[i]:
            continue
        if i:
            entities.append(_entity(labels[best[first]], values[first:i], places[first:i], has_tags))
        tag, first = own_tag, i
    if len(best):
        entities.append(_entity(labels[best[first]], values[first:], places[first:], has_tags))
    return entities


def _words(scores: np.ndarray, places: np.ndarray, firsts: np.ndarray, strategy: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns a row of scores and a position for each word. The first token always begins a word."""
    if len(scores) == 0:
        return scores, places
    firsts = firsts if len(firsts) and firsts[0] == 0 else np.concatenate([[0], firsts])
    lasts = np.concatenate([firsts[1:], [len(scores)]])
    if strategy == "first":
        of_words = scores[firsts]
    elif strategy == "average":
        of_words = np.stack([scores[i:j].mean(0) for i, j in zip(firsts, lasts, strict=True)])
    else:
        best = scores.max(-1)
        of_words = scores[[i + int(best[i:j].argmax()) for i, j in zip(firsts, lasts, strict=True)]]
    return of_words, np.stack([places[firsts, 0], places[lasts - 1, 1]], 1)


def _prefix_and_tag(label: str) -> tuple[bool, str]:
    """Tells whether a label begins an entity, and returns it without B- or I-."""
    return label.startswith("B-"), label[2:] if label.startswith(("B-", "I-")) else label


def _entity(label: str, values: Sequence[float] | np.ndarray, places: np.ndarray, has_tags: bool) -> Entity:
    return {
        "entity_group": label if has_tags else label.split("-", 1)[-1],
        "score": float(np.mean(values)),
        "start": int(places[0, 0]),
        "end": int(places[-1, 1]),
    }
