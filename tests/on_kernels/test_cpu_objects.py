"""A record of Python objects notices every change that it names, whichever way PyTorch gives addresses and counts."""

from __future__ import annotations

import gc
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fastbert_kernels.cpu import ObjectRecord, library, objects

pytestmark = pytest.mark.skipif(objects.obstacle() is not None, reason=f"no records: {objects.obstacle()}")


@pytest.fixture(params=["fast", "address by method", "all by Python's ways"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The ways to a tensor's address, by the function for Inductor's code or the method, and to its count of writes."""
    if request.param != "fast":
        monkeypatch.setattr(objects, "_fast_address", lambda: None)
    elif objects._fast_address() is None:
        pytest.skip("this PyTorch has no such function")
    if request.param == "all by Python's ways":
        monkeypatch.setattr(objects, "_fast_version", lambda: (None, 0))
    elif objects._fast_version() == (None, 0):
        pytest.skip("this PyTorch has no such function")
    objects._prepared.cache_clear()
    yield
    objects._prepared.cache_clear()


class Thing:
    pass


class Other:
    pass


class Case:
    """Objects of every kind, and a record of them."""

    def __init__(self, mode: bool = False) -> None:
        self.thing, self.value = Thing(), 12.5
        self.dict: dict[str, Any] = {"a": self.thing, "b": None, "c": 3000}
        self.ordered: OrderedDict[str, Any] = OrderedDict(x=1, y=2)
        self.empty: dict[str, Any] = {}
        self.entries = {"eps": self.value, "training": False}
        self.weight = torch.nn.Parameter(torch.randn(3, 4))
        self.buffer = torch.randn(5)[1:]
        self.record = self.make()

    def make(self) -> ObjectRecord:
        entries = [(self.entries, name) for name in ("eps", "training", "forward")]
        tensors = [self.weight, self.buffer]
        return ObjectRecord([self.dict, self.ordered], [self.empty], entries, [self.thing, self.weight], tensors)


def replace_value(case: Case) -> None:
    case.dict["a"] = Thing()


def set_to_none(case: Case) -> None:
    case.dict["a"] = None


def rename(case: Case) -> None:
    case.dict["d"] = case.dict.pop("c")


def add_key(case: Case) -> None:
    case.ordered["z"] = 3


def remove_key(case: Case) -> None:
    del case.ordered["y"]


def fill(case: Case) -> None:
    case.empty[""] = None


def change_entry(case: Case) -> None:
    case.entries["eps"] = 13.5


def delete_entry(case: Case) -> None:
    del case.entries["training"]


def add_entry(case: Case) -> None:
    case.entries["forward"] = False


def change_class(case: Case) -> None:
    case.thing.__class__ = Other


def change_class_of_tensor(case: Case) -> None:
    case.weight.__class__ = type("Mine", (torch.nn.Parameter,), {})


def write(case: Case) -> None:
    with torch.no_grad():
        case.weight.mul_(2)


def write_to_view(case: Case) -> None:
    case.buffer[:2].zero_()


def write_in_inference_mode(case: Case) -> None:
    with torch.inference_mode():
        case.buffer.zero_()


def other_data(case: Case) -> None:
    case.weight.data = case.weight.data.clone()


def other_storage(case: Case) -> None:
    case.buffer.set_(torch.zeros(4))  # type: ignore[call-overload]


def swap(case: Case) -> None:
    torch.utils.swap_tensors(case.weight, torch.nn.Parameter(torch.randn(3, 4)))


def swap_for_sparse(case: Case) -> None:
    torch.utils.swap_tensors(case.weight, torch.nn.Parameter(torch.randn(3, 4).to_sparse(), requires_grad=False))


def share_memory(case: Case) -> None:
    case.buffer.share_memory_()


CHANGES = [
    replace_value, set_to_none, rename, add_key, remove_key, fill, change_entry, delete_entry, add_entry, change_class,
    change_class_of_tensor, write, write_to_view, write_in_inference_mode, other_data, other_storage, swap,
    swap_for_sparse, share_memory,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changes(change: Callable[[Case], None]) -> None:
    """Catches a change that a record lets pass, an error that it raises or leaves behind, and a new record of old."""
    case = Case()
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            assert case.record.holds()
    change(case)
    for _ in range(3):
        assert not case.record.holds()
    try:
        fresh = case.make()
    except RuntimeError:
        assert change in (fill, change_class_of_tensor, swap_for_sparse)
    else:
        assert fresh.holds() and not case.record.holds()


def test_what_is_no_change() -> None:
    """Catches a record that says no after something that it does not name, or that was taken back."""
    case = Case()
    case.weight.requires_grad_(False)
    case.weight.grad = torch.ones(3, 4)
    case.dict["a"], case.thing.more = case.dict["a"], 1  # type: ignore[attr-defined]
    case.empty["hook"] = 1
    del case.empty["hook"]
    (case.weight * 2).sum()
    case.entries["more"] = True
    assert case.record.holds()


def test_what_has_no_record() -> None:
    """Catches a record of what it could not compare."""
    with torch.inference_mode():
        inference = torch.zeros(2)
    wrong: list[tuple[Any, Any]] = [
        ([{1: 2}], []), ([], [inference]), ([], [torch.zeros(2).to_sparse()]),
        ([], [torch.zeros(1).as_subclass(type("Mine", (torch.Tensor,), {}))]),
    ]  # fmt: skip
    for empty, tensors in wrong:
        with pytest.raises(RuntimeError):
            ObjectRecord([], empty, [], [], tensors)
    assert ObjectRecord([], [], [], [], []).holds()
    assert ObjectRecord([], [], [], [], [torch.empty(2, device="meta")]).holds()


def test_references() -> None:
    """Catches an object whose count of references grows or shrinks with each look, and one that outlives its record."""
    case, alone = Case(), torch.nn.Parameter(torch.zeros(3))
    record = ObjectRecord([case.dict], [], [(case.entries, "eps")], [case.thing], [alone])
    watched = [case.dict, case.thing, case.value, Thing, alone, alone.__dict__, case.entries]
    before = [sys.getrefcount(each) for each in watched]
    for i in range(100):
        assert record.holds() == (i < 50)
        if i == 49:
            with torch.no_grad():
                alone.add_(1)
    assert [sys.getrefcount(each) for each in watched] == before
    gone = weakref.ref(alone)
    gc.disable()
    try:
        del record, watched, alone
        assert gone() is None
    finally:
        gc.enable()


def test_a_python_without_the_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an error at import, or an obstacle without a reason, where CPython or PyTorch have changed."""
    monkeypatch.setattr(objects, "_FUNCTIONS", (*objects._FUNCTIONS[:-1], "PyLong_HasNoSuchFunction"))
    objects._obstacle_of.cache_clear()
    try:
        assert "PyLong_HasNoSuchFunction" in str(objects.obstacle())
        with pytest.raises(RuntimeError, match="PyLong_HasNoSuchFunction"):
            ObjectRecord([], [], [], [], [])
        objects._obstacle_of.cache_clear()
        monkeypatch.setattr(library, "obstacle", lambda: "no compiler")
        assert objects.obstacle() == "no compiler"
        monkeypatch.undo()
        monkeypatch.setattr(objects.sysconfig, "get_config_var", lambda name: 1)
        assert "no lock" in str(objects.obstacle())
    finally:
        monkeypatch.undo()
        objects._obstacle_of.cache_clear()
    assert objects.obstacle() is None
