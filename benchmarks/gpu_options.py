"""`Options` are the settings of a run on a GPU. gpu.py reads them from its arguments and passes them to each part."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MINUTES = 7.5


@dataclass(frozen=True)
class Options:
    """Options holds the settings of one run.

    out: the folder of the results. minutes: for all parts. model: the checkpoint of the text suite, None for MiniLM's.
    quick: few rounds and small workloads, to test the tool.
    """

    out: Path
    device: str = "cuda"
    minutes: float = MINUTES
    model: Path | None = None
    quick: bool = False
