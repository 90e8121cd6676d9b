"""Candidates are the kernels and tiles from which `fastbert tune` selects for one shape.

K and M are the sizes of a weight, (M, K).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fastbert.ops import quantized

_TILES_16BIT = (  # BLOCK_ROWS, BLOCK_COLS, BLOCK_K, num_warps, num_stages
    (128, 128, 32, 8, 4), (128, 128, 64, 8, 3), (128, 128, 32, 4, 4), (128, 64, 32, 4, 4), (64, 128, 32, 4, 4),
    (64, 64, 64, 4, 4), (128, 256, 32, 8, 3), (256, 128, 32, 8, 3), (128, 64, 64, 4, 3), (64, 128, 64, 4, 3),
    (128, 256, 64, 8, 3),
)  # fmt: skip
_TILES_32BIT = ((64, 128, 16, 4, 3), (64, 64, 16, 4, 3), (128, 64, 16, 4, 3), (64, 128, 32, 4, 3), (128, 128, 16, 8, 2))
_PERSISTENT_TILES = (
    (128, 128, 64, 8, 4), (128, 128, 64, 8, 3), (128, 256, 64, 8, 3), (256, 128, 64, 8, 3), (128, 64, 64, 4, 4),
    (64, 128, 64, 4, 4), (64, 256, 64, 8, 3), (128, 128, 128, 8, 2),
)  # fmt: skip
# The same, and the number of programs per multiprocessor.
_APART_TILES = ((128, 128, 64, 8, 2, 2), (64, 128, 64, 4, 3, 3), (128, 256, 64, 8, 3, 1))
_SPECIALIZED_TILES = ((128, 256, 64, 4, 3), (128, 128, 64, 4, 4), (128, 128, 64, 4, 3))
_FEW_ROWS_TILES = (
    (64, 64, 64, 4, 4), (64, 128, 64, 4, 4), (128, 128, 64, 8, 3), (32, 64, 64, 4, 4), (16, 64, 128, 4, 3),
)  # fmt: skip
_SPLITS = (1, 2, 4, 8)
_ATTENTION_TILES = (  # BLOCK_Q, BLOCK_K, num_warps, num_stages
    (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 4, 2), (128, 64, 4, 3), (128, 32, 4, 3), (128, 128, 8, 2),
    (64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 3), (64, 128, 4, 2),
)  # fmt: skip
_TILES_8BIT = (
    (128, 128, 128, 8, 3), (128, 128, 64, 8, 4), (64, 128, 128, 4, 3), (128, 64, 128, 4, 3), (64, 128, 64, 4, 4),
)  # fmt: skip
_PERSISTENT_TILES_8BIT = (
    (128, 256, 128, 8, 3), (128, 128, 128, 8, 4), (128, 128, 128, 8, 3), (128, 256, 64, 8, 4), (128, 128, 64, 8, 4),
    (64, 128, 128, 4, 4), (64, 256, 128, 8, 3),
)  # fmt: skip
_APART_TILES_8BIT = ((64, 128, 128, 4, 3, 2),)
_SPECIALIZED_TILES_8BIT = ((128, 128, 128, 4, 4), (128, 128, 128, 4, 3))
# With a gate, a tile has two sums of 128 columns. With more than 64 rows, the pointer kernels with 8 warps run out of
# registers. With fewer than 64 rows, sm_90 and sm_100 do not multiply in 8 bits.
_GATED_TILES = (
    (64, 128, 128, 8, 3), (64, 128, 64, 8, 4), (64, 128, 64, 8, 3), (64, 128, 128, 8, 2), (64, 128, 64, 8, 2),
)  # fmt: skip
_GATED_PERSISTENT_TILES = ((128, 128, 128, 8, 3), (128, 128, 64, 8, 4), (128, 128, 64, 8, 3), (64, 128, 128, 8, 3))


@dataclass(frozen=True)
class Candidate:
    """A Candidate is a kernel and its tile.

    kernel: a name in GEMMS, QUANTIZED_GEMMS, QUANTIZED_GATED_GEMMS or FEW_ROWS of fastbert_kernels.tables, or
    "attention". tile: empty for cuBLAS.
    """

    kernel: str
    tile: tuple[tuple[str, int], ...] = ()

    @property
    def sizes(self) -> dict[str, int]:
        return dict(self.tile)

    def __str__(self) -> str:
        return " ".join([self.kernel, *(f"{name}={size}" for name, size in self.tile)])


def gemm_candidates(dtype: torch.dtype, arch: int, shape: tuple[int, int], epilogue: str) -> Iterator[Candidate]:
    """Yields the candidates of a 16-bit or 32-bit linear: cuBLAS, the current tables' tiles, then others that fit.

    shape: (K, M). epilogue: "none", "gelu", "gated" or "residual".
    """
    from fastbert_kernels import configs

    yield Candidate("cublas")
    pointer = [configs.linear_config(dtype, arch, shape, epilogue).block_sizes]
    pointer += map(_gemm_tile, _TILES_32BIT if dtype == torch.float32 else _TILES_16BIT)
    yield from dict.fromkeys(
        _candidate("linear", sizes)
        for sizes in pointer
        if _fits(sizes, dtype, arch) and _leaves_registers(sizes, dtype, epilogue)
    )
    current = configs.linear_persistent_config(dtype, arch, shape, epilogue)
    n_out = shape[1] // 2 if epilogue == "gated" else shape[1]
    if current is None or any(size * dtype.itemsize % 16 for size in (shape[0], n_out)):
        return
    persistent = [current.block_sizes, *map(_gemm_tile, _PERSISTENT_TILES), *map(_apart, _APART_TILES)]
    kernels = [("linear_persistent", sizes) for sizes in persistent]
    if arch == configs.WARP_SPECIALIZED_ARCH and epilogue != "gated":
        kernels += [("linear_specialized", _gemm_tile(tile)) for tile in _SPECIALIZED_TILES]
    yield from dict.fromkeys(
        _candidate(kernel, sizes)
        for kernel, sizes in kernels
        if _fits(sizes, dtype, arch, staged_outputs=2 if epilogue == "residual" else 1)
        # Two groups of warps share a warp-specialised tile.
        and _leaves_registers(sizes, dtype, epilogue, groups=2 if kernel == "linear_specialized" else 1)
    )


def few_rows_candidates(dtype: torch.dtype, arch: int, shape: tuple[int, int], epilogue: str) -> Iterator[Candidate]:
    """Yields the candidates of a 16-bit linear on few rows: cuBLAS, small tiles, and before LayerNorm split-K tiles.

    shape: (K, M). epilogue: "gelu", "gated" or "residual".
    """
    yield Candidate("cublas")
    for sizes in map(_gemm_tile, _FEW_ROWS_TILES):
        if not _fits(sizes, dtype, arch):
            continue
        if epilogue != "residual":
            yield _candidate("linear", sizes)
            continue
        for splits in _SPLITS:
            if splits * sizes["BLOCK_K"] <= shape[0]:
                yield _candidate("split_linear", {**sizes, "SPLITS": splits})


def quantized_candidates(
    dtype: torch.dtype, arch: int, shape: tuple[int, int], group: int | None, quantizes: bool
) -> Iterator[Candidate]:
    """Yields the candidates of an 8-bit linear, first for the pointer kernel: the current tables' tiles, then others.

    shape: (K, M). group: the number of columns of an operand that share a scale. quantizes: whether the result is in 8
    bits.
    """
    from fastbert_kernels import configs, quantized_configs

    def whole_steps(sizes: dict[str, int]) -> dict[str, int]:
        if group is None or group % sizes["BLOCK_K"] == 0:
            return sizes
        return {**sizes, "BLOCK_K": max(32, 1 << (group - 1).bit_length())}

    arguments = dtype, group, arch, shape, quantizes
    pointer = [
        quantized_configs.quantized_linear_config(*arguments).block_sizes,
        *map(whole_steps, map(_gemm_tile, _TILES_8BIT)),
    ]
    yield from dict.fromkeys(
        _candidate("quantized_linear", sizes)
        for sizes in pointer
        if _fits(sizes, dtype, arch) and (not quantizes or sizes["BLOCK_COLS"] == quantized.OUT_GROUP)
    )
    descriptors = quantized_configs.quantized_linear_persistent_config(*arguments)
    out_size = 1 if quantizes else 2
    if descriptors is None or shape[0] % 16 or shape[1] * out_size % 16:
        return
    tiles = list(map(whole_steps, (*map(_gemm_tile, _PERSISTENT_TILES_8BIT), *map(_apart, _APART_TILES_8BIT))))
    if arch != configs.WARP_SPECIALIZED_ARCH:  # on other architectures the tile of two parts spills registers
        tiles = [sizes for sizes in tiles if sizes["BLOCK_COLS"] == quantized.OUT_GROUP]
    kernels = [("quantized_linear_persistent", sizes) for sizes in (descriptors.block_sizes, *tiles)]
    if arch == configs.WARP_SPECIALIZED_ARCH:
        specialized = map(whole_steps, map(_gemm_tile, _SPECIALIZED_TILES_8BIT))
        kernels += [("quantized_linear_specialized", sizes) for sizes in specialized]
    yield from dict.fromkeys(
        _candidate(kernel, sizes)
        for kernel, sizes in kernels
        if _fits(sizes, dtype, arch, staged_outputs=out_size, staged_cols=quantized.OUT_GROUP)
        and (group is None or group % sizes["BLOCK_K"] == 0)
    )


def quantized_gated_candidates(dtype: torch.dtype, arch: int, shape: tuple[int, int]) -> Iterator[Candidate]:
    """Yields the candidates of an 8-bit product with a gate, first for the pointer kernel.

    For each kernel the tile of the current tables comes first, then others. shape: (K, I).
    """
    from fastbert_kernels import quantized_configs

    pointer = quantized_configs.quantized_gated_config(dtype, arch, shape).block_sizes
    descriptors = quantized_configs.quantized_gated_persistent_config(dtype, arch, shape)
    kernels = [("quantized_gated_linear", sizes) for sizes in (pointer, *map(_gemm_tile, _GATED_TILES))]
    if descriptors is not None:
        tiles = descriptors.block_sizes, *map(_gemm_tile, _GATED_PERSISTENT_TILES)
        kernels += [("quantized_gated_linear_persistent", sizes) for sizes in tiles]
    yield from dict.fromkeys(
        _candidate(kernel, sizes)
        for kernel, sizes in kernels
        if _fits(sizes, dtype, arch, staged_outputs=int(kernel.endswith("persistent")), n_weights=2)
    )


def _gemm_tile(tile: tuple[int, int, int, int, int]) -> dict[str, int]:
    names = ("BLOCK_ROWS", "BLOCK_COLS", "BLOCK_K", "num_warps", "num_stages")
    return {**dict(zip(names, tile, strict=True)), "GROUP_ROWS": 8}


def _apart(tile: tuple[int, int, int, int, int, int]) -> dict[str, int]:
    """Returns a persistent tile whose two loops are not flattened into one.

    The tile's last number is the number of programs per multiprocessor.
    """
    return {**_gemm_tile(tile[:5]), "FLATTEN": 0, "PROGRAMS": tile[5]}


def _leaves_registers(sizes: dict[str, int], dtype: torch.dtype, epilogue: str, groups: int = 1) -> bool:
    """Tells whether the accumulator leaves enough of a thread's 255 registers for an epilogue.

    An accumulator that uses half of the registers spills, except with the short 16-bit GELU. This was seen in the
    offline compile, on sm_80, 89 and 90; for 16-bit GELU also on 100 and 120.
    """
    if epilogue == "none" or (epilogue in ("gelu", "gated") and dtype != torch.float32):
        return True
    return sizes["BLOCK_ROWS"] * sizes["BLOCK_COLS"] // (32 * groups * sizes["num_warps"]) < 128


def attention_candidates(dtype: torch.dtype, arch: int, head_size: int) -> Iterator[Candidate]:
    """Yields the candidates of attention: the tiles of the current tables, then others that fit."""
    from fastbert_kernels import attention_specialized, configs

    current = configs.attention_config(dtype, head_size, arch).block_sizes
    block_d = current["BLOCK_D"]
    names = ("BLOCK_Q", "BLOCK_K", "num_warps", "num_stages")
    sizes_of = [{name: current[name] for name in names}]
    sizes_of += [dict(zip(names, tile, strict=True)) for tile in _ATTENTION_TILES]
    limit = _shared_memory(arch)
    for sizes in sizes_of[1:]:
        if dtype == torch.float32:
            sizes.update(BLOCK_Q=sizes["BLOCK_Q"] // 2, BLOCK_K=max(16, sizes["BLOCK_K"] // 2))
    fitting = (
        sizes
        for sizes in sizes_of
        if (sizes["BLOCK_Q"] + 2 * sizes["num_stages"] * sizes["BLOCK_K"]) * block_d * dtype.itemsize <= limit
    )
    yield from dict.fromkeys(_candidate("attention", sizes) for sizes in fitting)
    # Each candidate's result is compared with float64 before timing; these have not run on a GPU yet.
    if arch == attention_specialized.ARCH and dtype != torch.float32 and head_size == block_d in (32, 64):
        yield from (_candidate("attention", sizes) for sizes in attention_specialized.tiles())


def _candidate(kernel: str, sizes: dict[str, int]) -> Candidate:
    return Candidate(kernel, tuple(sorted(sizes.items())))


def _shared_memory(arch: int) -> int:
    from fastbert_kernels import launch

    return launch.SHARED_MEMORY[max(known for known in launch.SHARED_MEMORY if known <= arch)]


def _fits(
    sizes: dict[str, int],
    dtype: torch.dtype,
    arch: int,
    staged_outputs: int = 0,
    staged_cols: int | None = None,
    n_weights: int = 1,
) -> bool:
    """Tells whether the operands of all stages and the staged output tiles fit into shared memory.

    staged_outputs: the number of elements of dtype per staged element of the output. staged_cols: the maximum number of
    staged columns. n_weights: the number of weight blocks that a step multiplies.
    """
    rows, cols = sizes["BLOCK_ROWS"], sizes["BLOCK_COLS"]
    staged = staged_outputs * rows * min(cols, staged_cols or cols)
    elements = sizes["num_stages"] * (rows + n_weights * cols) * sizes["BLOCK_K"] + staged
    return elements * dtype.itemsize <= _shared_memory(arch)
