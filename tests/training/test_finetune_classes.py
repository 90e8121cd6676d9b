"""Embeddings of classes, teachers of another width, early stopping, and the order of batches on several processes."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastbert
import fork_server
import helpers
from fastbert.training import train_cross_encoder, train_embeddings
from fastbert.training.finetuning.distilling import way_of
from fastbert.training.finetuning.records import RecordError
from fastbert.training.finetuning.vector_batches import sampler_arguments
from fastbert.training.finetuning.vector_data import Example, checked_classes, split
from fastbert.training.finetuning.vector_evaluation import LabelledTexts
from vector_cases import CLASSES, COMMON, PAIRS, SCORED, reset_precision, save_encoder

datasets = pytest.importorskip("datasets", reason="the trainers of sentence-transformers need datasets")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def _precision(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    reset_precision()
    yield


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.mark.parametrize("loss", ["auto", "batch-hard", "batch-semi-hard", "batch-soft"])
def test_classes(loss: str, encoder: str, tmp_path: Path) -> None:
    """Catches labels that a loss does not get, or batches of one class, from a datasets.Dataset."""
    data = datasets.Dataset.from_list(CLASSES)
    result = train_embeddings(encoder, data, tmp_path, eval=CLASSES, steps=30, loss=loss, **COMMON)
    assert result.headline == "map@r" and result.after["map@r"] > result.before["map@r"] + 0.25
    assert result.after["nearest"] > 0.9
    assert result.sizes["training"]["classes"] == {f"class {k}": 12 for k in range(4)}


def test_scores_of_classes() -> None:
    """Catches a text that is its own neighbour, ranks beyond R that count, and a class of one text."""
    vectors = {"a": (1, 0), "b": (0.9, 0.1), "c": (0.8, 0.3), "d": (0, 1), "e": (-1, 0.1)}
    labels = {"a": "x", "b": "y", "c": "x", "d": "y", "e": "z"}
    task = LabelledTexts([Example("labelled", "", text, label=labels[text]) for text in labels])
    scores = task.score(lambda texts, _: np.array([vectors[text] for text in texts], np.float32))
    # R is 1. The nearest of a is b, of b a, of c b, of d c: no one is right.
    assert scores["map@r"] == 0 == scores["nearest"]
    assert scores["mrr"] == pytest.approx(np.mean([1 / 2, 1 / 3, 1 / 2, 1 / 2]))


def test_held_out_texts_of_classes() -> None:
    """Catches a class that loses its last texts for training to the evaluation, and a text in both."""
    examples = [Example("labelled", "", f"{k} {i}", label=str(k)) for k in range(4) for i in range(2 + 5 * k)]
    train, held = split(examples, 0.5, 0)
    counts = [sum(e.label == str(k) for e in train) for k in range(4)]
    assert counts == [2, 3, 6, 9] and len(train) + len(held) == len(examples)
    assert not {e.anchor for e in train} & {e.anchor for e in held}


def labelled(*pairs: str) -> list[dict[str, Any]]:
    return [dict(zip(("text", "label"), pair.split(":"), strict=True)) for pair in pairs]


@pytest.mark.parametrize(
    ("rows", "options", "error", "message"),
    [
        (labelled("a:x", "b:x"), {}, ValueError, "label: all records are of the class 'x'"),
        (labelled("a:x", "b:x", "c:y"), {}, ValueError, "label: 1 of 2 classes have one text"),
        (labelled("a:x", "a:y"), {}, RecordError, "record 2: label 'y', but record 1 has the same text as 'x'"),
        ([{"text": "a", "label": 0.5}], {}, RecordError, "record 1: label: expected the name or number of a class"),
        (CLASSES, {"batch_size": 7}, ValueError, "batch_size: expected an even number from 4"),
        (CLASSES, {"loss": "mnrl"}, ValueError, "does not take records of the kind labelled"),
    ],
)
def test_refusals(rows: Any, options: Any, error: Any, message: str, tmp_path: Path) -> None:
    """Catches labels that nothing can be learned from, and an error without a place."""
    with pytest.raises(error, match=message):
        train_embeddings("no-model", rows, tmp_path, eval_share=0.0, **options)


def test_a_class_of_one_text(caplog: pytest.LogCaptureFixture) -> None:
    """Catches a class that is left out and that nobody is told of."""
    rows = [Example("labelled", "", text, label=text[0]) for text in ("a1", "a2", "b1", "b2", "c1")]
    assert [e.anchor for e in checked_classes(rows)] == ["a1", "a2", "b1", "b2"]
    assert "1 classes have one text, and are left out of training: c" in caplog.text


@pytest.mark.parametrize(("width", "way"), [(48, "auto"), (48, "dense"), (48, "cut"), (16, "auto")])
def test_a_teacher_of_another_width(width: int, way: str, encoder: str, tmp_path: Path) -> None:
    """Catches vectors that do not fit, a model that a library does not load, and nothing that is learned."""
    from sentence_transformers import SentenceTransformer

    texts = sorted({text for pair in PAIRS for text in pair.values()})
    # The teacher's vectors lie in few directions, as those of real ones do.
    of_words = np.random.default_rng(0).normal(size=(200, 6)) @ np.random.default_rng(1).normal(size=(6, width))
    words = sorted({word for text in texts for word in text.split()})
    vectors = [np.mean([of_words[words.index(word)] for word in text.split()], 0) for text in texts]
    rows = [{"text": text, "vector": vector.tolist()} for text, vector in zip(texts, vectors, strict=True)]
    options = {**COMMON, "learning_rate": 1e-2, "teacher_width": way, "eval": rows, "steps": 60}
    result = train_embeddings(encoder, rows, tmp_path, **options)
    is_dense = way == "dense" or width < 32
    assert result.after["cosine"] > result.before["cosine"] + 0.3
    assert ("teacher" in result.sizes) != is_dense
    if way == "auto" and not is_dense:
        assert result.sizes["teacher"] == {"width": 48, "fitted by": "pca", "share kept": pytest.approx(1.0, abs=1e-4)}
    theirs = SentenceTransformer(str(tmp_path), device="cpu").encode(texts[:5])
    ours = fastbert.SentenceEncoder.from_pretrained(tmp_path, device="cpu", dtype="float32").encode(texts[:5])
    assert theirs.shape == (5, width if is_dense else 32)
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()


def test_ways_to_a_width() -> None:
    """Catches a width that is met by making shorter vectors longer."""
    assert [way_of(*case, "auto") for case in ((8, 8), (8, 4), (4, 8))] == [None, "pca", "dense"]
    with pytest.raises(ValueError, match="teacher_width: cut makes vectors shorter"):
        way_of(4, 8, "cut")


@pytest.mark.parametrize("kind", ["embed", "rerank"])
def test_best_and_last(kind: str, encoder: str, tmp_path: Path) -> None:
    """Catches a run that does not stop, a last model that is given for the best, and a best one that is deleted."""
    from safetensors.numpy import load_file

    # The rate is high enough to unlearn what has been learnt.
    options = {**COMMON, "learning_rate": 5e-2, "evaluate_every": 2, "early_stopping": 2, "steps": 80, "warmup": 0}
    if kind == "embed":
        result = train_embeddings(encoder, PAIRS, tmp_path, eval=PAIRS, **options)
    else:
        rows = [{**pair, "negative": PAIRS[k - 3]["positive"]} for k, pair in enumerate(PAIRS)]
        result = train_cross_encoder(encoder, rows, tmp_path, eval=rows, **options)
    scores = dict(result.evaluations)
    best = max(scores, key=lambda step: (scores[step], -step))
    assert result.best_step == best and result.steps == best + 4 < 80
    assert result.after[result.headline] == pytest.approx(scores[best], abs=1e-6)
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("checkpoint-*"))
    assert names == sorted(f"checkpoint-{step}" for step in (best, best + 4))
    weights = [
        load_file(tmp_path / name / "model.safetensors")
        for name in ("", f"checkpoints/checkpoint-{best}", "last", f"checkpoints/checkpoint-{best + 4}")
    ]
    same = [all(np.array_equal(a[name], b[name]) for name in a) for a, b in zip(weights, weights[1:], strict=False)]
    assert same == [True, False, True]


# The process kills itself when the checkpoint of step 8 is being written, before its state is there.
KILLED = """
import json, os, signal, sys
import transformers
from fastbert.training import train_embeddings
write = transformers.trainer_callback.TrainerState.save_to_json
def dies(self, path):
    if self.global_step == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, path)
transformers.trainer_callback.TrainerState.save_to_json = dies
train_embeddings(**json.loads(sys.argv[1]))
"""


def test_a_run_that_was_killed(encoder: str, tmp_path: Path) -> None:
    """Catches a torn checkpoint that is resumed from, and a resumed run that ends elsewhere than an unbroken one."""
    options = {**COMMON, "model": encoder, "train": PAIRS, "eval": PAIRS, "steps": 12, "evaluate_every": 4}
    whole = train_embeddings(**options, output=tmp_path / "whole")
    broken = {**options, "output": str(tmp_path / "broken")}
    command, env = [sys.executable, "-c", KILLED, json.dumps(broken)], helpers.source_env(OMP_NUM_THREADS="1")
    done = fork_server.run(command, env=env, modules=fork_server.TRAINERS, timeout=200)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / "broken/checkpoints/checkpoint-8").is_dir()
    resumed = train_embeddings(**broken, resume=True)
    assert [loss for _, loss in resumed.losses] == pytest.approx([loss for _, loss in whole.losses], rel=1e-5)
    assert resumed.after["mrr"] == pytest.approx(whole.after["mrr"], abs=1e-6)
    assert resumed.best_step == whole.best_step


@pytest.mark.parametrize("kind", ["shuffled", "no duplicates", "classes"])
def test_batches_of_processes_are_those_of_one(kind: str) -> None:
    """Catches ranks with other numbers of records, a text twice on two ranks, and an epoch like the one before."""
    pairs = [*PAIRS, *({**pair, "anchor": f"{pair['anchor']} balo"} for pair in PAIRS[:20])]
    rows = {"no duplicates": pairs, "classes": [{**row, "label": int(row["label"][-1])} for row in CLASSES]}
    data = datasets.Dataset.from_list(rows.get(kind, SCORED))
    options = {"drop_last": True, "valid_label_columns": ["label"], "seed": 3}

    def batches(n: int, size: int, epoch: int = 0) -> list[list[int]]:
        import torch

        make = sampler_arguments(kind, n, several=False)["batch_sampler"]
        sampler = make(data, batch_size=size, generator=torch.Generator().manual_seed(3), **options)
        sampler.set_epoch(epoch)
        return list(sampler)

    one, three = batches(1, 12), batches(3, 4)
    groups = [three[i : i + 3] for i in range(0, len(three), 3)]
    assert len(groups) >= 3 and all(len({len(batch) for batch in group}) == 1 for group in groups)
    together = [[i for batch in group for i in batch] for group in groups]
    assert together[:3] == [batch[: len(batch) // 3 * 3] for batch in one[:3]]
    assert batches(3, 4, epoch=1) != three
    if kind == "no duplicates":
        assert all(len(set(data[group]["positive"])) == len(group) for group in together)


def test_batches_of_several_sets() -> None:
    """Catches processes whose batches of one step have other columns, or other numbers of records."""
    import torch

    sets = [
        datasets.Dataset.from_list(rows) for rows in (PAIRS, [{**pair, "negative_1": "balo"} for pair in PAIRS[:9]])
    ]
    arguments = sampler_arguments("shuffled", 2, several=True)
    samplers = [arguments["batch_sampler"](each, batch_size=4, drop_last=True, seed=0) for each in sets]
    whole = torch.utils.data.ConcatDataset(sets)
    make = arguments["multi_dataset_batch_sampler"]
    batches = list(make(dataset=whole, batch_samplers=samplers, generator=torch.Generator(), seed=0))
    for one, other in zip(batches[::2], batches[1::2], strict=True):
        assert len(one) == len(other) and len({i < len(PAIRS) for i in (*one, *other)}) == 1
    assert len({i for batch in batches for i in batch}) == len(PAIRS) + 8
