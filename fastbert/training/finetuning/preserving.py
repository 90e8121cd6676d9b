"""Preserved texts keep their vectors during training, so that the model does not lose its knowledge of other texts.

Every batch of a trainer contains either records or such texts: `SHARE` texts for each record, repeated or sampled to
reach that number.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastbert.training.distributed import Processes
from fastbert.training.finetuning.mining import distinct
from fastbert.training.finetuning.vector_data import read_examples
from fastbert.training.finetuning.vector_processes import spread
from fastbert.training.finetuning.vector_settings import EmbedSettings

SHARE = 0.25  # texts for each record


def rows_of(
    model: Any, settings: EmbedSettings, n_records: int, prompt: str | None, processes: Processes
) -> list[dict[str, Any]]:
    """Returns {"text", "label"} of the texts to preserve; label is the vector that the model gives now.

    If there are more texts than n_records needs, they are sampled. prompt: put before each text. Raises RecordError for
    records that are not texts.
    """
    examples = read_examples(settings.preserve, settings.kind)
    texts = distinct([example.anchor for example in examples])
    n_texts = _number_for(n_records)
    if len(texts) > n_texts:
        texts = random.Random(settings.seed).sample(texts, n_texts)
    model.eval()
    vectors = spread(
        processes, lambda share: np.asarray(model.encode(share, prompt=prompt, show_progress_bar=False)), texts
    )
    return [{"text": text, "label": vector.tolist()} for text, vector in zip(texts, vectors, strict=True)]


def with_rows(data: Any, loss: Any, rows: Sequence[Mapping[str, Any]], model: Any, weight: float) -> tuple[Any, Any]:
    """Returns the data and losses of a trainer, with those of the preserved texts added.

    data: a datasets.Dataset or a DatasetDict. loss: the loss of its records.
    """
    import datasets  # type: ignore[import-untyped]

    sets = dict(data) if isinstance(data, dict) else {"records": data}
    losses = {**dict.fromkeys(sets, loss), "preserved": _loss(model, weight)}
    n_texts = _number_for(sum(map(len, sets.values())))
    repeated = datasets.Dataset.from_list(list(rows)).select([i % len(rows) for i in range(n_texts)])
    return datasets.DatasetDict({**sets, "preserved": repeated}), losses


def _number_for(n_records: int) -> int:
    return max(1, int(SHARE * n_records))


def _loss(model: Any, weight: float) -> Any:
    import torch
    from torch.nn import functional

    class Preserved(torch.nn.Module):
        """The loss is the mean of weight (1 - cos(vector, vector before the training))."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, features: Any, labels: Any) -> Any:
            vectors = self.model(next(iter(features)))["sentence_embedding"].float()
            return weight * (1 - functional.cosine_similarity(vectors, labels.float())).mean()

        def get_config_dict(self) -> dict[str, Any]:
            return {"weight": weight}

    return Preserved()
