"""fastbert: a drop-in faster BERT encoder for PyTorch.

import fastbert
encoder = fastbert.SentenceEncoder.from_pretrained("sentence-transformers/all-MiniLM-L6-v2")
vectors = encoder.encode(["A text.", "Another one."])

model = fastbert.BertModel.from_pretrained("google-bert/bert-base-uncased")
output = model(input_ids, attention_mask)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastbert._version import __version__
from fastbert_kernels.distribution import check_installed

if TYPE_CHECKING:
    from fastbert.adapters import accelerate, restore
    from fastbert.checkpoint.config import BertConfig
    from fastbert.diagnostics.explain.entry import explain
    from fastbert.diagnostics.verify.entry import verify
    from fastbert.diagnostics.waiting import wait_for_checks
    from fastbert.diagnostics.warmup import warmup
    from fastbert.engine.events import compile_events
    from fastbert.models.bert import BertModel
    from fastbert.models.deberta import DebertaModel
    from fastbert.models.jina_bert_code import JinaCodeModel
    from fastbert.models.jina_bert_v2 import JinaBertModel
    from fastbert.models.modernbert import ModernBertModel
    from fastbert.models.mpnet import MPNetModel
    from fastbert.models.tasks import (
        BertForMaskedLM,
        BertForMultipleChoice,
        BertForNextSentencePrediction,
        BertForPreTraining,
        BertForQuestionAnswering,
        BertForSequenceClassification,
        BertForTokenClassification,
    )
    from fastbert.ops import BackendError
    from fastbert.pipelines.answers import QuestionAnswerer
    from fastbert.pipelines.cross import CrossEncoder
    from fastbert.pipelines.entities import EntityRecognizer
    from fastbert.pipelines.sentence import SentenceEncoder
    from fastbert.text.tokenizer import Tokenizer
    from fastbert.vectors.maxsim import maxsim
    from fastbert.vectors.quantize import quantize_embeddings
    from fastbert.vectors.search import semantic_search

# Public name -> the module that holds it, imported when the name is first used, so that `import fastbert` is quick.
_PUBLIC = {
    "BackendError": "fastbert.ops",
    "BertConfig": "fastbert.checkpoint.config",
    "BertForMaskedLM": "fastbert.models.tasks",
    "BertForMultipleChoice": "fastbert.models.tasks",
    "BertForNextSentencePrediction": "fastbert.models.tasks",
    "BertForPreTraining": "fastbert.models.tasks",
    "BertForQuestionAnswering": "fastbert.models.tasks",
    "BertForSequenceClassification": "fastbert.models.tasks",
    "BertForTokenClassification": "fastbert.models.tasks",
    "BertModel": "fastbert.models.bert",
    "CrossEncoder": "fastbert.pipelines.cross",
    "DebertaModel": "fastbert.models.deberta",
    "EntityRecognizer": "fastbert.pipelines.entities",
    "JinaBertModel": "fastbert.models.jina_bert_v2",
    "JinaCodeModel": "fastbert.models.jina_bert_code",
    "MPNetModel": "fastbert.models.mpnet",
    "ModernBertModel": "fastbert.models.modernbert",
    "QuestionAnswerer": "fastbert.pipelines.answers",
    "SentenceEncoder": "fastbert.pipelines.sentence",
    "Tokenizer": "fastbert.text.tokenizer",
    "accelerate": "fastbert.adapters",
    "compile_events": "fastbert.engine.events",
    "explain": "fastbert.diagnostics.explain.entry",
    "maxsim": "fastbert.vectors.maxsim",
    "quantize_embeddings": "fastbert.vectors.quantize",
    "restore": "fastbert.adapters",
    "semantic_search": "fastbert.vectors.search",
    "verify": "fastbert.diagnostics.verify.entry",
    "wait_for_checks": "fastbert.diagnostics.waiting",
    "warmup": "fastbert.diagnostics.warmup",
}

__all__ = [
    "BackendError",
    "BertConfig",
    "BertForMaskedLM",
    "BertForMultipleChoice",
    "BertForNextSentencePrediction",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertModel",
    "CrossEncoder",
    "DebertaModel",
    "EntityRecognizer",
    "JinaBertModel",
    "JinaCodeModel",
    "MPNetModel",
    "ModernBertModel",
    "QuestionAnswerer",
    "SentenceEncoder",
    "Tokenizer",
    "__version__",
    "accelerate",
    "compile_events",
    "explain",
    "maxsim",
    "quantize_embeddings",
    "restore",
    "semantic_search",
    "verify",
    "wait_for_checks",
    "warmup",
]


check_installed(__path__[0])


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fastbert' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
