"""The processes of torchrun share the work besides training steps: encoding, mining, and reports."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np

from fastbert.training.distributed import Processes
from fastbert.training.finetuning.mining import distinct, mine_negatives
from fastbert.training.finetuning.vector_data import Example, with_negatives
from fastbert.training.finetuning.vector_settings import VectorSettings

T = TypeVar("T")
PATIENCE = timedelta(days=1)  # maximum time that processes wait while the first one mines or evaluates


def join(device: str | None) -> Processes:
    """Joins the processes of torchrun, before a trainer does so; without torchrun there is one process.

    device: the setting. Each process uses the GPU of its local rank, or the CPU.
    """
    return Processes.start("cpu" if device == "cpu" else None)


def by_first(processes: Processes, make: Callable[[], T]) -> T:
    """Returns the first process's result of `make()` on all processes; raises its error on all of them."""
    if processes.n == 1:
        return make()
    import torch.distributed

    group = _patient_group()
    result: list[Any] = [None, None]
    if processes.is_first:
        try:
            result[0] = make()
        except Exception as error:
            result[1] = error
    torch.distributed.broadcast_object_list(result, src=0, group=group)
    if result[1] is not None:
        raise result[1]
    value: T = result[0]
    return value


def spread(processes: Processes, encode: Callable[[list[Any]], Any], texts: Sequence[Any]) -> np.ndarray:
    """Returns the vectors from `encode` of N texts or pairs, (N, dim) float32, on all processes.

    Each process computes a share of them.
    """
    if processes.n == 1 or not texts:
        return np.asarray(encode(list(texts)), np.float32)
    share = list(texts[processes.rank :: processes.n])
    parts = processes.gather(np.asarray(encode(share), np.float32) if share else None)
    vectors = np.empty((len(texts), parts[0].shape[1]), np.float32)
    for rank, part in enumerate(parts):
        if part is not None:
            vectors[rank :: processes.n] = part
    return vectors


def mined(encoder: Any, examples: Sequence[Example], settings: VectorSettings, processes: Processes) -> list[Example]:
    """Adds negatives to pairs, according to the settings. All processes encode, and the first one searches.

    encoder: an object with `encode_query` and `encode_document`.
    """
    anchors, positives = [example.anchor for example in examples], [example.positive for example in examples]
    shared = _Encoded(
        *(
            dict(zip(texts, spread(processes, encode, texts), strict=True))
            for texts, encode in (
                (distinct(anchors), encoder.encode_query), (distinct(positives), encoder.encode_document),
            )
        )
    )  # fmt: skip
    hits = by_first(
        processes,
        lambda: mine_negatives(
            shared, anchors, positives, n=settings.mine_negatives, skip=settings.mine_skip, depth=settings.mine_depth,
            margin=settings.mine_margin, max_score=settings.mine_max_score,
        ),
    )  # fmt: skip
    return with_negatives(examples, hits.texts)


class _Encoded:
    """An _Encoded is an encoder of texts whose vectors are already computed."""

    def __init__(self, queries: Mapping[str, np.ndarray], documents: Mapping[str, np.ndarray]) -> None:
        self.queries, self.documents = queries, documents

    def encode_query(self, texts: Sequence[str]) -> np.ndarray:
        return np.stack([self.queries[text] for text in texts])

    def encode_document(self, texts: Sequence[str]) -> np.ndarray:
        return np.stack([self.documents[text] for text in texts])


@functools.cache
def _patient_group() -> Any:
    """Returns a process group on the host with a longer timeout than that of gradients. All processes must call it."""
    import torch.distributed

    return torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
