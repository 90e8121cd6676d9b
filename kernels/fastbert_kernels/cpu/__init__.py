"""Kernels for CPUs, in C++: what PyTorch's own operations are slow at on packed tokens.

The sources are compiled when fastbert is installed, once for each instruction set in VARIANTS, into libraries that know
nothing of Python or PyTorch: memory comes in by address, and threads are those of PyTorch's OpenMP. Where no compiler
was there, or the processor lacks AVX2, `unavailable` says so, and the caller takes PyTorch's operations.

`python setup.py build_ext --inplace` compiles them in a checkout; an editable installation has done so.
"""

from __future__ import annotations

import ctypes
import functools
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
# Name of the library, the instructions it was compiled for and this processor's names for them. The best comes first.
VARIANTS = {
    "avx512_bf16": ("AVX-512 with bfloat16", {*AVX512, "avx512_vnni", "avx512_bf16"}),
    "avx512_vnni": ("AVX-512 with VNNI", {*AVX512, "avx512_vnni"}),
    "avx512": ("AVX-512", {*AVX512}),
    "avx2": ("AVX2", {"avx2", "fma"}),
}
MAX_HIDDEN = 4096
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
    why = "this installation has no C++ kernels: they were not compiled, or its wheel is the one for all platforms"
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
        pool = getattr(library, f"fastbert_pool_{dtype}")
        pool.argtypes = [pointer, size, size, pointer, size, size, ctypes.c_int, ctypes.c_int, pointer]
        pool.restype = ctypes.c_int
    library.fastbert_ids_outside.argtypes = [pointer, size, size]
    library.fastbert_ids_outside.restype = ctypes.c_int
    library.fastbert_digest.argtypes = [pointer, size, size]
    library.fastbert_digest.restype = ctypes.c_uint64
    library.fastbert_packed_size.argtypes = [size, size]
    library.fastbert_packed_size.restype = size
    for dtype in ("float32", "bfloat16") if hasattr(library, "fastbert_linear_bfloat16") else ("float32",):
        pack, linear, encode = (getattr(library, f"fastbert_{name}_{dtype}") for name in ("pack", "linear", "encode"))
        pack.argtypes = [pointer, size, size, size, pointer]
        linear.argtypes = [pointer, size, pointer, pointer, pointer, size, pointer, size, size, size, size, size]
        encode.argtypes = [*[pointer] * 5, size, *[pointer] * 3, *[size] * 6, ctypes.c_float]
        pack.restype = linear.restype = None
        encode.restype = ctypes.c_int
    if hasattr(library, "fastbert_pack_int8"):
        _declare_int8(library)
    return library


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
        encode_bytes.argtypes = [size] * 3
        encode.argtypes = [*[pointer] * 5, size, *[pointer] * 2, size, pointer, *[size] * 7, ctypes.c_float]
        quantize.restype = linear.restype = None
        encode_bytes.restype, encode.restype = size, ctypes.c_int


def unavailable() -> str | None:
    """Why there are no C++ kernels in this process, or None."""
    library, why = _load()
    return why if library is None else None


def instructions() -> str | None:
    """The instruction set of the kernels that run, in words: "AVX2"; None where none do."""
    library, name = _load()
    return None if library is None else VARIANTS[name][0]


def multiplies(dtype: torch.dtype) -> bool:
    """Whether `linear_forward` and `encoder_forward` take this dtype: float32, and bfloat16 with its instructions."""
    if unavailable() is not None:
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and _load()[1].endswith("bf16"))


def no_int8() -> str | None:
    """Why nothing here multiplies 8-bit operands, or None: it takes AVX-512 VNNI."""
    if unavailable() is not None:
        return unavailable()
    compiled = hasattr(_load()[0], "fastbert_pack_int8")
    return None if compiled else "the processor, or ATEN_CPU_CAPABILITY, has no AVX-512 VNNI"


@functools.cache
def has_amx() -> bool:
    """Whether the processor has matrix units, which multiply bfloat16 several times as fast as these kernels."""
    return "amx_bf16" in _processor_flags()


def _function(name: str, dtype: torch.dtype) -> Any:
    return _function_of(_load()[0], name, dtype)


@functools.lru_cache(64)
def _function_of(library: Any, name: str, dtype: torch.dtype) -> Any:
    return getattr(library, f"fastbert_{name}_{str(dtype).removeprefix('torch.')}")


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def empty(shape: tuple[int, ...], *, like: torch.Tensor) -> torch.Tensor:
    """What a kernel writes its output to."""
    return torch.empty(shape, dtype=like.dtype, device="cpu")  # whatever the default device is


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
    status = _function("attention", qkv.dtype)(
        qkv.data_ptr(), qkv.stride(0), n_tokens, offsets.data_ptr(), len(offsets) - 1, num_heads,
        hidden_size // num_heads, scale, out.data_ptr(), hidden_size,
    )  # fmt: skip
    _check(status, n_tokens)
    return out


def _check(status: int, n_tokens: int) -> None:
    if status == 1:
        raise MemoryError("attention: no memory for the keys and values of a sequence")
    if status == 2:
        raise ValueError(f"cu_seqlens: expected offsets from 0 to {n_tokens} that never decrease")


def ids_outside(ids: torch.Tensor, size: int) -> bool:
    """Whether one of the ids, int64 and contiguous, is below 0 or not below size."""
    return bool(_load()[0].fastbert_ids_outside(ids.data_ptr(), ids.numel(), size))


def digest(addresses: int, n_words: int, word_size: int) -> int:
    """A number that differs where one of n_words words differs, whose addresses, uint64, lie at `addresses`.

    word_size: bytes of a word, 1, 2, 4 or 8.
    """
    found: int = _load()[0].fastbert_digest(addresses, n_words, word_size)
    return found


def pool_forward(
    hidden: torch.Tensor, cu_seqlens: torch.Tensor, mode: str = "mean", normalize: bool = False
) -> torch.Tensor:
    """The mean of each sequence's rows, or with mode "mean_sqrt_len" their sum over the root of how many there are.

    hidden: (T, H), float32 or bfloat16, rows contiguous. cu_seqlens: (B + 1,) int32 on the CPU, from 0 to at most T.
    normalize: to length 1. Returns (B, H) float32. Raises ValueError for other offsets.
    """
    offsets, (n_rows, size), n_seqs = cu_seqlens.contiguous(), hidden.shape, cu_seqlens.shape[0] - 1
    out = torch.empty(n_seqs, size, dtype=torch.float32, device="cpu")
    status = _function("pool", hidden.dtype)(
        hidden.data_ptr(), hidden.stride(0), n_rows, offsets.data_ptr(), n_seqs, size,
        mode == "mean_sqrt_len", normalize, out.data_ptr(),
    )  # fmt: skip
    _check(status, n_rows)
    return out


def pack_weight(weight: torch.Tensor) -> torch.Tensor:
    """(M, K), of a dtype that `multiplies` -> the same in the order in which `linear_forward` reads it."""
    weight = weight if weight.stride(-1) == 1 else weight.contiguous()
    packed = torch.empty(_load()[0].fastbert_packed_size(*weight.shape), dtype=weight.dtype, device="cpu")
    _function("pack", weight.dtype)(weight.data_ptr(), weight.stride(0), *weight.shape, packed.data_ptr())
    return packed


def linear_forward(
    x: torch.Tensor,
    packed: torch.Tensor,
    n_columns: int,
    bias: torch.Tensor | None,
    activation: str = "none",
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """activation(x @ weight^T + bias) + residual, all of one dtype that `multiplies`, rows contiguous.

    x: (T, K), K even in bfloat16; packed: of a weight (M = n_columns, K); bias: (M,); residual: (T, M); activation: a
    key of ACTIVATIONS. Returns (T, M).
    """
    out = empty((x.shape[0], n_columns), like=x)
    _function("linear", x.dtype)(
        x.data_ptr(), x.stride(0), packed.data_ptr(), _address(bias),
        _address(residual), 0 if residual is None else residual.stride(0),
        out.data_ptr(), n_columns, x.shape[0], x.shape[1], n_columns, ACTIVATIONS[activation],
    )  # fmt: skip
    return out


class EncoderTables(NamedTuple):
    """The embeddings of an encoder in the order in which the C++ kernel reads them. token_types: None without any."""

    words: torch.Tensor
    token_types: torch.Tensor | None
    positions: torch.Tensor
    norm_weight: torch.Tensor
    norm_bias: torch.Tensor


class EncoderLayer(NamedTuple):
    """A layer in the order in which the C++ kernel reads it. qkv, out, up and down: packed weights."""

    qkv: torch.Tensor
    qkv_bias: torch.Tensor
    out: torch.Tensor
    out_bias: torch.Tensor
    attention_norm_weight: torch.Tensor
    attention_norm_bias: torch.Tensor
    up: torch.Tensor
    up_bias: torch.Tensor
    down: torch.Tensor
    down_bias: torch.Tensor
    output_norm_weight: torch.Tensor
    output_norm_bias: torch.Tensor


class Int8EncoderLayer(NamedTuple):
    """A layer in the order in which the 8-bit C++ kernel reads it. qkv, out and up are rotated."""

    qkv: Int8Weight
    out: Int8Weight
    attention_norm_weight: torch.Tensor
    attention_norm_bias: torch.Tensor
    up: Int8Weight
    down: Int8Weight
    output_norm_weight: torch.Tensor
    output_norm_bias: torch.Tensor


@dataclass(frozen=True)
class _Encoder:
    embeddings: EncoderTables | tuple[()]
    layers: tuple[Any, ...]  # EncoderLayer, or Int8EncoderLayer
    hidden_size: int
    intermediate_size: int
    num_heads: int
    activation: str
    eps: float

    @functools.cached_property
    def addresses(self) -> tuple[Any, ...]:
        """Of the embeddings and of the layers' tensors, one after the other."""
        flat: list[torch.Tensor] = []
        for item in (item for layer in self.layers for item in layer):
            flat += (item.packed, item.columns) if isinstance(item, Int8Weight) else (item,)
        return tuple((ctypes.c_void_p * len(some))(*map(_address, some)) for some in (self.embeddings, flat))

    @functools.cached_property
    def settings(self) -> tuple[Any, ...]:
        """What follows the number of rows in a call of the kernel."""
        sizes = self.hidden_size, self.intermediate_size, self.num_heads, len(self.layers)
        return *sizes, ACTIVATIONS[self.activation], self.eps


@dataclass(frozen=True)
class Encoder(_Encoder):
    """The weights of an encoder, all of one dtype that `multiplies`, as `encoder_forward` reads them.

    embeddings: (), where they are made elsewhere. All tensors are contiguous. hidden_size: at most MAX_HIDDEN, and head
    size a multiple of 16.
    """

    @functools.cached_property
    def dtype(self) -> torch.dtype:
        return self.layers[0].qkv.dtype

    def workspace_size(self, n_tokens: int) -> int:
        """How many elements `encoder_forward` needs beside its output."""
        return n_tokens * (5 * self.hidden_size + self.intermediate_size)


def encoder_forward(
    encoder: Encoder,
    ids: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor] | None,
    x: torch.Tensor,
    cu_seqlens_cpu: torch.Tensor,
    workspace: torch.Tensor,
) -> torch.Tensor:
    """Embeddings and layers over packed tokens, into x, (T, H), which is returned.

    ids: words, token types (or None) and positions, (T,) int64, contiguous and within their tables; None where x holds
    the embeddings. cu_seqlens_cpu: (B + 1,) int32. workspace: as many elements as workspace_size says, of x's dtype.
    """
    embeddings, layers = encoder.addresses
    offsets, n_rows = cu_seqlens_cpu.contiguous(), x.shape[0]
    pointers = map(_address, (None, None, None) if ids is None else ids)
    status = _function("encode", x.dtype)(
        *pointers, embeddings, offsets.data_ptr(), offsets.shape[0] - 1, layers, x.data_ptr(), workspace.data_ptr(),
        n_rows, *encoder.settings,
    )  # fmt: skip
    _check(status, n_rows)
    return x


@dataclass(frozen=True)
class Int8Weight:
    """A weight (M, K) as `linear_int8_forward` reads it.

    columns: (3, M, filled up) float32: scales, scales times the sums of the rows, bias.
    """

    packed: torch.Tensor
    columns: torch.Tensor
    shape: tuple[int, int]


def pack_int8(data: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> Int8Weight:
    """data: (M, K) int8, -127 to 127; scale: (M,) float32; bias: (M,) or None. K at most 66,000."""
    library, (n_columns, k) = _load()[0], data.shape
    data = data.contiguous()
    packed = torch.empty(library.fastbert_packed_size_int8(n_columns, k), dtype=torch.int8, device="cpu")
    library.fastbert_pack_int8(data.data_ptr(), n_columns, k, packed.data_ptr())
    n_padded = library.fastbert_padded_columns_int8(n_columns)
    columns = torch.zeros(3, n_padded, dtype=torch.float32, device="cpu")
    columns[0, :n_columns] = scale
    columns[1, :n_columns] = scale * data.sum(1, dtype=torch.int64)
    if bias is not None:
        columns[2, :n_columns] = bias
    return Int8Weight(packed, columns, (n_columns, k))


def quantize_forward(x: torch.Tensor, rotated: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """x: (T, K) float32 or bfloat16, rows contiguous -> q (T, K) uint8, affine (T, 2) float32: x ~ affine[:, 0] * q +
    affine[:, 1]. rotated: of x times the Hadamard matrix in blocks of 32 columns, K a multiple of 32 up to MAX_HIDDEN.
    """
    n_rows, k = x.shape
    # Products read rows in steps of four.
    q = torch.empty((n_rows, -(-k // 4) * 4), dtype=torch.uint8, device="cpu")
    affine = empty((n_rows, 2), like=x.new_empty(0, dtype=torch.float32))
    function = _function("quantize", x.dtype)
    function(x.data_ptr(), x.stride(0), n_rows, k, rotated, q.data_ptr(), q.stride(0), affine.data_ptr())
    return q[:, :k], affine


def linear_int8_forward(
    q: torch.Tensor,
    affine: torch.Tensor,
    weight: Int8Weight,
    dtype: torch.dtype,
    activation: str = "none",
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """activation(x @ weight^T + bias) + residual in dtype, for x = affine[:, 0] * q + affine[:, 1].

    q: (T, K) uint8, its row stride a multiple of 4; affine: (T, 2) float32; residual: (T, M) in dtype. Returns (T, M).
    """
    (n_columns, k), n_rows = weight.shape, q.shape[0]
    out = empty((n_rows, n_columns), like=affine.new_empty(0, dtype=dtype))
    _function("linear_int8", dtype)(
        q.data_ptr(), q.stride(0), affine.data_ptr(), weight.packed.data_ptr(), weight.columns.data_ptr(),
        _address(residual), 0 if residual is None else residual.stride(0),
        out.data_ptr(), n_columns, n_rows, k, n_columns, ACTIVATIONS[activation],
    )  # fmt: skip
    return out


@dataclass(frozen=True)
class Int8Encoder(_Encoder):
    """The weights of an encoder as `encoder_int8_forward` reads them.

    Hidden and intermediate size are multiples of 32.
    """

    def workspace_size(self, n_tokens: int, dtype: torch.dtype) -> int:
        """How many bytes `encoder_int8_forward` needs beside its output, with as many threads as there are now."""
        function = getattr(_load()[0], f"fastbert_encode_int8_{str(dtype).removeprefix('torch.')}_bytes")
        return function(n_tokens, self.hidden_size, self.intermediate_size)


def encoder_int8_forward(
    encoder: Int8Encoder,
    ids: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor] | None,
    states: torch.Tensor,
    cu_seqlens_cpu: torch.Tensor,
    workspace: torch.Tensor,
) -> torch.Tensor:
    """As `encoder_forward`, into states: (1, T, H), the last hidden state, or (L + 1, T, H), all of them, contiguous.

    Where ids is None, states[0] holds the embeddings. workspace: uint8, as many as workspace_size says. Returns states.
    """
    embeddings, layers = encoder.addresses
    offsets = cu_seqlens_cpu.contiguous()
    pointers = map(_address, (None, None, None) if ids is None else ids)
    status = _function("encode_int8", states.dtype)(
        *pointers, embeddings, offsets.data_ptr(), len(offsets) - 1, layers, states.data_ptr(),
        0 if len(states) == 1 else states.stride(0), workspace.data_ptr(), workspace.numel(), states.shape[1],
        *encoder.settings,
    )  # fmt: skip
    _check(status, states.shape[1])
    return states
