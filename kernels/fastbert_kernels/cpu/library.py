"""This module loads the C++ kernels that fit the processor, and reports their capabilities."""

from __future__ import annotations

import ctypes
import functools
import platform
from pathlib import Path
from typing import Any

import torch

AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
PAIRS = "avx512_bf16"  # The library, and the instruction, that multiply bfloat16 in pairs; others multiply floats.
# Each library's name, its instructions in words, and their names in /proc/cpuinfo. The best library comes first.
VARIANTS = {
    "avx512_bf16": ("AVX-512 with bfloat16", {*AVX512, "avx512_vnni", "avx512_bf16"}),
    "avx512_vnni": ("AVX-512 with VNNI", {*AVX512, "avx512_vnni"}),
    "avx512": ("AVX-512", {*AVX512}),
    "avx2": ("AVX2", {"avx2", "fma"}),
}


# The types of PositionBias's members: its table, the farthest distance, and the columns of the tokens.
BIAS = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)


@functools.cache
def load() -> tuple[Any, str]:
    """Loads the best library for this processor. Returns it and its name in VARIANTS, or None and the obstacle."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return None, f"there are no C++ kernels for {platform.machine()}"
    flags = processor_flags()
    usable = [name for name, (_, needed) in VARIANTS.items() if needed <= flags]
    if PAIRS in usable[:1] and (bfloat16_rate() or 0.0) <= 1.0:
        usable[:2] = reversed(usable[:2])  # floats are faster
    if not usable:
        return None, "the processor, or ATEN_CPU_CAPABILITY, has no AVX2"
    library_obstacle = (
        "this installation has no C++ kernels: they were not compiled, or its wheel is the one for all platforms"
    )
    for name in usable:
        path = Path(__file__).with_name(f"{name}.x86_64.so")
        if not path.is_file():
            continue
        try:
            return _declared(ctypes.CDLL(str(path))), name
        except (OSError, AttributeError) as error:
            library_obstacle = f"{path.name} does not load: {error}"
    return None, library_obstacle


def processor_flags() -> set[str]:
    """Lists the instruction sets that the processor has and the user lets PyTorch use (ATEN_CPU_CAPABILITY)."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    flags = next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())
    allowed = torch.backends.cpu.get_cpu_capability()
    if not allowed.startswith("AVX512"):
        flags = {flag for flag in flags if not flag.startswith("avx512")}
    return flags if allowed.startswith("AVX") else set()


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """Declares the types of a library's functions, and returns the library."""
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    for dtype in ("float32", "bfloat16"):
        attention = getattr(library, f"fastbert_attention_{dtype}")
        attention.argtypes = [pointer, *[size] * 2, pointer, *[size] * 3, ctypes.c_float, pointer, size, *BIAS, size]
        attention.restype = ctypes.c_int
        pool = getattr(library, f"fastbert_pool_{dtype}")
        pool.argtypes = [pointer, size, size, pointer, size, size, ctypes.c_int, ctypes.c_int, pointer]
        pool.restype = ctypes.c_int
    library.fastbert_ids_outside.argtypes = [pointer, size, size]
    library.fastbert_ids_outside.restype = ctypes.c_int
    library.fastbert_digest.argtypes = [pointer, size, size]
    library.fastbert_digest.restype = ctypes.c_uint64
    _declare_linear(library)
    if hasattr(library, "fastbert_pack_int8"):
        _declare_int8(library)
    return library


def _declare_linear(library: ctypes.CDLL) -> None:
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    for name, n_sizes in (("packed_size", 2), ("weight_gradient_bytes", 5)):
        function = getattr(library, f"fastbert_{name}")
        function.argtypes, function.restype = [size] * n_sizes, size
    for dtype in ("float32", "bfloat16"):
        linear, encode = (getattr(library, f"fastbert_{name}_{dtype}") for name in ("linear", "encode"))
        linear.argtypes = [pointer, size, pointer, pointer, *[pointer, size] * 3, *[size] * 4]
        encode.argtypes = [*[pointer] * 5, size, *[pointer] * 3, *[size] * 6, ctypes.c_float, *[pointer] * 3]
        linear.restype, encode.restype = None, ctypes.c_int
        for other in {"float32", dtype}:
            pack = getattr(library, f"fastbert_pack_{other}_{dtype}")
            gradient = getattr(library, f"fastbert_weight_gradient_{dtype}_{other}")
            pack.argtypes = [pointer, pointer, pointer, size, size, size, pointer]
            gradient.argtypes = [pointer, size, pointer, size, pointer, pointer, pointer, size, size, size]
            pack.restype = gradient.restype = None


def _declare_int8(library: ctypes.CDLL) -> None:
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    library.fastbert_packed_size_int8.argtypes = [size, size]
    library.fastbert_padded_columns_int8.argtypes = [size]
    library.fastbert_packed_size_int8.restype = library.fastbert_padded_columns_int8.restype = size
    library.fastbert_pack_int8.argtypes = [pointer, size, size, pointer]
    library.fastbert_pack_int8.restype = None
    for dtype in ("float32", "bfloat16"):
        quantize, linear, encode, encode_bytes = (
            getattr(library, f"fastbert_{name}")
            for name in (
                f"quantize_{dtype}", f"linear_int8_{dtype}", f"encode_int8_{dtype}", f"encode_int8_{dtype}_bytes",
            )
        )  # fmt: skip
        quantize.argtypes = [pointer, size, size, size, size, pointer, size, pointer]
        linear.argtypes = [pointer, size, *[pointer] * 4, size, pointer, *[size] * 5]
        encode_bytes.argtypes = [size] * 4
        encode.argtypes = [
            *[pointer] * 5, size, *[pointer] * 2, size, pointer, *[size] * 7, ctypes.c_float, *[pointer] * 3
        ]  # fmt: skip
        quantize.restype = linear.restype = None
        encode_bytes.restype, encode.restype = size, ctypes.c_int


def obstacle() -> str | None:
    """Returns the reason why this process has no C++ kernels, or None if it has them."""
    library, name_or_obstacle = load()
    return name_or_obstacle if library is None else None


def instructions() -> str | None:
    """Names the instruction set of the loaded kernels in words, as "AVX2". Returns None if there are no kernels."""
    library, name = load()
    return None if library is None else VARIANTS[name][0]


def multiplies(dtype: torch.dtype) -> bool:
    """Tells whether linears, their gradients and encoders support a dtype: float32 and bfloat16."""
    return obstacle() is None and dtype in (torch.float32, torch.bfloat16)


@functools.cache
def bfloat16_rate() -> float | None:
    """Measures how many products of bfloat16 the processor computes in pairs in the time of one of float32.

    Processors differ: 2.0 is usual for AMD's, 0.5 for Intel's. The measurement takes some 50 microseconds, once in a
    process. Returns None without the instruction for pairs, or without the library that uses it.
    """
    if PAIRS not in processor_flags():
        return None
    try:
        rate = ctypes.CDLL(str(Path(__file__).with_name(f"{PAIRS}.x86_64.so"))).fastbert_bfloat16_rate
    except (OSError, AttributeError):
        return None
    rate.argtypes, rate.restype = [], ctypes.c_double
    return rate()


def int8_obstacle() -> str | None:
    """Returns the reason why no kernel multiplies 8-bit operands, which needs AVX-512 VNNI, or None if one does."""
    if obstacle() is not None:
        return obstacle()
    compiled = hasattr(load()[0], "fastbert_pack_int8")
    return None if compiled else "the processor, or ATEN_CPU_CAPABILITY, has no AVX-512 VNNI"


@functools.cache
def has_amx() -> bool:
    """Tells whether the processor has matrix units, which multiply bfloat16 several times as fast as these kernels."""
    return "amx_bf16" in processor_flags()


def function(name: str, *dtypes: torch.dtype) -> Any:
    """Returns the library's function of that name for the dtypes."""
    return _function_of(load()[0], name, *dtypes)


@functools.lru_cache(64)
def _function_of(library: Any, *words: Any) -> Any:
    return getattr(library, "_".join(("fastbert", *(str(word).removeprefix("torch.") for word in words))))


def address_of(function: Any) -> int:
    """Returns the address of a function of a library."""
    place = ctypes.cast(function, ctypes.c_void_p).value
    assert place is not None
    return place


def address(tensor: torch.Tensor | None) -> int | None:
    """Returns the address of a tensor's memory, and None for None."""
    return None if tensor is None else tensor.data_ptr()


def empty(shape: tuple[int, ...], *, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Allocates the output of a kernel. Tests replace this function, and fill every output with NaN first."""
    return torch.empty(shape, dtype=dtype or like.dtype, device="cpu")  # The default device may be another.


def scratch(n_bytes: int) -> torch.Tensor:
    """Allocates memory that a kernel uses in addition to its outputs. Tests replace this function as well."""
    return torch.empty(n_bytes, dtype=torch.uint8, device="cpu")


def check(status: int, n_tokens: int) -> None:
    """Raises the error that a kernel returned."""
    if status == 1:
        raise MemoryError("attention: no memory for the keys and values of a sequence")
    if status == 2:
        raise ValueError(f"cu_seqlens: expected offsets from 0 to {n_tokens} that never decrease")
