"""This module says what an engine knows of a model, and what each arithmetic offers.

Engines lie below the models: they know a model by the Protocol here, its layers as `Block`s, and a batch as packed ids.
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

    Ids are integers of shape (T,), on the model's device or on the host. inputs_embeds, (T, E), stands in the place of
    input_ids. token_type_ids is None in a model without segments, and where every id would be 0. position_ids is None
    where they are the batch's; an arithmetic finds all ids on the model's device, positions among them.
    """

    input_ids: Tensor | None
    token_type_ids: Tensor | None
    position_ids: Any  # a Tensor or None
    inputs_embeds: Tensor | None = None


class EncoderModel(Protocol):
    """A model as engines see it."""

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
        """Ids and the tables; or None, and tables whose words are the embeddings of the inputs, (T, E), already.

        inputs: None for the tables alone.
        """

    def embed(self, inputs: PackedInputs, batch: PackedBatch) -> Tensor:
        """Computes the input of the first layer, (T, H), by the modules themselves."""

    def check_ids_on_device(self, batch: PackedBatch, inputs: PackedInputs) -> None:
        """Raises IndexError where an id on the device is beyond its table. On a GPU this waits for it."""

    def kernels_note_ids(self) -> bool:
        """Tells whether the kernel of the embeddings runs, which can note ids beyond their table."""

    def table_sizes(self) -> tuple[int, int, int]:
        """The rows of the tables of words, token types and positions."""

    def blame_dtypes(self, error: RuntimeError) -> None:
        """Raises TypeError if parameters of different dtypes may be what PyTorch stumbled over."""

    def run_padding(self, n_tokens: int) -> None:
        """Runs a batch of n_tokens whose values do not matter, in texts of as many as the model reads."""

    def run_layers(self, x: Tensor, batch: PackedBatch, keep_states: bool) -> list[Tensor]:
        """The hidden states before the first layer and after each, or the last alone, by the modules themselves."""


class Arithmetic(Protocol):
    """One way to compute an encoder's hidden states. `fastbert.engine.Engine` chooses among them."""

    name: str

    def obstacles(self, model: Any, n_tokens: int | None, keep_states: bool, embedded: bool) -> Iterator[str]:
        """Every reason why it does not run this model, as it is at the moment, on such a batch.

        n_tokens: None asks for a batch of any size. keep_states: whether the states in between are wanted. embedded:
        whether the inputs are embeddings.
        """

    def prepare(self, model: Any) -> None:
        """Makes what it derives from the weights ahead of the first batch."""

    def run(self, model: Any, batch: PackedBatch, inputs: PackedInputs, keep_states: bool) -> list[Tensor] | None:
        """The last hidden state (T, H) as a list, or all L + 1 of them; None where the weights do not allow it."""
