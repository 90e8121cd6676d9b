"""A job is a unit of work for `fastbert tune`: a GEMM or the attention of models. Each shape is timed once.

K and M are the sizes of a weight, (M, K); D is the head size.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from fastbert.checkpoint.config import BertConfig
from fastbert.engine.block import Block
from fastbert.models.registry import encoder_class
from fastbert.ops import quantized
from fastbert.tune.candidates import (
    Candidate,
    attention_candidates,
    few_rows_candidates,
    gemm_candidates,
    quantized_candidates,
    quantized_gated_candidates,
)

# Sizes of all-MiniLM-L6-v2 and of BERT-base and -large, which are tuned if no model is named.
DEFAULT_MODELS = {"MiniLM": (384, 1536, 12), "BERT-base": (768, 3072, 12), "BERT-large": (1024, 4096, 16)}
TOKENS = (256, 2048, 16384)
# The products of a layer: their names in the terminal, and the operation after each in 16 and 32 bits.
TITLES = {"qkv": "QKV", "out": "attention output", "up": "up", "down": "down"}
EPILOGUES = {"qkv": "none", "out": "residual", "up": "gelu", "down": "residual"}
GATED = "gated"  # The epilogue of a product with its gate.


@dataclass(frozen=True)
class Job:
    """A Job describes one entry of a future table.

    op: "gemm", "few_rows", "quantized_gemm", "quantized_gated_gemm" or "attention". key: the key of the entry. title:
    the name for users. sizes: (K, M) of a GEMM, (K, I) of an 8-bit GEMM with a gate, (number of heads, D) of attention.
    epilogue: that of a GEMM, "none", "gelu", "gated" or "residual"; for a quantised GEMM, "gelu" and "gated" quantise
    the result; for other GEMMs, the result of "gated" has half as many columns as the product, M. group: the number of
    columns of a quantised operand that share a scale, None for one scale per row. tokens: the numbers of tokens for the
    timing, if the entry is only for these.
    """

    op: str
    key: str
    title: str
    dtype: torch.dtype
    sizes: tuple[int, int]
    epilogue: str
    candidates: tuple[Candidate, ...]
    group: int | None = None
    tokens: tuple[int, ...] = ()

    @property
    def out_dtype(self) -> torch.dtype:
        """Returns the dtype in which results are compared; for quantised results, that of the dequantised ones."""
        return torch.bfloat16 if self.dtype.itemsize == 1 else self.dtype


def jobs_of(
    models: Iterable[tuple[str, BertConfig]],
    dtypes: Sequence[torch.dtype],
    arch: int,
    only: Sequence[str] = (),
    precisions: Sequence[str] = (),
) -> list[Job]:
    """Returns the jobs of the models, each shape once. only: "gemm" or "attention"; both by default.

    precisions: "fp8", "int8" or both. Their linears are timed too, if the architecture can multiply in them.
    """
    with_gemms, with_attention = not only or "gemm" in only, not only or "attention" in only
    jobs: dict[tuple[str, str], Job] = {}
    for name, config in models:
        for dtype in dtypes:
            for job in _gemm_jobs(name, config, dtype, arch) if with_gemms else ():
                jobs.setdefault((job.op, job.key), job)
            for job in _few_rows_jobs(name, config, dtype, arch) if with_gemms else ():
                jobs.setdefault((job.op, job.key), job)
            for job in _attention_jobs(name, config, dtype, arch) if with_attention else ():
                jobs.setdefault((job.op, job.key), job)
        for precision in precisions if with_gemms else ():
            if quantized.device_obstacle(precision, torch.device("cuda"), arch) is None:
                for job in _quantized_jobs(name, config, quantized.DTYPES[precision], arch):
                    jobs.setdefault((job.op, job.key), job)
    return list(jobs.values())


def _products(config: BertConfig) -> Iterator[tuple[str, tuple[int, int], str]]:
    """Yields each product of a layer: its name, the shape (M, K) of its weight, and its epilogue in 16 and 32 bits.

    For a product with a gate, the weight has the rows of both.
    """
    block = _first_block(config)
    for product, linears in block.products().items():
        shape = sum(linear.weight.shape[0] for linear in linears), linears[0].weight.shape[1]
        epilogue = EPILOGUES[product]
        if epilogue == "gelu" and block.gate is not None:
            epilogue = GATED
        elsewhere = block.pre_norm or block.rotary is not None or (product == "down" and block.second_norm is not None)
        if epilogue == "residual" and elsewhere:  # another kernel adds the residual
            epilogue = "none"
        yield product, shape, epilogue


@functools.cache
def _blocks_of(settings: str) -> Block:
    """Returns the first layer of a model with these settings, whose tensors are on the meta device."""
    config = BertConfig.from_dict(json.loads(settings))
    with torch.device("meta"):
        return next(iter(encoder_class(config)(config).blocks()))


def _first_block(config: BertConfig) -> Block:
    return _blocks_of(json.dumps(config.to_dict(), sort_keys=True))


def _title(product: str, epilogue: str) -> str:
    return f"{TITLES[product]} and gate" if epilogue == GATED else TITLES[product]


def _gemm_jobs(name: str, config: BertConfig, dtype: torch.dtype, arch: int) -> Iterator[Job]:
    """Yields the jobs of the four linears of a layer in 16 or 32 bits."""
    from fastbert_kernels import configs

    for product, (m, k), epilogue in _products(config):
        key = configs.gemm_key(dtype, (k, m), epilogue)
        candidates = tuple(gemm_candidates(dtype, arch, (k, m), epilogue))
        yield Job("gemm", key, f"{name} {_title(product, epilogue)}", dtype, (k, m), epilogue, candidates)


def _few_rows_jobs(name: str, config: BertConfig, dtype: torch.dtype, arch: int) -> Iterator[Job]:
    """Yields the jobs of the 16-bit linears that have separate tiles for few rows: up, and those before LayerNorm."""
    from fastbert_kernels import few_rows

    if dtype == torch.float32:
        return
    for product, (m, k), epilogue in _products(config):
        candidates = tuple(few_rows_candidates(dtype, arch, (k, m), epilogue))
        for bucket in few_rows.BUCKETS if epilogue != "none" else ():
            key = few_rows.key_of(dtype, (k, m), epilogue, bucket)
            title = f"{name} {_title(product, epilogue)}, {bucket} tokens"
            yield Job("few_rows", key, title, dtype, (k, m), epilogue, candidates, tokens=(bucket,))


def _attention_jobs(name: str, config: BertConfig, dtype: torch.dtype, arch: int) -> Iterator[Job]:
    """Yields the job of a layer's attention, if there is a kernel for its head size."""
    from fastbert_kernels import configs

    d = config.head_size
    if configs.MIN_HEAD_SIZE <= d <= configs.MAX_HEAD_SIZE:
        candidates = tuple(attention_candidates(dtype, arch, d))
        sizes, key = (config.num_attention_heads, d), configs.attention_key(dtype, d)
        yield Job("attention", key, f"{name} attention", dtype, sizes, "none", candidates)


def _quantized_jobs(name: str, config: BertConfig, dtype: torch.dtype, arch: int) -> Iterator[Job]:
    """Yields the jobs of the four linears of a layer in 8 bits."""
    from fastbert_kernels import quantized_configs

    # Columns that share a scale: those of a head in the attention's output, those of a group in the output of "up";
    # otherwise those of a row.
    groups: dict[str, int] = {"out": config.head_size, "down": quantized.OUT_GROUP}
    for product, (m, k), epilogue in _products(config):
        if epilogue == GATED:
            sizes = k, m // 2
            key = quantized_configs.quantized_gated_key(dtype, sizes)
            candidates = tuple(quantized_gated_candidates(dtype, arch, sizes))
            yield Job(
                "quantized_gated_gemm", key, f"{name} {_title(product, epilogue)}", dtype, sizes, GATED, candidates
            )
            continue
        group = groups.get(product)
        if group is not None and group >= k:
            group = None
        epilogue = "gelu" if product == "up" else "none"
        key = quantized_configs.quantized_gemm_key(dtype, (k, m), group, epilogue == "gelu")
        candidates = tuple(quantized_candidates(dtype, arch, (k, m), group, epilogue == "gelu"))
        yield Job("quantized_gemm", key, f"{name} {TITLES[product]}", dtype, (k, m), epilogue, candidates, group)


def default_models() -> list[tuple[str, BertConfig]]:
    """Returns names and configurations of DEFAULT_MODELS."""
    return [
        (name, BertConfig(hidden_size=h, intermediate_size=i, num_attention_heads=n))
        for name, (h, i, n) in DEFAULT_MODELS.items()
    ]
