"""Vectors are dense, sparse or one for each token. This module has SentenceEncoder's methods for all kinds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.checks import expect, one_of, positive_or_none
from fastbert.models.pretrained import any_in_training
from fastbert.pipelines.api import SentenceTransformersApi
from fastbert.pipelines.pool import Pool
from fastbert.pipelines.run import HeadItems, Request
from fastbert.pipelines.token_heads import SpladeHead, TokenVectors
from fastbert.vectors import sparse
from fastbert.vectors.maxsim import TOKEN_SIMILARITIES, maxsim, maxsim_pairwise
from fastbert.vectors.similarity import SIMILARITIES, function_name, pairwise_similarity, similarity_matrix

OUTPUTS = ("dense", "sparse", "multi")


class HeadVectors(SentenceTransformersApi):
    """A HeadVectors compares vectors of any kind, and makes sparse vectors and vectors of tokens.

    heads: by output, "sparse" and "multi". has_dense: whether there are dense vectors, too. default_output: the output
    of `encode` without an argument, one of `outputs`.
    """

    heads: nn.ModuleDict
    has_dense: bool
    default_output: str
    max_active_dims: int | None
    truncate_dim: int | None
    encode: Callable[..., Any]
    _run: Callable[[Iterable[str], Request], Iterator[Any]]

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names the kinds of vectors that the encoder makes."""
        heads: Any = self._modules["heads"]
        return (*(("dense",) if self.has_dense else ()), *(name for name in OUTPUTS[1:] if name in heads))

    def _output(self, output: str | None) -> str:
        if output is None:
            return "dense" if self.has_dense else self.outputs[0]
        one_of("output", output, *OUTPUTS)
        if output not in self.outputs:
            hint = "; from_pretrained(..., output='sparse') reads a masked-language model as a SPLADE"
            raise ValueError(
                f"output: got {output!r}, but this model has {' and '.join(self.outputs)} vectors"
                f"{hint if output == 'sparse' else ''}"
            )
        return output

    @property
    def similarity_fn_name(self) -> str:
        """Names the function that `similarity` computes.

        It is "cosine", "dot", "euclidean" or "manhattan" for one vector a text, and "maxsim" or "meanmaxsim" for one a
        token. It may be set to a member of sentence-transformers' SimilarityFunction, or to None. None stands for
        "cosine", for "dot" with only sparse vectors, and for "maxsim" with only vectors of tokens.
        """
        return self._similarity_fn_name

    @similarity_fn_name.setter
    def similarity_fn_name(self, name: Any) -> None:
        default = {"dense": "cosine", "sparse": "dot", "multi": "maxsim"}[self._output(None)]
        names = {"dense": SIMILARITIES, "sparse": SIMILARITIES, "multi": TOKEN_SIMILARITIES}
        allowed = dict.fromkeys(similarity for output in self.outputs for similarity in names[output])
        self._similarity_fn_name = one_of("similarity_fn_name", function_name(name) or default, *allowed)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Returns the similarity of each vector with each: (n, dim) and (m, dim), as tensors or arrays -> (n, m).

        `similarity_fn_name` names the function. "euclidean" and "manhattan" are distances with their sign changed.
        Vectors of tokens, (tokens, dim) each in a list, are compared by MaxSim. Sparse vectors are sparse tensors.
        """
        if _are_tokens(embeddings1):
            return maxsim(embeddings1, embeddings2, length_normalize=self.similarity_fn_name == "meanmaxsim")
        if _is_sparse(embeddings1) and _is_sparse(embeddings2) and self.similarity_fn_name == "dot":
            return sparse.dot(_matrix(embeddings1), _matrix(embeddings2))
        return similarity_matrix(_dense(embeddings1), _dense(embeddings2), self._function())

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Returns the similarity of each vector with its partner: (n, dim) and (n, dim) -> (n,)."""
        if _are_tokens(embeddings1):
            return maxsim_pairwise(embeddings1, embeddings2, length_normalize=self.similarity_fn_name == "meanmaxsim")
        return pairwise_similarity(_dense(embeddings1), _dense(embeddings2), self._function())

    def _function(self) -> str:
        return "dot" if self.similarity_fn_name in TOKEN_SIMILARITIES else self.similarity_fn_name

    @staticmethod
    def sparsity(embeddings: Tensor) -> dict[str, float]:
        """Returns the mean number of nonzero values, and the mean share of zeros, of sparse vectors."""
        return sparse.sparsity(embeddings)

    @staticmethod
    def intersection(embeddings_1: Tensor, embeddings_2: Tensor) -> Tensor:
        """Returns the common part of two sparse vectors: see `fastbert.vectors.sparse.intersection`."""
        return sparse.intersection(embeddings_1, embeddings_2)

    def decode(self, embeddings: Tensor, top_k: int | None = None) -> Any:
        """Returns the tokens of a sparse vector with their weights, the highest first, or lists of them for several."""
        return sparse.decode(embeddings, self.tokenizer.convert_ids_to_tokens, top_k)

    def encode_query(
        self, sentences: Any = None, prompt_name: str | None = None, prompt: str | None = None, *args: Any,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Calls `encode` for the task "query", with the prompt of that name, and never with the default prompt."""
        if prompt is None and prompt_name is None:
            prompt = self.prompts.get("query", "")
        return self.encode(sentences, prompt_name, prompt, *args, **{"task": "query", **kwargs})

    def encode_document(
        self, sentences: Any = None, prompt_name: str | None = None, prompt: str | None = None, *args: Any,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Calls `encode` for the task "document", with the prompt of that name, and never with the default prompt.

        A prompt named "passage" or "corpus" is not used: sentence-transformers adds an empty "document" before it looks
        for one.
        """
        if prompt is None and prompt_name is None:
            prompt = self.prompts.get("document", "")
        return self.encode(sentences, prompt_name, prompt, *args, **{"task": "document", **kwargs})

    def encode_multi_process(
        self, sentences: Any, pool: Pool, prompt_name: str | None = None, prompt: str | None = None,
        batch_size: int | None = None, chunk_size: int | None = None, show_progress_bar: bool | None = None,
        precision: str = "float32", normalize_embeddings: bool = False, truncate_dim: int | None = None,
    ) -> Any:  # fmt: skip
        """Calls `encode` with a pool. sentence-transformers keeps the name for older programs."""
        return self.encode(
            sentences, prompt_name, prompt, batch_size, show_progress_bar, precision=precision, pool=pool,
            chunk_size=chunk_size, normalize_embeddings=normalize_embeddings, truncate_dim=truncate_dim,
        )  # fmt: skip

    @contextmanager
    def truncate_embeddings(self, truncate_dim: int | None) -> Iterator[None]:
        """Lets `encode` return the first truncate_dim values of each vector (Matryoshka), inside a `with` statement."""
        before, self.truncate_dim = self.truncate_dim, positive_or_none("truncate_dim", truncate_dim)
        try:
            yield
        finally:
            self.truncate_dim = before

    truncate_sentence_embeddings = truncate_embeddings  # its name before sentence-transformers 6

    def _by_head(
        self,
        output: str,
        texts: Iterable[str],
        request: Request,
        task: str | None,
        max_active_dims: int | None,
        save_to_cpu: bool,
    ) -> Any:
        """Returns the vectors of a head: a sparse tensor (n, V), or a list of (tokens, dim) tensors."""
        head: Any = self.heads[output]
        for name, value in (("truncate_dim", request.truncate_dim), ("output_value", request.output_value)):
            expected = (None,) if name == "truncate_dim" else ("sentence_embedding", "token_embeddings")
            expect(value in expected, f"{name}, for output {output!r}", value, repr(expected[0]))
        if isinstance(head, TokenVectors):
            request.max_length = head.limit(task, request.max_length or self.max_seq_length)
            request.head = HeadItems(output, head, {"task": task, "normalize": request.normalize})
            vectors = [item for window in self._run(texts, request) for item in window]
            return [vector.cpu() for vector in vectors] if save_to_cpu else vectors
        expect(not request.normalize, "normalize_embeddings, for output 'sparse'", True, "False")
        device = self.device if request.pool is None else request.pool.device
        if (most := head.texts_in_batch(device)) is not None:
            request.batch_size = min(request.batch_size or most, most)
        request.head = HeadItems(output, head)
        limit = sparse.check_active(self.max_active_dims if max_active_dims is None else max_active_dims)
        items = [
            sparse.largest(places, numbers, limit) for window in self._run(texts, request) for places, numbers in window
        ]
        on_host = save_to_cpu or request.pool is not None
        return sparse.as_rows(items, head.dimension, torch.device("cpu") if on_host else device)

    def _in_training(self) -> bool:
        """Tells whether a module is in training mode."""
        # A check of each module of the encoder would take as long as a short text.
        model: Any = self._modules["model"]
        tail: Any = self._modules["tail"]
        if model.all_in_eval_mode():
            return self.training or any_in_training(tail)
        return any_in_training(self)

    def _dimension_of_heads(self) -> int | None:
        """Returns the length of the vectors of an encoder without dense ones, or None if no module defines it."""
        head: Any = self.heads[self._output(None)]
        if isinstance(head, SpladeHead):
            return head.dimension
        sizes = [module.linear.out_features for module in head.tail if hasattr(module, "linear")]
        return sizes[-1] if sizes else None


def shaped(
    vectors: Any, output: str, single: bool, to_list: bool, to_numpy: bool, to_sparse: bool, to_tensor: bool
) -> Any:
    """Returns the vectors of a head in the requested form, which is that of sentence-transformers 6.

    to_list: whether sparse vectors come in a list. to_sparse: whether they are sparse tensors at all.
    """
    if output == "multi":
        expect(not to_tensor, "convert_to_tensor, for output 'multi'", True, "False: texts differ in length")
        vectors = [vector.numpy() for vector in vectors] if to_numpy else vectors
        return vectors[0] if single else vectors
    if not vectors.shape[0]:
        vectors = torch.tensor([], device=vectors.device).to_sparse()
    vectors = vectors if to_sparse else vectors.to_dense()
    if single:
        return vectors[0]
    return list(vectors) if to_list else vectors


def _are_tokens(embeddings: Any) -> bool:
    """Tells whether vectors are those of tokens: three dimensions, or a list of matrices."""
    if isinstance(embeddings, (list, tuple)):
        return bool(embeddings) and getattr(embeddings[0], "ndim", 1) == 2
    return getattr(embeddings, "ndim", 1) == 3


def _is_sparse(embeddings: Any) -> bool:
    first = embeddings[0] if isinstance(embeddings, (list, tuple)) and embeddings else embeddings
    return isinstance(first, Tensor) and first.layout == torch.sparse_coo


def _matrix(embeddings: Any) -> Tensor:
    """Returns one sparse vector or several as one sparse tensor (n, dim)."""
    if isinstance(embeddings, (list, tuple)):
        embeddings = torch.stack(list(embeddings))
    return embeddings if embeddings.ndim == 2 else embeddings.unsqueeze(0)


def _dense(embeddings: Any) -> Any:
    return _matrix(embeddings).to_dense() if _is_sparse(embeddings) else embeddings
