"""This module runs a model dry: the model's code runs on stand-ins, and each operation records its decision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fastbert.diagnostics.explain import above
from fastbert.diagnostics.explain.model import backbone, prefix_of
from fastbert.diagnostics.explain.stand_ins import DryRun, after_pooling, stand_in_for
from fastbert.models.encoded import Encoded
from fastbert.models.pretrained import PreTrainedModel
from fastbert.ops import Policy, recording
from fastbert.ops.dispatch import Decision
from fastbert.ops.packing import PackedBatch
from fastbert.ops.recording import Record
from fastbert.pipelines.sentence import SentenceEncoder

N_SEQUENCES, LENGTH = 6, 5  # any numbers: at least packed_linear.LEAST_ROWS, and even for pairs of choices
N_TOKENS = N_SEQUENCES * LENGTH


@dataclass(frozen=True)
class Question:
    """A `Question` holds a model, and the policy, the device and the dtype of the dry run.

    cast: the requested dtype, or None for the dtype of each parameter. arch: the compute capability of a GPU, which
    need not be present, or None. outer: the model, or the object that contains it.
    """

    model: PreTrainedModel
    outer: Any
    policy: Policy
    device: torch.device
    cast: torch.dtype | None
    arch: int | None

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype if self.cast is None else self.cast


def recorder_for(question: Question) -> DryRun:
    return DryRun(question.device, question.arch, question.dtype, question.cast)


def dry_run(question: Question, dry: DryRun, eight_bit: Decision | None) -> tuple[list[Record], list[Record]]:
    """Returns the records of the encoder, and of the parts after it, in the order in which they run.

    eight_bit: the result of `eight_bit_decision`.
    """
    model, outer = question.model, question.outer
    with recording.recorded(dry), torch.inference_mode(False), torch.no_grad():
        stand_in = stand_in_for(model, prefix_of(model, outer).removesuffix("."), dry, model.config)
        bert = backbone(stand_in)
        for part in (stand_in, bert):
            above.set_policy(part, question.policy)
        batch = _batch()
        if above.is_unquantised(eight_bit):
            hidden = above.run_encoder(bert, batch)
        else:
            assert eight_bit is not None
            hidden = above.run_in_8_bits(bert, dry, batch, eight_bit.backend)
        n_encoder = len(dry.records)
        encoded = Encoded(batch, hidden, None, None)
        if isinstance(outer, SentenceEncoder):  # it does not use BERT's own pooler
            tail = [after_pooling(module, f"tail.{i}", dry) for i, module in enumerate(outer.tail)]
            if outer.has_dense:  # rows of other heads are not shown
                with dry.inside("pooling"):
                    above.run_pooling(outer, stand_in, tail, encoded)
        else:
            above.run_head(stand_in, encoded)
    return dry.records[:n_encoder], dry.records[n_encoder:]


def _batch() -> PackedBatch:
    offsets = torch.arange(N_SEQUENCES + 1, dtype=torch.int32, device="cpu") * LENGTH
    return PackedBatch(
        cu_seqlens=recording.stand_in((N_SEQUENCES + 1,), torch.int32),
        cu_seqlens_cpu=offsets,
        position_ids=recording.stand_in((N_TOKENS,), torch.int64),
        batch_size=N_SEQUENCES,
        padded_length=LENGTH,
    )
