"""Peak memory on a CPU is that of a fresh process for each competitor, which loads it and encodes all texts once.

In the process of the contest all competitors live together, and nobody can tell whose memory is whose. What a training
step keeps for its backward pass is counted tensor by tensor, on any device.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

STATUS = Path("/proc/self/status")
# Without the working folder on the path, where a folder kernels/ would shadow a package that transformers looks for.
CHILD = "import sys; sys.path[:] = [p for p in sys.path if p]; from fastbert.bench import memory; memory.main()"


class Encoder(Protocol):
    """The fresh process runs this; it must be picklable."""

    batch_size: int | None

    def prepare(self) -> None: ...

    def encode(self, texts: list[str]) -> Any: ...


def peak_obstacle() -> str | None:
    """The reason why no process here can tell its own peak memory, or None."""
    return None if STATUS.exists() else f"needs {STATUS}, which only Linux has"


def own_peak() -> int:
    """Bytes of physical memory that this process has held at most.

    Not getrusage: its figure starts from that of the process that made this one.
    """
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def peak_of(encoder: Encoder, batch_size: int | None, texts: list[str], timeout: float = 120.0) -> int:
    """Bytes at the peak of a process that imports what the encoder needs, prepares it and encodes the texts.

    encoder: not prepared yet. Raises RuntimeError where the process fails or is not done in time (seconds).
    """
    paths = [str(Path(path).resolve()) for path in sys.path if path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    job = pickle.dumps((torch.get_num_threads(), encoder, batch_size, texts))
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


def saved_for_backward(forward: Callable[[], Any], without: Iterable[Tensor] = ()) -> int:
    """Counts the bytes that autograd keeps for the backward pass of what `forward` computes, each storage once.

    without: tensors whose memory is held anyway, as parameters are. What an autograd Function keeps elsewhere than in
    save_for_backward does not show.
    """
    held = {_address(tensor) for tensor in without}
    saved: dict[int, Tensor] = {}  # the tensors stay here, so that no other takes their place in memory

    def pack(tensor: Tensor) -> None:
        # The graph holds this function: a tensor that belongs to the graph would keep it alive forever.
        saved.setdefault(_address(tensor), tensor.detach())

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing):
        output = forward()
    del output
    return sum(tensor.untyped_storage().nbytes() for address, tensor in saved.items() if address not in held)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def main() -> None:
    """Runs in the fresh process: takes what `peak_of` sends on standard input, and prints the peak as JSON."""
    encoder: Encoder
    n_threads, encoder, batch_size, texts = pickle.load(sys.stdin.buffer)
    torch.set_num_threads(n_threads)
    encoder.batch_size = batch_size
    encoder.prepare()
    encoder.encode(texts)
    print(json.dumps({"peak_bytes": own_peak()}))
