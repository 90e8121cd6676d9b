"""A plan sees each document once an epoch, wherever it begins, and keeps its budgets."""

from __future__ import annotations

import json
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus_cases import ListedCorpus, assert_same_examples, corpus_of, random_corpus
from fastbert.training.data import plan as plan_module
from fastbert.training.data.dealing import batches_of, deal, halved
from fastbert.training.data.examples import Examples
from fastbert.training.data.full_sentences import full_sentence_examples
from fastbert.training.data.plan import BLOCK_STEPS, Cursor, Plan, PlanStep


def plan_of(corpus: ListedCorpus, **options: object) -> Plan:
    options = {"seed": 1, "tokens_per_step": 512, "tokens_per_batch": 128, "max_length": 64} | options
    return Plan(corpus, **options)


def epoch_of(plan: Plan, cursor: Cursor | None = None) -> list[PlanStep]:
    """The steps from a cursor to the end of its epoch."""
    steps = []
    for step in islice(plan.steps(cursor), 5000):
        steps.append(step)
        if step.after.epoch != step.cursor.epoch:
            return steps
    raise AssertionError


def assert_same_steps(one: list[PlanStep], other: list[PlanStep]) -> None:
    assert [(s.cursor, s.after, s.first_tokens) for s in one] == [(s.cursor, s.after, s.first_tokens) for s in other]
    for a, b in zip(one, other, strict=True):
        for batch_a, batch_b in zip(a.batches, b.batches, strict=True):
            assert_same_examples(batch_a, batch_b)


def own_tokens(steps: list[PlanStep]) -> np.ndarray:
    """The tokens of the text that the examples were made of; random parts are left out."""
    tokens = []
    for examples in (examples for step in steps for examples in step.batches):
        owners = np.repeat(examples.is_next, np.diff(examples.offsets))
        own = (owners != 0) | (examples.segments == 0)
        tokens += [
            np.arange(a, a + n)
            for a, n in zip(examples.starts[own].tolist(), examples.lengths[own].tolist(), strict=True)
        ]
    return np.concatenate(tokens)


@pytest.mark.parametrize("nsp", [False, True])
def test_an_epoch_sees_each_document_once(nsp: bool) -> None:
    """Catches a document that an epoch sees twice or never, or that is held out and seen."""
    corpus = random_corpus(700)
    plan = plan_of(corpus, nsp=nsp, held_out=30)
    assert plan.n_blocks > 3
    training = set(plan.documents.training(np.arange(670)).tolist())
    for epoch in range(2):
        steps = epoch_of(plan, Cursor(0, epoch))
        tokens = own_tokens(steps)
        assert len(np.unique(tokens)) == len(tokens)
        assert set(corpus.document_of(tokens).tolist()) == training
        if not nsp:
            assert len(tokens) == sum(np.diff(corpus.document_offsets)[sorted(training)])
        starts = np.concatenate([examples.starts for step in steps for examples in step.batches])
        assert set(corpus.document_of(starts).tolist()) == training


@pytest.mark.parametrize("nsp", [False, True])
def test_a_resumed_run_goes_on_as_if_nothing_had_happened(nsp: bool) -> None:
    """Catches a cursor that leads to other batches than the uninterrupted run has, in its epoch and the next."""
    plan = plan_of(random_corpus(400), nsp=nsp, held_out=10)
    n = 2 * len(epoch_of(plan)) + 5
    whole = list(islice(plan.steps(), n))
    assert [step.cursor.step for step in whole] == list(range(n))
    for i in {0, 1, n // 3, n // 2, n - 7, *(k for k in range(1, n) if whole[k].cursor.place == 0)}:
        cursor = Cursor.from_dict(json.loads(json.dumps(whole[i - 1].after.as_dict()))) if i else Cursor()
        assert cursor == whole[i].cursor
        assert_same_steps(
            list(islice(plan.steps(cursor), 4)),
            whole[i : i + 4][: n - i] + list(islice(plan.steps(whole[-1].after), max(0, 4 - (n - i)))),
        )


@pytest.mark.parametrize("nsp", [False, True])
def test_a_block_is_shuffled(nsp: bool) -> None:
    """Catches steps that are each a stretch of one document, and the same steps again in the next epoch."""
    corpus = corpus_of([[12] * 150] * 5)
    plan = plan_of(corpus, nsp=nsp)
    assert plan.n_blocks == 1
    first, second = epoch_of(plan), epoch_of(plan, Cursor(0, 1))
    for document in range(5):
        n = sum(any(document in batch.documents for batch in step.batches) for step in first)
        assert n > 0.6 * len(first)
    orders = [np.concatenate([batch.starts for step in steps for batch in step.batches]) for steps in (first, second)]
    assert len(orders[0]) != len(orders[1]) or (orders[0] == orders[1]).mean() < 0.2


def test_to_resume_costs_one_block() -> None:
    """Catches a resumed run that goes through the documents of the steps before."""
    corpus = random_corpus(2000)
    plan = plan_of(corpus, nsp=False)
    assert plan.n_blocks > 10
    corpus.asked.clear()
    next(plan.steps(Cursor(500, 3, plan.n_blocks - 2, 0)))
    assert len(corpus.asked) <= 2000 // plan.n_blocks + 1


@pytest.mark.parametrize("nsp", [False, True])
@pytest.mark.parametrize("max_length", [16, 64, 128])
def test_budgets_are_kept_and_used(nsp: bool, max_length: int) -> None:
    """Catches a step or a batch above its budget, an empty batch, and steps that are half empty or very unlike."""
    plan = plan_of(random_corpus(900), nsp=nsp, max_length=max_length, tokens_per_step=2000, tokens_per_batch=520)
    assert plan.n_batches == 4
    steps = epoch_of(plan)
    sizes = np.array([[int(batch.n_tokens().sum()) for batch in step.batches] for step in steps])
    assert sizes.shape[1] == 4 and sizes.min() > 0
    assert sizes.max() <= 520 and sizes.sum(1).max() <= 2000
    assert np.ptp(sizes, axis=1).max() <= max_length
    assert sizes.sum() / (2000 * len(sizes)) > 0.93
    for block in {step.cursor.block for step in steps}:
        of_block = sizes[[step.cursor.block == block for step in steps]].sum(1)
        assert np.ptp(of_block) <= 2 * max_length
        assert 0.6 < len(of_block) / BLOCK_STEPS < 1.6
    firsts = np.array([step.first_tokens for step in steps])
    assert np.array_equal(firsts, np.cumsum(sizes, 1) - sizes)


@given(
    st.lists(st.integers(1, 29), min_size=8, max_size=60), st.integers(1, 8), st.integers(32, 99), st.integers(32, 400)
)
@settings(deadline=None)
def test_dealing_keeps_every_example(sizes: list[int], n_batches: int, batch_budget: int, step_budget: int) -> None:
    """Catches an example that is lost or doubled on its way to a batch, and a budget that odd lengths break."""
    corpus = corpus_of([[n] for n in sizes])
    parts = [full_sentence_examples(corpus, [i], seed=0, epoch=0, max_length=32) for i in range(len(sizes))]
    if sum(sizes) < n_batches * 8:
        return
    try:
        steps = deal(Examples.join(parts), step_budget, batch_budget, n_batches)
    except ValueError as error:
        assert "too few" in str(error)
        return
    batches = [batch for step in steps for batch in step]
    spans = [(a, n) for batch in batches for a, n in zip(batch.starts.tolist(), batch.lengths.tolist(), strict=True)]
    tokens = [token for a, n in sorted(spans) for token in range(a, a + n)]
    assert tokens == list(range(corpus.n_tokens))
    for step in steps:
        assert len(step) == n_batches and all(len(batch) for batch in step)
        was_halved = sum(map(len, step)) == n_batches
        assert max(int(batch.n_tokens().sum()) for batch in step) <= batch_budget
        assert sum(int(batch.n_tokens().sum()) for batch in step) <= step_budget + 2 * n_batches * was_halved


def test_processes_do_not_change_the_batches() -> None:
    """Catches batches that differ between 1 and 2 processes, or a number of them that leaves a process without."""
    corpus = random_corpus(300)
    one, two, three = (plan_of(corpus, n_processes=n) for n in (1, 2, 3))
    assert (one.n_batches, two.n_batches, three.n_batches) == (4, 4, 6)
    assert_same_steps(epoch_of(one), epoch_of(two))
    assert all(len(step.batches) == 6 and all(map(len, step.batches)) for step in epoch_of(three))


@pytest.mark.parametrize("nsp", [False, True])
def test_a_small_corpus_is_one_step(nsp: bool) -> None:
    """Catches a process that waits for ever for a batch, where a step has fewer sequences than batches."""
    corpus = corpus_of([[9, 8, 7], [30], [12]])
    plan = plan_of(corpus, nsp=nsp, n_processes=8)
    steps = epoch_of(plan)
    assert len(steps) == 1 and steps[0].after == Cursor(1, 1, 0, 0)
    assert [len(batch) for batch in steps[0].batches] == [1] * 8
    if nsp:
        assert set(own_tokens(steps).tolist()) == set(range(corpus.n_tokens))
    else:
        assert sorted(own_tokens(steps).tolist()) == list(range(corpus.n_tokens))
    with pytest.raises(ValueError, match="10 tokens of text, too few for its 16 batches"):
        next(plan_of(corpus_of([[5], [5]]), nsp=nsp, n_processes=16, tokens_per_step=1024).steps())


def test_a_block_of_little_documents_has_enough() -> None:
    """Catches a run that fails in the middle of an epoch, where a block has fewer tokens than batches."""
    corpus = corpus_of([[1], [64] * 300] * 20)
    plan = plan_of(corpus, n_processes=4, nsp=False)
    assert 1 < plan.n_blocks <= 10
    steps = epoch_of(plan)
    assert sorted(own_tokens(steps).tolist()) == list(range(corpus.n_tokens))
    assert all(len(batch) for step in steps for batch in step.batches)


def test_halves_have_the_text_of_the_whole() -> None:
    """Catches a pair that is cut and still counts as one, and text that is lost when an example is cut."""
    pair = Examples(*(np.array(a) for a in ([4, 30], [6, 9], [0, 1], [0, 2])), np.array([0], np.int8), np.array([7]))
    three = halved(pair, 3)
    assert three.starts.tolist() == [4, 30, 34] and three.lengths.tolist() == [6, 4, 5]
    assert three.is_next.tolist() == [-1] * 3 and not three.segments.any() and three.documents.tolist() == [7] * 3
    assert_same_examples(halved(pair, 1), pair)


def test_evaluation_is_fixed() -> None:
    """Catches evaluation on documents of training, or on others in each run or for each number of processes."""
    corpus = random_corpus(600)
    plan = plan_of(corpus, held_out=300)
    batches = plan.evaluation()
    held_out = set(plan.documents.held_out(np.arange(300)).tolist())
    seen = corpus.document_of(np.concatenate([batch.starts for batch in batches]))
    assert set(seen.tolist()) == held_out
    assert max(int(batch.n_tokens().sum()) for batch in batches) <= 128
    other = plan_of(corpus, held_out=300, n_processes=3, tokens_per_step=4096).evaluation()
    for a, b in zip(batches, other, strict=True):
        assert_same_examples(a, b)
    few = plan.evaluation(1000)
    n = sum(int(batch.n_tokens().sum()) for batch in few)
    assert 1000 - 64 < n <= 1000
    assert_same_examples(Examples.join(few), Examples.join(batches).take(np.arange(sum(map(len, few)))))
    assert len(plan.evaluation(1)) == 1 and len(plan.evaluation(1)[0]) == 1
    assert plan_of(corpus).evaluation() == []
    assert [len(batch) for batch in batches_of(Examples.join(few), 64)] == [1] * sum(map(len, few)) or len(few) > 1


def test_a_corpus_may_be_there_for_evaluation_alone() -> None:
    """Catches a corpus of its own for evaluation that is refused, or of which a document is left out."""
    corpus = random_corpus(20)
    plan = plan_of(corpus, held_out=20)
    assert plan.tokens_per_epoch == 0
    documents = {document for batch in plan.evaluation() for document in batch.documents.tolist()}
    assert documents == set(range(20))


@pytest.mark.parametrize("nsp", [False, True])
def test_the_size_of_an_epoch_is_known_before(nsp: bool) -> None:
    """Catches an estimate of steps that is far from what an epoch has."""
    plan = plan_of(random_corpus(900), nsp=nsp, held_out=20)
    n = sum(int(batch.n_tokens().sum()) for step in epoch_of(plan) for batch in step.batches)
    assert abs(plan.tokens_per_epoch / n - 1) < 0.1


def test_few_long_documents_are_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a file without blank lines that takes all memory, and nobody knows why; and a warning without need."""
    monkeypatch.setattr(plan_module, "LARGE", 10_000)
    plan_of(random_corpus(900), nsp=False)
    assert caplog.text == ""
    plan_of(corpus_of([[20] * 2500]), nsp=False)
    assert "1 documents have 50000 tokens" in caplog.text and "blank lines between documents" in caplog.text


def test_what_cannot_be_planned_is_refused() -> None:
    """Catches an argument that fails later, in the middle of a run, or not at all."""
    corpus = random_corpus(20)
    for options, message in [
        ({"tokens_per_batch": 63}, "tokens_per_batch: got 63, expected 64"),
        ({"tokens_per_step": 63}, "tokens_per_step: got 63, expected 64"),
        ({"n_processes": 9}, "tokens_per_step: got 512, expected 64 x 9"),
        ({"n_processes": 0}, "n_processes: got 0"),
        ({"held_out": 21}, "held_out: got 21, expected 0 to 20"),
        ({"held_out": 19}, "--no-nsp"),
        ({"held_out": 1}, "held_out: got 1"),
        ({"short_probability": 2.0}, "short_probability: got 2.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            plan_of(corpus, **options)
    assert len(plan_of(corpus, held_out=1, nsp=False).evaluation()) > 0
    with pytest.raises(ValueError, match="held_out: got 20, expected fewer"):
        next(plan_of(corpus, held_out=20).steps())
    for cursor in (Cursor(0, 0, 99, 0), Cursor(0, 0, 0, 9999)):
        with pytest.raises(ValueError, match="cursor: got"):
            next(plan_of(corpus).steps(cursor))
    for values in ({"step": 1}, {"step": 1, "epoch": 0, "block": 0, "place": -1}, {**Cursor().as_dict(), "step": 1.5}):
        with pytest.raises(ValueError, match="cursor"):
            Cursor.from_dict(values)
