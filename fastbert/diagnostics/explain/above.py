"""This module tells `explain` about the decisions above the operations: 8 bits, one call, CUDA graphs.

Only this file of `explain` uses the engine, heads and pooling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.diagnostics.explain.stand_ins import DryRun
from fastbert.engine import PackedInputs, buckets, masks, quantized
from fastbert.engine.arithmetic import Modules
from fastbert.models.encoded import Encoded
from fastbert.models.encoder import EncoderModel
from fastbert.models.pretrained import PreTrainedModel
from fastbert.ops import Policy, attention_plan, recording
from fastbert.ops.dispatch import Decision
from fastbert.ops.packing import PackedBatch
from fastbert.ops.quantized import DTYPES, Quantized
from fastbert.ops.recording import Record
from fastbert.pipelines.batching import batches, default_token_budget
from fastbert.pipelines.pooling import sentence_vectors
from fastbert.pipelines.sentence import SentenceEncoder

# The following functions examine the model itself.


def eight_bit_decision(
    bert: EncoderModel, policy: Policy, device: torch.device, dtype: torch.dtype, arch: int | None
) -> Decision | None:
    """Returns the backend that would run the encoder in 8 bits, or None if 8 bits are not requested."""
    return None if bert.precision is None else quantized.decide(bert, policy, device, dtype, arch)


def is_unquantised(decision: Decision | None) -> bool:
    """Tells whether the encoder runs in the model's dtype."""
    return decision is None or decision.backend == quantized.UNQUANTISED


def graph_obstacles(bert: EncoderModel, device: torch.device) -> list[str]:
    """Returns every reason why no batch would run as a CUDA graph on the device."""
    with torch.no_grad():
        return list(bert.engine.graph_obstacles(bert, device))


def mask_obstacles(bert: EncoderModel, device: torch.device) -> list[str]:
    """Returns every reason why the host waits for the number of tokens in a mask on the device."""
    with torch.no_grad():
        return list(masks.obstacles(bert, device))


def largest_graph() -> int:
    """Returns the most tokens of a batch that runs as a CUDA graph."""
    return buckets.LARGEST


def one_call_obstacles(bert: EncoderModel, policy: Policy, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Returns every reason why the encoder would not run in one call of a C++ kernel on this CPU."""
    with torch.no_grad():
        return list(bert.engine.one_call_obstacles(bert, policy, device, dtype))


def as_launched(bert: EncoderModel, records: list[Record]) -> list[Record]:
    """Returns the records of an encoder whose layers' kernels are launched without their modules.

    Pre-norm layers then add the residual in the kernel of the norm. This is recorded as "sum_norm".
    """
    with torch.no_grad():
        if bert.training or any(bert.engine.state.obstacles(bert, bert.device)):
            return records
        first = next(iter(bert.blocks()), None)
    if first is None or not first.pre_norm:
        return records
    norms = [i for i, record in enumerate(records) if _is_norm_of_layer(record)]
    launched = list(records)
    for i in norms if first.attention_norm is None else norms[1:]:
        launched[i] = replace(records[i], op="sum_norm", facts={**records[i].facts, "residual": True})
    return launched


def _is_norm_of_layer(record: Record) -> bool:
    return (record.op, record.backend) == ("layer_norm", "triton") and ".encoder." in f".{record.module}"


def rows_computed(lengths: Sequence[int], model: nn.Module, bert: EncoderModel) -> int:
    """Counts the rows that the encoder computes. Each batch of a SentenceEncoder is rounded up."""
    parts = [sum(lengths)]
    if isinstance(model, SentenceEncoder):
        ordered = sorted(lengths, reverse=True)
        budget = model.token_budget or default_token_budget(bert.device)
        parts = [sum(ordered[a:b]) for a, b in batches(list(accumulate(ordered)), budget, None)]
    with torch.no_grad():
        return sum(bert.engine.rows_of(bert, n_tokens) for n_tokens in parts)


# The following functions run the parts around the operations in a dry run.


def set_policy(model: PreTrainedModel, policy: Policy) -> None:
    model.__dict__["policy"] = policy


def run_encoder(bert: Any, batch: PackedBatch) -> Tensor:
    """Runs an encoder of stand-ins operation by operation. Returns its last hidden state."""
    return Modules().run(bert, batch, _inputs(bert, batch), False)[-1]


def run_in_8_bits(bert: Any, dry: DryRun, batch: PackedBatch, backend: str) -> Tensor:
    """Runs an encoder of stand-ins on 8-bit operands. Returns its last hidden state.

    backend: the backend of `eight_bit_decision`. For "cpu", the operations of the emulation represent the one call.
    """
    policy = bert.policy
    set_policy(bert, Policy("torch" if backend == "cpu" else backend))
    integers = recording.stand_in((batch.n_tokens,), torch.int32), recording.stand_in((1, 5), torch.int32)
    plan = attention_plan.Plan(*integers)
    batch = attention_plan.with_plan(batch, dry.dtype, bert.config.head_size, bert.policy, plan)
    arithmetic: Any = quantized.EightBit()
    arithmetic.weights = _EightBitWeights(dry)
    with dry.inside(bert.embeddings.__dict__["place"]):
        hidden = arithmetic.run(bert, batch, _inputs(bert, batch), False)[-1]
    set_policy(bert, policy)
    return hidden


def _inputs(bert: Any, batch: PackedBatch) -> PackedInputs:
    ids = recording.stand_in((batch.n_tokens,), torch.int64)
    has_types = getattr(bert.embeddings, "token_type_embeddings", None) is not None
    return PackedInputs(ids, ids if has_types else None, batch.position_ids)


class _EightBitWeights:
    """Replaces the 8-bit weights of a model."""

    def __init__(self, dry: DryRun) -> None:
        self.dry = dry
        self.kept: list[Tensor] = []  # keeps their ids, which identify them

    def of(self, precision: str, name: str, linears: Sequence[Any], rotated: bool) -> tuple[Quantized, Tensor]:
        weights = [linear.weight for linear in linears]
        n_rows, n_cols = sum(weight.shape[0] for weight in weights), weights[0].shape[1]
        data = recording.stand_in((n_rows, n_cols), DTYPES[precision])
        names = [self.dry.names.get(id(weight), self.dry.place) for weight in weights]  # a slice has no name
        self.dry.names[id(data)] = "+".join([names[0], *(name.rpartition(".")[2] for name in names[1:])])
        if len(names) > 1:  # attention follows
            self.dry.place = names[0].rpartition(".")[0]
        self.kept.append(data)
        quantised = Quantized(data, recording.stand_in((n_rows, 1), torch.float32), n_cols)
        return quantised, recording.stand_in((n_rows,), weights[0].dtype)


def run_head(model: Any, encoded: Encoded) -> None:
    """Runs the pooler or the head of a model of stand-ins."""
    if isinstance(model, EncoderModel):
        model.pool(encoded)
        return
    model.__dict__["_encode"] = lambda *args, **kwargs: encoded
    n, length = encoded.batch.batch_size, encoded.batch.padded_length
    shape = (n // 2, 2, length) if model.task == "MultipleChoice" else (n, length)
    model.forward(recording.stand_in(shape, torch.int64))


def run_pooling(encoder: SentenceEncoder, model: Any, tail: list[Any], encoded: Encoded) -> None:
    """Runs the parts of a SentenceEncoder after the model: pooling, and stand-ins of the modules after it."""
    pipeline: Any = SimpleNamespace(model=model, tail=tuple(tail), pooling=encoder.pooling)
    sentence_vectors(pipeline, encoded.last_hidden_state, encoded.batch)
