"""The one place for device facts, block sizes and the launch itself.

Block sizes of the matrix kernels come from the tables in `tuned/`, one JSON file per GPU architecture; those of the
row-wise kernels from the formulas here. The number of tokens never enters a choice, and kernels do not specialise on it
(`do_not_specialize`), so that no length that arrives while serving can make a kernel compile.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from fastbert_kernels import interpreter

TABLE_VERSION = 1
TABLE_FOLDER = Path(__file__).parent / "tuned"
MIN_ARCH = 80
MIN_HEAD_SIZE, MAX_HEAD_SIZE = 16, 128
# Tensor cores up to here keep about 14 bits of a sum of float8 products; see `quantized_linear`.
LAST_ARCH_WITH_SHORT_FLOAT8_SUMS = 90

# Shared memory that one thread block may use, in bytes: CUDA C++ Programming Guide, "Technical specifications per
# compute capability", maximum amount of shared memory per thread block.
SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}


@dataclass(frozen=True)
class Config:
    """Block sizes, warps and stages of one kernel, and in words where they came from."""

    block_sizes: dict[str, int]
    source: str


@dataclass(frozen=True)
class Launch:
    """One recorded launch: what `run` was called with."""

    kernel: Any
    grid: tuple[int, ...]
    config: dict[str, int]
    arguments: dict[str, Any]


_recorded: list[Launch] | None = None
_recorded_arch: int | None = None


def interpreted() -> bool:
    """Whether kernels run under Triton's interpreter (TRITON_INTERPRET=1 when triton was imported)."""
    return interpreter.ACTIVE


def arch(device: torch.device) -> int:
    """Compute capability of the device as one integer, 90 for 9.0. Under the interpreter, 80."""
    if _recorded_arch is not None:
        return _recorded_arch
    if device.type != "cuda":
        return MIN_ARCH
    return _device_arch(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _device_arch(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def empty(shape: tuple[int, ...], *, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An output buffer. Every kernel's output is allocated here, so that tests can fill it with NaN first."""
    return torch.empty(shape, device=like.device, dtype=dtype or like.dtype)


def run(kernel: Any, grid: tuple[int, ...], config: dict[str, int], **arguments: Any) -> None:
    """Launches the kernel on the device of its tensors, whichever device is current."""
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, config, arguments))
        return
    device = next(a.device for a in arguments.values() if isinstance(a, torch.Tensor))
    # FP fusion is named because its default differs between Triton versions, and with it the bits of the results.
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](**arguments, **config, enable_fp_fusion=True)
    else:
        kernel[grid](**arguments, **config, enable_fp_fusion=True)


@contextmanager
def recording(for_arch: int) -> Iterator[list[Launch]]:
    """Inside, launches are listed instead of run, configured for the given architecture, whatever the device."""
    global _recorded, _recorded_arch
    if _recorded is not None:
        raise RuntimeError("launch.recording() does not nest")
    _recorded, _recorded_arch = [], for_arch
    try:
        yield _recorded
    finally:
        _recorded, _recorded_arch = None, None


def dot_precision(dtype: torch.dtype) -> str:
    """Precision of tl.dot's inputs: IEEE float32 unless the user allowed TF32 through PyTorch's own switch."""
    if dtype != torch.float32:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    # Before PyTorch 2.9 there is only allow_tf32; since then, reading it raises where the newer switch was used.
    allowed = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if allowed else "ieee"


@functools.cache
def rowwise_config(n_cols: int) -> dict[str, int]:
    """Kernels whose programs hold whole rows (LayerNorm, embedding): a tile of about 2,048 elements, 16 a thread."""
    block_cols = triton.next_power_of_2(n_cols)
    block_rows = max(1, 2048 // block_cols)
    return {
        "BLOCK_ROWS": block_rows,
        "BLOCK_COLS": block_cols,
        "num_warps": max(1, min(8, block_rows * block_cols // 512)),
        "num_stages": 1,
    }


@functools.cache
def elementwise_config(n_cols: int) -> dict[str, int]:
    """Elementwise kernels: tiles of 2,048 elements, 16 a thread."""
    block_cols = min(1024, triton.next_power_of_2(n_cols))
    return {"BLOCK_ROWS": 2048 // block_cols, "BLOCK_COLS": block_cols, "num_warps": 4, "num_stages": 1}


@functools.cache
def pooling_config(n_cols: int) -> dict[str, int]:
    """Pooling: whole rows, 8,192 elements a step, so that a few independent loads are in flight."""
    block_cols = triton.next_power_of_2(n_cols)
    return {"BLOCK_ROWS": max(1, 8192 // block_cols), "BLOCK_COLS": block_cols, "num_warps": 8, "num_stages": 1}


@functools.cache
def linear_config(dtype: torch.dtype, for_arch: int) -> Config:
    """Tile of the GEMM: BLOCK_ROWS x BLOCK_COLS outputs, BLOCK_K deep."""
    return _from_table("linear", _dtype_class(dtype), for_arch)


@functools.cache
def quantized_linear_config(dtype: torch.dtype, group: int | None, for_arch: int) -> Config:
    """Tile of the 8-bit GEMM. group: columns of x that share a scale, None where a row has one.

    A step of BLOCK_K lies within a group: where the table's does not, it is made to hold one (at least the 32 that the
    tensor cores take).
    """
    config = _from_table("quantized_linear", "int8" if dtype == torch.int8 else "float8", for_arch)
    block_sizes = dict(config.block_sizes)
    if group is not None and group % block_sizes["BLOCK_K"]:
        block_sizes["BLOCK_K"] = max(32, triton.next_power_of_2(group))
    return Config(block_sizes, config.source)


@functools.cache
def attention_config(dtype: torch.dtype, head_size: int, for_arch: int) -> Config:
    """Tile of the attention: BLOCK_Q query rows, BLOCK_K keys a step, the head size padded to BLOCK_D."""
    block_d = max(MIN_HEAD_SIZE, triton.next_power_of_2(head_size))
    config = _from_table("attention", f"{_dtype_class(dtype)}/{block_d}", for_arch)
    return Config({**config.block_sizes, "BLOCK_D": block_d}, config.source)


def _dtype_class(dtype: torch.dtype) -> str:
    return "float32" if dtype == torch.float32 else "float16"


def _from_table(op: str, key: str, for_arch: int) -> Config:
    tables = sorted(int(path.stem.removeprefix("sm_")) for path in TABLE_FOLDER.glob("sm_*.json"))
    nearest = max((a for a in tables if a <= for_arch), default=None)
    if nearest is None:
        raise ValueError(f"no table of block sizes for compute capability {for_arch / 10}: there are {tables}")
    path = TABLE_FOLDER / f"sm_{nearest}.json"
    table = read_table(path)
    if key not in table.get(op, {}):
        raise ValueError(f"{path}: no entry {op!r} -> {key!r}")
    measured = f"measured on {table['device']}, {table['date']}" if table["device"] else table["source"]
    return Config(dict(table[op][key]), f"tuned/{path.name} ({measured})")


@functools.cache
def read_table(path: Path) -> dict[str, Any]:
    """Reads one table of block sizes. Raises ValueError, naming the file, for what is not one."""
    try:
        table = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a readable table of block sizes: {error}") from error
    if not isinstance(table, dict) or table.get("version") != TABLE_VERSION:
        raise ValueError(f"{path}: expected a table of block sizes of version {TABLE_VERSION}")
    return table
