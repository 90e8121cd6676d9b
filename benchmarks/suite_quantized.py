"""This part of the kernel suite times the 8-bit linears of a layer: both our kernels, PyTorch's, cuBLAS in 16 bits.

It runs on a GPU only. A case is one linear as a layer calls it, with its bias and GELU, and with an 8-bit result if the
next linear takes one. The comparison uses the dequantised results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from suite_kernels import EAGER, INPUT_SETS, MODELS, SUITE, Contender
from suites import Built, Case, Work
from torch import Tensor

from fastbert.bench.peers import OURS, Peer
from fastbert.engine.block import product_shapes
from fastbert.ops import Policy, quantized
from fastbert.ops.quantized import OUT_GROUP, Quantized

WEIGHT = 0.3  # weight of a case; those of models have about 1
CHECKED = 64  # rows at either end whose output is checked; the operations' own tests check everything
CUDA_ROUNDS = (
    ("BERT-large", 16384, "fp8"),
    ("BERT-large", 16384, "int8"),
    ("BERT-base", 16384, "fp8"),
    ("BERT-large", 65536, "fp8"),
)


class Linear(NamedTuple):
    """A Linear is (T, K) -> (T, M). group: columns of x with one scale, None for one a row. gelu: 8-bit result."""

    k: int
    m: int
    group: int | None
    gelu: bool


def linears(hidden: int, inner: int, heads: int) -> dict[str, Linear]:
    """Returns the linears of a layer by name, the most important first."""
    shapes = product_shapes(hidden, inner)

    def linear(product: str, group: int | None = None, gelu: bool = False) -> Linear:
        m, k = shapes[product]
        return Linear(k, m, group, gelu)

    return {
        "QKV": linear("qkv"),
        "down": linear("down", OUT_GROUP),
        "up + GELU": linear("up", gelu=True),
        "attention output": linear("out", hidden // heads),
    }


def cases(device_type: str) -> list[Case]:
    """Returns the cases for "cuda", the most important first; none for "cpu"."""
    if device_type != "cuda":
        return []
    return [
        _case(name, model, tokens, precision)
        for model, tokens, precision in CUDA_ROUNDS
        for name in linears(*MODELS[model])
    ]


def build(linear: Linear, tokens: int, precision: str, device: torch.device) -> Built:
    """Builds the contest of one linear."""
    torch.manual_seed(0)
    k, m, group, _ = linear
    inputs = [quantized.quantize(_randn(tokens, k, device), precision, group) for _ in range(INPUT_SETS)]
    weight = quantized.quantize_weight(_randn(m, k, device) * k**-0.5, precision)
    bias = _randn(m, 1, device).flatten().bfloat16()

    rows = torch.arange(tokens, device=device)
    rows = rows if tokens <= 2 * CHECKED else torch.cat([rows[:CHECKED], rows[-CHECKED:]])
    first = inputs[0]._replace(data=inputs[0].data[rows], scale=inputs[0].scale[rows])
    exact = F.linear(quantized.dequantize(first).double(), quantized.dequantize(weight).double(), bias.double())
    exact = F.gelu(exact) if linear.gelu else exact

    def pick(out: Tensor | Quantized) -> Tensor:
        if isinstance(out, Quantized):
            return quantized.dequantize(out._replace(data=out.data[rows], scale=out.scale[rows])).bfloat16()
        return out[rows]

    peers = list(_peers(linear, inputs, weight, bias, pick, device))
    out_bytes = 1 if linear.gelu else 2
    scales = inputs[0].scale.numel() + m + (tokens * -(-m // OUT_GROUP) if linear.gelu else 0)
    work = Work(2.0 * tokens * k * m, tokens * k + m * k + out_bytes * tokens * m + 4 * scales + 2 * m)
    extra = {"kernel_tokens": tokens, "flops": work.flops, "bytes": work.n_bytes}
    timing = {"flush_l2": True} if device.type == "cuda" else {"min_sample_seconds": 0.01}
    return Built(peers, EAGER, exact, work=work, extra=extra, timing=timing)


def _peers(
    linear: Linear,
    inputs: list[Quantized],
    weight: Quantized,
    bias: Tensor,
    pick: Callable[..., Tensor],
    device: torch.device,
) -> Iterator[Peer]:
    sets = [(x,) for x in inputs]
    activation = "gelu" if linear.gelu else "none"
    on_gpu = device.type == "cuda"

    def ours(policy: Policy, x: Quantized) -> Tensor | Quantized:
        if linear.gelu:
            return quantized.linear_quantized(x, weight, bias, activation, policy=policy)
        return quantized.linear(x, weight, bias, torch.bfloat16, activation, policy=policy)

    yield Contender(OURS, partial(ours, Policy("triton", strict=True) if on_gpu else Policy("torch")), sets, pick)
    yield Contender(EAGER, partial(ours, Policy("torch")), sets, pick)
    if on_gpu:
        by_pointers, missing = _pointers(linear, weight, bias, device)
        yield Contender("fastbert by pointers", by_pointers, sets, pick, missing=missing)

    half = [(quantized.dequantize(x).bfloat16(),) for x in inputs]
    half_weight = quantized.dequantize(weight).bfloat16()

    def then(y: Tensor) -> Tensor:
        return F.gelu(y) if linear.gelu else y

    bf16 = Contender("bf16, F.linear", lambda x: then(F.linear(x, half_weight, bias)), half, pick)
    bf16.dtype = "bfloat16"
    yield bf16

    grouped = None if linear.group is None else "takes one scale a row"
    if weight.precision == "int8":
        column = weight.scale.flatten()

        def int_mm(x: Quantized) -> Tensor:
            y = torch._int_mm(x.data, weight.data.t()) * x.scale * column
            return then((y + bias).bfloat16())

        yield Contender("torch._int_mm, scaled after", int_mm, sets, pick, missing=grouped)
        return
    row = weight.scale.t()  # (1, M)
    for name, fast in (("torch._scaled_mm", False), ("torch._scaled_mm, sums in 14 bits", True)):

        def scaled_mm(x: Quantized, fast: bool = fast) -> Tensor:
            arguments = {"bias": bias, "out_dtype": torch.bfloat16, "use_fast_accum": fast}
            return then(torch._scaled_mm(x.data, weight.data.t(), x.scale, row, **arguments))

        missing = grouped if on_gpu else "needs an NVIDIA GPU"
        yield Contender(name, scaled_mm, sets, pick, missing=missing)


def _pointers(
    linear: Linear, weight: Quantized, bias: Tensor, device: torch.device
) -> tuple[Callable[..., Any], str | None]:
    """Returns our kernel without tensor descriptors, and the reason why it is not timed, or None."""
    from fastbert_kernels import launch, quantized_configs
    from fastbert_kernels.quantized_linear import quantized_linear_pointer_forward, sums_outside

    arch, dtype, shape = launch.arch(device), weight.data.dtype, (linear.k, linear.m)
    out_dtype = dtype if linear.gelu else torch.bfloat16
    config = quantized_configs.quantized_linear_config(dtype, linear.group, arch, shape, linear.gelu).block_sizes
    taken = quantized_configs.quantized_gemm(dtype, arch, shape, linear.group, out_dtype).ours

    def run(x: Quantized) -> Tensor | Quantized:
        n_rows = x.data.shape[0]
        out = torch.empty(n_rows, linear.m, dtype=out_dtype, device=device)
        scale = x.scale.new_empty(n_rows, -(-linear.m // OUT_GROUP)) if linear.gelu else None
        inputs = *x, weight.data, weight.scale.flatten(), bias, "gelu" if linear.gelu else "none"
        quantized_linear_pointer_forward(*inputs, config, out, scale, sums_outside(dtype, arch))
        return out if scale is None else Quantized(out, scale, min(OUT_GROUP, linear.m))

    return run, "is what fastbert runs here" if taken == "quantized_linear" else None


def warm(device: torch.device, model: str, precision: str) -> None:
    """Runs each 8-bit linear of a model once on a few tokens by both kernels, to compile them."""
    for linear in linears(*MODELS[model]).values():
        for peer in build(linear, 64, precision, device).peers:
            if peer.name.startswith(OURS) and peer.obstacle() is None:
                peer.prepare()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _case(name: str, model: str, tokens: int, precision: str) -> Case:
    def build_on(device: torch.device) -> Built:
        obstacle = quantized.device_obstacle(precision, device)
        if obstacle is not None:
            raise RuntimeError(obstacle)
        return build(linears(*MODELS[model])[name], tokens, precision, device)

    return Case(
        SUITE, f"8-bit {name}, {tokens} tokens", model, precision, "cuda", ("quantized",), build_on, weight=WEIGHT
    )


def _randn(n: int, k: int, device: torch.device) -> Tensor:
    return torch.randn(n, k, device=device)
