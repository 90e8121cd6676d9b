"""This module finds the kernel of a recorded operation, its block sizes, and their source."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastbert.ops import (
    attention,
    disentangled,
    dispatch,
    embedding,
    gelu,
    layer_norm,
    packed_linear,
    pooling,
    quantized,
)
from fastbert.ops.gated import KERNELS as GATED_KERNELS
from fastbert.ops.linear import KERNELS as LINEAR_KERNELS
from fastbert.ops.recording import Record
from fastbert.ops.rotary import KERNELS as ROTARY_KERNELS
from fastbert_kernels import cpu

PACKED = "where no gradients are needed"


@dataclass(frozen=True)
class Kernel:
    """A `Kernel` holds the name of a kernel, its block sizes if it is Triton's, and the source of sizes or choice."""

    name: str
    block_sizes: dict[str, int] | None = None
    source: str | None = None


def compiled() -> str:
    """Returns the name of the C++ kernels for CPUs, with their instruction set."""
    return f"fastbert_kernels.cpu, {cpu.instructions()}"


def kernel_of(record: Record, device: torch.device) -> Kernel:
    """Returns the kernel of an operation on the device of the dry run. The caller must be inside this dry run."""
    name, _, precision = record.op.partition(" in ")
    if precision and name in _IN_8_BITS:
        return _IN_8_BITS[name](record, device)
    return _KERNELS[name](record, device)


def _arch(device: torch.device) -> int:
    return dispatch.arch_of(device)


def _named(record: Record, kernels: Mapping[str, str], config: str, *args: Any) -> Kernel:
    """Looks up the block sizes. config: a function of fastbert_kernels.configs, which gets the arguments."""
    if record.backend != "triton":
        return Kernel(kernels.get(record.backend, kernels["torch"]))
    from fastbert_kernels import configs

    sizes = getattr(configs, config)(*args)
    if isinstance(sizes, configs.Config):
        return Kernel(kernels["triton"], dict(sizes.block_sizes), sizes.source)
    return Kernel(kernels["triton"], dict(sizes), f"formula of fastbert_kernels.configs.{config}")


def _embedding(record: Record, device: torch.device) -> Kernel:
    return _named(record, embedding.KERNELS, "rowwise_config", record.after[1])


def _layer_norm(record: Record, device: torch.device) -> Kernel:
    return _named(record, layer_norm.KERNELS, "rowwise_config", record.after[1])


def _bias_gelu(record: Record, device: torch.device) -> Kernel:
    activation = record.facts["activation"]
    if record.backend != "triton" and activation not in ("gelu", "gelu_tanh"):
        return Kernel(f"PyTorch's, {activation}")
    return _named(record, gelu.KERNELS, "elementwise_config", record.after[1])


def _attention(record: Record, device: torch.device) -> Kernel:
    obstacle = record.facts["compiled_obstacle"]
    if record.backend == "cpu" and obstacle is None:
        return Kernel(compiled())
    if record.backend != "triton":
        source = None if obstacle is None else f"PyTorch's: {obstacle}"
        return Kernel(attention.KERNELS["torch"], source=source)
    if "distances" in record.facts:
        from fastbert_kernels import disentangled as kernels

        sizes, source = kernels.tile(record.dtype, _head_size(record)), "formula of fastbert_kernels.disentangled.tile"
        return Kernel(disentangled.KERNELS["triton"], sizes, source)
    from fastbert_kernels import configs

    shape = record.dtype, _head_size(record), _arch(device)
    kernel = _named(record, attention.KERNELS, "attention_config", *shape)
    small = configs.small_attention_config(*shape) if record.facts["shared_tiles"] else None
    if small is not None:
        tile = f"{small.block_sizes['BLOCK_Q']} x {small.block_sizes['BLOCK_K']}"
        kernel = replace(kernel, source=f"{kernel.source}; short texts and short batches take {tile}")
    return kernel


def _head_size(record: Record) -> int:
    return record.after[1] // record.facts["heads"]


def short_texts(record: Record, device: torch.device) -> Kernel | None:
    """Returns the second launch of attention, for short texts, or None if there is none."""
    if record.backend != "triton" or "distances" in record.facts or record.facts["shared_tiles"]:
        return None
    from fastbert_kernels import configs

    config = configs.short_attention_config(record.dtype, _head_size(record), _arch(device))
    return None if config is None else Kernel(attention.KERNELS["triton"], dict(config.block_sizes), config.source)


def _rotary(record: Record, device: torch.device) -> Kernel:
    if record.facts["compiled"]:
        return Kernel(compiled(), source=PACKED)
    heads = record.facts["heads"]
    half = record.after[1] // (6 * heads)
    return _named(record, ROTARY_KERNELS, "rotary_config", half, 2 * heads)


def _gated(record: Record, device: torch.device) -> Kernel:
    if record.backend == "cpu":
        return Kernel(compiled(), source=PACKED)
    return _named(record, GATED_KERNELS, "gated_config", record.after[1])


def _pooling(record: Record, device: torch.device) -> Kernel:
    if record.facts["kernel"] in ("compiled", "invariant"):
        return Kernel(compiled(), source=PACKED)
    blocks = "one_row_pooling_config" if record.facts["mode"] in ("cls", "last") else "pooling_config"
    return _named(record, pooling.KERNELS, blocks, record.after[1])


def _linear(record: Record, device: torch.device) -> Kernel:
    facts, activation = record.facts, record.facts["activation"]
    if facts["product"] == "fastbert":
        from fastbert_kernels import configs, few_rows

        shape, gated = _features(record), facts.get("gated", False)
        epilogue = "residual" if facts["residual"] else activation
        if gated:  # the product has two columns for each column of the result
            shape, epilogue = (shape[0], 2 * shape[1]), "gated"
        gemm = configs.gemm(record.dtype, _arch(device), shape, epilogue)
        source = f"{facts['why']}; {gemm.config.source}"
        if not facts["batch_invariant"]:
            tiles = (few_rows.tile(record.dtype, _arch(device), shape, epilogue, rows) for rows in few_rows.BUCKETS)
            if any(tile is not None for tile in tiles):
                source += f"; up to {few_rows.FEW} tokens others by fastbert_kernels.few_rows"
        name = f"gated_{gemm.ours}" if gated else gemm.ours
        return Kernel(f"fastbert_kernels.{name}", dict(gemm.config.block_sizes), source)
    if facts["product"] == "split":
        return Kernel("fastbert_kernels.split_linear, for few rows", source="tables, few_rows")
    if facts["product"] == "packed":
        return Kernel(str(packed_linear.kernel(record.dtype, facts["batch_invariant"])), source=PACKED)
    library = LINEAR_KERNELS["torch"]
    if activation != "none":
        applied = "relu" if activation == "relu" else "gelu"
        return Kernel(f"{library}, torch.nn.functional.{applied}", source=facts["why"])
    return Kernel(f"{library} (cuBLAS)" if device.type == "cuda" else library, source=facts["why"])


def _features(record: Record) -> tuple[int, int]:
    assert record.before is not None
    return record.before[1], record.after[1]


def _quantized_linear(record: Record, device: torch.device) -> Kernel:
    if record.backend != "triton":
        return Kernel(quantized.KERNELS["torch"])
    from fastbert_kernels import quantized_configs

    dtype = quantized.DTYPES[record.facts["precision"]]
    gemm = quantized_configs.quantized_gemm(
        dtype, _arch(device), _features(record), record.facts["group"], record.dtype
    )
    return _of_gemm(gemm)


def _of_gemm(gemm: Any) -> Kernel:
    source = "; ".join(filter(None, (gemm.choice_source, gemm.config.source)))
    return Kernel(f"fastbert_kernels.{gemm.ours}", dict(gemm.config.block_sizes), source)


def _quantized_gated(record: Record, device: torch.device) -> Kernel:
    if record.backend != "triton":
        return Kernel(quantized.KERNELS["torch"])
    from fastbert_kernels import quantized_configs

    dtype = quantized.DTYPES[record.facts["precision"]]
    return _of_gemm(quantized_configs.quantized_gated_gemm(dtype, _arch(device), _features(record)))


def _sum_norm(record: Record, device: torch.device) -> Kernel:
    kernels = {"triton": "fastbert_kernels.sum_norm", "torch": layer_norm.KERNELS["torch"]}
    return _named(record, kernels, "rowwise_config", record.after[1])


def _quantized_rows(record: Record, device: torch.device) -> Kernel:
    kernels = {"triton": "fastbert_kernels.quantized_rows", "torch": quantized.KERNELS["torch"]}
    return _named(record, kernels, "rowwise_config", record.after[1])


# Operations that have other kernels in 8 bits, or exist only in 8 bits.
_IN_8_BITS: dict[str, Callable[[Record, torch.device], Kernel]] = {
    "linear": _quantized_linear,
    "gated": _quantized_gated,
    "sum_norm": _sum_norm,
    "rows": _quantized_rows,
}
_KERNELS: dict[str, Callable[[Record, torch.device], Kernel]] = {
    "embedding": _embedding,
    "layer_norm": _layer_norm,
    "sum_norm": _sum_norm,
    "bias_gelu": _bias_gelu,
    "attention": _attention,
    "rotary": _rotary,
    "gated": _gated,
    "pooling": _pooling,
    "linear": _linear,
}
