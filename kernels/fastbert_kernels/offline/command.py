"""This module is the command `python -m fastbert_kernels.offline`."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import triton

from fastbert_kernels import launch
from fastbert_kernels.offline.compiling import compile_all
from fastbert_kernels.offline.coverage import COVERAGE, DTYPES, EIGHT_BIT, MIN_ARCH, MODELS, OPS, Case, cases
from fastbert_kernels.offline.disassembly import run_tool
from fastbert_kernels.offline.disentangled import disentangled_cases
from fastbert_kernels.offline.families import family_cases
from fastbert_kernels.offline.planning import plan
from fastbert_kernels.offline.printing import report
from fastbert_kernels.offline.rotary import rotary_cases
from fastbert_kernels.offline.training import training_cases
from fastbert_kernels.offline.unpacking import unpacking_cases
from fastbert_kernels.offline.variants import variant_cases


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastbert_kernels.offline",
        description="Compile the kernels as they would be launched, with no GPU present, and report registers, spills, "
        "shared memory and tensor-core instructions.",
        epilog=f"what is compiled:\n{COVERAGE}\n\nexit code: 0 no finding, 1 findings, 2 could not run",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known, known_dtypes = sorted(launch.SHARED_MEMORY), (*DTYPES, *EIGHT_BIT)
    parser.add_argument("--arch", nargs="+", type=int, default=known, metavar="N", help=f"of {known} (default: all)")
    parser.add_argument("--all", action="store_true", help="everything instead of the default subset")
    parser.add_argument("--kernel", nargs="+", choices=OPS, default=OPS, help="only these kernels")
    parser.add_argument("--dtype", nargs="+", choices=known_dtypes, default=known_dtypes, help="only these dtypes")
    parser.add_argument("--model", nargs="+", choices=(*MODELS, "extra"), help="only these models")
    parser.add_argument("--jobs", type=int, default=min(8, len(os.sched_getaffinity(0))), help="compiler processes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to FILE as well")
    return parser


def _chosen(options: argparse.Namespace, arch: int) -> Iterator[Case]:
    """Gives the cases that the options ask for on one architecture."""
    for dtype in options.dtype:
        if arch < MIN_ARCH.get(dtype, 0):
            continue
        every = (
            cases, training_cases, variant_cases, rotary_cases, family_cases, disentangled_cases, unpacking_cases
        )  # fmt: skip
        for case in chain.from_iterable(list_cases(dtype) for list_cases in every):
            wanted = case.op in options.kernel and (options.model is None or case.model in options.model)
            if wanted and (options.all or case.archs is None or arch in case.archs):
                yield case


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit code. Raises SystemExit with code 2 where it cannot run."""
    parser = _parser()
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.arch) - set(launch.SHARED_MEMORY))
    if unknown:
        parser.error(f"--arch: unknown {unknown}, known are {sorted(launch.SHARED_MEMORY)}")
    if options.jobs < 1:
        parser.error(f"--jobs: expected at least 1, got {options.jobs}")
    if options.json is not None and not options.json.absolute().parent.is_dir():
        parser.error(f"--json: no such folder: {options.json.absolute().parent}")
    if launch.interpreted():
        parser.error("TRITON_INTERPRET is set; unset it: one process cannot hold Triton's interpreter and its compiler")
    if triton.knobs.runtime.override_arch:
        parser.error("TRITON_OVERRIDE_ARCH is set; unset it: every kernel would be compiled for that architecture")
    try:
        for tool in ("cuobjdump", "nvdisasm"):
            run_tool(tool, "--version")
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        parser.error(f"this Triton ({triton.__version__}) brings no working {tool}: {error}")

    start = time.perf_counter()
    kernels = [kernel for arch in dict.fromkeys(options.arch) for kernel in plan([arch], _chosen(options, arch))]
    if not kernels:
        parser.error("nothing to compile: the default subset has none of these kernels; try --all")
    print(f"Triton {triton.__version__}, {len(kernels)} kernels{'' if options.all else ' (--all compiles more)'}")
    results = report(kernels, compile_all(kernels, options.jobs))
    seconds = time.perf_counter() - start
    failed = sum(bool(result.findings) for result in results)
    print(f"{'FAILED' if failed else 'ok'}: {failed} of {len(kernels)} kernels with findings, {seconds:.0f} s")
    if options.json is not None:
        rows = [
            {
                **{name: getattr(kernel, name) for name in ("arch", "op", "dtype", "models", "variants", "config")},
                **asdict(result),
                "shared_limit": launch.SHARED_MEMORY[kernel.arch],
            }
            for kernel, result in zip(kernels, results, strict=True)
        ]
        document = {"triton": triton.__version__, "all": options.all, "seconds": round(seconds, 1), "kernels": rows}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if failed else 0
