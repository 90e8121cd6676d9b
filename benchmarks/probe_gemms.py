"""The probe measures linears in these sections, by kernel and tile. T is the number of tokens; a weight is (M, K)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import suite_kernels
import torch
import torch.nn.functional as F
from suites import Work
from torch import Tensor

from fastbert.engine.block import product_shapes
from fastbert.ops import quantized
from fastbert.tune.candidates import Candidate
from fastbert.tune.jobs import Job
from fastbert.tune.work import Work as Tuned

if TYPE_CHECKING:
    from probe_pieces import Probe

BF16 = torch.bfloat16
TOKENS, FEW = 16384, 64  # of a kernel's case; in small
CHECKED = 256  # rows of a GEMM that are compared with float64
# Model, linear of a layer, and its activation.
GEMMS = (
    ("BERT-base", "up", "gelu"), ("BERT-base", "qkv", "none"), ("BERT-base", "out", "none"),
    ("BERT-base", "down", "none"), ("BERT-large", "up", "gelu"), ("BERT-large", "down", "none"),
)  # fmt: skip
# Kernel; rows, columns, K, warps, stages of its tile; options. The present default is first, specialised warps are
# last.
TILES: tuple[tuple[str, tuple[int, int, int, int, int], dict[str, int]], ...] = (
    ("linear_persistent", (128, 256, 64, 8, 3), {}),
    ("linear_persistent", (128, 128, 64, 8, 4), {}),
    ("linear", (128, 128, 64, 8, 3), {}),
    ("linear_persistent", (128, 128, 64, 8, 2), {"FLATTEN": 0, "PROGRAMS": 2}),
    ("linear_persistent", (256, 128, 64, 8, 3), {}),
    ("linear", (128, 256, 64, 8, 3), {}),
    ("linear", (64, 128, 64, 4, 4), {}),
    ("linear", (64, 64, 64, 4, 4), {}),
    ("linear_specialized", (128, 256, 64, 4, 3), {}),
    ("linear_specialized", (128, 128, 64, 4, 4), {}),
)
SPLITS = (1, 2, 4, 8)
EIGHT_BIT = (
    ("quantized_linear_persistent", (128, 256, 128, 8, 3)), ("quantized_linear_persistent", (128, 128, 128, 8, 4)),
    ("quantized_linear_specialized", (128, 128, 128, 4, 4)),
)  # fmt: skip


def tile_of(sizes: tuple[int, int, int, int, int], **options: int) -> dict[str, int]:
    names = "BLOCK_ROWS", "BLOCK_COLS", "BLOCK_K", "num_warps", "num_stages"
    return {**dict(zip(names, sizes, strict=True)), "GROUP_ROWS": 8, **options}


def named(kernel: str, sizes: tuple[int, int, int, int, int], options: dict[str, int]) -> str:
    rows, columns, depth, warps, stages = sizes
    more = "".join(f" {name}={value}" for name, value in options.items())
    return f"{kernel} {rows}x{columns}x{depth} w{warps} s{stages}{more}"


def measure_gemms(probe: Probe) -> None:
    """Measures 16-bit linears: cuBLAS without an epilogue, then our kernels with theirs, by tile."""
    if probe.tiny:
        measure_gemm(probe, FEW, 64, 128, "gelu")
        return
    for n in (TOKENS, 128):
        for model, product, activation in GEMMS:
            m, k = product_shapes(*suite_kernels.MODELS[model][:2])[product]
            measure_gemm(probe, n, k, m, activation)


def measure_gemm(probe: Probe, n: int, k: int, m: int, activation: str) -> None:
    from fastbert_kernels import configs, launch
    from fastbert_kernels.linear import linear_pointer_forward
    from fastbert_kernels.linear_persistent import linear_persistent_forward
    from fastbert_kernels.linear_specialized import linear_specialized_forward

    forwards: dict[str, Any] = {
        "linear": linear_pointer_forward,
        "linear_persistent": linear_persistent_forward,
        "linear_specialized": linear_specialized_forward,
    }
    x = torch.randn(n, k, device=probe.device).to(BF16)
    weight = (torch.randn(m, k, device=probe.device) * k**-0.5).to(BF16)
    bias = torch.randn(m, device=probe.device).to(BF16)
    plain = F.linear(x[:CHECKED].double(), weight.double(), bias.double())
    exact = F.gelu(plain) if activation == "gelu" else plain
    case: dict[str, Any] = {"work": Work(2.0 * n * k * m), "pick": lambda out: out[:CHECKED]}
    probe.measure(f"{n} x {k} x {m} none", "cuBLAS", lambda i: F.linear(x, weight, bias), exact=plain, **case)
    out = torch.empty(n, m, device=probe.device, dtype=BF16)

    def run(kernel: str, tile: dict[str, int], i: int) -> Tensor:
        return forwards[kernel](x, weight, bias, activation, None, tile, out)

    first_of_each = {kernel: (kernel, *rest) for kernel, *rest in reversed(TILES)}
    for kernel, sizes, options in first_of_each.values() if probe.tiny else TILES:
        if (
            kernel == "linear_specialized"
            and probe.on_gpu
            and launch.arch(probe.device) != configs.WARP_SPECIALIZED_ARCH
        ):
            continue
        out.fill_(float("nan"))
        call = partial(run, kernel, tile_of(sizes, **options))
        probe.measure(f"{n} x {k} x {m} {activation}", named(kernel, sizes, options), call, exact=exact, **case)


def measure_few_rows(probe: Probe) -> None:
    """Measures linears before LayerNorm on few rows, with the LayerNorm: cuBLAS, then K in shares."""
    if probe.tiny:
        measure_few(probe, FEW, 64, 64)
        return
    for n in (128, 512):
        for model, product in (("BERT-base", "out"), ("BERT-base", "down"), ("BERT-large", "down")):
            m, k = product_shapes(*suite_kernels.MODELS[model][:2])[product]
            measure_few(probe, n, k, m)


def measure_few(probe: Probe, n: int, k: int, m: int) -> None:
    from fastbert_kernels import few_rows

    candidates = [Candidate("cublas")]
    for sizes in few_rows.TILES[:1] if probe.tiny else few_rows.TILES[:2]:
        for splits in SPLITS[1:2] if probe.tiny else SPLITS:
            candidates.append(Candidate("split_linear", tuple({**sizes, "SPLITS": splits}.items())))
    job = Job("few_rows", "", "", BF16, (k, m), "residual", tuple(candidates), tokens=(n,))
    measure_candidates(probe, job, n, f"{n} x {k} x {m} + LayerNorm", "bfloat16")


def measure_eight_bit_candidates(probe: Probe) -> None:
    """Measures candidates of the 8-bit linears in fp8 that are not the default."""
    from fastbert_kernels import configs, launch

    arch = launch.arch(probe.device)
    if probe.on_gpu and arch != configs.WARP_SPECIALIZED_ARCH:
        return
    shapes = product_shapes(*suite_kernels.MODELS["BERT-base"][:2]) if not probe.tiny else {"up": (128, 64)}
    for product, group in (("up", None),) if probe.tiny else (("up", None), ("qkv", None), ("down", 128)):
        m, k = shapes[product]
        epilogue = "gelu" if product == "up" else "none"
        kinds = EIGHT_BIT[2:] if probe.tiny else EIGHT_BIT
        candidates = tuple(Candidate(kernel, tuple(tile_of(sizes).items())) for kernel, sizes in kinds)
        job = Job("quantized_gemm", "", "", quantized.DTYPES["fp8"], (k, m), epilogue, candidates, group)
        n = FEW if probe.tiny else TOKENS
        measure_candidates(probe, job, n, f"{n} x {k} x {m} {epilogue}", "fp8")


def measure_candidates(probe: Probe, job: Job, n: int, what: str, dtype: str) -> None:
    """Adds a row for each candidate of a job of `fastbert tune`, with its error against float64."""
    tuned = Tuned(job, n, probe.device)
    exact = tuned.exact()
    k, m = job.sizes
    for candidate in job.candidates:
        call = tuned.call(candidate)
        probe.measure(
            what, str(candidate), lambda i, call=call: call(), work=Work(2.0 * n * k * m), exact=exact,
            pick=lambda out, candidate=candidate: tuned.result(candidate), dtype=dtype,
        )  # fmt: skip
