"""This module prints the table of the offline report, and its summary."""

from __future__ import annotations

from collections.abc import Iterable

from fastbert_kernels import launch
from fastbert_kernels.offline.compiling import MATRIX_OPS, Result
from fastbert_kernels.offline.planning import Kernel

HEADER = (
    *("arch", "kernel", "dtype", "launched for", "tile", "regs", "spills"),
    *("shared KiB", "tensor cores", "async copies", "result"),
)


def report(kernels: list[Kernel], results: Iterable[Result]) -> list[Result]:
    """Prints the table as results come in, then a summary of each architecture, and the findings."""
    # Widths come from the plan before the first result, and are wide enough for what a compiler can say.
    widths = [max(map(len, column)) for column in zip(HEADER, *(_row(k, Result()) for k in kernels), strict=True)]
    widths = [max(w, least) for w, least in zip(widths, (0, 0, 0, 0, 0, 4, 12, 10, 12, 12, 0), strict=True)]

    def print_row(cells: tuple[str, ...]) -> None:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip(), flush=True)

    print_row(HEADER)
    done: list[Result] = []
    for kernel, result in zip(kernels, results, strict=True):
        done.append(result)
        print_row(_row(kernel, result))
    print()
    for arch in dict.fromkeys(kernel.arch for kernel in kernels):
        of_arch = [result for kernel, result in zip(kernels, done, strict=True) if kernel.arch == arch]
        print(
            f"sm_{arch:<4} {len(of_arch):4} kernels, at most {max(r.registers for r in of_arch):3} registers, "
            f"{sum(r.spills for r in of_arch)} with spills, {sum(bool(r.findings) for r in of_arch)} failed"
        )
    for kernel, result in zip(kernels, done, strict=True):
        for finding in result.findings:
            print(f"FAILED sm_{kernel.arch} {kernel.op} {kernel.dtype} [{kernel.label}; {kernel.tile}]: {finding}")
    return done


def _row(kernel: Kernel, result: Result) -> tuple[str, ...]:
    def counted(counts: dict[str, int]) -> str:
        return " ".join(f"{name}:{count}" for name, count in sorted(counts.items()))

    tensor_cores = counted(result.tensor_cores)
    if not tensor_cores and kernel.op in MATRIX_OPS and kernel.dtype == "fp32":
        tensor_cores = "fp32 FMA"
    return (
        f"sm_{kernel.arch}",
        kernel.op,
        kernel.dtype,
        kernel.label,
        kernel.tile,
        str(result.registers),
        f"{result.stack} B {result.local_loads}+{result.local_stores}" if result.spills or result.stack else "-",
        f"{result.shared / 1024:.1f}/{launch.SHARED_MEMORY[kernel.arch] // 1024}",
        tensor_cores or "-",
        counted(result.async_copies) or "-",
        "FAILED" if result.findings else "ok, spills" if result.spills else "ok",
    )
