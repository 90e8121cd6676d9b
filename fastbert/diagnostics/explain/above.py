"""What stands above the operations, asked in one place: the encoder in 8 bits, in one call, as a CUDA graph."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.diagnostics.explain.stand_ins import DryRun
from fastbert.engine import cpu_encoder, graphs, quantized
from fastbert.models.bert import BertModel, Encoded
from fastbert.models.pretrained import PreTrainedModel
from fastbert.ops import Policy, attention, packed_linear, recording
from fastbert.ops.dispatch import Decision
from fastbert.ops.packing import PackedBatch
from fastbert.ops.quantized import DTYPES, Quantized
from fastbert.pipelines.run import TOKEN_BUDGET, Request, Run, batches
from fastbert.pipelines.sentence import SentenceEncoder

# Decided where the model stands


def eight_bit_decision(
    bert: BertModel, policy: Policy, device: torch.device, dtype: torch.dtype, arch: int | None
) -> Decision | None:
    """What would run the encoder in 8 bits, None where nothing asks for that; the backend UNQUANTISED where nothing
    does."""
    return None if bert.precision is None else quantized.decide(bert, policy, device, dtype, arch)


def is_unquantised(decision: Decision | None) -> bool:
    return decision is None or decision.backend == quantized.UNQUANTISED


def graph_obstacle(bert: BertModel, device: torch.device) -> str | None:
    """Why no batch would run as a CUDA graph on the device, or None."""
    with torch.no_grad():
        obstacle = bert.graph_obstacle() if bert.device == device else bert.graphs_refused()
    if obstacle is None and not bert.cuda_graphs:
        return "the model's cuda_graphs is False"
    return obstacle


def largest_graph() -> int:
    """The most tokens of a batch that runs as a CUDA graph."""
    return graphs.LARGEST


def one_call_obstacle(bert: BertModel, policy: Policy, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the encoder would not run in one call of a C++ kernel on this CPU, or None."""
    obstacle = cpu_encoder.obstacle(bert.config, dtype, policy, device)
    if obstacle is None and bert.device == device and bert.dtype == dtype:
        with torch.no_grad():
            return bert.cpu_encoder_obstacle()
    return obstacle


def rows_computed(lengths: Sequence[int], model: nn.Module, bert: BertModel) -> int:
    """Rows that the encoder computes: of each batch into which a SentenceEncoder cuts the texts, rounded up."""
    parts = [sum(lengths)]
    if isinstance(model, SentenceEncoder):
        ordered = sorted(lengths, reverse=True)
        budget = model.token_budget or TOKEN_BUDGET.get(bert.device.type, TOKEN_BUDGET["cuda"])
        parts = [sum(ordered[a:b]) for a, b in batches(list(accumulate(ordered)), budget, None)]
    with torch.no_grad():
        if bert._packs_weights():
            return sum(packed_linear.rows_for(n, bert.dtype) for n in parts)
        if bert.device.type == "cuda" and bert.graph_obstacle() is None:
            return sum(graphs.bucket_of(n) or n for n in parts)
    return sum(parts)


# The dry run of what the operations stand in


def set_policy(model: PreTrainedModel, policy: Policy) -> None:
    model.__dict__["policy"] = policy


def run_encoder(bert: Any, dry: DryRun, batch: PackedBatch) -> Tensor:
    """The last hidden state of a model of stand-ins, operation by operation."""
    ids = recording.stand_in((batch.n_tokens,), torch.int64)
    token_type_ids = None if getattr(bert.embeddings, "token_type_embeddings", None) is None else ids
    x = bert._embed(ids, token_type_ids, batch.position_ids, None, batch)
    return bert._run_encoder(x, batch, False)[-1]


def run_in_8_bits(bert: Any, dry: DryRun, batch: PackedBatch, backend: str) -> Tensor:
    """The same on 8-bit operands. backend: that of `eight_bit_decision`; "cpu", whose one call does what the emulation
    does, is explained by that."""
    backend = "torch" if backend == "cpu" else backend
    ids = recording.stand_in((batch.n_tokens,), torch.int64)
    token_type_ids = None if bert.embeddings.token_type_embeddings is None else ids
    rows = recording.stand_in((batch.n_tokens,), torch.int32)
    plan = rows, recording.stand_in((1, 4), torch.int32), None
    batch = attention.with_plan(batch, dry.dtype, bert.config.head_size, Policy(backend), plan)
    bert.__dict__["quantized_weights"] = _EightBitWeights(dry)
    with dry.inside(bert.embeddings.__dict__["place"]):
        return quantized.encode(bert, backend, batch, ids, token_type_ids, batch.position_ids, None)[-1]


class _EightBitWeights:
    """Stands for the 8-bit weights of a model."""

    def __init__(self, dry: DryRun) -> None:
        self.dry = dry
        self.kept: list[Tensor] = []  # since the id of each is its name

    def of(self, precision: str, name: str, linears: Sequence[Any], rotated: bool) -> tuple[Quantized, Tensor]:
        weights = [linear.weight for linear in linears]
        n_rows, n_cols = sum(weight.shape[0] for weight in weights), weights[0].shape[1]
        data = recording.stand_in((n_rows, n_cols), DTYPES[precision])
        names = [self.dry.names[id(weight)] for weight in weights]
        self.dry.names[id(data)] = "+".join([names[0], *(name.rpartition(".")[2] for name in names[1:])])
        if len(names) > 1:  # and attention comes next
            self.dry.place = names[0].rpartition(".")[0]
        self.kept.append(data)
        quantised = Quantized(data, recording.stand_in((n_rows, 1), torch.float32), n_cols)
        return quantised, recording.stand_in((n_rows,), linears[0].bias.dtype)


def run_head(model: Any, encoded: Encoded) -> None:
    """What follows the encoder in a model of stand-ins: the pooler, or the head."""
    if isinstance(model, BertModel):
        model.pool(encoded)
        return
    model.__dict__["_encode"] = lambda *args, **kwargs: encoded
    n, length = encoded.batch.batch_size, encoded.batch.padded_length
    shape = (n // 2, 2, length) if model.task == "MultipleChoice" else (n, length)
    model.forward(recording.stand_in(shape, torch.int64))


def run_pooling(encoder: SentenceEncoder, model: Any, tail: list[Any], encoded: Encoded) -> None:
    """What follows the model in a SentenceEncoder, on stand-ins of the model and of the modules after the pooling."""
    pipeline: Any = SimpleNamespace(model=model, tail=tail, pooling=encoder.pooling, max_seq_length=1)
    Run(pipeline, Request())._pool(encoded.last_hidden_state, encoded.batch)
