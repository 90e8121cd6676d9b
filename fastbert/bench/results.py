"""`Results` are rows, one per competitor and workload, and the machine of the measurement, in versioned JSON."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import platform
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastbert.bench.measure import Ratio, Timing
from fastbert.checkpoint.files import write_text

KIND = "fastbert benchmark"
VERSION = 1

OK, FAILED, WRONG, MISSING = "ok", "failed", "wrong", "missing"
PACKAGES = ("torch", "triton", "transformers", "sentence-transformers", "onnxruntime", "openvino", "ctranslate2")


@dataclass
class Row:
    """A Row is one competitor on one workload.

    status: "ok"; "failed" (raised an error), "wrong" (the output missed the bound, so it was not timed), or "missing"
    (not available here); `detail` has the reason. seconds: the time of one pass over the workload, the median over
    rounds; spread as in Timing. error: RMS relative to the float64 reference; bound: its limit. speedup: how many times
    faster fastbert is, for a peer. ceiling_fraction: the share of the hardware's limit, with `rate` in `rate_unit`.
    """

    suite: str
    workload: str
    competitor: str
    dtype: str
    status: str = OK
    detail: str = ""
    seconds: float | None = None
    spread: float | None = None
    rounds: int = 0
    p50: float | None = None
    p95: float | None = None
    p99: float | None = None
    items: int | None = None
    tokens: int | None = None
    tokens_per_second: float | None = None
    error: float | None = None
    bound: float | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    peak_bytes: int | None = None
    rate: float | None = None
    rate_unit: str = ""
    ceiling_fraction: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def timed(self, timing: Timing, tokens: int | None = None, items: int | None = None) -> Row:
        """Sets the fields of a timing; returns itself."""
        self.seconds, self.spread, self.rounds = timing.median, timing.spread, len(timing.samples)
        self.p50, self.p95, self.p99 = (timing.percentile(p) for p in (50, 95, 99))
        self.tokens, self.items = tokens, items
        self.tokens_per_second = None if tokens is None else tokens / timing.median
        return self

    def compared(self, ratio: Ratio) -> Row:
        """Sets how many times faster fastbert is; returns itself."""
        self.speedup, self.speedup_low, self.speedup_high = ratio.value, ratio.low, ratio.high
        return self


@dataclass
class Results:
    """A Results holds rows, the machine, and its measured ceilings."""

    environment: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    ceilings: dict[str, float] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON, completely or not at all. NaN and infinity become null."""
        content = {
            "kind": KIND,
            "version": VERSION,
            "environment": self.environment,
            "ceilings": self.ceilings,
            "notes": self.notes,
            "rows": [dataclasses.asdict(row) for row in self.rows],
        }
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(_finite(content), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Results:
        """Reads a file of `save`.

        Raises ValueError, with the file name, for an incomplete file, another kind or version.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{os.fspath(path)}: not a readable result file: {error}") from error
        return cls.parse(text, os.fspath(path))

    @classmethod
    def parse(cls, text: str, where: str) -> Results:
        """Reads the text of a file of `save`. where: its name, for errors."""
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not a readable result file: {error}") from error
        if not isinstance(content, dict) or content.get("kind") != KIND:
            raise ValueError(f"{where}: not a result file of fastbert's benchmarks")
        if content.get("version") != VERSION:
            version = content.get("version")
            raise ValueError(
                f"{where}: a result file of version {version}, but this version of fastbert reads {VERSION}"
            )
        try:
            rows = [Row(**row) for row in content["rows"]]
            return cls(content["environment"], rows, content["ceilings"], content["notes"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{where}: a result file with missing or unknown fields: {error}") from error


def environment(device: torch.device) -> dict[str, Any]:
    """Returns the environment: device, driver, versions, commit, time. Every result has it."""
    facts: dict[str, Any] = {
        "device": device_name(device),
        "device_type": device.type,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "packages": {name: _version(name) for name in PACKAGES},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "driver": _nvidia_smi("driver_version"),
            "cuda": torch.version.cuda,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "multiprocessors": properties.multi_processor_count,
        }
    return facts


def device_name(device: torch.device) -> str:
    """Returns the name of the GPU, or of the processor with the number of used threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def cpu_name() -> str:
    """Returns the operating system's name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str | None:
    """Returns the commit of the running sources, with "-dirty" if they differ; None outside of a git checkout.

    Committed results do not count as sources, because a run overwrites those of an earlier run.
    """
    root = Path(__file__).resolve().parent.parent.parent
    if not (root / "setup.py").exists():
        return None

    def git(*args: str) -> str:
        command = ["git", "-C", str(root), *args]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        name = git("describe", "--always", "--abbrev=10", "--exclude=*")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)benchmarks/results")
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("FASTBERT_COMMIT")
    return f"{name}-dirty" if changed else name


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nvidia_smi(field_name: str) -> str | None:
    try:
        args = ["nvidia-smi", f"--query-gpu={field_name}", "--format=csv,noheader"]
        return (
            subprocess.run(args, capture_output=True, text=True, timeout=10, check=True).stdout.split("\n")[0].strip()
        )
    except (OSError, subprocess.SubprocessError):
        return None


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value
