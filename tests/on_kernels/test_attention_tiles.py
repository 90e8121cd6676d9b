"""Attention takes small tiles where texts or batches are short, lists by kind, and specialised warps where told."""

from __future__ import annotations

import ast
import inspect
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attention_cases import check
from fastbert.ops import Policy, attention_plan, packing, static_plan
from fastbert_kernels import attention, attention_specialized, configs, launch
from fastbert_kernels.attention import varlen_attention_forward
from fastbert_kernels.masks import Dropout
from fastbert_kernels.work_list import WorkList, build_work_list
from helpers import assert_as_accurate, cu_seqlens_of, guarded

TRITON = Policy("triton", strict=True)
INVARIANT = Policy("triton", strict=True, batch_invariant=True)
CPU = torch.device("cpu")


def batch_of(lengths: list[int], device: torch.device = CPU) -> packing.PackedBatch:
    return packing.from_lengths(lengths, device)


@pytest.mark.parametrize(
    ("lengths", "small"), [([20] * 100, True), ([64] * 9, True), ([65] * 9, False), ([512] * 4 + [3] * 40, False)]
)
def test_short_texts_take_small_tiles(lengths: list[int], small: bool) -> None:
    """Catches short texts in tiles of which they use a sixth, and long ones whose keys are fetched twice as often."""
    batch = batch_of(lengths)
    assert attention_plan.takes_small_tiles(batch, torch.bfloat16, 64, TRITON) == small
    assert attention_plan.triton_plan(batch, torch.bfloat16, 64, TRITON).small == small


def test_short_batches_take_small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches one text in so few tiles that most of a GPU idles."""
    monkeypatch.setattr(launch, "n_multiprocessors", lambda device: 132)
    for length, small in ((512, True), (1056, True), (1057, False)):
        assert attention_plan.takes_small_tiles(batch_of([length]), torch.bfloat16, 64, TRITON) == small


@pytest.mark.parametrize("lengths", [[20] * 100, [3], [512] * 4])
def test_batches_choose_no_tile_in_batch_invariant_mode(lengths: list[int]) -> None:
    """Catches bits of a text that depend on the batch through the tile."""
    batch = batch_of(lengths)
    assert not attention_plan.triton_plan(batch, torch.bfloat16, 64, INVARIANT).small
    assert static_plan.kind_of(batch, 8192, torch.bfloat16, 64, INVARIANT) == static_plan.ANY_BATCH


def test_small_tiles_of_each_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a small tile that spills, one as large as the other, and an entry of a table that is not taken."""
    for arch in sorted(launch.SHARED_MEMORY):
        for size in (16, 32, 64, 128):
            whole = configs.attention_config(torch.bfloat16, size, arch).block_sizes
            small = configs.small_attention_config(torch.bfloat16, size, arch)
            assert (small is None) == (whole["BLOCK_Q"] <= 64 or size == 128), (arch, size)
            assert small is None or small.block_sizes["BLOCK_D"] == size
        assert configs.small_attention_config(torch.float32, 64, arch) is None
    own = {"BLOCK_Q": 32, "BLOCK_K": 32, "num_warps": 2, "num_stages": 3}
    table = configs.from_tables

    def with_own(op: str, keys: tuple[str, ...], arch: int) -> Any:
        return configs.Config(own, "a test's") if keys == ("float16/64/small",) else table(op, keys, arch)

    monkeypatch.setattr(configs, "from_tables", with_own)
    configs._small_attention.cache_clear()
    try:
        assert configs.attention_config(torch.float16, 64, 90, small=True).block_sizes == {**own, "BLOCK_D": 64}
    finally:
        configs._small_attention.cache_clear()


def test_small_tiles_are_right(device: torch.device, poisoned: Any) -> None:
    """Catches a list that is not of the tile that the kernel takes."""
    lengths = [1, 15, 64, 3, 30, 63, 70]
    assert attention_plan.takes_small_tiles(batch_of(lengths), torch.bfloat16, 32, TRITON)
    check("small", lengths, 2, 32, torch.bfloat16, device, TRITON)
    poisoned.check()


# Static lists


@pytest.mark.parametrize("policy", [TRITON, INVARIANT], ids=["shared", "invariant"])
@pytest.mark.parametrize("lengths", [[20] * 30, [300, 5, 0, 7, 150], [1, 129] * 7])
def test_static_lists(lengths: list[int], policy: Policy) -> None:
    """Catches tiles, spans or offsets that come back from static memory as others than those of the plain path."""
    batch, bucket = batch_of(lengths), 1024
    kind = static_plan.kind_of(batch, bucket, torch.bfloat16, 64, policy)
    assert kind in static_plan.kinds(torch.bfloat16, 64, CPU, policy)
    static = static_plan.StaticPlan(bucket, torch.bfloat16, 64, CPU, policy, kind)
    memory = np.full(static.n_integers, -1, np.int32)
    assert static.fits(batch) and static.write(batch, memory)
    cu_seqlens, plan = static.split(torch.from_numpy(memory))
    expected = attention_plan.triton_plan(batch, torch.bfloat16, 64, policy)
    assert plan.small == expected.small and (plan.short_tiles is None) == (expected.short_tiles is None)
    assert torch.equal(cu_seqlens[: len(lengths) + 1], batch.cu_seqlens_cpu) and cu_seqlens.shape == (bucket + 1,)
    for made, right in ((plan.tiles, expected.tiles), (plan.short_tiles, expected.short_tiles)):
        if made is not None and right is not None:
            assert torch.equal(made[: len(right)], right) and not made[len(right) :].any()
            assert made.storage_offset() % 4 == 0  # as aligned as a tensor of its own, or kernels compile again
    assert torch.equal(plan.row_spans[: len(expected.row_spans)], expected.row_spans)
    assert plan.row_spans.shape == (0 if policy.batch_invariant else bucket,)


def test_dense_lists_are_for_batches_with_few_tiles() -> None:
    """Catches graphs in which most programs find nothing to do, and batches that a list is too short for."""
    kinds = {}
    for lengths in ([512] * 8, [300, 200, 384] * 4, [1, 129] * 31):
        batch = batch_of(lengths)
        kinds[len(lengths)] = static_plan.kind_of(batch, 4096, torch.bfloat16, 64, TRITON)
    assert [kind.dense for kind in kinds.values()] == [True, True, False]
    dense = static_plan.max_tiles(4096, torch.bfloat16, 64, CPU, TRITON, static_plan.Kind(dense=True))[0]
    assert dense == 49 and static_plan.max_tiles(4096, torch.bfloat16, 64, CPU, TRITON)[0] == 95


def test_long_lists_are_launched_in_parts(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a list of more tiles than a grid's second dimension holds, which no GPU would launch."""
    lengths = [5] * 9
    tiles = build_work_list(cu_seqlens_of(lengths).tolist(), 16, share=False).to(device)
    qkv = torch.randn(45, 96, device=device)
    whole = varlen_attention_forward(qkv, tiles, 2, 0.25)
    monkeypatch.setattr(attention, "MAX_TILES", 4)
    with launch.recording(80) as launches:
        varlen_attention_forward(qkv, tiles, 2, 0.25)
    assert [each.grid for each in launches] == [(2, 4), (2, 4), (2, 1)]
    assert torch.equal(varlen_attention_forward(qkv, tiles, 2, 0.25), whole)
    assert attention.MAX_TILES * tiles.tiles.shape[1] * 4 % 16 == 0


# Specialised warps


def specialized(block_k: int = 64, **changes: int) -> dict[str, int]:
    return {**attention_specialized.tiles()[0], "BLOCK_Q": 64, "BLOCK_K": block_k, **changes}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_specialized_kernel(dtype: torch.dtype, device: torch.device, poisoned: Any) -> None:
    """Catches a key of a neighbour, a row past the end, or a tile without rows that is written."""
    if device.type == "cuda":
        pytest.skip("it has not run on a GPU yet: `fastbert tune` holds it against float64 before it is taken")
    lengths, d = [1, 64, 65, 0, 130, 7], 32
    qkv = torch.randn(sum(lengths), 3 * 2 * d).to(device, dtype)
    tiles = build_work_list(cu_seqlens_of(lengths).tolist(), 64, share=False)
    tiles = WorkList(torch.cat([tiles.tiles, torch.zeros(2, 5, dtype=torch.int32)]), tiles.row_spans).to(device)
    qkv = guarded(qkv, extra_columns=8)
    ours = varlen_attention_forward(qkv, tiles, 2, d**-0.5, config=specialized(BLOCK_D=d))
    poisoned.check()
    plain = varlen_attention_forward(qkv, tiles, 2, d**-0.5, config={**configs.small_tile(90), "BLOCK_D": d})
    exact = varlen_attention_forward(qkv.float(), tiles, 2, d**-0.5, config={**configs.small_tile(90), "BLOCK_D": d})
    assert_as_accurate("specialized", ours, plain, exact.double())


def test_what_specialized_warps_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a combination that does not compile as it should, and is launched."""
    tiles = build_work_list([0, 40, 90], 64, share=False)
    shared = WorkList(tiles.tiles, torch.zeros(90, dtype=torch.int32))
    qkv = torch.randn(90, 3 * 64).bfloat16()
    for reason, x, made, changes in (
        ("16 bits", qkv.float(), tiles, {}),
        ("several sequences", qkv, shared, {}),
        ("4 warps, not 8", qkv, tiles, {"num_warps": 8}),
        ("not 32, 64 or 128", qkv, tiles, {"BLOCK_D": 16}),
        ("multiples of 16 bytes", torch.empty(90, 3 * 64 + 4).bfloat16()[:, :-4], tiles, {}),
    ):
        sizes = {**specialized(BLOCK_D=32), **changes}
        with pytest.raises(ValueError, match=reason):
            attention_specialized.specialized_attention_forward(x, made, 2, 0.2, sizes, torch.empty(90, 64))
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    for arch, refused in ((80, True), (90, False), (100, True)):
        assert (attention_specialized.obstacle(qkv, tiles, 32, arch) is not None) == refused


def test_another_kernel_does_what_the_specialized_one_cannot(device: torch.device) -> None:
    """Catches training or 8-bit results, in a table's tile of specialised warps, that fail or read another list."""
    tiles = build_work_list([0, 40, 90], 64, share=False).to(device)
    qkv = torch.randn(90, 3 * 64, device=device).bfloat16()
    lse = torch.empty(2, 90, device=device)
    for extra in ({"lse": lse}, {"dropout": Dropout(6554, 7, 0)}):
        with launch.recording(90) as launches:
            varlen_attention_forward(qkv, tiles, 2, 0.2, config=specialized(BLOCK_D=32), **extra)
        assert [each.kernel.__name__ for each in launches] == ["_varlen_attention_kernel"]
        assert launches[0].config["BLOCK_Q"] == 64 and "WARP_SPECIALIZE" not in launches[0].config


def test_lists_for_specialized_warps_share_no_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a table's tile of specialised warps that no batch ever takes."""
    sizes = specialized(BLOCK_D=64)
    monkeypatch.setattr(configs, "_attention", lambda *args: configs.Config(sizes, "a test's"))
    monkeypatch.setattr(attention_plan, "_tile_sizes", attention_plan._tile_sizes.__wrapped__)  # remembers nothing
    batch = batch_of([100, 20, 20, 500])
    plan = attention_plan.triton_plan(batch, torch.bfloat16, 64, TRITON)
    assert plan.row_spans.shape == (0,) and not plan.tiles[:, 4].any()
    static = static_plan.StaticPlan(1024, torch.bfloat16, 64, CPU, TRITON)
    assert static.split(torch.zeros(static.n_integers, dtype=torch.int32))[1].row_spans.shape == (0,)


def test_no_descriptor_of_the_host_in_a_specialized_loop() -> None:
    """Catches the combination that Triton compiles to copies larger than their buffers."""
    source = inspect.getsource(attention_specialized)
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    loops = [node for node in functions if "warp_specialize" in ast.unparse(node)]
    assert [node.name for node in loops] == ["_specialized_attention_kernel"]
    made = [n.targets[0].id for n in ast.walk(loops[0]) if isinstance(n, ast.Assign) and "descriptor" in ast.unparse(n)]
    used = {
        ast.unparse(n.func.value)
        for n in ast.walk(loops[0])
        if isinstance(n, ast.Call) and ".load" in ast.unparse(n.func)
    }
    assert used <= {*made, "tl"}
    qkv = torch.randn(90, 3 * 64).bfloat16()
    with launch.recording(90) as launches:
        tiles = build_work_list([0, 40, 90], 64, share=False)
        varlen_attention_forward(qkv, tiles, 2, 0.2, config=specialized(BLOCK_D=32))
    (each,) = launches
    assert all(isinstance(value, Tensor | int | float) for value in each.arguments.values())
