"""This module finds hooks, patches and adapters: a module with one of them must be called."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from fastbert.ops import tracing

_GLOBAL = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)


def everywhere() -> bool:
    """Tells whether there are hooks on all modules of the process, apart from PyTorch's own counters."""
    return any(_GLOBAL) and any(not _is_torchs(hook) for hooks in _GLOBAL for hook in hooks.values())


def _is_torchs(hook: Any) -> bool:
    return str(getattr(type(getattr(hook, "__self__", None)), "__module__", "")).startswith("torch.")


def listened(module: nn.Module) -> bool:
    """Tells whether this module has hooks or a patched forward."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks) or "forward" in module.__dict__ or everywhere()


def is_sharded(module: nn.Module) -> bool:
    """Tells whether the module has only the hooks of FSDP2, which pass any tensors through."""
    if "torch.distributed.fsdp" not in type(module).__module__ or "forward" in module.__dict__ or everywhere():
        return False
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return all(_is_torchs(hook) for each in hooks for hook in each.values())


def listened_inside(module: nn.Module) -> bool:
    """Tells whether the module or one below it has hooks."""
    waiting: list[nn.Module | None] = [module]
    while waiting:
        one = waiting.pop()
        if one is not None:
            if listened(one):
                return True
            waiting += one._modules.values()
    return False


def names_of_listened(model: nn.Module) -> Iterator[str]:
    """Returns the names of the model's modules with hooks, and "all modules" for global hooks."""
    if everywhere():
        yield "all modules"
        return
    for name, module in model.named_modules():
        if name and listened(module):
            yield name


def is_bare(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Tells whether the module's parameters may replace a call: it is not an adapter, and has no hook or patch."""
    return type(module) is kind and not listened(module)


def is_plain(linear: nn.Module) -> TypeGuard[nn.Linear]:
    """Tells whether the module is a bare nn.Linear with a bias and a plain weight."""
    if not is_bare(linear, nn.Linear) or linear.bias is None:
        return False
    return type(linear.weight) in tracing.PLAIN or torch.compiler.is_compiling()


def is_plain_norm(norm: nn.Module, dropout: nn.Module | None = None) -> TypeGuard[nn.LayerNorm]:
    """Tells whether both are bare, and the LayerNorm has a weight and a bias."""
    bare = is_bare(norm, nn.LayerNorm) and (dropout is None or is_bare(dropout, nn.Dropout))
    return bare and norm.weight is not None and norm.bias is not None


def observer_obstacle(device: torch.device) -> str | None:
    """Tells why the operations must run one by one (an observer, or the capture of a CUDA graph), or returns None."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "another CUDA graph is being captured"
    return tracing.observed()
