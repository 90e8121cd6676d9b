"""Kernels that make tensor descriptors on the device need a little global memory, which this module gives to Triton."""

from __future__ import annotations

import torch
import triton


def provide() -> None:
    """Makes Triton take scratch memory from PyTorch, in this thread, unless the program has an allocator of its own.

    The memory is of the current device and stream. It goes back to PyTorch once the kernel is launched, and what takes
    it next comes later on the same stream; inside a CUDA graph it belongs to the graph's pool.
    """
    from triton.runtime import _allocation

    if isinstance(_allocation._allocator.get(), _allocation.NullAllocator):
        triton.set_allocator(_allocate)


def _allocate(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Gives size bytes. PyTorch's blocks begin at multiples of 512 bytes; a descriptor wants 128."""
    return torch.empty(size, dtype=torch.int8, device="cuda")
