"""This tool records the bits of fastbert's outputs. It proves that a change of the code changes no number.

    python benchmarks/bits.py --out before.json                       a CPU: a minute
    python benchmarks/bits.py --out before-triton.json --part triton  a GPU, or Triton's interpreter: minutes
    python benchmarks/bits.py --compare before.json after.json        lists every difference; exit code 1 if bits differ

A recording holds a SHA-256 of each output's bytes, with its shape and dtype, for fixed weights and inputs. If a case is
refused, the type of its exception is recorded. The tool uses only public names, so one copy of it runs on commits far
apart. PYTHONPATH=<checkout>:<checkout>/kernels selects the checkout.

Bits also depend on the processor and on the packages. These are recorded too, and a comparison shows where they differ.
ATEN_CPU_CAPABILITY=avx2, or avx512, records the results of older processors.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import os
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import torch
from bits_parts import record_cpu, record_triton
from bits_recording import Recording, compare

import fastbert

# One thread always adds up in the same order. Nothing comes from the network.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
PACKAGES = ("torch", "triton", "numpy", "transformers", "sentence-transformers", "tokenizers")


def environment() -> dict[str, str]:
    """Describes the environment on which bits depend beside the code, and the place of the code."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    capability = f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}"
    return {"source": str(Path(fastbert.__file__).parent.parent), "gpu": device, "cpu": capability, **versions}


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def record(part: str, path: Path) -> None:
    """Records a part to a file, in a process with the settings of ENVIRONMENT."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    recording = Recording()
    with tempfile.TemporaryDirectory(prefix="fastbert-bits-") as folder:
        (record_cpu if part == "cpu" else record_triton)(recording, Path(folder))
    recording.save(path, environment())
    for message, n in Counter(recording.messages.values()).most_common():
        print(f"{n} raised {message}", file=sys.stderr)
    print(f"{path}: {len(recording.bits)} entries, {len(recording.messages)} of them refusals")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Record the bits of what fastbert computes, or compare recordings.")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--out", type=Path, metavar="FILE", help="record to a JSON file")
    action.add_argument("--compare", type=Path, nargs=2, metavar="FILE", help="list what differs; exit code 1 for bits")
    parser.add_argument("--part", choices=("cpu", "triton"), default="cpu", help="what to record (cpu)")
    options = parser.parse_args(arguments)
    if options.compare is not None:
        return compare(*options.compare)
    wanted = dict(ENVIRONMENT)
    if options.part == "triton" and not torch.cuda.is_available():
        wanted["TRITON_INTERPRET"] = "1"
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        # Libraries read these settings when they are loaded, so the process starts again with them.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **wanted})
    record(options.part, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
