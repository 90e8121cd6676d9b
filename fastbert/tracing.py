"""What torch.compile should not look into, said without importing the compiler, which takes more than a second."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch

Function = TypeVar("Function", bound=Callable)


def untraced(function: Function) -> Function:
    """`torch.compiler.disable`, applied when a compiler first meets the function."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        if torch.compiler.is_dynamo_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]


def constant(function: Function) -> Function:
    """`torch.compiler.assume_constant_result`: the call is made while tracing, and its result is part of the graph."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
