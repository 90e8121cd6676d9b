"""The loops of compiled kernels are read as nvdisasm shows them, in processes without TRITON_INTERPRET."""

from __future__ import annotations

import re
import tempfile
from itertools import chain
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from fastbert_kernels import offline
from fastbert_kernels.offline.disassembly import run_tool
from fastbert_kernels.offline.training import training_cases

LABEL = re.compile(r"^(\.L_x_\d+):", re.MULTILINE)
CODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][^;]*?)\s*;")


def planned(arch: int, dtype: str, op: str, model: str, variant: str) -> list[offline.Kernel]:
    """The kernels that one case of the offline report launches."""
    every = chain(offline.cases(dtype), training_cases(dtype))
    return offline.plan([arch], [case for case in every if (case.op, case.model, case.variant) == (op, model, variant)])


def loops(kernel: offline.Kernel) -> list[list[str]]:
    """The instructions of each loop that contains no other one."""
    target = GPUTarget("cuda", kernel.arch, 32)
    compiled: Any = triton.compile(kernel.source, target=target, options=kernel.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = run_tool("nvdisasm", "-c", "-ndf", file.name)
    bodies = []
    for label in LABEL.finditer(text):
        back = re.search(rf"BRA[^;]*`\({re.escape(label[1])}\)", text[label.end() :])
        if back is None:
            continue
        body = text[label.end() : label.end() + back.end()] + " ;"
        if not any(re.search(rf"BRA[^;]*`\({re.escape(inner)}\)", body) for inner in LABEL.findall(body)):
            bodies.append(CODE.findall(body))
    return [body for body in bodies if len(body) > 1]  # kernels end with a jump to itself


def waits(body: list[str]) -> list[int]:
    """How many groups of copies each wait of a loop leaves in flight."""
    return [int(code.split(",")[1].split()[0], 16) for code in body if code.startswith("DEPBAR.LE SB0")]


def counts(body: list[str], name: str) -> int:
    """How many instructions of a loop begin with the name."""
    return sum(code.startswith(name) for code in body)
