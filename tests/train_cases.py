"""The tests of training accelerated models share models without dropout, labels for every head, and steps."""

from __future__ import annotations

import copy
import functools
import itertools
from typing import Any

import torch
from torch import Tensor

import fastbert
from family_cases import head_names, make_batch, randomised, their_class, theirs
from fastbert.adapters import counts
from helpers import rms_error
from model_cases import LENGTH, in_dtype, is_zero

FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra")
DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "summary_last_dropout")
OF_DISTILBERT = ("dropout", "attention_dropout", "seq_classif_dropout", "qa_dropout")
# Every model that transformers has of each family.
MODELS = [
    *((model_type, name) for model_type in FAMILIES for name in ("BertModel", *head_names(model_type))),
    ("electra", "BertForPreTraining"),
    ("electra", "BertForMultipleChoice"),
    ("distilbert", "BertForMultipleChoice"),
]


def probabilities(model_type: str, p: float) -> dict[str, float]:
    """The settings of a config by which every dropout has the probability p."""
    return dict.fromkeys(OF_DISTILBERT if model_type == "distilbert" else DROPOUTS, p)


def original(
    model_type: str = "bert",
    name: str = "BertModel",
    dtype: torch.dtype = torch.float64,
    p: float = 0.0,
    **options: Any,
) -> Any:
    """A random tiny model of transformers in training mode, all of whose dropouts have the probability p."""
    return in_dtype(theirs(model_type, name, **probabilities(model_type, p), **options), dtype).train()


def accelerated_copy(model: Any) -> Any:
    """An accelerated copy, in the modes of the model."""
    return fastbert.accelerate(copy.deepcopy(model))


def labelled(model_type: str, name: str) -> dict[str, Any]:
    """A batch for this model, with labels that leave out padding.

    Nothing is padded for question answering, whose loss looks at the logits of padding.
    """
    batch = make_batch(model_type, "none" if name == "BertForQuestionAnswering" else "right")
    rows, tokens = torch.arange(4) % 2, torch.arange(4 * LENGTH).view(4, LENGTH) % 2
    if batch["attention_mask"] is not None:
        tokens = tokens.masked_fill(batch["attention_mask"] == 0, -100)
    if name == "BertForMultipleChoice":
        return {**{key: value.unflatten(0, (2, 2)) for key, value in batch.items()}, "labels": rows[:2]}
    if name == "BertForPreTraining" and model_type == "bert":
        return {**batch, "labels": tokens, "next_sentence_label": rows}
    if name == "BertForQuestionAnswering":
        return {**batch, "start_positions": rows, "end_positions": rows + 1}
    of_tokens = name in ("BertForMaskedLM", "BertForTokenClassification", "BertForPreTraining")
    return batch if name == "BertModel" else {**batch, "labels": tokens if of_tokens else rows}


def loss_of(model: Any, batch: dict[str, Any], **options: Any) -> Tensor:
    """The loss of a head, or a scalar in which every output of a bare model counts, but for padding."""
    output = model(**batch, **options)
    if "labels" in batch or "start_positions" in batch:
        return output.loss
    hidden, mask = output.last_hidden_state, batch["attention_mask"]
    rows = hidden if mask is None else hidden[mask.bool()]
    weights = torch.linspace(-1, 1, rows.shape[-1], dtype=rows.dtype)
    loss = ((rows * weights).sum(-1) ** 2).mean()
    pooled = getattr(output, "pooler_output", None)
    return loss if pooled is None else loss + (pooled * weights).sum(-1).exp().mean()


def step(model: Any, batch: dict[str, Any], **options: Any) -> Tensor:
    """One backward pass. Returns the loss."""
    model.zero_grad()
    loss = loss_of(model, batch, **options)
    loss.backward()
    return loss.detach()


SEEDS = range(6)  # The error of one tiny model's gradients is chance; that of six together is within a few per cent.


def gradients_of_seeds(
    model_type: str, name: str, dtype: torch.dtype, autocast: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """All gradients of several models: ours, the original's, and those in float64, whose RMS is 1 in each parameter."""
    parts: tuple[list[Tensor], ...] = ([], [], [])
    batch = labelled(model_type, name)
    for seed in SEEDS:
        eager = original(model_type, name, dtype)
        randomised(eager, seed)
        reference, ours = in_dtype(eager, torch.float64), accelerated_copy(eager)
        step(reference, batch)
        for each in (ours, eager):
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                loss = loss_of(each, batch)
            loss.backward()
        assert counts(ours) == {"fastbert": 1}
        exact = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None and not is_zero(p.grad)}
        for part, each in zip(parts, (ours, eager, reference), strict=True):
            grads = dict(each.named_parameters())
            part += [(grads[n].grad.double() / grad.square().mean().sqrt()).flatten() for n, grad in exact.items()]
    ours_all, eager_all, exact_all = map(torch.cat, parts)
    return ours_all, eager_all, exact_all


def assert_rounding(ours: Tensor, eager: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """The numerical policy on what `gradients_of_seeds` gives."""
    our_error, eager_error = rms_error(ours, exact), rms_error(eager, exact)
    bound = 1.25 * eager_error + 0.5 * torch.finfo(dtype).eps
    assert our_error <= bound, f"gradients: error {our_error:.3g}, eager has {eager_error:.3g}, bound {bound:.3g}"


# A task that is on every machine: which topic of Python's own documentation a passage is from.


@functools.cache
def passages() -> tuple[list[str], list[int], list[str]]:
    """Passages of very mixed length, the number of each one's topic, and the names of the topics."""
    from pydoc_data.topics import topics

    names = sorted(sorted(topics, key=lambda name: -len(topics[name]))[:6])
    texts, labels = [], []
    for label, name in enumerate(names):
        words = topics[name].split()
        lengths = itertools.cycle((6, 40, 12, 25, 60, 9))
        start = 0
        for length in itertools.islice(lengths, 60):
            texts.append(" ".join(words[start : start + length]))
            labels.append(label)
            start += length
    assert min(map(len, texts)) > 0
    return texts, labels, names


def classification_data(tokenizer: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The task as tokens: 288 examples for training, and 72 others for evaluation."""
    texts, labels, _ = passages()
    encoded = tokenizer(texts, truncation=True, max_length=64)
    examples = [
        {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": label}
        for ids, label in zip(encoded["input_ids"], labels, strict=True)
    ]
    return [e for i, e in enumerate(examples) if i % 5], examples[::5]


def classifier(model_type: str = "bert", p: float = 0.0, seed: int = 0) -> Any:
    """A small untrained model of transformers for that task, with the vocabulary of all-MiniLM-L6-v2."""
    kind = their_class(model_type, "BertForSequenceClassification")
    sizes = dict(zip(SIZES_OF_DISTILBERT if model_type == "distilbert" else SIZES, (64, 2, 4, 128), strict=True))
    config = kind.config_class(
        vocab_size=30522, num_labels=6, pad_token_id=0, initializer_range=0.1, **sizes, **probabilities(model_type, p)
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(config)


SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
SIZES_OF_DISTILBERT = ("dim", "n_layers", "n_heads", "hidden_dim")


def settings(folder: Any, **changes: Any) -> dict[str, Any]:
    """Arguments of a Trainer for 60 steps on the CPU that logs every loss, and writes nothing else."""
    return {
        "output_dir": str(folder), "max_steps": 60, "per_device_train_batch_size": 16, "learning_rate": 1e-3,
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True,
        "dataloader_pin_memory": False, "seed": 3, "warmup_steps": 5, **changes,
    }  # fmt: skip


class NotesLosses:
    """Notes the loss of every batch that a Trainer trains on; its own log rounds them, before version 5."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.losses: list[float] = []
        super().__init__(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        self.losses.append(loss.item())
        return loss


def distance(one: Any, other: Any) -> float:
    """The largest difference between two curves of losses."""
    return max(abs(a - b) for a, b in zip(one.losses, other.losses, strict=True))
