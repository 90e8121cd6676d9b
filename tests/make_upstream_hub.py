"""This script fills a cache of huggingface_hub with stand-ins for models that other libraries' tests download.

Usage: `python make_upstream_hub.py FOLDER`, then run those tests with HF_HOME=FOLDER and HF_HUB_OFFLINE=1. The
stand-ins have the names and the sizes of the originals. Their weights are corners of those of the packaged
all-MiniLM-L6-v2 where the names of the parameters match, else random. See docs/upstream-tests.md.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import sentence_transformers as st
import tokenizers
import torch
import transformers
from sentence_transformers.sentence_transformer import modules
from sentence_transformers.sparse_encoder import modules as sparse

from helpers import docstrings, minilm_folder

SENTENCES = "sentence-transformers-testing/stsb-bert-tiny-safetensors"
RERANKER = "cross-encoder-testing/reranker-bert-tiny-gooaq-bce"
SPLADE = "sparse-encoder-testing/splade-bert-tiny-nq"
ROUTED = "sparse-encoder-testing/inference-free-splade-bert-tiny-nq"
TINY = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALLER = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 5, "num_attention_heads": 4}


class Hub:
    """A folder that HF_HOME may name."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.wordpiece = transformers.AutoTokenizer.from_pretrained(minilm_folder())
        self.weights = transformers.BertModel.from_pretrained(minilm_folder()).state_dict()

    def folder(self, name: str) -> Path:
        """The place in the cache of the one snapshot of this model."""
        top, commit = self.home / "hub" / f"models--{name.replace('/', '--')}", "0" * 40
        (top / "refs").mkdir(parents=True, exist_ok=True)
        (top / "refs" / "main").write_text(commit)
        (top / "snapshots" / commit).mkdir(parents=True, exist_ok=True)
        return top / "snapshots" / commit

    def add(self, name: str, model: Any, tokenizer: Any) -> Path:
        """Adds a model of transformers with its tokenizer, and returns the folder."""
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                trained = self.weights.get(key.partition(".")[2] if key not in self.weights else key)
                if trained is not None and all(a <= b for a, b in zip(parameter.shape, trained.shape, strict=True)):
                    parameter.copy_(trained[tuple(slice(n) for n in parameter.shape)])
        folder = self.folder(name)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    def add_bert(self, name: str, kind: str, settings: dict[str, Any]) -> Path:
        config = transformers.BertConfig(vocab_size=len(self.wordpiece), **settings)
        return self.add(name, getattr(transformers, kind)(config), self.wordpiece)


def byte_level_tokenizer() -> Any:
    """A tokenizer of RoBERTa's kind, trained on English."""
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer.train_from_iterator(docstrings(500), vocab_size=1024, special_tokens=special, show_progress=False)
    return transformers.RobertaTokenizerFast(tokenizer_object=tokenizer._tokenizer, model_max_length=512)


def main(home: Path) -> None:
    torch.manual_seed(0)
    hub = Hub(home)
    # sentence-transformers
    folder = hub.add_bert(SENTENCES, "BertModel", TINY)
    encoder = modules.Transformer(str(folder))
    st.SentenceTransformer(modules=[encoder, modules.Pooling(TINY["hidden_size"], "mean")]).save(str(folder))
    minilm = st.SentenceTransformer(str(minilm_folder()))
    for name in ("all-MiniLM-L6-v2", "paraphrase-multilingual-MiniLM-L12-v2"):
        minilm.save(str(hub.folder(f"sentence-transformers/{name}")))
    hub.add_bert(RERANKER, "BertForSequenceClassification", {**TINY, "num_labels": 1})
    folder = hub.add_bert(SPLADE, "BertForMaskedLM", TINY)
    masked = st.SparseEncoder(modules=[sparse.MLMTransformer(str(folder)), sparse.SpladePooling("max")])
    masked.save(str(folder))
    query = sparse.SparseStaticEmbedding(tokenizer=hub.wordpiece, frozen=False)
    router = modules.Router.for_query_document([query], list(masked.children()))
    st.SparseEncoder(modules=[router]).save(str(hub.folder(ROUTED)))
    config = transformers.DistilBertConfig(vocab_size=len(hub.wordpiece), n_layers=2)
    hub.add("distilbert/distilbert-base-uncased", transformers.DistilBertModel(config), hub.wordpiece)
    hub.add_bert("google-bert/bert-base-uncased", "BertForMaskedLM", {"num_hidden_layers": 2})
    # PEFT, and what RoBERTa is in sentence-transformers
    bpe = byte_level_tokenizer()
    positions = {"max_position_embeddings": 514, "type_vocab_size": 1}
    roberta = transformers.RobertaConfig(vocab_size=len(bpe), num_labels=1, **positions, **TINY)
    head = transformers.RobertaForSequenceClassification(roberta)
    hub.add("cross-encoder-testing/stsb-distilroberta-base", head, bpe)
    for kind in ("BertModel", "BertForSequenceClassification"):
        hub.add_bert(f"peft-internal-testing/tiny-random-{kind}", kind, SMALLER)
    for kind in ("RobertaModel", "RobertaForSequenceClassification"):
        config = transformers.RobertaConfig(vocab_size=len(bpe), **positions, **SMALLER)
        hub.add(f"peft-internal-testing/tiny-random-{kind}", getattr(transformers, kind)(config), bpe)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
