"""Inputs of an encoder are strings, pairs of them or dicts with `text`, in lists, arrays or columns of tables."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import Any

import numpy as np
import torch

from fastbert.checks import check_text
from fastbert.pipelines.pipeline import PackingTokenizer
from fastbert.text.encoding import PackedEncoding


class Pair(str):
    """A Pair is the first of two texts that form one input. `second` is the other."""

    __slots__ = ("second",)
    second: str

    def __new__(cls, first: str, second: str) -> Pair:
        pair = super().__new__(cls, first)
        pair.second = second
        return pair


def as_texts(texts: Any, name: str = "sentences") -> tuple[Iterable[str], bool]:
    """Returns the texts, some of which may be a `Pair`, and whether the input was a single text.

    Raises TypeError with the index of an input that is no text. For an iterator it raises when it gets there.
    """
    if isinstance(texts, np.ndarray):
        texts = texts.tolist()
    if isinstance(texts, str):
        return [texts], True
    if isinstance(texts, dict):
        return [_text(texts, name)], True
    if hasattr(texts, "to_pylist"):  # a column of Arrow, whose items are no str
        texts = texts.to_pylist()
    if isinstance(texts, bytes) or not isinstance(texts, Iterable):
        raise TypeError(f"{name}: got {type(texts).__name__}, expected a str or an iterable of str")
    if hasattr(texts, "columns") or hasattr(texts, "column_names"):
        # Iteration over one gives the names of its columns, or its rows.
        raise TypeError(f"{name}: got {type(texts).__name__}, expected a str or an iterable of str: one of its columns")
    if isinstance(texts, (list, tuple)):
        if not set(map(type, texts)) <= {str}:
            texts = [_text(text, f"{name}[{i}]") for i, text in enumerate(texts)]
        return texts, False
    return (_text(text, f"{name}[{i}]") for i, text in enumerate(texts)), False


def _text(item: Any, name: str) -> str:
    if isinstance(item, str):
        return item
    if isinstance(item, dict):
        if set(item) != {"text"}:
            keys = ", ".join(map(repr, item)) or "none"
            raise TypeError(f"{name}: got dict, expected str, or a dict with the key 'text' alone: its keys are {keys}")
        return _text(item["text"], f"{name}['text']")
    if isinstance(item, (list, tuple)):
        if len(item) != 2 or not all(isinstance(text, str) for text in item):
            type_names = ", ".join(type(text).__name__ for text in item[:3])
            raise TypeError(
                f"{name}: got {type(item).__name__} of {len(item)} ({type_names}), expected str or two of them"
            )
        check_text(f"{name}[1]", item[1])
        return Pair(*item)
    raise TypeError(f"{name}: got {type(item).__name__}, expected str")


def encode_texts(tokenizer: PackingTokenizer, texts: list[str], prompt: str, max_length: int) -> PackedEncoding:
    """Encodes texts, some of which may be a `Pair`, end to end. The prompt is in front of the first text of a pair."""
    if Pair not in set(map(type, texts)):
        prompted = [prompt + text for text in texts] if prompt else texts
        return tokenizer.encode_packed(prompted, max_length=max_length, warn=False)
    parts = []
    for paired, group in groupby(texts, lambda text: isinstance(text, Pair)):
        items: list[Any] = list(group)
        firsts = [prompt + str(text) for text in items]
        seconds = [pair.second for pair in items] if paired else None
        parts.append(tokenizer.encode_packed(firsts, seconds, max_length=max_length, warn=False))
    return _joined(parts)


def n_prompt_tokens(tokenizer: PackingTokenizer, prompt: str, max_length: int) -> int:
    """Returns the number of tokens that a prompt puts at the start of a text, special tokens there included."""
    ids = tokenizer.encode_packed([prompt], max_length=max_length, warn=False).input_ids
    return len(ids) - int(ids[-1].item() in tokenizer.all_special_ids)


def _joined(parts: list[PackedEncoding]) -> PackedEncoding:
    """Returns all the sequences as one encoding."""
    ends, offset = [torch.zeros(1, dtype=torch.int32)], 0
    for part in parts:
        ends.append(part.cu_seqlens[1:] + offset)
        offset += len(part.input_ids)
    return PackedEncoding(
        torch.cat([part.input_ids for part in parts]),
        torch.cat([part.token_type_ids for part in parts]),
        torch.cat(ends),
        sum(part.n_truncated for part in parts),
        sum(part.n_truncated_tokens for part in parts),
    )
