"""The one place for device facts, block sizes and the launch itself.

Block sizes of the matrix kernels, and the choice of GEMM, come from tables (tables.py): one JSON file per GPU
architecture in `tuned/`, before it the user's own. Those of the row-wise kernels come from the formulas here. The
number of tokens never enters a choice, and kernels do not specialise on it (`do_not_specialize`), so that no length
that arrives while serving can make a kernel compile.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from fastbert_kernels import disk_cache, events, interpreter, tables
from fastbert_kernels.jit import guarded

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


events.listen()

_recorded: list[Launch] | None = None
_recorded_arch: int | None = None
_one_at_a_time = threading.RLock()  # launches of the interpreter, and of kernels that another `jit` made


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


def n_multiprocessors(device: torch.device) -> int:
    """Of the GPU. Two under the interpreter, and where launches are recorded for a GPU that is not there."""
    if _recorded is not None or device.type != "cuda":
        return 2
    return _n_multiprocessors(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _n_multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def empty(shape: tuple[int, ...], *, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An output buffer. Every kernel's output is allocated here, so that tests can fill it with NaN first."""
    return torch.empty(shape, device=like.device, dtype=dtype or like.dtype)


def cdiv(n: int, block: int) -> int:
    """How many blocks hold n. `triton.cdiv` is the same, by way of six more Python calls."""
    return -(-n // block)


def run(kernel: Any, grid: tuple[int, ...], config: dict[str, int], **arguments: Any) -> None:
    """Launches the kernel on the device of its tensors, whichever device is current.

    Where Triton's cache on disk cannot be used, this process goes on with a folder of its own: `disk_cache`.
    """
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, config, arguments))
        return
    for argument in arguments.values():
        # A tensor descriptor has its tensor as `base`.
        tensor = argument.base if isinstance(argument, TensorDescriptor) else argument
        if isinstance(tensor, torch.Tensor):
            device = tensor.device
            break
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            _launch(kernel, grid, config, arguments)
    else:
        _launch(kernel, grid, config, arguments)


def _launch(kernel: Any, grid: tuple[int, ...], config: dict[str, int], arguments: dict[str, Any]) -> None:
    if guarded(kernel):
        _start(kernel, grid, config, arguments)
    else:
        with _one_at_a_time:
            _start(kernel, grid, config, arguments)


def _start(kernel: Any, grid: tuple[int, ...], config: dict[str, int], arguments: dict[str, Any]) -> None:
    # FP fusion is named because its default differs between Triton versions, and with it the bits of the results.
    try:
        kernel[grid](**arguments, **config, enable_fp_fusion=True)
    except OSError as error:
        disk_cache.replace(error)
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
    """Pooling over rows: blocks of 4,096 elements, 32 a thread, UNROLL of them at a time, of 128 columns.

    So few columns for the sake of a few long texts, which would else be read by as few multiprocessors.
    """
    block_cols = min(128, triton.next_power_of_2(n_cols))
    return {
        "BLOCK_ROWS": 4096 // block_cols,
        "BLOCK_COLS": block_cols,
        "UNROLL": 4,
        "num_warps": 4,
        "num_stages": 1,
    }


@functools.cache
def whole_row_config(n_cols: int) -> dict[str, int]:
    """Kernels whose programs hold one row of the batch's vectors: up to 16 elements a thread."""
    block_cols = triton.next_power_of_2(n_cols)
    return {"BLOCK_COLS": block_cols, "num_warps": max(1, min(8, block_cols // 256)), "num_stages": 1}


@functools.cache
def one_row_pooling_config(n_cols: int) -> dict[str, int]:
    """Pooling that takes one row of a sequence, the first or the last."""
    return {"BLOCK_ROWS": 1, "UNROLL": 1, **whole_row_config(n_cols)}


# What a GEMM may do to its accumulator, as table keys name it: both GELUs cost the same.
EPILOGUES = {"none": "none", "gelu": "gelu", "gelu_tanh": "gelu", "residual": "residual"}


def linear_config(
    dtype: torch.dtype, for_arch: int, shape: tuple[int, int] | None = None, epilogue: str = "none"
) -> Config:
    """Tile of the GEMM: BLOCK_ROWS x BLOCK_COLS outputs, BLOCK_K deep. shape: (K, M), if the table may know it."""
    return _required("linear", _gemm_keys(dtype, shape, epilogue), for_arch)


def linear_persistent_config(
    dtype: torch.dtype, for_arch: int, shape: tuple[int, int] | None = None, epilogue: str = "none"
) -> Config | None:
    """The same for the persistent GEMM; None where the architecture or the dtype has none."""
    return _from_tables("linear_persistent", _gemm_keys(dtype, shape, epilogue), for_arch)


@dataclass(frozen=True)
class Gemm:
    """How to multiply for one shape: the fastest kernel, one of GEMMS, and the faster of our own with its tile.

    choice and choice_source are None where no table knows the shape.
    """

    choice: str | None
    choice_source: str | None
    ours: str
    config: Config


def gemm(dtype: torch.dtype, for_arch: int, shape: tuple[int, int], epilogue: str) -> Gemm:
    """What the tables say of x @ weight^T with weight (M, K), shape = (K, M). The number of rows does not count."""
    return _gemm(dtype, for_arch, shape, epilogue, _recorded is not None, tables.generation)


@functools.cache
def _gemm(
    dtype: torch.dtype, for_arch: int, shape: tuple[int, int], epilogue: str, shipped_only: bool, generation: int
) -> Gemm:
    found = tables.find("gemm", (gemm_key(dtype, shape, epilogue),), for_arch, shipped_only)
    entry, source = ({}, None) if found is None else found
    persistent = linear_persistent_config(dtype, for_arch, shape, epilogue)
    # Tensor descriptors want rows of a multiple of 16 bytes; where tensors are views, linear_forward looks again.
    if any(size * dtype.itemsize % 16 for size in shape):
        persistent = None
    if persistent is not None and entry.get("ours") != "linear":
        return Gemm(entry.get("kernel"), source, "linear_persistent", persistent)
    return Gemm(entry.get("kernel"), source, "linear", linear_config(dtype, for_arch, shape, epilogue))


def quantized_linear_config(
    dtype: torch.dtype,
    group: int | None,
    for_arch: int,
    shape: tuple[int, int] | None = None,
    quantizes: bool = False,
) -> Config:
    """Tile of the 8-bit GEMM. group: columns of x that share a scale, None where a row has one.

    shape: (K, M), if the table may know it; quantizes: whether the result is in 8 bits too. A step of BLOCK_K lies
    within a group: where the table's does not, it is made to hold one (at least the 32 that the tensor cores take).
    """
    config = _required("quantized_linear", _quantized_keys(dtype, shape, group, quantizes), for_arch)
    return _within_groups(config, group)


def quantized_linear_persistent_config(
    dtype: torch.dtype,
    group: int | None,
    for_arch: int,
    shape: tuple[int, int] | None = None,
    quantizes: bool = False,
) -> Config | None:
    """The same for the persistent 8-bit GEMM; None where the architecture, the dtype or the group has none."""
    config = _from_tables("quantized_linear_persistent", _quantized_keys(dtype, shape, group, quantizes), for_arch)
    if config is None:
        return None
    config = _within_groups(config, group)
    # A descriptor's block cannot end where a group does, if that is in the middle of it.
    return None if group is not None and group % config.block_sizes["BLOCK_K"] else config


def _within_groups(config: Config, group: int | None) -> Config:
    block_sizes = dict(config.block_sizes)
    if group is not None and group % block_sizes["BLOCK_K"]:
        block_sizes["BLOCK_K"] = max(32, triton.next_power_of_2(group))
    return Config(block_sizes, config.source)


def quantized_gemm(
    dtype: torch.dtype, for_arch: int, shape: tuple[int, int], group: int | None, out_dtype: torch.dtype
) -> Gemm:
    """How to multiply 8-bit operands, x (T, K) by weight (M, K), shape = (K, M): ours is one of QUANTIZED_GEMMS.

    out_dtype: of the result; 8 bits for one that is quantised.
    """
    return _quantized_gemm(dtype, for_arch, shape, group, out_dtype, _recorded is not None, tables.generation)


@functools.cache
def _quantized_gemm(
    dtype: torch.dtype,
    for_arch: int,
    shape: tuple[int, int],
    group: int | None,
    out_dtype: torch.dtype,
    shipped_only: bool,
    generation: int,
) -> Gemm:
    quantizes = out_dtype.itemsize == 1
    key = quantized_gemm_key(dtype, shape, group, quantizes)
    found = tables.find("quantized_gemm", (key,), for_arch, shipped_only)
    entry, source = ({}, None) if found is None else found
    persistent = quantized_linear_persistent_config(dtype, group, for_arch, shape, quantizes)
    # Tensor descriptors want rows of a multiple of 16 bytes, of both operands and of the result.
    if shape[0] % 16 or shape[1] * out_dtype.itemsize % 16:
        persistent = None
    if persistent is not None and entry.get("kernel") != "quantized_linear":
        return Gemm(entry.get("kernel"), source, "quantized_linear_persistent", persistent)
    pointers = quantized_linear_config(dtype, group, for_arch, shape, quantizes)
    return Gemm(entry.get("kernel"), source, "quantized_linear", pointers)


def attention_config(dtype: torch.dtype, head_size: int, for_arch: int) -> Config:
    """Tile of the attention: BLOCK_Q query rows, BLOCK_K keys a step, the head size padded to BLOCK_D."""
    return _attention(dtype, head_size, for_arch, _recorded is not None, tables.generation)


@functools.cache
def _attention(dtype: torch.dtype, head_size: int, for_arch: int, shipped_only: bool, generation: int) -> Config:
    block_d = max(MIN_HEAD_SIZE, triton.next_power_of_2(head_size))
    config = _required("attention", (attention_key(dtype, head_size),), for_arch)
    return Config({**config.block_sizes, "BLOCK_D": block_d}, config.source)


SHORT_BLOCK_Q, MAX_SHORT = 16, 64  # the fewest rows that tl.dot takes; the most keys in one block


def short_attention_config(dtype: torch.dtype, head_size: int, for_arch: int) -> Config | None:
    """Tile of sequences that share none and are short: 16 query rows, all keys in one block of BLOCK_K.

    Short are those of at most BLOCK_K tokens, which is half of `attention_config`'s BLOCK_Q: up to there, tiles of 16
    rows hold fewer rows of nothing. None where BLOCK_Q is too small for that.
    """
    return _short_attention(dtype, head_size, for_arch, _recorded is not None, tables.generation)


@functools.cache
def _short_attention(
    dtype: torch.dtype, head_size: int, for_arch: int, shipped_only: bool, generation: int
) -> Config | None:
    whole = _attention(dtype, head_size, for_arch, shipped_only, generation)
    block_q, block_d = whole.block_sizes["BLOCK_Q"], whole.block_sizes["BLOCK_D"]
    block_k = min(MAX_SHORT, block_q // 2)
    if block_k < SHORT_BLOCK_Q:
        return None
    # As few as hold the tile without spills (offline report): a program is too short to gain by more. IEEE float32,
    # whose products are multiply-adds, holds all operands in registers.
    num_warps = max(1, block_d // 32 if dtype == torch.float32 else block_k * block_d // 4096)
    block_sizes = {"BLOCK_Q": SHORT_BLOCK_Q, "BLOCK_K": block_k, "num_warps": num_warps, "num_stages": 1}
    source = f"formula of fastbert_kernels.launch.short_attention_config, for BLOCK_Q={block_q} of {whole.source}"
    return Config({**block_sizes, "BLOCK_D": block_d}, source)


def attention_key(dtype: torch.dtype, head_size: int) -> str:
    """The key of attention in a table: "float16/64"; head sizes that are padded to one tile share it."""
    return f"{dtype_class(dtype)}/{max(MIN_HEAD_SIZE, triton.next_power_of_2(head_size))}"


def dtype_class(dtype: torch.dtype) -> str:
    """How tables call the dtype: bf16 and fp16 share their entries."""
    return "float32" if dtype == torch.float32 else "float16"


def gemm_key(dtype: torch.dtype, shape: tuple[int, int], epilogue: str) -> str:
    """The key of one GEMM in a table: "float16/768x3072/gelu"."""
    return f"{dtype_class(dtype)}/{shape[0]}x{shape[1]}/{EPILOGUES[epilogue]}"


def quantized_class(dtype: torch.dtype) -> str:
    """How tables call an 8-bit dtype."""
    return "int8" if dtype == torch.int8 else "float8"


def quantized_gemm_key(dtype: torch.dtype, shape: tuple[int, int], group: int | None, quantizes: bool) -> str:
    """The key of one 8-bit GEMM in a table: "float8/768x3072/row-quantized", "int8/3072x768/group128"."""
    scales = "row" if group is None else f"group{group}"
    return f"{quantized_class(dtype)}/{shape[0]}x{shape[1]}/{scales}{'-quantized' if quantizes else ''}"


def _quantized_keys(
    dtype: torch.dtype, shape: tuple[int, int] | None, group: int | None, quantizes: bool
) -> tuple[str, ...]:
    own = () if shape is None else (quantized_gemm_key(dtype, shape, group, quantizes),)
    return (*own, quantized_class(dtype))


def _gemm_keys(dtype: torch.dtype, shape: tuple[int, int] | None, epilogue: str) -> tuple[str, ...]:
    return (*((gemm_key(dtype, shape, epilogue),) if shape is not None else ()), dtype_class(dtype))


def _from_tables(op: str, keys: tuple[str, ...], for_arch: int) -> Config | None:
    # What is compiled for a GPU that is not there must not depend on one that is.
    found = tables.find(op, keys, for_arch, _recorded is not None)
    return None if found is None else Config(*found)


def _required(op: str, keys: tuple[str, ...], for_arch: int) -> Config:
    config = _from_tables(op, keys, for_arch)
    if config is None:
        raise ValueError(f"{tables.shipped_table(for_arch)[0]}: no entry {op!r} -> {keys[-1]!r}")
    return config
