"""This module chooses block sizes, and the kernel of a matrix product.

Block sizes of the matrix kernels, and the choice of GEMM, come from tables (tables.py): first the user's own, then one
JSON file per GPU architecture in `tuned/`. Block sizes of the row-wise kernels come from the formulas here. No choice
here depends on the number of tokens. `few_rows` has tiles for few tokens, and `quantized_configs` has those of 8-bit
products.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton

from fastbert_kernels import launch, tables

MIN_HEAD_SIZE, MAX_HEAD_SIZE = 16, 128


@dataclass(frozen=True)
class Config:
    """A `Config` holds the block sizes, warps and stages of one kernel."""

    block_sizes: dict[str, int]
    source: str  # The source of the block sizes, as text.


@functools.cache
def rowwise_config(n_cols: int) -> dict[str, int]:
    """Chooses the tile of kernels that hold whole rows (LayerNorm, embedding): about 2,048 elements, 16 a thread."""
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
    """Chooses the tile of elementwise kernels: 2,048 elements, 16 a thread."""
    block_cols = min(1024, triton.next_power_of_2(n_cols))
    return {"BLOCK_ROWS": 2048 // block_cols, "BLOCK_COLS": block_cols, "num_warps": 4, "num_stages": 1}


@functools.cache
def gated_config(n_cols: int) -> dict[str, int]:
    """Chooses the tile of gated activations: 2,048 elements, in the widest blocks that leave the fewest columns over.

    Widths of such layers are not powers of two: 1,152 columns are 9 blocks of 128, or 1.1 blocks of 1,024.
    """
    widest = min(1024, triton.next_power_of_2(n_cols))
    widths = [width for width in (1024, 512, 256, 128) if width <= widest] or [widest]
    block_cols = min(widths, key=lambda width: launch.cdiv(n_cols, width) * width)
    return {"BLOCK_ROWS": 2048 // block_cols, "BLOCK_COLS": block_cols, "num_warps": 4, "num_stages": 1}


@functools.cache
def rotary_config(half: int, n_heads: int) -> dict[str, int]:
    """Chooses the tile that rotates heads: 1,024 pairs of elements, 8 a thread, in up to 8 heads at a time."""
    block_half = triton.next_power_of_2(half)
    block_heads = min(8, triton.next_power_of_2(n_heads))
    return {
        "BLOCK_ROWS": max(1, 1024 // (block_half * block_heads)),
        "BLOCK_HEADS": block_heads,
        "BLOCK_HALF": block_half,
        "num_warps": 4,
        "num_stages": 1,
    }


@functools.cache
def elementwise_backward_config(n_cols: int) -> dict[str, int]:
    """Chooses the tile of elementwise kernels that add columns up: 2,048 elements, 16 a thread, 128 columns."""
    block_cols = min(128, triton.next_power_of_2(n_cols))
    return {"BLOCK_ROWS": 2048 // block_cols, "BLOCK_COLS": block_cols, "num_warps": 4, "num_stages": 1}


@functools.cache
def column_sums_config() -> dict[str, int]:
    """Chooses the tile that adds up partial sums: 64 rows of 32 columns, which are 128 bytes each."""
    return {"BLOCK_ROWS": 64, "BLOCK_COLS": 32, "num_warps": 4, "num_stages": 1}


@functools.cache
def pieces_config(n_cols: int) -> dict[str, int]:
    """Chooses the tile that adds rows of gradients up: 4,096 elements, 32 a thread, in blocks of 128 columns."""
    block_cols = min(128, triton.next_power_of_2(n_cols))
    return {"BLOCK_ROWS": min(64, 4096 // block_cols), "BLOCK_COLS": block_cols, "num_warps": 4, "num_stages": 1}


@functools.cache
def segments_config(n_rows: int, n_cols: int) -> dict[str, int]:
    """Chooses the tile that adds up the gradients of a table's row.

    Most rows of a large table have few tokens or none, so a program has 1,024 columns and few tokens at a time. The
    rows of a small table have many tokens.
    """
    if n_rows <= 4096:
        return pieces_config(n_cols)
    block_cols = min(1024, triton.next_power_of_2(n_cols))
    return {"BLOCK_ROWS": min(8, 4096 // block_cols), "BLOCK_COLS": block_cols, "num_warps": 4, "num_stages": 1}


@functools.cache
def pooling_config(n_cols: int) -> dict[str, int]:
    """Chooses the tile of pooling over rows: 4,096 elements, 32 a thread, in blocks of 128 columns.

    UNROLL blocks are read at a time. With more columns in a block, a few long sequences would use few multiprocessors.
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
def pooling_backward_config(n_cols: int) -> dict[str, int]:
    """Chooses the tile of the backward pass of pooling: 2,048 elements, 16 a thread, in blocks of 128 columns."""
    return elementwise_backward_config(n_cols)


@functools.cache
def whole_row_config(n_cols: int) -> dict[str, int]:
    """Chooses the tile of kernels that hold one row of the batch's vectors: up to 16 elements a thread."""
    block_cols = triton.next_power_of_2(n_cols)
    return {"BLOCK_COLS": block_cols, "num_warps": max(1, min(8, block_cols // 256)), "num_stages": 1}


@functools.cache
def long_row_config(n_cols: int) -> dict[str, int]:
    """Chooses the tile of kernels that walk along one row of any length: up to 4,096 elements, 16 a thread."""
    block_cols = min(4096, triton.next_power_of_2(n_cols))
    return {"BLOCK_COLS": block_cols, "num_warps": max(1, min(8, block_cols // 512)), "num_stages": 1}


@functools.cache
def one_row_pooling_config(n_cols: int) -> dict[str, int]:
    """Chooses the tile of pooling that takes one row of a sequence, the first or the last."""
    return {"BLOCK_ROWS": 1, "UNROLL": 1, **whole_row_config(n_cols)}


# Epilogues of a GEMM, and their names in table keys. Both GELUs cost the same; "pre" stores a second tile; "gated" is
# the epilogue of gated_linear.py, for any activation.
EPILOGUES = {"none": "none", "gelu": "gelu", "gelu_tanh": "gelu", "residual": "residual", "pre": "pre",
             "gated": "gated"}  # fmt: skip
WARP_SPECIALIZED_ARCH = 90  # the only architecture of the warp-specialised GEMMs


def linear_config(
    dtype: torch.dtype, for_arch: int, shape: tuple[int, int] | None = None, epilogue: str = "none"
) -> Config:
    """Returns the tile of the GEMM: BLOCK_ROWS x BLOCK_COLS outputs, BLOCK_K deep.

    shape: (K, M). The table may have a separate entry for it.
    """
    return required("linear", _gemm_keys(dtype, shape, epilogue), for_arch)


def linear_persistent_config(
    dtype: torch.dtype, for_arch: int, shape: tuple[int, int] | None = None, epilogue: str = "none"
) -> Config | None:
    """Returns the tile of the persistent GEMM, or None if the architecture or the dtype has none."""
    return from_tables("linear_persistent", _gemm_keys(dtype, shape, epilogue), for_arch)


@dataclass(frozen=True)
class Gemm:
    """A `Gemm` holds the kernels of a matrix product for one shape."""

    choice: str | None  # The fastest kernel, one of GEMMS. None if no table has the shape.
    choice_source: str | None
    ours: str  # The fastest of fastbert's own kernels, and its tile.
    config: Config


def gemm(dtype: torch.dtype, for_arch: int, shape: tuple[int, int], epilogue: str) -> Gemm:
    """Looks up x @ weight^T in the tables, with weight (M, K) and shape = (K, M), for any number of rows.

    For the epilogue "gated", M counts both halves of the weight, and so does BLOCK_COLS of the tile.
    """
    return _gemm(dtype, for_arch, shape, epilogue, launch.recorded is not None, tables.generation)


@functools.cache
def _gemm(
    dtype: torch.dtype, for_arch: int, shape: tuple[int, int], epilogue: str, shipped_only: bool, generation: int
) -> Gemm:
    entry, source = tables.find("gemm", (gemm_key(dtype, shape, epilogue),), for_arch, shipped_only) or ({}, None)
    persistent = linear_persistent_config(dtype, for_arch, shape, epilogue)
    # Tensor descriptors need rows of a multiple of 16 bytes. linear_forward checks views again.
    n_out = shape[1] // 2 if epilogue == "gated" else shape[1]
    if any(size * dtype.itemsize % 16 for size in (shape[0], n_out)):
        persistent = None
    can_specialize = epilogue != "gated" and for_arch == WARP_SPECIALIZED_ARCH
    if persistent is not None and entry.get("ours") == "linear_specialized" and can_specialize:
        specialized = from_tables("linear_specialized", _gemm_keys(dtype, shape, epilogue), for_arch)
        if specialized is not None:
            return Gemm(entry.get("kernel"), source, "linear_specialized", specialized)
    if persistent is not None and entry.get("ours") != "linear":
        return Gemm(entry.get("kernel"), source, "linear_persistent", persistent)
    return Gemm(entry.get("kernel"), source, "linear", linear_config(dtype, for_arch, shape, epilogue))


def attention_config(dtype: torch.dtype, head_size: int, for_arch: int, small: bool = False) -> Config:
    """Returns the tile of attention: BLOCK_Q query rows, BLOCK_K keys a step, the head size padded to BLOCK_D.

    small: return the tile of `small_attention_config`, which must exist.
    """
    if small:
        config = _small_attention(dtype, head_size, for_arch, launch.recorded is not None, tables.generation)
        assert config is not None, "this tile has no smaller one"
        return config
    return _attention(dtype, head_size, for_arch, launch.recorded is not None, tables.generation)


@functools.cache
def _attention(dtype: torch.dtype, head_size: int, for_arch: int, shipped_only: bool, generation: int) -> Config:
    block_d = max(MIN_HEAD_SIZE, triton.next_power_of_2(head_size))
    config = required("attention", (attention_key(dtype, head_size),), for_arch)
    return Config({**config.block_sizes, "BLOCK_D": block_d}, config.source)


def small_attention_config(dtype: torch.dtype, head_size: int, for_arch: int) -> Config | None:
    """Returns the tile for short batches or short sequences, or None if `attention_config`'s is not larger.

    It is the table's entry, such as "float16/64/small", or otherwise 64 rows by 64 keys. The entry may have any size.
    """
    return _small_attention(dtype, head_size, for_arch, launch.recorded is not None, tables.generation)


@functools.cache
def _small_attention(
    dtype: torch.dtype, head_size: int, for_arch: int, shipped_only: bool, generation: int
) -> Config | None:
    whole = _attention(dtype, head_size, for_arch, shipped_only, generation)
    config = from_tables("attention", (f"{attention_key(dtype, head_size)}/small",), for_arch)
    if config is None:
        if dtype == torch.float32 or whole.block_sizes["BLOCK_D"] > 64:  # the tile would spill registers
            return None
        config = Config(small_tile(for_arch), "formula of fastbert_kernels.configs.small_attention_config")
    if config.block_sizes["BLOCK_Q"] >= whole.block_sizes["BLOCK_Q"]:
        return None
    return Config({**config.block_sizes, "BLOCK_D": whole.block_sizes["BLOCK_D"]}, config.source)


def small_tile(for_arch: int) -> dict[str, int]:
    """Returns the tile of short batches if no table has one. sm_120 spills a register in a block of 64 keys."""
    return {"BLOCK_Q": 64, "BLOCK_K": 32 if for_arch >= 120 else 64, "num_warps": 4, "num_stages": 3}


SHORT_BLOCK_Q = 16  # The fewest rows that tl.dot takes.
MAX_SHORT = 64  # The most keys in one block.


def short_attention_config(dtype: torch.dtype, head_size: int, for_arch: int) -> Config | None:
    """Returns the tile of short sequences that share no tile: 16 query rows, all keys in one block.

    A sequence is short if it has at most BLOCK_K tokens, which is half of `attention_config`'s BLOCK_Q. Up to this
    length, tiles of 16 rows have fewer unused rows. Returns None if BLOCK_Q is too small for that.
    """
    return _short_attention(dtype, head_size, for_arch, launch.recorded is not None, tables.generation)


@functools.cache
def _short_attention(
    dtype: torch.dtype, head_size: int, for_arch: int, shipped_only: bool, generation: int
) -> Config | None:
    whole = _attention(dtype, head_size, for_arch, shipped_only, generation)
    block_q, block_d = whole.block_sizes["BLOCK_Q"], whole.block_sizes["BLOCK_D"]
    block_k = min(MAX_SHORT, block_q // 2)
    if block_k < SHORT_BLOCK_Q:
        return None
    # The fewest warps that hold the tile without spills (offline report). The program is too short to gain from more.
    # In IEEE float32 products are multiply-adds, and all operands are in registers.
    num_warps = max(1, block_d // 32 if dtype == torch.float32 else block_k * block_d // 4096)
    if for_arch >= 120 and block_d == 128:
        num_warps *= 2
    block_sizes = {"BLOCK_Q": SHORT_BLOCK_Q, "BLOCK_K": block_k, "num_warps": num_warps, "num_stages": 1}
    source = f"formula of fastbert_kernels.configs.short_attention_config, for BLOCK_Q={block_q} of {whole.source}"
    return Config({**block_sizes, "BLOCK_D": block_d}, source)


@dataclass(frozen=True)
class AttentionBackward:
    """An `AttentionBackward` holds the block sizes of both passes: by tiles of queries, and by tiles of keys."""

    query: dict[str, int]
    key: dict[str, int]


@functools.cache
def attention_backward_configs(
    dtype: torch.dtype, head_size: int, for_arch: int, biased: bool = False, windowed: bool = False
) -> AttentionBackward:
    """Chooses the tiles of attention's gradients: BLOCK_Q x BLOCK_K scores at a time, the head padded to BLOCK_D.

    They are the largest ones without spills in the offline report, with dropout. A tile of 128 rows and 8 warps uses
    all registers of a multiprocessor. Two tiles of 64 rows and 4 warps would use as many, and read the other operands
    twice as often. biased: with a position bias, which takes registers. windowed: within a window, whose masks take
    registers; a smaller tile also has fewer scores outside of the window.
    """
    block_d = max(MIN_HEAD_SIZE, triton.next_power_of_2(head_size))
    if dtype == torch.float32:  # The operands of multiply-adds are in registers.
        query, key = (32, 32, max(4, block_d // 8), 1), (32, 32, 4 if block_d <= 64 else 8, 1)
    elif block_d <= 64:
        # Blackwell: sm_100 keeps sums outside of the registers, but other values in them. sm_120 has the fewest free
        # registers. sm_86 and sm_89 spill one register in a block of 64 queries.
        query, key = (128, 32 if for_arch == 100 else 64, 8, 3), (128, 32 if for_arch >= 120 else 64, 8, 3)
        if block_d == 64 and for_arch in (86, 89):
            key = (64, 32, 4, 3)
    elif for_arch in (90, 100):
        query, key = (128, 32 if for_arch == 100 else 64, 8, 2), (128, 32, 8, 2)
    else:  # The operands of products pass through registers.
        query, key = (128, 32, 8, 2), (32, 32, 4, 2)
    if biased and dtype != torch.float32 and for_arch != 90:
        query, key = (64, 32, 4, 2), (32, 32, 4, 2)
    if windowed and dtype != torch.float32 and block_d <= 64:
        query, key = (64, 64, 4, 3), (64, 32, 4, 3)
    return AttentionBackward(
        {"BLOCK_Q": query[0], "BLOCK_K": query[1], "BLOCK_D": block_d, "num_warps": query[2], "num_stages": query[3]},
        {"BLOCK_Q": key[1], "BLOCK_K": key[0], "BLOCK_D": block_d, "num_warps": key[2], "num_stages": key[3]},
    )


def attention_key(dtype: torch.dtype, head_size: int) -> str:
    """Returns the key of attention in a table, such as "float16/64". Head sizes with the same padded size share it."""
    return f"{dtype_class(dtype)}/{max(MIN_HEAD_SIZE, triton.next_power_of_2(head_size))}"


def dtype_class(dtype: torch.dtype) -> str:
    """Returns the name of a dtype in tables: bf16 and fp16 share their entries."""
    return "float32" if dtype == torch.float32 else "float16"


def gemm_key(dtype: torch.dtype, shape: tuple[int, int], epilogue: str) -> str:
    """Returns the key of one GEMM in a table, such as "float16/768x3072/gelu"."""
    return f"{dtype_class(dtype)}/{shape[0]}x{shape[1]}/{EPILOGUES[epilogue]}"


def _gemm_keys(dtype: torch.dtype, shape: tuple[int, int] | None, epilogue: str) -> tuple[str, ...]:
    own = () if shape is None else (gemm_key(dtype, shape, epilogue),)
    return (*own, f"{dtype_class(dtype)}/{EPILOGUES[epilogue]}", dtype_class(dtype))


def from_tables(op: str, keys: tuple[str, ...], for_arch: int) -> Config | None:
    """Returns the tables' entry of the first key that they have, or None."""
    # Kernels compiled for an absent GPU must not depend on a GPU of this machine.
    entry = tables.find(op, keys, for_arch, launch.recorded is not None)
    return None if entry is None else Config(*entry)


def required(op: str, keys: tuple[str, ...], for_arch: int) -> Config:
    """Does the same as `from_tables`, but raises ValueError if no table has any of the keys."""
    config = from_tables(op, keys, for_arch)
    if config is None:
        raise ValueError(f"{tables.shipped_table(for_arch)[0]}: no entry {op!r} -> {keys[-1]!r}")
    return config
