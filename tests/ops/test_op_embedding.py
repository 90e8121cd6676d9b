"""Embedding + LayerNorm is right in the kernel and the plain path, and ids are checked."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastbert import ops, reference
from fastbert.ops import Policy
from helpers import assert_as_accurate, guarded, rms_error

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRITON = Policy("triton", strict=True)
V, P, TYPES = 101, 40, 2


def inputs(n_tokens, hidden_size, dtype, device, id_dtype=torch.int64):
    ids = [torch.randint(0, size, (n_tokens,), dtype=id_dtype, device=device) for size in (V, TYPES, P)]
    tables = [torch.randn(size, hidden_size).to(device, dtype) for size in (V, TYPES, P)]
    weight, ln_bias = (torch.randn(hidden_size).to(device, dtype) for _ in range(2))
    return ids, (tables[0], tables[1], tables[2]), (weight, ln_bias)


def check(name, ids, tables, norm, policy, embeds=None):
    word, token_type, position = tables
    wide = [guarded(t, extra_columns=3) for t in tables]
    arguments = None if embeds is None else guarded(embeds, extra_columns=2)
    input_ids = None if embeds is not None else guarded(ids[0])
    ours = ops.embedding_layer_norm(
        input_ids, guarded(ids[1]), guarded(ids[2]), *wide, *norm, 1e-12, inputs_embeds=arguments, policy=policy
    )
    words = word[ids[0].long()] if embeds is None else embeds
    eager = words + F.embedding(ids[1], token_type) + F.embedding(ids[2], position)
    eager = F.layer_norm(eager, (word.shape[1],), *norm, 1e-12)
    d_tables = word.double(), position.double(), token_type.double()
    expected = reference.embedding_layer_norm(
        None if embeds is not None else ids[0], ids[1], ids[2], *d_tables, *(t.double() for t in norm), 1e-12,
        inputs_embeds=None if embeds is None else embeds.double(),
    )  # fmt: skip
    assert_as_accurate(name, ours, eager, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden_size", [7, 96, 320, 768, 1023, 4096])
def test_kernel(hidden_size, dtype, device, poisoned):
    """Catches a gather from the wrong row or table, or a tail of the row left out."""
    check(f"H{hidden_size}", *inputs(6, hidden_size, dtype, device), TRITON)
    poisoned.check()


@pytest.mark.parametrize("n_tokens", [0, 1, 5, 67])
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
def test_kernel_tokens_and_id_dtypes(n_tokens, id_dtype, device, poisoned):
    """Catches ids read with the wrong width, or a last block of tokens that is cut off."""
    check(f"T{n_tokens}", *inputs(n_tokens, 48, torch.float32, device, id_dtype), TRITON)
    poisoned.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_with_inputs_embeds(dtype, device, poisoned):
    """Catches embeddings given directly that are looked up by id all the same."""
    ids, tables, norm = inputs(9, 48, dtype, device)
    check("inputs_embeds", ids, tables, norm, TRITON, torch.randn(9, 48).to(device, dtype))
    poisoned.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_without_segments(dtype, device, poisoned):
    """Catches a model without segments that reads a missing table, or adds a row of another one."""
    ids, (word, _, position), norm = inputs(67, 96, dtype, device)
    arguments = guarded(ids[0]), None, guarded(ids[2]), guarded(word, 3), None, guarded(position, 3), *norm, 1e-12
    ours = ops.embedding_layer_norm(*arguments, policy=TRITON)
    eager = F.layer_norm(word[ids[0]] + position[ids[2]], (96,), *norm, 1e-12)
    doubles = word.double(), position.double(), None, *(t.double() for t in norm)
    expected = reference.embedding_layer_norm(ids[0], None, ids[2], *doubles, 1e-12)
    assert_as_accurate("without segments", ours, eager, expected)
    assert_as_accurate("plain", ops.embedding_layer_norm(*arguments, policy=Policy("torch")), eager, expected)
    poisoned.check()


def test_gradients_without_segments(device):
    """Catches a backward pass that counts its inputs by a table that is not there."""
    ids, (word, _, position), norm = inputs(12, 16, torch.float32, device)
    grads = []
    for policy in (TRITON, Policy("torch")):
        leaves = [t.clone().requires_grad_() for t in (word, position, *norm)]
        arguments = leaves[0], None, *leaves[1:]
        ops.embedding_layer_norm(ids[0], None, ids[2], *arguments, 1e-5, policy=policy).pow(3).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*grads, strict=True):
        assert rms_error(ours, theirs) < 1e-5


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_plain_path(backend):
    """Catches a table left out of the plain path."""
    cpu = torch.device("cpu")
    ids, tables, norm = inputs(9, 48, torch.float64, cpu)
    check(backend, ids, tables, norm, Policy(backend))
    check(backend, ids, tables, norm, Policy(backend), torch.randn(9, 48, dtype=torch.float64))


def test_gradients_under_triton(device):
    """Catches a backward pass that misses a table."""
    ids, tables, norm = inputs(12, 16, torch.float32, device)
    grads = []
    for policy in (TRITON, Policy("torch")):
        leaves = [t.clone().requires_grad_() for t in (*tables, *norm)]
        ops.embedding_layer_norm(*ids, *leaves, 1e-5, policy=policy).pow(3).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*grads, strict=True):
        assert rms_error(ours, theirs) < 1e-5


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_padding_idx_gets_no_gradient(backend, device):
    """Catches a pad token whose embedding is trained, unlike torch.nn.Embedding's."""
    ids, tables, norm = inputs(12, 16, torch.float32, device)
    ids[0][3:5] = 7
    word = tables[0].clone().requires_grad_()
    for padding_idx, trained in ((None, True), (7, False)):
        word.grad = None
        out = ops.embedding_layer_norm(
            *ids, word, *tables[1:], *norm, 1e-5, padding_idx=padding_idx, policy=Policy(backend)
        )
        out.pow(3).sum().backward()
        assert bool(word.grad[7].abs().sum() > 0) is trained


def test_needs_exactly_one_input():
    """Catches both or neither of ids and embeddings, with one of them ignored in silence."""
    ids, tables, norm = inputs(4, 16, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match="input_ids, inputs_embeds: expected exactly one of the two"):
        ops.embedding_layer_norm(*ids, *tables, *norm, 1e-5, inputs_embeds=torch.randn(4, 16))
    with pytest.raises(ValueError, match="exactly one"):
        ops.embedding_layer_norm(None, ids[1], ids[2], *tables, *norm, 1e-5)
    with pytest.raises(ValueError, match="token_type, token_type_ids: expected both or neither"):
        ops.embedding_layer_norm(ids[0], None, ids[2], *tables, *norm, 1e-5)
    with pytest.raises(ValueError, match=r"inputs_embeds: expected shape \(4, 16\), got \(4, 8\)"):
        ops.embedding_layer_norm(None, ids[1], ids[2], *tables, *norm, 1e-5, inputs_embeds=torch.randn(4, 8))


@pytest.mark.parametrize(("bad", "shown"), [(-1, "-1"), (10, "10")])
@pytest.mark.parametrize("name", ["input_ids", "position_ids"])
def test_check_ids(name, bad, shown):
    """Catches an id outside its table that reaches a kernel, or a message that names the wrong argument."""
    ids = {"input_ids": torch.tensor([0, 9]), "position_ids": torch.tensor([3], dtype=torch.int32)}
    ops.check_ids(**{key: (t, 10) for key, t in ids.items()}, token_type_ids=(None, 2))
    ids[name][-1] = bad
    with pytest.raises(IndexError, match=f"^{name}: expected values from 0 to 9, got {shown}$"):
        ops.check_ids(**{key: (t, 10) for key, t in ids.items()})


def test_check_ids_dtype_and_empty():
    """Catches float ids that are truncated in silence, or a crash on an empty batch, which has no minimum."""
    with pytest.raises(TypeError, match="input_ids: expected dtype int64 or int32, got torch.float32"):
        ops.check_ids(input_ids=(torch.zeros(2), 10))
    ops.check_ids(input_ids=(torch.empty(0, dtype=torch.int64), 10))
