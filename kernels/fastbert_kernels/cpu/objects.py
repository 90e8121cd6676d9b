"""This module compares Python objects with their earlier state, in one call of C++.

The library contains no symbol of Python or PyTorch. It gets the addresses of functions of CPython's stable ABI, and
through them those of PyTorch's. So one build serves all versions of both.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import sysconfig
import types
from array import array
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from fastbert_kernels.cpu import library

# The first members of `struct Python` in objects.cpp.
_FUNCTIONS = (
    "PyDict_Next", "PyDict_Size", "PyDict_GetItemWithError", "PyObject_GenericGetDict", "PyObject_Type", "Py_DecRef",
    "PyErr_Clear", "PyErr_Occurred", "PyLong_AsLongLong", "PyLong_AsVoidPtr",
)  # fmt: skip
_DESCR_GET = 54  # Py_tp_descr_get in typeslots.h
_NO_ARGUMENTS = 4  # METH_NOARGS in methodobject.h
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
_ABSENT = object()
_LIBRARY = Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"


class ObjectRecord:
    """An `ObjectRecord` holds the state of objects when it was made. `holds` tells whether they still have this state.

    `holds` may return False without a change, for example if an equal object replaces another. Then the caller checks
    by itself. It never returns True after a change.

    dicts: dictionaries that keep their keys and values, in their order; objects are compared by identity. empty:
    dictionaries that hold nothing. entries: (dictionary, key); the value is compared, or that there is none. objects:
    the class of each is compared. tensors: the address of each is compared, and PyTorch's count of its writes.

    Raises RuntimeError if no such record can be made: `obstacle` is not None, a dictionary is not empty, or a tensor
    has no address, no count, or its own class.
    """

    def __init__(
        self,
        dicts: Sequence[dict[Any, Any]],
        empty: Sequence[dict[Any, Any]],
        entries: Iterable[tuple[dict[str, Any], str]],
        objects: Sequence[object],
        tensors: Sequence[torch.Tensor],
    ) -> None:
        reason = obstacle()
        if reason is None and any(empty):
            reason = "a dictionary is not empty"
        if reason is None and not _PLAIN.issuperset(map(type, tensors)):
            reason = "a tensor is of a class of its own"
        if reason is not None:
            raise RuntimeError(reason)
        self._compare, self._python, place = _prepared(library.load()[0])
        if place and any(_word_at(tensor, place) != tensor._cdata for tensor in tensors):
            raise RuntimeError("a tensor's object is unlike those of other tensors")
        items = [list(dict.items(each)) for each in dicts]
        values = [(each, key, each.get(key, _ABSENT)) for each, key in entries]
        classes = list(zip(objects, map(type, objects), strict=True))
        words = array("q", [len(items)])
        for each, pairs in zip(dicts, items, strict=True):
            words.extend((id(each), len(pairs), *map(id, chain.from_iterable(pairs))))
        words.extend((len(empty), *map(id, empty), len(values)))
        for each, key, value in values:
            words.extend((id(each), id(key), 0 if value is _ABSENT else id(value)))
        words.extend((len(classes), *map(id, chain.from_iterable(classes)), len(tensors)))
        attributes = [tensor.__dict__ for tensor in tensors]
        for tensor, inside in zip(tensors, attributes, strict=True):
            address, counted = ctypes.c_int64(tensor.data_ptr()).value, tensor._version
            words.extend((id(tensor), id(inside), tensor._cdata, address, counted))
        # The words are addresses of these.
        self._kept = words, items, values, classes, tuple(dicts), tuple(empty), tuple(tensors), attributes
        self._words = words.buffer_info()[0]

    def holds(self) -> bool:
        """Tells whether everything is unchanged."""
        return self._compare(self._python, self._words) == 1


def obstacle() -> str | None:
    """Returns the reason why no `ObjectRecord` can be made in this process, or None if it can."""
    return library.obstacle() or _obstacle_of(library.load()[0])


@functools.lru_cache(8)
def _obstacle_of(loaded: Any) -> str | None:
    if sys.implementation.name != "cpython" or sysconfig.get_config_var("Py_GIL_DISABLED"):
        return "this Python has no lock that holds objects still"
    try:
        _prepared(loaded)
    except (AttributeError, TypeError) as error:
        return f"this Python or PyTorch lacks what it takes: {error}"
    return None


@functools.lru_cache(8)
def _prepared(loaded: Any) -> tuple[Any, int, int]:
    """Returns the function that compares, its first argument, and the second number of `_fast_version`.

    Raises AttributeError or TypeError without them.
    """
    python = ctypes.pythonapi
    slot_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_int)(("PyType_GetSlot", python))
    flags_of = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object)(("PyCFunction_GetFlags", python))
    function_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object)(("PyCFunction_GetFunction", python))
    version, data_ptr = torch.Tensor._version, torch.empty(0, device="cpu").data_ptr
    if type(version) is not types.GetSetDescriptorType:
        raise TypeError("_version is no attribute of C")
    if type(data_ptr) is not types.BuiltinMethodType or flags_of(data_ptr) != _NO_ARGUMENTS:
        raise TypeError("data_ptr is no method of C without arguments")
    functions = [library.address_of(getattr(python, name)) for name in _FUNCTIONS]
    words = [*functions, slot_of(type(version), _DESCR_GET), id(version), function_of(data_ptr)]
    if not all(words):
        raise TypeError("a function has no address")
    version_of, place = _fast_version()
    table = (ctypes.c_void_p * (len(words) + 3))(*words, _fast_address(), version_of, place)
    _forever.append((table, version))
    prototype = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
    return prototype(library.address_of(loaded.fastbert_objects_same)), ctypes.addressof(table), place


def _fast_address() -> int | None:
    """Returns PyTorch's function for code that Inductor generates, `void*(PyObject*)`, or None if there is none."""
    guards = getattr(torch._C, "_dynamo", None)
    address = getattr(getattr(guards, "guards", None), "_torchinductor_pyobject_tensor_data_ptr", None)
    if type(address) is not int or not address:
        return None
    tensor = torch.zeros(3, device="cpu")[1:]
    gives = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object)(address)(tensor)
    return address if gives == tensor.data_ptr() else None


def _fast_version() -> tuple[int | None, int]:
    """Returns PyTorch's `TensorBase::_version() const`, and the place of its argument in a tensor's object, in bytes.

    The argument is the address of a `TensorBase`, which is one pointer. Returns (None, 0) if the function does not
    count as tensors do.
    """
    try:
        version_of = ctypes.CDLL(str(_LIBRARY), mode=os.RTLD_NOLOAD)._ZNK2at10TensorBase8_versionEv
    except (OSError, AttributeError):
        return None, 0
    with torch.inference_mode(False):  # which makes tensors that have no count
        tensor = torch.zeros(3, device="cpu")
    words = range(object.__basicsize__, torch._C.TensorBase.__basicsize__, ctypes.sizeof(ctypes.c_void_p))
    places = [place for place in words if _word_at(tensor, place) == tensor._cdata]
    if len(places) != 1:
        return None, 0
    version_of.argtypes, version_of.restype = [ctypes.c_void_p], ctypes.c_int64
    for _ in range(3):
        if version_of(id(tensor) + places[0]) != tensor._version:
            return None, 0
        tensor.zero_()
    return library.address_of(version_of), places[0]


def _word_at(tensor: torch.Tensor, place: int) -> int | None:
    return ctypes.c_void_p.from_address(id(tensor) + place).value


_forever: list[Any] = []  # whose addresses the library has
