"""This module detects code that replaces another library's: mocks, instrumentation and quick fixes.

fastbert would not call a replaced method or function of transformers, sentence-transformers or PyTorch, so the original
code must run. (`live_values.py` detects changes of parameters and settings.)
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterable
from itertools import starmap
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

from fastbert.adapters import versions

# Methods of sentence-transformers have these decorators of PyTorch. Those of transformers have only its own, but for
# the angles of rotary positions, which have no gradients.
_CONTEXTS = "torch.utils._contextlib"
_DECORATORS = {"sentence_transformers": (_CONTEXTS,)}
# Packages whose callables in a module's namespace are not patches.
_HARMLESS = (sys.stdlib_module_names | {"torch", "transformers", "numpy", "fastbert"}) - {"unittest"}
_OF_MODULES = ("__call__", "_call_impl", "_wrapped_call_impl", "__getattr__")  # Methods of nn.Module, in all modules.
# Functions of PyTorch that modules call, and that others replace, as with an attention of their own.
_OF_TORCH = tuple(
    (torch.nn.functional, name)
    for name in ("linear", "embedding", "layer_norm", "gelu", "dropout", "softmax", "scaled_dot_product_attention")
)
# Methods of the model that a forward of transformers may call, by version.
_OF_MODELS = ("get_extended_attention_mask", "invert_attention_mask", "get_head_mask",
              "warn_if_padding_and_no_attention_mask")  # fmt: skip
_HOOKS = tuple(getattr(torch.nn.modules.module, f"_global_{kind}_hooks", {})
               for kind in ("forward", "forward_pre", "backward", "backward_pre"))  # fmt: skip


def is_own(kind: type, name: str) -> bool:
    """Tells whether a class has the method of that name that its library's source defines.

    The library's own decorators may wrap the function. True for a method that the class does not have.
    """
    for base in kind.__mro__:
        if name in base.__dict__:
            return _is_of(base.__dict__[name], base, name)
    return True


def _is_of(function: Any, base: type, name: str) -> bool:
    if isinstance(function, (staticmethod, classmethod)):
        function = function.__func__
    library = base.__module__.partition(".")[0]
    while type(function) is FunctionType:
        origin = function.__globals__.get("__name__", "")
        inner = function.__dict__.get("__wrapped__")
        if inner is None:
            named = base is nn.Module or function.__qualname__ == f"{base.__qualname__}.{name}"
            return named and origin == base.__module__  # nn.Module has methods under more than one name.
        angles = library == "transformers" and base.__name__.endswith("RotaryEmbedding") and origin == _CONTEXTS
        if origin.partition(".")[0] != library and origin not in _DECORATORS.get(library, ()) and not angles:
            return False
        function = inner
    return False


def _is_harmless(value: Any) -> bool:
    """Tells whether a callable in the namespace of a module of transformers belongs to one of the harmless packages."""
    while isinstance(value, functools.partial):
        value = value.func
    if type(value) is not FunctionType:
        return type(value).__module__.partition(".")[0] in _HARMLESS
    while type(value) is FunctionType:
        if value.__globals__.get("__name__", "").partition(".")[0] not in _HARMLESS:
            return False
        value = value.__dict__.get("__wrapped__")
    return value is None


class Watch:
    """A `Watch` checks the code that fastbert replaces: methods, functions in a module, and registered attention.

    kinds: classes of modules. module: the source of their family. config: the model's, which names its attention.
    names: the methods to check, if the classes have them; None for all methods that a forward may call.
    """

    def __init__(
        self,
        kinds: Iterable[type],
        module: ModuleType | None = None,
        config: Any = None,
        names: Iterable[str] | None = None,
    ) -> None:
        methods = [(kind, name) for kind in dict.fromkeys(kinds) for name in names or _methods(kind)]
        self._methods = tuple(dict.fromkeys((*methods, *((nn.Module, name) for name in _OF_MODULES))))
        self._functions: tuple[tuple[ModuleType, str], ...] = _OF_TORCH
        self._module = module
        self._settings: dict[str, Any] = {} if config is None else config.__dict__
        self._registries = () if module is None else versions.attention_registries(module)
        self._look_up()
        self._seen: tuple[Any, ...] = ()

    def obstacle(self) -> str | None:
        """Says which code is not its library's own, or returns None."""
        if any(_HOOKS):
            return "hooks on all modules"
        if (current := self._current()) == self._seen:
            return None
        for kind, method in self._methods:
            if not is_own(kind, method):
                return f"{method} of the class {kind.__name__} was patched"
        if self._module is not None:
            called = _called(self._methods, self._module)
            self._functions = (*_OF_TORCH, *((self._module, name) for name in called))
            self._look_up()
            current = self._current()
        for module, function in self._functions:
            if not _is_harmless(getattr(module, function, None)):
                return f"{function} in {module.__name__} was patched"
        if not all(map(_is_harmless, current[len(self._looked_up) :])):
            return f"its attention is {self._attention()!r}, a registered function"
        self._seen = current
        return None

    def _look_up(self) -> None:
        self._looked_up = tuple((owner, name, None) for owner, name in (*self._methods, *self._functions))

    def _attention(self) -> Any:
        return self._settings.get("_attn_implementation_internal")

    def _current(self) -> tuple[Any, ...]:
        name = self._attention()
        registered = [local.get(name, everywhere.get(name)) for local, everywhere in self._registries]
        return (*starmap(getattr, self._looked_up), *registered)


def _methods(kind: type) -> list[str]:
    """Lists forward, and the methods of a class that nn.Module and PreTrainedModel do not have."""
    names = {"forward", "__call__", *(name for name in _OF_MODELS if hasattr(kind, name))}
    for base in kind.__mro__:
        if base.__module__.startswith("torch.") or base.__name__.endswith("PreTrainedModel"):
            break
        names |= {name for name, value in base.__dict__.items() if _is_method(value) and not name.startswith("__")}
    return sorted(names)


def _called(methods: Iterable[tuple[type, str]], module: ModuleType) -> list[str]:
    """Lists the functions in a module's namespace that methods of its classes name. (A compiler puts more into it.)"""
    functions: list[Any] = [getattr(kind, name, None) for kind, name in methods]
    codes = [getattr(inspect.unwrap(function), "__code__", None) for function in functions]
    names: set[str] = set()
    while codes:
        code = codes.pop()
        if code is not None:
            names.update(code.co_names)
            codes.extend(constant for constant in code.co_consts if isinstance(constant, CodeType))
    return sorted(name for name in names if _is_method(vars(module).get(name)))


def _is_method(value: Any) -> bool:
    return callable(value) and not isinstance(value, type)
