"""The objective of pre-training returns the losses of a packed batch as sums, and counts the right predictions.

It returns sums instead of means, because a step has many batches on many processes. The counts of the whole step divide
its loss.
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

# The indices in the sums of a batch.
MLM_LOSS, MLM_RIGHT, NSP_LOSS, NSP_RIGHT = range(4)
N_SUMS = 4

_ROWS_OF_LOGITS = 1024  # rows of logits per product in `_n_right`


class PretrainingObjective(nn.Module):
    """The objective computes the MLM and NSP losses of a BertForPreTraining, or the MLM loss of a BertForMaskedLM.

    Batches are packed. It is a module, so that DistributedDataParallel and FSDP can wrap it.
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
        """Returns the loss to differentiate, and the sums, (4,) float32, at the indices defined in this file.

        batch: the packing of B sequences in T tokens. input_ids, token_type_ids: (T,) int64. rows: (M,) int64, the
        indices of the tokens to predict; labels: (M,) int64, their ids. next_sentence_label: (B,) int64, 0 = is next, 1
        = random, -100 = no pair. scales: factors for the sums of MLM and NSP losses. count_right: whether to count the
        right predictions of tokens and pairs, which costs one more matrix product; without it these sums are 0.

        The labels are not checked: the code that makes them guarantees that they are in range.
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
    """Returns the number of rows of x, (M, H), whose label is the most likely token."""
    chunks = zip(x.split(_ROWS_OF_LOGITS), labels.split(_ROWS_OF_LOGITS), strict=True)
    right = [(decoder(rows).argmax(-1) == wanted).sum() for rows, wanted in chunks]
    return torch.stack(right).sum() if right else labels.new_zeros(())


def arguments_of(batch: Any, device: torch.device) -> tuple[Any, ...]:
    """Returns the arguments of the objective's forward pass, on a device, from a Batch of fastbert.training.data.

    It does not wait for the device.
    """
    offsets = batch.cu_seqlens.tolist()
    lengths = [end - start for start, end in zip(offsets, offsets[1:], strict=False)]
    tensors = (
        torch.from_numpy(array)
        for array in (batch.input_ids, batch.token_type_ids, batch.rows, batch.labels, batch.next_sentence_label)
    )
    return packing.from_lengths(lengths, device), *(packing.to_device(tensor, device) for tensor in tensors)
