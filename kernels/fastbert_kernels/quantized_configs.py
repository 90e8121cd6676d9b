"""This module chooses block sizes and the kernel of 8-bit matrix products, from tables (tables.py)."""

from __future__ import annotations

import functools

import torch
import triton

from fastbert_kernels import configs, launch, tables

# The architectures whose gated product uses tensor descriptors, and whether also in int8: on sm_100 it would spill.
GATED_ON_DESCRIPTORS = ((90, False), (90, True), (100, False))


def quantized_linear_config(
    dtype: torch.dtype,
    group: int | None,
    for_arch: int,
    shape: tuple[int, int] | None = None,
    quantizes: bool = False,
) -> configs.Config:
    """Returns the tile of the 8-bit GEMM.

    group: the number of columns of x that share a scale, None for one scale a row. shape: (K, M). The table may have a
    separate entry for it. quantizes: whether the result is in 8 bits, too.

    A step of BLOCK_K lies within a group. If the table's step is longer, it becomes as long as a group (and at least
    32, the fewest columns for the tensor cores).
    """
    config = configs.required("quantized_linear", _quantized_keys(dtype, shape, group, quantizes), for_arch)
    return _within_groups(config, group)


def quantized_linear_persistent_config(
    dtype: torch.dtype,
    group: int | None,
    for_arch: int,
    shape: tuple[int, int] | None = None,
    quantizes: bool = False,
) -> configs.Config | None:
    """Returns the tile of the persistent 8-bit GEMM, or None if the architecture, dtype or group has none."""
    config = configs.from_tables(
        "quantized_linear_persistent", _quantized_keys(dtype, shape, group, quantizes), for_arch
    )
    if config is None:
        return None
    config = _within_groups(config, group)
    # A descriptor's block has a fixed size, so a group cannot end inside of it.
    return None if group is not None and group % config.block_sizes["BLOCK_K"] else config


def _within_groups(config: configs.Config, group: int | None) -> configs.Config:
    block_sizes = dict(config.block_sizes)
    if group is not None and group % block_sizes["BLOCK_K"]:
        block_sizes["BLOCK_K"] = max(32, triton.next_power_of_2(group))
    return configs.Config(block_sizes, config.source)


def quantized_gemm(
    dtype: torch.dtype, for_arch: int, shape: tuple[int, int], group: int | None, out_dtype: torch.dtype
) -> configs.Gemm:
    """Looks up the kernel for 8-bit operands, x (T, K) by weight (M, K), with shape = (K, M).

    `ours` of the result is one of QUANTIZED_GEMMS. out_dtype: an 8-bit one for a product that is quantised.
    """
    return _quantized_gemm(dtype, for_arch, shape, group, out_dtype, launch.recorded is not None, tables.generation)


@functools.cache
def _quantized_gemm(
    dtype: torch.dtype,
    for_arch: int,
    shape: tuple[int, int],
    group: int | None,
    out_dtype: torch.dtype,
    shipped_only: bool,
    generation: int,
) -> configs.Gemm:
    quantizes = out_dtype.itemsize == 1
    key = quantized_gemm_key(dtype, shape, group, quantizes)
    entry, source = tables.find("quantized_gemm", (key,), for_arch, shipped_only) or ({}, None)
    persistent = quantized_linear_persistent_config(dtype, group, for_arch, shape, quantizes)
    # Tensor descriptors need rows of a multiple of 16 bytes in both operands and in the result.
    if shape[0] % 16 or shape[1] * out_dtype.itemsize % 16:
        persistent = None
    wanted = entry.get("kernel")
    if (
        persistent is not None
        and wanted == "quantized_linear_specialized"
        and for_arch == configs.WARP_SPECIALIZED_ARCH
    ):
        specialized = configs.from_tables("quantized_linear_specialized", (key,), for_arch)
        if specialized is not None:
            return configs.Gemm(wanted, source, wanted, specialized)
    if persistent is not None and wanted != "quantized_linear":
        return configs.Gemm(entry.get("kernel"), source, "quantized_linear_persistent", persistent)
    pointers = quantized_linear_config(dtype, group, for_arch, shape, quantizes)
    return configs.Gemm(entry.get("kernel"), source, "quantized_linear", pointers)


def quantized_gated_gemm(dtype: torch.dtype, for_arch: int, shape: tuple[int, int]) -> configs.Gemm:
    """Looks up the kernel for 8-bit rows, (T, K), and a weight with its gate, (2 I, K); shape = (K, I).

    `ours` of the result is one of QUANTIZED_GATED_GEMMS.
    """
    return _quantized_gated_gemm(dtype, for_arch, shape, launch.recorded is not None, tables.generation)


@functools.cache
def _quantized_gated_gemm(
    dtype: torch.dtype, for_arch: int, shape: tuple[int, int], shipped_only: bool, generation: int
) -> configs.Gemm:
    key = quantized_gated_key(dtype, shape)
    entry, source = tables.find("quantized_gated_gemm", (key,), for_arch, shipped_only) or ({}, None)
    wanted = entry.get("kernel")
    persistent = quantized_gated_persistent_config(dtype, for_arch, shape)
    if persistent is not None and wanted != "quantized_gated_linear":
        return configs.Gemm(wanted, source, "quantized_gated_linear_persistent", persistent)
    return configs.Gemm(wanted, source, "quantized_gated_linear", quantized_gated_config(dtype, for_arch, shape))


def quantized_gated_config(dtype: torch.dtype, for_arch: int, shape: tuple[int, int]) -> configs.Config:
    """Chooses the tile on pointers: as wide as a group of the result, with as many rows as two sums fit in registers.

    shape: (K, I). The table may have an entry for it.
    """
    tile = {"BLOCK_ROWS": 64, "BLOCK_COLS": tables.GATED_COLS, "BLOCK_K": 128 if for_arch in (90, 100) else 64,
            "GROUP_ROWS": 8, "num_warps": 8, "num_stages": 3}  # fmt: skip
    keys = (quantized_gated_key(dtype, shape),)
    return configs.from_tables("quantized_gated_linear", keys, for_arch) or configs.Config(
        tile, "formula of fastbert_kernels.quantized_configs.quantized_gated_config"
    )


def quantized_gated_persistent_config(
    dtype: torch.dtype, for_arch: int, shape: tuple[int, int]
) -> configs.Config | None:
    """Chooses the tile on tensor descriptors, or None if the other kernel runs.

    Descriptors need rows of a multiple of 16 bytes.
    """
    if (for_arch, dtype == torch.int8) not in GATED_ON_DESCRIPTORS or any(size % 16 for size in shape):
        return None
    tile = {"BLOCK_ROWS": 128, "BLOCK_COLS": tables.GATED_COLS, "BLOCK_K": 128, "GROUP_ROWS": 8, "num_warps": 8,
            "num_stages": 3}  # fmt: skip
    keys = (quantized_gated_key(dtype, shape),)
    return configs.from_tables("quantized_gated_linear_persistent", keys, for_arch) or configs.Config(
        tile, "formula of fastbert_kernels.quantized_configs.quantized_gated_persistent_config"
    )


def quantized_gated_key(dtype: torch.dtype, shape: tuple[int, int]) -> str:
    """Returns the key of an 8-bit product with a gate in a table, K x I, such as "float8/768x1152"."""
    return f"{quantized_class(dtype)}/{shape[0]}x{shape[1]}"


def quantized_class(dtype: torch.dtype) -> str:
    """Returns the name of an 8-bit dtype in tables."""
    return "int8" if dtype == torch.int8 else "float8"


def quantized_gemm_key(dtype: torch.dtype, shape: tuple[int, int], group: int | None, quantizes: bool) -> str:
    """Returns the key of an 8-bit GEMM in a table, e.g. "float8/768x3072/row-quantized" or "int8/3072x768/group128"."""
    scales = "row" if group is None else f"group{group}"
    return f"{quantized_class(dtype)}/{shape[0]}x{shape[1]}/{scales}{'-quantized' if quantizes else ''}"


def _quantized_keys(
    dtype: torch.dtype, shape: tuple[int, int] | None, group: int | None, quantizes: bool
) -> tuple[str, ...]:
    own = () if shape is None else (quantized_gemm_key(dtype, shape, group, quantizes),)
    return (*own, quantized_class(dtype))
