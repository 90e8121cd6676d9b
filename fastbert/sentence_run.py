"""One call of a SentenceEncoder: windows of texts, batches of tokens, pooling.

Texts are tokenised a window at a time, sorted by length within the window, cut into batches by a budget of tokens, run
packed, pooled in float32 and put back in the order in which they came. While a GPU still computes one window, the next
is tokenised.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastbert import ops, varlen
from fastbert.sentence_layout import POOLING_MODES, Normalize, apply
from fastbert.tokenizer import PackedEncoding
from fastbert.wordpiece import check_text

if TYPE_CHECKING:
    from fastbert.sentence import SentenceEncoder

logger = logging.getLogger("fastbert")

WINDOW = 16384  # texts tokenised and sorted at once
# Tokens in a batch. On a CPU, activations of more than a few MB leave its caches and are mapped anew by each op.
TOKEN_BUDGET = {"cpu": 2048, "cuda": 16384}


@dataclass(frozen=True)
class Request:
    """What one call asks for. single: one text came, not a list, so that errors name no index."""

    prompt: str = ""
    batch_size: int | None = None
    output_value: str | None = "sentence_embedding"
    normalize: bool = False
    truncate_dim: int | None = None
    single: bool = False
    progress: Callable[[int], Any] | None = None  # called with the number of texts of each batch


class Run:
    """`windows` does the work; the counters say what was cut."""

    def __init__(self, encoder: SentenceEncoder, request: Request) -> None:
        self.encoder, self.request = encoder, request
        self.device = encoder.device
        self.limit = encoder.max_seq_length
        self.skip = self._prompt_tokens()
        self.n_texts = self.n_truncated = self.n_truncated_tokens = 0

    def _prompt_tokens(self) -> int:
        """How many tokens at the start of each text pooling leaves out."""
        pooling, prompt = self.encoder.pooling, self.request.prompt
        if not prompt or pooling.include_prompt:
            return 0
        if "weightedmean" in pooling.modes:
            raise ValueError("prompt: weightedmean pooling that leaves the prompt out is not supported")
        ids = self.encoder.tokenizer.encode_packed([prompt], max_length=self.limit, warn=False).input_ids
        return len(ids) - int(ids[-1].item() in self.encoder.tokenizer.all_special_ids)

    def windows(self, texts: Iterable[str]) -> Iterator[Any]:
        """The result of each window: (n, dim) vectors on the encoder's device, or a list for other output values."""
        source, waiting = iter(texts), None
        while window := list(islice(source, WINDOW)):
            tokens = self._tokenize(window)
            # Whoever reads a result waits for the device: let it be after the next window is tokenised.
            if waiting is not None:
                yield waiting
            waiting = self._compute(tokens)
        if waiting is not None:
            yield waiting
        if self.n_truncated:
            logger.warning(
                "encode: %d of %d texts were longer than max_seq_length = %d and truncated: %d tokens cut",
                self.n_truncated, self.n_texts, self.limit, self.n_truncated_tokens,
            )  # fmt: skip

    def _tokenize(self, window: list[str]) -> PackedEncoding:
        for i, text in enumerate(window, start=self.n_texts):
            check_text(text, "sentences" if self.request.single else f"sentences[{i}]")
        prompt = self.request.prompt
        texts = [prompt + text for text in window] if prompt else window
        tokens = self.encoder.tokenizer.encode_packed(texts, max_length=self.limit, warn=False)
        embeddings = self.encoder.model.embeddings
        ops.check_ids(
            input_ids=(tokens.input_ids, embeddings.word_embeddings.num_embeddings),
            token_type_ids=(tokens.token_type_ids, embeddings.token_type_embeddings.num_embeddings),
        )
        self.n_texts += len(window)
        self.n_truncated += tokens.n_truncated
        self.n_truncated_tokens += tokens.n_truncated_tokens
        return tokens

    @torch.inference_mode()
    def _compute(self, tokens: PackedEncoding) -> Tensor | list[Any]:
        offsets = tokens.cu_seqlens.numpy().astype(np.int64)
        order = np.argsort(-np.diff(offsets), kind="stable")  # longest first: too little memory shows at once
        lengths = np.diff(offsets)[order]
        ends = np.cumsum(lengths)
        ids, types = self._sorted_tokens(tokens, np.repeat(offsets[:-1][order] - (ends - lengths), lengths))
        vectors: Tensor | None = None
        items: list[Any] = [None] * len(order)
        budget = self.encoder.token_budget or TOKEN_BUDGET.get(self.device.type, TOKEN_BUDGET["cuda"])
        for first, last in batches(ends, budget, self.request.batch_size):
            start, end = int(ends[first] - lengths[first]), int(ends[last - 1])
            cu_seqlens = torch.from_numpy(np.append(start, ends[first:last]) - start)
            batch = varlen.from_cu_seqlens(cu_seqlens, end - start, self.device)
            here = [t[start:end].to(self.device, non_blocking=True) for t in (ids, types)]
            hidden = self.encoder.model.encode_packed(batch, *here, check=False)[-1]
            places = torch.from_numpy(order[first:last])
            if self.request.output_value == "sentence_embedding":
                made = self._pool(hidden, batch)
                if vectors is None:
                    with torch.inference_mode(False):  # a tensor that callers may use in autograd
                        vectors = made.new_empty(len(order), made.shape[1])
                vectors.index_copy_(0, places.to(self.device, non_blocking=True), made)
            else:
                found = self._items(hidden, batch, *here)
                for place, item in zip(places.tolist(), found, strict=True):
                    items[place] = item
            if self.request.progress is not None:
                self.request.progress(last - first)
        return items if vectors is None else vectors

    def _sorted_tokens(self, tokens: PackedEncoding, shift: np.ndarray) -> tuple[Tensor, Tensor]:
        """Ids and types, (T,) each, at their place plus `shift`, in memory that a GPU can copy from by itself."""
        rows = torch.from_numpy(shift + np.arange(len(shift)))
        pin = self.device.type == "cuda"
        ids, types = (
            torch.index_select(t, 0, rows, out=torch.empty(len(rows), dtype=t.dtype, pin_memory=pin))
            for t in (tokens.input_ids, tokens.token_type_ids)
        )
        return ids, types

    def _items(self, hidden: Tensor, batch: varlen.PackedBatch, ids: Tensor, types: Tensor) -> list[Any]:
        """What the output values "token_embeddings" and None ask for, a text each."""
        lengths = batch.cu_seqlens_cpu.diff().tolist()
        if self.request.output_value == "token_embeddings":
            return list(hidden.split(lengths))
        return [
            {
                "input_ids": text_ids,
                "token_type_ids": text_types,
                "attention_mask": torch.ones_like(text_ids),
                "token_embeddings": states,
                "sentence_embedding": vector,
            }
            for text_ids, text_types, states, vector in zip(
                ids.split(lengths), types.split(lengths), hidden.split(lengths), self._pool(hidden, batch), strict=True
            )
        ]

    def _pool(self, hidden: Tensor, batch: varlen.PackedBatch) -> Tensor:
        """(T, H) -> (B, dim), in float32 at least."""
        pooling, request, tail = self.encoder.pooling, self.request, list(self.encoder.tail)
        cu_seqlens = batch.cu_seqlens
        if self.skip:
            lengths = (batch.cu_seqlens_cpu.diff() - self.skip).clamp(min=0)
            cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(self.device, torch.int32)
            hidden = hidden[batch.position_ids >= self.skip]
        # With output_value None sentence-transformers returns what the modules make, never normalised after that.
        normalize = request.normalize and request.output_value is not None
        if normalize and request.truncate_dim is None:
            tail, normalize = [*tail, Normalize()], False
        fused = len(pooling.modes) == 1 and bool(tail) and isinstance(tail[0], Normalize)
        dtype, policy = torch.promote_types(hidden.dtype, torch.float32), self.encoder.model.policy
        pooled = [
            ops.pool(hidden, cu_seqlens, POOLING_MODES[mode], normalize=fused, out_dtype=dtype, policy=policy)
            for mode in pooling.modes
        ]
        x = pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=1)
        for module in tail[1:] if fused else tail:
            x = apply(module, x, policy)
        x = x[:, : request.truncate_dim]
        return apply(Normalize(), x, policy) if normalize else x


def batches(ends: np.ndarray, budget: int, most: int | None) -> Iterator[tuple[int, int]]:
    """(first, last) of runs of texts that have at most `budget` tokens and `most` texts, or of a single text.

    ends: (n,) how many tokens there are up to the end of each text.
    """
    first = 0
    while first < len(ends):
        before = ends[first - 1] if first else 0
        last = max(int(np.searchsorted(ends, before + budget, side="right")), first + 1)
        last = last if most is None else min(last, first + most)
        yield first, last
        first = last
