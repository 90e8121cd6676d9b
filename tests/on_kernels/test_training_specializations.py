"""No step of training compiles a kernel that an earlier one has: sizes and seeds that change are run-time values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from process_cases import run_beside_tests as run

# The kernels that launches of each kind need, for batches of any size and dropouts of any seed, as {name: [kinds]}.
KERNELS = """
import json, torch
from triton.backends.compiler import GPUTarget
from fastbert_kernels import (
    attention, attention_backward, disentangled_backward, disentangled_training, dropout_rows, embedding,
    embedding_backward, gelu, launch, layer_norm, layer_norm_backward, linear, offline, pooling_backward,
)
from fastbert_kernels.disentangled_tiles import Distances
from fastbert_kernels.masks import Dropout
from fastbert_kernels.work_list import WorkList

H, I = 64, 256
BF16 = torch.bfloat16
DROPOUTS = Dropout(6554, 0, 0), Dropout(1, 1, 1), Dropout(65536, 16, 16), Dropout(32768, (1 << 63) - 1, (1 << 31) - 1)

def launches(t, b, dropout):
    def empty(*shape, dtype=BF16):
        return torch.empty(shape, dtype=dtype)

    x, vector, of_row, ids = empty(t, H), empty(H), empty(t, dtype=torch.float32), empty(t, dtype=torch.int64)
    word, types, positions = empty(1000, H), empty(2, H), empty(512, H)
    up, pre, cu_seqlens = empty(I, H), empty(t, I), empty(b + 1, dtype=torch.int32)
    segments = embedding_backward.Segments(ids, empty(1001, dtype=torch.int64), empty(t, dtype=torch.int16))
    layer_norm.residual_norm_forward(x, vector, x, vector, vector, 1e-12, dropout, True)
    layer_norm_backward.residual_norm_backward(x, None, x, of_row, of_row, vector, dropout, dropout, True)
    dropout_rows.dropout_forward(x, dropout)
    tables = word, types, positions
    embedding.embedding_norm_forward(ids, ids, ids, *tables, vector, vector, 1e-12, dropout, BF16, True)
    for padding_idx in (None, 0, 1, 16):
        embedding_backward.embedding_backward(x, segments, BF16, padding_idx)
    linear.linear_forward(x, up, empty(I), "gelu", pre=pre)
    gelu.activation_backward(pre, pre, "gelu")
    pooling_backward.pool_backward(empty(b, H), x, cu_seqlens, "max", True)
    of_batch = WorkList(empty(b, 5, dtype=torch.int32), empty(t, dtype=torch.int32))
    qkv, lse = empty(t, 3 * H), empty(2, t, dtype=torch.float32)
    attention.varlen_attention_forward(qkv, of_batch, 2, 0.2, dropout=dropout, lse=lse)
    plan = attention_backward.Plan(of_batch, of_batch)
    attention_backward.varlen_attention_backward(x, qkv, x, lse, plan, 2, 0.2, dropout)
    rows_of = empty(2 * t + 1, dtype=torch.int32)
    distances = Distances(empty(512, H), empty(512, H), rows_of, b % 256, min(t, 250), None)
    disentangled_training.disentangled_training_forward(qkv, of_batch, 2, 0.2, distances, dropout)
    disentangled_backward.disentangled_attention_backward(
        x, qkv, x, lse, of_batch, 2, 0.2, distances, rows_of, t, dropout
    )

found = {}
for t, b in ((64, 1), (65, 2), (80, 16), (129, 17), (4096, 300), (100000, 1024)):
    for dropout in DROPOUTS:
        with launch.recording(90) as recorded:
            launches(t, b, dropout)
        for one in recorded:
            source, options = offline.specialize(one, GPUTarget("cuda", 90, 32))
            found.setdefault(source.name, {}).setdefault(source.hash() + str(options), []).append([t, b, *dropout])
print(json.dumps({name: [places[0] for places in kinds.values()] for name, kinds in found.items()}))
"""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The first size and dropout that needs each of the kernels of a name."""
    path: Path = tmp_path_factory.mktemp("cache")
    return run(KERNELS, cache=path)


def test_sizes_and_seeds_do_not_compile(kernels: dict[str, Any]) -> None:
    """Catches a kernel that is compiled anew for another number of tokens or texts, or for the next step's seed."""
    assert len(kernels) >= 15
    assert {name: firsts for name, firsts in kernels.items() if len(firsts) > 1} == {}
