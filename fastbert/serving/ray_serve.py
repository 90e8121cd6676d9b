"""This module serves vectors of texts with Ray Serve. Many callers' requests share batches, counted in tokens.

    serve run fastbert.serving.ray_serve:app model=sentence-transformers/all-MiniLM-L6-v2

The arguments are those of `ServeArguments`. Requests and answers are those of OpenAI's `/v1/embeddings`.
"""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from fastbert.serving import answers
from fastbert.serving.errors import ApiError
from fastbert.serving.limits import Limits, parse_object
from fastbert.serving.schemas import Fields, text_or_texts

BOOLEANS = {"true": True, "false": False}


@dataclass(frozen=True)
class ServeArguments:
    """A ServeArguments holds the NAME=VALUE arguments of `serve run`.

    model: folder or hub id. dtype, batch_invariant: as in `SentenceEncoder.from_pretrained`. max_length: the most
    tokens of a text. batch_tokens: the most tokens of requests in one batch; a larger request is a batch by itself.
    wait_ms: the time for which a batch waits for more requests. num_gpus, num_cpus: the cluster resources of each
    replica; num_cpus is also its number of threads. num_replicas: the number of replicas. normalize: whether vectors
    have length 1.
    """

    model: str
    dtype: str = "auto"
    batch_invariant: bool = False
    max_length: int | None = None
    batch_tokens: int = 16384
    wait_ms: float = 2.0
    num_gpus: float = 0.0
    num_cpus: float = 1.0
    num_replicas: int = 1
    normalize: bool = False

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> ServeArguments:
        """Reads arguments, which may be strings. Raises ValueError for an unknown name or a bad value."""
        types = {each.name: str(each.type).split(" ")[0] for each in fields(cls)}
        unknown = sorted(set(arguments) - set(types))
        if unknown or not arguments.get("model"):
            got = f"unknown {', '.join(unknown)}" if unknown else "no model"
            raise ValueError(f"arguments: got {got}, expected model and any of {', '.join(types)}")
        return cls(**{name: _value(name, types[name], value) for name, value in arguments.items()})


def _value(name: str, kind: str, value: Any) -> Any:
    """Converts a value from a string to its type."""
    if not isinstance(value, str) or kind == "str":
        return value
    try:
        return BOOLEANS[value.lower()] if kind == "bool" else {"int": int, "float": float}[kind](value)
    except (KeyError, ValueError):
        raise ValueError(f"{name}: got {value!r}, expected {kind}") from None


@dataclass(frozen=True)
class Texts:
    """A Texts holds the texts of one request, with the number of their tokens after truncation."""

    texts: list[str]
    n_tokens: int
    n_truncated: int
    limit: int  # the most tokens in a batch

    @property
    def size(self) -> int:
        """Returns the number of tokens, or a batch's limit if it is less, because Ray Serve refuses larger requests."""
        return min(self.n_tokens, self.limit)


def tokens_in(items: Sequence[Texts]) -> int:
    """Returns the size of a batch in tokens."""
    return sum(item.size for item in items)


def read_request(body: bytes) -> tuple[list[str], bool]:
    """Returns the texts of a request, and whether it asks for vectors in base64.

    Raises ApiError as `/v1/embeddings` of `fastbert serve` does, with the same limits.
    """
    request = Fields(parse_object(body))
    texts, _ = text_or_texts("input", request.required("input"), Limits())
    return texts, request.as_base64()


def answer(model: str, vectors: np.ndarray, texts: Texts, as_base64: bool) -> dict[str, Any]:
    """Returns the answer of OpenAI's `/v1/embeddings`, with the number of truncated texts.

    Raises ApiError if vectors have NaN or infinity, which JSON does not support.
    """
    if not np.isfinite(vectors).all():
        raise ApiError(500, "not_finite", "the model gave NaN or infinity for a text of this request")
    return answers.embeddings(model, vectors, texts.n_tokens, texts.n_truncated, as_base64)


class Embeddings:
    """An Embeddings is a replica. It has one model, and a queue of requests that share its batches."""

    def __init__(self, arguments: ServeArguments) -> None:
        import torch
        from ray import serve

        from fastbert.pipelines.sentence import SentenceEncoder
        from fastbert.threads import set_threads

        set_threads(max(1, int(arguments.num_cpus)))
        self.arguments = arguments
        self.encoder = SentenceEncoder.from_pretrained(
            arguments.model, dtype=arguments.dtype, batch_invariant=arguments.batch_invariant,
            device="cuda" if arguments.num_gpus and torch.cuda.is_available() else "cpu",
            token_budget=arguments.batch_tokens,
        )  # fmt: skip
        if arguments.max_length is not None:
            self.encoder.max_seq_length = arguments.max_length
        self.prompt = self.encoder.prompts.get(self.encoder.default_prompt_name or "", "")
        self.encoder.encode(["warm-up"])

        async def encode(items: list[Texts]) -> list[np.ndarray]:
            return await asyncio.to_thread(self._encode, items)

        self._batched: Any = serve.batch(
            max_batch_size=arguments.batch_tokens,
            batch_wait_timeout_s=arguments.wait_ms / 1000,
            batch_size_fn=tokens_in,
        )(encode)

    async def __call__(self, request: Any) -> Any:
        """Answers a request of HTTP."""
        from starlette.responses import Response

        try:
            texts, as_base64 = read_request(await request.body())
            counted = await asyncio.to_thread(self._count, texts)
            body, status = answer(self.arguments.model, await self._batched(counted), counted, as_base64), 200
        except ApiError as error:
            body, status = error.body, error.status
        return Response(await asyncio.to_thread(answers.dump_in_pieces, body), status, media_type="application/json")

    def _count(self, texts: list[str]) -> Texts:
        texts = [self.prompt + text for text in texts]
        tokens = self.encoder.tokenizer.encode_packed(texts, max_length=self.encoder.max_seq_length, warn=False)
        return Texts(texts, int(tokens.cu_seqlens[-1]), tokens.n_truncated, self.arguments.batch_tokens)

    def _encode(self, items: list[Texts]) -> list[np.ndarray]:
        """Returns the vectors of each request: (n, dim)."""
        texts = [text for item in items for text in item.texts]
        vectors = self.encoder.encode(
            texts, prompt="", normalize_embeddings=self.arguments.normalize, show_progress_bar=False
        )
        ends = np.cumsum([len(item.texts) for item in items])[:-1]
        return np.split(np.asarray(vectors), ends)


def app(arguments: Mapping[str, Any]) -> Any:
    """Returns the application for `serve run`. Raises ImportError without Ray Serve.

    arguments: see `ServeArguments`.
    """
    read = ServeArguments.of(arguments)
    if importlib.util.find_spec("ray") is None:
        raise ImportError("ray_serve needs Ray: pip install 'fastbert-engine[ray]'")
    from ray import serve

    deployment = serve.deployment(
        name="Embeddings",
        num_replicas=read.num_replicas,
        ray_actor_options={"num_cpus": read.num_cpus, "num_gpus": read.num_gpus},
        max_ongoing_requests=1024,
    )(Embeddings)
    return deployment.bind(read)
