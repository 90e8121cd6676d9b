"""The reference draws the masks that the description says; they are random enough, and models draw the same."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import BertConfig, BertForSequenceClassification, BertModel, reference
from fastbert.ops import dropout as ops_dropout
from fastbert.reference.dropout import EMBEDDINGS, Dropout, drop_rows, philox4x32
from fastbert_kernels import masks
from helpers import rms_error
from reference_cases import error, randn

# Of Random123 1.14, tests/kat_vectors: rounds, counter, key, result.
KNOWN = [
    (7, "00000000 00000000 00000000 00000000", "00000000 00000000", "5f6fb709 0d893f64 4f121f81 4f730a48"),
    (7, "ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "5207ddc2 45165e59 4d8ee751 8c52f662"),
    (10, "00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (10, "243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
BIG = (1 << 62) + 12345678901  # a seed of which both words are used


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("rounds", "counter", "key", "result"), KNOWN)
def test_known_answers(rounds: int, counter: str, key: str, result: str) -> None:
    """Catches a generator that is not Philox4x32, or whose words or rounds are in another order."""
    k0, k1 = words(key)
    ours = philox4x32(np.array(words(counter), dtype=np.uint32), (k0, k1), rounds)
    assert ours.dtype == np.uint32 and ours.tolist() == words(result)
    many = philox4x32(np.array([[words(counter)] * 3] * 2, dtype=np.uint32), (k0, k1), rounds)
    assert many.shape == (2, 3, 4) and (many == ours).all()


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9999, 1.0])
@pytest.mark.parametrize(("seed", "site"), [(0, 0), (7, 5), (BIG, EMBEDDINGS), ((1 << 32) - 1, 1 << 20)])
def test_masks_are_those_of_the_operations(p: float, seed: int, site: int) -> None:
    """Catches a mask of the oracle, or of the operations, that differs in one element."""
    ours, drop = Dropout(p, seed, site), masks.Dropout(masks.threshold_of(p), seed, site)
    rows = torch.tensor([0, 3, 17, 65_536, (1 << 31) - 1])
    keep = ops_dropout.keep(rows, 37, drop)
    assert torch.equal(ours.factors(rows[:, None], torch.arange(37)), keep.double() * drop.scale)
    rows = torch.tensor([[4, 5, 6], [9, 10, 11]])
    keep = ops_dropout.keep(rows, 13, drop, num_heads=3)
    heads = torch.arange(3)[None, :, None, None]
    factors = ours.factors(rows[:, None, :, None], torch.arange(13)[None, None, None], heads)
    assert torch.equal(factors, keep.double() * drop.scale)


def test_sites_are_those_of_the_operations() -> None:
    """Catches sites of the oracle that are not those of the models."""
    from fastbert.reference import dropout

    assert masks.EMBEDDINGS == dropout.EMBEDDINGS and masks.SITES_A_LAYER == 4
    kinds = masks.ATTENTION, masks.ATTENTION_OUTPUT, masks.OUTPUT
    assert kinds == (dropout.PROBABILITIES, dropout.ATTENTION_OUTPUT, dropout.OUTPUT)


# Statistics. All seeds are fixed, so these tests give the same result wherever they run.


def excess(statistic: float, degrees: int) -> float:
    """How many standard deviations a chi-square statistic is off (Wilson and Hilferty, 1931)."""
    variance = 2 / (9 * degrees)
    return ((statistic / degrees) ** (1 / 3) - (1 - variance)) / math.sqrt(variance)


def dependence(a: np.ndarray, b: np.ndarray) -> float:
    """The chi-square statistic of a table of two kinds of outcomes, with one degree of freedom."""
    table = np.array([[np.sum(a & b), np.sum(a & ~b)], [np.sum(~a & b), np.sum(~a & ~b)]], dtype=float)
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / table.sum()
    return float(((table - expected) ** 2 / expected).sum())


def kept(p: float, seed: int, site: int, rows: int, columns: int, heads: int = 1) -> np.ndarray:
    """(heads, rows, columns) bool."""
    head, row, column = np.ix_(np.arange(heads), np.arange(rows), np.arange(columns))
    return Dropout(p, seed, site).numbers(row, column, head) >= round(p * 2**16)


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_rate(p: float) -> None:
    """Catches a share of dropped elements that is not p, over all, or in some rows, columns, heads or layers."""
    whole = np.stack([kept(p, BIG + seed, site, 96, 160, 4) for seed, site in ((0, 0), (1, 4), (2, 8), (3, 1))])
    rate = 1 - round(p * 2**16) / 2**16
    for axes in ((0, 1, 2, 3), (0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3)):
        counts = np.atleast_1d(whole.sum(axes))
        n = whole.size / counts.size
        statistic = float((((counts - n * rate) ** 2) / (n * rate * (1 - rate))).sum())
        assert abs(excess(statistic, counts.size)) < 3.5, axes


def test_numbers_are_uniform() -> None:
    """Catches numbers of 16 bits of which some come too often, as bits that two numbers share make them."""
    head, row, column = np.ix_(np.arange(3), np.arange(200), np.arange(200))
    numbers = Dropout(0.5, BIG, 3).numbers(row, column, head).ravel()
    assert numbers.max() < 2**16
    for byte in (numbers >> 8, numbers & 255):
        counts = np.bincount(byte.astype(np.int64), minlength=256)
        expected = numbers.size / 256
        assert abs(excess(float(((counts - expected) ** 2 / expected).sum()), 255)) < 3.5


def neighbours(p: float) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Pairs of masks that should have nothing to do with one another."""
    mask = kept(p, BIG, 4, 120, 160, 8)
    for lag in (1, 2, 3, 4, 5, 6, 7, 8, 16, 64):
        yield f"columns {lag} apart", mask[:, :, lag:], mask[:, :, :-lag]
    for lag in (1, 2, 7, 64):
        yield f"rows {lag} apart", mask[:, lag:], mask[:, :-lag]
    for lag in (1, 2, 4):
        yield f"heads {lag} apart", mask[lag:], mask[:-lag]
    for site in (0, 1, 2, 3, 5, 6, 8, 12, EMBEDDINGS):
        yield f"sites 4 and {site}", mask, kept(p, BIG, site, 120, 160, 8)
    for seed in (BIG + 1, BIG - 1, BIG + (1 << 32), BIG ^ 1 << 20, BIG >> 32, 0, 1):
        yield f"seeds {BIG} and {seed}", mask, kept(p, seed, 4, 120, 160, 8)
    square = kept(p, BIG, 4, 120, 120, 8)
    yield "a mask and its transpose", square, square.transpose(0, 2, 1)
    yield "heads and rows", kept(p, BIG, 4, 8, 160, 8), kept(p, BIG, 4, 8, 160, 8).transpose(1, 0, 2)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_independence(p: float) -> None:
    """Catches masks that follow one another: between columns, rows, heads, layers, kinds of dropout, or seeds."""
    statistics = {}
    for name, a, b in neighbours(p):
        different = a.copy()
        if name in ("a mask and its transpose", "heads and rows"):
            i = np.arange(a.shape[1])
            different = np.broadcast_to(
                (i[:, None] < i) if "transpose" in name else (i[:, None] < i)[..., None], a.shape
            )
            statistics[name] = dependence(a[different], b[different])
        else:
            statistics[name] = dependence(a, b)
    worst = max(statistics, key=lambda name: statistics[name])
    assert statistics[worst] < 13, worst  # 3.6 standard deviations
    assert abs(excess(sum(statistics.values()), len(statistics))) < 3


def test_dependence_is_noticed() -> None:
    """Catches a test of independence that would pass whatever the masks are."""
    a, b = kept(0.1, 1, 0, 100, 160)[0], kept(0.1, 2, 0, 100, 160)[0]
    mixed = np.where(kept(0.95, 3, 0, 100, 160)[0], a, b)  # follows a in one element of twenty
    assert dependence(a, b) < 13 < dependence(a, mixed)


# Whole models


def make(cls: Any = BertModel, backend: str = "auto", **changes: Any) -> Any:
    sizes = {"vocab_size": 101, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3,
             "intermediate_size": 64, "max_position_embeddings": 40, "initializer_range": 0.2,
             "hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3}  # fmt: skip
    return cls(BertConfig(**{**sizes, **changes}), backend=backend).train()


MASK = (torch.arange(12) < torch.tensor([[12], [5], [0], [9], [1]])).long()
HOLES = MASK.clone()
HOLES[0, 3:6] = 0
IDS = torch.randint(1, 100, MASK.shape, generator=torch.Generator().manual_seed(3))


def seed_of_next_batch() -> int:
    """The seed that the next batch draws, which leaves the generator as it is."""
    state = torch.get_rng_state()
    seed = int(torch.randint(1 << 62, (), dtype=torch.int64))
    torch.set_rng_state(state)
    return seed


@pytest.mark.parametrize("mask", [MASK, HOLES], ids=["right", "holes"])
@pytest.mark.parametrize("model_type", ["bert", "electra", "roberta"])
def test_a_training_forward_is_the_oracles(model_type: str, mask: Tensor) -> None:
    """Catches a dropout of the model at another place, with another mask or another scale than the oracle's."""
    changes = {"embedding_size": 32} if model_type == "electra" else {}
    model = make(model_type=model_type, pad_token_id=0, **changes).double()
    params = dict(model.named_parameters())
    seeds = []
    for _ in range(2):
        seeds.append(seed_of_next_batch())
        ours = model(IDS, mask, output_hidden_states=True)
        exact = reference.bert(params, model.config, IDS, mask, dropout_seed=seeds[-1])
        assert error(ours.last_hidden_state, exact.last_hidden_state) < 1e-10
        for state, expected in zip(ours.hidden_states, exact.hidden_states, strict=True):
            assert error(state, expected) < 1e-10
    assert seeds[0] != seeds[1]
    without = reference.bert(params, model.config, IDS, mask)
    assert error(exact.last_hidden_state, without.last_hidden_state) > 0.1


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_gradients_with_dropout_are_the_oracles(backend: str) -> None:
    """Catches a backward pass that drops other elements than the forward pass did, with the kernels of a CPU too."""
    model = make(BertForSequenceClassification, backend, classifier_dropout=0.0)
    labels = torch.tensor([0, 1, 1, 0, 1])
    seed = seed_of_next_batch()
    model(IDS, MASK, labels=labels).loss.backward()
    params = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    exact = reference.head("sequence_classification", params, model.config, IDS, MASK, dropout_seed=seed)
    F.cross_entropy(exact["logits"], labels).backward()
    for name, parameter in model.named_parameters():
        gradient = params[name].grad
        assert gradient is not None and parameter.grad is not None
        if not name.endswith("key.bias"):  # zero but for rounding
            assert rms_error(parameter.grad, gradient) < 1e-4, name


def test_probability_of_zero_changes_nothing() -> None:
    """Catches a scale where nothing is dropped, and dropout without a seed."""
    model = make(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).double()
    params = dict(model.named_parameters())
    with_seed = reference.bert(params, model.config, IDS, MASK, dropout_seed=5)
    assert torch.equal(with_seed.last_hidden_state, reference.bert(params, model.config, IDS, MASK).last_hidden_state)
    x = randn(3, 5)
    assert torch.equal(drop_rows(x, None), x) and torch.equal(drop_rows(x, Dropout(1.0, 3, 3)), 0 * x)


def test_operations_with_dropout() -> None:
    """Catches dropout after the residual, or masks of packed sequences that begin anew in each."""
    x, residual, bias, weight, ln_bias = randn(9, 33), randn(9, 33, seed=1), *randn(3, 33, seed=2)
    drop = Dropout(0.3, BIG, 9)
    factors = drop.factors(torch.arange(9)[:, None], torch.arange(33))
    ours = reference.bias_residual_layer_norm(x, bias, residual, weight, ln_bias, 1e-5, drop)
    assert error(ours, F.layer_norm((x + bias) * factors + residual, (33,), weight, ln_bias, 1e-5)) < 1e-12
    qkv, offsets = randn(9, 48), torch.tensor([0, 4, 4, 9])
    ours = reference.varlen_attention(qkv, offsets, 2, dropout=drop)
    second = qkv[4:].unflatten(1, (3, 2, 8)).permute(1, 2, 0, 3)
    p = torch.softmax(second[0] @ second[1].transpose(1, 2) * 8**-0.5, -1)
    p = p * drop.factors(torch.arange(4, 9)[None, :, None], torch.arange(5), torch.arange(2)[:, None, None])
    assert error(ours[4:], (p @ second[2]).transpose(0, 1).flatten(1)) < 1e-12
