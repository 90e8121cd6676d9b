"""This module checks, registers, records and runs operations on 8-bit operands, by a kernel or its twin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastbert.ops import dispatch, recording
from fastbert.ops.dispatch import Policy
from fastbert.ops.library import LIBRARY
from fastbert.ops.quantize import ROTATION, TOP, Quantized, check_precision

MIN_ARCH = {"fp8": 89, "int8": 80}
# The registered operation, its twin in plain PyTorch, and a function that gives empty results of the same shapes.
Functions = tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]
LINEAR = "Tensor x, Tensor x_scale, int group, Tensor weight, Tensor weight_scale, Tensor? bias, str activation"


def device_obstacle(precision: str, device: torch.device, arch: int | None = None) -> str | None:
    """Tells why the GPU cannot multiply in this precision, or returns None.

    arch: the compute capability (89 for 8.9), by default the device's.
    """
    if device.type != "cuda":
        return None
    if arch is None and recording.on:
        arch = recording.assumed_arch()
    if arch is None:
        major, minor = torch.cuda.get_device_capability(device)
        arch = 10 * major + minor
    least = MIN_ARCH[precision]
    return None if arch >= least else f"{precision} needs compute capability {least / 10}, and this GPU has {arch / 10}"


def run(op: str, precision: str, policy: Policy, obstacle: str | None, functions: Functions, *args: Any) -> Any:
    """Runs the kernel, or its twin in plain PyTorch if there is an obstacle."""
    check_precision(precision)
    if policy.batch_invariant:
        raise dispatch.BackendError(
            f"batch_invariant: {op}: neither the kernels in {precision} nor their emulation support it"
        )
    tensors = [a for a in args if isinstance(a, Tensor)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise RuntimeError(f"{op}: {precision} is for inference and has no gradient: use torch.no_grad()")
    device = tensors[0].device
    obstacle = device_obstacle(precision, device) or obstacle
    kernel, twin, fake = functions
    backend = dispatch.choose(f"{op} in {precision}", policy.backend, policy.strict, device, obstacle)
    if recording.on and _note(op, precision, backend, args):
        return fake(*args)
    return kernel(*args) if backend == "triton" else twin(*args)


def _note(op: str, precision: str, backend: str, args: tuple[Any, ...]) -> bool:
    """Records an operation on 8-bit operands. Returns what `recording.note` does."""
    facts: dict[str, Any] = {"precision": precision, "quantizes": True}
    first: Tensor = args[0] if op != "embedding" or args[0] is not None else args[3]
    shape: tuple[int, ...] = tuple(first.shape)
    before: tuple[int, ...] | None = shape
    weight = None
    dtype = first.dtype
    if op in ("linear", "gated"):
        _, _, group, weight, _, bias, activation, *dtypes = args
        shape = shape[0], weight.shape[0] // (2 if op == "gated" else 1)
        dtype = dtypes[0] if dtypes else dtype
        group = None if group >= weight.shape[1] else group
        facts |= {"quantizes": not dtypes, "group": group, "bias": bias is not None, "activation": activation}
    elif op == "layer_norm":
        weight = args[3]
        facts |= {"bias": args[1] is not None, "residual": args[2] is not None}
    elif op == "sum_norm":
        weight = args[2]
        facts |= {"bias": False, "residual": True}
    elif op == "attention":
        shape = shape[0], shape[1] // 3
        facts |= {"heads": args[5], "shared_tiles": True, "compiled_obstacle": None}
        facts |= {"window": args[8]} if type(args[8]) is int else {}
    elif op == "embedding":
        before, shape, dtype = None, (first.shape[0], args[3].shape[1]), args[3].dtype
    return recording.note(f"{op} in {precision}", backend, before, shape, dtype, weight, **facts)


def check_width(hidden_size: int, precision: str) -> None:
    """Raises ValueError for rows that cannot be rotated, because int8 needs the rotation."""
    if precision == "int8" and hidden_size % ROTATION:
        raise ValueError(f"hidden size: expected a multiple of {ROTATION} for int8, got {hidden_size}")


def check_operands(x: Quantized, weight: Quantized, bias: Tensor | None) -> None:
    """Raises ValueError for operands of a product that do not fit together, or have scales of another shape."""
    for name, q in (("x", x), ("weight", weight)):
        if q.data.dtype not in TOP or q.data.dim() != 2:
            dtypes = " or ".join(map(str, TOP))
            raise ValueError(f"{name}: expected (T, K) in {dtypes}, got {tuple(q.data.shape)} in {q.data.dtype}")
        n, k = q.data.shape
        if q.group < 1 or q.scale.shape != (n, -(-k // q.group)) or q.scale.dtype != torch.float32:
            expected = f"({n}, {-(-k // max(q.group, 1))}) in float32 for groups of {q.group}"
            raise ValueError(f"{name}.scale: expected {expected}, got {tuple(q.scale.shape)} in {q.scale.dtype}")
    if x.data.dtype != weight.data.dtype or x.data.shape[1] != weight.data.shape[1] or weight.scale.shape[1] != 1:
        shapes = f"{tuple(x.data.shape)} in {x.data.dtype} and {tuple(weight.data.shape)} in {weight.data.dtype}"
        raise ValueError(f"x, weight: expected (T, K) and (M, K) of one dtype, one scale a row of weight, got {shapes}")
    if bias is not None and bias.shape != (weight.data.shape[0],):
        raise ValueError(f"bias: expected shape ({weight.data.shape[0]},), got {tuple(bias.shape)}")


def register(schema: str, kernel: Callable[..., Any], twin: Callable[..., Any], fake: Callable[..., Any]) -> Functions:
    """Does what `library.register` does, for several outputs and no gradient."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    LIBRARY.impl(name, kernel, "CUDA")
    LIBRARY.impl(name, lambda *args: (kernel if dispatch.interpreting() else twin)(*args), "CPU")
    torch.library.register_fake(f"fastbert::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.fastbert, name), twin, fake


def buffers(like: Tensor, n_cols: int, n_groups: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns memory for as many 8-bit rows as `like` has, (T, n_cols), and for their scales, (T, n_groups)."""
    from fastbert_kernels import launch

    shape = (like.shape[0], n_cols), (like.shape[0], n_groups)
    return launch.empty(shape[0], like=like, dtype=dtype), launch.empty(shape[1], like=like, dtype=torch.float32)


def empty_result(like: Tensor, n_rows: int, n_cols: int, n_groups: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns the result of `buffers` for n_rows rows, for a tracer."""
    scale = like.new_empty(n_rows, n_groups, dtype=torch.float32)
    return like.new_empty(n_rows, n_cols, dtype=dtype), scale
