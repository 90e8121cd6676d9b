"""The loop makes one update of a step's batches, reads its numbers in order, and stops where it should."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fastbert import BertConfig, BertForPreTraining
from fastbert.training.data.batch import Batch
from fastbert.training.distributed import Processes
from fastbert.training.loop import Loop, State, StepReport, dropout_seed
from fastbert.training.objective import PretrainingObjective

SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 64, "max_position_embeddings": 16}  # fmt: skip
ALONE = Processes(0, 1, 0, torch.device("cpu"))


def sequence(generator: np.random.Generator) -> Batch:
    """A batch of one sequence with a masked token or two."""
    n = int(generator.integers(4, 15))
    rows = np.sort(generator.choice(n, int(generator.integers(1, 3)), replace=False))
    return Batch(
        input_ids=generator.integers(0, 50, n),
        token_type_ids=generator.integers(0, 2, n),
        cu_seqlens=np.array([0, n], np.int32),
        rows=rows,
        labels=generator.integers(0, 50, len(rows)),
        next_sentence_label=generator.choice([0, 1, -100], 1),
        documents=generator.integers(0, 1000, 1),
    )


def joined(batches: list[Batch]) -> Batch:
    """One batch of the sequences of several."""
    starts = np.cumsum([0, *(batch.n_tokens for batch in batches)])
    arrays = {name: np.concatenate([getattr(b, name) for b in batches]) for name in Batch.__dataclass_fields__}
    arrays["cu_seqlens"] = starts.astype(np.int32)
    arrays["rows"] = np.concatenate([batch.rows + start for batch, start in zip(batches, starts, strict=False)])
    return Batch(**arrays)


def data(steps: Iterable[list[Batch]]) -> Iterator[Any]:
    """What a loader yields, for the batches of each step."""
    for step, batches in enumerate(steps):
        yield SimpleNamespace(step=step, batches=batches, after=SimpleNamespace(epoch=0))


def model(**fields: Any) -> BertForPreTraining:
    torch.manual_seed(0)
    return BertForPreTraining(BertConfig(**SIZES, **fields))


def loop(trained: BertForPreTraining, steps: Iterable[list[Batch]], n_steps: int, **parts: Any) -> Loop:
    """A loop whose parts do nothing but where they are named."""
    fields: dict[str, Any] = {
        "objective": PretrainingObjective(trained),
        "optimizer": torch.optim.SGD(trained.parameters(), lr=0.1),
        "steps_of_data": data(steps),
        "processes": ALONE,
        "learning_rate": lambda step: 0.1,
        "steps": n_steps,
        "seed": 0,
        "clip": 0.0,
        "after_step": lambda state, report: None,
        "at_rest": lambda state: None,
        "is_due": lambda step: False,
        "counts_right": lambda step: False,
    }
    return Loop(**{**fields, **parts})


def steps_of_eight(n: int) -> list[list[Batch]]:
    generator = np.random.default_rng(0)
    return [[sequence(generator) for _ in range(8)] for _ in range(n)]


def test_eight_batches_of_one_are_one_batch_of_eight() -> None:
    """Catches losses that are means of batches, in whose mean a sequence counts more where its batch is small."""
    steps = steps_of_eight(3)
    dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    reports: list[list[StepReport]] = []
    weights = []
    for batches in (steps, [[joined(batches)] for batches in steps]):
        trained = model(**dropouts)
        reports.append([])
        loop(trained, batches, 3, after_step=lambda state, report: reports[-1].append(report)).run(State())
        weights.append([p.detach() for p in trained.parameters()])
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    for one, other in zip(*reports, strict=True):
        assert one.norm == pytest.approx(other.norm, rel=1e-5)
        assert one.scores.loss == pytest.approx(other.scores.loss, rel=1e-6)


def test_numbers_of_steps_come_in_order_and_before_a_rest() -> None:
    """Catches an evaluation or a checkpoint that comes before the numbers of its step were looked at."""
    seen: list[Any] = []
    loop(
        model(), steps_of_eight(5), 5,
        after_step=lambda state, report: seen.append(report.step),
        at_rest=lambda state: seen.append(f"rest {state.step}"),
        is_due=lambda step: step == 2,
    ).run(State())  # fmt: skip
    assert seen == [1, 2, "rest 2", 3, 4, 5, "rest 5"]


def test_tokens_are_counted() -> None:
    """Catches counts that are those of another step."""
    steps, tokens = steps_of_eight(3), []
    state = loop(model(), steps, 3, after_step=lambda s, report: tokens.append(report.tokens_so_far)).run(State())
    expected = np.cumsum([sum(batch.n_tokens for batch in batches) for batches in steps]).tolist()
    assert tokens == expected and state.tokens == expected[-1]


def test_a_wish_to_stop_ends_after_the_step() -> None:
    """Catches a loop that goes on, or stops without a rest, in which the run is saved."""
    wishes, rests = iter([False, True, True]), []
    state = loop(model(), steps_of_eight(5), 5, stop=lambda: next(wishes), at_rest=lambda s: rests.append(s.step))
    assert state.run(State()).step == 2 and rests == [2]


def test_clipping_bounds_the_update() -> None:
    """Catches a norm that is not clipped, or is clipped before it is reported."""
    trained = model()
    before = copy.deepcopy(trained)
    norms: list[float] = []
    loop(trained, steps_of_eight(1), 1, clip=1e-3, after_step=lambda s, report: norms.append(report.norm)).run(State())
    moved = [(p - q).norm() for p, q in zip(trained.parameters(), before.parameters(), strict=True)]
    assert norms[0] > 0.1
    torch.testing.assert_close(torch.stack(moved).norm(), torch.tensor(1e-4), rtol=0.01, atol=0.0)


def test_learning_rate_is_that_of_the_step() -> None:
    """Catches a schedule that is a step late."""
    rates: list[float] = []
    seen = loop(
        model(), steps_of_eight(3), 3,
        learning_rate=lambda step: step / 10,
        after_step=lambda state, report: rates.append(report.learning_rate),
    )  # fmt: skip
    seen.run(State())
    assert rates == [0.0, 0.1, 0.2]


def test_seeds_of_dropout_differ() -> None:
    """Catches masks of dropout that repeat in the batches of a step, in steps, or for seeds beside each other."""
    seeds = {dropout_seed(seed, step, i) for seed in range(8) for step in range(32) for i in range(8)}
    assert len(seeds) == 8 * 32 * 8 and all(0 <= seed < 2**62 for seed in seeds)
