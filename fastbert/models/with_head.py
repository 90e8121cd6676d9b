"""The models with heads share an encoder, and a decoder whose weight is that of the word embeddings."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastbert import ops
from fastbert.checkpoint.config import BertConfig
from fastbert.checkpoint.family import Head
from fastbert.checkpoint.match import Match
from fastbert.checkpoint.rotary import setting
from fastbert.checks import expect
from fastbert.engine import Options
from fastbert.engine.listeners import listened
from fastbert.models import hooks, outputs
from fastbert.models.encoded import Encoded, encode_by_call
from fastbert.models.heads import BertPredictionHeadTransform, ContextPooler, is_plain_head
from fastbert.models.inputs import Inputs
from fastbert.models.losses import labelled_loss
from fastbert.models.modules import call_dropout, dense, first_rows, mean_rows
from fastbert.models.pretrained import PreTrainedModel
from fastbert.models.registry import encoder_class
from fastbert.ops import packing, tracing

logger = logging.getLogger("fastbert")


class ModelWithHead(PreTrainedModel):
    """This model holds its family's encoder under `bert`, and a head. settings: the fields of `Options` by name."""

    task: str
    cls: Any
    classifier: Any

    def __init__(self, config: BertConfig, options: Options | None = None, **settings: Any) -> None:
        options = Options.of(options, settings)
        super().__init__(config, options)
        self.bert = encoder_class(config)(config, self._head.pooler, options)
        self.add_head(config)
        self.init_weights()

    def add_head(self, config: BertConfig) -> None:
        """Adds the modules of the head."""
        raise NotImplementedError

    @property
    def _head(self) -> Head:
        return self.config.family.head(self.task)

    @property
    def cuda_graphs(self) -> bool:
        """This is the switch of the encoder: see `BertModel.cuda_graphs`."""
        return self.bert.cuda_graphs

    @cuda_graphs.setter
    def cuda_graphs(self, enabled: bool) -> None:
        self.bert.cuda_graphs = enabled

    @property
    def strict_ids(self) -> bool:
        """This is the switch of the encoder: see `BertModel.strict_ids`."""
        return self.bert.strict_ids

    @strict_ids.setter
    def strict_ids(self, strict: bool) -> None:
        self.bert.strict_ids = strict

    def wait_for_checks(self) -> None:
        """Waits for the checks of the encoder: see `BertModel.wait_for_checks`."""
        self.bert.wait_for_checks()

    def _encode(self, inputs: Inputs) -> Encoded:
        """Runs BertModel.encode; an encoder with hooks is called as a module."""
        return encode_by_call(self.bert, inputs) if listened(self.bert) else self.bert.encode(inputs)

    def _of_tokens(self, module: nn.Module, encoded: Encoded) -> Tensor:
        """Computes module(dropout(x)) for each token, (T, H) -> (T, n), with the head's transform if it has one."""
        x, transform = encoded.last_hidden_state, self._modules.get("head")
        if transform is not None:
            x = hooks.call(transform, encoded.batch, self.policy, x)
        x = call_dropout(self.dropout, x, encoded.batch)
        return dense(module, x, self.policy, batch=encoded.batch)

    def _of_sequences(self, encoded: Encoded) -> Tensor:
        """Applies the classifier to the pooled vectors, (B, n), of the encoder's pooler or the head's transform."""
        transform, pooler = self._modules.get("head"), self._modules.get("pooler")
        if pooler is not None:
            pooled = hooks.call(pooler, encoded.batch, self.policy, encoded.last_hidden_state)
        elif transform is None:
            pooled = self.bert.pool(encoded)
        else:
            rows = mean_rows if setting(self.config, "classifier_pooling") == "mean" else first_rows
            pooled = rows(encoded.last_hidden_state, encoded.batch, self.policy)
            pooled = transform(pooled) if listened(transform) else transform(pooled, self.policy)
        return dense(self.classifier, self.dropout(pooled), self.policy)

    def _output(self, output: outputs.ModelOutput, inputs: Inputs) -> Any:
        return output if inputs.wants_dict(self.config) else output.to_tuple()

    def _dropout(self, config: BertConfig) -> nn.Module:
        for name in self._head.dropout:
            p = getattr(config, name, None) if hasattr(config, name) else config.extra.get(name)
            if p is not None:
                return nn.Dropout(p)
        return nn.Identity()

    def _add_classifier(self, config: BertConfig, n_outputs: int) -> None:
        self._add_transform(config)
        if self._head.own_pooler:
            self.pooler = ContextPooler(config)
        self.dropout = self._dropout(config)
        self.classifier = nn.Linear(config.hidden_size, n_outputs)

    def _add_transform(self, config: BertConfig) -> None:
        if self._head.transform:
            mode = setting(config, "classifier_pooling")
            expect(mode in ("cls", "mean"), "classifier_pooling", mode, "'cls' or 'mean'")
            self.head = BertPredictionHeadTransform(config)


# The decoder's names of tensors that the config ties, and the names of the tied tensors.
TIED = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}


class ModelWithDecoder(ModelWithHead):
    """This model has a head that predicts tokens. Its weight is the word embeddings, if the config ties them.

    As in transformers, without the tie the decoder has its own bias, and `cls.predictions.bias` is not used. If a
    checkpoint has different numbers under both names, they are not tied, even if the config ties them.
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
                logger.warning(
                    "%s: %s and %s differ, so they are not tied, although the config ties them", src, name, other
                )
                self._untied |= {name}

    def _sees_labelled_alone(self, encoded: Encoded, labels: Tensor | None) -> bool:
        """Tells whether the head may skip the tokens without a label, and compute logits at the first access.

        It does in training mode, except if the head has hooks, or if values cannot be read.
        """
        if labels is None or not self.training or self.policy.batch_invariant or not is_plain_head(self.cls):
            return False
        return ops.readable(labels) and tracing.transformed(encoded.last_hidden_state) is None

    def _labelled_loss(self, encoded: Encoded, labels: Tensor) -> Tensor:
        return labelled_loss(self.cls.predictions, encoded.last_hidden_state, labels, encoded.batch, self.policy)

    def _later(self, encoded: Encoded, head: Callable[[], Tensor]) -> outputs.Later:
        """Returns a `Later` for the padded logits of a head with logits (T, V)."""
        return outputs.Later(lambda: packing.pad(head(), encoded.batch), encoded.batch.device)

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
