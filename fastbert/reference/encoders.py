"""The reference's text of each family's encoder, by the text that its `Family` names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastbert.checkpoint.families import family_of
from fastbert.reference.bert import BertReference, bert
from fastbert.reference.deberta_v2 import deberta_v2
from fastbert.reference.jina_bert_v2 import jina_bert_code, jina_bert_v2
from fastbert.reference.modernbert import gated_rotary_bert, modernbert
from fastbert.reference.mpnet import mpnet

if TYPE_CHECKING:
    from fastbert.checkpoint.config import BertConfig

TEXTS = {
    "bert": bert,
    "mpnet": mpnet,
    "modernbert": modernbert,
    "gated_rotary_bert": gated_rotary_bert,
    "deberta": deberta_v2,
    "jina_bert_v2": jina_bert_v2,
    "jina_bert_code": jina_bert_code,
}


def encode(params: Mapping[str, Tensor], config: BertConfig, *inputs: Tensor | None, **settings: Any) -> BertReference:
    """The encoder of the config's family. Arguments, result and errors are those of `bert`."""
    return TEXTS[family_of(config.model_type).text](params, config, *inputs, **settings)
