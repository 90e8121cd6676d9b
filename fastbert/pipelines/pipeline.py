"""A pipeline is data: the model, its tokenizer, and the steps from the model's output to vectors or scores.

SentenceEncoder, CrossEncoder and the adapters make one. `run`, `pooling` and `verify` take one, and need nothing else
from its maker.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from fastbert.models.bert import BertModel
from fastbert.models.encoded import Encoded
from fastbert.text.encoding import PackedEncoding

# A pooling mode of sentence-transformers -> the mode of fastbert.ops.pool
POOLING_MODES = {
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weighted_mean",
    "lasttoken": "last",
}

VectorModule = Callable[[Tensor], Tensor]  # (B, K) -> (B, M)


@dataclass
class Pooling:
    """A Pooling names the modes by which token vectors become one vector; several vectors are concatenated.

    modes: keys of `POOLING_MODES`. include_prompt: whether the tokens of the prompt count.
    """

    modes: str | Sequence[str] = ("mean",)
    include_prompt: bool = True

    def __post_init__(self) -> None:
        self.modes = (self.modes,) if isinstance(self.modes, str) else tuple(self.modes)
        if not self.modes or (unknown := [mode for mode in self.modes if mode not in POOLING_MODES]):
            got = unknown if self.modes else "none"
            raise ValueError(f"pooling: got {got}, expected at least one of {', '.join(POOLING_MODES)}")


class PackingTokenizer(Protocol):
    """A PackingTokenizer is fastbert's own tokenizer, or one of transformers with the same methods."""

    @property
    def all_special_ids(self) -> list[int]: ...

    @property
    def model_max_length(self) -> int | None: ...

    def encode_packed(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        *,
        max_length: int | None = None,
        warn: bool = True,
    ) -> PackedEncoding: ...


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A Pipeline has a tokenizer, an encoder, and either pooling with the modules after it, or a head.

    model: the encoder. max_seq_length: the most tokens of a text or a pair, special tokens included. tail: modules on
    sentence vectors after the pooling, (B, K) -> (B, M). head: computes logits (B, num_labels) of an encoded batch.
    prompts: texts by name, which are put in front of an input. truncate_dim: the number of values that a vector keeps.
    token_budget: tokens in a batch, None for the default of the device.
    """

    model: BertModel
    tokenizer: PackingTokenizer
    max_seq_length: int
    pooling: Pooling | None = None
    tail: tuple[VectorModule, ...] = ()
    head: Callable[[Encoded], Tensor] | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    truncate_dim: int | None = None
    token_budget: int | None = None

    @property
    def device(self) -> torch.device:
        """Returns the device of the model."""
        return self.model.device
