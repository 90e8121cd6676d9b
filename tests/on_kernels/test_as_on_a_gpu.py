"""The tests of operations run as on a machine with a GPU, as far as one without can tell.

The interpreter takes the kernels of compute capability 8.0 otherwise, which are not all that there are; and where there
is a GPU it is off. Each run is a pytest of its own, since both are settled when Triton is imported.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import source_env

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("config.getoption('--as-arch') or config.getoption('--no-interpreter')", reason="is such a run"),
]
OPS = [
    "tests/on_kernels/test_attention_short.py",
    *(str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("tests/ops/test_op_*.py"))),
]
# All that differs on Blackwell. Tests of persistent kernels and of variants name their kernels on any architecture.
LINEARS = [
    path
    for path in OPS
    if ("linear" in path or "quantized" in path) and not ("persistent" in path or "variants" in path)
]
# What else there is takes the same kernels on all architectures.
ON_HOPPER = [*LINEARS, *(path for path in OPS if "attention" in path)]
OTHERS = [
    "tests/engine/test_batch_invariant.py",
    "tests/engine/test_memory.py",
    "tests/engine/test_quantized.py",
    "tests/on_kernels/test_launch.py",
    "tests/ops/test_dispatch.py",
    "tests/tune/test_tune.py",
]
RUNS = {
    "sm_90": ["--as-arch", "90", *ON_HOPPER],
    "sm_100": ["--as-arch", "100", *LINEARS],
    "no interpreter": ["--no-interpreter", *OPS, *OTHERS],
}
FAST = ("-m", "not slow")
PYTEST = "import sys; sys.path[:] = [p for p in sys.path if p]; import pytest; sys.exit(pytest.console_main())"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[subprocess.Popen[bytes], Path]]]:
    """The processes and outputs of all runs, which go side by side."""
    folder, started = tmp_path_factory.mktemp("runs"), {}
    for number, (name, arguments) in enumerate(RUNS.items()):
        log = folder / f"{number}.log"
        line = [
            sys.executable,
            "-c",
            PYTEST,
            "-q",
            "--tb=short",
            "-p",
            "no:cacheprovider",
            "-m",
            "not slow",
            *arguments,
        ]
        with open(log, "w") as output:
            process = subprocess.Popen(
                line, cwd=ROOT, env=source_env(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""), stdout=output,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
        started[name] = process, log
    yield started
    for process, _ in started.values():
        process.kill()


@pytest.mark.parametrize("name", RUNS)
def test_operations(name: str, runs: dict[str, tuple[subprocess.Popen[bytes], Path]]) -> None:
    """Catches a kernel, a choice or a test that is wrong on another architecture, or that needs the interpreter."""
    process, log = runs[name]
    code = process.wait(600)
    lines = log.read_text().splitlines()
    assert code == 0 and " passed" in lines[-1], "\n".join(lines[-60:])
