"""The tables of ALBERT and of Jina 2, which `fastbert.checkpoint.families` lists with the others."""

from __future__ import annotations

from fastbert.checkpoint.family import Family, Head

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

LATER = (ALBERT,)
