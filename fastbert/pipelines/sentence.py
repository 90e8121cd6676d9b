"""A SentenceEncoder computes vectors of texts, on packed tokens without padding."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastbert.checks import one_of, positive_or_none
from fastbert.models.bert import BertModel
from fastbert.models.tasks import BertForMaskedLM
from fastbert.pipelines.api import log_unused
from fastbert.pipelines.folder import MODULES, Layout, write_layout
from fastbert.pipelines.head_vectors import HeadVectors, shaped
from fastbert.pipelines.inputs import as_texts
from fastbert.pipelines.load import Arguments, load
from fastbert.pipelines.modules import output_size
from fastbert.pipelines.names import SENTENCE_TRANSFORMERS
from fastbert.pipelines.pipeline import Pipeline, Pooling
from fastbert.pipelines.pool import Pool
from fastbert.pipelines.pool_run import PoolRun, SentenceWork
from fastbert.pipelines.pooling import vectors_of_padded
from fastbert.pipelines.progress import Progress, progress_bar
from fastbert.pipelines.run import Request, Run, Timings
from fastbert.pipelines.settings import TransformerSettings
from fastbert.pipelines.token_heads import SpladeHead
from fastbert.pipelines.token_layout import bge_heads, read_any_layout, splade_head, token_vectors, write_heads
from fastbert.text.tokenizer import Tokenizer
from fastbert.vectors.quantize import PRECISIONS, quantize_embeddings

logger = logging.getLogger("fastbert")

_OUTPUT_VALUES = ("sentence_embedding", "token_embeddings", None)
_PROMPTS = {"query": "", "document": ""}  # every model of sentence-transformers has prompts of these names


class SentenceEncoder(HeadVectors):
    """A SentenceEncoder is a model with its tokenizer, its pooling and the modules after that.

    pooling: one mode or several, whose vectors are concatenated. The modes are those of sentence-transformers: "mean",
    "cls", "max", "mean_sqrt_len_tokens", "weightedmean" and "lasttoken". tail: modules on sentence vectors. prompts:
    texts by name, which are put in front of an input. truncate_dim: the number of values that a vector keeps.
    token_budget: tokens in a batch, by default 16384 on a GPU and 2048 on a CPU. Vectors are float32, or float64 for a
    model in float64. last_timings: the times of the parts of the last call, and its bottleneck; the logger "fastbert"
    has the same at INFO. heads: by output, "sparse" and "multi", for sparse vectors and for vectors of tokens
    (`fastbert.pipelines.token_heads`). has_dense: whether there are dense vectors too. max_active_dims: the greatest
    number of nonzero values in a sparse vector.
    """

    model: BertModel
    tail: nn.ModuleList

    def __init__(
        self,
        model: BertModel,
        tokenizer: Tokenizer,
        pooling: str | Sequence[str] | Pooling = "mean",
        tail: Sequence[nn.Module] = (),
        *,
        prompts: dict[str, str] | None = None,
        default_prompt_name: str | None = None,
        similarity_fn_name: Any = None,
        truncate_dim: int | None = None,
        token_budget: int | None = None,
        heads: Mapping[str, nn.Module] | None = None,
        has_dense: bool = True,
        max_active_dims: int | None = None,
    ) -> None:
        super().__init__()
        if isinstance(model, (str, os.PathLike)):
            raise TypeError(f"model: got {type(model).__name__}, expected a BertModel; from_pretrained takes names")
        self.model = model
        self.tokenizer = tokenizer
        self.pooling = pooling if isinstance(pooling, Pooling) else Pooling(pooling)
        self.tail = nn.ModuleList(tail)
        self.heads, self.has_dense = nn.ModuleDict(heads or {}), has_dense
        self.default_output = self._output(None)
        self.max_active_dims = positive_or_none("max_active_dims", max_active_dims)
        self._set_prompts({**_PROMPTS, **(prompts or {})}, default_prompt_name)
        self.similarity_fn_name = similarity_fn_name
        self.truncate_dim = positive_or_none("truncate_dim", truncate_dim)
        self.token_budget = positive_or_none("token_budget", token_budget)
        self.last_timings: Timings | None = None
        self._dimension = output_size(self.tail, model.config.hidden_size * len(self.pooling.modes))
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        src: str | os.PathLike[str],
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        revision: str | None = None,
        token_budget: int | None = None,
        prompts: dict[str, str] | None = None,
        default_prompt_name: str | None = None,
        similarity_fn_name: Any = None,
        truncate_dim: int | None = None,
        output: str | None = None,
        max_active_dims: int | None = None,
        **options: Any,
    ) -> SentenceEncoder:
        """Loads a sentence-transformers folder or hub id, or a plain BERT checkpoint, which gets mean pooling.

        A name without an owner, such as "all-MiniLM-L6-v2", is a model of sentence-transformers. device: by default the
        GPU if there is one, else the CPU. dtype: "auto" is the checkpoint's, but bfloat16 instead of float32 on a CPU
        that multiplies it faster. prompts, default_prompt_name, similarity_fn_name, truncate_dim: these replace the
        values of the folder. output: the default output of `encode`; "sparse" reads a plain masked-language model as a
        SPLADE. Folders of SparseEncoder, MultiVectorEncoder, PyLate and ColBERT, and bge-m3, determine their outputs.

        options: those of SentenceTransformer(...), which are cache_folder, token, local_files_only, model_kwargs,
        processor_kwargs (or tokenizer_kwargs) and config_kwargs, and the other arguments of BertModel.from_pretrained:
        backend, strict, batch_invariant, precision, cuda_graphs and more.
        model_kwargs may hold a dtype and one device. trust_remote_code and model_card_data have no effect.

        Raises what BertModel.from_pretrained raises. An argument that is not supported is a TypeError; a module or a
        setting of the folder that is not supported is a ValueError.
        """
        arguments = Arguments.of(options, revision)
        folder = arguments.folder(src, SENTENCE_TRANSFORMERS)
        layout = read_any_layout(folder, output)
        if layout is None:
            logger.warning("%s: no %s, so mean pooling without normalisation is used", src, MODULES)
            layout = Layout(folder)
        heads: dict[str, nn.Module] = {}
        model: BertModel
        if layout.splade is not None:
            masked_lm, tokenizer = load(BertForMaskedLM, layout, src, arguments, dtype, device)
            heads["sparse"], model = splade_head(masked_lm, layout), masked_lm.bert
        else:
            model, tokenizer = load(BertModel, layout, src, arguments, dtype, device)
            if layout.tokens is not None:
                heads["multi"] = token_vectors(layout, tokenizer, model.longest_text)
            else:
                heads = bge_heads(folder, tokenizer, model.config.vocab_size)
        has_dense = layout.splade is None and layout.tokens is None
        encoder = cls(
            model,
            tokenizer,
            layout.pooling,
            layout.tail if has_dense else (),
            prompts={**layout.prompts, **(prompts or {})},
            default_prompt_name=layout.default_prompt_name if default_prompt_name is None else default_prompt_name,
            similarity_fn_name=layout.similarity_fn_name if similarity_fn_name is None else similarity_fn_name,
            truncate_dim=layout.truncate_dim if truncate_dim is None else truncate_dim,
            token_budget=token_budget,
            heads=heads,
            has_dense=has_dense,
            max_active_dims=layout.max_active_dims if max_active_dims is None else max_active_dims,
        )
        encoder.default_output = encoder._output(output)
        encoder.tail.to(model.device), encoder.heads.to(model.device)
        encoder.model_card_data.base_model = str(src)
        return encoder

    def save_pretrained(
        self, path: str | os.PathLike[str], model_name: str | None = None, create_model_card: bool = False,
        train_datasets: Any = None, safe_serialization: bool = True,
    ) -> None:  # fmt: skip
        """Writes a folder that sentence-transformers and fastbert load to the same vectors.

        The other arguments are those of SentenceTransformer.save_pretrained, and have no effect: weights are written as
        safetensors, without a model card.
        """
        log_unused(create_model_card=create_model_card, safe_serialization=not safe_serialization)
        folder = Path(path)
        sparse = dict(self.heads).get("sparse")
        model: Any = sparse.masked_lm if isinstance(sparse, SpladeHead) else self.model
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        layout = Layout(
            folder,
            TransformerSettings(max_seq_length=self.max_seq_length),
            pooling=self.pooling,
            tail=list(self.tail),
            prompts=self.prompts,
            default_prompt_name=self.default_prompt_name,
            similarity_fn_name=self.similarity_fn_name,
            truncate_dim=self.truncate_dim,
            max_active_dims=self.max_active_dims,
        )
        if self.has_dense:
            write_layout(folder, self.model.config.hidden_size, layout)
        write_heads(folder, dict(self.heads), layout, self.tokenizer)

    @property
    def pipeline(self) -> Pipeline:
        """Returns the parts of the encoder as they are now, which `encode` runs."""
        modules: Any = self._modules  # an attribute of nn.Module costs one call of a Python function
        return Pipeline(
            modules["model"],
            self.tokenizer,
            self.max_seq_length,
            self.pooling,
            tuple(modules["tail"]._modules.values()),
            prompts=self.prompts,
            default_prompt_name=self.default_prompt_name,
            truncate_dim=self.truncate_dim,
            token_budget=self.token_budget,
        )

    def __len__(self) -> int:
        return 2 + len(self.tail)

    def extra_repr(self) -> str:
        return f"pooling={self.pooling.modes}, max_seq_length={self.max_seq_length}"

    def get_embedding_dimension(self) -> int:
        """Returns the length of a vector."""
        if not self.has_dense and (dimension := self._dimension_of_heads()) is not None:
            return dimension
        return self._dimension if self.truncate_dim is None else min(self._dimension, self.truncate_dim)

    def get_sentence_embedding_dimension(self) -> int:
        """Returns the length of a vector. This is the name before sentence-transformers 5.0."""
        return self.get_embedding_dimension()

    def encode(
        self,
        sentences: Any = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        output_value: str | None = "sentence_embedding",
        precision: str | None = "float32",
        convert_to_numpy: bool | None = None,
        convert_to_tensor: bool = False,
        device: Any = None,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        pool: Pool | None = None,
        chunk_size: int | None = None,
        *,
        inputs: Any = None,
        ranges: Any = None,
        calibration_embeddings: Any = None,
        task: str | None = None,
        processing_kwargs: dict[str, Any] | None = None,
        output: str | None = None,
        max_active_dims: int | None = None,
        convert_to_sparse_tensor: bool = True,
        save_to_cpu: bool = False,
        workers: int | None = None,
    ) -> Any:
        """Returns the vectors of texts. Arguments and results are those of SentenceTransformer.encode.

        sentences (or `inputs`, its name in sentence-transformers 6): a str, or any iterable of str. A text may also be
        a pair of str in a list or a tuple, which is read as one input, or {"text": str}. prompt, or the prompt with the
        name prompt_name, is put in front of each text. batch_size: the greatest number of texts in a batch, in addition
        to the token budget. show_progress_bar: None shows it if the logger "fastbert" is at INFO. device: moves the
        encoder to this device. processing_kwargs: {"text": {"max_length": int}}, the greatest sequence length in this
        call. task: "query" or "document", for vectors of tokens that differ between them. chunk_size has no effect.

        A list of devices, or workers=n for a model on the CPU, starts a process on each for this call; pool is a pool
        of `start_multi_process_pool`. Batches are those of one process, and results are on the host.

        The result is a vector (dim,) for a str, else (n, dim), in float32: an array, or with convert_to_tensor a tensor
        on the model's device, or with convert_to_numpy=False a list of vectors. With precision "int8", "uint8",
        "binary" or "ubinary" the vectors are on the host, as `fastbert.quantize_embeddings` makes them, which takes
        ranges and calibration_embeddings. With output_value "token_embeddings" the result is a list of (tokens, H)
        tensors. With output_value None it is a list of dicts with ids, token vectors and the vector of the text. For no
        texts it is an array of shape (0,), as in sentence-transformers.

        output: "dense", "sparse" or "multi", by default `default_output`. "sparse" gives a sparse COO tensor
        (n, V) on the model's device, (V,) for a str, or with convert_to_numpy=False a list; each vector has the
        max_active_dims largest values. convert_to_sparse_tensor=False makes it dense. "multi" gives a list of (tokens,
        dim) tensors, or with convert_to_numpy=True arrays. save_to_cpu: whether both are on the host.

        Texts longer than max_seq_length are truncated, and one warning counts texts and tokens. Raises TypeError for an
        input that is not a text and ValueError for a lone surrogate, both with the index. Raises ValueError for an
        argument that is not supported.
        """
        if (sentences is None) == (inputs is None):
            raise TypeError("sentences: expected a str or an iterable of str")
        texts: Any
        texts, single = as_texts(inputs if sentences is None else sentences)
        several: tuple[Any, ...] = (None, False)
        if pool is not None or workers is not None or isinstance(device, (list, tuple)):
            several, device = self._pool(pool, device, workers, chunk_size), None
        one_of("output_value", output_value, *_OUTPUT_VALUES)
        precision = precision or "float32"
        if precision != "float32" and output_value != "sentence_embedding":
            raise ValueError(f"precision: got {precision!r} for output_value {output_value!r}, expected 'float32'")
        one_of("precision", precision, *PRECISIONS)
        if device is not None:
            self.to(device)
        output = self.default_output if output is None else self._output(output)
        to_numpy = convert_to_numpy if convert_to_numpy is not None else output == "dense"
        request = Request(
            self._prompt(prompt, prompt_name),
            positive_or_none("batch_size", batch_size),
            output_value,
            normalize_embeddings,
            self.truncate_dim if truncate_dim is None else positive_or_none("truncate_dim", truncate_dim),
            single,
            on_host=to_numpy and not convert_to_tensor or precision != "float32",
            max_length=None if processing_kwargs is None else self._limit(processing_kwargs),
            pool=several[0],
            own_pool=several[1],
        )
        total = 1 if single else len(texts) if hasattr(texts, "__len__") else None
        with progress_bar(show_progress_bar, total) as request.progress:
            if output != "dense":
                one_of(f"precision, for output {output!r}", precision, "float32")
                save_to_cpu = save_to_cpu or to_numpy
                vectors = self._by_head(output, texts, request, task, max_active_dims, save_to_cpu)
                to_list = convert_to_numpy is False and not convert_to_tensor
                return shaped(vectors, output, single, to_list, to_numpy, convert_to_sparse_tensor, convert_to_tensor)
            windows = list(self._run(texts, request))
        if output_value != "sentence_embedding":
            items = [item for window in windows for item in window]
            return items[0] if single else items
        if not windows:
            if convert_to_tensor:
                return torch.tensor([], device=self.device if request.pool is None else "cpu")
            return np.array([]) if to_numpy else []
        # Vectors from a GPU are in pinned memory. It is too expensive to stay with the owner of the result.
        embeddings = windows[0] if len(windows) == 1 and not windows[0].is_pinned() else torch.cat(windows)
        if precision != "float32":
            embeddings = torch.from_numpy(quantize_embeddings(embeddings, precision, ranges, calibration_embeddings))
        if to_numpy and not convert_to_tensor:
            return embeddings.numpy()[0] if single else embeddings.numpy()
        if single:
            return embeddings[0]
        return embeddings if convert_to_tensor else list(embeddings)

    def encode_stream(
        self,
        sentences: Iterable[str],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        progress: Progress | None = None,
        pool: Pool | None = None,
    ) -> Iterator[np.ndarray]:
        """Yields the vectors of more texts than fit in memory: (n, dim) arrays, in order.

        Each array except the last has 16,384 texts, or fewer texts with 8 million characters together. With a GPU,
        texts are read from the iterable up to three windows before their array is returned. progress is called with the
        number of texts of each batch. pool: a pool of `start_multi_process_pool`. A warning at the end counts truncated
        texts. Errors are those of `encode`.
        """
        self._output("dense")
        truncate_dim = self.truncate_dim if truncate_dim is None else positive_or_none("truncate_dim", truncate_dim)
        request = Request(
            self._prompt(prompt, prompt_name),
            normalize=normalize_embeddings,
            truncate_dim=truncate_dim,
            even=True,
            on_host=True,
            progress=progress,
            pool=None if pool is None else self._pool(pool, None, None, None)[0],
        )
        for window in self._run(as_texts(sentences)[0], request):
            yield window.clone().numpy() if window.is_pinned() else window.numpy()

    def forward(self, input: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Adds token_embeddings and sentence_embedding to the result of `preprocess`, on the model's device.

        token_embeddings: (B, S, H), rows of zeros at padding. sentence_embedding: (B, dim) in float32 at least, through
        all modules, not truncated. Gradients flow where they are enabled. `encode` is faster: it does not pad.
        """
        names = ("input_ids", "token_type_ids", "attention_mask", "position_ids", "inputs_embeds")
        hidden = self.model(**{name: input[name] for name in names if input.get(name) is not None}).last_hidden_state
        n_prompt_tokens = 0
        if not self.pooling.include_prompt and input.get("prompt_length") is not None:
            n_prompt_tokens = int(torch.as_tensor(input["prompt_length"]).flatten()[0])
        vectors = vectors_of_padded(self.pipeline, hidden, input.get("attention_mask"), n_prompt_tokens)
        return {**input, "token_embeddings": hidden, "sentence_embedding": vectors}

    def set_pooling_include_prompt(self, include_prompt: bool) -> None:
        """Sets whether pooling includes the tokens of the prompt. INSTRUCTOR models leave them out."""
        self.pooling = replace(self.pooling, include_prompt=include_prompt)

    def _work(self) -> SentenceWork:
        if self._in_training():
            self.eval()
        return SentenceWork(self.model, list(self.tail), dict(self.heads))

    def _run(self, texts: Iterable[str], request: Request) -> Iterator[Any]:
        if self._in_training():  # eval() drops the tensors derived from the weights
            self.eval()
        run = Run(self.pipeline, request) if request.pool is None else PoolRun(self.pipeline, request)
        self.__dict__["last_timings"] = run.timings  # nn.Module checks for each attribute whether it is a parameter
        return run.windows(texts)
