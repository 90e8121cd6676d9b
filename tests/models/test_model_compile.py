"""A model under torch.compile gives what the model gives."""

from __future__ import annotations

import shutil

import pytest
import torch

from model_cases import (
    GRADIENT_BOUND,
    assert_close,
    assert_gradients,
    both_with_gradients,
    make_batch,
    mask,
    place,
    run,
    theirs,
    trainable,
    twin,
)


@pytest.mark.parametrize(("compiler", "backend"), [("eager", "cpu"), ("aot_eager", "triton")])
def test_compiled_is_the_same(compiler: str, backend: str, device: torch.device) -> None:
    """Catches a shape, a mask or a length that a compiled model keeps from the batch before."""
    model = theirs("BertModel", "tiny", num_hidden_layers=1)
    ours = twin(model, torch.float32, backend, place(backend, device))
    compiled = torch.compile(ours, backend=compiler)
    wide, narrow = make_batch("right"), {n: t[:3, :7] for n, t in make_batch("holes").items()}
    try:
        for batch in (wide, narrow, wide | {"attention_mask": mask("left")}):
            output, expected = run(compiled, batch), run(ours, batch)
            assert_close("last_hidden_state", output.last_hidden_state, expected.last_hidden_state, 1e-6)
            assert_close("pooler_output", output.pooler_output, expected.pooler_output, 1e-6)
    finally:
        torch._dynamo.reset()


def test_compiled_trains() -> None:
    """Catches a compiled model whose gradients are not those of the model."""
    model = trainable("tiny", num_hidden_layers=1)
    ours, batch = twin(model), make_batch("right")
    try:
        compiled = torch.compile(ours, backend="aot_eager")
        both_with_gradients(compiled, [model], batch)
    finally:
        torch._dynamo.reset()
    assert_gradients(ours, model, GRADIENT_BOUND)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler for the CPU")
def test_inductor_is_the_same() -> None:
    """Catches code that inductor generates for the plain path computing something else."""
    model = theirs("BertModel", "tiny", num_hidden_layers=1)
    ours = twin(model, torch.float32)
    compiled = torch.compile(ours)
    try:
        for kind in ("right", "holes"):
            batch = make_batch(kind)
            assert_close("last_hidden_state", run(compiled, batch)[0], run(ours, batch)[0], 1e-6)
    finally:
        torch._dynamo.reset()
