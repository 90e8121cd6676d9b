"""What `fastbert tune` times: the GEMMs and the attention of models, and for each the kernels and tiles to choose from.

T tokens, H hidden, I intermediate, D head size, K and M the sizes of a weight (M, K).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import reference
from fastbert.config import BertConfig

# Sizes of all-MiniLM-L6-v2 and of BERT-base and -large: what is tuned where no model is named.
DEFAULT_MODELS = {"MiniLM": (384, 1536, 12), "BERT-base": (768, 3072, 12), "BERT-large": (1024, 4096, 16)}
TOKENS = (256, 2048, 16384)
# Lengths of the sequences in which attention is timed, over and over up to the number of tokens.
LENGTHS = (20, 512, 60, 128, 300)
EPS = 1e-12

_TILES_16BIT = (  # BLOCK_ROWS, BLOCK_COLS, BLOCK_K, num_warps, num_stages
    (128, 128, 32, 8, 4), (128, 128, 64, 8, 3), (128, 128, 32, 4, 4), (128, 64, 32, 4, 4), (64, 128, 32, 4, 4),
    (64, 64, 64, 4, 4), (128, 256, 32, 8, 3), (256, 128, 32, 8, 3), (128, 64, 64, 4, 3), (64, 128, 64, 4, 3),
)  # fmt: skip
_TILES_32BIT = ((64, 128, 16, 4, 3), (64, 64, 16, 4, 3), (128, 64, 16, 4, 3), (64, 128, 32, 4, 3), (128, 128, 16, 8, 2))
_PERSISTENT_TILES = (
    (128, 128, 64, 8, 4), (128, 128, 64, 8, 3), (128, 256, 64, 8, 3), (256, 128, 64, 8, 3), (128, 64, 64, 4, 4),
    (64, 128, 64, 4, 4), (64, 256, 64, 8, 3), (128, 128, 128, 8, 2),
)  # fmt: skip
_ATTENTION_TILES = (  # BLOCK_Q, BLOCK_K, num_warps, num_stages
    (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 4, 2), (128, 64, 4, 3), (128, 32, 4, 3), (128, 128, 8, 2),
    (64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 3), (64, 128, 4, 2),
)  # fmt: skip
WARP_SPECIALIZED_ARCH = 90  # the one architecture on which a descriptor loop may be warp-specialised

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Candidate:
    """A kernel, one of fastbert_kernels.tables.GEMMS or "attention", and its tile (empty for cuBLAS)."""

    kernel: str
    tile: tuple[tuple[str, int], ...] = ()

    @property
    def sizes(self) -> dict[str, int]:
        return dict(self.tile)

    def __str__(self) -> str:
        return " ".join([self.kernel, *(f"{name}={size}" for name, size in self.tile)])


@dataclass(frozen=True)
class Job:
    """One entry of a table to be. op: "gemm" or "attention"; key: the entry's. what: in words, for people.

    sizes: (K, M) of a GEMM, whose epilogue is "none", "gelu" or "residual"; (number of heads, D) of attention.
    """

    op: str
    key: str
    what: str
    dtype: torch.dtype
    sizes: tuple[int, int]
    epilogue: str
    candidates: tuple[Candidate, ...]


def jobs(
    models: Iterable[tuple[str, BertConfig]], dtypes: Sequence[torch.dtype], arch: int, only: Sequence[str] = ()
) -> list[Job]:
    """The jobs of the models, each shape once. only: "gemm" or "attention"; both by default."""
    from fastbert_kernels import launch

    found: dict[tuple[str, str], Job] = {}
    for name, config in models:
        h, i, d = config.hidden_size, config.intermediate_size, config.head_size
        for dtype in dtypes:
            gemms = (("QKV", (h, 3 * h), "none"), ("attention output", (h, h), "residual"),
                     ("up", (h, i), "gelu"), ("down", (i, h), "residual"))  # fmt: skip
            for what, shape, epilogue in gemms if not only or "gemm" in only else ():
                key = launch.gemm_key(dtype, shape, epilogue)
                candidates = tuple(_gemm_candidates(dtype, arch, shape, epilogue))
                job = Job("gemm", key, f"{name} {what}", dtype, shape, epilogue, candidates)
                found.setdefault((job.op, key), job)
            if (not only or "attention" in only) and launch.MIN_HEAD_SIZE <= d <= launch.MAX_HEAD_SIZE:
                key = launch.attention_key(dtype, d)
                candidates = tuple(_attention_candidates(dtype, arch, d))
                sizes = (config.num_attention_heads, d)
                job = Job("attention", key, f"{name} attention", dtype, sizes, "none", candidates)
                found.setdefault((job.op, key), job)
    return list(found.values())


def default_models() -> list[tuple[str, BertConfig]]:
    return [
        (name, BertConfig(hidden_size=h, intermediate_size=i, num_attention_heads=n))
        for name, (h, i, n) in DEFAULT_MODELS.items()
    ]


def _gemm_candidates(dtype: torch.dtype, arch: int, shape: tuple[int, int], epilogue: str) -> Iterator[Candidate]:
    """cuBLAS first, then the tiles that tables give now, then others that fit."""
    from fastbert_kernels import launch

    yield Candidate("cublas")
    pointer = [launch.linear_config(dtype, arch, shape, epilogue).block_sizes]
    pointer += map(_gemm_tile, _TILES_32BIT if dtype == torch.float32 else _TILES_16BIT)
    yield from dict.fromkeys(
        _candidate("linear", sizes)
        for sizes in pointer
        if _fits(sizes, dtype, arch) and _leaves_registers(sizes, epilogue)
    )
    current = launch.linear_persistent_config(dtype, arch, shape, epilogue)
    if current is None or any(size * dtype.itemsize % 16 for size in shape):
        return
    persistent = [current.block_sizes, *({**_gemm_tile(tile), "WARP_SPECIALIZE": 0} for tile in _PERSISTENT_TILES)]
    if arch == WARP_SPECIALIZED_ARCH:
        square = [sizes for sizes in persistent if sizes["BLOCK_ROWS"] == sizes["BLOCK_COLS"] == 128]
        persistent += [{**sizes, "WARP_SPECIALIZE": 1} for sizes in square]
    yield from dict.fromkeys(
        _candidate("linear_persistent", sizes)
        for sizes in persistent
        if _fits(sizes, dtype, arch, staged_outputs=2 if epilogue == "residual" else 1)
        and _leaves_registers(sizes, epilogue)
    )


def _gemm_tile(tile: tuple[int, int, int, int, int]) -> dict[str, int]:
    names = ("BLOCK_ROWS", "BLOCK_COLS", "BLOCK_K", "num_warps", "num_stages")
    return {**dict(zip(names, tile, strict=True)), "GROUP_ROWS": 8}


def _leaves_registers(sizes: dict[str, int], epilogue: str) -> bool:
    """Whether the accumulator leaves an epilogue registers of a thread's 255: where it takes half of them, it spills.

    Seen in the offline compile, on sm_80, 89 and 90.
    """
    return epilogue == "none" or sizes["BLOCK_ROWS"] * sizes["BLOCK_COLS"] // (32 * sizes["num_warps"]) < 128


def _attention_candidates(dtype: torch.dtype, arch: int, head_size: int) -> Iterator[Candidate]:
    from fastbert_kernels import launch

    current = launch.attention_config(dtype, head_size, arch).block_sizes
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


def _candidate(kernel: str, sizes: dict[str, int]) -> Candidate:
    return Candidate(kernel, tuple(sorted(sizes.items())))


def _shared_memory(arch: int) -> int:
    from fastbert_kernels import launch

    return launch.SHARED_MEMORY[max(known for known in launch.SHARED_MEMORY if known <= arch)]


def _fits(sizes: dict[str, int], dtype: torch.dtype, arch: int, staged_outputs: int = 0) -> bool:
    """Whether the operands of all stages fit into shared memory, and the tiles of output that are staged there."""
    rows, cols = sizes["BLOCK_ROWS"], sizes["BLOCK_COLS"]
    elements = sizes["num_stages"] * (rows + cols) * sizes["BLOCK_K"] + staged_outputs * rows * cols
    return elements * dtype.itemsize <= _shared_memory(arch)


class Work:
    """One job on so many tokens: its inputs, its candidates as calls, and what is right."""

    def __init__(self, job: Job, n_tokens: int, device: torch.device, seed: int = 0) -> None:
        self.job, self.n_tokens, self.device = job, n_tokens, device
        self.generator = torch.Generator().manual_seed(seed)
        if job.op == "gemm":
            k, m = job.sizes
            self.x = self._random(n_tokens, k)
            self.weight, self.bias = self._random(m, k, scale=k**-0.5), self._random(m)
            if job.epilogue == "residual":
                self.residual, self.ln_weight, self.ln_bias = (
                    self._random(n_tokens, m),
                    self._random(m),
                    self._random(m),
                )
        else:
            n_heads, d = job.sizes
            self.qkv = self._random(n_tokens, 3 * n_heads * d)
            self.cu_seqlens = _offsets(n_tokens)

    def _random(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=self.generator) * scale).to(self.device, self.job.dtype)

    def call(self, candidate: Candidate) -> Call:
        """The candidate on these inputs, with all that follows from the choice: a GELU or LayerNorm of its own."""
        if self.job.op == "attention":
            return self._attention(candidate)
        return self._cublas() if candidate.kernel == "cublas" else self._ours(candidate)

    def _cublas(self) -> Call:
        from fastbert_kernels.gelu import bias_gelu_forward
        from fastbert_kernels.layer_norm import bias_residual_layer_norm_forward

        x, weight, bias = self.x, self.weight, self.bias
        if self.job.epilogue == "gelu":
            return lambda: bias_gelu_forward(F.linear(x, weight), bias, "gelu")
        if self.job.epilogue == "residual":
            after = self.residual, self.ln_weight, self.ln_bias, EPS
            return lambda: bias_residual_layer_norm_forward(F.linear(x, weight), bias, *after)
        return lambda: F.linear(x, weight, bias)

    def _ours(self, candidate: Candidate) -> Call:
        from fastbert_kernels.layer_norm import bias_residual_layer_norm_forward
        from fastbert_kernels.linear import linear_pointer_forward
        from fastbert_kernels.linear_persistent import linear_persistent_forward

        forward = linear_persistent_forward if candidate.kernel == "linear_persistent" else linear_pointer_forward
        residual = self.residual if self.job.epilogue == "residual" else None
        activation = "gelu" if self.job.epilogue == "gelu" else "none"
        x, weight, bias, sizes = self.x, self.weight, self.bias, candidate.sizes

        def run() -> Tensor:
            out = x.new_empty(x.shape[0], weight.shape[0])
            forward(x, weight, bias, activation, residual, sizes, out)
            if residual is None:
                return out
            return bias_residual_layer_norm_forward(out, None, None, self.ln_weight, self.ln_bias, EPS)

        return run

    def _attention(self, candidate: Candidate) -> Call:
        from fastbert.varlen import sequence_ids
        from fastbert_kernels import launch
        from fastbert_kernels.attention import build_work_list, varlen_attention_forward

        n_heads, d = self.job.sizes
        block_d = launch.attention_config(self.job.dtype, d, launch.arch(self.device)).block_sizes["BLOCK_D"]
        sizes = {**candidate.sizes, "BLOCK_D": block_d}
        work_list = build_work_list(self.cu_seqlens, sizes["BLOCK_Q"]).to(self.device)
        cu_seqlens = torch.tensor(self.cu_seqlens, dtype=torch.int32, device=self.device)
        seq_ids = sequence_ids(cu_seqlens, self.n_tokens)
        arguments = (self.qkv, cu_seqlens, seq_ids, work_list, n_heads, d**-0.5)
        return lambda: varlen_attention_forward(*arguments, config=sizes)

    def eager(self) -> Tensor:
        """Plain PyTorch in the same dtype, whose error bounds that of every candidate."""
        return self._plain(self.job.dtype)

    def exact(self) -> Tensor:
        """The same in float64."""
        return self._plain(torch.float64)

    def _plain(self, dtype: torch.dtype) -> Tensor:
        if self.job.op == "attention":
            return self._plain_attention(dtype)
        x, weight, bias = (t.to(dtype) for t in (self.x, self.weight, self.bias))
        y = F.linear(x, weight, bias)
        if self.job.epilogue == "gelu":
            return F.gelu(y)
        if self.job.epilogue == "residual":
            residual, ln_weight, ln_bias = (t.to(dtype) for t in (self.residual, self.ln_weight, self.ln_bias))
            return F.layer_norm(y + residual, (y.shape[1],), ln_weight, ln_bias, EPS)
        return y

    def _plain_attention(self, dtype: torch.dtype) -> Tensor:
        n_heads, _ = self.job.sizes
        return reference.varlen_attention(self.qkv.to(dtype), torch.tensor(self.cu_seqlens), n_heads)


def _offsets(n_tokens: int) -> list[int]:
    """(B + 1,) offsets of sequences of LENGTHS, over and over, n_tokens in all."""
    offsets = [0]
    while offsets[-1] < n_tokens:
        offsets.append(min(n_tokens, offsets[-1] + LENGTHS[(len(offsets) - 1) % len(LENGTHS)]))
    return offsets
