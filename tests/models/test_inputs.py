"""The arguments that all forwards share are described once, and taken as transformers takes them."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import transformers

import fastbert
from fastbert.models.inputs import HARMLESS, REFUSED, Inputs

NAMES = [name for name in fastbert.__all__ if name.startswith("Bert") and name != "BertConfig"]


def make(name: str) -> Any:
    config = fastbert.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, num_labels=2
    )
    return getattr(fastbert, name)(config).eval()


@pytest.mark.parametrize("name", NAMES)
def test_the_order_is_that_of_transformers(name: str) -> None:
    """Catches an argument by position that means something else than in transformers, or has no name."""
    ours = inspect.signature(getattr(fastbert, name).forward).parameters
    theirs = inspect.signature(getattr(transformers, name).forward).parameters
    positional = [key for key, value in ours.items() if value.kind is value.POSITIONAL_OR_KEYWORD]
    assert positional == [key for key in theirs if key not in REFUSED][: len(positional)]
    assert {"output_attentions", "output_hidden_states", "return_dict", *HARMLESS, *REFUSED} <= set(ours)


def test_arguments_by_position_and_by_name() -> None:
    """Catches labels that are taken for embeddings, an argument given twice, and a name that nobody knows."""
    model, ids = make("BertForTokenClassification"), torch.ones(2, 4, dtype=torch.int64)
    labels = torch.zeros(2, 4, dtype=torch.int64)
    by_name = model(input_ids=ids, labels=labels)
    assert torch.equal(model(ids, None, None, None, None, labels).loss, by_name.loss)
    with pytest.raises(TypeError, match="multiple values for argument 'input_ids'"):
        model(ids, input_ids=ids)
    with pytest.raises(TypeError, match="unexpected keyword argument 'labelz'"):
        model(ids, labelz=labels)
    with pytest.raises(TypeError, match="takes 6 positional arguments"):
        model(ids, None, None, None, None, labels, None)
    assert isinstance(model(ids, return_dict=False), tuple)


def test_choices_become_sequences() -> None:
    """Catches choices that are flattened in one argument and not in another, and flags that get lost."""
    inputs = Inputs(torch.ones(2, 3, 4), torch.ones(2, 3, 4), output_hidden_states=True)
    flat = inputs.flattened()
    assert [None if x is None else tuple(x.shape) for x in flat.tensors()] == [(6, 4), (6, 4), None, None, None]
    assert flat.output_hidden_states is True
