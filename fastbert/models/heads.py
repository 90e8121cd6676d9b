"""The seven BERT models with heads: pre-training, masked LM, next sentence, classification, choice, tokens, answers.

Where another family has the same head, or one that differs as its `Head` in fastbert.checkpoint.families says, the
class is it. Arguments, outputs and losses are those of transformers, with two differences that follow from packing:
per-token logits are zero at padding positions, and padding positions enter no loss.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert import ops
from fastbert.checkpoint.config import BertConfig
from fastbert.checkpoint.family import Head
from fastbert.checkpoint.match import Match
from fastbert.engine import hooks
from fastbert.models import outputs
from fastbert.models.bert import (
    BertModel,
    Encoded,
    as_it_is,
    dense,
    dropped,
    encode_by_call,
    first_rows,
    is_plain_norm,
    wants_dict,
)
from fastbert.models.forward_arguments import takes_theirs
from fastbert.models.pretrained import PreTrainedModel
from fastbert.ops import Policy, packing, tracing
from fastbert.ops.packing import PackedBatch

IGNORED = -100

logger = logging.getLogger("fastbert")


class BertPredictionHeadTransform(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.embedding_width)
        self.LayerNorm = nn.LayerNorm(config.embedding_width, eps=config.layer_norm_eps)
        self.activation = ops.ACTIVATIONS[config.family.head("MaskedLM").activation or config.hidden_act]

    def forward(self, x: Tensor, policy: Policy = ops.AUTO, batch: PackedBatch | None = None) -> Tensor:
        """(T, H) -> (T, E)"""
        if x.dim() == 3:
            return hooks.on_packed(BertPredictionHeadTransform.forward, self, x)
        norm = self.LayerNorm
        x = dense(self.dense, x, policy, self.activation, batch)
        if not is_plain_norm(norm):
            return as_it_is(norm, x, policy, batch)
        return ops.bias_residual_layer_norm(x, None, None, norm.weight, norm.bias, norm.eps, policy=policy)


class BertLMPredictionHead(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.transform = BertPredictionHeadTransform(config)
        self.decoder = nn.Linear(config.embedding_width, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x: Tensor, policy: Policy = ops.AUTO, batch: Any = None) -> Tensor:  # (T, H) -> (T, V)
        if x.dim() == 3:
            return hooks.on_packed(BertLMPredictionHead.forward, self, x)
        return dense(self.decoder, hooks.call(self.transform, batch, policy, x), policy, batch=batch)


class BertOnlyMLMHead(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.predictions = BertLMPredictionHead(config)

    def forward(self, x: Tensor, policy: Policy = ops.AUTO, batch: Any = None) -> Tensor:  # (T, H) -> (T, V)
        if x.dim() == 3:
            return hooks.on_packed(BertOnlyMLMHead.forward, self, x)
        return hooks.call(self.predictions, batch, policy, x)


class BertOnlyNSPHead(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.seq_relationship = nn.Linear(config.hidden_size, 2)

    def forward(self, pooled: Tensor, policy: Policy = ops.AUTO) -> Tensor:  # (B, H) -> (B, 2)
        return dense(self.seq_relationship, pooled, policy)


class BertPreTrainingHeads(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.predictions = BertLMPredictionHead(config)
        self.seq_relationship = nn.Linear(config.hidden_size, 2)

    def forward(self, x: Tensor, pooled: Tensor, policy: Policy = ops.AUTO, batch: Any = None) -> tuple[Tensor, Tensor]:
        """(T, H) and (B, H) -> (T, V) and (B, 2)"""
        if x.dim() == 3:
            return hooks.on_packed(BertOnlyMLMHead.forward, self, x), dense(self.seq_relationship, pooled, policy)
        return hooks.call(self.predictions, batch, policy, x), dense(self.seq_relationship, pooled, policy)


class FirstTokenHead(nn.Module):
    """Classes of a whole sequence from its first token, through a dense layer of the head's own.

    What RoBERTa, DistilBERT and ELECTRA have in the place of BERT's pooler and classifier.
    """

    def __init__(self, config: BertConfig, head: Head, dropout: nn.Module, n_outputs: int) -> None:
        super().__init__()
        assert head.activation is not None
        self.activation, self.dropout_first = head.activation, head.dropout_first
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = dropout
        self.out_proj = nn.Linear(config.hidden_size, n_outputs)

    def forward(self, x: Tensor, batch: Any = None, policy: Policy = ops.AUTO) -> Tensor:
        """(T, H) -> (B, n_outputs)"""
        if x.dim() == 3:
            return hooks.on_packed(FirstTokenHead.forward, self, x, per_token=False)
        x = first_rows(x, batch, policy)
        if self.dropout_first:
            x = self.dropout(x)
        if self.activation == "gelu":
            x = dense(self.dense, x, policy, "gelu")
        else:
            x = dense(self.dense, x, policy)
            activate = torch.tanh if self.activation == "tanh" else torch.relu
            x = ops.elementwise(activate, x, policy=policy)
        return dense(self.out_proj, self.dropout(x), policy)


class _WithHead(PreTrainedModel):
    """A BertModel under `bert`, and a head beside it."""

    task: str
    cls: Any
    classifier: Any

    def __init__(
        self, config: BertConfig, *, backend: str = "auto", strict: bool = False, batch_invariant: bool = False,
        precision: str | None = None,
    ) -> None:  # fmt: skip
        how: dict[str, Any] = {
            "backend": backend, "strict": strict, "batch_invariant": batch_invariant, "precision": precision,
        }  # fmt: skip
        super().__init__(config, **how)
        self.bert = BertModel(config, add_pooling_layer=self._head.pooler, **how)
        self.add_head(config)
        self.init_weights()

    def add_head(self, config: BertConfig) -> None:
        raise NotImplementedError

    @property
    def _head(self) -> Head:
        return self.config.family.head(self.task)

    @property
    def cuda_graphs(self) -> bool:
        """Whether short batches are launched as CUDA graphs: `BertModel.cuda_graphs`."""
        return self.bert.cuda_graphs

    @cuda_graphs.setter
    def cuda_graphs(self, enabled: bool) -> None:
        self.bert.cuda_graphs = enabled

    def _encode(self, *inputs: Any) -> Encoded:
        """The arguments of BertModel.encode; where somebody listens to the encoder, it is called as a module."""
        return encode_by_call(self.bert, *inputs) if hooks.listened(self.bert) else self.bert.encode(*inputs)

    def _of_tokens(self, module: nn.Module, encoded: Encoded) -> Tensor:
        """module(dropout(x)) of each token, (T, H) -> (T, n)."""
        x = dropped(self.dropout, encoded.last_hidden_state, encoded.batch)
        return dense(module, x, self.policy, batch=encoded.batch)

    def _output(self, output: outputs.ModelOutput, return_dict: bool | None) -> Any:
        return output if wants_dict(self.config, return_dict) else output.to_tuple()

    def _dropout(self, config: BertConfig) -> nn.Module:
        for name in self._head.dropout:
            p = getattr(config, name, None) if hasattr(config, name) else config.extra.get(name)
            if p is not None:
                return nn.Dropout(p)
        return nn.Identity()

    def _add_classifier(self, config: BertConfig, n_outputs: int) -> None:
        self.dropout = self._dropout(config)
        self.classifier = nn.Linear(config.hidden_size, n_outputs)


# The decoder's names of tensors that the config ties, and their other names.
TIED = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}


class _WithDecoder(_WithHead):
    """A model whose head predicts tokens, with the word embeddings as its weight where the config ties them.

    As in transformers: without the tie the decoder has a bias of its own, and `cls.predictions.bias` is not used; and
    what a checkpoint holds under both names, with different numbers, is not tied whatever the config says.
    """

    _untied: frozenset[str] = frozenset()

    def tie_weights(self) -> None:
        for name, other in self.tied_pairs().items():
            setattr(self.cls.predictions.decoder, name.rpartition(".")[2], self.get_parameter(other))

    def tied_pairs(self) -> dict[str, str]:
        if not self.config.tie_word_embeddings:
            return {}
        return {name: other for name, other in TIED.items() if name not in self._untied}

    def _settle_ties(self, matched: Match, src: str) -> None:
        state = matched.state
        for name, other in TIED.items():
            mine, others = state.get(name), state.get(other)
            if not self.config.tie_word_embeddings:
                if mine is not None and mine is others:  # one bias of an older checkpoint, for two parameters
                    state[name] = mine.clone()
            elif mine is not None and others is None:
                state[other] = mine
                matched.missing.remove(other)
            elif mine is not None and others is not None and not torch.equal(mine, others):
                logger.warning("%s: %s and %s differ, so they are not tied, whatever the config says", src, name, other)
                self._untied |= {name}

    def get_output_embeddings(self) -> nn.Module:
        return self.cls.predictions.decoder

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.cls.predictions.decoder = value

    def _resize_decoder(self, n_words: int, mean_resizing: bool) -> None:
        head = self.cls.predictions
        rows = functools.partial(self._more_rows, n_rows=n_words, mean_resizing=mean_resizing)
        old = head.decoder
        head.decoder = nn.Linear(old.in_features, n_words, device="meta").train(old.training)
        head.decoder.weight = nn.Parameter(rows(old.weight), old.weight.requires_grad)
        head.decoder.bias = nn.Parameter(rows(old.bias), old.bias.requires_grad)
        head.bias = nn.Parameter(rows(head.bias), head.bias.requires_grad)


def token_loss(logits: Tensor, labels: Tensor | None, batch: packing.PackedBatch) -> Tensor | None:
    """Mean cross entropy over the tokens whose label is not -100. logits: packed (T, C), labels: padded (B, S)."""
    if labels is None:
        return None
    _check_labels("labels", labels, logits, (batch.batch_size, batch.padded_length))
    return F.cross_entropy(logits, packing.pack(labels, batch, IGNORED).long(), ignore_index=IGNORED)


def class_loss(logits: Tensor, labels: Tensor | None, name: str = "labels") -> Tensor | None:
    """Mean cross entropy. logits: (B, C), labels: (B,) or (B, 1)."""
    if labels is None:
        return None
    _check_labels(name, labels, logits, (logits.shape[0],), (logits.shape[0], 1))
    return F.cross_entropy(logits, labels.view(-1).long())


def _check_labels(name: str, labels: Tensor, logits: Tensor, *shapes: tuple[int, ...], classes: bool = True) -> None:
    """Raises ValueError for a shape or a device, TypeError for classes that are no integers."""
    if all(tracing.differ(tuple(labels.shape), shape) for shape in shapes):
        raise ValueError(f"{name}: expected shape {shapes[0]}, got {tuple(labels.shape)}")
    if labels.device != logits.device:
        raise ValueError(f"{name}: expected a tensor on the model's device {logits.device}, got {labels.device}")
    if classes and (labels.is_floating_point() or labels.is_complex()):
        raise TypeError(f"{name}: expected integers, got {labels.dtype}")


class BertForPreTraining(_WithDecoder):
    """Masked-token and next-sentence prediction together."""

    task = "PreTraining"

    def add_head(self, config: BertConfig) -> None:
        self.cls = BertPreTrainingHeads(config)

    @takes_theirs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> outputs.BertForPreTrainingOutput | tuple[Tensor, ...]:
        """labels: (B, S) token ids, -100 where not asked; next_sentence_label: (B,), 0 = is next, 1 = random.

        Returns prediction_logits (B, S, V) and seq_relationship_logits (B, 2); the loss is the sum of both, where both
        labels are given.
        """
        encoded = self._encode(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, output_attentions,
            output_hidden_states,
        )  # fmt: skip
        logits, is_next = hooks.call_with_pooled(
            self.cls, encoded.batch, self.policy, encoded.last_hidden_state, self.bert.pool(encoded)
        )
        token = token_loss(logits, labels, encoded.batch)
        sentence = class_loss(is_next, next_sentence_label, "next_sentence_label")
        loss = None if token is None or sentence is None else token + sentence
        output = outputs.BertForPreTrainingOutput(
            loss=loss,
            prediction_logits=packing.pad(logits, encoded.batch),
            seq_relationship_logits=is_next,
            **encoded.rest(),
        )
        return self._output(output, return_dict)


class BertForMaskedLM(_WithDecoder):
    """Masked-token prediction."""

    task = "MaskedLM"

    def add_head(self, config: BertConfig) -> None:
        self.cls = BertOnlyMLMHead(config)

    @takes_theirs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> outputs.MaskedLMOutput | tuple[Tensor, ...]:
        """labels: (B, S) token ids, -100 where not asked. Returns logits (B, S, V)."""
        encoded = self._encode(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, output_attentions,
            output_hidden_states,
        )  # fmt: skip
        logits = hooks.call(self.cls, encoded.batch, self.policy, encoded.last_hidden_state)
        output = outputs.MaskedLMOutput(
            loss=token_loss(logits, labels, encoded.batch),
            logits=packing.pad(logits, encoded.batch),
            **encoded.rest(),
        )
        return self._output(output, return_dict)


class BertForNextSentencePrediction(_WithHead):
    """Whether the second sentence of a pair follows the first. Logit 0 = is next, logit 1 = random."""

    task = "NextSentencePrediction"

    def add_head(self, config: BertConfig) -> None:
        self.cls = BertOnlyNSPHead(config)

    @takes_theirs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> outputs.NextSentencePredictorOutput | tuple[Tensor, ...]:
        """labels: (B,), 0 = is next, 1 = random. Returns logits (B, 2); `p_is_next` of the output: probabilities."""
        encoded = self._encode(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, output_attentions,
            output_hidden_states,
        )  # fmt: skip
        pooled = self.bert.pool(encoded)
        logits = self.cls(pooled) if hooks.listened(self.cls) else self.cls(pooled, self.policy)
        output = outputs.NextSentencePredictorOutput(loss=class_loss(logits, labels), logits=logits, **encoded.rest())
        return self._output(output, return_dict)


class BertForSequenceClassification(_WithHead):
    """Classification of, or regression on, a whole sequence."""

    task = "SequenceClassification"

    def add_head(self, config: BertConfig) -> None:
        if self._head.activation is None:
            self._add_classifier(config, config.num_labels)
        else:
            self.classifier = FirstTokenHead(config, self._head, self._dropout(config), config.num_labels)

    @takes_theirs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> outputs.SequenceClassifierOutput | tuple[Tensor, ...]:
        """labels: (B,) classes, or (B, num_labels) floats; config.problem_type says which loss, or labels' form does.

        Returns logits (B, num_labels).
        """
        encoded = self._encode(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, output_attentions,
            output_hidden_states,
        )  # fmt: skip
        logits = self.classify(encoded)
        output = outputs.SequenceClassifierOutput(loss=self._loss(logits, labels), logits=logits, **encoded.rest())
        return self._output(output, return_dict)

    def classify(self, encoded: Encoded) -> Tensor:
        """The logits (B, num_labels) of what the encoder made of packed tokens."""
        if self._head.activation is not None:
            return hooks.call(self.classifier, encoded.batch, self.policy, encoded.last_hidden_state)
        return dense(self.classifier, self.dropout(self.bert.pool(encoded)), self.policy)

    def _loss(self, logits: Tensor, labels: Tensor | None) -> Tensor | None:
        if labels is None:
            return None
        problem = self.config.problem_type
        if problem is None:
            if self.config.num_labels == 1:
                problem = "regression"
            elif labels.is_floating_point():
                problem = "multi_label_classification"
            else:
                problem = "single_label_classification"
        if problem == "single_label_classification":
            return class_loss(logits, labels)
        n, n_labels = logits.shape
        shapes = [(n, n_labels), (n,)] if n_labels == 1 else [(n, n_labels)]
        _check_labels("labels", labels, logits, *shapes, classes=False)
        labels = labels.view(n, n_labels).to(logits.dtype)
        if problem == "regression":
            return F.mse_loss(logits, labels)
        return F.binary_cross_entropy_with_logits(logits, labels)


class BertForMultipleChoice(_WithHead):
    """Which of C sequences answers best."""

    task = "MultipleChoice"

    def add_head(self, config: BertConfig) -> None:
        self._add_classifier(config, 1)

    @takes_theirs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> outputs.MultipleChoiceModelOutput | tuple[Tensor, ...]:
        """input_ids and the others: (B, C, S); inputs_embeds: (B, C, S, H); labels: (B,). Returns logits (B, C)."""
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is None or given.dim() != (3 if inputs_embeds is None else 4):
            came = None if given is None else tuple(given.shape)
            raise ValueError(f"input_ids, inputs_embeds: expected shape (B, C, S) or (B, C, S, H), got {came}")
        ids, mask, types, positions, embeds = (
            None if t is None else t.flatten(0, 1)
            for t in (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        )
        encoded = self._encode(ids, mask, types, positions, embeds, output_attentions, output_hidden_states)
        logits = dense(self.classifier, self.dropout(self.bert.pool(encoded)), self.policy).view(given.shape[:2])
        output = outputs.MultipleChoiceModelOutput(loss=class_loss(logits, labels), logits=logits, **encoded.rest())
        return self._output(output, return_dict)


class BertForTokenClassification(_WithHead):
    """A class for every token."""

    task = "TokenClassification"

    def add_head(self, config: BertConfig) -> None:
        self._add_classifier(config, config.num_labels)

    @takes_theirs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> outputs.TokenClassifierOutput | tuple[Tensor, ...]:
        """labels: (B, S) classes, -100 where not asked. Returns logits (B, S, num_labels)."""
        encoded = self._encode(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, output_attentions,
            output_hidden_states,
        )  # fmt: skip
        logits = self._of_tokens(self.classifier, encoded)
        output = outputs.TokenClassifierOutput(
            loss=token_loss(logits, labels, encoded.batch),
            logits=packing.pad(logits, encoded.batch),
            **encoded.rest(),
        )
        return self._output(output, return_dict)


class BertForQuestionAnswering(_WithHead):
    """Where an answer starts and ends."""

    task = "QuestionAnswering"

    def add_head(self, config: BertConfig) -> None:
        if config.num_labels != 2:
            raise ValueError(f"num_labels: question answering has 2 (start and end), got {config.num_labels}")
        self.dropout = self._dropout(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)

    @takes_theirs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> outputs.QuestionAnsweringModelOutput | tuple[Tensor, ...]:
        """start_positions, end_positions: (B,) columns; those at padding or above S - 1 enter no loss.

        Returns start_logits and end_logits (B, S). The losses are over the tokens of each row, not over its padding.
        """
        encoded = self._encode(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, output_attentions,
            output_hidden_states,
        )  # fmt: skip
        packed = self._of_tokens(self.qa_outputs, encoded)  # (T, 2)
        start_logits, end_logits = packing.pad(packed, encoded.batch).unbind(-1)  # (B, S)
        loss = None
        if start_positions is not None and end_positions is not None:
            token = packing.pad(torch.ones_like(packed[:, 0], dtype=torch.bool), encoded.batch)
            loss = (
                self._loss(start_logits, token, start_positions, "start_positions")
                + self._loss(end_logits, token, end_positions, "end_positions")
            ) / 2
        output = outputs.QuestionAnsweringModelOutput(
            loss=loss, start_logits=start_logits.contiguous(), end_logits=end_logits.contiguous(), **encoded.rest()
        )
        return self._output(output, return_dict)

    def _loss(self, logits: Tensor, token: Tensor, positions: Tensor, name: str) -> Tensor:
        n, length = logits.shape
        _check_labels(name, positions, logits, (n,), (n, 1))
        positions = positions.view(-1).long().clamp(0, length)
        answerable = F.pad(token, (0, 1)).gather(1, positions[:, None])[:, 0]
        positions = positions.masked_fill(~answerable, length)
        logits = logits.masked_fill(~token, torch.finfo(logits.dtype).min)
        return F.cross_entropy(logits, positions, ignore_index=length)
