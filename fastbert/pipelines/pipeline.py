"""A pipeline is the data that leads from text to vectors or scores: a model, its tokenizer and what follows the model.

SentenceEncoder, CrossEncoder and the adapters make one. `run`, `pooling` and `verify` take one, and ask nothing else of
whoever made it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from fastbert.models.bert import BertModel, Encoded
from fastbert.text.tokenizer import PackedEncoding

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
    """Pooling makes one vector of token vectors: by a mode of `POOLING_MODES`, or by several, concatenated in order.

    include_prompt: whether the tokens of the prompt count.
    """

    modes: str | Sequence[str] = ("mean",)
    include_prompt: bool = True

    def __post_init__(self) -> None:
        self.modes = (self.modes,) if isinstance(self.modes, str) else tuple(self.modes)
        if not self.modes or (unknown := [mode for mode in self.modes if mode not in POOLING_MODES]):
            got = unknown if self.modes else "none"
            raise ValueError(f"pooling: got {got}, expected at least one of {', '.join(POOLING_MODES)}")


class PackingTokenizer(Protocol):
    """A tokenizer as a pipeline uses it: fastbert's own, or one of transformers behind the same methods."""

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
    """A tokenizer, an encoder, and either pooling with the modules after it, or a head.

    model: the encoder. max_seq_length: tokens of a text or a pair that are read, special tokens included. tail: modules
    on sentence vectors, (B, K) -> (B, M), after the pooling. head: what an encoded batch gives instead of vectors,
    (B, num_labels). prompts: texts by name, to stand in front of an input. truncate_dim: how many numbers of a vector
    are kept. token_budget: tokens in a batch, None for the default of the device.
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
        return self.model.device
