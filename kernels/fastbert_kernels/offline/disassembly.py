"""This module reads the machine code of compiled kernels with the tools of NVIDIA that Triton brings."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from bisect import bisect
from collections import Counter
from itertools import accumulate

import triton

INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_]*)", re.MULTILINE)


def run_tool(name: str, *arguments: str) -> str:
    """Returns what a tool prints. Raises subprocess.CalledProcessError where it fails."""
    return subprocess.run(
        [getattr(triton.knobs.nvidia, name).path, *arguments], check=True, capture_output=True, text=True
    ).stdout


def usage_of(cubin: bytes) -> dict[str, str]:
    """Returns the registers of a thread (REG) and its bytes of stack (STACK), as cuobjdump prints them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return dict(re.findall(r"\b(REG|STACK):(\d+)", run_tool("cuobjdump", "-res-usage", file.name)))


def instruction_counts(arch: int, cubins: list[bytes]) -> list[Counter[str]]:
    """Counts the instructions of each cubin by name. All are for one architecture.

    nvdisasm starts in 0.2 s, which is more than it needs for most kernels. So it reads all of them in one run, as one
    piece of code.
    """
    codes = [machine_code(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        machine = f"SM{arch}{'a' if arch >= 90 else ''}"  # as Triton names it to ptxas
        # -ndf leaves out dataflow analysis, which takes a third of nvdisasm's time and only annotates.
        text = run_tool("nvdisasm", "-ndf", "-b", machine, file.name)
    ends = list(accumulate(map(len, codes)))
    counts: list[Counter[str]] = [Counter() for _ in cubins]
    for address, name in INSTRUCTION.findall(text):
        counts[bisect(ends, int(address, 16))][name] += 1
    return counts


def machine_code(cubin: bytes) -> bytes:
    """Returns the code of all functions of a cubin, which is a 64-bit ELF file: its sections `.text.*`."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, number, names_index = struct.unpack_from("<3H", cubin, 0x3A)
    # The name's place, type, flags, address, place in the file and size of each section.
    sections = [struct.unpack_from("<2I4Q", cubin, table + i * size) for i in range(number)]
    names = sections[names_index][4]
    return b"".join(
        cubin[section[4] : section[4] + section[5]]
        for section in sections
        if cubin[names + section[0] :].startswith(b".text.")
    )
