"""The probe measures single kernels in these sections. T is the number of tokens, H the hidden size; a weight is (M,
K).
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any

import ceilings
import suite_kernels
import suite_quantized
import torch
import torch.nn.functional as F
from probe_models import BF16, first_of
from suites import Work
from torch import Tensor

from fastbert import reference
from fastbert.bench.results import MISSING
from fastbert.ops import packing, quantized
from fastbert.ops.grouped_attention import attend_by_lengths

if TYPE_CHECKING:
    from probe_pieces import Probe

TOKENS, FEW = 16384, 64  # of a kernel's case; in small


def measure_ceilings(probe: Probe) -> None:
    """Measures the copy and the products with which other numbers are compared, in 8 bits by the libraries."""

    def usual() -> None:
        values = ceilings.cached(probe.device, probe.recorder.path.parent, quick=probe.tiny)
        probe.recorder.results.ceilings |= values
        for name, value in values.items():
            *what, unit = name.split()
            probe.add(" ".join(what), "ceiling", what[-1], rate=value, rate_unit=unit)

    probe.attempt("copy and products", "ceiling", usual)
    n = 64 if probe.tiny else ceilings.CUDA_SIZE
    a, b = (torch.randn(n, n, device=probe.device) for _ in range(2))
    one, work = torch.ones((), device=probe.device), Work(2.0 * n**3)
    a8, b8 = (x.to(torch.float8_e4m3fn) for x in (a, b))

    def scaled_mm(fast: bool, i: int) -> Tensor:
        return torch._scaled_mm(a8, b8.t(), one, one, out_dtype=BF16, use_fast_accum=fast)

    for name, fast in (("torch._scaled_mm", False), ("torch._scaled_mm, sums in 14 bits", True)):
        probe.measure("product", name, partial(scaled_mm, fast), work=work, dtype="fp8")
    a_int, b_int = (x.mul(30).clamp(-127, 127).to(torch.int8) for x in (a, b))
    probe.measure("product", "torch._int_mm", lambda i: torch._int_mm(a_int, b_int.t()), work=work, dtype="int8")
    for dtype in ("fp8", "int8"):
        rates = [row.rate for row in probe.recorder.results.rows if row.dtype == dtype and row.rate is not None]
        probe.recorder.results.ceilings |= {ceilings.matmul_key(dtype): max(rates)} if rates else {}


# BLOCK_Q, BLOCK_K, warps, stages.
ATTENTION = ((128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2))


def measure_attention(probe: Probe) -> None:
    """Measures attention in bf16, D = 64, by tile and lengths, beside SDPA, and also with a graph's list of tiles."""
    sizes = (FEW, 2, 16) if probe.tiny else (TOKENS, 12, 64)
    for kind in ("queries", "S32") if probe.tiny else ("S512", "S128", "squad", "queries"):
        measure_attention_on(probe, kind, *sizes)


def measure_attention_on(probe: Probe, kind: str, n: int, heads: int, d: int) -> None:
    from fastbert_kernels import attention, work_list

    lengths = list(suite_kernels.lengths_of(kind, n))
    batch = packing.from_lengths(lengths, probe.device)
    qkv = torch.randn(n, 3 * heads * d, device=probe.device).to(BF16)
    work = Work(4.0 * heads * d * sum(length * length for length in lengths), 8.0 * n * heads * d)
    first = first_of(lengths)
    offsets = batch.cu_seqlens_cpu[: len(first) + 1]
    exact = attend_by_lengths(qkv[: sum(first)].double(), offsets, heads, d**-0.5)

    def run(config: dict[str, int], tiles: work_list.WorkList, i: int) -> Tensor:
        return attention.varlen_attention_forward(qkv, tiles, heads, d**-0.5, config=config)

    for block_q, block_k, warps, stages in ATTENTION[:2] if probe.tiny else ATTENTION:
        config = {"BLOCK_Q": block_q, "BLOCK_K": block_k, "BLOCK_D": d, "num_warps": warps, "num_stages": stages}
        tiles, row_spans = work_list.build_work_list(batch.cu_seqlens_cpu.numpy(), block_q)
        lists = {"": tiles}
        if stages == 3:  # fills lists of graphs up: programs without rows
            for name, length in (("dense", work_list.dense_tiles), ("longest", work_list.max_tiles)):
                static = torch.zeros(max(length(n, block_q), len(tiles)), tiles.shape[1], dtype=torch.int32)
                static[: len(tiles)] = tiles
                lists[f", a graph's {name} list"] = static
        for suffix, listed in lists.items():
            call = partial(run, config, work_list.WorkList(listed, row_spans).to(probe.device))
            probe.measure(
                kind, f"{block_q}x{block_k} w{warps} s{stages}{suffix}", call,
                work=work, exact=exact, pick=lambda out: out[: sum(first)], tiles=len(listed),
            )  # fmt: skip
    measure_specialized(probe, qkv, batch, heads, kind=kind, work=work, exact=exact)
    if len(set(lengths)) == 1:
        q, k, v = qkv.view(len(lengths), lengths[0], 3, heads, d).permute(2, 0, 3, 1, 4)
        probe.measure(kind, "SDPA", lambda i: F.scaled_dot_product_attention(q, k, v), work=work)


def measure_specialized(
    probe: Probe, qkv: Tensor, batch: Any, heads: int, kind: str, work: Work, exact: Tensor
) -> None:
    """Measures attention with warps that only fetch keys, if the architecture supports it."""
    from fastbert_kernels import attention, attention_specialized, launch, work_list

    if launch.arch(qkv.device) != attention_specialized.ARCH:
        return
    d = qkv.shape[1] // (3 * heads)
    listed = work_list.build_work_list(batch.cu_seqlens_cpu.numpy(), 128, share=False).to(qkv.device)
    for sizes in attention_specialized.tiles():
        call = partial(attention.varlen_attention_forward, qkv, listed, heads, d**-0.5, config={**sizes, "BLOCK_D": d})
        probe.measure(
            kind, f"128x{sizes['BLOCK_K']} specialized", lambda i, call=call: call(),
            work=work, exact=exact, pick=lambda out: out[: exact.shape[0]], tiles=len(listed.tiles),
        )  # fmt: skip


def measure_rows(probe: Probe) -> None:
    """Measures kernels on rows: LayerNorm with bias and residual, mean pooling with normalisation."""
    for h in (64,) if probe.tiny else (384, 768, 1024):
        measure_rows_of(probe, FEW if probe.tiny else TOKENS, h)


def measure_rows_of(probe: Probe, n: int, h: int) -> None:
    from fastbert_kernels import layer_norm, pooling

    x, residual = (torch.randn(n, h, device=probe.device).to(BF16) for _ in range(2))
    weight, bias = (torch.randn(h, device=probe.device).to(BF16) for _ in range(2))
    exact = reference.bias_residual_layer_norm(*(t.double() for t in (x, bias, residual, weight, bias)), 1e-12)

    def norm(i: int) -> Tensor:
        return layer_norm.bias_residual_layer_norm_forward(x, bias, residual, weight, bias, 1e-12)

    def pool(batch: packing.PackedBatch, i: int) -> Tensor:
        return pooling.pool_forward(x, batch.cu_seqlens, "mean", True, torch.float32)

    probe.measure(f"{n} x {h}", "LayerNorm", norm, work=Work(0.0, 6.0 * n * h), exact=exact)
    for length in (16,) if probe.tiny else (512, 128, n):
        batch = packing.from_lengths([length] * (n // length), probe.device)
        exact = F.normalize(x.double().view(-1, length, h).mean(1), dim=1)
        name = f"pooling, texts of {length}"
        probe.measure(f"{n} x {h}", name, partial(pool, batch), work=Work(0.0, 2.0 * n * h), exact=exact)
    short = packing.from_lengths([min(n, 512)], probe.device)  # one text, which occupies only one program
    exact = F.normalize(x[: short.n_tokens].double().mean(0, keepdim=True), dim=1)
    work = Work(0.0, 2.0 * short.n_tokens * h)
    probe.measure(f"{short.n_tokens} x {h}", "pooling, one text", partial(pool, short), work=work, exact=exact)


def measure_eight_bit(probe: Probe) -> None:
    """Measures the 8-bit linears of BERT-large by both kernels and by libraries, as in the kernel suite."""
    sizes = (64, 128, 2) if probe.tiny else suite_kernels.MODELS["BERT-large"]
    for precision in ("fp8", "int8"):
        obstacle = quantized.device_obstacle(precision, probe.device)
        if obstacle is not None:
            probe.add("all", precision, precision, status=MISSING, detail=obstacle)
            continue
        for name, linear in suite_quantized.linears(*sizes).items():
            probe.attempt(name, "all", partial(measure_eight_bit_linear, probe, name, linear, precision), precision)


def measure_eight_bit_linear(probe: Probe, name: str, linear: suite_quantized.Linear, precision: str) -> None:
    built = suite_quantized.build(linear, FEW if probe.tiny else TOKENS, precision, probe.device)
    for peer in built.peers:
        if peer.obstacle() is None and peer.name != suite_kernels.EAGER:
            case: dict[str, Any] = {"work": built.work, "exact": built.reference, "dtype": precision}
            probe.measure(name, peer.name, peer.run, pick=partial(_output, peer), **case)


def _output(peer: Any, out: Any) -> Tensor:
    return peer.output()


def measure_copies(probe: Probe) -> None:
    """Measures whether positions that are copied from the host wait for the GPU's work."""
    for n in (4,) if probe.tiny else (4, 32, 128):
        probe.attempt(f"{n} texts of 512", "from_lengths", partial(measure_copy, probe, n), "int64")


def measure_copy(probe: Probe, n: int) -> None:
    probe.wait()
    if probe.on_gpu:
        torch.cuda._sleep(400_000_000)  # some 0.2 s
    started = time.perf_counter()
    packing.from_lengths([512] * n, probe.device)
    blocked = time.perf_counter() - started
    probe.wait()
    whole = time.perf_counter() - started
    probe.add(f"{n} texts of 512", "from_lengths", "int64", seconds=blocked, share_of_the_wait=blocked / whole)
