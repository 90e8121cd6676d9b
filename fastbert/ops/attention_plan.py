"""This module makes the lists of tiles that attention's Triton kernels need for a batch."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from fastbert.ops import masked
from fastbert.ops.dispatch import Policy
from fastbert.ops.kernel_modules import dense_rows, kernels_of
from fastbert.ops.masked import SHORT_BATCH, SHORT_TEXTS
from fastbert.ops.packing import PackedBatch, to_device

if TYPE_CHECKING:
    from fastbert_kernels.work_list import WorkList


class Plan(NamedTuple):
    """A `Plan` holds the work list of a batch, int32 on its device: the parts of `work_list.WorkList`.

    row_spans: (T,), or (0,) if no tile is shared. tiles: (W, 5). short_tiles: those of short sequences, (W', 5), or
    None if these have no separate list. small: whether `tiles` are of `configs.small_attention_config`.
    """

    row_spans: torch.Tensor
    tiles: torch.Tensor
    short_tiles: torch.Tensor | None = None
    small: bool = False


NO_PLAN = None, None, None, False  # for an operation that makes one when it runs
LONGEST_IS_BOUND = "longest is a bound"  # the plan of a batch whose lengths on the host stand for any that may come
TILES = "tiles"  # the plan of a batch in the rows of a bucket that `tiles_of` cuts


def lists_of(
    cu_seqlens_cpu: torch.Tensor,
    dtype: torch.dtype,
    head_size: int,
    device: torch.device,
    share: bool = True,
    small: bool = False,
) -> tuple[WorkList, WorkList | None]:
    """Returns the work lists of a batch on the CPU: of all sequences, or of the long ones and of the short ones."""
    from fastbert_kernels import configs, launch
    from fastbert_kernels.work_list import build_work_list

    offsets, arch = cu_seqlens_cpu.numpy(), launch.arch(device)
    sizes = configs.attention_config(dtype, head_size, arch, small).block_sizes
    block_q = sizes["BLOCK_Q"]
    short = None if share else configs.short_attention_config(dtype, head_size, arch)
    if short is None:
        return build_work_list(offsets, block_q, share and not sizes.get("WARP_SPECIALIZE")), None
    longest = short.block_sizes["BLOCK_K"]
    long_list = build_work_list(offsets, block_q, False, longer_than=longest)
    return long_list, build_work_list(offsets, short.block_sizes["BLOCK_Q"], False, up_to=longest)


def launch_arguments(
    qkv: torch.Tensor,
    cu_seqlens_cpu: torch.Tensor,
    plan: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, bool],
    num_heads: int,
) -> tuple[torch.Tensor, WorkList, WorkList | None, dict[str, int]]:
    """Returns what the kernel takes: rows of unit stride, the work lists of a plan, or of none, and the block sizes."""
    configs, launch, work_list_of = kernels_of("configs"), kernels_of("launch"), kernels_of("work_list").WorkList
    head_size, (row_spans, tiles, short_tiles, small) = qkv.shape[1] // (3 * num_heads), plan
    if tiles is None or row_spans is None:
        work_list = lists_of(cu_seqlens_cpu, qkv.dtype, head_size, qkv.device)[0].to(qkv.device)
        short_list, small = None, False
    else:
        work_list = work_list_of(tiles, row_spans)
        short_list = None if short_tiles is None else work_list_of(short_tiles, row_spans)  # which share no tiles
    qkv = dense_rows(qkv)
    config = configs.attention_config(qkv.dtype, head_size, launch.arch(qkv.device), small).block_sizes
    return qkv, work_list, short_list, config


def takes_small_tiles(batch: PackedBatch, dtype: torch.dtype, head_size: int, policy: Policy) -> bool:
    """Tells whether the batch runs faster in smaller tiles, because its texts are short or few.

    A tile of several texts multiplies all its rows by all its keys, so smaller tiles waste less. Few tiles also leave
    multiprocessors idle. The answer is no if bits must not depend on the batch.
    """
    if policy.batch_invariant:
        return False
    return _small_tiles_suit(batch.cu_seqlens_cpu.numpy(), dtype, head_size, batch.device)


def _small_tiles_suit(offsets: np.ndarray, dtype: torch.dtype, head_size: int, device: torch.device) -> bool:
    from fastbert_kernels import configs, launch

    if configs.small_attention_config(dtype, head_size, launch.arch(device)) is None:
        return False
    if offsets[-1] <= SHORT_BATCH * launch.n_multiprocessors(device):
        return True
    lengths = (offsets[1:] - offsets[:-1]).astype(np.int64)
    return int(lengths @ lengths) <= SHORT_TEXTS * int(offsets[-1])


def plan_key(dtype: torch.dtype, head_size: int, policy: Policy) -> tuple[Any, ...]:
    return "triton attention", dtype, head_size, policy.batch_invariant


def triton_plan(batch: PackedBatch, dtype: torch.dtype, head_size: int, policy: Policy) -> Plan:
    """Returns the plan for the kernel, made once a batch."""

    def make() -> Plan:
        small = takes_small_tiles(batch, dtype, head_size, policy)
        lists = host_work_lists(batch, dtype, head_size, policy, small)
        tiles, row_spans = (to_device(part, batch.device) for part in lists[0])
        short_tiles = None if lists[1] is None else to_device(lists[1].tiles, batch.device)
        return Plan(row_spans, tiles, short_tiles, small)

    return batch.plan(plan_key(dtype, head_size, policy), make)


def batch_in_rows(
    batch: PackedBatch, position_ids: torch.Tensor, qkv_dtype: torch.dtype, head_size: int, policy: Policy
) -> PackedBatch:
    """Returns the same sequences, with their triton plan, in the rows of position_ids, the last ones empty.

    The results of attention for the empty rows are undefined.
    """
    plan = triton_plan(batch, qkv_dtype, head_size, policy)
    return batch.in_rows(position_ids, _plans_of(plan, qkv_dtype, head_size, policy))


def with_plan(batch: PackedBatch, qkv_dtype: torch.dtype, head_size: int, policy: Policy, plan: Plan) -> PackedBatch:
    """Returns the batch with a triton plan that the caller keeps. Tiles of no rows may fill its lists up."""
    return replace(batch, _plans=_plans_of(plan, qkv_dtype, head_size, policy))


def _plans_of(plan: Plan, qkv_dtype: torch.dtype, head_size: int, policy: Policy) -> dict[Any, Any]:
    """Returns what a batch in the rows of a bucket keeps: its plan, and of which attention its tiles are."""
    return {plan_key(qkv_dtype, head_size, policy): plan, TILES: (plan, qkv_dtype, head_size)}


def _heights(plan: Plan, qkv_dtype: torch.dtype, head_size: int, device: torch.device) -> list[int]:
    """Returns the rows of a tile in each list of a plan."""
    from fastbert_kernels import configs, launch

    arch = launch.arch(device)
    heights = [configs.attention_config(qkv_dtype, head_size, arch, plan.small).block_sizes["BLOCK_Q"]]
    if plan.short_tiles is not None:
        short = configs.short_attention_config(qkv_dtype, head_size, arch)
        assert short is not None
        heights.append(short.block_sizes["BLOCK_Q"])
    return heights


def tiles_of(batch: PackedBatch, block_q: int, share: bool) -> WorkList:
    """Returns a list of tiles of at most block_q rows, for a kernel of attention with tiles of its own.

    They are cut on the device from those of a plan in the rows of a bucket, where a graph does it again for each batch,
    and made of the lengths elsewhere. share: whether short sequences may share one there.
    """
    from fastbert_kernels.work_list import WorkList, build_work_list

    if not batch.has_plan(TILES):
        return build_work_list(batch.cu_seqlens_cpu.numpy(), block_q, share).to(batch.device)
    plan, qkv_dtype, head_size = batch.plan(TILES, tuple)
    heights = _heights(plan, qkv_dtype, head_size, batch.device)
    lists = [part for part in (plan.tiles, plan.short_tiles) if part is not None]
    cut = [_cut(tiles, -(-height // block_q), block_q) for tiles, height in zip(lists, heights, strict=True)]
    return WorkList(cut[0] if len(cut) == 1 else torch.cat(cut), plan.row_spans)


def _cut(tiles: torch.Tensor, n_parts: int, block_q: int) -> torch.Tensor:
    """(W, 5) tiles -> (W * n_parts, 5), of block_q rows each; those beyond the end of a tile have none."""
    if n_parts == 1:
        return tiles
    end = tiles[:, None, 1]
    parts = torch.arange(0, n_parts * block_q, block_q, dtype=torch.int32, device=tiles.device)
    starts = torch.minimum(tiles[:, None, 0] + parts, end)
    rows = torch.stack([starts, torch.minimum(starts + block_q, end)], -1)  # (W, n_parts, 2)
    return torch.cat([rows, tiles[:, None, 2:].expand(-1, n_parts, -1)], -1).flatten(0, 1)


def host_work_lists(
    batch: PackedBatch, qkv_dtype: torch.dtype, head_size: int, policy: Policy, small: bool = False
) -> tuple[WorkList, WorkList | None]:
    """Returns the work lists of the batch for the triton backend, on the CPU: of all or of long sequences, and short.

    They are made once a batch. small: of the smaller tile.
    """
    share = not policy.batch_invariant
    key = "work lists", qkv_dtype, head_size, share, small
    return batch.plan(key, lambda: lists_of(batch.cu_seqlens_cpu, qkv_dtype, head_size, batch.device, share, small))


class Kind(NamedTuple):
    """A `Kind` of static lists serves a kind of batch.

    small: of smaller tiles. dense: of three tiles in the rows of two full ones, and not of as many as there can be, so
    that few programs of a graph find nothing to do. holes: with the column and the sequence of each row, for layers
    that read them where masks have holes.
    """

    small: bool = False
    dense: bool = False
    holes: bool = False


ANY_BATCH, HOLES = Kind(), Kind(holes=True)


def max_tiles(
    n_tokens: int,
    qkv_dtype: torch.dtype,
    head_size: int,
    device: torch.device,
    policy: Policy,
    kind: Kind = ANY_BATCH,
) -> tuple[int, int | None]:
    """Returns the lengths of static work lists for n_tokens tokens; None without a list of short sequences.

    If neighbours share tiles, no batch needs a longer list, unless the list is dense. If they do not share tiles,
    batches of very short sequences may need a longer one.
    """
    from fastbert_kernels import configs, launch, work_list

    arch = launch.arch(device)
    block_q = configs.attention_config(qkv_dtype, head_size, arch, kind.small).block_sizes["BLOCK_Q"]
    most = work_list.max_tiles(n_tokens, block_q)
    if kind.dense:
        most = min(most, work_list.dense_tiles(n_tokens, block_q))
    short = configs.short_attention_config(qkv_dtype, head_size, arch) if policy.batch_invariant else None
    return most, None if short is None else work_list.max_short_tiles(n_tokens)


class StaticPlan:
    """A `StaticPlan` is the layout of attention's integers in static memory, for batches in the rows of a bucket.

    They are int32, each part 16-byte aligned. A smaller bucket needs no more of them than a larger one of its kind. If
    all are 0, there are no tiles. n_tiles: the length of the lists, by default that of `max_tiles`.
    """

    def __init__(
        self,
        bucket: int,
        qkv_dtype: torch.dtype,
        head_size: int,
        device: torch.device,
        policy: Policy,
        kind: Kind = ANY_BATCH,
        n_tiles: tuple[int, int | None] | None = None,
    ) -> None:
        from fastbert_kernels import configs, launch
        from fastbert_kernels.work_list import N_COLUMNS

        sizes_of = configs.attention_config(qkv_dtype, head_size, launch.arch(device), kind.small).block_sizes
        shared = not policy.batch_invariant and not sizes_of.get("WARP_SPECIALIZE")
        self.bucket, self.policy, self.kind, self.block_q = bucket, policy, kind, sizes_of["BLOCK_Q"]
        self._qkv, self._n_columns = (qkv_dtype, head_size), N_COLUMNS
        lengths = max_tiles(bucket, qkv_dtype, head_size, device, policy, kind) if n_tiles is None else n_tiles
        self._n_tiles = [length for length in lengths if length is not None]
        # Work lists, one after the other, row_spans, cu_seqlens, and the columns and sequences of rows.
        sizes = [*(N_COLUMNS * length for length in self._n_tiles), bucket if shared else 0, bucket + 1]
        sizes += [bucket, bucket] if kind.holes else [0, 0]
        starts = [sum(map(_aligned, sizes[:i])) for i in range(len(sizes) + 1)]
        self._parts = [slice(start, start + size) for start, size in zip(starts, sizes, strict=False)]
        self.n_integers = starts[-1]
        self.columns = self._parts[-2]  # which differ between batches of the same lengths
        self._masks: dict[tuple[int, int], bool] = {}  # by B and S, whether lists fit any such mask

    def split(self, integers: torch.Tensor) -> tuple[torch.Tensor, Plan]:
        """Returns cu_seqlens (T' + 1,) and the plan of the bucket, views of static memory (at least n_integers,)."""
        *lists, row_spans, cu_seqlens, _, _ = (integers[part] for part in self._parts)
        tiles = [part.view(-1, self._n_columns) for part in lists]
        return cu_seqlens, Plan(row_spans, tiles[0], tiles[1] if len(tiles) > 1 else None, self.kind.small)

    def split_columns(self, integers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Returns the columns and the sequences of rows, (T',) each, views of static memory; None without them."""
        columns, seq_ids = (integers[part] for part in self._parts[-2:])
        return (columns, seq_ids) if self.kind.holes else None

    def fits(self, batch: PackedBatch) -> bool:
        """Tells whether `write` can write the batch, or, for lengths on the device, any such batch."""
        if batch.mask is None:
            return self.write(batch, np.empty(self.n_integers, np.int32))
        shape = batch.batch_size, batch.padded_length
        if shape not in self._masks:
            most = masked.most_tiles(*shape, *self._qkv, batch.device, self.policy, self.kind.small)
            self._masks[shape] = all(n is None or n <= room for n, room in zip(most, self._n_tiles, strict=False))
        return self._masks[shape]

    def write(self, batch: PackedBatch, out: np.ndarray) -> bool:
        """Writes a batch of at most `bucket` tokens and sequences to out, (n_integers,) int32 on the host.

        Returns False, and writes nothing, if a list does not fit.
        """
        lists = host_work_lists(batch, *self._qkv, self.policy, self.kind.small)
        rows = [work_list.tiles.numpy().reshape(-1) for work_list in lists if work_list is not None]
        *parts, row_spans, cu_seqlens, _, seq_ids = (out[part] for part in self._parts)
        if any(tiles.shape[0] > part.shape[0] for tiles, part in zip(rows, parts, strict=True)):
            return False
        for part, tiles in zip(parts, rows, strict=True):
            part[: tiles.shape[0]] = tiles
            part[tiles.shape[0] :] = 0
        spans = lists[0].row_spans.numpy()
        row_spans[: spans.shape[0]] = spans
        offsets = batch.cu_seqlens_cpu.numpy()
        cu_seqlens[: offsets.shape[0]] = offsets
        cu_seqlens[offsets.shape[0] :] = offsets[-1]  # the other sequences are empty
        if self.kind.holes:
            seq_ids[: offsets[-1]] = np.arange(offsets.shape[0] - 1, dtype=np.int32).repeat(np.diff(offsets))
            seq_ids[offsets[-1] :] = self.bucket
        return True


def kind_of(batch: PackedBatch, bucket: int, qkv_dtype: torch.dtype, head_size: int, policy: Policy) -> Kind:
    """Returns the kind of static lists for the batch in the rows of a bucket.

    It is kept for the last lengths.
    """
    offsets, padded, holes = batch.form
    if policy.batch_invariant:
        return HOLES if holes else ANY_BATCH
    device = batch.device
    key = offsets, padded, bucket, qkv_dtype, head_size, device, policy, holes, *circumstances()
    kind = _kinds.get(key)
    if kind is None:
        if padded is not None:
            small = masked.small_tiles_suit(*padded, qkv_dtype, head_size, device)
            n_tiles = masked.most_tiles(*padded, qkv_dtype, head_size, device, policy, small)[0]
        else:
            small = takes_small_tiles(batch, qkv_dtype, head_size, policy)
            n_tiles = host_work_lists(batch, qkv_dtype, head_size, policy, small)[0].tiles.shape[0]
        dense = max_tiles(bucket, qkv_dtype, head_size, device, policy, Kind(small, True))[0]
        if len(_kinds) >= MAX_KINDS:
            _kinds.clear()
        kind = _kinds[key] = Kind(small, n_tiles <= dense, holes)
    return kind


_kinds: dict[tuple[Any, ...], Kind] = {}
MAX_KINDS = 64  # forms of batches whose kind is remembered


def circumstances() -> tuple[bool, int]:
    """Returns the state that `kind_of` depends on in addition to its arguments."""
    return kernels_of("launch").recorded is not None, kernels_of("tables").generation


def kinds(
    qkv_dtype: torch.dtype, head_size: int, device: torch.device, policy: Policy, holes: bool = False
) -> list[Kind]:
    """Lists every kind of static lists that batches may take. holes: whether layers read columns."""
    from fastbert_kernels import configs, launch

    whole = (False, True) if holes else (False,)
    if policy.batch_invariant:
        return [ANY_BATCH._replace(holes=each) for each in whole]
    small = configs.small_attention_config(qkv_dtype, head_size, launch.arch(device)) is not None
    return [Kind(*of) for of in itertools.product((False, True) if small else (False,), (False, True), whole)]


def kinds_in(
    bucket: int, qkv_dtype: torch.dtype, head_size: int, device: torch.device, policy: Policy, holes: bool = False
) -> list[Kind]:
    """Lists the kinds of static lists that batches of at most as many tokens as the bucket has rows may take there."""
    from fastbert_kernels import launch

    every = kinds(qkv_dtype, head_size, device, policy, holes)
    small = [kind for kind in every if kind.small]
    return small if small and bucket <= SHORT_BATCH * launch.n_multiprocessors(device) else every


def _aligned(n_integers: int) -> int:
    """Rounds up to whole 16 bytes."""
    return -(-n_integers // 4) * 4


def gradient_plan(
    batch: PackedBatch, dtype: torch.dtype, head_size: int, biased: bool = False, windowed: bool = False
) -> Any:
    """Returns the plan for the kernels of attention's gradients, made once a batch for all layers.

    biased: with a position bias. windowed: within a window.
    """

    def make() -> Any:
        from fastbert_kernels import configs, launch
        from fastbert_kernels.attention_backward import Plan as GradientPlan
        from fastbert_kernels.attention_backward import work_lists
        from fastbert_kernels.work_list import WorkList

        tiles = configs.attention_backward_configs(dtype, head_size, launch.arch(batch.device), biased, windowed)
        lists = work_lists(batch.cu_seqlens_cpu.tolist(), tiles)
        queries = WorkList(*(to_device(part, batch.device) for part in lists.queries))
        if lists.keys is lists.queries:
            return GradientPlan(queries, queries)
        return GradientPlan(queries, WorkList(*(to_device(part, batch.device) for part in lists.keys)))

    return batch.plan(("triton attention gradients", dtype, head_size, biased, windowed), make)
