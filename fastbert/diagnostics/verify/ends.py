"""This module holds a model's ends, which follow its encoder: a SentenceEncoder's vectors, and a head's logits.

Each end exists in two forms: the model's own code, and plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert import reference
from fastbert.adapters.live_pipeline import Step
from fastbert.checkpoint.activations import ACTIVATIONS, activate
from fastbert.diagnostics.verify.bounds import FACTOR_OF_VECTORS, SCATTER
from fastbert.models.encoded import Encoded
from fastbert.models.encoder import EncoderModel
from fastbert.models.modules import dense
from fastbert.pipelines.pipeline import POOLING_MODES, Pipeline
from fastbert.pipelines.pooling import sentence_vectors
from fastbert.pipelines.sentence import SentenceEncoder


@dataclass(frozen=True)
class End:
    """An `End` is one end of a model, with its name in the report.

    tokens: whether its input is the last hidden states, not the pooled output. run: the model's own code, from an
    encoded batch to (T, C) or (B, C). plain: the same in plain PyTorch, from (rows, H) in any dtype; for vectors from a
    list of the rows of each text. few: the count of its numbers for each text, if they are few.
    """

    name: str
    tokens: bool
    run: Callable[[Encoded], Tensor]
    plain: Callable[[Any], Tensor]
    few: int | None = None

    @property
    def is_vectors(self) -> bool:
        return self.name == "vectors"

    def parts(self, states: Sequence[Tensor]) -> list[Tensor]:
        """Returns `plain` for each text's rows: (n, C) or (1, C) each."""
        if self.is_vectors:
            return list(self.plain(states).split(1))
        return list(self.plain(torch.cat(list(states))).split([len(state) for state in states]))

    def factor(self, n_texts: int) -> float:
        """Returns the allowed multiple of plain PyTorch's error. It is larger for few numbers, which vary more."""
        return FACTOR_OF_VECTORS + (SCATTER / (n_texts * self.few) ** 0.5 if self.few is not None else 0.0)


def ends_of(model: nn.Module | Pipeline, bert: EncoderModel, prefix: str) -> Iterator[End]:
    """Yields the ends that follow the encoder in the model, and none for a head that is not built as BERT's are."""
    if isinstance(model, SentenceEncoder) and not model.has_dense:
        return
    pipeline = model.pipeline if isinstance(model, SentenceEncoder) else model
    if isinstance(pipeline, Pipeline):
        yield _vectors_end(pipeline)
        return
    assert isinstance(model, nn.Module)
    modules = {name: module for name, module in model.named_modules() if name.startswith(prefix)}
    for name in ("classifier", "qa_outputs", "cls.seq_relationship"):
        linear = modules.get(f"{prefix}{name}")
        if type(linear) is nn.Linear and linear.in_features == bert.config.hidden_size:
            tokens = name == "qa_outputs" or (name == "classifier" and bert.pooler is None)
            if tokens or bert.pooler is not None:
                yield _linear_end(f"{prefix}{name}", linear, bert, tokens)
    predictions: Any = modules.get(f"{prefix}cls.predictions")
    if predictions is not None and type(predictions.decoder) is nn.Linear:

        def run_decoder(encoded: Encoded) -> Tensor:
            return predictions(encoded.last_hidden_state, bert.policy)

        yield End(f"{prefix}cls.predictions", True, run_decoder, lambda x: _words(predictions, bert, x))


def _vectors_end(pipeline: Pipeline) -> End:
    def run(encoded: Encoded) -> Tensor:
        states, truncate_dim = encoded.last_hidden_state, pipeline.truncate_dim
        return sentence_vectors(pipeline, states, encoded.batch, truncate_dim=truncate_dim)

    return End("vectors", True, run, lambda states: _vectors(pipeline, states))


def _linear_end(name: str, linear: nn.Linear, bert: EncoderModel, tokens: bool) -> End:
    def run(encoded: Encoded) -> Tensor:
        return dense(linear, encoded.last_hidden_state if tokens else bert.pool(encoded), bert.policy)

    return End(name, tokens, run, lambda x: _linear(linear, x), None if tokens else linear.out_features)


def _linear(linear: Any, x: Tensor) -> Tensor:
    return F.linear(x, linear.weight.to(x), linear.bias.to(x))


def _words(predictions: Any, bert: EncoderModel, x: Tensor) -> Tensor:
    """Computes the language model's head: (n, H) -> (n, V)."""
    part, activation = predictions.transform, ACTIVATIONS[bert.config.hidden_act]
    x = _linear(part.dense, x)
    x = activate(x, activation)
    norm = part.LayerNorm
    x = F.layer_norm(x, norm.normalized_shape, norm.weight.to(x), norm.bias.to(x), norm.eps)
    return _linear(predictions.decoder, x)


def _vectors(pipeline: Pipeline, tokens: Sequence[Tensor]) -> Tensor:
    """Computes the pipeline's vectors, (texts, dim), from the last hidden states of texts, (n, H) each."""
    hidden = torch.cat(list(tokens))
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    cu_seqlens = torch.tensor([0, *(len(part) for part in tokens)], device="cpu").cumsum(0)
    modes = pipeline.pooling.modes if pipeline.pooling is not None else ()
    x = torch.cat([reference.pool(hidden, cu_seqlens, POOLING_MODES[mode]) for mode in modes], dim=1)
    for module in pipeline.tail:
        x = (module.in_dtype(x.dtype) if isinstance(module, Step) else module)(x)
    return x[:, : pipeline.truncate_dim]
