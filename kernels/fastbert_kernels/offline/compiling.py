"""This module compiles kernels, reads what the compiler made of them, and says what is wrong with it."""

from __future__ import annotations

import multiprocessing
import re
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from operator import attrgetter
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from fastbert_kernels import launch
from fastbert_kernels.offline.disassembly import instruction_counts, usage_of
from fastbert_kernels.offline.planning import Kernel

MATRIX_OPS = ("linear", "attention", "quantized_linear")
TENSOR_MEMORY_COLUMNS = 512

# These are HMMA (to sm_89, sm_120), HGMMA (sm_90), UTCHMMA (sm_100), and their kin for other input types.
TENSOR_CORE = re.compile(r"(UTC)?[BHIOQ]?G?MMA")
TENSOR_CORE_8_BIT = re.compile(r"(UTC)?[IQ]G?MMA")
# These copy from global to shared memory past the registers: cp.async, and copies of the tensor memory accelerator.
ASYNC_COPY = re.compile(r"LDGSTS|UTMALDG|UBLKCP")


@dataclass
class Result:
    """A `Result` holds what the compiler made of a kernel. Sizes are in bytes."""

    registers: int = 0
    stack: int = 0
    local_loads: int = 0
    local_stores: int = 0
    shared: int = 0
    tensor_cores: dict[str, int] = field(default_factory=dict)
    async_copies: dict[str, int] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)  # What is wrong with the kernel.

    @property
    def spills(self) -> bool:
        return self.local_loads + self.local_stores > 0


def compile_kernel(kernel: Kernel) -> Result:
    """Compiles and disassembles one kernel. An error of these is a finding; nothing is raised."""
    return compile_kernels([kernel])[0]


def compile_kernels(kernels: list[Kernel]) -> list[Result]:
    """Does for several kernels what `compile_kernel` does for one, in less time."""
    results: list[Result] = []
    for arch, of_arch in groupby(kernels, attrgetter("arch")):
        group = [(kernel, _compile(kernel)) for kernel in of_arch]
        cubins = [made.asm["cubin"] for _, made in group if not isinstance(made, Result)]
        try:
            counts = iter(instruction_counts(arch, cubins) if cubins else [])
        except subprocess.CalledProcessError:
            counts = None  # Read one by one, each has an error of its own.
        for kernel, made in group:
            results.append(
                made if isinstance(made, Result) else _read(kernel, made, None if counts is None else next(counts))
            )
    return results


def _compile(kernel: Kernel) -> Any:
    """Returns Triton's compiled kernel, or a `Result` that says why there is none."""
    try:
        return triton.compile(kernel.source, target=GPUTarget("cuda", kernel.arch, 32), options=kernel.options)
    except Exception as error:
        # Triton's messages begin with the kernel's source up to the error, and end with the error.
        reason = " ".join(str(error).split())[-300:]
        return Result(findings=[f"does not compile: {type(error).__name__}: {reason}"])


def _read(kernel: Kernel, compiled: Any, counts: Counter[str] | None) -> Result:
    """Says what the compiler made of a kernel. counts: its instructions, where they were counted with others'."""
    cubin = compiled.asm["cubin"]
    try:
        usage = usage_of(cubin)
        counts = instruction_counts(kernel.arch, [cubin])[0] if counts is None else counts
    except subprocess.CalledProcessError as error:
        return Result(findings=[f"cannot be read: {error}: {error.stderr.strip()[:400]}"])
    if usage.keys() != {"REG", "STACK"} or not counts["EXIT"]:
        return Result(findings=[f"cannot be read: cuobjdump gave {usage}, nvdisasm {counts.total()} instructions"])
    result = Result(
        registers=int(usage["REG"]),
        stack=int(usage["STACK"]),
        local_loads=counts["LDL"],
        local_stores=counts["STL"],
        shared=compiled.metadata.shared,
        tensor_cores={name: count for name, count in counts.items() if TENSOR_CORE.fullmatch(name)},
        async_copies={name: count for name, count in counts.items() if ASYNC_COPY.fullmatch(name)},
    )
    result.findings = findings_of(kernel, result, getattr(compiled.metadata, "tmem_size", None) or 0)
    if "ttg.warp_specialize" in compiled.asm["ttgir"] and has_host_descriptors(kernel):
        result.findings.append("warp-specialised with a descriptor from the host: Triton compiles that wrong")
    return result


def has_host_descriptors(kernel: Kernel) -> bool:
    """Says whether an argument of the kernel is a tensor descriptor."""
    return any("tensordesc" in str(kind) for kind in kernel.source.signature.values())


def findings_of(kernel: Kernel, result: Result, tensor_memory: int) -> list[str]:
    findings: list[str] = []
    limit = launch.SHARED_MEMORY[kernel.arch]
    if result.spills and kernel.must_not_spill:
        loads_stores = f"{result.local_loads} local loads and {result.local_stores} local stores"
        findings.append(f"spills: {result.stack} bytes of stack, {loads_stores}")
    if result.shared > limit:
        findings.append(f"shared memory: {result.shared} bytes, a block of sm_{kernel.arch} may have {limit}")
    if tensor_memory > TENSOR_MEMORY_COLUMNS:
        findings.append(f"tensor memory: {tensor_memory} columns of {TENSOR_MEMORY_COLUMNS}")
    if kernel.op == "quantized_linear" and not any(map(TENSOR_CORE_8_BIT.fullmatch, result.tensor_cores)):
        findings.append(f"no 8-bit tensor-core instruction in a matrix kernel of dtype {kernel.dtype}")
    elif kernel.op in MATRIX_OPS and (kernel.dtype == "fp32") == bool(result.tensor_cores):
        fault = "tensor-core instructions in IEEE float32" if result.tensor_cores else "no tensor-core instruction"
        findings.append(f"{fault} in a matrix kernel of dtype {kernel.dtype}")
    return findings


# Worker processes compile these, by index. They are forked after the list is filled, and need no pickled kernels.
_kernels: list[Kernel] = []
MOST_AT_ONCE = 16  # kernels that are disassembled together


def _compile_by_index(indices: range) -> list[Result]:
    return compile_kernels([_kernels[index] for index in indices])


def compile_all(kernels: list[Kernel], jobs: int) -> Iterator[Result]:
    """Gives the results in order. A kernel that kills the compiler is compiled again alone, so no other is blamed."""
    _kernels[:] = kernels
    size = max(1, min(MOST_AT_ONCE, len(kernels) // (4 * jobs)))
    pieces = [range(start, min(start + size, len(kernels))) for start in range(0, len(kernels), size)]
    pool = _pool(jobs)
    futures: list[Future[list[Result]]] = []
    try:
        with suppress(BrokenProcessPool):
            for piece in pieces:
                futures.append(pool.submit(_compile_by_index, piece))
        for number, piece in enumerate(pieces):
            try:
                yield from futures[number].result() if number < len(futures) else map(_compile_alone, piece)
            except BrokenProcessPool:
                yield from map(_compile_alone, piece)
    finally:
        pool.shutdown(cancel_futures=True)


def _compile_alone(index: int) -> Result:
    with _pool(1) as pool:
        try:
            return pool.submit(_compile_by_index, range(index, index + 1)).result()[0]
        except BrokenProcessPool:
            return Result(findings=["does not compile: the compiler's process died"])


def _pool(jobs: int) -> ProcessPoolExecutor:
    # A pool that breaks ends its other processes by SIGTERM, whatever the command does at that signal.
    ends = partial(signal.signal, signal.SIGTERM, signal.SIG_DFL)
    return ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("fork"), initializer=ends)
