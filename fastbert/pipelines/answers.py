"""A QuestionAnswerer finds the answers to questions as exact pieces of contexts of any length."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from fastbert.checks import check_text, expect, positive, positive_or_none
from fastbert.models.tasks import BertForQuestionAnswering
from fastbert.pipelines.token_logits import load_head, longest_row, softmax, token_logits
from fastbert.text import offsets
from fastbert.text.overlap import overlapping
from fastbert.text.tokenizer import Tokenizer

LONGEST = 384  # tokens of a row by default, as in transformers
STRIDE = 128
PAIRS = 16  # questions with rows in memory at once

Answer = dict[str, Any]


@dataclass
class _Window:
    """A `_Window` holds a window of a context: its numbers and the positions of its tokens."""

    start: np.ndarray  # (n,) logits of the context's tokens
    end: np.ndarray
    null: tuple[float, float]  # logits of the classification token
    places: np.ndarray  # (n, 2) characters, of tokens or of the words that they are in


class QuestionAnswerer:
    """A QuestionAnswerer is a model for extractive question answering and its tokenizer.

    top_k: the greatest number of answers to a question. no_answer: whether "" is also an answer, as in SQuAD 2.
    threshold: "" comes first if its logits exceed those of the best answer by more than this, as in SQuAD 2. Without a
    threshold, "" is sorted by its score like the other answers, as in transformers' pipeline. max_answer_length: in
    tokens. whole_words: answers begin and end at the borders of words. max_length: the greatest number of tokens in a
    window, with the question and special tokens, by default 384 or the model's limit. stride: the overlap of two
    windows, by default 128, and at most half of max_length. token_budget: tokens in a batch, by default 16384 on a GPU
    and 2048 on a CPU.

    The scores are those of the pipeline "question-answering" of transformers 4. A score is the product of two
    probabilities, of a start and of an end among the tokens of the window. Answers with the same text are joined: in
    one window their scores are added. The score over several windows is the highest one, because a sum could exceed 1.
    """

    def __init__(
        self,
        model: BertForQuestionAnswering,
        tokenizer: Tokenizer,
        *,
        top_k: int = 1,
        no_answer: bool = False,
        threshold: float | None = None,
        max_answer_length: int = 15,
        whole_words: bool = True,
        max_length: int | None = None,
        stride: int | None = None,
        token_budget: int | None = None,
    ) -> None:
        """Raises ValueError for a number that is not positive, and for a max_length that the model cannot read."""
        self.model, self.tokenizer = model, tokenizer
        self.top_k, self.max_answer_length = positive("top_k", top_k), positive("max_answer_length", max_answer_length)
        self.no_answer, self.threshold, self.whole_words = no_answer, threshold, whole_words
        expect(threshold is None or no_answer, "threshold", threshold, "None, unless no_answer is True")
        longest = longest_row(model, tokenizer, max_length)
        self.max_length = min(LONGEST, longest) if max_length is None else longest
        self.stride = min(STRIDE, self.max_length // 2) if stride is None else stride
        expect(0 <= self.stride < self.max_length, "stride", stride, f"0 to {self.max_length - 1}")
        self.token_budget = positive_or_none("token_budget", token_budget)

    @classmethod
    def from_pretrained(
        cls,
        src: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        revision: str | None = None,
        top_k: int = 1,
        no_answer: bool = False,
        threshold: float | None = None,
        max_answer_length: int = 15,
        whole_words: bool = True,
        max_length: int | None = None,
        stride: int | None = None,
        token_budget: int | None = None,
        **options: Any,
    ) -> QuestionAnswerer:
        """Loads a folder or hub id. device: by default the GPU if there is one. options: as for the model.

        Raises the errors of BertForQuestionAnswering.from_pretrained, and ValueError for a checkpoint without the head.
        """
        model, tokenizer = load_head(BertForQuestionAnswering, "question-answering", src, device, revision, options)
        return cls(
            model, tokenizer, top_k=top_k, no_answer=no_answer, threshold=threshold, whole_words=whole_words,
            max_answer_length=max_answer_length, max_length=max_length, stride=stride, token_budget=token_budget,
        )  # fmt: skip

    def __call__(self, questions: str | Iterable[str], contexts: str | Iterable[str]) -> list[Any]:
        """Returns the answers to a question, the best first; for lists of questions and contexts, a list of such lists.

        An answer is a dict: "answer" (exactly context[start:end]), "score" (float), "start", "end" (characters). ""
        with 0 and 0 means that the context has no answer. A context without tokens has no answers, or only "".

        Raises TypeError for an item that is not a str. Raises ValueError for different numbers of questions and
        contexts, and for a question that leaves no room for the context.
        """
        if isinstance(questions, str) != isinstance(contexts, str):
            type_names = f"{type(questions).__name__} and {type(contexts).__name__}"
            raise TypeError(f"questions, contexts: got {type_names}, expected two of str or two of iterables")
        if isinstance(questions, str):
            return next(self.stream([(questions, contexts)]))  # type: ignore[list-item]
        questions, contexts = list(questions), list(contexts)
        if len(questions) != len(contexts):
            raise ValueError(f"contexts: got {len(contexts)} for {len(questions)} questions, expected as many")
        return list(self.stream(zip(questions, contexts, strict=True)))

    def stream(self, pairs: Iterable[tuple[str, str]]) -> Iterator[list[Answer]]:
        """Yields the answers to each (question, context), in order; a few pairs are in memory at once."""
        source = iter(pairs)
        n = 0
        while chunk := list(islice(source, PAIRS)):
            for i, (question, context) in enumerate(chunk, start=n):
                check_text(f"questions[{i}]", question)
                check_text(f"contexts[{i}]", context)
            for windows, (_, context) in zip(self._windows(chunk, n), chunk, strict=True):
                yield self._best(windows, context)
            n += len(chunk)

    def _windows(self, pairs: list[tuple[str, str]], number: int) -> Iterator[list[_Window]]:
        """Yields the windows of each pair. number: of the first pair, for errors."""
        encode = self.tokenizer.encode_with_offsets
        questions = encode([question for question, _ in pairs])
        contexts = encode([context for _, context in pairs])
        template = self.tokenizer.template(True)
        n_special = offsets.n_special_tokens(template)
        firsts, seconds, spans = [], [], []
        for i, (question, context) in enumerate(zip(questions, contexts, strict=True), start=number):
            capacity = self.max_length - n_special - len(question.ids)
            if capacity <= self.stride:
                raise ValueError(
                    f"questions[{i}]: has {len(question.ids)} tokens, which leaves room for {max(capacity, 0)} of the "
                    f"context with max_length = {self.max_length}, expected more than stride = {self.stride}"
                )
            some = overlapping(len(context.ids), capacity, self.stride)
            spans.append(some)
            firsts += [question.ids] * len(some)
            seconds += [context.ids[first:last] for first, last in some]
        packed = offsets.pack(template, firsts, seconds)
        logits = token_logits(self.model, packed, self.token_budget)
        rows, row = packed.cu_seqlens.tolist(), 0
        before = offsets.n_special_tokens(template, 1)
        for question, context, some in zip(questions, contexts, spans, strict=True):
            places = places_of_words(context) if self.whole_words else context.offsets
            windows = []
            for first, last in some:
                start = rows[row] + before + len(question.ids)
                mine = logits[start : start + last - first]
                null = logits[rows[row]].tolist()  # the classification token begins the row
                windows.append(_Window(mine[:, 0], mine[:, 1], (null[0], null[1]), places[first:last]))
                row += 1
            yield windows

    def _best(self, windows: list[_Window], context: str) -> list[Answer]:
        answers: dict[str, Answer] = {}
        n_spans = 2 * self.top_k + 10 if self.whole_words else self.top_k  # spans may turn out to be of the same words
        null_score, null_logits, best_logits = 1.0, np.inf, -np.inf
        for window in windows:
            start = softmax(np.concatenate([[window.null[0]], window.start]))
            end = softmax(np.concatenate([[window.null[1]], window.end]))
            null_score = min(null_score, float(start[0] * end[0]))
            null_logits = min(null_logits, sum(window.null))  # as in SQuAD's scripts
            sums: dict[str, Answer] = {}
            for i, j in best_spans(start[1:], end[1:], self.max_answer_length, n_spans):
                best_logits = max(best_logits, float(window.start[i] + window.end[j]))
                first, last = int(window.places[i, 0]), int(window.places[j, 1])
                text, score = context[first:last], float(start[1 + i] * end[1 + j])
                same = sums.setdefault(text.lower(), {"score": 0.0, "start": first, "end": last, "answer": text})
                same["score"] += score
            for key, answer in sums.items():
                if key not in answers or answers[key]["score"] < answer["score"]:
                    answers[key] = answer
        ranked = sorted(answers.values(), key=lambda answer: -answer["score"])
        if self.no_answer:
            nothing = {"score": null_score, "start": 0, "end": 0, "answer": ""}
            if self.threshold is None:
                ranked = sorted([*ranked, nothing], key=lambda answer: -answer["score"])
            elif null_logits - best_logits > self.threshold:
                ranked = [nothing, *ranked]
            else:
                ranked = [*ranked, nothing]
        return ranked[: self.top_k]


def best_spans(start: np.ndarray, end: np.ndarray, longest: int, n: int) -> list[tuple[int, int]]:
    """Returns the (first, last) tokens, both included, of the spans with the highest start * end, the highest first.

    start, end: (n,) probabilities of the tokens of a context. longest: the greatest number of tokens in a span. n: the
    greatest number of spans.
    """
    if not len(start):
        return []
    # Row i holds the spans that begin with token i: (n, longest).
    width = min(longest, len(start))
    ends = np.concatenate([end, np.full(width - 1, -1.0, end.dtype)])
    products = start[:, None] * np.lib.stride_tricks.sliding_window_view(ends, width)
    flat = np.where(np.arange(len(start))[:, None] + np.arange(width) < len(start), products, -1.0).ravel()
    top = np.argpartition(-flat, n)[:n] if len(flat) > n else np.arange(len(flat))
    top = top[np.argsort(-flat[top], kind="stable")]
    return [(int(i // width), int(i // width + i % width)) for i in top if flat[i] >= 0]


def places_of_words(tokens: offsets.TokenizedText) -> np.ndarray:
    """Returns (n, 2) characters: the start and end of each token's word, or of a token outside words."""
    if not tokens.ids:
        return tokens.offsets
    starts = tokens.starts_of_words()
    firsts = np.flatnonzero(starts)
    lasts = np.concatenate([firsts[1:], [len(starts)]]) - 1
    number = np.cumsum(starts) - 1
    return np.stack([tokens.offsets[firsts, 0][number], tokens.offsets[lasts, 1][number]], 1)
