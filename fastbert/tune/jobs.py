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
from fastbert.checkpoint.config import BertConfig
from fastbert.ops import quantized

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
_TILES_8BIT = (
    (128, 128, 128, 8, 3), (128, 128, 64, 8, 4), (64, 128, 128, 4, 3), (128, 64, 128, 4, 3), (64, 128, 64, 4, 4),
)  # fmt: skip
_PERSISTENT_TILES_8BIT = (
    (128, 256, 128, 8, 3), (128, 128, 128, 8, 4), (128, 128, 128, 8, 3), (128, 256, 64, 8, 4), (128, 128, 64, 8, 4),
    (64, 128, 128, 4, 4), (64, 256, 128, 8, 3),
)  # fmt: skip
WARP_SPECIALIZED_ARCH = 90  # the one architecture on which a descriptor loop may be warp-specialised

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Candidate:
    """A kernel, of fastbert_kernels.tables.GEMMS or QUANTIZED_GEMMS or "attention", and its tile (empty for cuBLAS)."""

    kernel: str
    tile: tuple[tuple[str, int], ...] = ()

    @property
    def sizes(self) -> dict[str, int]:
        return dict(self.tile)

    def __str__(self) -> str:
        return " ".join([self.kernel, *(f"{name}={size}" for name, size in self.tile)])


@dataclass(frozen=True)
class Job:
    """One entry of a table to be. op: "gemm", "quantized_gemm" or "attention"; key: the entry's. what: for people.

    sizes: (K, M) of a GEMM, whose epilogue is "none", "gelu" or "residual"; (number of heads, D) of attention. group:
    columns of a quantised operand that share a scale, None where a row has one; with "gelu" the result is quantised.
    """

    op: str
    key: str
    what: str
    dtype: torch.dtype
    sizes: tuple[int, int]
    epilogue: str
    candidates: tuple[Candidate, ...]
    group: int | None = None

    @property
    def out_dtype(self) -> torch.dtype:
        """In which results are compared: of a quantised one what it stands for."""
        return torch.bfloat16 if self.dtype.itemsize == 1 else self.dtype


def jobs(
    models: Iterable[tuple[str, BertConfig]],
    dtypes: Sequence[torch.dtype],
    arch: int,
    only: Sequence[str] = (),
    precisions: Sequence[str] = (),
) -> list[Job]:
    """The jobs of the models, each shape once. only: "gemm" or "attention"; both by default.

    precisions: "fp8", "int8" or both, whose linears are timed too, where the architecture can multiply in them.
    """
    from fastbert_kernels import configs

    found: dict[tuple[str, str], Job] = {}
    for name, config in models:
        h, i, d = config.hidden_size, config.intermediate_size, config.head_size
        for dtype in dtypes:
            gemms = (("QKV", (h, 3 * h), "none"), ("attention output", (h, h), "residual"),
                     ("up", (h, i), "gelu"), ("down", (i, h), "residual"))  # fmt: skip
            for what, shape, epilogue in gemms if not only or "gemm" in only else ():
                key = configs.gemm_key(dtype, shape, epilogue)
                candidates = tuple(_gemm_candidates(dtype, arch, shape, epilogue))
                job = Job("gemm", key, f"{name} {what}", dtype, shape, epilogue, candidates)
                found.setdefault((job.op, key), job)
            if (not only or "attention" in only) and configs.MIN_HEAD_SIZE <= d <= configs.MAX_HEAD_SIZE:
                key = configs.attention_key(dtype, d)
                candidates = tuple(_attention_candidates(dtype, arch, d))
                sizes = (config.num_attention_heads, d)
                job = Job("attention", key, f"{name} attention", dtype, sizes, "none", candidates)
                found.setdefault((job.op, key), job)
        for precision in precisions if not only or "gemm" in only else ():
            cuda, sizes_of = torch.device("cuda"), (h, i, d)
            if quantized.device_obstacle(precision, cuda, arch) is not None:
                continue
            for job in _quantized_jobs(name, sizes_of, quantized.DTYPES[precision], arch):
                found.setdefault((job.op, job.key), job)
    return list(found.values())


def _quantized_jobs(name: str, model: tuple[int, int, int], dtype: torch.dtype, arch: int) -> Iterator[Job]:
    """The four 8-bit linears of a layer; model: H, I, D."""
    from fastbert_kernels import configs

    h, i, d = model
    for what, shape, group, epilogue in (
        ("QKV", (h, 3 * h), None, "none"), ("attention output", (h, h), d if d < h else None, "none"),
        ("up", (h, i), None, "gelu"),
        ("down", (i, h), quantized.OUT_GROUP if i > quantized.OUT_GROUP else None, "none"),
    ):  # fmt: skip
        key = configs.quantized_gemm_key(dtype, shape, group, epilogue == "gelu")
        candidates = tuple(_quantized_candidates(dtype, arch, shape, group, epilogue == "gelu"))
        yield Job("quantized_gemm", key, f"{name} {what}", dtype, shape, epilogue, candidates, group)


def default_models() -> list[tuple[str, BertConfig]]:
    return [
        (name, BertConfig(hidden_size=h, intermediate_size=i, num_attention_heads=n))
        for name, (h, i, n) in DEFAULT_MODELS.items()
    ]


def _gemm_candidates(dtype: torch.dtype, arch: int, shape: tuple[int, int], epilogue: str) -> Iterator[Candidate]:
    """cuBLAS first, then the tiles that tables give now, then others that fit."""
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
        and _leaves_registers(sizes, dtype, epilogue)
    )


def _quantized_candidates(
    dtype: torch.dtype, arch: int, shape: tuple[int, int], group: int | None, quantizes: bool
) -> Iterator[Candidate]:
    """The tiles that tables give now, then others that fit, first of the kernel on pointers."""
    from fastbert_kernels import configs

    def whole_steps(sizes: dict[str, int]) -> dict[str, int]:
        if group is None or group % sizes["BLOCK_K"] == 0:
            return sizes
        return {**sizes, "BLOCK_K": max(32, 1 << (group - 1).bit_length())}

    how = dtype, group, arch, shape, quantizes
    pointer = [configs.quantized_linear_config(*how).block_sizes, *map(whole_steps, map(_gemm_tile, _TILES_8BIT))]
    yield from dict.fromkeys(
        _candidate("quantized_linear", sizes)
        for sizes in pointer
        if _fits(sizes, dtype, arch) and (not quantizes or sizes["BLOCK_COLS"] == quantized.OUT_GROUP)
    )
    descriptors = configs.quantized_linear_persistent_config(*how)
    out_size = 1 if quantizes else 2
    if descriptors is None or shape[0] % 16 or shape[1] * out_size % 16:
        return
    tiles = [{**whole_steps(_gemm_tile(tile)), "WARP_SPECIALIZE": 0} for tile in _PERSISTENT_TILES_8BIT]
    if arch != WARP_SPECIALIZED_ARCH:  # elsewhere the tile of two parts spills
        tiles = [sizes for sizes in tiles if sizes["BLOCK_COLS"] == quantized.OUT_GROUP]
    persistent = [descriptors.block_sizes, *tiles]
    if arch == WARP_SPECIALIZED_ARCH:
        square = [sizes for sizes in persistent if sizes["BLOCK_ROWS"] == sizes["BLOCK_COLS"] == 128]
        persistent += [{**sizes, "WARP_SPECIALIZE": 1} for sizes in square]
    yield from dict.fromkeys(
        _candidate("quantized_linear_persistent", sizes)
        for sizes in persistent
        if _fits(sizes, dtype, arch, staged_outputs=out_size, staged_cols=quantized.OUT_GROUP)
        and (group is None or group % sizes["BLOCK_K"] == 0)
    )


def _gemm_tile(tile: tuple[int, int, int, int, int]) -> dict[str, int]:
    names = ("BLOCK_ROWS", "BLOCK_COLS", "BLOCK_K", "num_warps", "num_stages")
    return {**dict(zip(names, tile, strict=True)), "GROUP_ROWS": 8}


def _leaves_registers(sizes: dict[str, int], dtype: torch.dtype, epilogue: str) -> bool:
    """Whether the accumulator leaves an epilogue registers of a thread's 255: where it takes half of them, it spills,
    except with the short GELU of 16 bits.

    Seen in the offline compile, on sm_80, 89 and 90; GELU of 16 bits also on 100 and 120.
    """
    if epilogue == "none" or (epilogue == "gelu" and dtype != torch.float32):
        return True
    return sizes["BLOCK_ROWS"] * sizes["BLOCK_COLS"] // (32 * sizes["num_warps"]) < 128


def _attention_candidates(dtype: torch.dtype, arch: int, head_size: int) -> Iterator[Candidate]:
    from fastbert_kernels import configs

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


def _candidate(kernel: str, sizes: dict[str, int]) -> Candidate:
    return Candidate(kernel, tuple(sorted(sizes.items())))


def _shared_memory(arch: int) -> int:
    from fastbert_kernels import launch

    return launch.SHARED_MEMORY[max(known for known in launch.SHARED_MEMORY if known <= arch)]


def _fits(
    sizes: dict[str, int], dtype: torch.dtype, arch: int, staged_outputs: int = 0, staged_cols: int | None = None
) -> bool:
    """Whether the operands of all stages fit into shared memory, and the tiles of output that are staged there.

    staged_outputs: how many, in elements of dtype; staged_cols: of how many columns at most.
    """
    rows, cols = sizes["BLOCK_ROWS"], sizes["BLOCK_COLS"]
    staged = staged_outputs * rows * min(cols, staged_cols or cols)
    elements = sizes["num_stages"] * (rows + cols) * sizes["BLOCK_K"] + staged
    return elements * dtype.itemsize <= _shared_memory(arch)


class Work:
    """One job on so many tokens: its inputs, its candidates as calls, and what is right."""

    def __init__(self, job: Job, n_tokens: int, device: torch.device, seed: int = 0) -> None:
        self.job, self.n_tokens, self.device = job, n_tokens, device
        self.generator = torch.Generator().manual_seed(seed)
        if job.op == "quantized_gemm":
            k, m = job.sizes
            precision = "int8" if job.dtype == torch.int8 else "fp8"
            self.x = self._random(n_tokens, k)
            self.weight, self.bias = self._random(m, k, scale=k**-0.5), self._random(m)
            self.q_x = quantized.quantize(self.x, precision, job.group)
            self.q_weight = quantized.quantize_weight(self.weight, precision)
            self.out_scale: Tensor | None = None
        elif job.op == "gemm":
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
        return (torch.randn(*shape, generator=self.generator) * scale).to(self.device, self.job.out_dtype)

    def call(self, candidate: Candidate) -> Call:
        """The candidate on these inputs, with all that follows from the choice: a GELU or LayerNorm of its own."""
        if self.job.op == "attention":
            return self._attention(candidate)
        if self.job.op == "quantized_gemm":
            return self._quantized(candidate)
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

    def _quantized(self, candidate: Candidate) -> Call:
        from fastbert_kernels import launch
        from fastbert_kernels.quantized_linear import quantized_linear_pointer_forward, sums_outside
        from fastbert_kernels.quantized_linear_persistent import quantized_linear_persistent_forward

        on_descriptors = candidate.kernel == "quantized_linear_persistent"
        forward = quantized_linear_persistent_forward if on_descriptors else quantized_linear_pointer_forward
        x, weight, again = self.q_x, self.q_weight, self.job.epilogue == "gelu"
        given = *x, weight.data, weight.scale.flatten(), self.bias, self.job.epilogue, candidate.sizes
        n_rows, n_cols = x.data.shape[0], weight.data.shape[0]
        outside = sums_outside(x.data.dtype, launch.arch(self.device))

        def run() -> Tensor:
            out = x.data.new_empty(n_rows, n_cols, dtype=None if again else self.job.out_dtype)
            self.out_scale = x.scale.new_empty(n_rows, -(-n_cols // quantized.OUT_GROUP)) if again else None
            return forward(*given, out, self.out_scale, outside)

        return run

    def result(self, candidate: Candidate) -> Tensor:
        """What the candidate computes; of 8-bit results what they stand for."""
        out = self.call(candidate)()
        if self.job.op != "quantized_gemm" or self.out_scale is None:
            return out
        return quantized.dequantize(quantized.Quantized(out, self.out_scale, min(quantized.OUT_GROUP, out.shape[1])))

    def _attention(self, candidate: Candidate) -> Call:
        from fastbert.ops.packing import sequence_ids
        from fastbert_kernels import configs, launch
        from fastbert_kernels.attention import build_work_list, varlen_attention_forward

        n_heads, d = self.job.sizes
        block_d = configs.attention_config(self.job.dtype, d, launch.arch(self.device)).block_sizes["BLOCK_D"]
        sizes = {**candidate.sizes, "BLOCK_D": block_d}
        work_list = build_work_list(self.cu_seqlens, sizes["BLOCK_Q"]).to(self.device)
        cu_seqlens = torch.tensor(self.cu_seqlens, dtype=torch.int32, device=self.device)
        seq_ids = sequence_ids(cu_seqlens, self.n_tokens)
        arguments = (self.qkv, cu_seqlens, seq_ids, work_list, n_heads, d**-0.5)
        return lambda: varlen_attention_forward(*arguments, config=sizes)

    def eager(self) -> Tensor:
        """Plain PyTorch in the same dtype, whose error bounds that of every candidate."""
        if self.job.op == "quantized_gemm":
            y = self._plain_quantized(torch.float32)
            if self.job.epilogue == "gelu":
                return quantized.dequantize(quantized.quantize(y, self.q_x.precision, quantized.OUT_GROUP))
            return y.to(self.job.out_dtype)
        return self._plain(self.job.dtype)

    def exact(self) -> Tensor:
        """The same in float64; of 8-bit operands, with a result that is not quantised."""
        return self._plain_quantized(torch.float64) if self.job.op == "quantized_gemm" else self._plain(torch.float64)

    def _plain_quantized(self, dtype: torch.dtype) -> Tensor:
        x, weight = (quantized.dequantize(q).to(dtype) for q in (self.q_x, self.q_weight))
        y = F.linear(x, weight, self.bias.to(dtype))
        return F.gelu(y) if self.job.epilogue == "gelu" else y

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
