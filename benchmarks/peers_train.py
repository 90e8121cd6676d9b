"""Peers of the training level do one optimiser step: AdamW on a model with a head, float32 weights, usual dropout.

All take the same padded ids, masks and labels, already on the device. Before the first step their gradients without
dropout are compared with those of the reference, in float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import workloads
from laps import Lapped
from torch import Tensor, nn

import fastbert
import models
from fastbert import reference
from fastbert.adapters import acceleration
from fastbert.bench.engines import package_obstacle, silence_transformers
from fastbert.bench.memory import saved_for_backward
from fastbert.bench.peers import OURS
from fastbert.bench.texts import spread

CLASSES, WORDS, PRETRAINING = "SequenceClassification", "MaskedLM", "PreTraining"
REFERENCES = {CLASSES: "sequence_classification", WORDS: "masked_lm", PRETRAINING: "pre_training"}
N_INPUTS = 2  # sets of ids, which rotate
CHECKED = 4  # sequences whose gradients are compared with the reference's
SAMPLED = 20_000  # numbers of each gradient that are compared
MASKED = 0.15  # of all tokens have a label in pre-training
IGNORED = -100  # the label of the others
LEARNING_RATE = 1e-5
NO_GPU = "needs an NVIDIA GPU"
# The softmax does not change with a constant on all of a query's scores, so these gradients are zero except for
# rounding.
WITHOUT_GRADIENT = "attention.self.key.bias"
Batch = dict[str, Tensor]


class TrainTask:
    """A TrainTask is a model, its objective, and batches of sequences with these lengths.

    model: a shape in models.CONFIGS. objective: CLASSES, WORDS or PRETRAINING. dtype: float32, or that of autocast.
    """

    clip: float | None = None  # the greatest norm of all gradients together

    def __init__(
        self, model: str, lengths: Sequence[int], dtype: torch.dtype, device: torch.device, objective: str = CLASSES
    ) -> None:
        self.lengths, self.dtype, self.device, self.objective = tuple(lengths), dtype, device, objective
        self.folder = models.random_head_folder(model, objective)
        self.config = models.CONFIGS[model]

    @property
    def n_tokens(self) -> int:
        return sum(self.lengths)

    @functools.cached_property
    def inputs(self) -> list[Batch]:
        return [self._batch(self.lengths, number) for number in range(N_INPUTS)]

    @functools.cached_property
    def checked(self) -> Batch:
        """Returns a few sequences, from the shortest to the longest."""
        return self._batch(spread_of(sorted(self.lengths)), N_INPUTS)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), LEARNING_RATE, fused=True)

    def _batch(self, lengths: Sequence[int], seed: int) -> Batch:
        """Returns ids, a mask if some are padding, and labels."""
        rows = workloads.token_ids(lengths, self.config.vocab_size, seed)
        ids = np.zeros((len(rows), max(lengths)), np.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
        mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
        draw = np.random.default_rng([workloads.SEED, seed])
        classes = draw.integers(0, 2, len(rows))
        batch = {"input_ids": ids} | ({} if mask.all() else {"attention_mask": mask.astype(np.int64)})
        if self.objective == CLASSES:
            batch |= {"labels": classes}
        else:
            asked = (draw.random(ids.shape) < MASKED) & mask
            asked[0, 0] = True
            batch |= {"labels": np.where(asked, ids, IGNORED)}
            batch |= {"next_sentence_label": classes} if self.objective == PRETRAINING else {}
        return {name: torch.from_numpy(array).to(self.device) for name, array in batch.items()}

    @functools.cached_property
    def _exact(self) -> dict[str, Tensor]:
        """Returns samples of the gradients of the checked sequences in float64, without dropout, by name."""
        model = self.own_model()
        params = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
        self._loss_of_reference(params, model.config).backward()
        gradients = {name: p.grad for name, p in params.items() if p.grad is not None and WITHOUT_GRADIENT not in name}
        return {name: self._sample(name, gradient) for name, gradient in gradients.items()}

    def _loss_of_reference(self, params: Mapping[str, Tensor], config: Any) -> Tensor:
        labels = {name: x for name, x in self.checked.items() if "label" in name}
        inputs = {name: x for name, x in self.checked.items() if "label" not in name}
        out = reference.head(REFERENCES[self.objective], params, config, **inputs)
        if self.objective == PRETRAINING:
            words = _cross_entropy(out["prediction_logits"], labels["labels"])
            return words + _cross_entropy(out["seq_relationship_logits"], labels["next_sentence_label"])
        return _cross_entropy(out["logits"], labels["labels"])

    def reference(self) -> Tensor:
        """Returns the expected result of `sampled`."""
        return torch.cat([exact / _rms(exact) for exact in self._exact.values()])

    def sampled(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Returns some numbers of every gradient, each over the RMS of its reference, joined, on the CPU."""
        return torch.cat([self._sample(name, gradients[name]) / _rms(exact) for name, exact in self._exact.items()])

    def _sample(self, name: str, gradient: Tensor) -> Tensor:
        if name.endswith("word_embeddings.weight"):
            gradient = gradient[self.checked["input_ids"].unique()]
        flat = gradient.flatten()
        return flat[:: max(1, flat.numel() // SAMPLED)].cpu().double()

    def own_model(self) -> Any:
        kind = getattr(fastbert, f"BertFor{self.objective}")
        return kind.from_pretrained(self.folder, dtype=torch.float32, device=self.device)

    def transformers(self, attention: str) -> Any:
        """Returns transformers' model with the head, float32."""
        import transformers

        silence_transformers()
        kind = getattr(transformers, f"BertFor{self.objective}")
        model = kind.from_pretrained(self.folder, dtype=torch.float32, attn_implementation=attention)
        return model.to(self.device)


def spread_of(ascending: Sequence[Any]) -> list[Any]:
    """Returns CHECKED of the items, evenly from the whole list, with the last item as the last one."""
    return spread(ascending, CHECKED - 1) + [ascending[-1]]


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the mean over labels that are not IGNORED; logits (..., C), in float32 at least."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.flatten(0, -2).to(dtype), labels.flatten())


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


class Trained(Lapped):
    """A Trained is one model and its optimiser. Subclasses set `name` and define `load`.

    autocast: the dtype to compute in, if it is not the task's.
    """

    def __init__(self, task: TrainTask, autocast: torch.dtype | None = None) -> None:
        super().__init__(task.device)
        self.task, self.autocast = task, autocast or task.dtype
        self.dtype = str(self.autocast).removeprefix("torch.")

    @property
    def inputs(self) -> list[Any]:
        """Returns the batches that rotate, in the form that `loss` takes."""
        return self.task.inputs

    @property
    def checked(self) -> Any:
        """Returns the sequences whose gradients are compared, in the same form."""
        return self.task.checked

    def load(self) -> nn.Module:
        raise NotImplementedError

    def prepare(self) -> None:
        self.model: Any = self.load().train()
        self.optimizer = self.task.optimizer(self.model)

    def autocasting(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.autocast, enabled=self.autocast != torch.float32)

    def loss(self, batch: Any) -> Tensor:
        """Returns the loss of a batch, with dropout if the modules have it."""
        with self.autocasting():
            return self.compute(batch)

    def compute(self, batch: Any) -> Tensor:
        return self.model(**batch).loss

    def run(self, i: int) -> Tensor:
        self.start()
        loss = self.loss(self.inputs[i % N_INPUTS])
        self.mark()
        loss.backward()
        self.mark()
        if self.task.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.task.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.mark()
        return loss.detach()

    def output(self) -> Tensor:
        """Compares gradients without dropout, and then makes a whole step, to measure peak memory."""
        gradients = self._gradients()
        self.run(0)
        return gradients

    def _gradients(self) -> Tensor:
        dropouts = {module: module.p for module in self.model.modules() if isinstance(module, nn.Dropout)}
        try:
            for module in dropouts:
                module.p = 0.0
            self.loss(self.checked).backward()
        finally:
            for module, p in dropouts.items():
                module.p = p
        sampled = self.task.sampled({name: p.grad for name, p in self.model.named_parameters() if p.grad is not None})
        self.optimizer.zero_grad(set_to_none=True)
        return sampled

    def facts(self) -> dict[str, Any]:
        batch = self.inputs[0]
        positions = self.positions(batch)
        return {"padding_waste": 1.0 - self.task.n_tokens / positions, **self._saved(batch)}

    def positions(self, batch: Any) -> int:
        """Returns the number of computed positions, padding included."""
        return batch["input_ids"].numel()

    def _saved(self, batch: Any) -> dict[str, float]:
        """Returns the bytes kept for the backward pass, and their growth in units of H bytes a token and layer."""
        whole, few = self._saved_bytes(batch), self._saved_bytes(self.checked)
        more_tokens = self.task.n_tokens - _n_tokens(self.task.checked)
        facts: dict[str, float] = {"saved_bytes": whole}
        if more_tokens > 0:
            config = self.task.config
            facts["saved_h"] = (whole - few) / (more_tokens * config.num_hidden_layers * config.hidden_size)
        return facts

    def _saved_bytes(self, batch: Any) -> int:
        return saved_for_backward(lambda: self.loss(batch), [*self.model.parameters(), *self.model.buffers()])


def _n_tokens(batch: Batch) -> int:
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else int(mask.sum())


class FastBert(Trained):
    """This is our own model with a head."""

    name = OURS

    def load(self) -> nn.Module:
        return self.task.own_model()

    def positions(self, batch: Any) -> int:
        return self.task.n_tokens


class FastBert32(FastBert):
    """This is the same in float32; autocast should be faster."""

    name = f"{OURS} float32"

    def __init__(self, task: TrainTask) -> None:
        super().__init__(task, torch.float32)


class Transformers(Trained):
    attention: str

    def obstacle(self) -> str | None:
        return package_obstacle("transformers")

    def load(self) -> nn.Module:
        return self.task.transformers(self.attention)


class Eager(Transformers):
    name, attention = "transformers eager", "eager"


class SDPA(Transformers):
    name, attention = "transformers SDPA", "sdpa"


class Accelerated(Transformers):
    """This is transformers' model after fastbert.accelerate."""

    name, attention = f"{OURS} accelerated", "sdpa"

    def load(self) -> nn.Module:
        return fastbert.accelerate(super().load())

    def facts(self) -> dict[str, Any]:
        facts, reasons = super().facts(), self.reasons()
        return facts | ({"note": f"ran as before: {'; '.join(reasons)}"} if reasons else {})

    def reasons(self) -> list[str]:
        """Returns the reasons why calls so far ran by the original forward."""
        return [reason for reason in acceleration.counts(self.model) if reason != "fastbert"]

    def positions(self, batch: Any) -> int:
        return super().positions(batch) if self.reasons() else self.task.n_tokens


class Compiled(SDPA):
    """This is transformers' model and loss through torch.compile, for variable shapes if the batches vary."""

    name = "transformers compiled"

    def prepare(self) -> None:
        super().prepare()
        dynamic = None if len(set(self.task.lengths)) > 1 else False
        self.compiled: Callable[..., Any] = torch.compile(self.model, dynamic=dynamic)
        self.run(0)

    def compute(self, batch: Any) -> Tensor:
        return self.compiled(**batch).loss

    def output(self) -> Tensor:
        self.model.load_state_dict(self.load().state_dict())  # as before the step that compiled it
        return super().output()

    def _saved(self, batch: Any) -> dict[str, float]:
        return {}  # hooks on saved tensors would compile it again


class Flattened(Transformers):
    """This is transformers without padding: one row of all tokens, and FlashAttention-2 with the texts' offsets."""

    name, attention = "transformers flattened, FlashAttention-2", "flash_attention_2"

    def obstacle(self) -> str | None:
        if self.device.type != "cuda":
            return NO_GPU
        if self.autocast == torch.float32:
            return "FlashAttention takes bfloat16 and float16, not float32"
        reasons = [package_obstacle(package) for package in ("flash-attn", "kernels")]
        return super().obstacle() or (f"{reasons[0]}; {reasons[1]}" if all(reasons) else None)

    def positions(self, batch: Any) -> int:
        return self.task.n_tokens

    def compute(self, batch: Any) -> Tensor:
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
        offsets = F.pad(valid.sum(1).cumsum(0), (1, 0)).int()
        longest = ids.shape[1]
        positions = torch.arange(longest, device=ids.device).expand_as(ids)[valid][None]
        flat = ids[valid][None]  # (1, T)
        types = batch.get("token_type_ids", torch.zeros_like(ids))[valid][None]
        states = self.model.bert(
            flat, position_ids=positions, token_type_ids=types, cu_seq_lens_q=offsets,
            cu_seq_lens_k=offsets, max_length_q=longest, max_length_k=longest,
        ).last_hidden_state[0]  # fmt: skip
        if self.task.objective == WORDS:
            return _cross_entropy(self.model.cls(states), batch["labels"][valid])
        pooled = self.model.bert.pooler(states[offsets[:-1].long()][:, None])
        if self.task.objective == CLASSES:
            return _cross_entropy(self.model.classifier(self.model.dropout(pooled)), batch["labels"])
        words, follows = self.model.cls(states, pooled)
        return _cross_entropy(words, batch["labels"][valid]) + _cross_entropy(follows, batch["next_sentence_label"])


class Liger(SDPA):
    """This is transformers with Liger's LayerNorm instead of PyTorch's."""

    name = "transformers, Liger's layers"

    def obstacle(self) -> str | None:
        if self.device.type != "cuda":
            return NO_GPU
        return super().obstacle() or package_obstacle("liger-kernel")

    def load(self) -> nn.Module:
        from liger_kernel.transformers.layer_norm import LigerLayerNorm

        model = super().load()
        for module in list(model.modules()):
            for child_name, child in list(module.named_children()):
                if type(child) is nn.LayerNorm:
                    ours = LigerLayerNorm(child.normalized_shape[0], eps=child.eps).to(self.device)
                    ours.load_state_dict(child.state_dict())
                    setattr(module, child_name, ours)
        return model


def train_peers(task: TrainTask) -> list[Trained]:
    """Returns fastbert, plain PyTorch (the baseline), and all others for the task's device."""
    kinds = [FastBert, Eager, SDPA, Accelerated, Compiled]
    kinds += [Flattened, Liger] if task.device.type == "cuda" else []
    kinds += [FastBert32] if task.dtype != torch.float32 else []
    return [kind(task) for kind in kinds]
