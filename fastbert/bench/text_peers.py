"""Two peers run a text encoder on a task: `Throughput` on all texts at once, `Latency` on one text at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastbert.bench import memory
from fastbert.bench.peers import Peer
from fastbert.bench.text_encoders import TextEncoder
from fastbert.bench.texts import spread

FEW = 16  # number of texts in a first run


class Throughput(Peer):
    """All texts of the task are encoded at once. The output has the texts that `TextTask.reference` covers.

    with_memory: whether there is time to measure the memory in a separate process.
    """

    gives_vectors = True

    def __init__(self, encoder: TextEncoder, with_memory: bool = True) -> None:
        self.encoder, self.task, self.with_memory = encoder, encoder.task, with_memory
        self.name, self.dtype = encoder.name, encoder.dtype

    def obstacle(self) -> str | None:
        return self.encoder.obstacle()

    def prepare(self) -> None:
        self.encoder.prepare()
        self.encoder.encode(spread(self.task.texts, FEW))  # triggers compilation

    def run(self, i: int) -> Tensor:
        return self.encoder.encode(self.task.texts)

    def output(self) -> Tensor:
        self.encoder.choose_batch_size()
        for _ in range(self.encoder.warmups - 1):
            self.run(0)
        return self.run(0)[torch.tensor(self.task.checked)]

    def facts(self) -> dict[str, Any]:
        return self.encoder.facts()

    def peak_bytes(self) -> int | None:
        if not self.with_memory or memory.peak_obstacle() is not None:
            return None
        return memory.peak_of(self.encoder.unloaded, self.encoder.batch_size, self.task.texts)


class Latency(Peer):
    """One text is encoded at a time. The output has all `texts`, in the form of `TextTask.vectors`."""

    gives_vectors = True

    def __init__(self, encoder: TextEncoder, texts: Sequence[str]) -> None:
        self.encoder, self.texts = encoder, list(texts)
        self.name, self.dtype = encoder.name, encoder.dtype

    def obstacle(self) -> str | None:
        return self.encoder.obstacle()

    def prepare(self) -> None:
        self.encoder.prepare()
        self.run(0)

    def run(self, i: int) -> Tensor:
        return self.encoder.encode([self.texts[i % len(self.texts)]])

    def output(self) -> Tensor:
        for _ in range(self.encoder.warmups - 1):
            for i in range(len(self.texts)):
                self.run(i)
        return torch.cat([self.run(i) for i in range(len(self.texts))])
