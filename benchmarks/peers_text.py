"""From strings to vectors: all that fastbert is compared with."""

from __future__ import annotations

import peers_cpu
import peers_torch

from fastbert.bench import text
from fastbert.bench.text import Pooled, TextEncoder, TextTask


def text_encoders(task: TextTask) -> list[TextEncoder]:
    """fastbert first, what `fastbert bench` compares it with, and all others for the task's device and dtype."""
    engines = [*peers_torch.engines(task.device)]
    if task.device.type == "cpu":
        engines += peers_cpu.engines(task.source.dtype)
    return [*text.text_encoders(task), *(Pooled(task, engine) for engine in engines)]
