"""Tensors derived from parameters are kept, made anew, written in place, and dropped."""

from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastbert
from fastbert.ops.derived import Derived


class Case:
    """Two parameters, and what is derived from them: counts how often."""

    def __init__(self) -> None:
        self.derived, self.n_made = Derived(), 0
        self.parameters: list[Tensor] = [nn.Parameter(torch.full((2, 3), float(i))) for i in range(2)]

    def make(self) -> tuple[Tensor, ...]:
        self.n_made += 1
        return torch.cat(self.parameters), torch.stack(self.parameters).sum(0).bfloat16()

    def get(self, key: Any = None) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return self.derived.get("a", self.parameters, self.make, key)


def pointers(tensors: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(t.data_ptr() for t in tensors)


def test_kept_and_renewed() -> None:
    """Catches a tensor that is made for every use, or kept although a parameter or the key changed."""
    case = Case()
    first = case.get()
    assert case.get() is first and case.n_made == 1
    assert case.derived.addresses("a", first) == pointers(first)

    def write() -> None:
        with torch.no_grad():
            case.parameters[1].mul_(2.0)

    def replace() -> None:
        case.parameters[0] = nn.Parameter(case.parameters[0].detach() + 3)

    def cast() -> None:
        case.parameters[:] = [p.double() for p in case.parameters]

    def set_data() -> None:
        case.parameters[0].data = case.parameters[0].data * 2

    for turn, change in enumerate((write, replace, cast, set_data)):
        before, changes = case.get(), case.derived.changes
        change()
        after = case.get()
        assert after is not before and case.n_made == turn + 2 and case.derived.changes > changes
        assert torch.equal(after[0], torch.cat(case.parameters))
    assert case.get("another") is not after and case.n_made == 6


def test_silent_writes_are_seen() -> None:
    """Catches old numbers after a write that PyTorch does not count, or new memory, which a graph does not read."""
    case = Case()
    first = case.get()
    at, changes = pointers(first), case.derived.changes
    case.parameters[1].data.mul_(4.0)
    again = case.get()
    assert again is first and pointers(again) == at and case.n_made == 2 and case.derived.changes > changes
    assert (first[0] == torch.tensor([0.0, 0, 4, 4])[:, None]).all() and (first[1] == 4).all()
    assert case.get() is first and case.n_made == 2, "makes it anew more than once"


def test_invalidate_writes_where_it_was() -> None:
    """Catches new numbers in new memory, which a CUDA graph does not read, or old numbers after invalidate."""
    case = Case()
    case.parameters[:] = [nn.Parameter(torch.zeros(64, 64)) for _ in range(2)]
    first = case.get()
    at, changes = pointers(first), case.derived.changes
    case.parameters[1].data[1, 2] = 4.0
    assert case.get() is first and case.n_made == 1, "one number is beside the sample"
    case.derived.invalidate()
    assert case.derived.changes > changes
    again = case.get()
    assert again is first and pointers(again) == at and case.n_made == 2
    assert first[0][65, 2] == 4 and first[1][1, 2] == 4
    assert case.get() is first and case.n_made == 2, "looks again more than once"


def test_a_write_in_place_ends_no_backward_pass() -> None:
    """Catches a count of writes on what a backward pass has saved, which then raises although the numbers are right."""
    case = Case()
    x = torch.ones(1, 3, requires_grad=True)
    out = x @ case.get()[0].T
    case.derived.invalidate()
    case.get()
    out.sum().backward()
    assert x.grad is not None


def test_another_form_is_not_written_in_place() -> None:
    """Catches a copy of a result into memory of another shape."""
    case = Case()
    first = case.get()
    case.parameters[:] = [p.data.view(3, 2) for p in case.parameters]  # same addresses, counts, dtypes
    case.parameters[0].data.add_(1)
    case.derived.invalidate()
    assert case.get()[0].shape == (6, 2) and first[0].shape == (4, 3)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
def test_packed_tensors() -> None:
    """Catches a mechanism that cannot keep what has no address, such as weights in oneDNN's own layout."""
    derived, weight, x = Derived(), nn.Parameter(torch.ones(8, 16)), torch.ones(4, 16)

    def product() -> Tensor:
        ops: Any = torch.ops.mkldnn
        with torch.no_grad():
            (packed,) = derived.get("w", [weight], lambda: (ops._reorder_linear_weight(weight.detach(), None),), "key")
            assert derived.get("w", [weight], lambda: (), "key")[0] is packed
            return ops._linear_pointwise(x, packed, None, "none", [], "")

    assert (product() == 16).all()
    weight.data.mul_(2.0)
    derived.invalidate()
    assert (product() == 32).all()


def test_clear_and_copies() -> None:
    """Catches memory that stays after clear, or that copies and pickles carry along or share."""
    case = Case()
    first, changes = case.get(), case.derived.changes
    for other in (copy.copy(case.derived), copy.deepcopy(case.derived), pickle.loads(pickle.dumps(case.derived))):
        assert type(other) is Derived and other.tensors() == []
    assert len(case.derived.tensors()) == 2
    case.derived.clear()
    assert case.derived.tensors() == [] and case.derived.changes > changes
    assert case.derived.addresses("a", first) == ()
    assert case.get() is not first


def test_what_is_never_kept() -> None:
    """Catches a kept tensor that lost its gradient, or one of inference tensors, whose writes nobody counts."""
    case = Case()
    tracked = case.derived.get("a", case.parameters, case.make)
    assert tracked[0].requires_grad and case.derived.tensors() == []
    assert case.derived.addresses("a", tracked) == ()
    with torch.inference_mode():
        kept = case.get()
    assert not any(t.is_inference() for t in kept), "nobody may write to it outside of inference mode"
    assert case.get() is kept
    with torch.inference_mode():
        case.parameters[1] = torch.ones(2, 3)
        assert case.get() is not case.get()
    compiled = torch.compile(lambda: case.get()[0] + 1, backend="eager", fullgraph=True)
    case.parameters[:] = [torch.zeros(2, 3), torch.zeros(2, 3)]
    held = case.derived.tensors()
    assert (compiled() == 1).all()
    assert all(a is b for a, b in zip(case.derived.tensors(), held, strict=True))


def test_memory_of_a_parameter_that_is_gone() -> None:
    """Catches a successor in the memory of a parameter that is gone, with the same address and count of writes."""
    case = Case()
    for seed in range(200):
        case.parameters[0] = torch.full((2, 3), float(seed))
        assert (case.get()[0][:2] == seed).all()


def test_threads_make_it_once() -> None:
    """Catches two threads that each make what is missing, so that memory doubles or one goes while a graph reads it."""
    case, together = Case(), threading.Barrier(6)
    make = case.make

    def slowly() -> tuple[Tensor, ...]:
        threading.Event().wait(0.02)
        return make()

    def work(_: int) -> tuple[Tensor, ...]:
        together.wait()
        with torch.no_grad():
            return case.derived.get("a", case.parameters, slowly)

    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(work, range(6)))
    assert case.n_made == 1 and all(result is results[0] for result in results)


class OnGpu(torch.Tensor):
    """A tensor on the CPU that says it is on a GPU."""

    is_cuda = True  # type: ignore[assignment]


@pytest.mark.parametrize("capturing", [False, True])
def test_other_streams(capturing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a tensor that another stream reads half written, or that is kept from a capture that has not run."""
    waits: list[Any] = []

    class Stream:
        def synchronize(self) -> None:
            waits.append(bool(case.derived.tensors()))

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    case = Case()
    case.parameters[:] = [torch.zeros(2, 3).as_subclass(OnGpu) for _ in range(2)]
    first = case.get()
    if capturing:
        assert waits == [] and case.derived.tensors() == [] and case.get() is not first
    else:
        assert waits == [False], "published before it was complete"
        case.derived.invalidate()
        case.get()
        assert waits == [False, True]


def test_replicas_do_not_share() -> None:
    """Catches replicas of DataParallel, with parameters of their own, that drop each other's derived weights."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = fastbert.BertModel(fastbert.BertConfig(**sizes))
    attention: Any = model.encoder.layer[0].attention.self
    assert attention._replicate_for_data_parallel().derived is not attention.derived
    assert model._replicate_for_data_parallel().engine.eight_bit.weights is not model.engine.eight_bit.weights
