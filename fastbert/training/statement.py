"""This module describes a run: in plain sentences at its start, and as facts for its journal and its model card."""

from __future__ import annotations

import math
import platform
from typing import Any

import torch

from fastbert._version import __version__
from fastbert.training.parts import Parts


def statement(parts: Parts) -> str:
    """Returns a description of a run before its first step: sizes, steps, and a baseline of the loss."""
    facts = facts_of(parts)
    objective = "masked tokens and next sentences" if parts.settings.nsp else "masked tokens"
    lines = [
        f"{facts['parameters']:,} parameters: {facts['layers']} layers, hidden size {facts['hidden_size']}, "
        f"{facts['vocabulary']:,} tokens in the vocabulary; {objective}; {facts['precision']} on {facts['device']}.",
        f"{facts['documents']:,} documents with {facts['corpus_tokens']:,} tokens from {facts['files']:,} files; "
        f"{facts['held_out_documents']:,} documents are held out.",
        f"{facts['steps']:,} steps of about {facts['tokens_per_step']:,} tokens in {facts['batches_per_step']} batches "
        f"on {facts['processes']} processes, which is {facts['epochs']:.1f} times the text.",
        f"Without any context, by frequency alone, masked tokens have a loss of {facts['unigram_loss']:.3f} and "
        f"{facts['unigram_accuracy']:.1%} are right; a new model begins near {facts['uniform_loss']:.2f}.",
    ]
    return "\n".join(lines)


def facts_of(parts: Parts) -> dict[str, Any]:
    """Returns the facts of a run, with the names that its journal and its model card use."""
    corpora, settings, config = parts.corpora, parts.settings, parts.model.config
    evaluation = corpora.evaluation
    held_out = corpora.held_out if evaluation is None else evaluation.n_documents
    device = parts.processes.device
    tokens = parts.steps * parts.tokens_per_step
    return {
        "parameters": sum(p.numel() for p in parts.model.parameters()),
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "model_type": config.model_type,
        "model_config": settings.model_config,
        "vocabulary": parts.tokenizer.vocab_size,
        "mask_token": parts.tokenizer.mask_token,
        "nsp": settings.nsp,
        "mlm_probability": settings.mlm_probability,
        "whole_words": settings.whole_words,
        "max_length": parts.max_length,
        "files": corpora.n_files,
        "documents": corpora.training.n_documents,
        "corpus_tokens": corpora.training.n_tokens,
        "corpus_hash": corpora.training.fingerprint,
        "held_out_documents": held_out,
        "steps": parts.steps,
        "tokens_per_step": parts.tokens_per_step,
        "batches_per_step": parts.plan.n_batches,
        "epochs": tokens / max(1, parts.plan.tokens_per_epoch),
        "processes": parts.processes.n,
        "precision": "bf16 with fp32 weights" if parts.bf16 else "fp32",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "learning_rate": settings.learning_rate,
        "schedule": settings.schedule,
        "warmup": settings.warmup,
        "weight_decay": settings.weight_decay,
        "seed": settings.seed,
        "unigram_loss": parts.baseline.loss,
        "unigram_accuracy": parts.baseline.accuracy,
        "uniform_loss": math.log(config.vocab_size),
        "versions": {"fastbert": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def processor() -> str:
    """Returns the name of the processor, with the number of PyTorch's threads."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), name)
    except OSError:
        pass
    return f"{name}, {torch.get_num_threads()} threads"
