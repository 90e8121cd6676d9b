"""This module has the tables of ALBERT, Jina 2 and its code model. `fastbert.checkpoint.families` lists them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastbert.checkpoint.family import Family, Head

BERT_HEADS = {
    "PreTraining": Head(pooler=True),
    "MaskedLM": Head(),
    "NextSentencePrediction": Head(pooler=True),
    "SequenceClassification": Head(pooler=True),
    "MultipleChoice": Head(pooler=True),
    "TokenClassification": Head(),
    "QuestionAnswering": Head(dropout=()),
}
_LAYER, _GROUP = "encoder.layer.*", "encoder.albert_layer_groups.*.albert_layers.0"
_ALBERT_NAMES = (
    ("predictions.dense", "cls.predictions.transform.dense"),
    ("predictions.LayerNorm", "cls.predictions.transform.LayerNorm"),
    ("predictions", "cls.predictions"),
)

ALBERT = Family(
    "albert",
    "Albert",
    prefix="albert.",
    heads={
        "PreTraining": Head(
            names=(*_ALBERT_NAMES, ("sop_classifier.classifier", "cls.seq_relationship")),
            pooler=True,
            sentence_order=True,
        ),
        "MaskedLM": Head(names=_ALBERT_NAMES),
        "SequenceClassification": Head(pooler=True),
        "MultipleChoice": Head(pooler=True),
        "TokenClassification": Head(),
        "QuestionAnswering": Head(dropout=()),
    },
    names=(
        (f"{_GROUP}.attention.query", f"{_LAYER}.attention.self.query"),
        (f"{_GROUP}.attention.key", f"{_LAYER}.attention.self.key"),
        (f"{_GROUP}.attention.value", f"{_LAYER}.attention.self.value"),
        (f"{_GROUP}.attention.dense", f"{_LAYER}.attention.output.dense"),
        (f"{_GROUP}.attention.LayerNorm", f"{_LAYER}.attention.output.LayerNorm"),
        (f"{_GROUP}.ffn", f"{_LAYER}.intermediate.dense"),
        (f"{_GROUP}.ffn_output", f"{_LAYER}.output.dense"),
        (f"{_GROUP}.full_layer_layer_norm", f"{_LAYER}.output.LayerNorm"),
        (_GROUP, _LAYER),
        ("encoder.albert_layer_groups", "encoder.layer"),
        ("encoder.embedding_hidden_mapping_in", "embeddings_project"),
        ("pooler", "pooler.dense"),
    ),
    settings=(("classifier_dropout_prob", "classifier_dropout"),),
    defaults={
        "vocab_size": 30000,
        "embedding_size": 128,
        "hidden_size": 4096,
        "num_attention_heads": 64,
        "intermediate_size": 16384,
        "hidden_act": "gelu_new",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "classifier_dropout": 0.1,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "num_hidden_groups": 1,
        "inner_group_num": 1,
    },
    required={"inner_group_num": 1},
    output_dropout=False,
    projection=True,
    always_projected=True,
    shared_layers=True,
    tokenizer="Albert",
    special_tokens={"pad_token": "<pad>", "unk_token": "<unk>"},
)

JINA = Family(
    "jina_bert_v2",
    "JinaBert",
    position_types=("alibi",),
    prefix="bert.",
    heads=BERT_HEADS,
    defaults={"max_position_embeddings": 8192, "position_embedding_type": "alibi", "feed_forward_type": "geglu"},
    stored_type="bert",
    text="jina_bert_v2",
    tokenizer="Bert",
)

_CODE = "jinaai/jina-bert-v2-qk-post-norm"
JINA_CODE = replace(
    JINA,
    model_type="jina_bert_code",
    # Only by auto_map a config.json distinguishes these layers from those of Jina's other models.
    defaults={
        **JINA.defaults,
        "auto_map": {
            "AutoConfig": f"{_CODE}--configuration_bert.JinaBertConfig",
            "AutoModel": f"{_CODE}--modeling_bert.JinaBertModel",
        },
    },
    text="jina_bert_code",
)

LATER = (ALBERT, JINA, JINA_CODE)


def model_type_of(data: Mapping[str, Any]) -> Any:
    """Returns the model_type of a config.json. Jina's models say "bert", but have other positions.

    Jina's code model has other layers again. The repository of its code, in _name_or_path or auto_map, identifies it.
    """
    model_type = data.get("model_type")
    if model_type != JINA.stored_type or data.get("position_embedding_type") != "alibi":
        return model_type
    code = str(data.get("_name_or_path")), *map(str, (data.get("auto_map") or {}).values())
    if any("qk-post-norm" in name for name in code):
        return JINA_CODE.model_type
    return JINA.model_type
