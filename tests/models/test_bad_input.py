"""Bad input to the models: each gets an error that names the argument, what came and what was expected."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastbert
from fastbert.checkpoint.config import HIDDEN_ACTS
from helpers import cu_seqlens_of
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

WEIGHTS = "model.safetensors"


def exactly(message: str) -> str:
    return f"^{re.escape(message)}$"


@pytest.fixture
def model() -> Any:
    """A small BertModel in float32."""
    return twin(theirs(), torch.float32)


@pytest.fixture
def batch() -> dict[str, Any]:
    """(4, 13), padded on the right."""
    return make_batch("right")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint, to be damaged."""
    theirs().save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


# Checkpoints


def test_no_such_folder(tmp_path: Path) -> None:
    """A mistyped path sent to the hub, or an error that does not name it."""
    with pytest.raises(FileNotFoundError, match=r"nowhere.*: no such folder, and it is not a hub id"):
        fastbert.BertModel.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("name", MODELS)
def test_missing_weights_file(name: str, folder: Path) -> None:
    """A model of fresh weights where a folder holds a config alone."""
    (folder / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=exactly(f"no weights in {folder}: looked for {LOOKED_FOR}")):
        getattr(fastbert, name).from_pretrained(folder)


LOOKED_FOR = "model.safetensors.index.json, model.safetensors, pytorch_model.bin.index.json, pytorch_model.bin"


def test_missing_config_file(folder: Path) -> None:
    """Weights without a config taken for BERT-base."""
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=exactly(f"{folder / 'config.json'} not found")):
        fastbert.BertModel.from_pretrained(folder)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_weights_file(keep: int, folder: Path) -> None:
    """A download that broke off, wherever, read as far as it goes."""
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:keep])
    with pytest.raises(ValueError, match=rf"^{folder / WEIGHTS} is truncated or not a safetensors file"):
        fastbert.BertModel.from_pretrained(folder)


def edit(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.parametrize(
    ("settings", "lines"),
    [
        (
            {"vocab_size": 102},
            [
                "  embeddings.word_embeddings.weight: came (101, 32), expected (102, 32)",
                "vocab_size: the checkpoint has 101, the model 102",
            ],
        ),
        (
            {"max_position_embeddings": 50},
            ["max_position_embeddings: the checkpoint has 40, the model 50"],
        ),
        (
            {"intermediate_size": 36},
            ["  encoder.layer.0.intermediate.dense.weight: came (37, 32), expected (36, 32)"],
        ),
        ({"hidden_size": 34}, ["  encoder.layer.0.attention.self.query.weight: came (32, 32), expected (34, 34)"]),
    ],
)
def test_wrong_shape_for_the_config(settings: dict[str, int], lines: list[str], folder: Path) -> None:
    """Weights cut or filled up to the config's shape, or an error that does not name the tensor."""
    edit(folder, **settings)
    with pytest.raises(
        ValueError, match=r"tensor\(s\) of the checkpoint do not have the shape that the model expects:"
    ) as e:
        fastbert.BertModel.from_pretrained(folder)
    for line in lines:
        assert line in str(e.value).splitlines()


def test_more_layers_than_the_checkpoint_has(folder: Path) -> None:
    """Layers of random numbers on top of trained ones."""
    edit(folder, num_hidden_layers=3)
    with pytest.raises(
        ValueError, match=r"the checkpoint lacks encoder\.layer\.2\.attention\.self\.query\.weight, .* more"
    ):
        fastbert.BertModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"model_type": "mpnet"},
            "model_type: got 'mpnet', expected one of bert, camembert, distilbert, electra, roberta, xlm-roberta",
        ),
        (
            {"position_embedding_type": "relative_key"},
            "position_embedding_type: got 'relative_key', but only 'absolute' is supported",
        ),
        ({"is_decoder": True}, "is_decoder: got True, but decoder mode is not supported"),
        ({"add_cross_attention": True}, "add_cross_attention: got True, but cross-attention is not supported"),
        ({"hidden_act": "xielu"}, f"hidden_act: got 'xielu', expected one of {', '.join(HIDDEN_ACTS)}"),
        ({"num_attention_heads": 5}, "hidden_size: got 32, expected a multiple of num_attention_heads (5)"),
        ({"hidden_size": 0}, "hidden_size: got 0, expected a positive whole number"),
    ],
)
def test_unsupported_config(settings: dict[str, Any], message: str, folder: Path) -> None:
    """A model that is not BERT, or a BERT that we do not compute, loaded and computed as something else."""
    edit(folder, **settings)
    with pytest.raises(ValueError, match=exactly(f"{folder / 'config.json'}: {message}")):
        fastbert.BertModel.from_pretrained(folder)


def test_unknown_backend(folder: Path) -> None:
    """A misspelt backend taken for "auto"."""
    message = exactly("backend: expected one of auto, triton, cpu, torch, got 'cuda'")
    with pytest.raises(ValueError, match=message):
        fastbert.BertModel.from_pretrained(folder, backend="cuda")
    with pytest.raises(ValueError, match=message):
        fastbert.BertModel(fastbert.BertConfig(), backend="cuda")


# Ids


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize(
    ("name", "size"), [("input_ids", VOCAB), ("token_type_ids", TYPES), ("position_ids", POSITIONS)]
)
def test_ids_outside_their_table(
    name: str, size: int, backend: str, device: torch.device, batch: dict[str, Any]
) -> None:
    """An id outside its table that reaches a kernel, which would read foreign memory."""
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
    """-1 or -100 as padding id, as collators have it, refused or read."""
    padding = ~valid_of(batch["attention_mask"])
    dirty = {**batch, "input_ids": batch["input_ids"].masked_fill(padding, wrong)}
    assert torch.equal(run(model, dirty)[0], run(model, batch)[0])
    with pytest.raises(IndexError, match="input_ids: expected values from 0 to 100"):
        run(model, {**dirty, "attention_mask": None})


@pytest.mark.parametrize("options", [{}, {"output_attentions": True}])
def test_ids_are_checked_on_the_reference_path_too(options: dict[str, bool], batch: dict[str, Any]) -> None:
    """output_attentions, which takes another path, skipping the checks: negative ids would count from the end."""
    ours = twin(theirs(), torch.float32, strict=False)
    for name in ("input_ids", "token_type_ids", "position_ids"):
        with pytest.raises(IndexError, match=rf"^{name}: expected values from 0 to \d+, got -1$"):
            run(ours, {**batch, name: torch.full((BATCH, LENGTH), -1)}, **options)


def test_longer_than_the_position_table(model: Any) -> None:
    """A text that is too long, cut or wrapped around in silence; tokens alone count, not padding."""
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
    """Ids that are no whole numbers, or too small to hold a vocabulary, rounded or cast in silence."""
    with pytest.raises(TypeError, match=exactly(f"{name}: expected dtype int64 or int32, got {dtype}")):
        run(model, {**batch, name: torch.ones(BATCH, LENGTH, dtype=dtype)})


@pytest.mark.parametrize("name", ["input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds"])
def test_what_is_no_tensor(name: str, model: Any, batch: dict[str, Any]) -> None:
    """A list, as a tokenizer gives it: an AttributeError from within would not say which argument."""
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
    """A mask that broadcasts, or a 3-D one whose pairs would be dropped in silence."""
    message = f"attention_mask: expected shape ({BATCH}, {LENGTH}) as input_ids, got {shape}{hint}"
    with pytest.raises(ValueError, match=exactly(message)):
        run(model, {**batch, "attention_mask": torch.ones(shape)})


@pytest.mark.parametrize("name", HEADS)
def test_mask_of_pairs_to_a_head(name: str) -> None:
    """A head that reshapes a 3-D mask on its way to the encoder."""
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
    """Ids that broadcast against one another in silence."""
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
    """Embeddings of another dtype cast in silence, or of another size broadcast."""
    with pytest.raises(error, match=exactly(message)):
        run(twin(theirs(), torch.float32, strict=False), {"inputs_embeds": embeds}, **options)


@pytest.mark.parametrize("name", MODELS)
def test_both_or_neither_of_ids_and_embeds(name: str) -> None:
    """One of two contradicting inputs ignored, or a crash on None."""
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
    """A tensor left on another device, copied in silence on every call, or read as if it were here."""
    if name == "inputs_embeds":
        batch = {**batch, "input_ids": None, name: randn(BATCH, LENGTH, 32, dtype=torch.float32)}
    message = f"{name}: expected a tensor on the model's device cpu, got meta"
    with pytest.raises(ValueError, match=exactly(message)):
        model(**{**batch, name: batch[name].to("meta")})
    with pytest.raises(ValueError, match=exactly(message)):
        model(**{**batch, "attention_mask": None, name: batch[name].to("meta")})


@pytest.mark.gpu
def test_tensor_on_the_cpu_for_a_model_on_the_gpu(device: torch.device, batch: dict[str, Any]) -> None:
    """The same with the device that it will be in practice."""
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
    """A part that .double() was called on alone: promoted in silence, or an error that does not name it."""
    model = in_dtype(twin(theirs()), torch.float32)
    model.get_submodule(part).double()
    with torch.set_grad_enabled(grad), pytest.raises(TypeError) as error:
        model(**batch)
    message = str(error.value)
    assert message.startswith("the model's parameters: expected one dtype, but ")
    assert PARTS[part] in message


# Backends that cannot


def test_strict_backend_that_cannot(device: torch.device, batch: dict[str, Any]) -> None:
    """A strict backend that steps aside all the same."""
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
    """Kernels asked for where there is no GPU: under strict an error that says so."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(fastbert.BackendError, match="the tensors are on the CPU, and Triton's interpreter is off"):
        run(twin(theirs(), torch.float32, "triton"), batch)


@pytest.mark.gpu
def test_cpu_backend_on_a_gpu(device: torch.device, batch: dict[str, Any]) -> None:
    """The "cpu" backend computing on a GPU under strict."""
    with pytest.raises(fastbert.BackendError, match="'cpu' cannot run it, and strict=True: the tensors are on cuda"):
        run(twin(theirs(), torch.float32, "cpu", device), batch)


# Empty batches


@pytest.mark.parametrize("backend", ["cpu", "torch", "triton"])
@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (3, 0), (0, 0)])
@pytest.mark.parametrize("name", MODELS)
def test_empty_batch(name: str, rows: int, columns: int, backend: str, device: torch.device) -> None:
    """A crash or NaN on a batch without rows or columns, with a mask or without."""
    at = torch.device("cpu") if backend == "cpu" else device
    ours = twin(theirs(name), torch.float32, backend, at)
    shape = (rows, 2, columns) if name == "BertForMultipleChoice" else (rows, columns)
    ids = torch.zeros(shape, dtype=torch.long)
    one = run(ours, make_batch("none", name), output_hidden_states=True)
    for mask in (None, torch.zeros(shape, dtype=torch.long)):
        batch = {"input_ids": ids, "attention_mask": mask, "token_type_ids": ids}
        output = run(ours, batch, output_hidden_states=True)
        assert list(output.keys()) == list(one.keys())
        for key, value in one.items():
            if key == "hidden_states":
                n = 2 * rows if name == "BertForMultipleChoice" else rows
                assert [tuple(state.shape) for state in output[key]] == [(n, columns, 32)] * 3
                continue
            per_token = value.shape[:2] == (BATCH, LENGTH)
            expected = (rows, columns, *value.shape[2:]) if per_token else (rows, *value.shape[1:])
            assert tuple(output[key].shape) == expected, key
            assert output[key].isfinite().all()


def test_empty_batch_on_the_reference_path() -> None:
    """output_attentions on a batch without rows or columns."""
    ours = twin(theirs(), strict=False)
    for rows, columns in ((0, 5), (3, 0)):
        output = run(ours, {"input_ids": torch.zeros(rows, columns, dtype=torch.long)}, output_attentions=True)
        assert output.last_hidden_state.shape == (rows, columns, 32)
        assert [tuple(a.shape) for a in output.attentions] == [(rows, 2, columns, columns)] * 2


def test_empty_batch_trains() -> None:
    """A backward pass that crashes, or gives NaN, where a batch turned out empty."""
    ours = twin(theirs()).train()
    for module in ours.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ours(torch.zeros(0, 5, dtype=torch.long)).last_hidden_state.sum().backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in ours.parameters())


# Packed input


@pytest.mark.parametrize(
    ("cu_seqlens", "error", "message"),
    [
        (torch.tensor([1, 5, 12]), ValueError, "at T = 12, got [1, 5, 12]"),
        (torch.tensor([0, 7, 5, 12]), ValueError, "at T = 12, got [0, 7, 5, 12]"),
        (torch.tensor([0, 5, 11]), ValueError, "at T = 12, got [0, 5, 11]"),
        (torch.tensor([0, 5, 13]), ValueError, "at T = 12, got [0, 5, 13]"),
        (torch.tensor([0, -3, 12]), ValueError, "at T = 12, got [0, -3, 12]"),
        (torch.tensor([0]), ValueError, "at T = 12, got [0]"),
        (torch.tensor([0, 2**32 + 12]), ValueError, "at T = 12, got [0, 4294967308]"),
        (torch.tensor([0, *[1] * 10, 13]), ValueError, "at T = 12, got [0, 1, 1, 1] ..."),
        (torch.tensor([[0, 12]]), ValueError, "cu_seqlens: expected shape (B + 1,), got (1, 2)"),
        (torch.tensor(12), ValueError, "cu_seqlens: expected shape (B + 1,), got ()"),
        (torch.tensor([]).int(), ValueError, "cu_seqlens: expected shape (B + 1,), got (0,)"),
        (torch.tensor([0.0, 12.0]), TypeError, "cu_seqlens: expected dtype int32, got torch.float32"),
        (torch.tensor([False, True]), TypeError, "cu_seqlens: expected dtype int32, got torch.bool"),
        ([0, 12], TypeError, "cu_seqlens: expected a tensor, got list"),
    ],
)
def test_bad_cu_seqlens(cu_seqlens: Any, error: type[Exception], message: str, model: Any) -> None:
    """Offsets that would send a kernel outside of its tensors, or lose or double tokens."""
    if message.startswith("at"):
        message = f"cu_seqlens: expected offsets that start at 0, never decrease and end {message}"
    with pytest.raises(error, match=exactly(message)):
        model.forward_packed(torch.ones(12, dtype=torch.long), cu_seqlens)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input_ids": torch.ones(3, 4).long()}, ValueError, "input_ids: expected shape (T,), got (3, 4)"),
        ({"input_ids": torch.ones(12)}, TypeError, "input_ids: expected dtype int64 or int32, got torch.float32"),
        ({"input_ids": [1] * 12}, TypeError, "input_ids: expected a tensor, got list"),
        ({"input_ids": torch.full((12,), 101)}, IndexError, "input_ids: expected values from 0 to 100, got 101"),
        ({"input_ids": torch.full((12,), -1)}, IndexError, "input_ids: expected values from 0 to 100, got -1"),
        (
            {"input_ids": torch.ones(12).long().to("meta")},
            ValueError,
            "input_ids: expected a tensor on the model's device cpu, got meta",
        ),
        ({"token_type_ids": torch.ones(11).long()}, ValueError, "token_type_ids: expected shape (12,), got (11,)"),
        ({"token_type_ids": torch.full((12,), 3)}, IndexError, "token_type_ids: expected values from 0 to 2, got 3"),
        ({"position_ids": torch.ones(1, 12).long()}, ValueError, "position_ids: expected shape (12,), got (1, 12)"),
        ({"position_ids": torch.full((12,), 40)}, IndexError, "position_ids: expected values from 0 to 39, got 40"),
    ],
)
def test_bad_packed_input(arguments: dict[str, Any], error: type[Exception], message: str, model: Any) -> None:
    """The checks of forward missing from forward_packed."""
    given = {"input_ids": torch.ones(12, dtype=torch.long), **arguments}
    with pytest.raises(error, match=exactly(message)):
        model.forward_packed(cu_seqlens=cu_seqlens_of([5, 7]), **given)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_empty_packed_input(backend: str, device: torch.device) -> None:
    """No sequences, or sequences without tokens, crashing."""
    ours = twin(theirs(), torch.float32, backend, device if backend == "triton" else "cpu")
    ids = torch.ones(0, dtype=torch.long, device=ours.device)
    for lengths in ([], [0], [0, 0, 0]):
        output = ours.forward_packed(ids, cu_seqlens_of(lengths, ours.device))
        assert output.shape == (0, 32) and output.dtype == torch.float32
