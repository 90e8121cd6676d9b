"""A teacher provides vectors or scores to learn. If its vectors have another width, they or the model are adapted."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastbert.training.distributed import Processes
from fastbert.training.finetuning.mining import distinct
from fastbert.training.finetuning.vector_data import Example
from fastbert.training.finetuning.vector_processes import by_first, spread
from fastbert.training.finetuning.vector_settings import EmbedSettings

logger = logging.getLogger("fastbert")


def with_vectors(examples: list[Example], settings: EmbedSettings, processes: Processes) -> list[Example]:
    """Adds the teacher's vectors of the anchors, if the records have none.

    Raises ValueError if there is no teacher.
    """
    if not examples or examples[0].vector is not None:
        return examples
    if settings.teacher is None:
        raise ValueError("teacher: expected a bi-encoder, or a column vector in the records")
    import fastbert.pipelines.sentence

    device = None if processes.n == 1 else str(processes.device)
    encoder = fastbert.pipelines.sentence.SentenceEncoder.from_pretrained(
        settings.teacher, dtype="float32", device=device
    )
    texts = distinct([example.anchor for example in examples])
    teacher_vectors = spread(processes, lambda share: encoder.encode(share, show_progress_bar=False), texts)
    vectors = dict(zip(texts, teacher_vectors, strict=True))
    return [dataclasses.replace(example, vector=vectors[example.anchor]) for example in examples]


def with_scores(examples: list[Example], settings: Any, processes: Processes) -> list[Example]:
    """Adds a cross-encoder's scores of the positive and of each negative, if the records have none.

    Pairs without negatives are omitted. Raises ValueError if there is no teacher, or no pair is left.
    """
    if examples[0].score is not None:
        return examples
    examples = [example for example in examples if example.negatives]
    if settings.teacher is None or not examples:
        raise ValueError("teacher: expected a cross-encoder and negatives, or a column score in the records")
    import torch

    import fastbert.pipelines.cross

    device = None if processes.n == 1 else str(processes.device)
    teacher = fastbert.pipelines.cross.CrossEncoder.from_pretrained(settings.teacher, dtype="float32", device=device)
    pairs = [(e.anchor, text) for e in examples for text in (e.positive, *e.negatives)]
    teacher_scores = spread(
        processes,
        lambda share: teacher.predict(share, show_progress_bar=False, activation_fn=torch.nn.Identity())[:, None],
        pairs,
    )
    scores = iter(teacher_scores[:, 0].tolist())
    return [dataclasses.replace(e, score=tuple(next(scores) for _ in (e.positive, *e.negatives))) for e in examples]


def way_of(teacher: int, model: int, wanted: str) -> str | None:
    """Returns the method to adapt the teacher's width: pca, cut, dense, or None if both widths are equal.

    wanted: `EmbedSettings.teacher_width`. Raises ValueError if a method that shortens vectors would have to extend
    them.
    """
    if teacher == model:
        return None
    rule = ("pca" if teacher > model else "dense") if wanted == "auto" else wanted
    if rule != "dense" and teacher < model:
        raise ValueError(f"teacher_width: {rule} makes vectors shorter, but the teacher's have {teacher} "
                         f"numbers and the model's {model}; expected dense")  # fmt: skip
    return rule


def add_dense(model: Any, width: int) -> None:
    """Adds a Dense module to a SentenceTransformer, so that vectors have `width` numbers; a Normalize stays last."""
    import torch
    from sentence_transformers.models import Dense, Normalize

    dense = Dense(model.get_sentence_embedding_dimension(), width, activation_function=torch.nn.Identity())
    modules = list(model)
    place = len(modules) - isinstance(modules[-1], Normalize)
    for name in list(model._modules):
        del model._modules[name]
    for number, module in enumerate([*modules[:place], dense, *modules[place:]]):
        model.add_module(str(number), module)


def shortened(
    examples: Sequence[Example], held: Sequence[Example], width: int, rule: str, processes: Processes
) -> tuple[list[Example], list[Example], float]:
    """Returns examples whose vectors have `width` numbers, and the share of the squared lengths that is preserved.

    rule: "pca" takes the directions that preserve most of the training vectors' squared lengths, so that scalar
    products change least; "cut" takes the first numbers, as for a Matryoshka model. Each vector keeps its length.
    """
    targets = {example.anchor: example.vector for example in examples}
    rows = np.asarray(list(targets.values()), np.float64)
    basis = by_first(processes, lambda: _directions(rows, width)) if rule == "pca" else np.eye(rows.shape[1], width)
    if rule == "pca" and len(rows) < width:
        logger.warning("teacher_width: %d texts for %d directions; more texts fit the teacher better", len(rows), width)
    kept = float(((rows @ basis) ** 2).sum() / max((rows**2).sum(), 1e-30))

    def short(example: Example) -> Example:
        if example.vector is None:
            return example
        vector = np.asarray(example.vector, np.float64)
        new = vector @ basis
        norm = float(np.linalg.norm(new))
        new = new * (np.linalg.norm(vector) / norm) if norm else new
        return dataclasses.replace(example, vector=new.astype(np.float32))

    return [short(example) for example in examples], [short(example) for example in held], kept


def _directions(rows: np.ndarray, width: int) -> np.ndarray:
    """Returns the principal directions (dim, width) of rows (N, dim) about zero, largest first, with fixed signs."""
    _, vectors = np.linalg.eigh(rows.T @ rows)
    basis = vectors[:, ::-1][:, :width]
    largest = np.abs(basis).argmax(0)
    return basis * np.sign(basis[largest, np.arange(width)])
