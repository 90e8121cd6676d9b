"""Kernels for CPUs, in C++: what PyTorch's own operations are slow at on packed tokens.

`attention.cpp` and `linear.cpp` are compiled when fastbert is installed, once for each instruction set in VARIANTS,
into libraries that know nothing of Python or PyTorch: memory comes in by address, and threads are those of PyTorch's
OpenMP. Where no compiler was there, or the processor lacks AVX2, `unavailable` says so, and the caller takes PyTorch's
operations.

`python setup.py build_ext --inplace` compiles them in a checkout; an editable installation has done so.
"""

from __future__ import annotations

import ctypes
import functools
import platform
from pathlib import Path
from typing import Any

import torch

# Name of the library, the instructions it was compiled for and this processor's names for them. The best comes first.
VARIANTS = {
    "avx512_bf16": ("AVX-512 with bfloat16", {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"}),
    "avx512": ("AVX-512", {"avx512f", "avx512bw", "avx512dq", "avx512vl"}),
    "avx2": ("AVX2", {"avx2", "fma"}),
}
ACTIVATIONS = {"none": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}


@functools.cache
def _load() -> tuple[Any, str]:
    """The best library for this processor and its name in VARIANTS, or None and why there is none."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return None, f"there are no C++ kernels for {platform.machine()}"
    flags = _processor_flags()
    usable = [name for name, (_, needed) in VARIANTS.items() if needed <= flags]
    if not usable:
        return None, "the processor, or ATEN_CPU_CAPABILITY, has no AVX2"
    why = "the C++ kernels were not compiled when fastbert was installed"
    for name in usable:
        path = Path(__file__).with_name(f"{name}.x86_64.so")
        if not path.is_file():
            continue
        try:
            return _declared(ctypes.CDLL(str(path))), name
        except (OSError, AttributeError) as error:
            why = f"{path.name} does not load: {error}"
    return None, why


def _processor_flags() -> set[str]:
    """The instruction sets that the processor has and the user lets PyTorch use (ATEN_CPU_CAPABILITY)."""
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
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    for dtype in ("float32", "bfloat16"):
        attention = getattr(library, f"fastbert_attention_{dtype}")
        attention.argtypes = [pointer, size, size, pointer, size, size, size, ctypes.c_float, pointer, size]
        attention.restype = ctypes.c_int
    library.fastbert_packed_floats.argtypes = [size, size]
    library.fastbert_packed_floats.restype = size
    library.fastbert_pack_float32.argtypes = [pointer, size, size, size, pointer]
    library.fastbert_pack_float32.restype = None
    library.fastbert_linear_float32.argtypes = [
        pointer, size, pointer, pointer, pointer, size, pointer, size, size, size, size, size
    ]  # fmt: skip
    library.fastbert_linear_float32.restype = None
    return library


def unavailable() -> str | None:
    """Why there are no C++ kernels in this process, or None."""
    library, why = _load()
    return why if library is None else None


def instructions() -> str | None:
    """The instruction set of the kernels that run, in words: "AVX2"; None where none do."""
    library, name = _load()
    return None if library is None else VARIANTS[name][0]


def empty(shape: tuple[int, ...], *, like: torch.Tensor) -> torch.Tensor:
    """What a kernel writes its output to."""
    return torch.empty(shape, dtype=like.dtype)


def varlen_attention_forward(
    qkv: torch.Tensor, cu_seqlens_cpu: torch.Tensor, num_heads: int, scale: float
) -> torch.Tensor:
    """softmax(scale * q k^T) v within each sequence; 0 in rows beyond the last one.

    qkv: (T, 3 * N * D), [q | k | v], float32 or bfloat16, rows contiguous; D a multiple of 16. cu_seqlens_cpu: (B + 1,)
    int32. Returns (T, N * D). Raises ValueError for offsets outside of the rows.
    """
    n_tokens, hidden_size = qkv.shape[0], qkv.shape[1] // 3
    out = empty((n_tokens, hidden_size), like=qkv)
    offsets = cu_seqlens_cpu.contiguous()
    run = getattr(_load()[0], f"fastbert_attention_{str(qkv.dtype).removeprefix('torch.')}")
    status = run(
        qkv.data_ptr(), qkv.stride(0), n_tokens, offsets.data_ptr(), len(offsets) - 1, num_heads,
        hidden_size // num_heads, scale, out.data_ptr(), hidden_size,
    )  # fmt: skip
    if status == 1:
        raise MemoryError("attention: no memory for the keys and values of a sequence")
    if status == 2:
        raise ValueError(f"cu_seqlens: expected offsets from 0 to {n_tokens} that never decrease")
    return out


def pack_weight(weight: torch.Tensor) -> torch.Tensor:
    """(M, K) float32 -> the same in the order in which `linear_forward` reads it."""
    weight = weight if weight.stride(-1) == 1 else weight.contiguous()
    library = _load()[0]
    packed = torch.empty(library.fastbert_packed_floats(*weight.shape))
    library.fastbert_pack_float32(weight.data_ptr(), weight.stride(0), *weight.shape, packed.data_ptr())
    return packed


def linear_forward(
    x: torch.Tensor,
    packed: torch.Tensor,
    n_columns: int,
    bias: torch.Tensor | None,
    activation: str = "none",
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """activation(x @ weight^T + bias) + residual, all float32, rows contiguous.

    x: (T, K); packed: of a weight (M = n_columns, K); bias: (M,); residual: (T, M); activation: a key of ACTIVATIONS.
    """
    out = empty((x.shape[0], n_columns), like=x)
    _load()[0].fastbert_linear_float32(
        x.data_ptr(), x.stride(0), packed.data_ptr(), None if bias is None else bias.data_ptr(),
        None if residual is None else residual.data_ptr(), 0 if residual is None else residual.stride(0),
        out.data_ptr(), n_columns, x.shape[0], x.shape[1], n_columns, ACTIVATIONS[activation],
    )  # fmt: skip
    return out
