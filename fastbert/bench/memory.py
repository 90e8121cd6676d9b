"""Peak memory on a CPU is measured in a fresh process for each competitor, which loads it and encodes all texts once.

In the contest's process all competitors share the memory, so their parts cannot be told apart. The memory that a
training step saves for its backward pass is counted tensor by tensor, on any device.
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
# The working folder is not on the path, because its folder kernels/ would shadow a package that transformers imports.
CHILD = "import sys; sys.path[:] = [p for p in sys.path if p]; from fastbert.bench import memory; memory.main()"


class Encoder(Protocol):
    """An Encoder is run by the fresh process; it must be picklable."""

    batch_size: int | None

    def prepare(self) -> None: ...

    def encode(self, texts: list[str]) -> Any: ...


def peak_obstacle() -> str | None:
    """Returns the reason why a process here cannot read its own peak memory, or None."""
    return None if STATUS.exists() else f"needs {STATUS}, which only Linux has"


def own_peak() -> int:
    """Returns the peak of this process's physical memory, in bytes.

    getrusage is not used, because its value starts from that of the parent process.
    """
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def peak_of(encoder: Encoder, batch_size: int | None, texts: list[str], timeout: float = 120.0) -> int:
    """Returns the peak memory, in bytes, of a process that imports, prepares and runs the encoder on the texts.

    encoder: not prepared yet. Raises RuntimeError if the process fails or exceeds the timeout (seconds).
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
    """Counts the bytes that autograd saves for the backward pass of `forward`, each storage once.

    without: tensors whose memory is held anyway, such as parameters. Tensors that an autograd Function stores outside
    of save_for_backward are not counted.
    """
    held = {_address(tensor) for tensor in without}
    saved: dict[int, Tensor] = {}  # holding the tensors prevents reuse of their memory

    def pack(tensor: Tensor) -> None:
        # The graph holds this function. A tensor that belongs to the graph would keep the graph alive forever.
        saved.setdefault(_address(tensor), tensor.detach())

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing):
        output = forward()
    del output
    return sum(tensor.untyped_storage().nbytes() for address, tensor in saved.items() if address not in held)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def main() -> None:
    """Runs in the fresh process: reads the job of `peak_of` from standard input, and prints the peak as JSON."""
    encoder: Encoder
    n_threads, encoder, batch_size, texts = pickle.load(sys.stdin.buffer)
    torch.set_num_threads(n_threads)
    encoder.batch_size = batch_size
    encoder.prepare()
    encoder.encode(texts)
    print(json.dumps({"peak_bytes": own_peak()}))
