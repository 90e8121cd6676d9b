"""Kernels have the right keys in Triton's cache, and several threads may launch them first.

In processes of their own, without the interpreter, as on a GPU machine; a driver that launches nothing stands for it.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import torch

from process_cases import run_beside_tests as run

MODULES = sorted(
    path.stem
    for path in (Path(__file__).resolve().parents[2] / "kernels" / "fastbert_kernels").glob("*.py")
    if "\n@jit" in path.read_text()
)


HASH = """
import importlib, json, sys
from triton.runtime.jit import JITFunction

modules = [importlib.import_module(f"fastbert_kernels.{name}") for name in sys.argv[1:]]
kernels = {
    f"{module.__name__}.{name}": value
    for module in modules
    for name, value in vars(module).items()
    if isinstance(value, JITFunction) and value.__module__ == module.__name__
}
print(json.dumps({name: kernel.cache_key for name, kernel in kernels.items()}))
"""

LAUNCH = """
import json, sys, torch
from triton.backends.compiler import GPUTarget
from fastbert_kernels import attention, embedding, gelu, launch, layer_norm, linear, offline, pooling, quantized_linear
from fastbert_kernels.work_list import WorkList

bf16, fp8 = torch.bfloat16, torch.float8_e4m3fn
x, w = torch.empty(64, 64, dtype=bf16), torch.empty(64, dtype=bf16)
ids, cu, tiles = (torch.zeros(n, dtype=torch.int32) for n in (64, 3, 5))
x8 = torch.empty(64, 64, dtype=fp8), torch.empty(64, 1)
calls = {
    "attention": lambda: attention.varlen_attention_forward(
        torch.empty(64, 192, dtype=bf16), WorkList(tiles.view(1, 5), ids), 2, 0.2
    ),
    "embedding": lambda: embedding.embedding_layer_norm_forward(ids, ids, ids, x, x, x, w, w, 1e-5),
    "gelu": lambda: gelu.bias_gelu_forward(x, w, "gelu"),
    "layer_norm": lambda: layer_norm.bias_residual_layer_norm_forward(x, w, x, w, w, 1e-5, x8),
    "linear": lambda: linear.linear_forward(x, x, w, "gelu"),
    "pooling": lambda: pooling.pool_forward(x, cu, "mean", True, bf16),
    "quantized": lambda: quantized_linear.quantized_linear_forward(*x8, 64, x8[0], w.float(), w, "gelu", bf16),
}
target, keys = GPUTarget("cuda", 90, 32), {}
for name in sorted(calls, reverse="reversed" in sys.argv):
    with launch.recording(90) as launches:
        calls[name]()
    keys[name] = [offline.specialize(launched, target)[0].hash() for launched in launches]
print(json.dumps(keys))
"""


def test_keys_do_not_depend_on_the_order_of_imports(tmp_path: Path) -> None:
    """Catches a kernel that is hashed before a function that it calls, or calls one that is defined below it."""
    keys = run(HASH, *MODULES, cache=tmp_path)
    assert len(keys) > 20
    assert run(HASH, *reversed(MODULES), cache=tmp_path) == keys


def test_keys_do_not_depend_on_the_order_of_launches(tmp_path: Path) -> None:
    """Catches a second process that compiles anew what the first has compiled, since it launches in another order."""
    keys = run(LAUNCH, cache=tmp_path)
    assert len(keys) == 7 and all(keys.values())
    assert run(LAUNCH, "reversed", cache=tmp_path) == keys


def test_keys_know_every_constant(tmp_path: Path) -> None:
    """Catches a constant that is changed in the source, and a kernel of the old one found in the cache."""
    code = """
import json
from fastbert_kernels import attention, quantize
print(json.dumps(sorted(name for name, _ in attention._varlen_attention_kernel.used_global_vals)))
"""
    assert {"LOWEST", "TOP_FLOAT8", "TOP_INT8", "TINY"} <= set(run(code, cache=tmp_path))


def test_all_kernels_are_made_by_our_decorator() -> None:
    """Catches a new kernel under @triton.jit, whose key depends on the others and whose first launch is not guarded."""
    folder = Path(__file__).resolve().parents[2] / "kernels" / "fastbert_kernels"
    assert [path.name for path in folder.glob("*.py") if "\n@triton.jit" in path.read_text()] == []
    assert {"attention", "gelu", "layer_norm", "pooling", "quantize"} <= set(MODULES)


THREADS = """
import json, threading, time, torch, stub_driver
from fastbert_kernels import events, gelu, launch

stub = stub_driver.install(seconds_to_load=0.5)
errors, barrier = [], threading.Barrier(8)

def first_launch(number, dtype, n_devices, apart):
    stub.here.device = number % n_devices
    x = torch.empty(4, 64, dtype=dtype)
    barrier.wait()
    time.sleep(number * apart)
    try:
        gelu.bias_gelu_forward(x, None, "gelu")
    except BaseException as error:
        errors.append(repr(error))

def in_threads(dtype, n_devices, apart=0.0):
    threads = [threading.Thread(target=first_launch, args=(i, dtype, n_devices, apart)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

in_threads(torch.bfloat16, 1)
in_threads(torch.float32, 1, apart=0.1)  # another specialisation, which some find compiled and not yet loaded
in_threads(torch.bfloat16, 2, apart=0.1)  # the first one, on another device, where it is loaded after no time
in_threads(torch.bfloat16, 2)
print(json.dumps([errors, stub.launches.count("function"), len(stub.launches), stub.loads, events.counts()]))
"""


def test_first_launches_in_eight_threads(tmp_path: Path) -> None:
    """Catches a thread that launches a kernel which another is still loading, or that loads it once more."""
    errors, good, launches, loads, events = run(THREADS, cache=tmp_path)
    assert errors == [] and good == launches == 32
    assert loads == [["_bias_gelu_kernel", 0], ["_bias_gelu_kernel", 0], ["_bias_gelu_kernel", 1]]
    assert events == {"compilations": 2, "loads": 1, "tunings": 0}


def test_a_kernel_that_does_not_load_fails_every_time(tmp_path: Path) -> None:
    """Catches a kernel that, once it was too large for the device, is launched half loaded."""
    code = """
import json, torch, stub_driver
from fastbert_kernels import gelu
stub = stub_driver.install()
stub.get_device_properties = lambda device: {"max_shared_mem": -1}
errors = []
for _ in range(2):
    try:
        gelu.bias_gelu_forward(torch.empty(4, 64), None, "gelu")
    except Exception as error:
        errors.append(type(error).__name__)
print(json.dumps([errors, stub.launches]))
"""
    assert run(code, cache=tmp_path) == [["OutOfResources"] * 2, []]


def test_other_kernels_are_launched_one_at_a_time(device: torch.device) -> None:
    """Catches two launches at once of a kernel that nothing guards, such as those of Triton's interpreter."""
    from fastbert_kernels import gelu, launch

    busy: list[int] = []
    most: list[int] = []

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            def start(**arguments: Any) -> None:
                busy.append(1)
                most.append(len(busy))
                time.sleep(0.01)
                busy.pop()

            return start

    kernel, x = Kernel(), torch.zeros(1, device=device)
    threads = [threading.Thread(target=launch.run, args=(kernel, (1,), {}), kwargs={"x_ptr": x}) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 8
    expected = gelu.bias_gelu_forward(torch.ones(4, 64, device=device), None, "gelu")
    results: list[Any] = []
    threads = [
        threading.Thread(
            target=lambda: results.append(gelu.bias_gelu_forward(torch.ones(4, 64, device=device), None, "gelu"))
        )
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8 and all(torch.equal(result, expected) for result in results)
