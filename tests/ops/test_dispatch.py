"""Dispatch chooses the backend that runs an operation, and says why."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch

from fastbert import ops
from fastbert.ops import BackendError, Policy, dispatch
from helpers import source_env

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda", 0), torch.device("mps")


@pytest.fixture
def interpreted(monkeypatch):
    """Tensors on the CPU that kernels could take, as far as dispatch can tell, on a machine with a GPU too."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture
def a_gpu(monkeypatch):
    """A machine whose GPU can run the kernels, as far as dispatch can tell."""
    monkeypatch.setattr(dispatch, "_gpu_obstacle", lambda index: None)


def test_auto(a_gpu):
    """Catches a wrong default: Triton on GPUs, the CPU path on CPUs (interpreter or not), plain PyTorch elsewhere."""
    assert dispatch.decide("op", Policy(), CUDA, None) == dispatch.Decision("op", "triton")
    assert dispatch.decide("op", Policy(), CPU, None) == dispatch.Decision("op", "cpu")
    assert dispatch.decide("op", Policy(), MPS, None) == dispatch.Decision("op", "torch")


def test_obstacles_concern_triton_only(a_gpu):
    """Catches a reason against a Triton kernel that changes what a CPU runs, or none given where it matters."""
    assert dispatch.decide("op", Policy(), CPU, "too wide").reason is None
    assert dispatch.decide("op", Policy("torch"), CUDA, "too wide").reason is None
    assert dispatch.decide("op", Policy(), CUDA, "too wide") == dispatch.Decision("op", "torch", "too wide")


def test_interpreter_switch(monkeypatch):
    """Catches kernels sent to the CPU without the interpreter, which fail inside Triton."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.decide("op", Policy("triton"), CPU, None).backend == "triton"
    monkeypatch.delenv("TRITON_INTERPRET")
    decision = dispatch.decide("op", Policy("triton"), CPU, None)
    assert decision.backend == "cpu" and "TRITON_INTERPRET" in decision.reason


@pytest.mark.parametrize(("capability", "reason"), [((7, 5), "this GPU has 7.5"), ((8, 0), None), ((12, 0), None)])
def test_old_gpus(capability, reason, monkeypatch):
    """Catches kernels sent to a GPU they were not made for."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    dispatch._gpu_obstacle.cache_clear()
    decision = dispatch.decide("op", Policy(), CUDA, None)
    dispatch._gpu_obstacle.cache_clear()
    assert (decision.reason is None) == (reason is None)
    assert reason is None or reason in decision.reason


def test_without_triton(monkeypatch):
    """Catches an ImportError where Triton is not installed, instead of a fallback with its reason."""
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    decision = dispatch.decide("op", Policy(), CUDA, None)
    assert decision == dispatch.Decision("op", "torch", "the package triton is not installed")


def test_cpu_backend_elsewhere():
    """Catches the CPU backend taken for tensors that are not on the CPU."""
    decision = dispatch.decide("op", Policy("cpu"), CUDA, None)
    assert decision == dispatch.Decision("op", "torch", "the tensors are on cuda:0")


def test_fallback_is_logged_once(interpreted, caplog):
    """Catches a silent fallback, or one that floods the log."""
    dispatch._log_once.cache_clear()
    x = torch.randn(2, 8, dtype=torch.float64)
    with caplog.at_level(logging.WARNING, logger="fastbert"):
        for _ in range(3):
            ops.bias_gelu(x, None, "gelu", policy=Policy("triton"))
    messages = [r.getMessage() for r in caplog.records]
    assert messages == [
        "bias_gelu: backend 'triton' falls back to 'cpu': there are no Triton kernels for torch.float64"
    ]


def test_strict_raises(interpreted):
    """Catches a strict policy that falls back instead of raising."""
    with pytest.raises(
        BackendError, match=r"^bias_gelu: the backend 'triton' cannot run it, and strict=True: there are no"
    ):
        ops.bias_gelu(torch.randn(2, 8).double(), None, "gelu", policy=Policy("triton", strict=True))


def test_unknown_backend():
    """Catches a misspelt backend that is taken for auto."""
    with pytest.raises(ValueError, match="backend: expected one of auto, triton, cpu, torch, got 'tritn'"):
        Policy("tritn")


def test_mixed_dtypes_and_autocast(device):
    """Catches a kernel that computes with inputs of dtypes that it does not expect."""
    x, bias = torch.randn(2, 8, device=device), torch.randn(8, device=device, dtype=torch.bfloat16)
    with pytest.raises(BackendError, match="mixed dtypes: torch.bfloat16, torch.float32"):
        ops.bias_gelu(x, bias, "gelu", policy=Policy("triton", strict=True))
    with torch.autocast(device.type, torch.bfloat16), pytest.raises(BackendError, match="autocast is on"):
        ops.bias_gelu(x, None, "gelu", policy=Policy("triton", strict=True))


@pytest.mark.gpu
def test_auto_takes_triton_on_a_gpu(monkeypatch):
    """Catches a GPU that is there but left to plain PyTorch."""
    from fastbert_kernels import launch

    launched = []
    run = launch.run
    monkeypatch.setattr(launch, "run", lambda kernel, *a, **kw: launched.append(kernel) or run(kernel, *a, **kw))
    ops.bias_gelu(torch.randn(2, 8, device="cuda"), None, "gelu")
    assert len(launched) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU only: what runs there is the plain path")
def test_registered_ops_run_without_the_interpreter():
    """Catches torch.ops.fastbert that fails on a CPU, for instance in a program exported on a GPU machine."""
    script = (
        "import sys, torch, fastbert.ops; x = torch.randn(3, 8);"
        "y = torch.ops.fastbert.bias_gelu(x, None, 'gelu');"
        "assert torch.equal(y, torch.nn.functional.gelu(x)) and 'fastbert_kernels.gelu' not in sys.modules"
    )
    env = source_env()
    env.pop("TRITON_INTERPRET", None)
    subprocess.run([sys.executable, "-c", script], env=env, check=True)
