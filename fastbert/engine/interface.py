"""This module defines the interfaces between an engine, a model and an arithmetic.

Engines do not import models: they use a model through this Protocol, its layers as `Block`s, and a batch as packed ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fastbert.engine.block import Block, EmbeddingTables
from fastbert.ops import Policy
from fastbert.ops.packing import PackedBatch


class PackedInputs(NamedTuple):
    """The inputs of a packed batch.

    Ids are integers of shape (T,), on the model's device or on the host. inputs_embeds, (T, E), replaces input_ids.
    token_type_ids is None in a model without segments, and if every id would be 0. position_ids is None for the
    positions of the batch. An arithmetic gets all ids, also positions, on the model's device.
    """

    input_ids: Tensor | None
    token_type_ids: Tensor | None
    position_ids: Any  # a Tensor or None
    inputs_embeds: Tensor | None = None


class EncoderModel(Protocol):
    """This Protocol is the part of a model that engines use."""

    config: Any
    policy: Policy
    precision: str | None
    training: bool
    embeddings: Any
    embeddings_project: Any
    encoder: Any
    engine: Any
    own_modules: frozenset[type[nn.Module]]  # the classes that its encoder is made of, as it is made
    counts_distances: bool  # whether attention depends on how many columns are between two tokens

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def blocks(self) -> Iterator[Block]:
        """Each layer as data."""

    def tables(self, inputs: PackedInputs | None) -> tuple[Tensor | None, EmbeddingTables]:
        """Returns ids and tables; or None and tables whose words are the embeddings of the inputs, (T, E).

        inputs: None for the tables alone.
        """

    def embed(self, inputs: PackedInputs, batch: PackedBatch) -> Tensor:
        """Computes the input of the first layer, (T, H), with the modules."""

    def check_ids_on_device(self, batch: PackedBatch, inputs: PackedInputs) -> None:
        """Raises IndexError if an id on the device is outside its table. On a GPU the host waits."""

    def kernels_note_ids(self) -> bool:
        """Tells whether the embedding kernel runs, which checks ids on the GPU."""

    def table_sizes(self) -> tuple[int, int, int]:
        """Returns the numbers of rows in the tables of words, token types and positions."""

    def blame_dtypes(self, error: RuntimeError) -> None:
        """Raises TypeError if the parameters have different dtypes, a likely reason of PyTorch's error."""

    def run_padding(self, n_tokens: int) -> None:
        """Runs a batch of n_tokens with arbitrary ids, in texts of the greatest sequence length."""

    def run_layers(self, x: Tensor, batch: PackedBatch, keep_states: bool) -> list[Tensor]:
        """Returns the hidden states before the first layer and after each layer, or only the last, with the modules."""


class Arithmetic(Protocol):
    """An `Arithmetic` computes an encoder's hidden states in one of several ways; the `Engine` chooses one."""

    name: str

    def obstacles(self, model: Any, n_tokens: int | None, keep_states: bool, embedded: bool) -> Iterator[str]:
        """Yields every reason why it does not run this model, in its present state, on such a batch.

        n_tokens: None for a batch of any size. keep_states: whether the call requests all hidden states. embedded:
        whether the inputs are embeddings.
        """

    def prepare(self, model: Any) -> None:
        """Makes derived tensors ahead of the first batch."""

    def run(self, model: Any, batch: PackedBatch, inputs: PackedInputs, keep_states: bool) -> list[Tensor] | None:
        """Returns the last hidden state (T, H) as a list, or all L + 1 of them; None if the weights do not allow it."""
