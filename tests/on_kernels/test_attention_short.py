"""Batch-invariant attention takes short texts in tiles of 16 rows, in a launch of their own."""

from __future__ import annotations

import copy
import itertools
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastbert
from attention_cases import DTYPES, LENGTHS, check
from fastbert import ops
from fastbert.engine import buckets
from fastbert.ops import Policy, attention_plan, packing, static_plan
from graph_cases import StandIn, encode, make
from helpers import cu_seqlens_of

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning")

INVARIANT = Policy("triton", batch_invariant=True)
ARCHS = (80, 86, 89, 90, 100, 120)


def attend(qkv: Tensor, lengths: list[int], num_heads: int) -> Tensor:
    batch = packing.from_cu_seqlens(cu_seqlens_of(lengths), sum(lengths), qkv.device)
    return ops.varlen_attention(qkv, batch, num_heads, policy=INVARIANT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["one token", "around a tile", "zero-length rows", "only zero-length rows"])
def test_at_the_edges(case: str, dtype: torch.dtype, device: torch.device, poisoned: Any) -> None:
    """Catches a row in both lists or in none, a key beyond a text, or a read or write outside of the tensors."""
    check(case, LENGTHS[case], 2, 32, dtype, device, INVARIANT)
    poisoned.check()


@pytest.mark.parametrize("head_size", [16, 24, 64, 80, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_sizes(head_size: int, dtype: torch.dtype, device: torch.device, poisoned: Any) -> None:
    """Catches columns of padding of the head that reach a result, or scores so large that exp overflows."""
    check(f"D{head_size}", [1, 15, 16, 17, 31, 33, 2], 2, head_size, dtype, device, INVARIANT, gain=6.0)
    poisoned.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_pass_gives_the_bits_of_the_loop(dtype: torch.dtype, device: torch.device) -> None:
    """Catches a softmax in one pass that is another function than the running one over one block."""
    from fastbert_kernels import configs, launch
    from fastbert_kernels.attention import varlen_attention_forward
    from fastbert_kernels.work_list import WorkList, build_work_list

    config = configs.short_attention_config(dtype, 16, launch.arch(device))
    assert config is not None
    most = config.block_sizes["BLOCK_K"]
    lengths = [1, 15, 16, 17, most - 1, most, 0, 3]
    qkv = torch.randn(sum(lengths), 3 * 32, device=device).to(dtype)
    tiles = build_work_list(cu_seqlens_of(lengths).tolist(), 16, share=False).to(device)
    none = WorkList(tiles.tiles[:0], tiles.row_spans)
    loop = varlen_attention_forward(qkv, tiles, 2, 0.25, config=config.block_sizes)
    once = varlen_attention_forward(qkv, none, 2, 0.25, short_list=tiles)
    assert torch.equal(once, loop)


@settings(max_examples=150)
@given(lengths=st.lists(st.one_of(st.integers(0, 300), st.integers(0, 20), st.integers(60, 70)), max_size=30))
def test_every_row_is_in_one_list(lengths: list[int]) -> None:
    """Catches a row in both lists or in none, a tile with more keys than its block, or a list chosen by a neighbour."""
    from fastbert_kernels import configs

    offsets = cu_seqlens_of(lengths)
    batch = packing.from_cu_seqlens(offsets, sum(lengths), torch.device("cpu"))
    sequences = set(itertools.pairwise(offsets.tolist()))
    for dtype, head_size in ((torch.bfloat16, 64), (torch.float32, 64)):
        whole = configs.attention_config(dtype, head_size, 80).block_sizes["BLOCK_Q"]
        short = configs.short_attention_config(dtype, head_size, 80)
        assert short is not None
        rows = []
        for made, block_q, is_short in zip(
            ops.attention_plan.host_work_lists(batch, dtype, head_size, INVARIANT),
            (whole, 16),
            (False, True),
            strict=True,
        ):
            assert made is not None and made.tiles.dtype == torch.int32 and made.row_spans.shape == (0,)
            for first_row, end_row, start, end, shared in made.tiles.tolist():
                length = end - start
                assert not shared and (start, end) in sequences
                assert (length <= short.block_sizes["BLOCK_K"]) == is_short
                assert (first_row - start) % block_q == 0 and end_row == min(first_row + block_q, start + length)
                rows += range(first_row, end_row)
        assert sorted(rows) == list(range(sum(lengths)))


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 64), (torch.float32, 32)], ids=str)
def test_bits_around_the_limit(dtype: torch.dtype, most: int, device: torch.device) -> None:
    """Catches a text whose tile depends on its neighbours, where the smaller tile begins and where it ends."""
    from fastbert_kernels import configs, launch

    if device.type == "cpu":
        config = configs.short_attention_config(dtype, 16, launch.arch(device))
        assert config is not None and config.block_sizes["BLOCK_K"] == most
    lengths = [1, 16, 17, most, most + 1, 2 * most + 1]
    texts = [torch.randn(n, 3 * 16, device=device).to(dtype) for n in lengths]
    alone = [attend(text, [n], 1) for text, n in zip(texts, lengths, strict=True)]
    generator = random.Random(0)
    for _ in range(25):
        chosen = generator.choices(range(len(texts)), k=generator.randint(2, 4))
        sizes = [lengths[i] for i in chosen]
        outs = attend(torch.cat([texts[i] for i in chosen]), sizes, 1).split(sizes)
        assert all(torch.equal(out, alone[i]) for i, out in zip(chosen, outs, strict=True)), chosen


def products(tiles: Tensor, block_q: int, block_k: int) -> int:
    """Query rows times keys that the tiles of a list multiply, with all padding."""
    return sum(block_q * -(-(end - first) // block_k) * block_k for _, _, first, end, _ in tiles.tolist())


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("longest", [20, 40, 58, 70])
def test_short_texts_cost_no_more_products_than_shared_tiles(arch: int, longest: int) -> None:
    """Catches a tile for short texts with so many empty rows that the mode costs more than benchmarks/NOTES.md says."""
    from fastbert_kernels import configs
    from fastbert_kernels.work_list import build_work_list

    generator = random.Random(1)
    lengths = [generator.randint(2, longest) for _ in range(400)]
    offsets = cu_seqlens_of(lengths).tolist()
    for head_size in (32, 64):
        sizes = configs.attention_config(torch.bfloat16, head_size, arch).block_sizes
        short = configs.short_attention_config(torch.bfloat16, head_size, arch)
        assert short is not None
        tile, most = (sizes["BLOCK_Q"], sizes["BLOCK_K"]), short.block_sizes["BLOCK_K"]
        shared = products(build_work_list(offsets, tile[0]).tiles, *tile)
        own = products(build_work_list(offsets, tile[0], False, longer_than=most).tiles, *tile)
        own += products(build_work_list(offsets, 16, False, up_to=most).tiles, 16, most)
        assert own <= 1.2 * shared, (head_size, own / shared)


@pytest.mark.parametrize(("arch", "head_size"), list(itertools.product(ARCHS, (16, 32, 64, 80, 128))))
def test_configurations(arch: int, head_size: int) -> None:
    """Catches a tile that tl.dot does not take, or one whose keys take more than one block."""
    from fastbert_kernels import configs

    for dtype in DTYPES:
        whole = configs.attention_config(dtype, head_size, arch).block_sizes
        short = configs.short_attention_config(dtype, head_size, arch)
        assert short is not None and short.block_sizes.keys() == whole.keys()
        assert short.block_sizes["BLOCK_Q"] == 16 <= short.block_sizes["BLOCK_K"] <= whole["BLOCK_Q"] // 2
        assert short.block_sizes["BLOCK_D"] == whole["BLOCK_D"]
        assert "short_attention_config" in short.source


def test_a_table_with_small_tiles(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Catches a tuned tile of 16 rows, for which there is no smaller one, that raises or leaves a text in no list."""
    from fastbert_kernels import configs

    sizes = {"BLOCK_Q": 16, "BLOCK_K": 16, "BLOCK_D": 16, "num_warps": 1, "num_stages": 1}
    monkeypatch.setattr(configs, "_attention", lambda *args: configs.Config(sizes, "a test's"))
    monkeypatch.setattr(attention_plan, "_tile_sizes", attention_plan._tile_sizes.__wrapped__)  # remembers nothing
    configs._short_attention.cache_clear()
    try:
        assert configs.short_attention_config(torch.float32, 16, 80) is None
        check("small tiles", [1, 20, 7], 2, 16, torch.float32, device, INVARIANT)
        assert static_plan.max_tiles(100, torch.float32, 16, device, INVARIANT)[1] is None
    finally:
        configs._short_attention.cache_clear()


# Launches: as many whatever comes, and what explain says


def invariant(device: torch.device, dtype: torch.dtype = torch.float32, **sizes: Any) -> Any:
    model = make(device, dtype, **sizes)
    model.policy = INVARIANT
    return model


@pytest.mark.parametrize("lengths", [[9, 4], [130], [0, 0, 5], [130, 3]], ids=str)
def test_launches(lengths: list[int], device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a kernel left to a later batch to compile, or an explain that does not know the second launch."""
    from fastbert_kernels import launch

    model = invariant(device, torch.bfloat16, num_hidden_layers=1)
    launched: list[Any] = []
    real_run = launch.run

    def run(kernel: Any, grid: Any, sizes: dict[str, int], **arguments: Any) -> None:
        launched.append((kernel.fn.__module__, sizes))
        real_run(kernel, grid, sizes, **arguments)

    monkeypatch.setattr(launch, "run", run)
    encode(model, lengths)
    report = fastbert.explain(model)
    rows = [row for row in report.rows if "encoder." in row.module or row.op == "embedding"]
    assert [(row.kernel, row.block_sizes) for row in rows] == launched
    first, second = (row for row in rows if row.op == "attention")
    assert (first.launches, second.launches) == (1, 1) and "of texts of up to 64 tokens" in second.shapes
    assert report.notes[0] == "launches: 8 kernels a layer, 9 from ids to last hidden state"


# CUDA graphs

FITTING = ([9, 4], [10] * 12, [70, 3, 33, 32])


def test_same_bits_with_graphs_and_without(stand_in: StandIn, device: torch.device) -> None:
    """Catches short texts whose tiles a graph leaves out, keeps from the batch before, or has no room for."""
    model = invariant(device, num_hidden_layers=1)
    plain = copy.deepcopy(model)
    plain.cuda_graphs = False
    for turn in range(2):
        for lengths in FITTING:
            assert torch.equal(encode(model, lengths, turn), encode(plain, lengths, turn)), lengths
    assert stand_in.replays == 2 * len(FITTING)


def test_what_does_not_fit(stand_in: StandIn, device: torch.device) -> None:
    """Catches a batch of very short texts written past the static list."""
    model = invariant(device, num_hidden_layers=1)
    plain = copy.deepcopy(model)
    plain.cuda_graphs = False
    lengths = [1] * 12
    assert torch.equal(encode(model, lengths), encode(plain, lengths)) and stand_in.captures == 0


@settings(max_examples=150)
@given(
    lengths=st.lists(
        st.one_of(st.integers(4, 200), st.integers(60, 70), st.integers(125, 135)), min_size=1, max_size=40
    )
)
def test_texts_of_four_tokens_and_more_always_fit(lengths: list[int]) -> None:
    """Catches a batch of ordinary texts that takes the plain path for a static list that is too short."""
    batch = packing.from_cu_seqlens(cu_seqlens_of(lengths), sum(lengths), torch.device("cpu"))
    for dtype in (torch.bfloat16, torch.float32):
        for head_size in (16, 32, 64, 128):
            bucket = buckets.bucket_of(sum(lengths))
            assert bucket is not None
            assert static_plan.StaticPlan(bucket, dtype, head_size, batch.device, INVARIANT).fits(batch)
