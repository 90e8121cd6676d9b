"""The offline compile report passes good kernels and notices bad ones.

It runs in processes of its own, without TRITON_INTERPRET: one process cannot hold both interpreter and compiler.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

import fork_server
from helpers import source_env

# Runs the report once for each planted fault, in one process, and prints {name: [exit code, output]} as JSON.
FAULTS = """
import contextlib, io, json, os, signal
import triton
from fastbert_kernels import attention, configs, launch, linear, offline, quantized_configs

def gemm(dtype, for_arch, shape, epilogue):
    sizes = dict(BLOCK_ROWS=128, BLOCK_COLS=256, BLOCK_K=64, GROUP_ROWS=8, num_warps=4, num_stages=3)
    return configs.Gemm(None, None, "linear", configs.Config(sizes, "planted"))

def tile(**changes):
    sizes = dict(BLOCK_Q=128, BLOCK_K=64, BLOCK_D=32, num_warps=8, num_stages=3)
    return lambda dtype, head_size, for_arch: configs.Config({**sizes, **changes}, "planted")

def upcast(x, weight, bias, activation, residual=None, pre=None, by_rows=False, forward=linear.linear_forward):
    return forward(x.float(), weight.float(), bias, activation, residual, None if pre is None else pre.float(), by_rows)

def die(source, compile=triton.compile, **kwargs):
    if "gelu" in source.constants.values():
        os.kill(os.getpid(), signal.SIGKILL)
    return compile(source, **kwargs)

results = {}
for name, owner, attribute, planted, kernel in (
    ("none", configs, "attention_config", tile(), "attention"),
    ("spill", configs, "gemm", gemm, "linear"),
    ("shared", configs, "attention_config", tile(num_stages=32), "attention"),
    ("no tensor core", linear, "linear_forward", upcast, "linear"),
    ("tensor core in IEEE", launch, "dot_precision", lambda dtype: "tf32", "attention"),
    ("not a tile", configs, "attention_config", tile(BLOCK_Q=100), "attention"),
    ("dead compiler", triton, "compile", die, "linear"),
):
    original = getattr(owner, attribute)
    setattr(owner, attribute, planted)
    dtype = "fp32" if name == "tensor core in IEEE" else "bf16"
    with contextlib.redirect_stdout(io.StringIO()) as output:
        code = offline.main(["--arch", "90", "--model", "minilm", "--dtype", dtype, "--kernel", kernel])
    results[name] = code, output.getvalue()
    setattr(owner, attribute, original)
print(json.dumps(results))
"""


SPECIALIZE = """
import torch
from triton.backends.compiler import GPUTarget
from fastbert_kernels import configs, launch, linear, offline, quantized_linear, quantized_configs

for n_cols in (96, 90):
    x, weight = torch.empty(64, 32, dtype=torch.bfloat16), torch.empty(n_cols, 32, dtype=torch.bfloat16)
    with launch.recording(80) as launches:
        linear.linear_forward(x, weight, None, "gelu")
    source, options = offline.specialize(launches[0], GPUTarget("cuda", 80, 32))
    names = linear._linear_kernel.arg_names
    divisible = [names[path[0]] for path, attrs in source.attrs.items() if ["tt.divisibility", 16] in attrs]
    constants = {names[path[0]]: value for path, value in source.constants.items()}
    assert source.signature["x_ptr"] == "*bf16" and source.signature["bias_ptr"] == "constexpr", source.signature
    assert source.signature["n_rows"] == source.signature["n_cols"] == "i32", source.signature
    assert "x_ptr" in divisible and "weight_row_stride" in divisible, divisible
    assert "n_rows" not in divisible and ("n_cols" in divisible) == (n_cols == 96), divisible
    assert constants["bias_ptr"] is None and constants["ACTIVATION"] == "gelu", constants
    config = configs.linear_config(torch.bfloat16, 80).block_sizes
    assert all(constants.get(name, options.get(name)) == value for name, value in config.items()), (constants, options)
    assert options["enable_fp_fusion"] is True and options["arch"] == "sm80", options

with launch.recording(90) as launches:
    linear.linear_forward(x, weight[:88], None, "gelu")
signature = offline.specialize(launches[0], GPUTarget("cuda", 90, 32))[0].signature
assert signature["x_desc"] == "tensordesc<bf16[128, 64]>" and signature["n_rows"] == "i32", signature

for arch in (80, 90):
    kernels = set()
    for n_rows in (1, 2, 16, 17, 4096):
        for k, m in ((768, 768), (3072, 768), (768, 2304)):
            x, weight, out = (torch.empty(shape, dtype=torch.bfloat16) for shape in ((n_rows, k), (m, k), (n_rows, m)))
            with launch.recording(arch) as launches:
                linear.linear_forward(x, weight, None, "none", out)
            source, options = offline.specialize(launches[0], GPUTarget("cuda", arch, 32))
            kernels.add((source.hash(), str(options)))
    assert len(kernels) == 1, (arch, len(kernels))

kernels = set()
for n_rows in (1, 2, 16, 17, 4096):
    for k, m in ((384, 1152), (768, 2304), (1024, 3072)):
        x, weight = (torch.empty(shape, dtype=torch.float8_e4m3fn) for shape in ((n_rows, k), (m, k)))
        arguments = x, torch.empty(n_rows, 1), k, weight, torch.empty(m), None, "none", torch.bfloat16
        with launch.recording(90) as launches:
            quantized_linear.quantized_linear_forward(*arguments)
        source, options = offline.specialize(launches[0], GPUTarget("cuda", 90, 32))
        kernels.add((source.hash(), str(options)))
assert len(kernels) == 1, len(kernels)
"""


def compiling(**changes: str) -> dict[str, str]:
    """The environment of a process that compiles, into the user's cache: so the whole report finds these kernels."""
    env = source_env()
    env.pop("TRITON_INTERPRET", None)
    return {**env, **changes}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own."""
    line = [sys.executable, *arguments]
    return fork_server.run(line, env=compiling(), modules=fork_server.COMPILER, timeout=600)


def report(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """The report as a user starts it."""
    line = [sys.executable, "-m", "fastbert_kernels.offline", *arguments]
    return subprocess.run(line, env=compiling(**changes), capture_output=True, text=True)


@pytest.mark.slow
def test_default_kernels_of_hopper(tmp_path):
    """Catches a kernel that spills or misses wgmma on sm_90, or a report whose text and JSON differ."""
    path = tmp_path / "report.json"
    arguments = "--arch", "90", "--model", "minilm", "--dtype", "bf16", "--json", str(path)
    done = report(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("sm_90 ") and " bf16 " in line]
    kernels: list[dict[str, Any]] = json.loads(path.read_text())["kernels"]
    assert len(rows) == len(kernels) > 0
    assert {k["op"] for k in kernels} == {"linear", "attention", "layer_norm", "gelu", "embedding", "pooling"}
    for row, kernel in zip(rows, kernels, strict=True):
        assert kernel["arch"] == 90 and kernel["dtype"] == "bf16" and kernel["findings"] == []
        assert row.split()[1] == kernel["op"] and row.endswith("  ok")
        assert 0 < kernel["registers"] <= 255 and kernel["shared"] <= kernel["shared_limit"] == 227 * 1024
        few_rows = kernel["op"] == "linear" and " rows" in str(kernel["variants"])  # read by pointers
        by_descriptor = kernel["op"] == "linear" and not few_rows or "specialized" in str(kernel["variants"])
        assert ("UTMALDG" in kernel["async_copies"]) == by_descriptor
        is_wide = kernel["op"] == "linear" or kernel["config"].get("BLOCK_Q", 0) >= 64  # rows, as wgmma wants
        assert ("HGMMA" in kernel["tensor_cores"]) == ("HGMMA:" in row) == is_wide
        assert bool(kernel["tensor_cores"]) == (kernel["op"] in ("linear", "attention"))
    assert f"{len(kernels)} kernels, at most {max(k['registers'] for k in kernels)} registers, 0 with" in done.stdout


@pytest.fixture(scope="module")
def faults() -> dict[str, tuple[int, str]]:
    """Exit code and output of the report with each fault planted."""
    done = run("-c", FAULTS)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "finding"),
    [
        ("spill", "FAILED sm_90 linear bf16 [minilm up+gelu; 128x256x64 w4 s3]: spills: "),
        ("shared", "FAILED sm_90 attention bf16 [minilm D32; 128x64x32 w8 s32]: shared memory: "),
        ("shared", " bytes, a block of sm_90 may have 232448"),
        ("no tensor core", "FAILED sm_90 linear bf16 [minilm qkv,out,down; "),
        ("no tensor core", ": no tensor-core instruction in a matrix kernel of dtype bf16"),
        ("tensor core in IEEE", ": tensor-core instructions in IEEE float32 in a matrix kernel of dtype fp32"),
        ("not a tile", "100x64x32 w8 s3]: does not compile: CompilationError: "),
        ("not a tile", "arange's range must be a power of 2"),
        ("dead compiler", "FAILED sm_90 linear bf16 [minilm up+gelu; "),
        ("dead compiler", ": does not compile: the compiler's process died\nFAILED: 4 of 6 kernels with findings"),
    ],
)
def test_planted_faults_are_found(faults, fault, finding):
    """Catches a check that cannot fail: a planted fault without exit code 1, or without kernel and reason."""
    code, output = faults[fault]
    assert code == 1, output
    assert finding in output


@pytest.mark.slow
def test_planting_is_not_the_fault(faults):
    """Catches planted faults that are found only because the planting itself breaks something."""
    code, output = faults["none"]
    assert code == 0, output


def test_specializes_as_the_jit_does():
    """Catches a report on other kernels than those that run, or a GEMM compiled anew for each token count or K."""
    done = run("-c", SPECIALIZE)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_8_bit_kernels(tmp_path):
    """Catches 8-bit linears that multiply in 16 bits, or fp8 compiled for a GPU that has none."""
    path = tmp_path / "report.json"
    arguments = "--arch", "86", "90", "--model", "minilm", "--dtype", "fp8", "int8", "--json", str(path)
    done = run("-m", "fastbert_kernels.offline", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    kernels: list[dict[str, Any]] = json.loads(path.read_text())["kernels"]
    assert {(k["arch"], k["dtype"]) for k in kernels} == {(86, "int8"), (90, "fp8"), (90, "int8")}
    wanted = {(86, "int8"): "IMMA", (90, "fp8"): "QGMMA", (90, "int8"): "IGMMA"}
    for kernel in kernels:
        assert kernel["findings"] == [] and kernel["local_loads"] == kernel["local_stores"] == 0
        if kernel["op"] == "quantized_linear":
            assert set(kernel["tensor_cores"]) == {wanted[kernel["arch"], kernel["dtype"]]}
            assert set(kernel["async_copies"]) == {"UTMALDG" if kernel["arch"] == 90 else "LDGSTS"}
    ops = [k["op"] for k in kernels if k["dtype"] == "fp8"]
    assert sorted(ops) == ["attention", "attention", "embedding", "layer_norm", *["quantized_linear"] * 4]


def test_float8_sums_outside_the_tensor_cores():
    """Catches a compiler that takes the sums of float8 products back into tensor cores that lose bits (Ada, Hopper)."""
    script = """
import torch, triton
from triton.backends.compiler import GPUTarget
from fastbert_kernels import configs, launch, offline, quantized_gated_linear, quantized_linear, quantized_configs
for arch, outside, by_pointers, gated in (
    (89, True, False, False), (90, True, False, False), (90, True, True, False), (120, False, False, False),
    (89, True, False, True), (90, True, False, True),
):
    x, weight = (torch.empty(n, 512, dtype=torch.float8_e4m3fn) for n in (64, 256))
    with launch.recording(arch) as launches:
        scale = torch.empty(64, 1), torch.empty(256)
        arguments = x, scale[0], 512, weight, scale[1], None, "none"
        if gated:
            quantized_gated_linear.quantized_gated_linear_forward(x, scale[0], weight, scale[1], None, "silu")
        elif by_pointers:
            config = quantized_configs.quantized_linear_config(x.dtype, None, arch).block_sizes
            out = torch.empty(64, 256, dtype=torch.bfloat16)
            quantized_linear.quantized_linear_pointer_forward(*arguments, config, out, None, True)
        else:
            quantized_linear.quantized_linear_forward(*arguments, torch.bfloat16)
    assert ("x_desc" in launches[0].arguments) == (arch == 90 and not by_pointers)
    source, options = offline.specialize(launches[0], GPUTarget("cuda", arch, 32))
    ir = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm["ttgir"]
    dots = [line for line in ir.splitlines() if "dot %" in line]
    from_zero = ["%cst" in line.partition("dot %")[2].split(":")[0] for line in dots]
    assert dots and all(zero == outside for zero in from_zero), (arch, dots)
"""
    done = run("-c", script)
    assert done.returncode == 0, done.stderr


def test_gelu_of_16_bits_is_short():
    """Catches an erf, a slow exp2 for subnormals, a division, or a maximum that drops NaN, in a 16-bit epilogue."""
    script = """
import torch, triton
from triton.backends.compiler import GPUTarget
from fastbert_kernels import gelu, launch, offline
for arch in (80, 90):
    with launch.recording(arch) as launches:
        gelu.bias_gelu_forward(torch.empty(64, 768, dtype=torch.bfloat16), None, "gelu")
    source, options = offline.specialize(launches[0], GPUTarget("cuda", arch, 32))
    ptx = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm["ptx"]
    count = lambda name: sum(line.split()[:1] == [name] for line in ptx.splitlines())
    n = count("ex2.approx.ftz.f32")
    assert n > 0 and n == count("max.NaN.f32") == count("min.f32"), arch
    assert "rcp" not in ptx and "div" not in ptx and "copysign" not in ptx and "setp.g" not in ptx, arch
"""
    done = run("-c", script)
    assert done.returncode == 0, done.stderr


def test_gelu_leaves_registers_of_wide_tiles():
    """Catches a spill in tiles of 128 sums a thread with GELU, which `fastbert tune` times in 16 bits."""
    script = """
import torch, triton
from triton.backends.compiler import GPUTarget
from fastbert.tune.candidates import gemm_candidates
from fastbert_kernels import launch, linear, linear_persistent, offline
bf16, fp16 = torch.bfloat16, torch.float16
for arch, dtype, activation in ((80, bf16, "gelu_tanh"), (80, fp16, "gelu"), (90, fp16, "gelu")):
    x, weight, out = (torch.empty(shape, dtype=dtype) for shape in ((64, 768), (3072, 768), (64, 3072)))
    candidates = [c for c in gemm_candidates(dtype, arch, (768, 3072), "gelu") if c.tile]
    kernel = "linear" if arch == 80 else "linear_persistent"
    wide = (c.sizes for c in candidates if c.kernel == kernel and c.sizes["BLOCK_COLS"] == 256)
    sizes = next(sizes for sizes in wide if sizes["BLOCK_ROWS"] == 128)
    forward = linear.linear_pointer_forward if arch == 80 else linear_persistent.linear_persistent_forward
    with launch.recording(arch) as launches:
        forward(x, weight, weight.new_empty(3072), activation, None, sizes, out)
    source, options = offline.specialize(launches[0], GPUTarget("cuda", arch, 32))
    result = offline.compile_kernel(offline.Kernel(arch, "linear", "bf16", sizes, source, options))
    assert result.findings == [] and not result.spills and result.tensor_cores, (arch, result)
"""
    done = run("-c", script)
    assert done.returncode == 0, done.stderr


def test_8_bit_kernels_need_8_bit_instructions():
    """Catches a check that takes a 16-bit tensor-core instruction for an 8-bit one."""
    script = """
from fastbert_kernels import offline
from fastbert_kernels.offline.compiling import findings_of
for name, expected in (("HGMMA", True), ("QGMMA", False), ("IGMMA", False), ("UTCQMMA", False), ("IMMA", False)):
    kernel = offline.Kernel(90, "quantized_linear", "fp8", {}, None, {})
    findings = findings_of(kernel, offline.Result(tensor_cores={name: 1}), 0)
    assert bool(findings) == expected, (name, findings)
"""
    done = run("-c", script)
    assert done.returncode == 0, done.stderr


def test_kernels_are_read_together_as_alone():
    """Catches instructions counted for a neighbour in one run of nvdisasm, or blamed for it."""
    script = """
import torch
from triton.backends.compiler import GPUTarget
from fastbert_kernels import gelu, launch, offline
from fastbert_kernels.offline import compiling, disassembly
kernels = []
for arch, activation in ((80, "gelu"), (80, "relu"), (90, "gelu")):
    with launch.recording(arch) as launches:
        gelu.bias_gelu_forward(torch.empty(64, 768, dtype=torch.bfloat16), None, activation)
    source, options = offline.specialize(launches[0], GPUTarget("cuda", arch, 32))
    config = launches[0].config
    kernels.append(offline.Kernel(arch, "gelu", "bf16", config, source, options))
cubins = [compiling._compile(kernel).asm["cubin"] for kernel in kernels]
alone = [disassembly.instruction_counts(80, [cubin])[0] for cubin in cubins[:2]]
assert disassembly.instruction_counts(80, cubins[:2]) == alone and alone[0] != alone[1]
assert disassembly.instruction_counts(80, cubins[1::-1]) == alone[::-1]
together = compiling.compile_kernels(kernels)
assert together == [offline.compile_kernel(kernel) for kernel in kernels]
real = disassembly.machine_code
broken = real(cubins[0])
disassembly.machine_code = lambda cubin: b"\\xff" * 16 if real(cubin) == broken else real(cubin)
first, second, third = compiling.compile_kernels(kernels)
assert first.findings[0].startswith("cannot be read: "), first
assert (second, third) == tuple(together[1:]), (second, third)
"""
    done = run("-c", script)
    assert done.returncode == 0, done.stderr


def test_needs_the_interpreter_off():
    """Catches a report made under the interpreter, which compiles nothing."""
    done = report("--arch", "90", TRITON_INTERPRET="1")
    assert done.returncode == 2 and "TRITON_INTERPRET is set; unset it" in done.stderr, done.stdout + done.stderr


USAGE_ERRORS = {
    "unknown [75], known are [80, 86, 89, 90, 100, 120]": ["--arch", "75", "90"],
    "no such folder: /no/such/folder": ["--arch", "90", "--json", "/no/such/folder/report.json"],
    "nothing to compile": ["--arch", "90", "--model", "odd"],
    "--jobs: expected at least 1, got 0": ["--jobs", "0"],
}


def test_usage_errors():
    """Catches a report that passes without having compiled what was asked for."""
    script = f"""
from fastbert_kernels import offline
for arguments in {list(USAGE_ERRORS.values())}:
    try:
        print("returned", offline.main(arguments))
    except SystemExit as error:
        print(error.code)
"""
    done = run("-c", script)
    assert done.stdout.split() == ["2"] * len(USAGE_ERRORS), done.stdout + done.stderr
    assert all(message in done.stderr for message in USAGE_ERRORS), done.stderr
