"""CrossEncoder: pairs of texts in, scores out, without a padded batch anywhere."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastbert import ops
from fastbert.models.encoded import Encoded
from fastbert.models.pretrained import any_in_training
from fastbert.models.tasks import BertForSequenceClassification
from fastbert.ops import packing
from fastbert.pipelines import folder as sentence_layout
from fastbert.pipelines.api import SEVERAL, SentenceTransformersApi, passed_over
from fastbert.pipelines.loading import Arguments, load
from fastbert.pipelines.modules import ACTIVATIONS as FUNCTIONS
from fastbert.pipelines.modules import activation_name
from fastbert.pipelines.names import CROSS_ENCODER
from fastbert.pipelines.run import TOKEN_BUDGET, WINDOW, in_batches
from fastbert.pipelines.sentence import _positive, _progress_bar
from fastbert.pipelines.settings import processing_limit
from fastbert.text import windows as text_windows
from fastbert.text.tokenizer import PackedEncoding, Tokenizer
from fastbert.text.wordpiece import check_text

logger = logging.getLogger("fastbert")

Activation = Callable[[Tensor], Tensor]

# What a checkpoint may name as its activation function, by the last part of the name. Nothing is imported for it.
# RReLU is left out: outside a module in eval mode it is random.
ACTIVATIONS: dict[str, type[nn.Module]] = {name: getattr(nn, name) for name in FUNCTIONS if name != "RReLU"}
_DIMS = {"LogSoftmax": 1, "Softmax": 1, "Softmin": 1}  # which PyTorch would guess, with a warning


class CrossEncoder(SentenceTransformersApi):
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
        if isinstance(model, (str, os.PathLike)):
            came = type(model).__name__
            raise TypeError(f"model: got {came}, expected a BertForSequenceClassification; from_pretrained takes names")
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
        backend: str = "auto",
        strict: bool = False,
        prompts: dict[str, str] | None = None,
        default_prompt_name: str | None = None,
        num_labels: int | None = None,
        **options: Any,
    ) -> CrossEncoder:
        """Loads a folder or hub id with a classification head, saved by sentence-transformers or transformers.

        A name without an owner, as "ms-marco-MiniLM-L6-v2", is one of the owner "cross-encoder", as in
        sentence-transformers. activation_fn: by default what the checkpoint names, if it is one of `ACTIVATIONS`; a
        name outside torch is left aside with a warning. device: the GPU if there is one, else the CPU. dtype, options:
        as for SentenceEncoder.from_pretrained, and the arguments of BertForSequenceClassification.from_pretrained.
        Raises what that does, TypeError for an argument that is not supported, and ValueError for a checkpoint without
        the head, or with a module or setting that is not supported.
        """
        if activation_fn is None:
            activation_fn = options.pop("default_activation_function", None)
        arguments = Arguments.of(options, revision)
        layout, path = sentence_layout.read_cross_encoder(arguments.folder(src, CROSS_ENCODER))
        if num_labels is not None:
            arguments.config["num_labels"] = num_labels
        model, tokenizer = load(
            BertForSequenceClassification, layout, src, arguments, dtype, device, backend=backend, strict=strict
        )
        if model.missing_names:
            raise ValueError(f"{src}: has no classification head: it lacks {', '.join(model.missing_names)}")
        encoder = cls(
            model,
            tokenizer,
            activation_fn=_activation_at(path, src) if activation_fn is None else activation_fn,
            max_length=max_length,
            prompts={**layout.prompts, **(prompts or {})},
            default_prompt_name=layout.default_prompt_name if default_prompt_name is None else default_prompt_name,
            token_budget=token_budget,
        )
        encoder.model_card_data.base_model = str(src)
        return encoder

    def save_pretrained(
        self, path: str | os.PathLike[str], model_name: str | None = None, create_model_card: bool = False,
        train_datasets: Any = None, safe_serialization: bool = True,
    ) -> None:  # fmt: skip
        """Writes a folder that sentence-transformers and fastbert load to the same scores.

        The other arguments are those of CrossEncoder.save_pretrained, and have no effect. Raises ValueError for an
        activation function that is not one of `ACTIVATIONS`, or is made with arguments of its own, or for prompts: a
        folder that all versions of sentence-transformers read has no place for them.
        """
        passed_over(create_model_card=create_model_card, safe_serialization=not safe_serialization)
        kind = type(self.activation_fn)
        if ACTIVATIONS.get(kind.__name__) is not kind:
            raise ValueError(
                f"activation_fn: got {kind.__name__}, expected one of {', '.join(ACTIVATIONS)} of torch.nn"
            )
        if str(self.activation_fn) not in (str(kind()), str(_activation(kind.__name__))):
            raise ValueError(f"activation_fn: got {self.activation_fn}, whose arguments could not be saved")
        if self.prompts:
            raise ValueError(f"prompts: expected none, got {list(self.prompts)}, which could not be saved")
        extra = self.model.config.extra
        extra["sentence_transformers"] = {
            **extra.get("sentence_transformers", {}),
            "activation_fn": f"{kind.__module__}.{kind.__name__}",
        }
        self.model.save_pretrained(path)
        self.tokenizer.save_pretrained(path)

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
    def default_activation_function(self) -> Activation:
        """`activation_fn`, under its name before sentence-transformers 4."""
        return self.activation_fn

    @property
    def max_seq_length(self) -> int:
        """Tokens of a pair that are read, special tokens included; at most the model's positions."""
        limit, positions = self.tokenizer.model_max_length, self.model.longest_text
        return positions if limit is None else min(limit, positions)

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        positions = self.model.longest_text
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
        chunk_size: int | None = None,
        *,
        sentences: Any = None,
        num_workers: int | None = None,
        task: str | None = None,
        processing_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """The scores of pairs of texts; arguments and results are those of CrossEncoder.predict.

        inputs (or `sentences`, its name before sentence-transformers 6): a pair, or an iterable of pairs. Where a pair
        is too long, the longer text is cut. batch_size: most pairs in a batch, which the token budget bounds anyway.
        apply_softmax: over several labels. device: moves the model there. processing_kwargs: {"text": {"max_length":
        int}}, the most tokens of a pair in this call. chunk_size, task and num_workers have no effect.

        Returns float32 scores (n,) for one label, (n, num_labels) for several; without the n for a single pair: an
        array, a tensor on the model's device with convert_to_tensor, a list of tensors with convert_to_numpy=False. No
        pairs: (0,), as there.

        Raises TypeError for what is no pair of texts, naming its index, and ValueError for what is not supported.
        """
        if (inputs is None) == (sentences is None):
            raise TypeError("inputs: expected a pair of texts or an iterable of pairs")
        if pool is not None or isinstance(device, (list, tuple)):
            raise ValueError(SEVERAL)
        pairs, single = _as_pairs(sentences if inputs is None else inputs)
        batch_size = _positive("batch_size", batch_size)
        front = self._prompt(prompt, prompt_name)
        if show_progress_bar is None:
            show_progress_bar = logger.getEffectiveLevel() in (logging.INFO, logging.DEBUG)
        if device is not None:
            self.to(device)
        if any_in_training(self):
            self.eval()
        limit = self._limit(processing_kwargs)
        if not pairs:
            nothing = torch.tensor([], device=self.device)
            return nothing if convert_to_tensor else np.array([]) if convert_to_numpy else []
        firsts, seconds = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        n_cut = n_tokens_cut = 0
        parts: list[Tensor] = []
        with torch.inference_mode(), _progress_bar(show_progress_bar, len(pairs)) as progress:
            for start, end in text_windows.spans(firsts, WINDOW, text_windows.WINDOW_CHARACTERS, seconds):
                window = [front + text for text in firsts[start:end]] if front else firsts[start:end]
                tokens = self.tokenizer.encode_packed(window, seconds[start:end], max_length=limit, warn=False)
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
                n_cut, len(pairs), limit, n_tokens_cut,
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
        chunk_size: int | None = None,
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

    def is_singular_input(self, inputs: Any) -> bool:
        """Whether `predict` takes it for one pair."""
        if isinstance(inputs, np.ndarray):
            return inputs.size > 0 and inputs.ndim < 2
        if isinstance(inputs, (list, tuple)):
            return len(inputs) > 0 and not isinstance(inputs[0], (list, tuple))
        return isinstance(inputs, (str, dict)) or not isinstance(inputs, Iterable)

    def _limit(self, processing_kwargs: Any) -> int:
        limit = processing_limit("processing_kwargs", processing_kwargs) or self.max_seq_length
        if limit > self.model.longest_text:
            raise ValueError(f"max_length: got {limit}, but the model has {self.model.longest_text} positions")
        return limit

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
        bert.follow_weights()
        dtype = torch.promote_types(self.dtype, torch.float32)
        logits = torch.empty(n_pairs, self.num_labels, device=device, dtype=dtype)
        budget = self.token_budget or TOKEN_BUDGET.get(device.type, TOKEN_BUDGET["cuda"])
        for places, batch, ids, types in in_batches(tokens, budget, batch_size, device):
            hidden = bert.encode_packed(batch, ids, types, check=False)[-1]
            scored = self.model.classify(Encoded(batch, hidden, None, None))
            logits[packing.to_device(torch.from_numpy(np.array(places)), device)] = scored.to(logits.dtype)
            if progress is not None:
                progress(len(places))
        return logits


def _activation_at(path: str | None, src: Any) -> Activation | None:
    """The activation function that a checkpoint names, None where it names none that is to be trusted."""
    if path is None:
        return None
    if str(path).split(".")[0] != "torch":
        logger.warning("%s: the activation function %r is not one of torch's: taking the default", src, path)
        return None
    name = activation_name(str(path))
    if name is None or name not in ACTIVATIONS:
        raise ValueError(f"{src}: activation_fn is {path!r}, expected one of {', '.join(ACTIVATIONS)} of torch.nn")
    return _activation(name)


def _activation(name: str) -> nn.Module:
    return ACTIVATIONS[name](**({"dim": _DIMS[name]} if name in _DIMS else {}))


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
