"""`text_encoders` returns all competitors of fastbert from strings to vectors."""

from __future__ import annotations

import peers_cpu
import peers_int8
import peers_torch
from peers_servers import VllmEmbeddings

from fastbert import SentenceEncoder
from fastbert.bench import text_encoders as bench_encoders
from fastbert.bench.peers import OURS
from fastbert.bench.text_encoders import FastBert, Pooled, TextEncoder
from fastbert.bench.text_task import TextTask
from fastbert_kernels import cpu


class FastBertInt8(FastBert):
    """This is SentenceEncoder with int8 linears on a CPU. It is strict, so that no fallback is timed in its name."""

    name = f"{OURS} int8"

    def __init__(self, task: TextTask) -> None:
        super().__init__(task)
        self.dtype = "int8"

    def obstacle(self) -> str | None:
        return cpu.int8_obstacle()

    def load(self) -> None:
        task = self.task
        arguments = {"dtype": task.dtype, "device": task.device, "precision": "int8", "strict": True}
        self.encoder = SentenceEncoder.from_pretrained(task.folder, **arguments)


def text_encoders(task: TextTask) -> list[TextEncoder]:
    """Returns fastbert first, then the peers of `fastbert bench`, and all others for the task's device and dtype."""
    engines = [*peers_torch.engines(task.device)]
    if task.device.type == "cpu":
        engines += [*peers_cpu.engines(task.source.dtype), *peers_int8.engines(task.source.dtype)]
    servers = [VllmEmbeddings(task)] if task.device.type == "cuda" else []
    in_8_bits = [FastBertInt8(task)] if task.device.type == "cpu" and task.dtype == "bfloat16" else []
    return [*bench_encoders.text_encoders(task), *in_8_bits, *servers, *(Pooled(task, engine) for engine in engines)]
