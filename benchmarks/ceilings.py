"""Ceilings are the measured limits of the hardware: copy bandwidth and the rates of matrix products.

Copy: a large buffer is copied to another on the same device; bytes read plus bytes written count. Products: square
matrices of random numbers, 2 n^3 operations. The numbers are random because zeros draw less power and so run faster
than data. On a CPU the rate is that of the faster of torch.matmul and a linear of oneDNN with packed weights. The
processor's maker decides which of these two libraries of PyTorch multiplies float32 faster.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastbert.bench.measure import interleave
from fastbert.bench.results import Results, environment

FILE = "ceilings.json"
COPY = "copy GB/s"
CUDA_SIZE = 8192
CPU_SIZES = (512, 1024, 2048)


def matmul_key(dtype: str) -> str:
    """Returns the name of the rate for "float32" (IEEE), "tf32" (float32 inputs), "bfloat16" or "float16"."""
    return f"matmul {dtype} TFLOP/s"


def measure(device: torch.device, *, quick: bool = False, size: int | None = None) -> dict[str, float]:
    """Measures the ceilings of a device. size: of the matrices; by default 8192 on a GPU, and on a CPU a size for half
    a second.
    """
    values = {COPY: copy_bandwidth(device, _copy_bytes(device, quick))}
    for dtype in ("bfloat16", "float16", "float32", "tf32") if device.type == "cuda" else ("float32", "bfloat16"):
        values[matmul_key(dtype)] = matmul_rate(device, dtype, size or _matmul_size(device, dtype, quick))
    return values


def copy_bandwidth(device: torch.device, n_bytes: int) -> float:
    """Returns the GB/s, read and written, of copies of n_bytes."""
    source = torch.randint(0, 127, (n_bytes // 4,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda i: target.copy_(source), device) / 1e9


def matmul_rate(device: torch.device, dtype: str, size: int) -> float:
    """Returns the TFLOP/s of (size, size) @ (size, size)."""
    tensor_dtype = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
    a, b = (torch.randn(size, size, device=device).to(tensor_dtype) for _ in range(2))
    out = torch.empty_like(a)
    switch = torch.backends.cuda.matmul
    # PyTorch 2.9 renamed the switch, and a mixture of the two names raises.
    name, settings = (
        ("fp32_precision", ("ieee", "tf32")) if hasattr(switch, "fp32_precision") else ("allow_tf32", (False, True))
    )
    before = getattr(switch, name)
    setattr(switch, name, settings[dtype == "tf32"])
    try:
        seconds = _seconds(lambda i: torch.matmul(a, b, out=out), device)
    finally:
        setattr(switch, name, before)
    if device.type == "cpu" and (packed := _packed_product(a, b)) is not None:
        seconds = min(seconds, _seconds(packed, device))
    return 2 * size**3 / seconds / 1e12


def _packed_product(x: torch.Tensor, weight: torch.Tensor) -> Callable[[int], object] | None:
    """Returns x @ weight^T by oneDNN with its own layout of the weight, or None if PyTorch has no such operation."""
    try:
        ops = torch.ops.mkldnn
        packed = ops._reorder_linear_weight(weight, x.shape[0])
        ops._linear_pointwise(x, packed, None, "none", [], "")
    except (AttributeError, RuntimeError):  # internal names of PyTorch, and builds without oneDNN
        return None
    return lambda i: ops._linear_pointwise(x, packed, None, "none", [], "")


def cached(device: torch.device, folder: Path, *, quick: bool = False) -> dict[str, float]:
    """Returns the ceilings in the folder's file if device and commit match; else measures them and writes the file."""
    path = folder / FILE
    now = environment(device)
    if path.exists():
        before = Results.load(path)
        if _origin(before.environment) == _origin(now) and before.ceilings:
            return before.ceilings
    results = Results(now, ceilings=measure(device, quick=quick))
    results.save(path)
    return results.ceilings


def _origin(environment: dict[str, Any]) -> tuple[Any, str]:
    """Returns the device and the commit, since another commit may measure in another way; also for results marked
    "-dirty".
    """
    return environment.get("device"), str(environment.get("commit")).removesuffix("-dirty")


def _seconds(run: Callable[[int], object], device: torch.device) -> float:
    """Returns the seconds of the fastest round. A ceiling is a limit of the device, so the load of other rounds is left
    out.
    """
    rounds = 20 if device.type == "cuda" else 7
    return min(interleave({"it": run}, device=device, rounds=rounds, warmup=3, max_seconds=2.0)["it"].samples)


def _copy_bytes(device: torch.device, quick: bool) -> int:
    """Returns the bytes of a copy: far more than the caches hold, and less than a tenth of a GPU's memory."""
    if device.type == "cuda":
        return min(4 * 2**30, torch.cuda.get_device_properties(device).total_memory // 10)
    return 2**26 if quick else 2**29


def _matmul_size(device: torch.device, dtype: str, quick: bool) -> int:
    """Returns the largest of a few sizes that takes a CPU less than half a second. Some CPUs multiply bfloat16 very
    slowly.
    """
    if device.type == "cuda":
        return CUDA_SIZE
    a = torch.randn(CPU_SIZES[0], CPU_SIZES[0]).to(getattr(torch, dtype))
    torch.matmul(a, a)
    started = time.perf_counter()
    torch.matmul(a, a)
    once = time.perf_counter() - started
    fitting = [n for n in CPU_SIZES if once * (n / CPU_SIZES[0]) ** 3 < (0.05 if quick else 0.5)]
    return fitting[-1] if fitting else CPU_SIZES[0]
