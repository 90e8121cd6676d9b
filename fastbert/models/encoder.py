"""The encoders of all families share this interface: they take padded and packed batches, and the engine runs them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastbert import ops
from fastbert.checkpoint.config import BertConfig
from fastbert.checkpoint.family import AFTER_PADDING
from fastbert.engine import Block, EmbeddingTables, Engine, Options, PackedInputs, masks
from fastbert.engine.late_checks import NAMES
from fastbert.engine.listeners import listened
from fastbert.models import attention_weights, hooks
from fastbert.models.encoded import Encoded
from fastbert.models.inputs import Inputs, check_embeds, takes_inputs
from fastbert.models.modules import dense
from fastbert.models.outputs import BaseModelOutputWithPooling
from fastbert.models.pretrained import PreTrainedModel, listed
from fastbert.models.registry import class_for
from fastbert.ops import packing, tracing
from fastbert.ops.derived import Derived
from fastbert.ops.packing import PackedBatch

ANY_POSITION = 2**31 - 1  # of families without a table of positions

logger = logging.getLogger("fastbert")

Encoder = TypeVar("Encoder", bound="EncoderModel")


class EncoderModel(PreTrainedModel):
    """An `EncoderModel` is an encoder. Its family's class describes it, and the engine runs it.

    The family's class has `embeddings`, `embeddings_project` (or None), `encoder`, `pooler` (or None), `own_modules`
    and `blocks`. settings: the fields of `Options` by name.
    """

    own_modules: frozenset[type[nn.Module]]  # the classes of the encoder's original modules
    counts_distances = False  # whether attention depends on the distance in columns between two tokens
    embeddings: Any
    embeddings_project: Any
    encoder: Any
    pooler: Any

    def __new__(cls, config: BertConfig | None = None, *args: Any, **settings: Any) -> Any:
        """BertModel(config) makes the class of the config's family. config: None for a copy or a pickle."""
        if config is None:
            return nn.Module.__new__(cls)
        family_class = class_for(cls, config)
        return nn.Module.__new__(cls) if family_class is cls else family_class(config, *args, **settings)

    def __init__(self, config: BertConfig, options: Options | None = None, **settings: Any) -> None:
        options = Options.of(options, settings)
        super().__init__(config, options)
        # The padding id. By default positions count from it.
        self.counted_from = config.pad_token_id if config.family.positions == AFTER_PADDING else None
        self.engine = Engine()
        self.cuda_graphs, self.strict_ids = options.cuda_graphs, options.strict_ids

    @takes_inputs
    def forward(self, inputs: Inputs) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
        """Returns the hidden states of a padded batch; `Inputs` describes the arguments.

        Returns last_hidden_state (B, S, H), zeros at padding positions, and pooler_output (B, H), from the first token
        of each row that the mask keeps. hidden_states and attentions are there on request; attentions use the slow
        reference path. Raises IndexError for ids outside the vocabulary or the position table, ValueError for shapes.
        """
        encoded = self.encode(inputs)
        output = BaseModelOutputWithPooling(
            last_hidden_state=packing.pad(encoded.last_hidden_state, encoded.batch),
            pooler_output=self.pool(encoded),
            **encoded.padded(),
        )
        return output if inputs.wants_dict(self.config) else output.to_tuple()

    def pool(self, encoded: Encoded) -> Tensor | None:
        """Returns the pooled [CLS] vectors, (B, H), or None without a pooler."""
        if self.pooler is None or encoded.pooled is not None:
            return encoded.pooled
        return hooks.call(self.pooler, encoded.batch, self.policy, encoded.last_hidden_state)

    def blocks(self) -> Iterator[Block]:
        """Yields each layer as data."""
        raise NotImplementedError

    # Batches

    def encode(self, inputs: Inputs, batch: PackedBatch | None = None) -> Encoded:
        """Runs a padded batch and keeps the result packed, for heads, which work on packed tokens too.

        batch: the packing of the attention_mask, if the caller already has it.
        """
        tensors = inputs.tensors()
        device = self.device
        self._check_tensors(
            device, input_ids=tensors[0], attention_mask=tensors[1], token_type_ids=tensors[2], position_ids=tensors[3],
            inputs_embeds=tensors[4],
        )  # fmt: skip
        keep_states = inputs.wants("output_hidden_states", self.config)
        keep_attentions = inputs.wants("output_attentions", self.config)
        inputs = inputs.checked(self)
        transformed = tracing.transformed(*inputs.tensors())
        rows = inputs.rows()
        if batch is None and transformed is None and not keep_states and not keep_attentions:
            batch = masks.batch_of(self, inputs.attention_mask, rows[:3])
            if batch is not None:
                places = PackedInputs(*(None if x is None else x.flatten() for x in rows))
                return Encoded(batch, self._encode_tensors(batch, *places, False, True)[-1], None, None)
        if batch is None or transformed is not None:
            batch = inputs.batch(transformed, device)
        packed = PackedInputs(*(None if x is None else packing.pack(x, batch) for x in rows))
        if keep_attentions:
            if transformed is None:
                self._check_ids(batch, packed)
            attention_weights.accept_reference(self.policy)
            if not attention_weights.is_altered(self):
                return attention_weights.encode_by_reference(self, batch, inputs, keep_states)
            weights = batch.plan(attention_weights.PLAN, list)
        if transformed is not None:
            states = self._encode_traced(batch, packed, keep_states, transformed)
        else:
            states = self._encode_tensors(batch, *packed, keep_states=keep_states, check=True)
        return Encoded(batch, states[-1], states if keep_states else None, tuple(weights) if keep_attentions else None)

    def forward_packed(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """(T,) ids of B sequences one after the other -> (T, H).

        cu_seqlens: (B + 1,) int32, starts at 0, ends at T. position_ids count from 0 in each sequence by default, in
        RoBERTa's family from the padding id + 1, over the ids that are not the padding id.
        """
        device = self.device
        alone = token_type_ids is None and position_ids is None
        if not alone or type(input_ids) is not Tensor or input_ids.device != device:  # else nothing is wrong
            self._check_tensors(device, input_ids=input_ids, token_type_ids=token_type_ids, position_ids=position_ids)
        if input_ids.dim() != 1:
            raise ValueError(f"input_ids: expected shape (T,), got {tuple(input_ids.shape)}")
        batch = packing.from_cu_seqlens(cu_seqlens, input_ids.shape[0], device)
        return self._encode_tensors(batch, input_ids, token_type_ids, position_ids, None, False, True)[-1]

    def encode_packed(
        self,
        batch: PackedBatch,
        input_ids: Tensor | None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        keep_states: bool = False,
        check: bool = True,
    ) -> list[Tensor]:
        """Maps packed (T,) ids or (T, H) embeddings to a list: the last hidden state (T, H), or all L + 1
        (keep_states).

        Ids of a model on a GPU may be on the host: they are then checked at once, and the engine copies them.
        check=False skips the checks of ids and weights, for callers who have checked the ids and called
        `follow_weights`.
        """
        self._check_tensors(
            self.device, input_ids=input_ids, token_type_ids=token_type_ids, position_ids=position_ids,
            inputs_embeds=inputs_embeds,
        )  # fmt: skip
        return self._encode_tensors(batch, input_ids, token_type_ids, position_ids, inputs_embeds, keep_states, check)

    def _encode_tensors(
        self,
        batch: PackedBatch,
        input_ids: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        keep_states: bool,
        check: bool,
    ) -> list[Tensor]:
        """Does the work of `encode_packed` with tensors whose devices are known."""
        n_tokens = batch.n_tokens
        shape = (n_tokens,)
        for name, tensor in (NAMES[0], input_ids), (NAMES[1], token_type_ids), (NAMES[2], position_ids):
            if tensor is not None and tensor.shape != shape:
                raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
        if inputs_embeds is not None:
            check_embeds(inputs_embeds, self)
        if self.counts_distances and batch.mask is None and batch.indices is not None:
            packing.find_holes(batch)
        if position_ids is None and self.counted_from is not None:
            if input_ids is None:
                position_ids = batch.position_ids + self.counted_from + 1
            else:
                position_ids = packing.positions_after_padding(input_ids, self.counted_from, batch)
        inputs = PackedInputs(input_ids, token_type_ids, position_ids, inputs_embeds)
        if check:
            self._check_ids_on_host(batch, inputs)
        return self.engine.run(self, batch, inputs, keep_states, check)

    def _encode_traced(
        self, batch: PackedBatch, inputs: PackedInputs, keep_states: bool, transformed: str
    ) -> list[Tensor]:
        """Returns the hidden states of a `packing.in_place` batch. transformed: the name of the tracer, for the log."""
        tracing.note(type(self).__name__, transformed)
        if inputs.position_ids is None:
            inputs = inputs._replace(position_ids=batch.position_ids)
        return self.engine.run_traced(self, batch, inputs, keep_states, transformed)

    # Methods that the engine calls

    def tables(self, inputs: PackedInputs | None) -> tuple[Tensor | None, EmbeddingTables]:
        """Returns ids and the tables of the embeddings: see `BertEmbeddings.tables`."""
        if inputs is None:
            return self.embeddings.tables()
        return self.embeddings.tables(inputs.input_ids, inputs.inputs_embeds, self.policy)

    def embed(self, inputs: PackedInputs, batch: PackedBatch) -> Tensor:
        """Computes the input of the first layer, (T, H)."""
        x = hooks.call_embeddings(self.embeddings, batch, self.policy, **inputs._asdict())
        return x if self.embeddings_project is None else dense(self.embeddings_project, x, self.policy, batch=batch)

    def run_layers(self, x: Tensor, batch: PackedBatch, keep_states: bool) -> list[Tensor]:
        """Returns the hidden states before the first layer and after each layer, or only the last."""
        if not listened(self.encoder):
            return self.encoder(x, batch, self.policy, keep_states)
        return hooks.states_of_encoder(self.encoder, batch, self.policy, x, keep_states)

    def run_padding(self, n_tokens: int) -> None:
        """Runs a batch of n_tokens with arbitrary ids, in texts of the greatest sequence length."""
        ids = torch.zeros(n_tokens, dtype=torch.int64, device=self.device)
        offsets = [*range(0, n_tokens, self.longest_text), n_tokens]
        self.forward_packed(ids, torch.tensor(offsets, dtype=torch.int32, device="cpu"))

    def follow_weights(self) -> None:
        """Updates derived tensors if weights were written to without PyTorch's count.

        On a GPU this waits for the device, so callers of `encode_packed` with check=False call it once for all
        batches. On a CPU it does nothing, because `encode_packed` checks the weights.
        """
        self.engine.follow_weights(self)

    def all_in_eval_mode(self) -> bool:
        """Tells whether every module is known to be in eval mode, without a check of each; False if it is not known."""
        pooler = self.pooler
        return not self.training and (pooler is None or not pooler.training) and self.engine.state.plain_modules(self)

    @property
    def strict_ids(self) -> bool:
        """True if each call on a GPU waits for the check of its own ids; see `wait_for_checks`."""
        return self.engine.checks.strict

    @strict_ids.setter
    def strict_ids(self, strict: bool) -> None:
        self.engine.checks.strict = bool(strict)
        self.engine.graphs.clear()

    def wait_for_checks(self) -> None:
        """Waits until all batches so far have run, and raises IndexError if a batch had ids outside their table.

        A call does not wait for the check of ids that are already on the GPU: the next call raises, or this method.
        """
        if self.engine.checks.active:
            packing.wait_for(self.device)
            self.engine.settle(self)

    @property
    def cuda_graphs(self) -> bool:
        """True (the default) if short batches run as CUDA graphs; the results are the same to the bit."""
        return self.engine.graphs.enabled

    @cuda_graphs.setter
    def cuda_graphs(self, enabled: bool) -> None:
        self.engine.graphs.enabled = bool(enabled)
        if not enabled:
            self.engine.graphs.clear()

    # Methods that drop what the engine keeps

    def renew(self, training: bool) -> None:
        """Marks the tensors derived from weights to be made again at their next use, or, for training, drops them.

        `train` and `eval` do this too, and set the mode.
        """
        self.engine.set_training(training)
        ops.forget_packed(self.parameters())
        for module in self.encoder.modules():
            if isinstance(module.__dict__.get("derived"), Derived):
                module.renew(training)

    def train(self: Encoder, mode: bool = True) -> Encoder:
        self.engine.set_training(mode)
        return super().train(mode)

    def _apply(self: Encoder, *args: Any, **kwargs: Any) -> Encoder:
        self.engine.graphs.clear()  # otherwise their memory would stay on the old device
        return super()._apply(*args, **kwargs)

    def _replicate_for_data_parallel(self: Encoder) -> Encoder:
        replica: Any = super()._replicate_for_data_parallel()
        replica.engine = Engine()  # its parameters are different objects
        return replica

    # Checks

    def _check_ids(self, batch: PackedBatch, inputs: PackedInputs) -> None:
        """Raises IndexError if an id is outside its table."""
        self._check_ids_on_host(batch, inputs)
        self.check_ids_on_device(batch, inputs)

    def _check_ids_on_host(self, batch: PackedBatch, inputs: PackedInputs) -> None:
        """Checks ids on the host, and the positions that follow from the sequence lengths."""
        input_ids, token_type_ids, position_ids, _ = inputs
        sizes = self.table_sizes()
        if position_ids is None:
            last, n_positions = batch.last_position, sizes[2]
            if last is not None and last >= n_positions:
                raise IndexError(f"position_ids: expected values from 0 to {n_positions - 1}, got {last}")
            if last is None and batch.padded_length > n_positions:
                self._check_in_tables([None, None, batch.position_ids], sizes)
        ids = [
            None if input_ids is None or not packing.on_host(input_ids.device) else input_ids,
            None if token_type_ids is None or not packing.on_host(token_type_ids.device) else token_type_ids,
            None if position_ids is None or not packing.on_host(position_ids.device) else position_ids,
        ]
        self._check_in_tables(ids, sizes)

    def check_ids(self, input_ids: Tensor, token_type_ids: Tensor | None) -> None:
        """Raises IndexError if one of the ids is outside its table."""
        self._check_in_tables([input_ids, token_type_ids, None], self.table_sizes())

    def check_ids_on_device(self, batch: PackedBatch, inputs: PackedInputs) -> None:
        """Checks ids on their device; on a GPU the host waits for the result."""
        ids = [None if x is None or packing.on_host(x.device) else x for x in inputs[:3]]
        self._check_in_tables(ids, self.table_sizes())

    def _check_in_tables(self, ids: list[Tensor | None], sizes: tuple[int, int, int]) -> None:
        if not (ids[0] is ids[1] is ids[2] is None or ops.seen_within(ids, sizes)):
            ops.check_ids(**{name: (x, size) for name, x, size in zip(NAMES, ids, sizes, strict=True)})

    def table_sizes(self) -> tuple[int, int, int]:
        """Returns the numbers of rows in the tables of words, token types and positions."""
        embeddings: Any = self._modules["embeddings"]
        tables = embeddings._modules  # read directly, unlike a module's attributes
        words, positions = tables.get("word_embeddings"), tables.get("position_embeddings")
        # An adapter in the place of the word embeddings may lack their attributes.
        n_words: int = getattr(words, "num_embeddings", None) or self.config.vocab_size
        return n_words, embeddings.n_token_types, ANY_POSITION if positions is None else positions.num_embeddings

    def kernels_note_ids(self) -> bool:
        """Tells whether the embedding kernel runs, which checks ids on the GPU."""
        return self.embeddings.runs_in_kernel(self.policy)

    def _report_missing(self, missing: list[str], src: str) -> list[str]:
        pooler = [name for name in missing if name.startswith("pooler.")]
        if pooler:
            theirs = listed([self.config.family.to_theirs(name) for name in pooler])
            logger.warning("%s: the checkpoint lacks %s: pooler_output will be None", src, theirs)
            self.pooler = None
        return super()._report_missing([name for name in missing if name not in pooler], src)
