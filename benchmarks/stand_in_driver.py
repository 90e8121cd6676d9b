"""This driver for Triton loads and launches nothing, so that the path to a launch runs without a GPU.

Kernels are compiled for sm_90, and all the Python of a launch runs, including Triton's own launcher. It is for
processes without TRITON_INTERPRET: call `install()` before the first launch.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver


class Driver:
    """A stand-in for `triton.runtime.driver.active` that keeps the kernels loaded and counts the launches."""

    def __init__(self, seconds_to_load: float = 0.0) -> None:
        self.seconds_to_load = seconds_to_load
        self.loads: list[tuple[str, int]] = []  # (kernel, device)
        self.launches: list[Any] = []
        self.here = threading.local()  # .device: the thread's current one
        self.utils = self
        outer = self

        class Launcher(nvidia.CudaLauncher):
            """A Launcher is Triton's launcher of a kernel without its compiled part, which calls CUDA's driver."""

            def __init__(self, source: Any, metadata: Any) -> None:
                signature, descriptors = dict(source.signature), getattr(metadata, "tensordesc_meta", None)
                self.num_ctas = metadata.num_ctas
                self.launch = nvidia.wrap_handle_tensordesc(outer.launch, signature, descriptors)
                self.global_scratch_size = self.profile_scratch_size = 0
                self.global_scratch_align = self.profile_scratch_align = 1
                self.launch_cooperative_grid, self.launch_pdl = metadata.launch_cooperative_grid, metadata.launch_pdl
                self.gsan_enabled, self.arg_annotations, self.kernel_signature = False, (), b""

        self.launcher_cls = Launcher

    def launch(self, x: int, y: int, z: int, stream: Any, function: Any, *arguments: Any) -> None:
        self.launches.append(function)

    def fill_tma_descriptor(self, *arguments: Any) -> Any:
        return arguments

    fill_tma_descriptor_tiled = fill_tma_descriptor

    def load_binary(self, name: str, code: bytes, shared: int, device: int) -> tuple[Any, Any, int, int, int]:
        time.sleep(self.seconds_to_load)
        self.loads.append((name, device))
        return "module", "function", 32, 0, 1024

    def unload_module(self, module: Any) -> None:
        pass

    def get_current_device(self) -> int:
        return getattr(self.here, "device", 0)

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return 9, 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132}

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, name: str) -> str:
        return name


def install(seconds_to_load: float = 0.0) -> Driver:
    """Makes such a driver the active one. CPU tensors then stand for those of a GPU of compute capability 9.0."""
    from fastbert.ops import dispatch
    from fastbert_kernels import launch

    stub = Driver(seconds_to_load)
    driver.set_active(stub)
    launch._recorded_arch = 90
    dispatch.interpreting = lambda: True
    return stub
