"""The tests of batch invariance on CPUs share models and checks."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from fastbert import (
    BertConfig,
    BertModel,
)
from fastbert.ops import Policy
from fastbert.ops.packing import from_cu_seqlens
from fastbert_kernels import cpu
from helpers import cu_seqlens_of

CPU = torch.device("cpu")
INVARIANT = Policy(batch_invariant=True)
DTYPES = (torch.float32, torch.bfloat16)
LENGTHS = [1, 2, 3, 5, 9, 16, 17, 30, 64, 90]
SIZES: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96,
    "max_position_embeddings": 200,
}  # fmt: skip


def skip_without(dtype: torch.dtype, precision: str | None = None) -> None:
    if not cpu.multiplies(dtype):
        pytest.skip(f"the kernels do not multiply {dtype} here")
    if precision is not None and cpu.int8_obstacle() is not None:
        pytest.skip(str(cpu.int8_obstacle()))


def make(
    dtype: torch.dtype = torch.float32,
    precision: str | None = None,
    kind: Any = BertModel,
    options: Any = None,
    **sizes: Any,
) -> Any:
    """A batch-invariant model, or one with `options`, with weights that make rows differ."""
    torch.manual_seed(1)
    model = kind(BertConfig(**{**SIZES, **sizes}), **({"batch_invariant": True} if options is None else options),
                 precision=precision)  # fmt: skip
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.3)
    return model.eval().to(dtype)


def run_packed(model: Any, texts: list[Tensor], keep_states: bool = False) -> list[Tensor]:
    """The last hidden state of each text, or all states with keep_states, and the vector of the pooler."""
    lengths = [len(text) for text in texts]
    batch = from_cu_seqlens(cu_seqlens_of(lengths), sum(lengths), CPU)
    with torch.inference_mode():
        states = model.encode_packed(batch, torch.cat(texts), keep_states=keep_states)
        pooled = model.pooler(states[-1], batch, model.policy)
    each = torch.stack(states, 1).flatten(1).split(lengths)
    return [torch.cat([own.flatten(), vector]) for own, vector in zip(each, pooled, strict=True)]


def assert_invariant(model: Any, batchings: int, keep_states: bool = False, lengths: list[int] = LENGTHS) -> None:
    """Each text gives the same bits in random batches, in any order and with any number of threads, as alone."""
    torch.manual_seed(2)
    texts = [torch.randint(0, model.config.vocab_size, (n,)) for n in lengths]
    torch.set_num_threads(1)
    alone = [run_packed(model, [text], keep_states)[0] for text in texts]
    assert all(own.isfinite().all() for own in alone)
    generator = random.Random(0)
    for _ in range(batchings):
        chosen = generator.choices(range(len(lengths)), k=generator.randint(1, 6))
        torch.set_num_threads(2 if generator.random() < 0.1 else 1)
        for i, own in zip(chosen, run_packed(model, [texts[i] for i in chosen], keep_states), strict=True):
            assert torch.equal(own, alone[i]), f"text {i} of {lengths[i]} tokens differs in the batch {chosen}"
