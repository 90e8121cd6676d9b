"""`BenchOptions` are the settings of `fastbert bench`. Neither the options nor --help wait for PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

LIMIT = {"cpu": 300, "cuda": 4096}  # texts taken by default, at most, by type of device


@dataclass(frozen=True)
class BenchOptions:
    """The settings of one measurement.

    model: folder in Hugging Face layout, or hub id. texts: a file of one text a line, None for docstrings of Python's
    library. limit: how many texts are taken, None for a number that suits the device. peers: names of competitors with
    commas between them, None for all. rounds: over all texts, at most. seconds: after so many no new round begins.
    latency: whether single short texts are timed too. memory: whether peak memory is measured on a CPU.
    """

    model: str
    texts: str | None = None
    limit: int | None = None
    revision: str | None = None
    dtype: str = "auto"
    device: str | None = None
    backend: str = "auto"
    peers: str | None = None
    rounds: int = 10
    seconds: float = 60.0
    latency: bool = True
    memory: bool = True
