"""This module holds the table of each family of encoders.

The modules of fastbert.models.bert serve the families that are BERT under other names. A family with other layers has
its own text: MPNet's is fastbert.models.mpnet, and ModernBERT's is fastbert.models.modernbert.
"""

from __future__ import annotations

from dataclasses import replace

from fastbert.checkpoint.family import AFTER_PADDING, Family, Head
from fastbert.checkpoint.later_families import BERT_HEADS, LATER

_ROBERTA_HEADS = {
    "MaskedLM": Head(
        names=(
            ("lm_head.dense", "cls.predictions.transform.dense"),
            ("lm_head.layer_norm", "cls.predictions.transform.LayerNorm"),
            ("lm_head", "cls.predictions"),
        ),
        activation="gelu",
    ),
    "SequenceClassification": Head(activation="tanh", dropout_first=True),
    "MultipleChoice": Head(pooler=True, dropout=("hidden_dropout_prob",)),
    "TokenClassification": Head(),
    "QuestionAnswering": Head(dropout=()),
}
_DISTILBERT_HEADS = {
    "MaskedLM": Head(
        names=(
            ("vocab_transform", "cls.predictions.transform.dense"),
            ("vocab_layer_norm", "cls.predictions.transform.LayerNorm"),
            ("vocab_projector.bias", "cls.predictions.bias"),
            ("vocab_projector", "cls.predictions.decoder"),
        )
    ),
    "SequenceClassification": Head(
        names=(("pre_classifier", "classifier.dense"), ("classifier", "classifier.out_proj")),
        activation="relu",
        dropout=("classifier_dropout",),
    ),
    "TokenClassification": Head(dropout=("hidden_dropout_prob",)),
    "QuestionAnswering": Head(dropout=("qa_dropout",)),
}
_ELECTRA_HEADS = {
    "MaskedLM": Head(
        names=(
            ("generator_predictions.dense", "cls.predictions.transform.dense"),
            ("generator_predictions.LayerNorm", "cls.predictions.transform.LayerNorm"),
            ("generator_lm_head.bias", "cls.predictions.bias"),
            ("generator_lm_head", "cls.predictions.decoder"),
        ),
        activation="gelu",
    ),
    "SequenceClassification": Head(activation="gelu", dropout_first=True),
    "TokenClassification": Head(),
    "QuestionAnswering": Head(dropout=()),
}

_MPNET_HEADS = {
    "MaskedLM": _ROBERTA_HEADS["MaskedLM"],
    "SequenceClassification": Head(activation="tanh", dropout_first=True, dropout=("hidden_dropout_prob",)),
    "MultipleChoice": Head(pooler=True, dropout=("hidden_dropout_prob",)),
    "TokenClassification": Head(dropout=("hidden_dropout_prob",)),
    "QuestionAnswering": Head(dropout=()),
}

_MODERNBERT_NAMES = (
    ("head.dense", "cls.predictions.transform.dense"),
    ("head.norm", "cls.predictions.transform.LayerNorm"),
    ("decoder.bias", "cls.predictions.bias"),
    ("decoder", "cls.predictions.decoder"),
)
_MODERNBERT_HEAD = Head(names=(("head.norm", "head.LayerNorm"),), transform=True, dropout=("classifier_dropout",))
_MODERNBERT_HEADS = {
    "MaskedLM": Head(names=_MODERNBERT_NAMES),
    "SequenceClassification": _MODERNBERT_HEAD,
    "MultipleChoice": _MODERNBERT_HEAD,
    "TokenClassification": _MODERNBERT_HEAD,
    "QuestionAnswering": replace(
        _MODERNBERT_HEAD, names=(("head.norm", "head.LayerNorm"), ("classifier", "qa_outputs"))
    ),
}

_DEBERTA_LM = (
    ("lm_predictions.lm_head.dense", "cls.predictions.transform.dense"),
    ("lm_predictions.lm_head.LayerNorm", "cls.predictions.transform.LayerNorm"),
    ("lm_predictions.lm_head", "cls.predictions"),
)
_DEBERTA_HEADS = {
    # The published v3 has the newer names, but its config.json does not say so.
    "MaskedLM": Head(older_names=_DEBERTA_LM),
    "SequenceClassification": Head(own_pooler=True, dropout=("cls_dropout", "hidden_dropout_prob")),
    "MultipleChoice": Head(own_pooler=True, dropout=("cls_dropout", "hidden_dropout_prob")),
    "TokenClassification": Head(dropout=("hidden_dropout_prob",)),
    "QuestionAnswering": Head(dropout=()),
}

_ROBERTA_TOKENS = {
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "cls_token": "<s>",
    "sep_token": "</s>",
    "mask_token": "<mask>",
}


def _roberta(model_type: str, classes: str, vocab_size: int) -> Family:
    return Family(
        model_type,
        classes,
        prefix="roberta.",
        heads=_ROBERTA_HEADS,
        defaults={"vocab_size": vocab_size, "pad_token_id": 1},
        positions=AFTER_PADDING,
        tokenizer=classes,
        special_tokens=_ROBERTA_TOKENS,
        segments=False,
    )


_QKV = (("self_attn.qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),)
_LAYER, _THEIR_LAYER = "encoder.layer.*", "transformer.layer.*"

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("bert", "Bert", prefix="bert.", heads=BERT_HEADS, tokenizer="Bert"),
        _roberta("roberta", "Roberta", 50265),
        _roberta("xlm-roberta", "XLMRoberta", 30522),
        _roberta("camembert", "Camembert", 30522),
        Family(
            "distilbert",
            "DistilBert",
            position_types=None,
            prefix="distilbert.",
            heads=_DISTILBERT_HEADS,
            names=(
                (f"{_THEIR_LAYER}.attention.q_lin", f"{_LAYER}.attention.self.query"),
                (f"{_THEIR_LAYER}.attention.k_lin", f"{_LAYER}.attention.self.key"),
                (f"{_THEIR_LAYER}.attention.v_lin", f"{_LAYER}.attention.self.value"),
                (f"{_THEIR_LAYER}.attention.out_lin", f"{_LAYER}.attention.output.dense"),
                (f"{_THEIR_LAYER}.sa_layer_norm", f"{_LAYER}.attention.output.LayerNorm"),
                (f"{_THEIR_LAYER}.ffn.lin1", f"{_LAYER}.intermediate.dense"),
                (f"{_THEIR_LAYER}.ffn.lin2", f"{_LAYER}.output.dense"),
                (f"{_THEIR_LAYER}.output_layer_norm", f"{_LAYER}.output.LayerNorm"),
                ("transformer", "encoder"),
            ),
            settings=(
                ("dim", "hidden_size"),
                ("n_layers", "num_hidden_layers"),
                ("n_heads", "num_attention_heads"),
                ("hidden_dim", "intermediate_size"),
                ("activation", "hidden_act"),
                ("dropout", "hidden_dropout_prob"),
                ("attention_dropout", "attention_probs_dropout_prob"),
                ("seq_classif_dropout", "classifier_dropout"),
            ),
            defaults={"num_hidden_layers": 6, "classifier_dropout": 0.2, "qa_dropout": 0.1},
            fixed={"layer_norm_eps": 1e-12, "type_vocab_size": 1},
            token_types=False,
            pooler=False,
            attention_output_dropout=False,
            tokenizer="DistilBert",
            segments=False,
        ),
        Family(
            "electra",
            "Electra",
            prefix="electra.",
            heads=_ELECTRA_HEADS,
            defaults={"embedding_size": 128, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024},
            pooler=False,
            projection=True,
            tokenizer="Electra",
        ),
        Family(
            "mpnet",
            "MPNet",
            position_types=None,
            prefix="mpnet.",
            heads=_MPNET_HEADS,
            defaults={"vocab_size": 30527, "pad_token_id": 1, "relative_attention_num_buckets": 32},
            fixed={"type_vocab_size": 1, "classifier_dropout": None},
            required={"pad_token_id": 1},
            positions=AFTER_PADDING,
            token_types=False,
            text="mpnet",
            tokenizer="MPNet",
            special_tokens={**_ROBERTA_TOKENS, "unk_token": "[UNK]"},
            segments=False,
        ),
        Family(
            "modernbert",
            "ModernBert",
            position_types=None,
            prefix="model.",
            heads=_MODERNBERT_HEADS,
            names=(
                ("embeddings.tok_embeddings", "embeddings.word_embeddings"),
                ("embeddings.norm", "embeddings.LayerNorm"),
                ("embeddings.drop", "embeddings.dropout"),
                ("layers", "encoder.layer"),
                ("final_norm", "encoder.final_norm"),
            ),
            settings=(
                ("hidden_activation", "hidden_act"),
                ("norm_eps", "layer_norm_eps"),
                ("attention_dropout", "attention_probs_dropout_prob"),
            ),
            defaults={
                "vocab_size": 50368,
                "num_hidden_layers": 22,
                "intermediate_size": 1152,
                "max_position_embeddings": 8192,
                "layer_norm_eps": 1e-5,
                "attention_probs_dropout_prob": 0.0,
                "classifier_dropout": 0.0,
                "pad_token_id": 50283,
                "bos_token_id": 50281,
                "eos_token_id": 50282,
                "cls_token_id": 50281,
                "sep_token_id": 50282,
                "local_attention": 128,
                "norm_bias": False,
                "attention_bias": False,
                "mlp_bias": False,
                "embedding_dropout": 0.0,
                "mlp_dropout": 0.0,
                "decoder_bias": True,
                "classifier_bias": False,
                "classifier_activation": "gelu",
                "classifier_pooling": "cls",
            },
            fixed={"type_vocab_size": 1, "hidden_dropout_prob": 0.0},
            token_types=False,
            pooler=False,
            text="modernbert",
            tokenizer="PreTrained",
            segments=False,
        ),
        Family(
            "deberta-v2",
            "DebertaV2",
            position_types=None,
            prefix="deberta.",
            heads=_DEBERTA_HEADS,
            defaults={
                "vocab_size": 128100,
                "hidden_size": 1536,
                "num_hidden_layers": 24,
                "num_attention_heads": 24,
                "intermediate_size": 6144,
                "type_vocab_size": 0,
                "layer_norm_eps": 1e-7,
                "relative_attention": False,
                "max_relative_positions": -1,
                "position_buckets": -1,
                "share_att_key": False,
                "norm_rel_ebd": "none",
                "conv_kernel_size": 0,
                "position_biased_input": True,
                "pos_att_type": None,
                "pooler_dropout": 0.0,
                "pooler_hidden_act": "gelu",
                "legacy": True,
            },
            not_legacy={
                "heads": {**_DEBERTA_HEADS, "MaskedLM": Head(names=_DEBERTA_LM)},
                "fixed": {"tie_word_embeddings": True},
            },
            segments_optional=True,
            pooler=False,
            projection=True,
            text="deberta",
            tokenizer="DebertaV2",
        ),
        Family(
            "gte",
            "Gte",
            position_types=("rope",),
            prefix="gte.",
            heads={
                "MaskedLM": Head(
                    names=(
                        ("lm_head.dense", "cls.predictions.transform.dense"),
                        ("lm_head.layer_norm", "cls.predictions.transform.LayerNorm"),
                        ("lm_head.norm", "cls.predictions.transform.LayerNorm"),  # the hub's; it is not written
                        ("lm_head.decoder.bias", "cls.predictions.bias"),
                        ("lm_head.decoder", "cls.predictions.decoder"),
                    ),
                    activation="gelu",
                ),
                "SequenceClassification": Head(pooler=True),
                "TokenClassification": Head(),
            },
            names=(("layers", "encoder.layer"),),
            defaults={
                "vocab_size": 250048,
                "max_position_embeddings": 8192,
                "type_vocab_size": 1,
                "attention_probs_dropout_prob": 0.0,
                "pad_token_id": 1,
                "rope_theta": 160_000.0,
            },
            older_prefix="new.",
            older_names=(
                (f"{_LAYER}.attention.qkv_proj", f"{_LAYER}.self_attn.qkv"),
                (f"{_LAYER}.attention.o_proj", f"{_LAYER}.self_attn.o_proj"),
                (f"{_LAYER}.attn_ln", f"{_LAYER}.post_attention_layernorm"),
                (f"{_LAYER}.mlp_ln", f"{_LAYER}.post_mlp_layernorm"),
                (f"{_LAYER}.mlp.up_gate_proj", f"{_LAYER}.mlp.up_gate"),
            ),
            fused=(*_QKV, ("mlp.up_gate", ("mlp.up_proj", "mlp.gate_proj"))),
            segments_optional=True,
            pooler=False,
            text="gated_rotary_bert",
            tokenizer="PreTrained",
        ),
        Family(
            "nomic_bert",
            "NomicBert",
            position_types=None,
            prefix="nomic_bert.",
            heads={
                "MaskedLM": Head(
                    names=(("cls.predictions.transform.layer_norm", "cls.predictions.transform.LayerNorm"),),
                ),
                "SequenceClassification": Head(pooler=True),
                "TokenClassification": Head(),
            },
            names=(("layers", "encoder.layer"),),
            defaults={
                "vocab_size": 30528,
                "hidden_act": "silu",
                "hidden_dropout_prob": 0.0,
                "attention_probs_dropout_prob": 0.0,
                "max_position_embeddings": 2048,
                "rope_theta": 1000.0,
            },
            older_prefix="bert.",
            older_settings=(
                ("n_embd", "hidden_size"),
                ("n_layer", "num_hidden_layers"),
                ("n_head", "num_attention_heads"),
                ("n_inner", "intermediate_size"),
                ("n_positions", "max_position_embeddings"),
                ("resid_pdrop", "hidden_dropout_prob"),
                ("attn_pdrop", "attention_probs_dropout_prob"),
                ("layer_norm_epsilon", "layer_norm_eps"),
                ("rotary_emb_base", "rope_theta"),
            ),
            older_names=(
                ("emb_ln", "embeddings.LayerNorm"),
                ("encoder.layers.*.attn.Wqkv", f"{_LAYER}.self_attn.qkv"),
                ("encoder.layers.*.attn.out_proj", f"{_LAYER}.self_attn.o_proj"),
                ("encoder.layers.*.mlp.fc11", f"{_LAYER}.mlp.up_proj"),
                ("encoder.layers.*.mlp.fc12", f"{_LAYER}.mlp.gate_proj"),
                ("encoder.layers.*.mlp.fc2", f"{_LAYER}.mlp.down_proj"),
                ("encoder.layers.*.norm1", f"{_LAYER}.post_attention_layernorm"),
                ("encoder.layers.*.norm2", f"{_LAYER}.post_mlp_layernorm"),
            ),
            fused=_QKV,
            pooler=False,
            text_bias=False,
            text="gated_rotary_bert",
            tokenizer="Bert",
        ),
        *LATER,
    )
}


ALIASES = {"new": "gte"}  # names that the hub has for a family


def family_of(model_type: str) -> Family:
    """Returns the table of a model_type. Raises ValueError, with the list of supported families, if there is none."""
    model_type = ALIASES.get(model_type, model_type) if isinstance(model_type, str) else model_type
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"model_type: got {model_type!r}, expected one of {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]


def our_class(name: str) -> str:
    """Returns our name for a class of transformers, as "BertForMaskedLM" for "XLMRobertaForMaskedLM".

    Another name stays as it is.
    """
    for family in sorted(FAMILIES.values(), key=lambda family: -len(family.classes)):
        if name.startswith(family.classes):
            return "Bert" + name.removeprefix(family.classes)
    return name
