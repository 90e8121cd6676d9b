"""The trainers of sentence-transformers give the same curves with an accelerated model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentence_transformers
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.evaluation import EmbeddingSimilarityEvaluator
from sentence_transformers.losses import (
    CachedMultipleNegativesRankingLoss,
    CoSENTLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.models import Pooling, Transformer  # under a new name from 6 on, and found under this one
from torch import Tensor

import fastbert
from fastbert.adapters import counts
from train_cases import NotesLosses, classifier, distance, passages, settings

datasets = pytest.importorskip("datasets", reason="the trainers of sentence-transformers need datasets")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("trainers"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]

N_STEPS = 15
SHORT = {"max_steps": N_STEPS, "per_device_train_batch_size": 16, "learning_rate": 2e-3}
LOSSES: dict[str, Callable[[Any], Any]] = {
    "MultipleNegativesRankingLoss": MultipleNegativesRankingLoss,
    "CoSENTLoss": CoSENTLoss,
    "MatryoshkaLoss": lambda model: MatryoshkaLoss(model, MultipleNegativesRankingLoss(model), [64, 32, 16]),
    "CachedMultipleNegativesRankingLoss": lambda model: CachedMultipleNegativesRankingLoss(model, mini_batch_size=6),
}


class SentenceTrainer(NotesLosses, sentence_transformers.SentenceTransformerTrainer):
    """The trainer of sentence-transformers, which notes its losses."""


def folder_of(tmp_path: Path, tokenizer: Any, p: float) -> str:
    """A small untrained model on disk, with a head of one number and a tokenizer."""
    folder = tmp_path / "model"
    model = classifier(p=p)
    model.config.num_labels = model.num_labels = 1
    model.classifier = torch.nn.Linear(64, 1)
    torch.nn.init.zeros_(model.classifier.weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def sentence_model(folder: str) -> SentenceTransformer:
    return SentenceTransformer(modules=[Transformer(folder, max_seq_length=64), Pooling(64, "mean")], device="cpu")


def pairs(scored: bool) -> Any:
    """Neighbouring passages of one topic; or pairs of passages, half of them of one topic, and whether they are."""
    texts, labels, _ = passages()
    if not scored:
        return datasets.Dataset.from_dict({"anchor": texts[::2], "positive": texts[1::2]})
    others = [(7 * i + 3) % len(texts) if i % 2 else (i + 1) % len(texts) for i in range(len(texts))]
    scores = [float(labels[i] == labels[j]) for i, j in enumerate(others)]
    return datasets.Dataset.from_dict({"sentence1": texts, "sentence2": [texts[j] for j in others], "score": scores})


def run(folder: str, loss: str, accelerated: bool, tmp_path: Path, **changes: Any) -> Any:
    """Trains a model, with evaluations in between."""
    model = sentence_model(folder)
    if accelerated:
        fastbert.accelerate(model, strict=True)
    data = pairs(loss == "CoSENTLoss")
    arguments = sentence_transformers.SentenceTransformerTrainingArguments(
        **settings(tmp_path / "run", **{**SHORT, "eval_strategy": "steps", "eval_steps": 5, **changes})
    )
    held_out = pairs(True).select(range(40))
    evaluator = EmbeddingSimilarityEvaluator(
        held_out["sentence1"], held_out["sentence2"], held_out["score"], name="pairs"
    )
    trainer = SentenceTrainer(
        model=model, args=arguments, train_dataset=data, loss=LOSSES[loss](model), evaluator=evaluator
    )
    trainer.train()
    if accelerated:
        assert set(counts(model)) == {"fastbert"}
    return trainer


def evaluations(trainer: Any) -> list[float]:
    return [value for entry in trainer.state.log_history for key, value in entry.items() if key.endswith("_cosine")]


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Any) -> str:
    return folder_of(tmp_path, tokenizer, p=0.0)


@pytest.mark.parametrize("loss", list(LOSSES))
def test_losses(loss: str, folder: str, tmp_path: Path) -> None:
    """Catches a loss under which the curve, or an evaluation by `encode` on the way, leaves the original's."""
    ours, theirs = (run(folder, loss, accelerated, tmp_path) for accelerated in (True, False))
    assert len(ours.losses) == N_STEPS and ours.losses[-1] < ours.losses[0]
    assert distance(ours, theirs) < 1e-5
    assert len(evaluations(ours)) >= 3
    assert evaluations(ours) == pytest.approx(evaluations(theirs), abs=2e-3)  # Ranks, which may change places.


def test_checkpointing_and_sixteen_bits(folder: str, tmp_path: Path) -> None:
    """Catches settings of the trainer that the encoder does not follow."""
    loss = "MultipleNegativesRankingLoss"
    plain = run(folder, loss, True, tmp_path)
    assert distance(run(folder, loss, True, tmp_path, gradient_checkpointing=True), plain) < 1e-5
    low = run(folder, loss, True, tmp_path, bf16=True, eval_strategy="no")  # Where `encode` is under autocast, too.
    assert distance(low, plain) < 0.1


def test_cached_embeddings_with_dropout(tmp_path: Path, tokenizer: Any) -> None:
    """Catches a second pass over the same texts, with gradients, that has other masks than the first, without."""
    model = fastbert.accelerate(sentence_model(folder_of(tmp_path, tokenizer, p=0.3)).train())
    seen: list[tuple[bool, Tensor]] = []
    model[1].register_forward_hook(
        lambda module, inputs, output: seen.append((torch.is_grad_enabled(), output["sentence_embedding"].detach()))
    )
    texts = passages()[0][:20]
    features = [model.tokenize(texts[:10]), model.tokenize(texts[10:])]
    loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=4)(features, torch.zeros(10))
    loss.backward()
    first = [vectors for with_gradients, vectors in seen if not with_gradients]
    second = [vectors for with_gradients, vectors in seen if with_gradients]
    assert len(first) == len(second) == 6
    for one, other in zip(first, second, strict=True):
        assert torch.allclose(one, other, 1e-5, 1e-6)
    assert not torch.allclose(model(features[0])["sentence_embedding"][:4], first[0], 1e-3, 1e-3)
    assert counts(model) == {"fastbert": 13}


def test_dropout_trains(tmp_path: Path, tokenizer: Any) -> None:
    """Catches dropout that the encoder does not apply, or under which nothing is learned."""
    folder = folder_of(tmp_path, tokenizer, p=0.1)
    ours, theirs = (run(folder, "MultipleNegativesRankingLoss", accelerated, tmp_path) for accelerated in (True, False))
    assert distance(ours, theirs) > 1e-3  # Other masks.
    assert abs(sum(ours.losses[-5:]) - sum(theirs.losses[-5:])) / 5 < 0.3
    assert sum(ours.losses[-5:]) < sum(ours.losses[:5])


def test_cross_encoder(folder: str, tmp_path: Path) -> None:
    """Catches a CrossEncoder whose curve, or whose scores in between, leave the original's."""
    from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

    class Trainer(NotesLosses, CrossEncoderTrainer):
        """The trainer of CrossEncoders, which notes its losses."""

    data, results = pairs(True).rename_column("score", "label"), []
    for accelerated in (True, False):
        model = CrossEncoder(folder, num_labels=1, max_length=64, device="cpu")
        if accelerated:
            fastbert.accelerate(model, strict=True)
        arguments = CrossEncoderTrainingArguments(**settings(tmp_path / "run", **SHORT))
        trainer = Trainer(model=model, args=arguments, train_dataset=data, loss=BinaryCrossEntropyLoss(model))
        trainer.train()
        before = model.predict([["a word", "another one"]])[0]
        trainer.train()
        results.append((trainer, before, model.predict([["a word", "another one"]])[0]))
        if accelerated:
            assert set(counts(model)) == {"fastbert"}
    (ours, *scores), (theirs, *their_scores) = results
    assert distance(ours, theirs) < 1e-5 and ours.losses[-1] < ours.losses[0]
    assert scores == pytest.approx(their_scores, abs=1e-4) and scores[0] != scores[1]
