"""The objective of pre-training gives the losses of a packed batch as sums, and counts what is predicted right.

Sums and not means: a step is many batches, on many processes, and its loss is divided by the counts of the whole step.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert import ops
from fastbert.models.heads import is_plain_head
from fastbert.models.modules import dense
from fastbert.models.tasks import BertForMaskedLM, BertForPreTraining
from fastbert.ops import IGNORED, packing
from fastbert.ops.packing import PackedBatch

# The places in the sums of a batch.
MLM_LOSS, MLM_RIGHT, NSP_LOSS, NSP_RIGHT = range(4)
N_SUMS = 4

_ROWS_OF_LOGITS = 1024  # at once, where only the best class is asked for


class PretrainingObjective(nn.Module):
    """MLM and NSP losses of a BertForPreTraining, or MLM losses of a BertForMaskedLM, on packed batches.

    It is a module, so that DistributedDataParallel and FSDP can wrap it.
    """

    def __init__(self, model: BertForPreTraining | BertForMaskedLM) -> None:
        super().__init__()
        if not isinstance(model, (BertForPreTraining, BertForMaskedLM)):
            raise TypeError(f"model: expected a BertForPreTraining or a BertForMaskedLM, got {type(model).__name__}")
        self.model = model
        self.nsp = isinstance(model, BertForPreTraining)

    def forward(
        self,
        batch: PackedBatch,
        input_ids: Tensor,
        token_type_ids: Tensor | None,
        rows: Tensor,
        labels: Tensor,
        next_sentence_label: Tensor | None,
        scales: tuple[float, float] = (1.0, 1.0),
        count_right: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Returns the loss to differentiate, and the sums, (4,) float32, at the places that this file names.

        batch: the packing of B sequences in T tokens. input_ids, token_type_ids: (T,) int64. rows: (M,) int64, which of
        the T tokens are predicted; labels: (M,) int64, their ids. next_sentence_label: (B,) int64, 0 = is next, 1 =
        random, -100 = no pair. scales: what the sums of MLM and NSP losses are multiplied with. count_right: whether to
        count the tokens and pairs that are predicted right, which costs a product; without it these sums are 0.

        Labels are not checked: their maker knows that they are in range.
        """
        model: Any = self.model
        encoder = model.bert
        hidden = encoder.encode_packed(batch, input_ids, token_type_ids, check=False)[-1]  # (T, H)
        head, policy = model.cls.predictions, model.policy
        picked = hidden.index_select(0, rows)  # (M, H)
        x, decoder = head.transform(picked, policy), head.decoder
        if is_plain_head(model.cls):
            mlm = ops.linear_cross_entropy(
                x, decoder.weight, decoder.bias, labels, reduction="sum", policy=policy, check=False
            )
        else:
            mlm = F.cross_entropy(decoder(x).float(), labels, reduction="sum")
        sums = mlm.new_zeros(N_SUMS, dtype=torch.float32)
        sums[MLM_LOSS] = mlm.detach()
        loss = mlm * scales[0]
        if count_right:
            sums[MLM_RIGHT] = _n_right(decoder, x, labels)
        if self.nsp:
            pooled = encoder.pooler(hidden, batch=batch, policy=policy)
            logits = dense(model.cls.seq_relationship, pooled, policy).float()  # (B, 2)
            is_next = cast(Tensor, next_sentence_label)
            nsp = F.cross_entropy(logits, is_next, ignore_index=IGNORED, reduction="sum")
            sums[NSP_LOSS] = nsp.detach()
            loss = loss + nsp * scales[1]
            if count_right:
                sums[NSP_RIGHT] = torch.eq(logits.detach().argmax(-1), is_next).sum()
        return loss, sums


@torch.no_grad()
def _n_right(decoder: Any, x: Tensor, labels: Tensor) -> Tensor:
    """How many rows of x, (M, H), have their label as the likeliest token."""
    chunks = zip(x.split(_ROWS_OF_LOGITS), labels.split(_ROWS_OF_LOGITS), strict=True)
    right = [(decoder(rows).argmax(-1) == wanted).sum() for rows, wanted in chunks]
    return torch.stack(right).sum() if right else labels.new_zeros(())


def arguments_of(batch: Any, device: torch.device) -> tuple[Any, ...]:
    """Returns the arguments of a forward pass of the objective, on a device, from a Batch of fastbert.training.data.

    Nothing waits for the device.
    """
    offsets = batch.cu_seqlens.tolist()
    lengths = [end - start for start, end in zip(offsets, offsets[1:], strict=False)]
    tensors = (
        torch.from_numpy(array)
        for array in (batch.input_ids, batch.token_type_ids, batch.rows, batch.labels, batch.next_sentence_label)
    )
    return packing.from_lengths(lengths, device), *(packing.to_device(tensor, device) for tensor in tensors)
