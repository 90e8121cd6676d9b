"""Fixtures of tokenizers: ours and transformers' on the files of MiniLM, and texts for both."""

from __future__ import annotations

import pytest
from transformers import BertTokenizerFast

from fastbert.text.tokenizer import Tokenizer
from helpers import docstrings, minilm_folder
from tokenizer_cases import NASTY


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    """Our tokenizer, not to be changed."""
    return Tokenizer.from_pretrained(minilm_folder())


@pytest.fixture(scope="module")
def theirs() -> BertTokenizerFast:
    """The tokenizer of transformers, not to be changed."""
    return BertTokenizerFast.from_pretrained(minilm_folder())


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Docstrings of Python, and texts at which tokenizers differ."""
    return docstrings(500) + NASTY
