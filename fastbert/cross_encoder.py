"""CrossEncoder: pairs of texts in, scores out, without a padded batch anywhere."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastbert import checkpoint, cpu_encoder, ops, sentence_layout, text_windows
from fastbert.heads import BertForSequenceClassification
from fastbert.model import Encoded
from fastbert.pretrained import any_in_training
from fastbert.sentence import _positive, _progress_bar
from fastbert.sentence_run import TOKEN_BUDGET, WINDOW, in_batches
from fastbert.tokenizer import PackedEncoding, Tokenizer
from fastbert.wordpiece import check_text

logger = logging.getLogger("fastbert")

Activation = Callable[[Tensor], Tensor]

# What a checkpoint may name as its activation function, by the last part of the name. Nothing is imported for it.
ACTIVATIONS: dict[str, type[nn.Module]] = {
    kind.__name__: kind
    for kind in (nn.Identity, nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.ReLU, nn.GELU, nn.SiLU, nn.Softplus)
}
_SEVERAL = "pool, chunk_size, device: scoring in several processes is not supported"


class CrossEncoder(nn.Module):
    """A BERT model with a classification head that scores pairs of texts, and its tokenizer.

    activation_fn: on the logits in float32, (B, num_labels), or with a batch-invariant model on a CPU on those of each
    pair alone; by default a sigmoid for one label, and nothing for several. prompts, default_prompt_name: what goes in
    front of first texts. token_budget: tokens in a batch, by default 16384 on a GPU and 2048 on a CPU.
    """

    model: BertForSequenceClassification
    tokenizer: Tokenizer

    def __init__(
        self,
        model: BertForSequenceClassification,
        tokenizer: Tokenizer,
        *,
        activation_fn: Activation | None = None,
        max_length: int | None = None,
        prompts: dict[str, str] | None = None,
        default_prompt_name: str | None = None,
        token_budget: int | None = None,
    ) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        if max_length is not None:
            self.max_seq_length = max_length
        default: Activation = nn.Sigmoid() if self.num_labels == 1 else nn.Identity()
        # In a tuple, or a module would become a part of this one, with a place in its state dict.
        self._activation = (default if activation_fn is None else activation_fn,)
        self.prompts = dict(prompts or {})
        if default_prompt_name is not None and default_prompt_name not in self.prompts:
            raise ValueError(f"default_prompt_name: got {default_prompt_name!r}, expected one of {list(self.prompts)}")
        self.default_prompt_name = default_prompt_name
        self.token_budget = _positive("token_budget", token_budget)
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        src: str | os.PathLike[str],
        *,
        activation_fn: Activation | None = None,
        max_length: int | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        revision: str | None = None,
        token_budget: int | None = None,
        **how: Any,
    ) -> CrossEncoder:
        """Loads a folder or hub id with a classification head, saved by sentence-transformers or transformers.

        activation_fn: by default what the checkpoint names, if it is one of `ACTIVATIONS`; a name outside torch is left
        aside with a warning. device: the GPU if there is one, else the CPU. dtype: as for
        SentenceEncoder.from_pretrained. The others are arguments of
        BertForSequenceClassification.from_pretrained. Raises what that does, and ValueError for a checkpoint without
        the head, or with a module or setting that is not supported.
        """
        folder = checkpoint.resolve(src, revision=revision)
        layout, path = sentence_layout.read_cross_encoder(folder)
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        model = BertForSequenceClassification.from_pretrained(layout.transformer, dtype=dtype, device=device, **how)
        cpu_encoder.narrow(model, dtype)
        if model.missing_names:
            raise ValueError(f"{src}: has no classification head: it lacks {', '.join(model.missing_names)}")
        tokenizer = Tokenizer.from_pretrained(layout.transformer)
        if layout.do_lower_case:
            tokenizer = sentence_layout.lowercasing(tokenizer, layout.transformer)
        if layout.max_seq_length is not None:
            tokenizer.model_max_length = layout.max_seq_length
        return cls(
            model,
            tokenizer,
            activation_fn=_activation_at(path, src) if activation_fn is None else activation_fn,
            max_length=max_length,
            prompts=layout.prompts,
            default_prompt_name=layout.default_prompt_name,
            token_budget=token_budget,
        )

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes a folder that sentence-transformers and fastbert load to the same scores.

        Raises ValueError for an activation function that is not one of `ACTIVATIONS`, or for prompts: a folder that all
        versions of sentence-transformers read has no place for them.
        """
        kind = type(self.activation_fn)
        if ACTIVATIONS.get(kind.__name__) is not kind:
            raise ValueError(
                f"activation_fn: got {kind.__name__}, expected one of {', '.join(ACTIVATIONS)} of torch.nn"
            )
        if self.prompts:
            raise ValueError(f"prompts: expected none, got {list(self.prompts)}, which could not be saved")
        extra = self.model.config.extra
        extra["sentence_transformers"] = {
            **extra.get("sentence_transformers", {}),
            "activation_fn": f"{kind.__module__}.{kind.__name__}",
        }
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @property
    def activation_fn(self) -> Activation:
        return self._activation[0]

    @activation_fn.setter
    def activation_fn(self, function: Activation) -> None:
        self._activation = (function,)

    @property
    def num_labels(self) -> int:
        return self.model.config.num_labels

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def max_seq_length(self) -> int:
        """Tokens of a pair that are read, special tokens included; at most the model's positions."""
        limit, positions = self.tokenizer.model_max_length, self.model.config.max_length
        return positions if limit is None else min(limit, positions)

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        positions = self.model.config.max_length
        if _positive("max_length", value) is None or value > positions:
            raise ValueError(f"max_length: got {value}, but the model has {positions} positions")
        self.tokenizer.model_max_length = value

    max_length = max_seq_length  # its name in sentence-transformers before 6.0

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the model; scores are float32 also where this is bfloat16 or float16."""
        return self.model.dtype

    def predict(
        self,
        inputs: Any = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        activation_fn: Activation | None = None,
        apply_softmax: bool | None = False,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: str | torch.device | None = None,
        pool: None = None,
        chunk_size: None = None,
        *,
        sentences: Any = None,
        num_workers: int | None = None,
    ) -> Any:
        """The scores of pairs of texts; arguments and results are those of CrossEncoder.predict.

        inputs (or `sentences`, its name before sentence-transformers 6): a pair, or an iterable of pairs. Where a pair
        is too long, the longer text is cut. batch_size: most pairs in a batch, which the token budget bounds anyway.
        apply_softmax: over several labels. device: moves the model there. num_workers has no effect.

        Returns float32 scores (n,) for one label, (n, num_labels) for several; without the n for a single pair: an
        array, a tensor on the model's device with convert_to_tensor, a list of tensors with convert_to_numpy=False.

        Raises TypeError for what is no pair of texts, naming its index, and ValueError for what is not supported.
        """
        if (inputs is None) == (sentences is None):
            raise TypeError("inputs: expected a pair of texts or an iterable of pairs")
        if pool is not None or chunk_size is not None or isinstance(device, (list, tuple)):
            raise ValueError(_SEVERAL)
        pairs, single = _as_pairs(sentences if inputs is None else inputs)
        batch_size = _positive("batch_size", batch_size)
        front = self._prompt(prompt, prompt_name)
        if show_progress_bar is None:
            show_progress_bar = logger.getEffectiveLevel() in (logging.INFO, logging.DEBUG)
        if device is not None:
            self.to(device)
        if any_in_training(self):
            self.eval()
        firsts, seconds = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        n_cut = n_tokens_cut = 0
        parts = [torch.empty(0, self.num_labels, device=self.device)]
        with torch.inference_mode(), _progress_bar(show_progress_bar, len(pairs)) as progress:
            for start, end in text_windows.spans(firsts, WINDOW, text_windows.WINDOW_CHARACTERS, seconds):
                window = [front + text for text in firsts[start:end]] if front else firsts[start:end]
                tokens = self.tokenizer.encode_packed(
                    window, seconds[start:end], max_length=self.max_seq_length, warn=False
                )
                n_cut, n_tokens_cut = n_cut + tokens.n_truncated, n_tokens_cut + tokens.n_truncated_tokens
                parts.append(self._logits(tokens, batch_size, progress))
            scores = torch.cat(parts)
            activate, policy = self.activation_fn if activation_fn is None else activation_fn, self.model.policy
            scores = ops.elementwise(activate, scores, policy=policy)
            if self.num_labels == 1 and scores.dim() > 1:
                scores = scores.squeeze(-1)
            if apply_softmax and scores.dim() > 1:
                scores = ops.elementwise(lambda rows: rows.softmax(1), scores, policy=policy)
        if n_cut:
            logger.warning(
                "predict: %d of %d pairs were longer than max_seq_length = %d and truncated: %d tokens cut",
                n_cut, len(pairs), self.max_seq_length, n_tokens_cut,
            )  # fmt: skip
        scores = scores.clone()  # no inference tensor: callers may use it in autograd
        if convert_to_tensor:
            return scores[0] if single else scores
        if convert_to_numpy:
            array = scores.float().cpu().numpy()
            return array[0] if single else array
        return scores[0] if single else list(scores)

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        top_k: int | None = None,
        return_documents: bool = False,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        activation_fn: Activation | None = None,
        device: str | torch.device | None = None,
        pool: None = None,
        chunk_size: None = None,
    ) -> list[dict[str, Any]]:
        """The documents by their score beside the query, best first; arguments and results are those of CrossEncoder.

        Returns [{"corpus_id": int, "score": float}, ...], of top_k documents or all, each with its "text" if
        return_documents. Raises as `predict` does, and ValueError for a model with several labels.
        """
        if self.num_labels != 1:
            raise ValueError(f"rank: expected a model with one label, got {self.num_labels}; predict scores pairs")
        documents = list(documents)
        scores = self.predict(
            [(query, document) for document in documents], prompt_name, prompt, batch_size, show_progress_bar,
            activation_fn, device=device, pool=pool, chunk_size=chunk_size, convert_to_tensor=True,
        ).tolist()  # fmt: skip
        found: list[dict[str, Any]] = [{"corpus_id": i, "score": score} for i, score in enumerate(scores)]
        if return_documents:
            found = [{**hit, "text": text} for hit, text in zip(found, documents, strict=True)]
        return sorted(found, key=lambda hit: hit["score"], reverse=True)[:top_k]

    def _prompt(self, prompt: str | None, prompt_name: str | None) -> str:
        name = self.default_prompt_name if prompt_name is None else prompt_name
        if prompt is None and name is None:
            return ""
        if prompt is None and name not in self.prompts:
            raise ValueError(f"prompt_name: got {name!r}, expected one of {list(self.prompts)}")
        prompt = self.prompts[name or ""] if prompt is None else prompt
        check_text(prompt, "prompt")
        return prompt

    def _logits(self, tokens: PackedEncoding, batch_size: int | None, progress: Callable[[int], Any] | None) -> Tensor:
        """(n, num_labels) in float32 at least, in the order of the pairs; computed in batches of like lengths."""
        bert, device, n_pairs = self.model.bert, self.device, tokens.cu_seqlens.shape[0] - 1
        bert.embeddings.check_ids(tokens.input_ids, tokens.token_type_ids)
        dtype = torch.promote_types(self.dtype, torch.float32)
        logits = torch.empty(n_pairs, self.num_labels, device=device, dtype=dtype)
        budget = self.token_budget or TOKEN_BUDGET.get(device.type, TOKEN_BUDGET["cuda"])
        for places, batch, ids, types in in_batches(tokens, budget, batch_size, device):
            hidden = bert.encode_packed(batch, ids, types, check=False)[-1]
            scored = self.model.classify(Encoded(batch, hidden, None, None))
            logits[torch.from_numpy(np.array(places)).to(device)] = scored.to(logits.dtype)
            if progress is not None:
                progress(len(places))
        return logits


def _activation_at(path: str | None, src: Any) -> Activation | None:
    """The activation function that a checkpoint names, None where it names none that is to be trusted."""
    if path is None:
        return None
    package, _, name = str(path).rpartition(".")
    if package.split(".")[0] != "torch":
        logger.warning("%s: the activation function %r is not one of torch's: taking the default", src, path)
        return None
    if not package.startswith("torch.nn") or name not in ACTIVATIONS:
        raise ValueError(f"{src}: activation_fn is {path!r}, expected one of {', '.join(ACTIVATIONS)} of torch.nn")
    return ACTIVATIONS[name]()


def _as_pairs(given: Any) -> tuple[list[Any], bool]:
    """The pairs as a list, and whether a single one came."""
    if isinstance(given, np.ndarray):
        given = given.tolist()
    if isinstance(given, (str, bytes, dict)) or not isinstance(given, Iterable):
        raise TypeError(f"inputs: got {type(given).__name__}, expected a pair of texts or an iterable of pairs")
    pairs = list(given)
    single = bool(pairs) and isinstance(given, (list, tuple)) and not isinstance(pairs[0], (list, tuple))
    pairs = [pairs] if single else pairs
    for i, pair in enumerate(pairs):
        where = "inputs" if single else f"inputs[{i}]"
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            came = f"{len(pair)} texts" if isinstance(pair, (list, tuple)) else type(pair).__name__
            raise TypeError(f"{where}: got {came}, expected a pair of texts")
        for j in (0, 1):
            check_text(pair[j], f"{where}[{j}]")
    return pairs, single
