"""Peak memory on a CPU: a fresh process for each competitor, which loads it and encodes all texts once.

In the process of the contest all competitors live together, and nobody can tell whose memory is whose.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from fastbert.bench.text import TextEncoder

STATUS = Path("/proc/self/status")
# Without the working folder on the path, where a folder kernels/ would shadow a package that transformers looks for.
CHILD = "import sys; sys.path[:] = [p for p in sys.path if p]; from fastbert.bench import memory; memory.main()"


def unavailable() -> str | None:
    """Why no process here can tell its own peak memory, or None."""
    return None if STATUS.exists() else f"needs {STATUS}, which only Linux has"


def own_peak() -> int:
    """Bytes of physical memory that this process has held at most.

    Not getrusage: its figure starts from that of the process that made this one.
    """
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def peak_of(encoder: TextEncoder, timeout: float = 120.0) -> int:
    """Bytes at the peak of a process that imports what the encoder needs, loads it and encodes the task's texts.

    encoder: prepared, with its batch size chosen. Raises RuntimeError where the process fails or is not done in time
    (seconds).
    """
    paths = [str(Path(path).resolve()) for path in sys.path if path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    job = pickle.dumps((torch.get_num_threads(), encoder.batch_size, encoder.unloaded))
    try:
        done = subprocess.run(
            [sys.executable, "-c", CHILD], input=job, capture_output=True, timeout=timeout, env=environment
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"not done within {timeout:.0f} s") from error
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise RuntimeError(lines[-1] if lines else f"exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])["peak_bytes"]


def main() -> None:
    """The fresh process: what `peak_of` sends on standard input, the peak as JSON on standard output."""
    encoder: TextEncoder
    threads, batch_size, encoder = pickle.load(sys.stdin.buffer)
    torch.set_num_threads(threads)
    encoder.batch_size = batch_size
    encoder.prepare()
    encoder.encode(encoder.task.texts)
    print(json.dumps({"peak_bytes": own_peak()}))
