"""This tool records the bits of what fastbert computes: a change that shall change no number is proved with it.

    python benchmarks/bits.py --out before.json                       a CPU: a minute
    python benchmarks/bits.py --out before-triton.json --part triton  a GPU, or Triton's interpreter: minutes
    python benchmarks/bits.py --compare before.json after.json        lists every difference; exit code 1 if bits differ

A recording holds a SHA-256 of each output's bytes, with its shape and dtype, for fixed weights and inputs. A case that
is refused is recorded by the type of its exception. The tool uses public names alone, so one copy of it runs on commits
far apart: PYTHONPATH=<checkout>:<checkout>/kernels says which one.

Bits also depend on the processor and on the packages. They are recorded too, and a comparison shows where they differ.
ATEN_CPU_CAPABILITY=avx2, or avx512, records what older processors run.
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

# One thread adds up in one order. Nothing comes from the network.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
PACKAGES = ("torch", "triton", "numpy", "transformers", "sentence-transformers", "tokenizers")


def environment() -> dict[str, str]:
    """Describes what bits depend on beside the code, and where the code is."""
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
    """Records a part to a file, in a process that has the settings of ENVIRONMENT."""
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
        # Libraries read them when they are loaded: the process starts anew with them.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **wanted})
    record(options.part, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
