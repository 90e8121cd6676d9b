"""Batches are padded to buckets of token counts, and the pool of graphs is bounded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.engine import buckets, graphs
from graph_cases import (
    StandIn,
    cheap,
    encode,
    make,
    packed,
    random_lengths,
)
from helpers import cu_seqlens_of

# Rows of padding start as whatever is in memory, which the interpreter's numpy remarks on.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning")


def test_buckets() -> None:
    """Catches a bucket that wastes more than it says, or an octave whose memory is not that of a bucket."""
    assert (
        buckets.BUCKETS[0] == 32
        and buckets.BUCKETS[-1] == buckets.LARGEST
        and len(buckets.BUCKETS) <= graphs.MAX_GRAPHS
    )
    assert tuple(sorted(set(buckets.BUCKETS))) == buckets.BUCKETS
    for n_tokens in range(1, buckets.LARGEST + 1):
        bucket = buckets.bucket_of(n_tokens)
        assert bucket is not None and bucket >= n_tokens
        assert 1 << (bucket - 1).bit_length() in buckets.BUCKETS
        assert bucket - n_tokens < 32 or 16 * (bucket - n_tokens) < bucket
    assert buckets.bucket_of(0) is None and buckets.bucket_of(buckets.LARGEST + 1) is None


def test_waste() -> None:
    """Catches buckets whose padding, over token counts that are all as likely, is more than the notes say: 2.1 %."""
    counts = range(1, buckets.LARGEST + 1)
    rows = sum(buckets.bucket_of(n) or 0 for n in counts)
    assert rows / sum(counts) - 1 < 0.021


def test_token_budget_is_a_bucket() -> None:
    """Catches full batches of SentenceEncoder that are padded to a bucket far above."""
    from fastbert.pipelines.batching import TOKEN_BUDGET

    assert TOKEN_BUDGET["cuda"] in buckets.BUCKETS


@settings(max_examples=300)
@given(
    lengths=st.lists(st.one_of(st.integers(0, 4), st.integers(0, 40), st.integers(14, 19)), max_size=40),
    block_q=st.sampled_from([1, 2, 16]),
)
def test_no_batch_has_more_tiles_than_the_bound(lengths: list[int], block_q: int) -> None:
    """Catches a work list that overruns its static buffer."""
    from fastbert_kernels.work_list import build_work_list, max_tiles

    n_tiles = build_work_list(cu_seqlens_of(lengths).tolist(), block_q).tiles.shape[0]
    assert n_tiles <= max_tiles(sum(lengths), block_q)


@pytest.mark.parametrize("block_q", [16, 64, 128])
def test_the_bound_on_tiles_is_reached(block_q: int) -> None:
    """Catches a bound with more empty programs in it than the worst batch needs."""
    from fastbert_kernels.work_list import build_work_list, max_tiles

    lengths = [1, block_q + 1] * 7 + [1]
    n_tiles = build_work_list(cu_seqlens_of(lengths).tolist(), block_q).tiles.shape[0]
    assert n_tiles == 22 == max_tiles(sum(lengths), block_q)


def test_empty_tiles_do_nothing(device: torch.device, poisoned: Any) -> None:
    """Catches a program without rows that writes, or one that shifts what the others write."""
    from fastbert_kernels.attention import varlen_attention_forward
    from fastbert_kernels.work_list import WorkList, build_work_list

    lengths = [3, 70, 2]
    qkv = torch.randn(sum(lengths), 96, device=device)
    tiles, row_spans = build_work_list(cu_seqlens_of(lengths).tolist(), 64).to(device)
    full = torch.cat([tiles, torch.zeros(5, 5, dtype=torch.int32, device=device)])
    outs = [varlen_attention_forward(qkv, WorkList(w, row_spans), 2, 0.25) for w in (tiles, full)]
    poisoned.check()
    assert torch.equal(*outs)


def test_the_pool_is_bounded(stand_in: StandIn, device: torch.device) -> None:
    """Catches graphs or buffers that pile up over batches of random lengths, and a pool that drops the wrong one."""
    model = make(device)
    cheap(model)
    model.engine.graphs.limit = 5
    for seed in range(200):
        lengths = random_lengths(seed, 3000)
        out = encode(model, lengths, seed)
        assert torch.equal(out[:, 0].long(), packed(lengths, device, seed)[0])
        assert len(model.engine.graphs) <= 5
        assert buckets.bucket_of(sum(lengths)) in model.engine.graphs.captured(), "the graph that was used last is gone"
    assert len(model.engine.graphs._buffers) <= 8  # one an octave, from 32 to 4096
    encode(model, [32])
    captures = stand_in.captures
    for n_tokens in (512, 32, 1024, 32, 2048, 32, 4096, 32):
        encode(model, [200] * (n_tokens // 200) + [n_tokens % 200])
    assert stand_in.captures - captures <= 4, "the bucket in use was dropped"


def test_the_largest_of_an_octave_comes_first(stand_in: StandIn, device: torch.device) -> None:
    """Catches intermediate memory that grows with every new bucket, since none finds room in what the others left."""
    model = make(device)
    rows = cheap(model)
    encode(model, [70])
    assert model.engine.graphs.captured() == (96, 128) and rows[0] == 128
    encode(model, [100])
    assert stand_in.captures == 2
