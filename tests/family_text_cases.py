"""The tests of families on text share tokenizers, trained on a few texts, and random models."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as RustTokenizer
from tokenizers.models import BPE, Unigram

from family_cases import DISTILBERT_SIZES, SIZES
from fastbert import Tokenizer

TEXTS = [
    "the river is wide and slow",
    "a",
    "",
    "small boats cross the river every morning, and in the evening they come back full of fish",
    "  Every   evening: Übermaß, 한국어 \N{SNOWMAN}!",
    "boats <mask> boats </s> boats <pad> fish",
]
PAIRS = ["is it wide?", "", "b", "fish and boats", "no", "a <mask> river"]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
NAMES = {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"}


def byte_level() -> RustTokenizer:
    """RoBERTa's tokenizer: byte-level BPE with its own post-processor."""
    rust = RustTokenizer(BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    rust.train_from_iterator([*TEXTS, *PAIRS] * 3, trainer)
    rust.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    rust.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=True)
    return rust


def unigram() -> RustTokenizer:
    """The tokenizer of XLM-RoBERTa and CamemBERT: Unigram on words with a sign for the space, and a template."""
    rust = RustTokenizer(Unigram())
    rust.normalizer = normalizers.NFKC()
    rust.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    rust.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    rust.train_from_iterator([*TEXTS, *PAIRS] * 3, trainer)
    rust.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    rust.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return rust


KINDS = {"roberta": byte_level, "xlm-roberta": unigram, "camembert": unigram}


def make_folders(parent: Path) -> dict[str, Path]:
    """A folder for each model type with a tokenizer and a random model: plain checkpoints of transformers."""
    folders = {}
    torch.manual_seed(0)
    for model_type in (*KINDS, "distilbert", "electra"):
        folder = folders[model_type] = parent / model_type
        folder.mkdir()
        if model_type in KINDS:
            rust = KINDS[model_type]()
            rust.save(str(folder / "tokenizer.json"))
            (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 512}))
            vocab_size = rust.get_vocab_size()
        else:
            tokenizer = Tokenizer.train([*TEXTS, *PAIRS] * 3, vocab_size=120)
            vocab_size = tokenizer.vocab_size
            tokenizer.save_pretrained(folder)
            name = {"distilbert": "DistilBertTokenizer", "electra": "ElectraTokenizer"}[model_type]
            config = json.loads((folder / "tokenizer_config.json").read_text())
            (folder / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": name}))
        sizes = DISTILBERT_SIZES if model_type == "distilbert" else SIZES
        config = transformers.AutoConfig.for_model(
            model_type, vocab_size=vocab_size, max_position_embeddings=26, initializer_range=0.3, **sizes
        )
        transformers.AutoModel.from_config(config).save_pretrained(folder)
    return folders
