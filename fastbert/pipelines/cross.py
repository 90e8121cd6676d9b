"""A CrossEncoder scores pairs of texts, on packed tokens without padding."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastbert import ops
from fastbert.checks import check_text, positive_or_none
from fastbert.models.pretrained import any_in_training
from fastbert.models.tasks import BertForSequenceClassification
from fastbert.pipelines.api import SentenceTransformersApi, log_unused
from fastbert.pipelines.folder import read_cross_encoder_layout
from fastbert.pipelines.load import Arguments, load
from fastbert.pipelines.modules import ACTIVATIONS, activation_name
from fastbert.pipelines.names import CROSS_ENCODER
from fastbert.pipelines.pipeline import Pipeline
from fastbert.pipelines.pool import Pool
from fastbert.pipelines.pool_run import ScoreWork, pool_logits
from fastbert.pipelines.progress import progress_bar
from fastbert.pipelines.run import WINDOW, logits
from fastbert.text import windows
from fastbert.text.tokenizer import Tokenizer

logger = logging.getLogger("fastbert")

Activation = Callable[[Tensor], Tensor]

# Classes that a checkpoint may name as its activation function, by the last part of the name. Nothing is imported for
# it. RReLU is left out: outside a module in eval mode it is random.
ACTIVATION_CLASSES: dict[str, type[nn.Module]] = {name: getattr(nn, name) for name in ACTIVATIONS if name != "RReLU"}
_DIMS = {"LogSoftmax": 1, "Softmax": 1, "Softmin": 1}  # PyTorch would guess it, with a warning


class CrossEncoder(SentenceTransformersApi):
    """A CrossEncoder is a model with a head that scores pairs of texts, and its tokenizer.

    activation_fn: a function of the logits in float32, (B, num_labels), or with a batch-invariant model on a CPU of
    the logits of each pair. The default is a sigmoid for one label, and none for several. prompts: texts by name, which
    are put in front of first texts. token_budget: tokens in a batch, by default 16384 on a GPU and 2048 on a CPU.
    """

    model: BertForSequenceClassification

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
            name = type(model).__name__
            raise TypeError(f"model: got {name}, expected a BertForSequenceClassification; from_pretrained takes names")
        self.model, self.tokenizer = model, tokenizer
        if max_length is not None:
            self.max_seq_length = max_length
        default: Activation = nn.Sigmoid() if self.num_labels == 1 else nn.Identity()
        # It is in a tuple, because a module would become a part of this one, with a place in its state dict.
        self._activation = (default if activation_fn is None else activation_fn,)
        self._set_prompts(dict(prompts or {}), default_prompt_name)
        self.token_budget = positive_or_none("token_budget", token_budget)
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
        prompts: dict[str, str] | None = None,
        default_prompt_name: str | None = None,
        num_labels: int | None = None,
        **options: Any,
    ) -> CrossEncoder:
        """Loads a folder or hub id with a classification head, saved by sentence-transformers or transformers.

        A name without an owner, such as "ms-marco-MiniLM-L6-v2", has the owner "cross-encoder", as in
        sentence-transformers. activation_fn: by default the function of the checkpoint, if `ACTIVATION_CLASSES` has it;
        a name outside torch is ignored with a warning. device: by default the GPU if there is one, else the CPU. dtype,
        options: as for SentenceEncoder.from_pretrained, and the arguments of
        BertForSequenceClassification.from_pretrained.

        Raises the errors of that function. An argument that is not supported is a TypeError; a checkpoint without the
        head, or with a module or setting that is not supported, is a ValueError.
        """
        if activation_fn is None:
            activation_fn = options.pop("default_activation_function", None)
        arguments = Arguments.of(options, revision)
        layout, path = read_cross_encoder_layout(arguments.folder(src, CROSS_ENCODER))
        if num_labels is not None:
            arguments.config["num_labels"] = num_labels
        model, tokenizer = load(BertForSequenceClassification, layout, src, arguments, dtype, device)
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
        activation function that is not in `ACTIVATION_CLASSES` or has arguments. Raises it for prompts too, because a
        folder that all versions of sentence-transformers read cannot hold them.
        """
        log_unused(create_model_card=create_model_card, safe_serialization=not safe_serialization)
        kind = type(self.activation_fn)
        if ACTIVATION_CLASSES.get(kind.__name__) is not kind:
            raise ValueError(
                f"activation_fn: got {kind.__name__}, expected one of {', '.join(ACTIVATION_CLASSES)} of torch.nn"
            )
        if str(self.activation_fn) not in (str(kind()), str(_activation(kind.__name__))):
            raise ValueError(f"activation_fn: got {self.activation_fn}, whose arguments cannot be saved")
        if self.prompts:
            raise ValueError(f"prompts: expected none, got {list(self.prompts)}, which cannot be saved")
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
        """Returns `activation_fn`. This is the name before sentence-transformers 4."""
        return self.activation_fn

    max_length = SentenceTransformersApi.max_seq_length  # its name in sentence-transformers before 6.0

    @property
    def pipeline(self) -> Pipeline:
        """Returns the parts of the encoder as they are now, which `predict` runs, up to the activation function."""
        return Pipeline(
            self.model.bert,
            self.tokenizer,
            self.max_seq_length,
            head=self.model.classify,
            prompts=self.prompts,
            default_prompt_name=self.default_prompt_name,
            token_budget=self.token_budget,
        )

    def _work(self) -> ScoreWork:
        if any_in_training(self):
            self.eval()
        return ScoreWork(self.model)

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
        device: Any = None,
        pool: Pool | None = None,
        chunk_size: int | None = None,
        *,
        sentences: Any = None,
        num_workers: int | None = None,
        task: str | None = None,
        processing_kwargs: dict[str, Any] | None = None,
        workers: int | None = None,
    ) -> Any:
        """Returns the scores of pairs of texts. Arguments and results are those of CrossEncoder.predict.

        inputs (or `sentences`, its name before sentence-transformers 6): a pair, or an iterable of pairs. In a pair
        that is too long, the longer text is truncated. batch_size: the greatest number of pairs in a batch, in addition
        to the token budget. apply_softmax: over several labels. device: moves the model to this device. A list of
        devices, workers=n and pool are the same as in SentenceEncoder.encode. processing_kwargs: {"text":
        {"max_length": int}}, the greatest length of a pair in this call. chunk_size, task and num_workers have no
        effect.

        The scores are float32, (n,) for one label and (n, num_labels) for several, without the n for a single pair.
        They are an array, or with convert_to_tensor a tensor on the model's device, or with convert_to_numpy=False a
        list of tensors. For no pairs the shape is (0,), as in sentence-transformers.

        Raises TypeError for an input that is not a pair of texts, with its index, and ValueError for an argument that
        is not supported.
        """
        if (inputs is None) == (sentences is None):
            raise TypeError("inputs: expected a pair of texts or an iterable of pairs")
        several: Pool | None = None
        scope: Any = nullcontext()
        if pool is not None or workers is not None or isinstance(device, (list, tuple)):
            several, own = self._pool(pool, device, workers, chunk_size)
            scope, device = several if own else scope, None
        pairs, single = _as_pairs(sentences if inputs is None else inputs)
        batch_size = positive_or_none("batch_size", batch_size)
        prompt = self._prompt(prompt, prompt_name)
        if device is not None:
            self.to(device)
        if any_in_training(self):
            self.eval()
        limit = self._limit(processing_kwargs)
        if not pairs:
            nothing = torch.tensor([], device=self.device if several is None else "cpu")
            return nothing if convert_to_tensor else np.array([]) if convert_to_numpy else []
        pipeline = self.pipeline
        firsts, seconds = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        n_cut = n_tokens_cut = 0
        parts: list[Tensor] = []
        with scope, torch.inference_mode(), progress_bar(show_progress_bar, len(pairs)) as progress:
            for start, end in windows.spans(firsts, WINDOW, windows.WINDOW_CHARACTERS, seconds):
                window = [prompt + text for text in firsts[start:end]] if prompt else firsts[start:end]
                tokens = self.tokenizer.encode_packed(window, seconds[start:end], max_length=limit, warn=False)
                n_cut, n_tokens_cut = n_cut + tokens.n_truncated, n_tokens_cut + tokens.n_truncated_tokens
                if several is None:
                    parts.append(logits(pipeline, tokens, batch_size, progress))
                else:
                    parts.append(pool_logits(several, pipeline, tokens, batch_size, progress))
            scores = torch.cat(parts)
            if several is not None:  # an activation function has other bits on another kind of device
                scores = scores.to(several.device)
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
        # This is no inference tensor: callers may use it in autograd.
        scores = scores.clone() if several is None else scores.to("cpu", copy=True)
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
        device: Any = None,
        pool: Pool | None = None,
        chunk_size: int | None = None,
    ) -> list[dict[str, Any]]:
        """Ranks documents by their scores for the query, best first, as sentence-transformers does.

        Returns [{"corpus_id": int, "score": float}, ...] for top_k documents or for all, with the "text" of each if
        return_documents. Raises the errors of `predict`, and ValueError for a model with several labels.
        """
        if self.num_labels != 1:
            raise ValueError(f"rank: expected a model with one label, got {self.num_labels}; predict scores pairs")
        documents = list(documents)
        scores = self.predict(
            [(query, document) for document in documents], prompt_name, prompt, batch_size, show_progress_bar,
            activation_fn, device=device, pool=pool, chunk_size=chunk_size, convert_to_tensor=True,
        ).tolist()  # fmt: skip
        hits: list[dict[str, Any]] = [{"corpus_id": i, "score": score} for i, score in enumerate(scores)]
        if return_documents:
            hits = [{**hit, "text": text} for hit, text in zip(hits, documents, strict=True)]
        return sorted(hits, key=lambda hit: hit["score"], reverse=True)[:top_k]

    def is_singular_input(self, inputs: Any) -> bool:
        """Tells whether the inputs of `predict` are a single pair."""
        if isinstance(inputs, np.ndarray):
            return inputs.size > 0 and inputs.ndim < 2
        if isinstance(inputs, (list, tuple)):
            return len(inputs) > 0 and not isinstance(inputs[0], (list, tuple))
        return isinstance(inputs, (str, dict)) or not isinstance(inputs, Iterable)


def _activation_at(path: str | None, src: Any) -> Activation | None:
    """Returns the activation function of a path; None for no path and for one outside torch, with a warning."""
    if path is None:
        return None
    if str(path).split(".")[0] != "torch":
        logger.warning("%s: the activation function %r is not one of torch's: using the default", src, path)
        return None
    name = activation_name(str(path))
    if name is None or name not in ACTIVATION_CLASSES:
        raise ValueError(
            f"{src}: activation_fn is {path!r}, expected one of {', '.join(ACTIVATION_CLASSES)} of torch.nn"
        )
    return _activation(name)


def _activation(name: str) -> nn.Module:
    return ACTIVATION_CLASSES[name](**({"dim": _DIMS[name]} if name in _DIMS else {}))


def _as_pairs(inputs: Any) -> tuple[list[Any], bool]:
    """Returns the pairs as a list, and whether the input was a single pair."""
    if isinstance(inputs, np.ndarray):
        inputs = inputs.tolist()
    if isinstance(inputs, (str, bytes, dict)) or not isinstance(inputs, Iterable):
        raise TypeError(f"inputs: got {type(inputs).__name__}, expected a pair of texts or an iterable of pairs")
    pairs = list(inputs)
    single = bool(pairs) and isinstance(inputs, (list, tuple)) and not isinstance(pairs[0], (list, tuple))
    pairs = [pairs] if single else pairs
    for i, pair in enumerate(pairs):
        name = "inputs" if single else f"inputs[{i}]"
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            got = f"{len(pair)} texts" if isinstance(pair, (list, tuple)) else type(pair).__name__
            raise TypeError(f"{name}: got {got}, expected a pair of texts")
        for j in (0, 1):
            check_text(f"{name}[{j}]", pair[j])
    return pairs, single
