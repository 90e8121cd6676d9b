"""A batch has the layout of BERT, and the masks of its seed, step and place."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
import torch

from corpus_cases import SPECIAL, ListedCorpus, corpus_of, random_corpus
from fastbert.training.data import batch as batch_module
from fastbert.training.data.batch import EVALUATION, Batch, Masking, make_batch
from fastbert.training.data.examples import Examples
from fastbert.training.data.full_sentences import full_sentence_examples
from fastbert.training.data.pairs import next_sentence_examples


def batch_of(corpus: ListedCorpus, examples: Examples, **options: object) -> Batch:
    options = {"seed": 1, "step": 0, "first_token": 0, "masking": Masking()} | options
    return make_batch(corpus, examples, SPECIAL, **options)


def unmasked(batch: Batch) -> list[int]:
    ids = batch.input_ids.copy()
    ids[batch.rows] = batch.labels
    return ids.tolist()


def test_layout_is_that_of_bert() -> None:
    """Catches a [CLS] or [SEP] at a wrong place, a wrong token type, and a next-sentence label the wrong way round."""
    corpus = corpus_of([[3, 2], [4], [2]])
    starts, lengths = np.array([0, 3, 5, 9, 0]), np.array([3, 2, 4, 2, 2])
    segments = np.array([0, 1, 0, 0, 1])
    is_next = np.array([1, -1, 0], np.int8)
    examples = Examples(starts, lengths, segments, np.array([0, 2, 3, 5]), is_next, np.array([0, 1, 2]))
    batch = batch_of(corpus, examples)
    c, s = SPECIAL.cls, SPECIAL.sep
    assert unmasked(batch) == [c, 5, 6, 7, s, 8, 9, s, c, 10, 11, 12, 13, s, c, 14, 15, s, 5, 6, s]
    assert batch.token_type_ids.tolist() == [0] * 5 + [1] * 3 + [0] * 6 + [0] * 4 + [1] * 3
    assert batch.cu_seqlens.tolist() == [0, 8, 14, 21] and batch.cu_seqlens.dtype == np.int32
    assert batch.next_sentence_label.tolist() == [0, -100, 1]
    assert batch.documents.tolist() == [0, 1, 2]
    assert (batch.n_tokens, batch.n_pairs) == (21, 2)
    for name in ("input_ids", "token_type_ids", "rows", "labels", "next_sentence_label", "documents"):
        assert getattr(batch, name).dtype == np.int64, name


def test_several_spans_of_one_token_type() -> None:
    """Catches a sequence across documents that has no [SEP] between them."""
    corpus = corpus_of([[2], [1], [3]])
    examples = full_sentence_examples(corpus, range(3), seed=0, epoch=0, max_length=16)
    batch = batch_of(corpus, examples)
    c, s = SPECIAL.cls, SPECIAL.sep
    assert unmasked(batch) == [c, 5, 6, s, 7, s, 8, 9, 10, s]
    assert not batch.token_type_ids.any() and batch.n_pairs == 0


def test_special_tokens_of_the_text_stay() -> None:
    """Catches an [UNK] in the text that has to be predicted, and a random token that is special."""
    random = np.random.default_rng(0)
    corpus = ListedCorpus([[random.integers(0, 8, 400).tolist()] for _ in range(50)], 8)
    examples = full_sentence_examples(corpus, range(50), seed=0, epoch=0, max_length=128)
    batch = batch_of(corpus, examples, masking=Masking(0.5))
    assert set(batch.labels.tolist()) == {5, 6, 7}
    assert set(batch.input_ids[batch.rows].tolist()) == {SPECIAL.mask, 5, 6, 7}
    only_special = ListedCorpus([[[0, 1, 2, 4]]], 8)
    examples = full_sentence_examples(only_special, [0], seed=0, epoch=0, max_length=128)
    assert len(batch_of(only_special, examples).rows) == 0


def test_masks_follow_from_seed_step_and_place() -> None:
    """Catches masks that another batch of the step changes, or that come again in the next step or epoch."""
    corpus = random_corpus(30)
    examples = next_sentence_examples(corpus, range(30), seed=0, epoch=0, max_length=64)
    batch, again = batch_of(corpus, examples), batch_of(corpus, examples)
    for name in Batch.__dataclass_fields__:
        assert np.array_equal(getattr(batch, name), getattr(again, name)), name
    for options in ({"seed": 2}, {"step": 1}, {"first_token": 64}, {"step": EVALUATION}):
        other = batch_of(corpus, examples, **options)
        assert not np.array_equal(batch.rows, other.rows)
        assert unmasked(batch) == unmasked(other)


def test_whole_words_come_from_the_corpus() -> None:
    """Catches starts of words that are shifted by the special tokens, or asked of a corpus without them."""
    corpus = random_corpus(30, words=True)
    examples = next_sentence_examples(corpus, range(30), seed=0, epoch=0, max_length=64)
    batch = batch_of(corpus, examples, masking=Masking(whole_words=True))
    chosen = np.isin(np.arange(batch.n_tokens), batch.rows)[np.array(unmasked(batch)) >= 5]
    spans = np.repeat(np.arange(len(examples.starts)), examples.lengths)
    goes_on = (spans[1:] == spans[:-1]) & ~corpus.word_starts(examples.starts, examples.lengths)[1:]
    assert goes_on.any() and np.array_equal(chosen[1:][goes_on], chosen[:-1][goes_on])
    with pytest.raises(ValueError, match="whole_words"):
        batch_of(random_corpus(3), examples.take([0]), masking=Masking(whole_words=True))
    with pytest.raises(ValueError, match="probability"):
        Masking(0.0)


def test_tensors_are_the_arrays() -> None:
    """Catches a copy of a batch, or a tensor of another dtype."""
    corpus = random_corpus(4)
    batch = batch_of(corpus, next_sentence_examples(corpus, range(4), seed=0, epoch=0, max_length=64))
    tensors = batch.tensors()
    assert sorted(tensors) == sorted(Batch.__dataclass_fields__)
    assert tensors["cu_seqlens"].dtype == torch.int32 and tensors["input_ids"].dtype == torch.int64
    assert all(tensors[name].data_ptr() == getattr(batch, name).ctypes.data for name in tensors)


def test_data_needs_no_pytorch() -> None:
    """Catches PyTorch in the processes that only read and tokenise text, which would take longer to start."""
    folder = Path(batch_module.__file__).parent
    modules = set()
    for path in folder.glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                modules |= {(path.name, alias.name.split(".")[0]) for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                modules.add((path.name, (node.module or "").split(".")[0]))
    assert ("batch.py", "numpy") in modules
    assert [name for name, module in sorted(modules) if module == "torch"] == []


def test_ids_outside_of_the_vocabulary_raise() -> None:
    """Catches a corpus of another tokenizer, whose ids would read outside of the embedding."""
    corpus = ListedCorpus([[[5, 6, 70]]], 10)
    examples = full_sentence_examples(corpus, [0], seed=0, epoch=0, max_length=16)
    with pytest.raises(ValueError, match="70"):
        batch_of(corpus, examples)
