"""config.json of the encoders that docs/supported-models.md lists, as published, but for the sizes of their tensors.

Names that transformers writes into every config (transformers_version, torch_dtype, _name_or_path) are left out.
"""

from __future__ import annotations

from typing import Any

BERT: dict[str, Any] = {
    "attention_probs_dropout_prob": 0.1, "gradient_checkpointing": False, "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1, "initializer_range": 0.02, "layer_norm_eps": 1e-12, "max_position_embeddings": 512,
    "model_type": "bert", "pad_token_id": 0, "position_embedding_type": "absolute", "type_vocab_size": 2,
    "use_cache": True,
}  # fmt: skip
ROBERTA: dict[str, Any] = {
    **BERT, "model_type": "roberta", "layer_norm_eps": 1e-5, "max_position_embeddings": 514, "type_vocab_size": 1,
    "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
XLMR = {**ROBERTA, "model_type": "xlm-roberta", "output_past": True}
CAMEMBERT = {**ROBERTA, "model_type": "camembert", "output_past": True, "bos_token_id": 5, "eos_token_id": 6}
DISTILBERT: dict[str, Any] = {
    "activation": "gelu", "attention_dropout": 0.1, "dropout": 0.1, "initializer_range": 0.02,
    "max_position_embeddings": 512, "model_type": "distilbert", "pad_token_id": 0, "qa_dropout": 0.1,
    "seq_classif_dropout": 0.2, "sinusoidal_pos_embds": False, "tie_weights_": True,
}  # fmt: skip
ELECTRA = {**BERT, "model_type": "electra", "summary_activation": "gelu", "summary_last_dropout": 0.1,
           "summary_type": "first", "summary_use_proj": True}  # fmt: skip
DEBERTA: dict[str, Any] = {
    "model_type": "deberta-v2", "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
    "initializer_range": 0.02, "max_position_embeddings": 512, "relative_attention": True, "position_buckets": 256,
    "norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": "p2c|c2p", "layer_norm_eps": 1e-7,
    "max_relative_positions": -1, "position_biased_input": False, "type_vocab_size": 0,
}  # fmt: skip
NLI_DEBERTA = {**DEBERTA, "pos_att_type": ["p2c", "c2p"], "pad_token_id": 0, "pooler_dropout": 0,
               "pooler_hidden_act": "gelu", "pooler_hidden_size": 32}  # fmt: skip
JINA = {**BERT, "position_embedding_type": "alibi", "feed_forward_type": "geglu", "max_position_embeddings": 8192,
        "attention_probs_dropout_prob": 0.0, "attn_implementation": None}  # fmt: skip
LABELS_2 = {"id2label": {"0": "NEGATIVE", "1": "POSITIVE"}, "label2id": {"NEGATIVE": 0, "POSITIVE": 1}}
LABELS_1 = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
LABELS_3 = {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}


def _case(config: dict[str, Any], architecture: str, **changes: Any) -> dict[str, Any]:
    return {**config, "architectures": [architecture], **changes}


def code_of(repository: str) -> dict[str, str]:
    """The auto_map of a model whose code is in another repository of Jina's."""
    return {"AutoModel": f"jinaai/{repository}--modeling_bert.JinaBertModel"}


# The name on the hub -> config.json.
PUBLISHED: dict[str, dict[str, Any]] = {
    "google-bert/bert-base-uncased": _case(BERT, "BertForMaskedLM"),
    "google-bert/bert-base-cased": _case(BERT, "BertForMaskedLM"),
    "google-bert/bert-base-multilingual-cased": _case(
        BERT, "BertForMaskedLM", directionality="bidi", pooler_fc_size=768, pooler_num_attention_heads=12,
        pooler_num_fc_layers=3, pooler_size_per_head=128, pooler_type="first_token_transform",
    ),
    "sentence-transformers/all-MiniLM-L6-v2": _case(BERT, "BertModel"),
    "sentence-transformers/all-MiniLM-L12-v2": _case(BERT, "BertModel"),
    "sentence-transformers/multi-qa-MiniLM-L6-cos-v1": _case(BERT, "BertModel"),
    "sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2": _case(BERT, "BertModel"),
    "cross-encoder/ms-marco-MiniLM-L6-v2": _case(BERT, "BertForSequenceClassification", **LABELS_1),
    "BAAI/bge-small-en-v1.5": _case(BERT, "BertModel", **LABELS_1),
    "BAAI/bge-base-en-v1.5": _case(BERT, "BertModel", **LABELS_1),
    "BAAI/bge-large-en-v1.5": _case(BERT, "BertModel", **LABELS_1),
    "BAAI/bge-m3": _case(XLMR, "XLMRobertaModel", classifier_dropout=None, max_position_embeddings=8194),
    "BAAI/bge-reranker-base": _case(XLMR, "XLMRobertaForSequenceClassification", classifier_dropout=None, **LABELS_1),
    "BAAI/bge-reranker-v2-m3": _case(
        XLMR, "XLMRobertaForSequenceClassification", classifier_dropout=None, max_position_embeddings=8194, **LABELS_1
    ),
    "intfloat/e5-base-v2": _case(BERT, "BertModel", classifier_dropout=None),
    "intfloat/multilingual-e5-small": _case(BERT, "BertModel", tokenizer_class="XLMRobertaTokenizer"),
    "intfloat/multilingual-e5-base": _case(XLMR, "XLMRobertaModel", classifier_dropout=None),
    "intfloat/multilingual-e5-large": _case(XLMR, "XLMRobertaModel"),
    "thenlper/gte-base": _case(BERT, "BertModel"),
    "Snowflake/snowflake-arctic-embed-m": _case(BERT, "BertModel", classifier_dropout=None),
    "mixedbread-ai/mxbai-embed-large-v1": _case(BERT, "BertModel", classifier_dropout=None, use_cache=False),
    "ProsusAI/finbert": _case(BERT, "BertForSequenceClassification", **LABELS_3),
    "dslim/bert-base-NER": _case(BERT, "BertForTokenClassification", _num_labels=3, **LABELS_3),
    "emilyalsentzer/Bio_ClinicalBERT": {key: value for key, value in BERT.items() if key != "position_embedding_type"},
    "FacebookAI/roberta-base": _case(ROBERTA, "RobertaForMaskedLM"),
    "FacebookAI/roberta-large": _case(ROBERTA, "RobertaForMaskedLM"),
    "cardiffnlp/twitter-roberta-base-sentiment-latest": _case(ROBERTA, "RobertaForSequenceClassification", **LABELS_3),
    "FacebookAI/xlm-roberta-base": _case(XLMR, "XLMRobertaForMaskedLM"),
    "FacebookAI/xlm-roberta-large": _case(XLMR, "XLMRobertaForMaskedLM"),
    "almanach/camembert-base": _case(CAMEMBERT, "CamembertForMaskedLM"),
    "distilbert/distilbert-base-uncased": _case(DISTILBERT, "DistilBertForMaskedLM"),
    "distilbert/distilbert-base-uncased-finetuned-sst-2-english": _case(
        DISTILBERT, "DistilBertForSequenceClassification", finetuning_task="sst-2", output_past=True, **LABELS_2
    ),
    "google/electra-base-discriminator": _case(ELECTRA, "ElectraForPreTraining"),
    "google/electra-small-discriminator": _case(ELECTRA, "ElectraForPreTraining", embedding_size=16),
    "monologg/koelectra-base-v3-discriminator": _case(ELECTRA, "ElectraForPreTraining"),
    "klue/bert-base": _case(BERT, "BertForMaskedLM"),
    "klue/roberta-base": _case(ROBERTA, "RobertaForMaskedLM", tokenizer_class="BertTokenizer"),
    "skt/kobert-base-v1": _case(BERT, "BertModel"),
    "monologg/kobert": _case(BERT, "BertModel"),
    "naver/splade-cocondenser-ensembledistil": _case(BERT, "BertForMaskedLM"),
    "colbert-ir/colbertv2.0": _case(BERT, "HF_ColBERT"),
    "sentence-transformers/all-mpnet-base-v2": _case(
        ROBERTA, "MPNetForMaskedLM", model_type="mpnet", relative_attention_num_buckets=32
    ),
    "answerdotai/ModernBERT-base": {
        "architectures": ["ModernBertForMaskedLM"], "model_type": "modernbert", "global_attn_every_n_layers": 3,
        "global_rope_theta": 160000.0, "hidden_activation": "gelu", "local_attention": 128, "norm_eps": 1e-05,
        "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3,  # of few words
    },
    "nomic-ai/nomic-embed-text-v1.5": {
        "architectures": ["NomicBertModel"], "model_type": "nomic_bert", "activation_function": "swiglu",
        "rotary_emb_base": 1000, "rotary_emb_fraction": 1.0, "n_embd": 32, "n_head": 2, "n_layer": 2,
    },
    "Alibaba-NLP/gte-base-en-v1.5": {
        "architectures": ["NewModel"], "model_type": "new", "position_embedding_type": "rope", "rope_theta": 500000,
    },
    **{
        f"microsoft/{name}": DEBERTA
        for name in ("deberta-v3-small", "deberta-v3-base", "deberta-v3-large", "mdeberta-v3-base")
    },
    "microsoft/deberta-v2-xlarge": {
        **DEBERTA, "conv_kernel_size": 3, "conv_act": "gelu", "attention_head_size": 16,  # of few columns
    },
    **{
        name: _case(NLI_DEBERTA, "DebertaV2ForSequenceClassification", **LABELS_3)
        for name in (
            "cross-encoder/nli-deberta-v3-base", "cross-encoder/nli-deberta-v3-small",
            "MoritzLaurer/DeBERTa-v3-base-mnli-fever-anli", "MoritzLaurer/deberta-v3-large-zeroshot-v2.0",
            "MoritzLaurer/mDeBERTa-v3-base-mnli-xnli",
        )
    },
    "albert/albert-base-v2": {
        "architectures": ["AlbertForMaskedLM"], "model_type": "albert", "num_hidden_groups": 1, "inner_group_num": 1,
        "embedding_size": 16,
    },
    "sentence-transformers/paraphrase-albert-small-v2": {
        "architectures": ["AlbertModel"], "model_type": "albert", "num_hidden_groups": 1, "inner_group_num": 1,
        "embedding_size": 16, "hidden_act": "gelu", "attention_probs_dropout_prob": 0.1, "classifier_dropout_prob": 0.1,
        "down_scale_factor": 1, "gap_size": 0, "net_structure_type": 0, "num_memory_blocks": 0,
    },
    "jinaai/jina-embeddings-v2-base-en": _case(
        JINA, "JinaBertForMaskedLM", auto_map=code_of("jina-bert-implementation"), emb_pooler="mean"
    ),
    "jinaai/jina-embeddings-v2-small-en": _case(
        JINA, "JinaBertForMaskedLM", auto_map=code_of("jina-bert-implementation"), emb_pooler="mean"
    ),
    "jinaai/jina-reranker-v1-turbo-en": _case(
        JINA, "JinaBertForSequenceClassification", auto_map=code_of("jina-bert-implementation"), **LABELS_1
    ),
    "jinaai/jina-embeddings-v2-base-code": _case(
        JINA, "JinaBertForMaskedLM", auto_map=code_of("jina-bert-v2-qk-post-norm"), emb_pooler="mean"
    ),
}  # fmt: skip

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 90}
DISTILBERT_SIZES = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48, "vocab_size": 90}


def small(name: str) -> dict[str, Any]:
    """The published config.json with small tensors."""
    config = PUBLISHED[name]
    sizes = DISTILBERT_SIZES if config["model_type"] == "distilbert" else SIZES
    embeddings = {"embedding_size": 32} if config["model_type"] == "electra" else {}
    return {**sizes, **embeddings, **config}
