"""Compiled kernels wait before they touch memory where launches are dependent, and none mixes warps and descriptors."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import fastbert_kernels
import fork_server
from helpers import source_env

WAITS = """
import re, tempfile, torch, triton
from triton.backends.compiler import GPUTarget
from fastbert_kernels import dependent, launch, layer_norm, linear, few_rows, offline, split_linear
from fastbert_kernels.offline.disassembly import run_tool
from sass import CODE

def code_of(recorded, arch):
    source, options = offline.specialize(recorded, GPUTarget("cuda", arch, 32))
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    assert compiled.metadata.launch_pdl == options["launch_pdl"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return options["launch_pdl"], CODE.findall(run_tool("nvdisasm", "-c", "-ndf", file.name))

def tensor(*shape):
    return torch.empty(shape, dtype=torch.bfloat16)

x, weight, vector, split = tensor(64, 768), tensor(768, 768), tensor(768), few_rows.Split(few_rows.TILES[0], 4)
GLOBAL = re.compile(r"LDG|STG|LDGSTS|UTMALDG|UTMASTG|UTMAPF|LD[. ]|ST[. ]|ATOMG|REDG?[. ]|LDC[. ].*desc")
for arch, on in ((90, True), (80, True), (90, False)):
    dependent.use(on)
    with launch.recording(arch) as launches:
        linear.linear_forward(x, weight, vector, "gelu", by_rows=True)
        linear.linear_forward(x, weight, vector, "gelu")
        split_linear.split_linear_layer_norm_forward(x, weight, vector, x, vector, vector, 1e-12, split)
        layer_norm.bias_residual_layer_norm_forward(x, vector, x, vector, vector, 1e-12)
    assert len(launches) == 5
    for recorded in launches if on and arch == 90 else launches[-1:]:
        is_dependent, code = code_of(recorded, arch)
        waits = [i for i, line in enumerate(code) if line.startswith("ACQBULK")]
        starts = [i for i, line in enumerate(code) if line.startswith("PREEXIT")]
        touches = [i for i, line in enumerate(code) if GLOBAL.match(line)]
        leaves = [i for i, line in enumerate(code) if line.startswith(("EXIT", "BRA", "RET"))]
        name = arch, on, recorded.kernel.fn.__name__
        assert is_dependent == (on and arch >= 90) == bool(waits) == bool(starts), name
        assert touches and (not waits or waits[0] < starts[0] < touches[0] and waits[0] < leaves[0]), name
"""

PLANTED = """
import torch, triton.language as tl
from triton.backends.compiler import GPUTarget
from fastbert_kernels import launch, linear_persistent, offline
from fastbert_kernels.jit import jit

@jit
def planted_kernel(x_desc, out_ptr, n, BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    for tile in tl.range(tl.program_id(0), n, tl.num_programs(0), flatten=False, warp_specialize=True):
        acc = tl.zeros((BLOCK_ROWS, BLOCK_ROWS), dtype=tl.float32)
        for k in range(4):
            x = x_desc.load([tile * BLOCK_ROWS, k * BLOCK_K])
            acc = tl.dot(x, x.T, acc)
        rows = tl.arange(0, BLOCK_ROWS)
        tl.store(out_ptr + rows[:, None] * BLOCK_ROWS + rows[None, :], acc)

x, tile = torch.empty(512, 256, dtype=torch.bfloat16), dict(BLOCK_ROWS=128, BLOCK_K=64, num_warps=4, num_stages=3)
with launch.recording(90) as launches:
    launch.run(planted_kernel, (4,), tile, x_desc=linear_persistent.descriptor(x, 128, 64), out_ptr=torch.empty(1), n=4)
source, options = offline.specialize(launches[0], GPUTarget("cuda", 90, 32))
result = offline.compile_kernel(offline.Kernel(90, "linear", "bf16", tile, source, options))
print(result.findings)
"""


def run(script: str, cache: Path) -> str:
    """What a script prints, in a process of its own that may compile."""
    path = cache / "script.py"
    path.write_text(script)
    env = source_env(TRITON_CACHE_DIR=str(cache))
    env["PYTHONPATH"] += f":{Path(__file__).parents[1]}"
    env.pop("TRITON_INTERPRET", None)
    done = fork_server.run([sys.executable, path], env=env, modules=fork_server.COMPILER, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_dependent_kernels_wait_first(tmp_path):
    """Catches a read before the wait, a program that ends without one, or any of it where the option is off."""
    run(WAITS, tmp_path)


def test_the_report_finds_descriptors_of_the_host(tmp_path):
    """Catches a warp-specialised kernel with a descriptor from the host, which is compiled wrong without an error."""
    assert "descriptor from the host" in run(PLANTED, tmp_path)


def kernels() -> dict[str, ast.FunctionDef]:
    """Every function of the kernels package that Triton compiles, by name."""
    found = {}
    for path in Path(fastbert_kernels.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list):
                found[node.name] = node
    return found


def is_specialized(function: ast.FunctionDef) -> bool:
    """Whether a loop of the function may be warp-specialised."""
    keywords = [k for node in ast.walk(function) if isinstance(node, ast.Call) for k in node.keywords]
    return any(k.arg == "warp_specialize" and ast.unparse(k.value) != "False" for k in keywords)


def test_no_kernel_mixes_warps_and_descriptors_of_the_host():
    """Catches a kernel with specialised warps that is handed a descriptor, by name or by use."""
    specialized = {name: node for name, node in kernels().items() if is_specialized(node)}
    assert {"_linear_specialized_kernel", "_quantized_linear_specialized_kernel"} <= specialized.keys()
    for name, node in specialized.items():
        parameters = {argument.arg for argument in node.args.args}
        assert not any(argument.endswith("_desc") for argument in parameters), name
        made = {
            target.id
            for assign in ast.walk(node)
            if isinstance(assign, ast.Assign) and "make_tensor_descriptor" in ast.unparse(assign.value)
            for target in assign.targets
            if isinstance(target, ast.Name)
        }
        used = {
            call.func.value.id
            for call in ast.walk(node)
            if isinstance(call, ast.Call)
            and isinstance(call.func, ast.Attribute)
            and call.func.attr in ("load", "store")
            and isinstance(call.func.value, ast.Name)
        }
        assert used - {"tl"} <= made, name


@pytest.mark.parametrize("key", ["linear_persistent", "quantized_linear_persistent"])
def test_tables_that_ship_specialise_no_warps_of_descriptors(key):
    """Catches a table that asks for specialised warps where descriptors come from the host."""
    from fastbert_kernels import tables

    for path in tables.TABLE_FOLDER.glob("*.json"):
        assert all("WARP_SPECIALIZE" not in entry for entry in tables.read_table(path).get(key, {}).values())
