"""This module derives the classes of accelerated objects from their originals, so that pickle finds them.

A derived class has the `__name__` and the `__module__` of the original, because transformers reads them. Under that
name pickle would find the original. So the metaclass of derived classes has an entry in `copyreg`: a derived class is
pickled as its original and the name of its mixin, and derived again when it is loaded.
"""

from __future__ import annotations

import abc
import copyreg
import functools
from collections.abc import Callable
from typing import Any

from fastbert.adapters.patches import is_own
from fastbert.adapters.state import STATE
from fastbert.ops.tracing import untraced

originals: dict[type, tuple[type, str]] = {}  # A derived class, and its original and the name of its mixin.
derivers: dict[str, Callable[[type], type]] = {}  # The name of a mixin, and the function that derives with it.
_derived: dict[tuple[type, str], type] = {}


class Derived(type):
    """This is the metaclass of derived classes.

    cloudpickle does not use `copyreg` for classes. It makes the class from its bases, and gets the present class here.
    """

    def __new__(mcls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], ours: bool = False, **rest: Any):
        if not ours and len(bases) == 2 and bases[0].__name__ in derivers and bases[0].__module__ == _MIXINS:
            return derivers[bases[0].__name__](bases[1])
        return super().__new__(mcls, name, bases, namespace, **rest)

    def __init__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **rest: Any) -> None:
        rest.pop("ours", None)
        super().__init__(name, bases, namespace, **rest)


class DerivedABC(Derived, abc.ABCMeta):
    """This is the metaclass of derived classes whose originals have abstract methods."""


_MIXINS = "fastbert.adapters.acceleration"
_metaclasses: dict[type, type[Derived]] = {type: Derived, abc.ABCMeta: DerivedABC}


def derived_class(original: type, mixin: str) -> type:
    """Returns the derived class of an original with the mixin of that name. Pickles of derived classes call it."""
    return derivers[mixin](original)


def _reduce_class(kind: type) -> Any:
    if kind in originals:
        return derived_class, originals[kind]
    return kind.__qualname__  # a user's subclass of the derived class, found by its name


for _each in _metaclasses.values():
    copyreg.pickle(_each, _reduce_class)


def _metaclass(original: type) -> type[Derived]:
    theirs = type(original)
    if theirs not in _metaclasses:
        _metaclasses[theirs] = type(f"Derived{theirs.__name__}", (Derived, theirs), {})
        copyreg.pickle(_metaclasses[theirs], _reduce_class)
    return _metaclasses[theirs]


def derive(original: type, mixin: type, method: str, replacement: Any) -> type:
    """Returns the class of accelerated objects of the class `original`.

    Its `method` calls `replacement(self, state, original method, args, kwargs)` if the object has a state, and keeps
    the signature. The original method is looked up at each call: if it was patched, the patch runs, and the state
    counts the call.
    """
    key = original, mixin.__name__
    before = getattr(original, method)
    if key in _derived:
        _derived[key].__dict__[method].__wrapped__ = before  # It may have been patched, or patched back.
        return _derived[key]
    seen = [before if is_own(original, method) else None]  # The method that was last known to be the library's.

    @functools.wraps(before)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        state, before = self.__dict__.get(STATE), getattr(original, method)
        if before is not seen[0] and not _settled(original, method, call, seen) and state is not None:
            state.decline(f"{method} of the class {original.__name__} was patched")
            state = None
        if state is None:
            return getattr(super(kind, self), method)(*args, **kwargs)
        return replacement(self, state, before, args, kwargs)

    call.__module__, call.__name__ = original.__module__, method
    call.__qualname__ = f"{original.__qualname__}.{method}"
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    metaclass: Any = _metaclass(original)
    kind: type = metaclass(original.__name__, (mixin, original), {method: call, **names}, ours=True)
    _derived[key], originals[kind] = kind, key
    return kind


@untraced
def _settled(original: type, method: str, call: Any, seen: list[Any]) -> bool:
    """Says whether the class has its library's method again. The signature follows in either case."""
    call.__wrapped__ = before = getattr(original, method)
    own = is_own(original, method)
    if own:
        seen[0] = before
    return own
