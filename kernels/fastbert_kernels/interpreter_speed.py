"""This module makes Triton's interpreter faster without changing its results.

A kernel under the interpreter spends most of its time outside of the arithmetic. Each call of a function patches the
builtins of Triton's language again, and each value builds the names of its types. With this module, a function called
by a kernel does not patch the language again, names are built only when they are read, and shapes are shared. Each
change is left out if Triton's source is different.
"""

from __future__ import annotations

import builtins
import inspect
import math
from collections.abc import Callable
from typing import Any

import triton.language as tl
from triton.language import core


def parameters(function: Any) -> list[str]:
    """Returns the names of a function's parameters, or none if there is no such function."""
    return list(inspect.signature(function).parameters) if callable(function) else []


def patch_once(interpreter: Any) -> bool:
    """Lets a called function skip the patch of the language if the launch has already replaced its builtins.

    Returns whether this Triton's source is the expected one.
    """
    original: Any = getattr(interpreter, "_patch_lang", None)
    scope: Any = getattr(interpreter, "_LangPatchScope", None)
    if parameters(original) != ["fn"] or scope is None:
        return False
    languages: dict[Any, list[Any]] = {}

    def patch_lang(fn: Any) -> Any:
        seen = languages.get(fn)
        if seen is None:
            seen = languages[fn] = [x for x in fn.__globals__.values() if inspect.ismodule(x) and x in (tl, tl.core)]
        if seen and not any(core.is_builtin(language.load) for language in seen):
            return scope()
        return original(fn)

    interpreter._patch_lang = patch_lang
    return True


def list_builtins_once(interpreter: Any) -> bool:
    """Lists the builtins of a part of the language once, not at each launch. Returns as patch_once does."""
    original: Any = getattr(interpreter, "_patch_builtin", None)
    patch_attr: Any = getattr(interpreter, "_patch_attr", None)
    if parameters(original) != ["pkg", "builder", "scope"] or parameters(patch_attr)[:3] != ["obj", "name", "member"]:
        return False
    descriptors = getattr(core, "tensor_descriptor_base", None)
    parts = [part for part in (tl, tl.core, tl.tensor, tl.math, descriptors) if part is not None]
    names = {id(part): [name for name, x in inspect.getmembers(part) if core.is_builtin(x)] for part in parts}

    def patch_builtin(pkg: Any, builder: Any, scope: Any) -> None:
        if id(pkg) not in names:
            original(pkg, builder, scope)
            return
        for name in names[id(pkg)]:
            member = getattr(pkg, name)
            if core.is_builtin(member):
                patch_attr(pkg, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtin
    return True


def keep_numpy_types(interpreter: Any) -> bool:
    """Looks up numpy's dtype by the name of Triton's. Returns as patch_once does."""
    original: Any = getattr(interpreter, "_get_np_dtype", None)
    if parameters(original) != ["tt_dtype"]:
        return False
    kept: dict[str, Any] = {}

    def get_np_dtype(tt_dtype: Any) -> Any:
        scalar = tt_dtype.element_ty if isinstance(tt_dtype, tl.block_type) else tt_dtype
        if isinstance(scalar, tl.pointer_type):
            return original(scalar)
        dtype = kept.get(scalar.name)
        if dtype is None:
            dtype = kept[scalar.name] = original(scalar)
        return dtype

    interpreter._get_np_dtype = get_np_dtype
    return True


def name_tuples_when_asked() -> bool:
    """Makes the type of a tuple, and its name, only when they are read. Returns as patch_once does."""
    kind: Any = getattr(core, "tuple_type", None)
    if kind is None or parameters(kind) != ["types", "fields"] or parameters(core.tuple) != ["args", "type"]:
        return False
    type_for_values: Any = getattr(core, "_type_for_tuple_values", None)
    if parameters(type_for_values) != ["values", "fields"] or "name" in vars(kind) or "type" in vars(core.tuple):
        return False

    def type_init(self: Any, types: Any, fields: Any = None) -> None:
        self.types = types
        self.fields = fields or [""] * len(types)

    def name(self: Any) -> str:
        return "[" + ",".join(f"{field}:{one}" for field, one in zip(self.fields, self.types, strict=False)) + "]"

    def tuple_init(self: Any, args: Any, type: Any = None) -> None:
        self.values = list(args)
        self._type = type if type is None or isinstance(type, kind) else kind(type)

    def get_type(self: Any) -> Any:
        if self._type is None:
            self._type = type_for_values(self.values)
        return self._type

    def set_type(self: Any, value: Any) -> None:
        self._type = value

    kind.__init__, kind.name = type_init, property(name)
    core.tuple.__init__, core.tuple.type = tuple_init, property(get_type, set_type)
    return True


def compare_plain_tuples() -> bool:
    """Compares tuples of integers without unpacking constants in them. Returns as patch_once does."""
    original: Any = vars(core.tuple).get("__eq__")
    if parameters(original) != ["self", "other"]:
        return False

    def equal(self: Any, other: Any) -> Any:
        values = other.values if type(other) is core.tuple else other
        if isinstance(values, builtins.tuple | list) and all(
            type(x) is int for side in (self.values, values) for x in side
        ):
            return core.constexpr(self.values == list(values))
        return original(self, other)

    core.tuple.__eq__ = equal  # the hash stays: only __eq__ in a class body removes it
    return True


def compare_types_by_name() -> bool:
    """Compares scalar types without looking for constants. Returns as patch_once does."""
    original: Any = vars(tl.dtype).get("__eq__")
    if parameters(original) != ["self", "other"] or "name" not in vars(tl.int32):
        return False

    def equal(self: Any, other: Any) -> bool:
        if self is other:
            return True
        if type(self) is tl.dtype and type(other) is tl.dtype:
            return self.name == other.name
        return original(self, other)

    tl.dtype.__eq__ = equal
    return True


def share_shapes() -> bool:
    """Lets blocks and tensors of a shape share it, and their number of elements. Returns as patch_once does."""
    if parameters(tl.block_type) != ["element_ty", "shape"] or parameters(tl.tensor) != ["handle", "type"]:
        return False
    probe = tl.block_type(tl.int32, [4, 2])
    if sorted(vars(probe)) != ["element_ty", "name", "numel", "shape"] or type(probe.shape) is not core.tuple:
        return False
    if probe.name != f"<{probe.shape}, {probe.element_ty}>" or "name" in vars(tl.block_type):
        return False
    if sorted(vars(tl.tensor(None, probe))) != ["dtype", "handle", "numel", "shape", "type"]:
        return False
    block_init: Callable[..., None] = tl.block_type.__init__
    blocks: dict[builtins.tuple[int, ...], builtins.tuple[Any, Any]] = {}
    tensors: dict[builtins.tuple[int, ...], builtins.tuple[Any, Any]] = {}

    def new_block(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = builtins.tuple(x.value if isinstance(x, core.constexpr) else x for x in shape)
        plain = all(type(size) is int for size in sizes)
        kept = blocks.get(sizes) if plain else None
        if kept is None:
            block_init(self, element_ty, shape)
            if plain:
                blocks[sizes] = self.shape, self.numel
            return
        self.element_ty = element_ty
        self.shape, self.numel = kept

    def block_name(self: Any) -> str:
        return f"<{self.shape}, {self.element_ty}>"

    def new_tensor(self: Any, handle: Any, type: Any) -> None:
        shape = builtins.tuple(type.shape) if type.is_block() else ()
        kept = tensors.get(shape)
        if kept is None:
            sizes = core.tuple([core.constexpr(size) for size in shape])
            kept = tensors[shape] = core.constexpr(math.prod(shape)), sizes
        self.numel, self.shape = kept
        self.handle, self.type, self.dtype = handle, type, type.scalar

    tl.block_type.__init__, tl.block_type.name = new_block, property(block_name, lambda self, name: None)
    tl.tensor.__init__ = new_tensor
    return True


def skip_unread_checks(interpreter: Any) -> bool:
    """Leaves out overflow checks of integers, whose results are not read except in debugging.

    Returns as patch_once does.
    """
    semantic: Any = getattr(interpreter, "TritonSemantic", None)
    original: Any = getattr(semantic, "binary_op_sanitize_overflow_impl", None)
    if parameters(original) != ["self", "lhs", "rhs", "binary_op"]:
        return False
    if "if not self.builder.options.debug:\n            return" not in inspect.getsource(semantic.device_assert):
        return False

    def check(self: Any, lhs: Any, rhs: Any, binary_op: Any) -> None:
        if self.builder.options.debug:
            original(self, lhs, rhs, binary_op)

    semantic.binary_op_sanitize_overflow_impl = check
    return True


def install(interpreter: Any) -> dict[str, bool]:
    """Makes all changes. Returns whether each fits this Triton, by name. interpreter: triton.runtime.interpreter."""
    return {
        "patch_once": patch_once(interpreter),
        "list_builtins_once": list_builtins_once(interpreter),
        "keep_numpy_types": keep_numpy_types(interpreter),
        "name_tuples_when_asked": name_tuples_when_asked(),
        "compare_plain_tuples": compare_plain_tuples(),
        "compare_types_by_name": compare_types_by_name(),
        "share_shapes": share_shapes(),
        "skip_unread_checks": skip_unread_checks(interpreter),
    }
