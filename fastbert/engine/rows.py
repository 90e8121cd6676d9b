"""This module prepares the inputs of a batch for kernels: on the device, in int64, and in the rows of a bucket."""

from __future__ import annotations

import torch

from fastbert.engine.buckets import bucket_of
from fastbert.engine.interface import EncoderModel, PackedInputs
from fastbert.engine.static_memory import Layout, Shape
from fastbert.ops import attention_plan, masked, packing, static_plan
from fastbert.ops.packing import PackedBatch


def as_int64(model: EncoderModel, batch: PackedBatch, inputs: PackedInputs) -> PackedInputs:
    """Returns the inputs on the device with ids in int64, because kernels are compiled for this dtype."""
    if batch.device.type != "cpu":
        inputs = on_device(batch, inputs)
    input_ids, token_type_ids, position_ids, inputs_embeds = inputs
    position_ids = batch.position_ids if position_ids is None else position_ids
    if model.embeddings.token_type_embeddings is None:
        token_type_ids = None
    elif token_type_ids is None:
        token_type_ids = torch.zeros_like(batch.position_ids)
    else:
        token_type_ids = token_type_ids.long()
    input_ids = None if input_ids is None else input_ids.long()
    return PackedInputs(input_ids, token_type_ids, position_ids.long(), inputs_embeds)


def on_device(batch: PackedBatch, inputs: PackedInputs) -> PackedInputs:
    """Returns the inputs with every id on the batch's device, and positions, unless a kernel computes them."""
    input_ids, token_type_ids, position_ids, _ = inputs
    if position_ids is None and batch.mask is None:
        position_ids = batch.position_ids
    device = batch.device
    if device.type != "cpu":
        ids = (input_ids, token_type_ids, position_ids)
        input_ids, token_type_ids, position_ids = (None if x is None else packing.to_device(x, device) for x in ids)
    return PackedInputs(input_ids, token_type_ids, position_ids, inputs.inputs_embeds)


def in_bucket_rows(batch: PackedBatch, inputs: PackedInputs, shape: Shape) -> tuple[PackedInputs, PackedBatch]:
    """Returns ids and batch in the rows of the batch's bucket, as for a graph; the rows of padding are zeros."""
    bucket = bucket_of(batch.n_tokens)
    assert bucket is not None
    if batch.mask is not None:
        layout = _layout_of_mask(batch, bucket, shape)
        words = torch.empty(layout.n_words, dtype=torch.int64, device=shape.device)
        layout.unpack(words, batch, inputs, 0)
        return layout.static_batch(words)
    rows = PackedInputs(*(torch.zeros(bucket, dtype=torch.int64, device=shape.device) for _ in range(3)))
    for row, ids in zip(rows[:3], inputs[:3], strict=True):
        if row is not None and ids is not None:
            row[: batch.n_tokens].copy_(ids)
    static = attention_plan.batch_in_rows(batch, rows.position_ids, shape.dtype, shape.head_size, shape.policy)
    if batch.columns is not None:
        columns, seq_ids = (torch.full((bucket,), fill, dtype=torch.int32, device=shape.device) for fill in (0, bucket))
        columns[: batch.n_tokens], seq_ids[: batch.n_tokens] = batch.columns, batch.seq_ids
        static.columns = columns
        static.plan("seq_ids", lambda: seq_ids)
    return rows, static


def _layout_of_mask(batch: PackedBatch, bucket: int, shape: Shape) -> Layout:
    """Returns the layout of memory for a batch whose lengths stay on the device, with lists for every such batch."""
    sizes = shape.dtype, shape.head_size
    kind = static_plan.kind_of(batch, bucket, *sizes, shape.policy)
    most = masked.most_tiles(batch.batch_size, batch.padded_length, *sizes, shape.device, shape.policy, kind.small)
    return Layout(bucket, shape, kind, most)
