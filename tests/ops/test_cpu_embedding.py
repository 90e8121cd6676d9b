"""The C++ kernels for the embeddings of a training step are right in each instruction set of this processor."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastbert.ops import dropout as masks
from fastbert_kernels import cpu
from gradient_cases import assert_gradient, assert_same_bits
from helpers import assert_as_accurate, guarded
from row_cases import BF16, DROPOUT, EPS, F32, OUT_DROPOUT, SIZES, differentiate, drop

TABLES = ("word", "token_type", "position")
N_ROWS = {"word": 50, "token_type": 2, "position": 40}


def embedding_inputs(n_rows, width, dtype):
    """Ids by table, and tables and parameters of the LayerNorm by name."""
    ids = {name: torch.randint(size, (n_rows,)) for name, size in N_ROWS.items()}
    tensors = {name: torch.randn(size, width).to(dtype) for name, size in N_ROWS.items()}
    return ids, tensors | {"weight": torch.rand(width).to(dtype), "ln_bias": torch.randn(width).to(dtype)}


def plain_embedding(ids, out_dropout=None):
    """The function of tables and parameters that the kernel computes."""

    def run(weight, ln_bias, **tables):
        total = sum(tables[name] if ids[name] is None else F.embedding(ids[name], tables[name]) for name in tables)
        return drop(F.layer_norm(total, weight.shape, weight, ln_bias, EPS), out_dropout)

    return run


def embedding_forward(ids, tensors, dropout, compute):
    table_ids = (None if ids.get(name) is None else guarded(ids[name]) for name in TABLES)
    tables = (None if name not in tensors else guarded(tensors[name], 5) for name in TABLES)
    norm = (guarded(tensors[name]) for name in ("weight", "ln_bias"))
    return cpu.embedding_norm_forward(*table_ids, *tables, *norm, EPS, dropout, compute)


@pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["kept", "dropped"])
@pytest.mark.parametrize(("n_rows", "width"), [size for size in SIZES if size[1] > 1])
def test_embeddings_are_as_accurate_as_eager(n_rows, width, dropout, pair, variant, outputs):
    """Catches a row of another table, lanes beyond a row, a wrong mask, or gradients of a wrong sum."""
    ids, tensors = embedding_inputs(n_rows, width, pair[1])
    grad = torch.randn(n_rows, width).to(pair[1])
    run = plain_embedding(ids, dropout)
    exact, exact_grads = differentiate(run, tensors, grad, torch.float64)
    eager, eager_grads = differentiate(run, tensors, grad)
    ours = embedding_forward(ids, tensors, dropout, pair[0])
    assert_as_accurate("y", ours.y, eager, exact)
    assert ours.y_low is None if pair[0] == pair[1] else torch.equal(ours.y_low, ours.y.to(pair[0]))
    total = sum(F.embedding(ids[name], tensors[name].double()) for name in TABLES)
    torch.testing.assert_close(ours.total, total.to(pair[0]))
    back = cpu.residual_norm_backward(grad, None, *ours[2:], tensors["weight"], None, dropout, True, False)
    outputs.check()
    for name in TABLES:
        table = cpu.embedding_scatter(back.grad_residual, ids[name], N_ROWS[name], None)
        assert_gradient(name, table, eager_grads[name], exact_grads[name], pair[0])
    assert_gradient("weight", back.grad_weight, eager_grads["weight"], exact_grads["weight"], pair[0])


@pytest.mark.parametrize("without", ["token_type", "word"])
def test_embeddings_without_segments_or_ids(without, pair, variant, outputs):
    """Catches an address that is taken for a tensor's where there is none, or ids where rows come in."""
    ids, tensors = embedding_inputs(33, 72, pair[1])
    ids[without] = None
    if without == "word":
        tensors["word"] = torch.randn(33, 72).to(pair[1])
    else:
        del tensors["token_type"]
    exact, eager = (
        plain_embedding(ids, OUT_DROPOUT)(**each) for each in ({n: t.double() for n, t in tensors.items()}, tensors)
    )
    assert_as_accurate("y", embedding_forward(ids, tensors, OUT_DROPOUT, pair[0]).y, eager, exact)
    outputs.check()


def test_the_mask_of_the_embeddings(pair, variant):
    """Catches elements dropped before the norm, or others than the definition says."""
    ids, tensors = embedding_inputs(35, 80, pair[1])
    tensors |= {"weight": torch.zeros(80), "ln_bias": torch.ones(80)}
    y = embedding_forward(ids, tensors, OUT_DROPOUT, pair[0]).y
    assert torch.equal(y != 0, masks.keep(torch.arange(35), 80, OUT_DROPOUT))


def test_embeddings_by_any_number_of_threads(pair, variant, number_of_threads):
    """Catches rows that two threads write, or that none does."""
    ids, tensors = embedding_inputs(101, 64, pair[1])
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(embedding_forward(ids, tensors, DROPOUT, pair[0]))
    for each in results:
        assert_same_bits(each, results[0])


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (BF16, F32), (F32, BF16)], ids=str)
@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("n_tokens", [0, 1, 18, 900])
def test_scatter_is_as_exact_as_float32(n_tokens, padding_idx, dtypes, number_of_threads):
    """Catches sums in bfloat16, a row of padding with a gradient, or bits that depend on the number of threads."""
    rows, ids = torch.randn(n_tokens, 40).to(dtypes[0]), torch.randint(0, 7, (n_tokens,))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(cpu.embedding_scatter(rows, ids, 20, padding_idx, dtypes[1]))
    assert all(torch.equal(each, results[0]) for each in results)
    assert results[0].dtype == dtypes[1] and results[0].shape == (20, 40)
    exact, eager = (
        torch.zeros(20, 40, dtype=dtype).index_add_(0, ids, rows.to(dtype)) for dtype in (torch.double, F32)
    )
    for table in (exact, eager) if padding_idx is not None else ():
        table[padding_idx] = 0.0
    assert_as_accurate("table", results[0], eager.to(dtypes[1]), exact)
