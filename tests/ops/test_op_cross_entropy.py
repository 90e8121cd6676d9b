"""The cross entropy of a linear layer's outputs, and its gradients, are right in the kernels and the plain path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import ops, reference
from fastbert.ops import BackendError, Policy, cross_entropy, softmax_rows
from fastbert.ops.softmax_rows import Terms
from helpers import GUARD, assert_as_accurate, guarded

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRITON, TORCH = Policy("triton", strict=True), Policy("torch")
POLICIES = {"triton": TRITON, "torch": TORCH}
NONE: dict[str, Any] = {}
ALL_TERMS = {"label_smoothing": 0.1, "z_loss": 1e-3}
# numpy, of columns that fill up a row and hold anything
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a few rows, in blocks of fewer, and products in 16 bits of a few columns at a time."""
    for device in cross_entropy.CHUNK_BYTES:
        monkeypatch.setitem(cross_entropy.CHUNK_BYTES, device, 4096)
    monkeypatch.setattr(softmax_rows, "BLOCK_BYTES", 1024)


def inputs(
    n_rows: int, hidden_size: int, n_classes: int, dtype: torch.dtype, device: torch.device, labelled: str = "some"
) -> tuple[list[Tensor], Tensor]:
    """(hidden, weight, bias) and labels, of which "all", "some", "one" or "none" are no -100."""
    hidden, weight, bias = torch.randn(n_rows, hidden_size), torch.randn(n_classes, hidden_size), torch.randn(n_classes)
    labels = torch.randint(n_classes, (n_rows,))
    ignored = {"all": [], "some": range(0, n_rows, 3), "one": range(1, n_rows), "none": range(n_rows)}[labelled]
    labels[list(ignored)] = -100
    return [x.to(device, dtype) for x in (hidden, weight / hidden_size**0.5, bias)], labels.to(device)


def run(function: Any, operands: list[Tensor], factor: float = 1.7) -> list[Tensor]:
    """The loss of function(*operands) and the gradients of factor * loss."""
    leaves = [x.detach().clone().requires_grad_() for x in operands]
    loss = function(*leaves)
    (factor * loss).sum().backward()
    return [loss.detach(), *(x.grad for x in leaves)]  # type: ignore[list-item]


def expected(operands: list[Tensor], labels: Tensor, reduction: str = "mean", **terms: float) -> list[Tensor]:
    """What the reference gives in float64."""

    def loss(*operands: Tensor) -> Tensor:
        losses = reference.linear_cross_entropy(*operands, labels, **terms)
        count = max(1, int((labels != -100).sum()))
        return losses if reduction == "none" else losses.sum() / (count if reduction == "mean" else 1)

    return run(loss, [x.double() for x in operands])


def eager(
    operands: list[Tensor], labels: Tensor, reduction: str, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> list[Tensor]:
    """What plain PyTorch gives in the same dtype, with the loss in float32."""

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows = labels != -100
        logits = F.linear(hidden[rows], weight, bias).float()
        losses = F.cross_entropy(logits, labels[rows], label_smoothing=label_smoothing, reduction="none")
        losses = losses + z_loss * logits.logsumexp(1).square()
        return losses.mean() if reduction == "mean" else losses.new_zeros(len(labels)).masked_scatter(rows, losses)

    return run(loss, operands)


def check(operands: list[Tensor], labels: Tensor, policy: Policy, **terms: float) -> None:
    """The losses of the rows, and the gradients of their mean, obey the numerical policy."""

    def ours(reduction: str) -> list[Tensor]:
        options: Any = {"reduction": reduction, "policy": policy, **terms}
        return run(lambda *x: ops.linear_cross_entropy(*x, labels, **options), operands)

    names = "losses", "hidden", "weight", "bias"
    results = [
        [f("none")[0], *f("mean")[1:]]
        for f in (
            ours,
            lambda reduction: eager(operands, labels, reduction, **terms),
            lambda reduction: expected(operands, labels, reduction, **terms),
        )
    ]
    for name, *each in zip(names, *results, strict=True):
        assert_as_accurate(name, *each)


@pytest.mark.parametrize("terms", [NONE, ALL_TERMS], ids=["plain", "terms"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_classes", [33, 4096, 4099])
@pytest.mark.parametrize("backend", POLICIES)
def test_against_float64(backend, n_classes, dtype, terms, device):
    """Catches an edge of a block of classes left out or counted twice, and sums that lose precision."""
    n_rows = 16 if dtype == torch.float32 else 64  # the error of few losses in 16 bits is chance
    check(*inputs(n_rows, 24, n_classes, dtype, device, "all"), POLICIES[backend], **terms)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("labelled", ["all", "some"])
@pytest.mark.parametrize("backend", POLICIES)
def test_chunks(backend, labelled, dtype, device, small_chunks):
    """Catches a chunk that is left out, computed from another chunk's logits, or rounded when it is added."""
    operands, labels = inputs(61, 40, 131, dtype, device, labelled)
    check(operands, labels, POLICIES[backend], **ALL_TERMS)


def test_scratch_holds_anything(device, small_chunks, poisoned):
    """Catches a kernel that takes what was in the memory of logits before them, or writes beyond it."""
    operands, labels = inputs(40, 24, 67, torch.float32, device)
    check(operands, labels, TRITON, **ALL_TERMS)
    poisoned.check()


@pytest.mark.parametrize("n_classes", [1, 2, 500])
@pytest.mark.parametrize("backend", POLICIES)
def test_one_row(backend, n_classes, device):
    """Catches a row alone, or a class alone, whose loss is 0, that is computed otherwise than many."""
    for labelled, n_rows in (("all", 1), ("one", 9)):
        operands, labels = inputs(n_rows, 24, n_classes, torch.float32, device, labelled)
        ours = run(lambda *x, y=labels: ops.linear_cross_entropy(*x, y, policy=POLICIES[backend]), operands)
        for mine, other in zip(ours, expected(operands, labels), strict=True):
            torch.testing.assert_close(mine.double(), other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("terms", [NONE, ALL_TERMS], ids=["plain", "terms"])
@pytest.mark.parametrize("labelled", ["all", "some", "one"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions(reduction, labelled, terms, small_chunks):
    """Catches a mean over all rows, losses at other rows than their labels', or a term that is not reduced."""
    operands, labels = inputs(23, 16, 61, torch.float64, torch.device("cpu"), labelled)
    ours = run(lambda *x: ops.linear_cross_entropy(*x, labels, reduction=reduction, **terms), operands)
    for mine, other in zip(ours, expected(operands, labels, reduction, **terms), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-14)
    theirs = F.cross_entropy(F.linear(*operands), labels, reduction=reduction, label_smoothing=0.1)
    mine = ops.linear_cross_entropy(*operands, labels, reduction=reduction, label_smoothing=0.1)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backend", POLICIES)
def test_without_bias(backend, device):
    """Catches a bias that is read though absent, or a gradient for it."""
    (hidden, weight, bias), labels = inputs(6, 16, 50, torch.float32, device)
    zero = torch.zeros_like(bias)
    ours = run(lambda *x: ops.linear_cross_entropy(*x, None, labels, policy=POLICIES[backend]), [hidden, weight])
    for mine, other in zip(ours, expected([hidden, weight, zero], labels)[:3], strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n_rows", [0, 5])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", POLICIES)
def test_no_label_at_all(backend, reduction, n_rows, device):
    """Catches a loss that is NaN without any label, or gradients that are None or not zero."""
    operands, labels = inputs(n_rows, 8, 12, torch.float32, device, "none")
    operands[0][:] = float("nan")  # what nobody asked for
    ours = run(lambda *x: ops.linear_cross_entropy(*x, labels, reduction=reduction, policy=POLICIES[backend]), operands)
    assert ours[0].shape == ((n_rows,) if reduction == "none" else ())
    for value, like in zip(ours, [ours[0], *operands], strict=True):
        assert torch.equal(value, torch.zeros_like(like))


@pytest.mark.parametrize("backend", POLICIES)
def test_rows_without_label_enter_nothing(backend, device, small_chunks):
    """Catches an ignored row that enters a product, where it is NaN."""
    operands, labels = inputs(31, 16, 70, torch.float32, device)
    ignored = labels == -100
    clean = run(lambda *x: ops.linear_cross_entropy(*x, labels, policy=POLICIES[backend]), operands)
    operands[0][ignored] = float("nan")
    dirty = run(lambda *x: ops.linear_cross_entropy(*x, labels, policy=POLICIES[backend]), operands)
    for mine, other in zip(dirty, clean, strict=True):
        assert torch.equal(mine, other)
    assert (clean[1][ignored] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_stay_inside(dtype, device, poisoned):
    """Catches a kernel that reads or writes beyond a row, or leaves a number of its output unwritten."""
    from fastbert_kernels.cross_entropy import cross_entropy_backward, cross_entropy_forward

    logits, bias = torch.randn(5, 4112).to(device, dtype), torch.randn(4112).to(device, dtype)
    logits[:, 4097:] = bias[4097:] = float("nan")  # columns that fill up a row
    labels = guarded(torch.tensor([0, 4096, 17, -100, 4095], device=device))
    rows, terms = guarded(logits, extra_columns=7), (4097, -100, 0.1, 1e-3)
    statistics = cross_entropy_forward(rows, guarded(bias), labels, *terms)
    poisoned.check()
    assert rows[:, :4097].equal(logits[:, :4097])
    scale = guarded(torch.tensor([1.0, 0.5, 2.0, 3.0, -1.0], device=device))
    cross_entropy_backward(rows, guarded(bias), labels, *statistics[1:], scale, *terms)
    assert (rows[:, 4097:] == 0).all() and torch.as_strided(rows, (4, 7), (4119, 1), GUARD + 4112).isnan().all()
    leaf = logits[:, :4097].double().requires_grad_()
    identity = torch.eye(4097, dtype=torch.float64, device=device)
    losses = reference.linear_cross_entropy(leaf, identity, bias[:4097].double(), labels, *terms[1:])
    losses.backward(scale.double())
    assert statistics[0][3] == 0 and (rows[3] == 0).all()
    torch.testing.assert_close(statistics[0].double(), losses.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rows[:, :4097].double(), leaf.grad, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("offset", [0.0, 300.0, -300.0])
@pytest.mark.parametrize("backend", POLICIES)
def test_sure_rows(backend, offset, device):
    """Catches a loss that is the difference of two large numbers, and an exponential that overflows."""
    operands, labels = inputs(6, 16, 300, torch.float32, device, "all")
    hidden, weight, bias = operands
    bias += offset
    with torch.no_grad():
        weight[labels[:3]] += 4 * hidden[:3] / hidden[:3].norm(dim=1, keepdim=True)
        hidden[:3] *= 4
    check([hidden, weight, bias], labels, POLICIES[backend], **ALL_TERMS)
    check([hidden, weight, bias], labels, POLICIES[backend])


def test_gradcheck(small_chunks):
    """Catches a backward pass that is not the derivative of the forward one, for any operand and term."""
    operands, labels = inputs(40, 3, 19, torch.float64, torch.device("cpu"))
    leaves = [x.requires_grad_() for x in operands]
    for reduction in ("mean", "none"):
        for terms in (NONE, ALL_TERMS):
            assert torch.autograd.gradcheck(
                lambda *x, r=reduction, t=terms: ops.linear_cross_entropy(*x, labels, reduction=r, **t), leaves
            )


@pytest.mark.parametrize("backend", POLICIES)
def test_same_bits(backend, device, small_chunks):
    """Catches another result of a second backward pass, which has no kept logits, or of the same call again."""
    operands, labels = inputs(61, 40, 131, torch.float32, device)
    leaves = [x.requires_grad_() for x in operands]
    gradients = []
    for _ in range(2):
        loss = ops.linear_cross_entropy(*leaves, labels, policy=POLICIES[backend])
        gradients += [torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2)]
    for other in gradients[1:]:
        assert all(map(torch.equal, gradients[0], other))


def test_threads_change_no_bit(number_of_threads):
    """Catches sums over the classes, or of the bias's gradient over rows, whose order follows the threads."""
    logits, labels = torch.randn(300, 5003), torch.randint(5003, (300,))
    results = []
    for n_threads in (1, 2):
        torch.set_num_threads(n_threads)
        losses, statistics = softmax_rows.forward(logits, labels, Terms(0.1, 1e-3))
        x, grad_bias = logits.clone(), torch.zeros(5003)
        softmax_rows.backward(x, labels, statistics, losses, Terms(0.1, 1e-3), grad_bias)
        results.append((losses, x, grad_bias))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_frozen_operands(frozen, small_chunks):
    """Catches a gradient for an operand that wants none, or one that another's absence changes."""
    operands, labels = inputs(30, 8, 70, torch.float32, torch.device("cpu"))
    every = run(lambda *x: ops.linear_cross_entropy(*x, labels), operands, 1.0)[1:]
    leaves = [x.clone().requires_grad_(i != frozen) for i, x in enumerate(operands)]
    ops.linear_cross_entropy(*leaves, labels).backward()
    for i, (leaf, gradient) in enumerate(zip(leaves, every, strict=True)):
        assert leaf.grad is None if i == frozen else torch.equal(leaf.grad, gradient)


@pytest.mark.parametrize("backend", POLICIES)
def test_autocast(backend, device, small_chunks):
    """Catches products outside of autocast's dtype, or gradients of masters that are not float32 or less exact."""
    operands, labels = inputs(61, 40, 131, torch.float32, device)
    policy = POLICIES[backend]

    def loss(*operands: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return ops.linear_cross_entropy(*operands, labels, reduction="sum", policy=policy)

    def plain(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return F.cross_entropy(F.linear(hidden, weight, bias).float(), labels, reduction="sum")

    ours, theirs = run(loss, operands), run(plain, operands)
    low = [x.bfloat16() for x in operands]
    exact = expected(low, labels, "sum")
    for name, *results in zip(("hidden", "weight", "bias"), ours[1:], theirs[1:], exact[1:], strict=True):
        assert results[0].dtype == torch.float32
        assert_as_accurate(name, *results)
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-3, atol=0.0)
    mixed = run(loss, [low[0], *operands[1:]])
    assert torch.equal(mixed[0], ours[0]) and mixed[1].dtype == torch.bfloat16 and mixed[2].dtype == torch.float32


def test_changed_weight_is_noticed():
    """Catches gradients of a weight that has changed in place since the forward pass."""
    operands, labels = inputs(5, 8, 12, torch.float32, torch.device("cpu"))
    leaves = [x.requires_grad_() for x in operands]
    loss = ops.linear_cross_entropy(*leaves, labels)
    with torch.no_grad():
        leaves[1].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_second_derivative_is_refused():
    """Catches second derivatives that are silently wrong."""
    operands, labels = inputs(5, 8, 12, torch.float32, torch.device("cpu"))
    leaves = [x.requires_grad_() for x in operands]
    loss = ops.linear_cross_entropy(*leaves, labels)
    with pytest.raises(RuntimeError, match="cross_entropy: its gradient cannot be differentiated again"):
        torch.autograd.grad(loss, leaves, create_graph=True)


def test_transforms_and_export():
    """Catches a transform that meets a look at the labels, or another loss there than without it."""
    (hidden, weight, bias), labels = inputs(9, 8, 30, torch.float64, torch.device("cpu"))

    def loss(weight: Tensor, labels: Tensor = labels) -> Tensor:
        return ops.linear_cross_entropy(hidden, weight, bias, labels, **ALL_TERMS)

    leaf = weight.clone().requires_grad_()
    loss(leaf).backward()
    torch.testing.assert_close(torch.func.grad(loss)(weight), leaf.grad, rtol=1e-12, atol=1e-14)
    none = torch.full_like(labels, -100)
    assert torch.func.vmap(loss, (None, 0))(weight, none[None]) == loss(weight, none) == 0


def test_memory_is_that_of_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches logits, or probabilities, of more rows than a chunk's, in the forward or the backward pass."""
    from torch.utils._python_dispatch import TorchDispatchMode

    n_rows, n_classes = 256, 1024
    monkeypatch.setitem(cross_entropy.CHUNK_BYTES, "cpu", 16 * n_classes * 4)
    operands, labels = inputs(n_rows, 8, n_classes, torch.float32, torch.device("cpu"), "all")
    sizes: list[int] = []

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = op(*args, **(kwargs or {}))
            outputs = out if isinstance(out, (tuple, list)) else (out,)
            sizes.extend(x.untyped_storage().nbytes() for x in outputs if isinstance(x, Tensor))
            return out

    saved: list[Tensor] = []
    leaves = [x.requires_grad_() for x in operands]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x), Largest():
        ops.linear_cross_entropy(*leaves, labels).backward()
    assert max(sizes) == 16 * n_classes * 4
    assert sum(x.numel() for x in saved) <= sum(x.numel() for x in operands) + 3 * n_rows + 10


@pytest.mark.parametrize("least", [-5, 3])
@pytest.mark.parametrize("backend", POLICIES)
def test_labels_out_of_range(backend, least, device):
    """Catches a label that reads beyond the logits, or an error that does not say which labels came."""
    operands, labels = inputs(9, 8, 30, torch.float32, device)
    labels[1], labels[4] = least, 35 if least >= 0 else 20
    greatest = int(labels.max())
    least = int(labels[labels != -100].min())
    message = f"^labels: expected classes from 0 to 29, or -100 for none, got values from {least} to {greatest}$"
    with pytest.raises(ValueError, match=message):
        ops.linear_cross_entropy(*operands, labels, policy=POLICIES[backend])
    moved = torch.where(labels == -100, 7, labels.clamp(0, 29))
    ops.linear_cross_entropy(*operands, moved, ignore_index=7, policy=POLICIES[backend])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.ones(3, 5)}, ValueError, "hidden, weight: expected"),
        ({"bias": torch.ones(3)}, ValueError, r"bias: expected shape \(6,\), got \(3,\)"),
        ({"labels": torch.ones(2).long()}, ValueError, r"labels: expected shape \(3,\), got \(2,\)"),
        ({"labels": torch.ones(3)}, TypeError, "labels: expected integers, got torch.float32"),
        ({"labels": torch.ones(3, device="meta").long()}, ValueError, "labels: expected a tensor on the device"),
        ({"weight": torch.ones(6, 4).double()}, TypeError, "expected one dtype, got torch.float32, torch.float64"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing: expected a number from 0 to 1, got 1.5"),
        ({"z_loss": -1.0}, ValueError, "z_loss: expected a finite number from 0 on, got -1.0"),
        ({"reduction": "max"}, ValueError, "reduction: expected one of mean, sum, none, got 'max'"),
        ({"policy": Policy(batch_invariant=True)}, BackendError, "cross_entropy: its products have as many rows"),
    ],
)
def test_bad_arguments(change, error, message):
    """Catches a wrong argument that broadcasts, or fails without its name."""
    arguments: dict[str, Any] = {
        "hidden": torch.ones(3, 4), "weight": torch.ones(6, 4), "bias": torch.ones(6), "labels": torch.ones(3).long(),
        **change,
    }  # fmt: skip
    operands = [arguments.pop(name) for name in ("hidden", "weight", "bias", "labels")]
    with pytest.raises(error, match=message):
        ops.linear_cross_entropy(*operands, **arguments)


def test_float64_has_no_kernel(device):
    """Catches float64 that is rounded to the kernels' float32."""
    operands, labels = inputs(4, 8, 12, torch.float64, device)
    with pytest.raises(BackendError, match="cross_entropy: .*there are no Triton kernels for torch.float64"):
        ops.linear_cross_entropy(*operands, labels, policy=TRITON)
    assert ops.linear_cross_entropy(*operands, labels, policy=Policy("triton")).dtype == torch.float64
