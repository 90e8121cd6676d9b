"""`BenchOptions` are the settings of `fastbert bench`. The options and --help do not import PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

LIMIT = {"cpu": 300, "cuda": 4096}  # default maximum number of texts, by type of device


@dataclass(frozen=True)
class BenchOptions:
    """A BenchOptions holds the settings of one measurement.

    model: folder in Hugging Face layout, or hub id. texts: a file with one text per line, None for docstrings of
    Python's library. limit: the number of texts, None for a number that suits the device. peers: comma-separated names
    of competitors, None for all. rounds: the maximum number of passes over all texts. seconds: no new round begins
    after this time. latency: whether to time single short texts too. memory: whether to measure peak memory on a CPU.
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
