"""Bad input to the models gets an error that names the argument, what came and what was expected."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastbert
from helpers import cu_seqlens_of, exactly
from model_cases import (
    BATCH,
    HEADS,
    LENGTH,
    MODELS,
    POSITIONS,
    TYPES,
    VOCAB,
    in_dtype,
    make_batch,
    randn,
    run,
    theirs,
    to_device,
    twin,
    valid_of,
)


@pytest.fixture
def model() -> Any:
    """A small BertModel in float32."""
    return twin(theirs(), torch.float32)


@pytest.fixture
def batch() -> dict[str, Any]:
    """(4, 13), padded on the right."""
    return make_batch("right")


# Ids
@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize(
    ("name", "size"), [("input_ids", VOCAB), ("token_type_ids", TYPES), ("position_ids", POSITIONS)]
)
def test_ids_outside_their_table(
    name: str, size: int, backend: str, device: torch.device, batch: dict[str, Any]
) -> None:
    """Catches an id outside its table that reaches a kernel, which would read foreign memory."""
    ours = twin(theirs(), torch.float32, backend, device if backend == "triton" else "cpu")
    for wrong in (size, 10**9, -1, -100):
        bad = batch[name].clone()
        bad[1, 8] = wrong  # the last token of row 1
        with pytest.raises(IndexError, match=exactly(f"{name}: expected values from 0 to {size - 1}, got {wrong}")):
            run(ours, {**batch, name: bad})
    bad = batch[name].clone()
    bad[1, 8] = size - 1
    assert run(ours, {**batch, name: bad})[0].isfinite().all()


@pytest.mark.parametrize("wrong", [-1, -100, VOCAB, 2**40])
def test_ids_outside_at_padding_are_ignored(wrong: int, model: Any, batch: dict[str, Any]) -> None:
    """Catches -1 or -100 at padding, as collators have it, that is refused or read."""
    padding = ~valid_of(batch["attention_mask"])
    dirty = {**batch, "input_ids": batch["input_ids"].masked_fill(padding, wrong)}
    assert torch.equal(run(model, dirty)[0], run(model, batch)[0])
    with pytest.raises(IndexError, match="input_ids: expected values from 0 to 100"):
        run(model, {**dirty, "attention_mask": None})


@pytest.mark.parametrize("options", [{}, {"output_attentions": True}])
def test_ids_are_checked_on_the_reference_path_too(options: dict[str, bool], batch: dict[str, Any]) -> None:
    """Catches output_attentions skipping the checks, so that negative ids count from the end."""
    ours = twin(theirs(), torch.float32, strict=False)
    for name in ("input_ids", "token_type_ids", "position_ids"):
        with pytest.raises(IndexError, match=rf"^{name}: expected values from 0 to \d+, got -1$"):
            run(ours, {**batch, name: torch.full((BATCH, LENGTH), -1)}, **options)


def test_longer_than_the_position_table(model: Any) -> None:
    """Catches a text that is too long and is cut or wrapped around in silence, or padding that counts as tokens."""
    message = exactly(f"position_ids: expected values from 0 to {POSITIONS - 1}, got {POSITIONS}")
    ids = torch.ones(1, POSITIONS + 1, dtype=torch.long)
    for mask in (None, torch.ones_like(ids)):
        with pytest.raises(IndexError, match=message):
            run(model, {"input_ids": ids, "attention_mask": mask})
    with pytest.raises(IndexError, match=message):
        model.forward_packed(ids[0], cu_seqlens_of([POSITIONS + 1]))
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    output = run(model, {"input_ids": ids, "attention_mask": mask})[0]
    assert output.shape == (1, POSITIONS + 1, 32) and (output[0, -1] == 0).all()
    assert model.forward_packed(ids[0], cu_seqlens_of([POSITIONS, 1])).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.uint8, torch.int16])
@pytest.mark.parametrize("name", ["input_ids", "token_type_ids", "position_ids"])
def test_ids_of_the_wrong_dtype(name: str, dtype: torch.dtype, model: Any, batch: dict[str, Any]) -> None:
    """Catches ids that are no whole numbers, or too small to hold a vocabulary, rounded or cast in silence."""
    with pytest.raises(TypeError, match=exactly(f"{name}: expected dtype int64 or int32, got {dtype}")):
        run(model, {**batch, name: torch.ones(BATCH, LENGTH, dtype=dtype)})


@pytest.mark.parametrize("name", ["input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds"])
def test_what_is_no_tensor(name: str, model: Any, batch: dict[str, Any]) -> None:
    """Catches a list that ends in an AttributeError which does not say which argument it was."""
    if name == "inputs_embeds":
        batch = {}
    with pytest.raises(TypeError, match=exactly(f"{name}: expected a tensor, got list")):
        model(**{**batch, name: [[1, 2], [3, 4]]})


# Shapes
@pytest.mark.parametrize(
    ("shape", "hint"),
    [
        ((BATCH, LENGTH - 1), ""),
        ((BATCH - 1, LENGTH), ""),
        ((2, LENGTH), ""),
        ((LENGTH,), ""),
        ((LENGTH, BATCH), ""),
        ((BATCH, LENGTH, LENGTH), " (masks of pairs of tokens are not supported)"),
        ((BATCH, 1, 1, LENGTH), " (masks of pairs of tokens are not supported)"),
    ],
)
def test_mask_of_the_wrong_shape(shape: tuple[int, ...], hint: str, model: Any, batch: dict[str, Any]) -> None:
    """Catches a mask that broadcasts, or a 3-D one whose pairs are dropped in silence."""
    message = f"attention_mask: expected shape ({BATCH}, {LENGTH}) as input_ids, got {shape}{hint}"
    with pytest.raises(ValueError, match=exactly(message)):
        run(model, {**batch, "attention_mask": torch.ones(shape)})


@pytest.mark.parametrize("name", HEADS)
def test_mask_of_pairs_to_a_head(name: str) -> None:
    """Catches a head that reshapes a 3-D mask on its way to the encoder."""
    batch = make_batch("none", name)
    shape = batch["input_ids"].shape
    batch["attention_mask"] = torch.ones(*shape, shape[-1])
    with pytest.raises(ValueError, match=r"^attention_mask: expected shape \(4, 13\) .*pairs of tokens are not"):
        run(twin(theirs(name)), batch)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("input_ids", (LENGTH,), "input_ids: expected shape (B, S), got (13,)"),
        ("input_ids", (2, 2, LENGTH), "input_ids: expected shape (B, S), got (2, 2, 13)"),
        ("token_type_ids", (2, LENGTH), "token_type_ids: expected shape (4, 13) as input_ids, got (2, 13)"),
        ("token_type_ids", (BATCH, 12), "token_type_ids: expected shape (4, 13) as input_ids, got (4, 12)"),
        ("position_ids", (LENGTH,), "position_ids: expected shape (4, 13), got (13,)"),
        ("position_ids", (BATCH, 1), "position_ids: expected shape (4, 13), got (4, 1)"),
        ("position_ids", (BATCH + 1, LENGTH), "position_ids: expected shape (4, 13), got (5, 13)"),
    ],
)
def test_ids_of_the_wrong_shape(
    name: str, shape: tuple[int, ...], message: str, model: Any, batch: dict[str, Any]
) -> None:
    """Catches ids that broadcast against one another in silence."""
    with pytest.raises(ValueError, match=exactly(message)):
        run(model, {**batch, name: torch.ones(shape, dtype=torch.long)})


@pytest.mark.parametrize("options", [{}, {"output_attentions": True}])
@pytest.mark.parametrize(
    ("embeds", "error", "message"),
    [
        (torch.zeros(4, 13), ValueError, "inputs_embeds: expected shape (B, S, H), got (4, 13)"),
        (
            torch.zeros(4, 13, 31),
            ValueError,
            "inputs_embeds: expected 32 (hidden_size) in the last dimension, got (4, 13, 31)",
        ),
        (
            torch.zeros(4, 13, 32, dtype=torch.bfloat16),
            TypeError,
            "inputs_embeds: expected the model's dtype torch.float32, got torch.bfloat16",
        ),
        (
            torch.zeros(4, 13, 32, dtype=torch.long),
            TypeError,
            "inputs_embeds: expected the model's dtype torch.float32, got torch.int64",
        ),
    ],
)
def test_bad_inputs_embeds(embeds: Tensor, error: type[Exception], message: str, options: dict[str, bool]) -> None:
    """Catches embeddings of another dtype cast in silence, or of another size broadcast."""
    with pytest.raises(error, match=exactly(message)):
        run(twin(theirs(), torch.float32, strict=False), {"inputs_embeds": embeds}, **options)


@pytest.mark.parametrize("name", MODELS)
def test_both_or_neither_of_ids_and_embeds(name: str) -> None:
    """Catches one of two contradicting inputs ignored, or a crash on None."""
    ours = twin(theirs(name), torch.float32)
    batch = make_batch("right", name)
    embeds = randn(*batch["input_ids"].shape, 32, dtype=torch.float32)
    message = (
        r"^input_ids, inputs_embeds: expected (exactly one of the two|shape \(B, C, S\) or \(B, C, S, H\), got None)$"
    )
    with pytest.raises(ValueError, match=message):
        run(ours, {**batch, "inputs_embeds": embeds})
    with pytest.raises(ValueError, match=message):
        run(ours, {**batch, "input_ids": None})


# Devices and dtypes
@pytest.mark.parametrize("name", ["input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds"])
def test_tensor_on_another_device(name: str, model: Any, batch: dict[str, Any]) -> None:
    """Catches a tensor left on another device, copied in silence on every call, or read as if it were here."""
    if name == "inputs_embeds":
        batch = {**batch, "input_ids": None, name: randn(BATCH, LENGTH, 32, dtype=torch.float32)}
    message = f"{name}: expected a tensor on the model's device cpu, got meta"
    with pytest.raises(ValueError, match=exactly(message)):
        model(**{**batch, name: batch[name].to("meta")})
    with pytest.raises(ValueError, match=exactly(message)):
        model(**{**batch, "attention_mask": None, name: batch[name].to("meta")})


@pytest.mark.gpu
def test_tensor_on_the_cpu_for_a_model_on_the_gpu(device: torch.device, batch: dict[str, Any]) -> None:
    """Catches a tensor on the CPU that a model on a GPU copies or reads in silence."""
    ours = twin(theirs(), torch.float32, "auto", device)
    for name in batch:
        mixed = {**to_device(batch, device), name: batch[name]}
        with pytest.raises(ValueError, match=rf"^{name}: expected a tensor on the model's device cuda:0, got cpu$"):
            ours(**mixed)


PARTS = {
    "embeddings": "encoder.layer.0.attention.self.query.weight has torch.float32, "
    "embeddings.word_embeddings.weight has torch.float64",
    "encoder": "embeddings.word_embeddings.weight has torch.float32, "
    "encoder.layer.0.attention.self.query.weight has torch.float64",
    "encoder.layer.1.attention.self.query": "encoder.layer.1.attention.self.query.weight has torch.float64",
    "encoder.layer.0.intermediate": "encoder.layer.0.intermediate.dense.weight has torch.float64",
    "encoder.layer.0.output.dense": "encoder.layer.0.output.dense.weight has torch.float64",
    "encoder.layer.0.output.LayerNorm": "encoder.layer.0.output.LayerNorm.weight has torch.float64",
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("part", PARTS)
def test_model_of_mixed_dtypes(part: str, grad: bool, batch: dict[str, Any]) -> None:
    """Catches a part that .double() was called on alone and that is promoted in silence or not named."""
    model = in_dtype(twin(theirs()), torch.float32)
    model.get_submodule(part).double()
    with torch.set_grad_enabled(grad), pytest.raises(TypeError) as error:
        model(**batch)
    message = str(error.value)
    assert message.startswith("the model's parameters: expected one dtype, but ")
    assert PARTS[part] in message


# Backends that cannot
def test_strict_backend_that_cannot(device: torch.device, batch: dict[str, Any]) -> None:
    """Catches a strict backend that steps aside all the same."""
    with pytest.raises(fastbert.BackendError) as error:
        run(twin(theirs(), torch.float64, "triton", device), batch)
    assert str(error.value) == (
        "embedding: the backend 'triton' cannot run it, and strict=True: there are no Triton kernels for torch.float64"
    )
    small = theirs("BertModel", "tiny", num_attention_heads=4)
    with pytest.raises(fastbert.BackendError, match=r"^attention: .* strict=True: head size 8 is not from 16 to 128$"):
        run(twin(small, torch.float32, "triton", device), batch)
    relu = theirs("BertModel", "tiny", hidden_act="relu")
    with pytest.raises(fastbert.BackendError, match=r"^linear: .* strict=True: there is no Triton kernel for 'relu'$"):
        run(twin(relu, torch.float32, "triton", device), batch)


def test_triton_on_a_cpu_without_the_interpreter(monkeypatch: pytest.MonkeyPatch, batch: dict[str, Any]) -> None:
    """Catches kernels asked for without a GPU that give, under strict, no error that says so."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(fastbert.BackendError, match="the tensors are on the CPU, and Triton's interpreter is off"):
        run(twin(theirs(), torch.float32, "triton"), batch)


@pytest.mark.gpu
def test_cpu_backend_on_a_gpu(device: torch.device, batch: dict[str, Any]) -> None:
    """Catches the "cpu" backend computing on a GPU under strict."""
    with pytest.raises(fastbert.BackendError, match="'cpu' cannot run it, and strict=True: the tensors are on cuda"):
        run(twin(theirs(), torch.float32, "cpu", device), batch)
