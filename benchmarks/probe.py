"""The probe finds in minutes whether every kernel is right, how fast it is, and where a forward pass loses its time.

    python benchmarks/probe.py --out DIR --seconds 170             on a GPU; run_gpu.sh does it as its part `probe`
    python benchmarks/probe.py --out DIR --dry                     every line of it in small, on the CPU

SECTIONS lists the measurements, the most important first (probe_models.py, probe_kernels.py, probe_gemms.py). Each
piece is a row in DIR/probe.json, written at once, with its error against float64. If a piece raises, its row holds the
error, and the other pieces run. If a kernel destroys the CUDA context, another process continues with the next section.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import probe_gemms
import probe_kernels
import probe_models
import torch
from probe_pieces import ContextLost, Probe, line
from suites import Deadline, Recorder

from fastbert.bench.results import FAILED, Results, Row

FILE = "probe.json"
LOST = 3  # exit code: the CUDA context is lost


@dataclass(frozen=True)
class Section:
    """A Section has a weight, its share of the time relative to the others."""

    run: Callable[[Probe], None]
    weight: float


SECTIONS = {
    "ceilings": Section(probe_kernels.measure_ceilings, 12.0),
    "models": Section(probe_models.measure_models, 45.0),
    "gemm": Section(probe_gemms.measure_gemms, 35.0),
    "few rows": Section(probe_gemms.measure_few_rows, 8.0),
    "attention": Section(probe_kernels.measure_attention, 25.0),
    "profile": Section(probe_models.measure_profile, 20.0),
    "rows": Section(probe_kernels.measure_rows, 8.0),
    "8 bits": Section(probe_kernels.measure_eight_bit, 20.0),
    "8 bits, candidates": Section(probe_gemms.measure_eight_bit_candidates, 6.0),
    "copies": Section(probe_kernels.measure_copies, 3.0),
}


def lines(rows: Sequence[Row]) -> list[str]:
    """Yields the probe's part of a summary: a heading for each section, and a line for each row."""
    lines_of_text: list[str] = []
    section = ""
    for row in rows:
        heading, _, rest = row.workload.partition(": ")
        if heading != section:
            section = heading
            lines_of_text.append(f"\nprobe, {section}")
        lines_of_text.append("  " + line(row).removeprefix(f"{heading}: "))
    return lines_of_text


def run(
    out: Path,
    device: torch.device,
    seconds: float,
    *,
    tiny: bool = False,
    model: Path | None = None,
    say: Callable[[str], None] = print,
    command: Sequence[str] = (sys.executable, str(Path(__file__).resolve())),
) -> int:
    """Runs all sections in one separate process. If a section loses the context, another process runs the rest.

    Returns an exit code: 1 if a piece failed. command: the command that starts a process, for tests.
    """
    (out / FILE).unlink(missing_ok=True)
    deadline, left, ended = Deadline(seconds), list(SECTIONS), 0
    while left and deadline.left > 0:
        options = ["--out", str(out), "--seconds", f"{deadline.left:.1f}", "--only", *left]
        options += ["--model", str(model)] if model else []
        options += ["--dry"] if tiny and device.type == "cpu" else ["--tiny"] if tiny else []
        code = subprocess.run([*command, *options]).returncode
        ended = ended or code
        done = Results.load(out / FILE).notes.get("sections", {}) if (out / FILE).exists() else {}
        remaining = [name for name in left if name not in done]
        if code != LOST or remaining == left:
            break
        left = remaining
        say(f"the CUDA context was lost; going on with {', '.join(left) or 'nothing'}")
    return int(ended != 0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: all pieces ran, 1: one failed, 3: the CUDA context was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help=f"where {FILE} goes; rows are added to it"
    )
    parser.add_argument("--seconds", type=float, default=170.0)
    parser.add_argument("--only", nargs="+", metavar="SECTION", help="by default all, the most important first")
    parser.add_argument(
        "--model", type=Path, metavar="FOLDER", help="a MiniLM, else the package's, else random weights"
    )
    parser.add_argument("--tiny", action="store_true", help="small sizes, one round each")
    parser.add_argument("--dry", action="store_true", help="the same on the CPU, kernels interpreted")
    args = parser.parse_args(arguments)
    if args.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which sections do
    device = torch.device("cpu" if args.dry else "cuda")
    unknown = sorted(set(args.only or ()) - set(SECTIONS))
    if unknown:
        parser.error(f"--only: got {', '.join(unknown)}, expected some of {', '.join(SECTIONS)}")
    recorder = Recorder(args.out / FILE, device)
    if (args.out / FILE).exists():
        recorder.results = Results.load(args.out / FILE)
    torch.manual_seed(0)
    probe = Probe(device, recorder, Deadline(args.seconds), tiny=args.tiny or args.dry, model=args.model)
    return probe_all(probe, [name for name in SECTIONS if args.only is None or name in args.only])


def probe_all(probe: Probe, names: Sequence[str]) -> int:
    """Runs the sections within their shares of the time. Returns the exit code of `main`."""
    whole = probe.deadline
    for number, name in enumerate(names):
        section = SECTIONS[name]
        share = section.weight / sum(SECTIONS[later].weight for later in names[number:])
        probe.section, before = name, whole.left
        probe.deadline = Deadline(max(0.0, before * share), clock=whole.clock)
        lost = False
        try:
            probe.attempt("all of it", "section", lambda section=section: section.run(probe))
        except ContextLost as error:
            lost = True
            probe.say(f"{name}: {error}")
        took = {name: round(before - whole.left, 1)}
        probe.recorder.note(sections={**probe.recorder.results.notes.get("sections", {}), **took})
        if lost:
            return LOST
    return int(any(row.status == FAILED for row in probe.recorder.results.rows))


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # with a lost CUDA context, functions that run at exit can fail or hang
