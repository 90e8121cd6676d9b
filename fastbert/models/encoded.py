"""This module has the packed result of an encoder, which heads read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastbert.models.inputs import Inputs
from fastbert.ops import packing
from fastbert.ops.packing import PackedBatch


@dataclass
class Encoded:
    """An Encoded has the hidden states of a packed batch, and other requested outputs."""

    batch: PackedBatch
    last_hidden_state: Tensor  # (T, H)
    hidden_states: list[Tensor] | None  # L + 1 times (T, H)
    attentions: tuple[Tensor, ...] | None  # L times (B, N, S, S)
    pooled: Tensor | None = None  # (B, H), if already pooled

    def padded(self) -> dict[str, Any]:
        """Returns the fields that the outputs of all models share, padded."""
        states = self.hidden_states
        padded = None if states is None else tuple(packing.pad(state, self.batch) for state in states)
        return {"hidden_states": padded, "attentions": self.attentions}


def encode_by_call(bert: Any, inputs: Inputs) -> Encoded:
    """Runs BertModel.encode as a call of the module, so that its hooks see, and may change, its output."""
    output = bert(
        inputs.input_ids, inputs.attention_mask, inputs.token_type_ids, inputs.position_ids, inputs.inputs_embeds,
        output_attentions=inputs.output_attentions, output_hidden_states=inputs.output_hidden_states, return_dict=True,
    )  # fmt: skip
    last, mask = output[0], inputs.attention_mask
    if mask is None:
        batch = packing.without_padding(last.shape[0], last.shape[1], last.device)
    else:
        batch = packing.unpad(mask.expand(last.shape[:2]), last.device)
    states = output.hidden_states
    rows = None if states is None else [packing.pack(state, batch) for state in states]
    return Encoded(batch, packing.pack(last, batch), rows, output.attentions, output.pooler_output)
