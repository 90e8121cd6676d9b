"""The seven BERT models with heads: pre-training, masked LM, next sentence, classification, choice, tokens, answers.

A class also serves the other families; the `Head` in fastbert.checkpoint.families describes the differences of a
family's head. Arguments, outputs and losses are those of transformers, with two differences that follow from packing.
Logits of tokens are zero at padding positions, and padding positions are not part of a loss. `Inputs` describes the
arguments that all forwards share.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.checkpoint.config import BertConfig
from fastbert.engine.listeners import listened
from fastbert.models import hooks, outputs
from fastbert.models.encoded import Encoded
from fastbert.models.heads import BertOnlyMLMHead, BertOnlyNSPHead, BertPreTrainingHeads, FirstTokenHead
from fastbert.models.inputs import Inputs, takes_inputs
from fastbert.models.losses import class_loss, sequence_loss, span_loss, token_loss
from fastbert.models.with_head import ModelWithDecoder, ModelWithHead
from fastbert.ops import packing


class BertForPreTraining(ModelWithDecoder):
    """This model predicts masked tokens and the next sentence, or in ALBERT the order of sentences."""

    task = "PreTraining"

    def add_head(self, config: BertConfig) -> None:
        if self._head.sentence_order:
            self.cls = BertPreTrainingHeads(config, self._dropout(config), config.num_labels)
        else:
            self.cls = BertPreTrainingHeads(config)

    @takes_inputs
    def forward(
        self,
        inputs: Inputs,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        *,
        sentence_order_label: Tensor | None = None,
    ) -> outputs.BertForPreTrainingOutput | outputs.AlbertForPreTrainingOutput | tuple[Tensor, ...]:
        """labels: (B, S) token ids, -100 without a label; next_sentence_label: (B,), 0 = is next, 1 = random.

        Returns prediction_logits (B, S, V) and seq_relationship_logits (B, 2). With both labels, the loss is the sum
        of both losses. In training mode with labels, prediction_logits are computed at the first access.
        ALBERT takes sentence_order_label, (B,), 0 = in order, 1 = exchanged, and returns sop_logits (B, num_labels).
        Raises ValueError for the label of the other family.
        """
        in_order = self._head.sentence_order
        pair_label, other = next_sentence_label, sentence_order_label
        pair_name, other_name = "next_sentence_label", "sentence_order_label"
        if in_order:
            pair_label, other, pair_name, other_name = other, pair_label, other_name, pair_name
        if other is not None:
            raise ValueError(f"{other_name}: {self.config.model_type!r} has {pair_name} in its place")
        encoded = self._encode(inputs)
        pooled = self.bert.pool(encoded)
        head = functools.partial(
            hooks.call_with_pooled, self.cls, encoded.batch, self.policy, encoded.last_hidden_state, pooled
        )
        logits: Any
        token: Tensor | None
        if labels is not None and self._sees_labelled_alone(encoded, labels):
            token, logits = self._labelled_loss(encoded, labels), self._later(encoded, lambda: head()[0])
            of_pairs = self.cls.of_pairs(pooled, self.policy)
        else:
            packed, of_pairs = head()
            token, logits = token_loss(packed, labels, encoded.batch), packing.pad(packed, encoded.batch)
        sentence = class_loss(of_pairs, pair_label, pair_name)
        loss = None if token is None or sentence is None else token + sentence
        kind = outputs.AlbertForPreTrainingOutput if in_order else outputs.BertForPreTrainingOutput
        return self._output(kind(loss, logits, of_pairs, **encoded.padded()), inputs)


class BertForMaskedLM(ModelWithDecoder):
    """This model predicts masked tokens."""

    task = "MaskedLM"

    def add_head(self, config: BertConfig) -> None:
        self.cls = BertOnlyMLMHead(config)

    @takes_inputs
    def forward(self, inputs: Inputs, labels: Tensor | None = None) -> outputs.MaskedLMOutput | tuple[Tensor, ...]:
        """labels: (B, S) token ids, -100 for tokens without a label. Returns logits (B, S, V).

        In training mode with labels, the logits are computed at the first access.
        """
        encoded = self._encode(inputs)
        head = functools.partial(hooks.call, self.cls, encoded.batch, self.policy, encoded.last_hidden_state)
        logits: Any
        loss: Tensor | None
        if labels is not None and self._sees_labelled_alone(encoded, labels):
            loss, logits = self._labelled_loss(encoded, labels), self._later(encoded, head)
        else:
            packed = head()
            loss, logits = token_loss(packed, labels, encoded.batch), packing.pad(packed, encoded.batch)
        output = outputs.MaskedLMOutput(loss=loss, logits=logits, **encoded.padded())
        return self._output(output, inputs)


class BertForNextSentencePrediction(ModelWithHead):
    """This model predicts if the second sentence of a pair follows the first. Logit 0 = is next, logit 1 = random."""

    task = "NextSentencePrediction"

    def add_head(self, config: BertConfig) -> None:
        self.cls = BertOnlyNSPHead(config)

    @takes_inputs
    def forward(
        self, inputs: Inputs, labels: Tensor | None = None
    ) -> outputs.NextSentencePredictorOutput | tuple[Tensor, ...]:
        """labels: (B,), 0 = is next, 1 = random. Returns logits (B, 2); `p_is_next` of the output: probabilities."""
        encoded = self._encode(inputs)
        pooled = self.bert.pool(encoded)
        logits = self.cls(pooled) if listened(self.cls) else self.cls(pooled, self.policy)
        output = outputs.NextSentencePredictorOutput(loss=class_loss(logits, labels), logits=logits, **encoded.padded())
        return self._output(output, inputs)


class BertForSequenceClassification(ModelWithHead):
    """This model gives a whole sequence a class, several labels, or a number."""

    task = "SequenceClassification"

    def add_head(self, config: BertConfig) -> None:
        if self._head.activation is None:
            self._add_classifier(config, config.num_labels)
        else:
            self.classifier = FirstTokenHead(config, self._head, self._dropout(config), config.num_labels)

    @takes_inputs
    def forward(
        self, inputs: Inputs, labels: Tensor | None = None
    ) -> outputs.SequenceClassifierOutput | tuple[Tensor, ...]:
        """labels: (B,) classes, or (B, num_labels) floats. Returns logits (B, num_labels).

        config.problem_type selects the loss; without it, the shape and dtype of the labels do.
        """
        encoded = self._encode(inputs)
        logits = self.classify(encoded)
        loss = sequence_loss(logits, labels, self.config.problem_type, self.config.num_labels)
        output = outputs.SequenceClassifierOutput(loss=loss, logits=logits, **encoded.padded())
        return self._output(output, inputs)

    def classify(self, encoded: Encoded) -> Tensor:
        """Returns the logits (B, num_labels) for the encoder's output on packed tokens."""
        if self._head.activation is not None:
            return hooks.call(self.classifier, encoded.batch, self.policy, encoded.last_hidden_state)
        return self._of_sequences(encoded)


class BertForMultipleChoice(ModelWithHead):
    """This model chooses the best of C sequences."""

    task = "MultipleChoice"

    def add_head(self, config: BertConfig) -> None:
        self._add_classifier(config, 1)

    @takes_inputs
    def forward(
        self, inputs: Inputs, labels: Tensor | None = None
    ) -> outputs.MultipleChoiceModelOutput | tuple[Tensor, ...]:
        """input_ids and the others: (B, C, S); inputs_embeds: (B, C, S, H); labels: (B,). Returns logits (B, C)."""
        choices = inputs.input_ids if inputs.inputs_embeds is None else inputs.inputs_embeds
        if choices is None or choices.dim() != (3 if inputs.inputs_embeds is None else 4):
            shape = None if choices is None else tuple(choices.shape)
            raise ValueError(f"input_ids, inputs_embeds: expected shape (B, C, S) or (B, C, S, H), got {shape}")
        encoded = self._encode(inputs.flattened())
        logits = self._of_sequences(encoded).view(choices.shape[:2])
        output = outputs.MultipleChoiceModelOutput(loss=class_loss(logits, labels), logits=logits, **encoded.padded())
        return self._output(output, inputs)


class BertForTokenClassification(ModelWithHead):
    """This model gives every token a class."""

    task = "TokenClassification"

    def add_head(self, config: BertConfig) -> None:
        self._add_classifier(config, config.num_labels)

    @takes_inputs
    def forward(
        self, inputs: Inputs, labels: Tensor | None = None
    ) -> outputs.TokenClassifierOutput | tuple[Tensor, ...]:
        """labels: (B, S) classes, -100 for tokens without a label. Returns logits (B, S, num_labels)."""
        encoded = self._encode(inputs)
        logits = self.classify_tokens(encoded)
        output = outputs.TokenClassifierOutput(
            loss=token_loss(logits, labels, encoded.batch),
            logits=packing.pad(logits, encoded.batch),
            **encoded.padded(),
        )
        return self._output(output, inputs)

    def classify_tokens(self, encoded: Encoded) -> Tensor:
        """Returns the logits (T, num_labels) for the encoder's output on packed tokens."""
        return self._of_tokens(self.classifier, encoded)


class BertForQuestionAnswering(ModelWithHead):
    """This model finds where an answer starts and ends."""

    task = "QuestionAnswering"

    def add_head(self, config: BertConfig) -> None:
        if config.num_labels != 2:
            raise ValueError(f"num_labels: expected 2 for question answering (start and end), got {config.num_labels}")
        self._add_transform(config)
        self.dropout = self._dropout(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)

    @takes_inputs
    def forward(
        self, inputs: Inputs, start_positions: Tensor | None = None, end_positions: Tensor | None = None
    ) -> outputs.QuestionAnsweringModelOutput | tuple[Tensor, ...]:
        """start_positions, end_positions: (B,) columns; the loss ignores columns at padding or above S - 1.

        Returns start_logits and end_logits (B, S). The losses are over the tokens of each row, not over its padding.
        """
        encoded = self._encode(inputs)
        packed = self.classify_tokens(encoded)  # (T, 2)
        start_logits, end_logits = packing.pad(packed, encoded.batch).unbind(-1)  # (B, S)
        loss = None
        if start_positions is not None and end_positions is not None:
            token = packing.pad(torch.ones_like(packed[:, 0], dtype=torch.bool), encoded.batch)
            loss = (
                span_loss(start_logits, token, start_positions, "start_positions")
                + span_loss(end_logits, token, end_positions, "end_positions")
            ) / 2
        output = outputs.QuestionAnsweringModelOutput(
            loss=loss, start_logits=start_logits.contiguous(), end_logits=end_logits.contiguous(), **encoded.padded()
        )
        return self._output(output, inputs)

    def classify_tokens(self, encoded: Encoded) -> Tensor:
        """Returns the logits (T, 2), of starts and of ends, for the encoder's output on packed tokens."""
        return self._of_tokens(self.qa_outputs, encoded)
