"""This module defines a recording of bits, which `bits.py` writes, and the comparison of two recordings."""

from __future__ import annotations

import difflib
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Recording:
    """A Recording collects cases under their names: the bits of each output, or the type of the case's exception.

    text: values that a comparison shows, but that decide nothing. messages: those of the exceptions, which are not
    kept.
    """

    def __init__(self) -> None:
        self.bits: dict[str, str] = {}
        self.text: dict[str, str] = {}
        self.messages: dict[str, str] = {}

    def case(self, name: str, compute: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Records the outputs of compute(...), and returns them, or None if it raised."""
        try:
            value = compute(*args, **kwargs)
            entries = dict(entries_of(name, value))
        except Exception as error:
            value, entries = None, {name: self._refusal(name, error)}
        assert self.bits.keys().isdisjoint(entries), f"two cases are called {name!r}"
        self.bits.update(entries)
        return value

    def group(self, name: str, record: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """Calls record(self, name, ...), which records cases. An exception outside of the cases is recorded as well."""
        print(name, file=sys.stderr, flush=True)
        try:
            record(self, name, *args, **kwargs)
        except Exception as error:
            self.bits[name] = self._refusal(name, error)

    def say(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Records the function's result as text."""
        try:
            self.text[name] = str(function(*args, **kwargs))
        except Exception as error:
            self.text[name] = self._refusal(name, error)

    def _refusal(self, name: str, error: Exception) -> str:
        self.messages[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return f"raises {type(error).__name__}"

    def save(self, path: Path, environment: Mapping[str, str]) -> None:
        document = {"environment": environment, "bits": self.bits, "text": self.text}
        path.write_text(json.dumps(document, indent=1) + "\n")


def entries_of(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yields the entries of a value under a name: one for each tensor or array, or one for a value without any."""
    if isinstance(value, Mapping) and _holds_numbers(value):
        for key, item in value.items():
            yield from entries_of(f"{name}/{key}", item)
    elif isinstance(value, (list, tuple)) and _holds_numbers(value):
        yield f"{name}/type", f"{type(value).__name__} of {len(value)}"
        for i, item in enumerate(value):
            yield from entries_of(f"{name}/{i}", item)
    elif isinstance(value, Tensor):
        yield name, digest(value)
    elif isinstance(value, (np.ndarray, np.generic)):
        yield name, digest(torch.from_numpy(np.array(value)), "array")
    else:
        text = repr(value)
        yield name, text if len(text) <= 100 else f"{len(text)} characters {_sha256(text.encode())}"


def _holds_numbers(value: Any) -> bool:
    """Tells whether a mapping or a sequence contains a tensor or an array."""
    if isinstance(value, (Mapping, list, tuple)):
        return any(_holds_numbers(item) for item in (value.values() if isinstance(value, Mapping) else value))
    return isinstance(value, (Tensor, np.ndarray))


def digest(tensor: Tensor, kind: str = "tensor") -> str:
    """Returns a line with the dtype, the shape, the SHA-256 of the bytes, and the RMS.

    The RMS helps the reader to tell a rounding from a fault. The comparison itself uses only the bytes.
    """
    tensor = tensor.detach().cpu().contiguous()
    content = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    rms = tensor.double().square().mean().sqrt().item() if tensor.numel() else 0.0
    shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    return f"{kind} {dtype} {shape} {_sha256(content)} rms {rms:.6g}"


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def differences(first: Mapping[str, str], second: Mapping[str, str]) -> list[str]:
    """Returns each entry that only one recording has, or that differs, with both values."""
    absent = "(not recorded)"
    return [
        f"{name}\n  - {first.get(name, absent)}\n  + {second.get(name, absent)}"
        for name in dict.fromkeys((*first, *second))
        if first.get(name) != second.get(name)
    ]


def compare(first: Path, second: Path) -> int:
    """Prints the differences between two recordings. Returns 1 if bits differ, else 0."""
    one, other = (json.loads(path.read_text()) for path in (first, second))
    for line in differences(one["environment"], other["environment"]):
        print(f"environment: {line}")
    for name in dict.fromkeys((*one["text"], *other["text"])):
        texts = [document["text"].get(name, "").splitlines() for document in (one, other)]
        for line in difflib.unified_diff(*texts, f"{first}: {name}", f"{second}: {name}", lineterm=""):
            print(line)
    lines = differences(one["bits"], other["bits"])
    for line in lines:
        print(line)
    print(f"{len(lines)} differences of bits, in {len(one['bits'])} and {len(other['bits'])} entries")
    return 1 if lines else 0
