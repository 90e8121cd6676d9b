"""This module gives Triton the global memory for kernels that make tensor descriptors on the device."""

from __future__ import annotations

import torch
import triton


def provide() -> None:
    """Lets Triton allocate scratch memory from PyTorch, in this thread, unless the program has its own allocator.

    The memory belongs to the current device and stream. It returns to PyTorch after the kernel is launched. Its next
    use is later on the same stream, so this is safe. Inside a CUDA graph it belongs to the graph's pool.
    """
    from triton.runtime import _allocation

    if isinstance(_allocation._allocator.get(), _allocation.NullAllocator):
        triton.set_allocator(_allocate)


def _allocate(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Allocates size bytes. PyTorch's blocks begin at multiples of 512 bytes; a descriptor needs 128."""
    return torch.empty(size, dtype=torch.int8, device="cuda")
