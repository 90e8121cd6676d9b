"""Compiles the kernels for GPUs that are not there, and reports what the compiler made of them.

    python -m fastbert_kernels.offline --arch 80 90          exit code 0: clean, 1: findings, 2: could not run

The launchers themselves are run inside `launch.recording`, so every kernel is compiled for the arguments,
specialisation and block sizes of a real launch. Findings are:

- code that does not compile;
- registers spilled to local memory; in TF32 and for the sizes that divide by nothing ("odd") that is shown, no finding;
- more shared or tensor memory than a thread block may have;
- a matrix kernel (linear, attention) without a tensor-core instruction, in 8 bits one without an 8-bit tensor-core
  instruction. In IEEE float32, whose products are fused multiply-adds by definition, one with such an instruction.

Registers and stack come from cuobjdump and instructions from nvdisasm, both of which are in Triton's package.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from fastbert_kernels import attention, configs, embedding, gelu, launch, layer_norm, linear, pooling, quantized_linear

# (H, I, N). "odd" has rows that no vector load can read and a K that is no multiple of any block.
MODELS = {"base": (768, 3072, 12), "large": (1024, 4096, 16), "minilm": (384, 1536, 12), "odd": (90, 250, 3)}
# "tf32" is float32 with torch.backends.cuda.matmul.allow_tf32 set.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
# Linears on 8-bit operands, and what makes these operands of bf16 ones.
EIGHT_BIT = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
MIN_ARCH = {"fp8": 89}
# Head sizes beyond those of the models: the smallest, the largest, and three that are padded to the next tile.
HEAD_SIZES = (16, 24, 48, 80, 128)
OPS = ("layer_norm", "gelu", "linear", "embedding", "pooling", "attention", "quantized_linear")
MATRIX_OPS = ("linear", "attention", "quantized_linear")
TENSOR_MEMORY_COLUMNS = 512

# HMMA (to sm_89, sm_120), HGMMA (sm_90), UTCHMMA (sm_100), and their kin for other input types.
TENSOR_CORE = re.compile(r"(UTC)?[BHIOQ]?G?MMA")
TENSOR_CORE_8_BIT = re.compile(r"(UTC)?[IQ]G?MMA")
# Copies from global to shared memory that bypass the registers: cp.async, and those of the tensor memory accelerator.
ASYNC_COPY = re.compile(r"LDGSTS|UTMALDG|UBLKCP")
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_]*)", re.MULTILINE)

COVERAGE = """\
default  every kernel on every architecture. bf16: the three models with each linear of a layer (where a persistent
         kernel is the default, for base also the other one), LayerNorm, embedding and mean pooling with normalisation;
         for base also LayerNorm and embedding without their optional inputs and the other pooling modes; attention
         with head sizes 16, 32, 64, 80 and 128, each also with the tile of batch-invariant mode's short texts. fp32 and
         fp16: linear and attention of base and minilm, and on sm_80 and sm_90 the other kernels, of base. fp8 (from
         sm_89 on) and int8: each linear of a layer of base and minilm (where a persistent kernel is the default, for
         base also the other one), and LayerNorm, embedding and attention that quantise; on sm_80 and sm_90 also those
         of large, and a linear after heads of 80.
--all    every dtype, TF32 too, every combination of optional inputs, activations and pooling modes, int32 ids, head
         sizes 24 and 48, and a model whose sizes divide by nothing ("odd")."""


@dataclass(frozen=True)
class Case:
    """One call of a launcher. In the default run where `archs` says: everywhere (None), on some, or nowhere (empty)."""

    op: str
    model: str
    dtype: str
    variant: str
    archs: frozenset[int] | None
    call: Callable[[], object] = field(repr=False)


@dataclass
class Kernel:
    """One kernel to compile, and the cases that launch it."""

    arch: int
    op: str
    dtype: str
    config: dict[str, int]
    source: Any
    options: dict[str, Any]
    models: list[str] = field(default_factory=list)
    variants: list[str] = field(default_factory=list)

    @property
    def tile(self) -> str:
        blocks = "x".join(str(size) for name, size in self.config.items() if name.startswith("BLOCK_"))
        return f"{blocks} w{self.config['num_warps']} s{self.config['num_stages']}"

    @property
    def must_not_spill(self) -> bool:
        """TF32 runs with the block sizes made for IEEE float32; no tile fits sizes that divide by nothing."""
        return self.dtype != "tf32" and self.models != ["odd"]

    @property
    def label(self) -> str:
        return f"{'/'.join(self.models)} {','.join(self.variants)}"


@dataclass
class Result:
    """What the compiler made of a kernel; sizes in bytes. What is wrong with it is in `findings`."""

    registers: int = 0
    stack: int = 0
    local_loads: int = 0
    local_stores: int = 0
    shared: int = 0
    tensor_cores: dict[str, int] = field(default_factory=dict)
    async_copies: dict[str, int] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)

    @property
    def spills(self) -> bool:
        return self.local_loads + self.local_stores > 0


def cases(dtype: str) -> Iterator[Case]:
    """Every case of one dtype (a key of DTYPES or EIGHT_BIT)."""
    if dtype in EIGHT_BIT:
        yield from eight_bit_cases(dtype)
        return
    everywhere, some, nowhere = None, frozenset({80, 90}), frozenset[int]()
    torch_dtype, bf16 = DTYPES[dtype], dtype == "bf16"
    n_rows, n_seqs = 64, 2
    ids, ids32 = torch.zeros(n_rows, dtype=torch.int64), torch.zeros(n_rows, dtype=torch.int32)
    cu_seqlens = torch.zeros(n_seqs + 1, dtype=torch.int32)
    work_list = torch.zeros((n_seqs, 4), dtype=torch.int32)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch_dtype)

    def attend(n_heads: int, head_size: int) -> Callable[[], object]:
        qkv = tensor(n_rows, 3 * n_heads * head_size)
        arguments = qkv, cu_seqlens, ids32, work_list, n_heads, 0.125
        return partial(attention.varlen_attention_forward, *arguments, short_list=work_list)  # two kernels

    for model, (h, i, n_heads) in MODELS.items():
        case = partial(Case, model=model, dtype=dtype)
        matrix = nowhere if model == "odd" or dtype == "tf32" or (model == "large" and not bf16) else everywhere
        for name, n_cols, k, activation in (
            ("qkv", 3 * h, h, "none"),
            ("out", h, h, "none"),
            ("up+gelu", i, h, "gelu"),
            ("up+gelu_tanh", i, h, "gelu_tanh"),
            ("down", h, i, "none"),
        ):
            x, weight = tensor(n_rows, k), tensor(n_cols, k)
            archs = nowhere if activation == "gelu_tanh" and model != "base" else matrix
            call = partial(linear.linear_forward, x, weight, tensor(n_cols), activation)
            yield case("linear", variant=name, archs=archs, call=call)
            call = partial(linear.linear_forward, x, weight, None, activation)
            yield case("linear", variant=f"{name}-bias", archs=nowhere, call=call)
            # Where linear_forward takes the persistent kernel, the other one is for tensors that have no descriptor.
            if dtype in ("bf16", "fp16"):
                fallback = frozenset({90, 100}) if name in ("qkv", "up+gelu") and model == "base" else nowhere
                call = partial(_pointer_kernel, x, weight, tensor(n_cols), activation)
                yield case("linear", variant=f"{name} by pointers", archs=fallback, call=call)
            if activation == "none" and name != "qkv":
                added = tensor(n_rows, n_cols)
                call = partial(linear.linear_forward, x, weight, tensor(n_cols), activation, added)
                yield case("linear", variant=f"{name}+residual", archs=matrix, call=call)
                call = partial(linear.linear_forward, x, weight, None, activation, added)
                yield case("linear", variant=f"{name}-bias+residual", archs=nowhere, call=call)
        d = h // n_heads
        yield case("attention", variant=f"D{d}", archs=matrix, call=attend(n_heads, d))
        if dtype == "tf32":
            continue

        rows = everywhere if bf16 else some if model == "base" else nowhere
        rows = nowhere if model == "odd" else rows
        more = everywhere if bf16 and model == "base" else nowhere
        x, weight = tensor(n_rows, h), tensor(h)
        for bias, residual in ((weight, x), (None, x), (weight, None), (None, None)):
            given = {"bias": bias, "residual": residual}
            variant = "+".join(name for name, tensor in given.items() if tensor is not None)
            call = partial(layer_norm.bias_residual_layer_norm_forward, x, bias, residual, weight, weight, 1e-12)
            archs = rows if variant in ("bias+residual", "") else nowhere  # none where the GEMM adds both
            yield case("layer_norm", variant=variant or "plain", archs=archs, call=call)
        for activation in ("gelu", "gelu_tanh"):
            for bias in (tensor(i), None):
                variant, archs = activation + ("" if bias is not None else "-bias"), nowhere if bias is None else rows
                call = partial(gelu.bias_gelu_forward, tensor(n_rows, i), bias, activation)
                yield case("gelu", variant=variant, archs=archs, call=call)
        for variant, input_ids, types, positions, archs in (
            ("ids", ids, ids, ids, rows),
            ("int32 ids", ids32, ids32, ids32, nowhere),
            ("embeds", None, ids, ids, more),
            ("without segments", ids, None, ids, more),
        ):
            word = x if input_ids is None else tensor(1000, h)
            tables = word, None if types is None else tensor(2, h), tensor(512, h)
            call = partial(
                embedding.embedding_layer_norm_forward, input_ids, types, positions, *tables, weight, weight, 1e-12
            )
            yield case("embedding", variant=variant, archs=archs, call=call)
        for mode in pooling.MODES if model != "large" else ("mean",):
            for normalize in (False, True):
                archs = rows if mode == "mean" and normalize else more if not normalize else nowhere
                variant = mode + ("+norm" if normalize else "")
                call = partial(pooling.pool_forward, x, cu_seqlens, mode, normalize, torch.float32)
                yield case("pooling", variant=variant, archs=archs, call=call)
                if torch_dtype != torch.float32 and model == "base":
                    call = partial(pooling.pool_forward, x, cu_seqlens, mode, normalize, torch_dtype)
                    yield case("pooling", variant=f"{variant} to {dtype}", archs=nowhere, call=call)
    for head_size in HEAD_SIZES:
        archs = everywhere if bf16 and head_size in (16, 80, 128) else nowhere
        yield Case("attention", "extra", dtype, f"D{head_size}", archs, attend(2, head_size))


def eight_bit_cases(dtype: str) -> Iterator[Case]:
    """Every case of a key of EIGHT_BIT."""
    n_rows, n_seqs, q_dtype = 64, 2, EIGHT_BIT[dtype]
    ids, ids32 = torch.zeros(n_rows, dtype=torch.int64), torch.zeros(n_rows, dtype=torch.int32)
    cu_seqlens, work_list = torch.zeros(n_seqs + 1, dtype=torch.int32), torch.zeros((n_seqs, 4), dtype=torch.int32)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16)

    def eight_bit(n_rows: int, n_cols: int, n_groups: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.empty((n_rows, n_cols), dtype=q_dtype), torch.empty((n_rows, n_groups))

    for model, (h, i, n_heads) in MODELS.items():
        if model == "odd":
            continue
        archs = frozenset({80, 90}) if model == "large" else None
        case = partial(Case, model=model, dtype=dtype, archs=archs)
        d, x, weight = h // n_heads, tensor(n_rows, h), tensor(h)
        for name, n_cols, k, group, bias, activation, again in (
            ("qkv", 3 * h, h, h, tensor(3 * h), "none", False),
            ("out", h, h, d, None, "none", False),
            ("up+gelu", i, h, h, tensor(i), "gelu", True),
            ("down", h, i, quantized_linear.OUT_GROUP, None, "none", False),
        ):
            operand, matrix = eight_bit(n_rows, k, -(-k // group)), eight_bit(n_cols, k)
            out_scale = eight_bit(n_rows, 1, -(-n_cols // quantized_linear.OUT_GROUP))[1] if again else None
            to = q_dtype if again else torch.bfloat16
            call = partial(
                quantized_linear.quantized_linear_forward,
                *(*operand, group, matrix[0], matrix[1].flatten(), bias, activation, to, out_scale),
            )
            yield case("quantized_linear", variant=name, call=call)
            # Where quantized_linear_forward takes the persistent kernel, the other one is for what has no descriptor.
            fallback = frozenset({90, 100}) if name in ("qkv", "up+gelu") and model == "base" else frozenset[int]()
            call = partial(_pointer_kernel_8_bit, call)
            yield Case("quantized_linear", model, dtype, f"{name} by pointers", fallback, call)
        call = partial(
            layer_norm.bias_residual_layer_norm_forward, x, weight, x, weight, weight, 1e-12, eight_bit(n_rows, h)
        )
        yield case("layer_norm", variant="bias+residual", call=call)
        tables = tensor(1000, h), tensor(2, h), tensor(512, h), weight, weight
        call = partial(embedding.embedding_layer_norm_forward, ids, ids, ids, *tables, 1e-12, eight_bit(n_rows, h))
        yield case("embedding", variant="ids", call=call)
        arguments = tensor(n_rows, 3 * h), cu_seqlens, ids32, work_list, n_heads, 0.125, eight_bit(n_rows, h, n_heads)
        yield case("attention", variant=f"D{d}", call=partial(attention.varlen_attention_forward, *arguments))
    for head_size in (48, 80):  # groups that are no step of K
        k = 4 * head_size
        operand, (data, scale) = eight_bit(n_rows, k, 4), eight_bit(256, k)
        heads = *operand, head_size, data, scale.flatten(), None, "none", torch.bfloat16
        call = partial(quantized_linear.quantized_linear_forward, *heads)
        some = frozenset({80, 90}) if head_size == 80 else frozenset[int]()
        yield Case("quantized_linear", "extra", dtype, f"out of D{head_size}", some, call)


def plan(archs: Iterable[int], chosen: Iterable[Case]) -> list[Kernel]:
    """The distinct kernels that the cases launch on each architecture."""
    kernels: dict[Any, Kernel] = {}
    chosen = list(chosen)
    for arch in archs:
        for case in chosen:
            with launch.recording(arch) as launches, _tf32(case.dtype == "tf32"):
                case.call()
            for recorded in launches:
                source, options = specialize(recorded, GPUTarget("cuda", arch, 32))
                key = arch, case.op, case.dtype, source.hash(), str(options)
                kernel = kernels.setdefault(key, Kernel(arch, case.op, case.dtype, recorded.config, source, options))
                for names, name in ((kernel.models, case.model), (kernel.variants, case.variant)):
                    if name not in names:
                        names.append(name)
    return list(kernels.values())


def _pointer_kernel(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, activation: str) -> torch.Tensor:
    arch, shape = launch.arch(x.device), (x.shape[1], weight.shape[0])
    config = configs.linear_config(x.dtype, arch, shape, activation).block_sizes
    return linear.linear_pointer_forward(x, weight, bias, activation, None, config, x.new_empty(len(x), len(weight)))


def _pointer_kernel_8_bit(call: partial[torch.Tensor]) -> torch.Tensor:
    """The call of quantized_linear_forward by its own kernel, whatever the tables say."""
    x, x_scale, group, weight, weight_scale, bias, activation, dtype, out_scale = call.args
    arch = launch.arch(x.device)
    config = configs.quantized_linear_config(x.dtype, group if group < x.shape[1] else None, arch).block_sizes
    return quantized_linear.quantized_linear_pointer_forward(
        x, x_scale, group, weight, weight_scale, bias, activation, config,
        torch.empty((len(x), len(weight)), dtype=dtype), out_scale, quantized_linear.sums_outside(x.dtype, arch),
    )  # fmt: skip


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def specialize(recorded: launch.Launch, target: GPUTarget) -> tuple[Any, dict[str, Any]]:
    """Source and compiler options that Triton's JIT would use for the launch, by the JIT's own rules."""
    backend = make_backend(target)
    kernel = recorded.kernel
    keywords = {**recorded.arguments, **recorded.config, "enable_fp_fusion": True}  # as launch.run passes it
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, rest = bind(**keywords)
    options, signature, constexprs, attrs = kernel._pack_args(backend, keywords, bound, specialization, rest)
    return ASTSource(kernel, signature, constexprs, attrs), dict(options.__dict__)


def compile_kernel(kernel: Kernel) -> Result:
    """Compiles and disassembles one kernel. What goes wrong in that is a finding; nothing is raised."""
    try:
        compiled = triton.compile(kernel.source, target=GPUTarget("cuda", kernel.arch, 32), options=kernel.options)
    except Exception as error:
        # Triton's messages begin with the kernel's source up to the error, and end with what is wrong.
        reason = " ".join(str(error).split())[-300:]
        return Result(findings=[f"does not compile: {type(error).__name__}: {reason}"])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        try:
            usage = dict(re.findall(r"\b(REG|STACK):(\d+)", _tool("cuobjdump", "-res-usage", file.name)))
            # Without dataflow analysis: it takes a third of nvdisasm's time and only annotates.
            counts = Counter(INSTRUCTION.findall(_tool("nvdisasm", "-c", "-ndf", file.name)))
        except subprocess.CalledProcessError as error:
            return Result(findings=[f"cannot be read: {error}: {error.stderr.strip()[:400]}"])
    if usage.keys() != {"REG", "STACK"} or not counts["EXIT"]:
        return Result(findings=[f"cannot be read: cuobjdump gave {usage}, nvdisasm {counts.total()} instructions"])
    result = Result(
        registers=int(usage["REG"]),
        stack=int(usage["STACK"]),
        local_loads=counts["LDL"],
        local_stores=counts["STL"],
        shared=compiled.metadata.shared,
        tensor_cores={name: count for name, count in counts.items() if TENSOR_CORE.fullmatch(name)},
        async_copies={name: count for name, count in counts.items() if ASYNC_COPY.fullmatch(name)},
    )
    result.findings = _findings(kernel, result, getattr(compiled.metadata, "tmem_size", None) or 0)
    return result


def _findings(kernel: Kernel, result: Result, tensor_memory: int) -> list[str]:
    findings: list[str] = []
    limit = launch.SHARED_MEMORY[kernel.arch]
    if result.spills and kernel.must_not_spill:
        loads_stores = f"{result.local_loads} local loads and {result.local_stores} local stores"
        findings.append(f"spills: {result.stack} bytes of stack, {loads_stores}")
    if result.shared > limit:
        findings.append(f"shared memory: {result.shared} bytes, a block of sm_{kernel.arch} may have {limit}")
    if tensor_memory > TENSOR_MEMORY_COLUMNS:
        findings.append(f"tensor memory: {tensor_memory} columns of {TENSOR_MEMORY_COLUMNS}")
    if kernel.op == "quantized_linear" and not any(map(TENSOR_CORE_8_BIT.fullmatch, result.tensor_cores)):
        findings.append(f"no 8-bit tensor-core instruction in a matrix kernel of dtype {kernel.dtype}")
    elif kernel.op in MATRIX_OPS and (kernel.dtype == "fp32") == bool(result.tensor_cores):
        found = "tensor-core instructions in IEEE float32" if result.tensor_cores else "no tensor-core instruction"
        findings.append(f"{found} in a matrix kernel of dtype {kernel.dtype}")
    return findings


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run(
        [getattr(triton.knobs.nvidia, name).path, *arguments], check=True, capture_output=True, text=True
    ).stdout


# What the worker processes compile, by index: forked after it is filled, they need no pickled kernels.
_kernels: list[Kernel] = []


def _compile_by_index(index: int) -> Result:
    return compile_kernel(_kernels[index])


def compile_all(kernels: list[Kernel], jobs: int) -> Iterator[Result]:
    """The results in order. A kernel that kills the compiler is compiled again by itself, so it alone is blamed."""
    _kernels[:] = kernels
    pool = _pool(jobs)
    futures: list[Future[Result]] = []
    try:
        with suppress(BrokenProcessPool):
            for index in range(len(kernels)):
                futures.append(pool.submit(_compile_by_index, index))
        for index in range(len(kernels)):
            try:
                yield futures[index].result() if index < len(futures) else _compile_alone(index)
            except BrokenProcessPool:
                yield _compile_alone(index)
    finally:
        pool.shutdown(cancel_futures=True)


def _compile_alone(index: int) -> Result:
    with _pool(1) as pool:
        try:
            return pool.submit(_compile_by_index, index).result()
        except BrokenProcessPool:
            return Result(findings=["does not compile: the compiler's process died"])


def _pool(jobs: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("fork"))


def _row(kernel: Kernel, result: Result) -> tuple[str, ...]:
    def counted(counts: dict[str, int]) -> str:
        return " ".join(f"{name}:{count}" for name, count in sorted(counts.items()))

    tensor_cores = counted(result.tensor_cores)
    if not tensor_cores and kernel.op in MATRIX_OPS and kernel.dtype == "fp32":
        tensor_cores = "fp32 FMA"
    return (
        f"sm_{kernel.arch}",
        kernel.op,
        kernel.dtype,
        kernel.label,
        kernel.tile,
        str(result.registers),
        f"{result.stack} B {result.local_loads}+{result.local_stores}" if result.spills or result.stack else "-",
        f"{result.shared / 1024:.1f}/{launch.SHARED_MEMORY[kernel.arch] // 1024}",
        tensor_cores or "-",
        counted(result.async_copies) or "-",
        "FAILED" if result.findings else "ok, spills" if result.spills else "ok",
    )


HEADER = (
    *("arch", "kernel", "dtype", "launched for", "tile", "regs", "spills"),
    *("shared KiB", "tensor cores", "async copies", "result"),
)


def report(kernels: list[Kernel], results: Iterable[Result]) -> list[Result]:
    """Prints the table as results come in, then a summary of each architecture and the findings."""
    # Widths must be known before the first result: from the plan, or wide enough for what a compiler can say.
    widths = [max(map(len, column)) for column in zip(HEADER, *(_row(k, Result()) for k in kernels), strict=True)]
    widths = [max(w, least) for w, least in zip(widths, (0, 0, 0, 0, 0, 4, 12, 10, 12, 12, 0), strict=True)]

    def print_row(cells: tuple[str, ...]) -> None:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip(), flush=True)

    print_row(HEADER)
    done: list[Result] = []
    for kernel, result in zip(kernels, results, strict=True):
        done.append(result)
        print_row(_row(kernel, result))
    print()
    for arch in dict.fromkeys(kernel.arch for kernel in kernels):
        of_arch = [result for kernel, result in zip(kernels, done, strict=True) if kernel.arch == arch]
        print(
            f"sm_{arch:<4} {len(of_arch):4} kernels, at most {max(r.registers for r in of_arch):3} registers, "
            f"{sum(r.spills for r in of_arch)} with spills, {sum(bool(r.findings) for r in of_arch)} failed"
        )
    for kernel, result in zip(kernels, done, strict=True):
        for finding in result.findings:
            print(f"FAILED sm_{kernel.arch} {kernel.op} {kernel.dtype} [{kernel.label}; {kernel.tile}]: {finding}")
    return done


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastbert_kernels.offline",
        description="Compile the kernels as they would be launched, with no GPU present, and report registers, spills, "
        "shared memory and tensor-core instructions.",
        epilog=f"what is compiled:\n{COVERAGE}\n\nexit code: 0 no finding, 1 findings, 2 could not run",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known, known_dtypes = sorted(launch.SHARED_MEMORY), (*DTYPES, *EIGHT_BIT)
    parser.add_argument("--arch", nargs="+", type=int, default=known, metavar="N", help=f"of {known} (default: all)")
    parser.add_argument("--all", action="store_true", help="everything instead of the default subset")
    parser.add_argument("--kernel", nargs="+", choices=OPS, default=OPS, help="only these kernels")
    parser.add_argument("--dtype", nargs="+", choices=known_dtypes, default=known_dtypes, help="only these dtypes")
    parser.add_argument("--model", nargs="+", choices=(*MODELS, "extra"), help="only these models")
    parser.add_argument("--jobs", type=int, default=min(8, len(os.sched_getaffinity(0))), help="compiler processes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to FILE as well")
    return parser


def _chosen(options: argparse.Namespace, arch: int) -> Iterator[Case]:
    for dtype in options.dtype:
        if arch < MIN_ARCH.get(dtype, 0):
            continue
        for case in cases(dtype):
            wanted = case.op in options.kernel and (options.model is None or case.model in options.model)
            if wanted and (options.all or case.archs is None or arch in case.archs):
                yield case


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.arch) - set(launch.SHARED_MEMORY))
    if unknown:
        parser.error(f"--arch: unknown {unknown}, known are {sorted(launch.SHARED_MEMORY)}")
    if options.jobs < 1:
        parser.error(f"--jobs: expected at least 1, got {options.jobs}")
    if options.json is not None and not options.json.absolute().parent.is_dir():
        parser.error(f"--json: no such folder: {options.json.absolute().parent}")
    if launch.interpreted():
        parser.error("TRITON_INTERPRET is set; unset it: one process cannot hold Triton's interpreter and its compiler")
    if triton.knobs.runtime.override_arch:
        parser.error("TRITON_OVERRIDE_ARCH is set; unset it: every kernel would be compiled for that architecture")
    try:
        for tool in ("cuobjdump", "nvdisasm"):
            _tool(tool, "--version")
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        parser.error(f"this Triton ({triton.__version__}) brings no working {tool}: {error}")

    start = time.perf_counter()
    kernels = [kernel for arch in dict.fromkeys(options.arch) for kernel in plan([arch], _chosen(options, arch))]
    if not kernels:
        parser.error("nothing to compile: the default subset has none of what was asked for; try --all")
    print(f"Triton {triton.__version__}, {len(kernels)} kernels{'' if options.all else ' (--all compiles more)'}")
    results = report(kernels, compile_all(kernels, options.jobs))
    seconds = time.perf_counter() - start
    failed = sum(bool(result.findings) for result in results)
    print(f"{'FAILED' if failed else 'ok'}: {failed} of {len(kernels)} kernels with findings, {seconds:.0f} s")
    if options.json is not None:
        rows = [
            {
                **{name: getattr(kernel, name) for name in ("arch", "op", "dtype", "models", "variants", "config")},
                **asdict(result),
                "shared_limit": launch.SHARED_MEMORY[kernel.arch],
            }
            for kernel, result in zip(kernels, results, strict=True)
        ]
        document = {"triton": triton.__version__, "all": options.all, "seconds": round(seconds, 1), "kernels": rows}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
