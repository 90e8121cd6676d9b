"""This module detects writes that PyTorch does not count: by fused optimizers, `.data`, NumPy, other processes.

There are two methods. A hook that PyTorch calls after every optimizer step records the optimizer's parameters. The
second method compares a sample of the numbers of each tensor with its earlier numbers. Pruning or averaging a model
writes to many tensors, and some samples may miss these writes. So after one sample has shown a write, all earlier
checks of other tensors are invalid. A write that no sample shows (such as one row of a matrix through `.data`) is not
detected: `eval()` of the model makes all derived tensors again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastbert.ops.packing import to_device
from fastbert_kernels import cpu

# The size of a sample of one tensor. It leaves out no sixteenth of the rows, columns or numbers, such as one head's.
OF_MATRIX, OF_VECTOR = 21, 16
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_GOLDEN = (math.sqrt(5) - 1) / 2

_n_seen = 0  # the number of writes that samples have shown
_n_steps = 0
_stepped: dict[int, int] = {}  # id of a parameter -> the last step that wrote it; an id that is reused does no harm


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    global _n_steps
    _n_steps += 1
    ids = (id(parameter) for group in optimizer.param_groups for parameter in group["params"])
    _stepped.update(dict.fromkeys(ids, _n_steps))


register_optimizer_step_post_hook(_after_step)


def waits(device: torch.device) -> bool:
    """Tells whether reading a number on this device waits for it; a model then checks once a call, not at each use."""
    return device.type not in ("cpu", "meta")


def signs() -> tuple[int, int]:
    """Returns counts that change with every step of an optimizer and every detected write."""
    return _n_steps, _n_seen


def _last_step(parameters: Iterable[Tensor]) -> int:
    """Returns the number of the last optimizer step that wrote one of the parameters, or 0."""
    return max(map(_stepped.get, map(id, parameters), repeat(0)), default=0)


class Samples:
    """A `Samples` is a sample of the numbers of tensors. `digest` reads it at each call.

    The tensors' memory must not move: the caller compares `data_ptr` before each digest. Tensors that are not dense or
    have no memory are left out.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        with torch.no_grad():
            words = [_words(tensor) for tensor in tensors if _is_dense(tensor)]
        on_host = [word for word in words if _on_host(word)]
        # Addresses by the size of a word. `_words` keeps the memory alive.
        self._addresses = [
            (np.concatenate(parts), size)
            for size in _WORDS
            if (parts := [_addresses(word) for word in on_host if word.element_size() == size])
        ]
        self._calls = [(array.ctypes.data, len(array), size) for array, size in self._addresses]
        self._words = on_host
        self._compiled = cpu.obstacle() is None
        elsewhere = [word for word in words if not _on_host(word)]
        self._elsewhere = {
            key: [_view(word) for word in elsewhere if (word.dtype, word.device) == key]
            for key in {(word.dtype, word.device) for word in elsewhere}
        }

    def digest(self) -> Any:
        """Returns a value that changes if one of the numbers changes. For tensors on a GPU the host waits."""
        if self._compiled:
            digests: list[Any] = [cpu.digest(*call) for call in self._calls]
        else:
            digests = [word.numpy().flat[_places(word)].tobytes() for word in self._words]
        for parts in self._elsewhere.values():
            digests.append(torch.cat(parts).cpu().numpy().tobytes())
        return digests


class LateSamples:
    """A `LateSamples` is a sample of the numbers of tensors on a GPU, which a kernel compares with earlier numbers.

    The host does not wait: the kernel records a difference for it (`fastbert.ops.noting`). Addresses and numbers are in
    memory that a CUDA graph may read.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._n_steps, self._parameters = _n_steps, tensors
        self._last_step = _last_step(tensors)
        with torch.inference_mode(False), torch.no_grad():
            views = [_view(_words(tensor)) for tensor in tensors if _is_dense(tensor)]
            self._views = {dtype: [v for v in views if v.dtype == dtype] for dtype in {v.dtype for v in views}}
            self._before = {dtype: torch.cat(parts) for dtype, parts in self._views.items()}
            self._addresses = {
                dtype: to_device(_addresses_of(parts), parts[0].device) for dtype, parts in self._views.items()
            }

    def look(self, notes: Any) -> None:
        """Launches the comparison, which records a write in the notes of the batch."""
        from fastbert_kernels.samples import compare_samples

        for dtype, before in self._before.items():
            compare_samples(self._addresses[dtype], before, notes)

    def stepped(self) -> bool:
        """Tells whether the optimizers' hook has reported a write to one of the tensors since the last call."""
        if self._n_steps == _n_steps:
            return False
        self._n_steps, before = _n_steps, self._last_step
        self._last_step = _last_step(self._parameters)
        return self._last_step > before

    def renew(self) -> None:
        """Stores the present numbers, in the same memory."""
        with torch.inference_mode(False), torch.no_grad():
            for dtype, parts in self._views.items():
                self._before[dtype].copy_(torch.cat(parts))


def _addresses_of(views: Sequence[Tensor]) -> Tensor:
    """Returns the addresses of the numbers of vectors, (n,) int64 on the host."""
    parts = [v.data_ptr() + np.arange(v.shape[0]) * v.stride(0) * v.element_size() for v in views]
    return torch.from_numpy(np.concatenate(parts))


class Writes:
    """A `Writes` tells later whether parameters were written to without PyTorch's count.

    The caller first compares PyTorch's counts and the addresses. sampled: whether to compare samples of numbers.
    """

    def __init__(self, parameters: Sequence[Tensor], sampled: bool = True) -> None:
        self._seen_steps = _n_steps
        self._last_step = _last_step(parameters)
        self._n_seen = _n_seen
        self._samples = Samples(parameters if sampled else ())
        self._digest = self._samples.digest()

    def none_since(self, parameters: Sequence[Tensor]) -> bool:
        """Tells whether no write to the same parameters was detected since then."""
        n_steps = _n_steps
        if self._seen_steps != n_steps:
            if _last_step(parameters) > self._last_step:
                return False
            self._seen_steps = n_steps
        return self._n_seen == _n_seen and (self._samples.digest() == self._digest or note_seen())


def note_seen() -> bool:
    """Records that a sample has shown a write, which may also concern other tensors. Returns False."""
    global _n_seen
    _n_seen += 1
    return False


def _on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _is_dense(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
    return plain and not tensor.is_meta and tensor.numel() > 0 and not tensor.is_quantized


def _words(tensor: Tensor) -> Tensor:
    """Returns the same memory as integers. NumPy supports them, and each is equal to itself (unlike NaN)."""
    tensor = tensor.detach()
    return torch.view_as_real(tensor).view(torch.int64) if tensor.is_complex() else tensor.view(_word_of(tensor))


def _word_of(tensor: Tensor) -> torch.dtype:
    return _WORDS[tensor.element_size()]


def _step(tensor: Tensor) -> tuple[int, int, int]:
    """Returns the size of the sample, its first number, and the distance between its numbers.

    Each number has another row and column than the one before. As much is left out before the first as after the last.
    """
    n_samples, step = _distance(tensor)
    return n_samples, (tensor.numel() - 1 - (n_samples - 1) * step) // 2, step


def _distance(tensor: Tensor) -> tuple[int, int]:
    n_numbers = tensor.numel()
    n_samples = min(n_numbers, OF_MATRIX if tensor.dim() > 1 else OF_VECTOR)
    step = n_numbers // n_samples
    width = tensor.shape[-1] if tensor.dim() else 1
    spread = math.floor((math.floor(step / width - _GOLDEN) + _GOLDEN) * width)
    if spread > 0.8 * step:
        return n_samples, spread
    while step > 1 and math.gcd(step, width) > 1:
        step -= 1
    return n_samples, step


def _places(tensor: Tensor) -> np.ndarray:
    """Returns the places of the sample in the order of the tensor's rows, (n,) int64."""
    n_samples, first, step = _step(tensor)
    return first + np.arange(n_samples, dtype=np.int64) * step


def _addresses(tensor: Tensor) -> np.ndarray:
    """Returns the addresses of the sample, (n,) uint64."""
    places = np.unravel_index(_places(tensor), tuple(tensor.shape)) if tensor.dim() else ()
    offsets = sum(
        (place * stride for place, stride in zip(places, tensor.stride(), strict=True)), np.zeros(1, np.int64)
    )
    return (tensor.data_ptr() + offsets * tensor.element_size()).astype(np.uint64)


def _view(tensor: Tensor) -> Tensor:
    """Returns a view of the sample, (n,). If the rows have gaps, it is a sample of the first row only."""
    if not tensor.is_contiguous() and tensor.dim() == 2:
        tensor = tensor.t()
    while not tensor.is_contiguous() and tensor.dim() > 1:
        tensor = tensor[0]
    n_samples, first, step = _step(tensor)
    stride = tensor.stride(-1) if tensor.dim() else 1
    return tensor.as_strided((n_samples,), (step * stride,), tensor.storage_offset() + first * stride)
