"""Peers of the pairs level go from pairs of texts to scores, as a cross-encoder does. The task is here too.

All give logits, so that the check sees differences that a sigmoid would hide.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers_servers import NO_GPU, import_obstacle, vllm_of
from torch import Tensor, nn

from fastbert import CrossEncoder, reference
from fastbert.bench.engines import (
    EAGER,
    SDPA,
    flash_implementation,
    flash_obstacle,
    package_obstacle,
    silence_transformers,
)
from fastbert.bench.exact import choose_checked
from fastbert.bench.peers import OURS, Peer

BATCH_SIZE = {"cpu": 16, "cuda": 256}  # pairs in a padded batch
Pair = tuple[str, str]


class PairTask:
    """A PairTask has a folder of a cross-encoder with one label, pairs of texts, a dtype and a device."""

    def __init__(self, folder: Path, pairs: Sequence[Pair], *, dtype: str, device: torch.device) -> None:
        self.folder, self.pairs, self.dtype, self.device = folder, list(pairs), dtype, device
        self.exact = CrossEncoder.from_pretrained(folder, device="cpu", backend="torch")
        self.longest = self.exact.max_seq_length
        encoded = self.exact.tokenizer([a for a, _ in self.pairs], [b for _, b in self.pairs], max_length=self.longest)
        self.lengths = [len(ids) for ids in encoded["input_ids"]]

    @functools.cached_property
    def checked(self) -> list[int]:
        """Returns the numbers of the pairs that the reference covers."""
        return choose_checked(self.lengths, self.exact.model.config, self.device)

    @torch.no_grad()
    def reference(self) -> Tensor:
        """Returns the logits of the checked pairs, (n, 1) float64, each pair alone, by fastbert.reference."""
        model, tokenizer = self.exact.model, self.exact.tokenizer
        parameters = {name: p.to(self.device, torch.float64) for name, p in model.named_parameters()}
        logits = []
        for i in self.checked:
            first, second = self.pairs[i]
            inputs = tokenizer([first], [second], max_length=self.longest, return_tensors="pt").to(self.device)
            scores = reference.head("sequence_classification", parameters, model.config, **inputs)["logits"]
            logits.append(scores.cpu())
        return torch.cat(logits)


class PairScorer(Peer):
    """A PairScorer is one way to score pairs. Subclasses set `name` and define `prepare` and `logits`."""

    def __init__(self, task: PairTask) -> None:
        self.task, self.dtype = task, task.dtype

    def logits(self) -> Any:
        """Returns the logits of all pairs in order, (n,), on the host."""
        raise NotImplementedError

    def run(self, i: int) -> Any:
        return self.logits()

    def output(self) -> Tensor:
        scores = torch.as_tensor(np.asarray(self.logits(), np.float32)).reshape(-1, 1)
        return scores[torch.tensor(self.task.checked)]


class FastBertPairs(PairScorer):
    """This is fastbert.CrossEncoder with its default settings."""

    name = OURS

    def prepare(self) -> None:
        self.encoder = CrossEncoder.from_pretrained(self.task.folder, dtype=self.task.dtype, device=self.task.device)

    def logits(self) -> Any:
        return self.encoder.predict(self.task.pairs, activation_fn=nn.Identity(), show_progress_bar=False)


class TransformersPairs(PairScorer):
    """This is transformers' model on padded batches of pairs, sorted by their tokens."""

    name, attention = EAGER, "eager"

    def obstacle(self) -> str | None:
        return package_obstacle("transformers")

    def prepare(self) -> None:
        import transformers

        silence_transformers()
        folder, dtype = self.task.folder, getattr(torch, self.task.dtype)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=dtype, attn_implementation=self.attention
        )
        self.model = model.to(self.task.device).eval()

    @torch.inference_mode()
    def logits(self) -> Any:
        pairs, device = self.task.pairs, self.task.device
        tokens = self.tokenizer(
            [a for a, _ in pairs], [b for _, b in pairs], truncation=True, max_length=self.task.longest
        )
        order = sorted(range(len(pairs)), key=lambda i: -len(tokens["input_ids"][i]))
        size, parts = BATCH_SIZE[device.type], []
        for start in range(0, len(order), size):
            batch = [{name: values[i] for name, values in tokens.items()} for i in order[start : start + size]]
            inputs = self.tokenizer.pad(batch, return_tensors="pt").to(device)
            parts.append(self.model(**inputs).logits[:, 0].float())
        scores = torch.cat(parts).cpu().numpy()
        out = np.empty_like(scores)
        out[order] = scores
        return out


class SdpaPairs(TransformersPairs):
    """This is `TransformersPairs` with SDPA."""

    name, attention = SDPA.name, "sdpa"


class SentenceTransformersPairs(PairScorer):
    """This is sentence-transformers' CrossEncoder with SDPA, in the task's dtype."""

    name = "sentence-transformers CrossEncoder"

    def obstacle(self) -> str | None:
        return package_obstacle("sentence-transformers")

    def prepare(self) -> None:
        self._load(getattr(torch, self.task.dtype), "sdpa")

    def _load(self, dtype: torch.dtype, attention: str) -> None:
        silence_transformers()
        from sentence_transformers import CrossEncoder as Theirs

        arguments = {"dtype": dtype, "attn_implementation": attention}
        self.encoder = Theirs(str(self.task.folder), device=str(self.task.device), model_kwargs=arguments)

    def logits(self) -> Any:
        size = BATCH_SIZE[self.task.device.type]
        return self.encoder.predict(
            self.task.pairs, batch_size=size, activation_fn=nn.Identity(), show_progress_bar=False
        )


class FlashPairs(SentenceTransformersPairs):
    """This is sentence-transformers' CrossEncoder in float16 with FlashAttention-2, which leaves its inputs padded."""

    name = "sentence-transformers CrossEncoder FlashAttention-2"

    def __init__(self, task: PairTask) -> None:
        super().__init__(task)
        self.dtype = "float16"

    def obstacle(self) -> str | None:
        return NO_GPU if self.task.device.type != "cuda" else super().obstacle() or flash_obstacle()

    def prepare(self) -> None:
        self._load(torch.float16, flash_implementation())


class VllmPairs(PairScorer):
    """This is vLLM's `LLM.score`, with its own tokenization. Its scores are sigmoids of the logits."""

    name = "vLLM"

    def obstacle(self) -> str | None:
        return NO_GPU if self.task.device.type != "cuda" else import_obstacle("vllm", "vllm")

    def prepare(self) -> None:
        self.engine = vllm_of(self.task.folder, self.task.dtype, self.task.longest)

    def logits(self) -> Any:
        firsts, seconds = [a for a, _ in self.task.pairs], [b for _, b in self.task.pairs]
        outputs = self.engine.score(firsts, seconds, use_tqdm=False)
        scores = np.array([output.outputs.score for output in outputs], np.float64)
        return np.log(scores) - np.log1p(-scores)


class TensorRtLlmPairs(PairScorer):
    """This is TensorRT-LLM's `LLM.encode` for encoders, on token ids. It has no segments, so the check may find it
    wrong.

    Source: github.com/NVIDIA/TensorRT-LLM, pull requests 12801 and 14326.
    """

    name = "TensorRT-LLM"

    def obstacle(self) -> str | None:
        if self.task.device.type != "cuda":
            return NO_GPU
        if (missing := import_obstacle("tensorrt_llm", "tensorrt_llm")) is not None:
            return missing
        import tensorrt_llm

        return None if hasattr(tensorrt_llm.LLM, "encode") else "this version of TensorRT-LLM has no LLM.encode"

    def prepare(self) -> None:
        import transformers
        from tensorrt_llm import LLM

        self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.task.folder)
        self.engine = LLM(model=str(self.task.folder), dtype=self.task.dtype, encode_only=True)

    def logits(self) -> Any:
        pairs = self.task.pairs
        tokens = self.tokenizer(
            [a for a, _ in pairs], [b for _, b in pairs], truncation=True, max_length=self.task.longest
        )
        outputs = self.engine.encode([{"prompt_token_ids": ids} for ids in tokens["input_ids"]])
        return [float(torch.as_tensor(output.logits).flatten()[0]) for output in outputs]


PAIR_SCORERS: tuple[type[PairScorer], ...] = (
    FastBertPairs, TransformersPairs, SdpaPairs, SentenceTransformersPairs, FlashPairs, VllmPairs, TensorRtLlmPairs,
)  # fmt: skip
