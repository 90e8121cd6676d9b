"""This module decides whether the host waits for the number of tokens in a mask on a GPU.

README.md of this package gives the reasons. `fastbert.ops.masked` packs such small batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastbert.engine.interface import EncoderModel, PackedInputs
from fastbert.engine.state import TRAINING
from fastbert.ops import masked, packing
from fastbert.ops.packing import PackedBatch


def obstacles(model: EncoderModel, device: torch.device | None = None) -> Iterator[str]:
    """Yields every reason why the host waits for the number of tokens of all masks on the GPU.

    device: for another device than the model's, only some reasons are known.
    """
    engine = model.engine
    if engine.checks.strict:
        yield "strict_ids=True waits for the checks of each batch"
    if device is not None and device != model.device:
        if model.training:
            yield TRAINING
        return
    yield from engine.bucket_obstacles(model)
    if not model.kernels_note_ids():
        yield "no kernel of the embeddings checks the ids"


def batch_obstacle(model: EncoderModel, mask: Tensor, ids: tuple[Tensor | None, ...]) -> str | None:
    """Tells why the host waits for the tokens of this mask, (B, S), or knows their number at once; or returns None.

    ids: input_ids, token_type_ids and position_ids, None for those not passed.
    """
    if packing.on_host(mask.device):
        return "the mask is on the host"
    if ids[0] is None:
        return "the inputs are embeddings"
    if not 0 < mask.numel() <= masked.MOST_PLACES:
        return f"the mask has {mask.numel()} places, more than the {masked.MOST_PLACES} that a kernel packs"
    if any(x is not None and x.device != mask.device for x in ids):
        return "ids are on another device than the mask"
    if ids[2] is None and mask.shape[1] > model.table_sizes()[2]:
        return "the mask has more columns than the model has positions"
    return None


def batch_of(model: Any, mask: Tensor | None, ids: tuple[Tensor | None, ...]) -> PackedBatch | None:
    """Returns the batch of a mask, (B, S), whose lengths stay on the device, or None if they do not.

    If a graph launched first turns out to be outdated, `wait` is called.
    """
    if mask is None or torch.compiler.is_compiling() or batch_obstacle(model, mask, ids) is not None:
        return None
    engine = model.engine
    trusted = engine.graphs.trusted and engine.graphs.notes and engine.unwatched(model)
    if not trusted and next(obstacles(model), None) is not None:
        return None
    return masked.batch_of(mask, model.counts_distances)


def wait(batch: PackedBatch, inputs: PackedInputs) -> PackedInputs:
    """Waits for the lengths of a batch on the device, and packs its inputs."""
    assert batch.mask is not None
    shape, reads_columns = (batch.batch_size, batch.padded_length), batch.reads_columns
    packed = packing.unpad(batch.mask.view(shape), batch.device)
    batch.__dict__.clear()
    batch.__dict__.update(packed.__dict__)
    if reads_columns:
        packing.find_holes(batch)
    return PackedInputs(*(None if x is None else packing.pack(x.view(shape), batch) for x in inputs))
