"""This module runs SentenceTransformer.encode over the live modules, packed from text to vector.

The original runs an unknown pipeline, and a call that requests more than vectors or token vectors of texts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastbert.adapters import versions
from fastbert.adapters.forward import after_error, parameter_names
from fastbert.adapters.live_encoder import Unsupported
from fastbert.adapters.live_pipeline import PACKAGE, SentenceState, live_pipeline
from fastbert.adapters.state import OURS
from fastbert.ops import tracing
from fastbert.pipelines.api import TWO_PROMPTS
from fastbert.pipelines.batching import default_token_budget
from fastbert.pipelines.pipeline import Pipeline
from fastbert.pipelines.run import Request, Run

logger = logging.getLogger("fastbert")

BY_WORKERS = "by the processes of a pool"  # The count of calls that other processes run.
_PRECISIONS = ("float32", "int8", "uint8", "binary", "ubinary")


def encode(live: Any, state: SentenceState, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Replaces SentenceTransformer.encode, with the arguments, the order and the dtypes of the original."""
    names = parameter_names(original)
    call = {**dict(zip(names, args, strict=False)), **kwargs}
    texts: Any = call.pop("sentences", None) if "sentences" in call else call.pop("inputs", None)
    clash = len(args) > len(names) or len(call) + 1 < len(args) + len(kwargs)
    if clash or _is_wrong(live, texts, call):
        return original(live, *args, **kwargs)  # It raises, or has nothing to do.
    if call.get("pool") is not None or isinstance(call.get("device"), (list, tuple)):
        state.counts[BY_WORKERS] += 1  # There the encoder of a copy is accelerated.
        return original(live, *args, **kwargs)
    try:
        if (observer := tracing.observed()) is not None:
            raise Unsupported(observer)
        plan = _Plan(live, texts, call)
        if any(module.training for module in live.modules()):
            live.eval()
        pipeline = live_pipeline(live, state, bool(plan.prompt))
        output = plan.run(pipeline)
    except Unsupported as error:
        state.decline(str(error))
        return original(live, *args, **kwargs)
    except Exception as error:
        return after_error(error, live, state, original, args, kwargs)
    state.counts[OURS] += 1
    return output


def _is_wrong(live: Any, texts: Any, call: dict[str, Any]) -> bool:
    """Tells whether the original would raise, or return an empty result."""
    batch_size, name = call.get("batch_size", 32), call.get("prompt_name")
    wrong_size = isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1
    wrong_prompt = call.get("prompt") is None and name is not None and name not in live.prompts
    empty = texts is None or (hasattr(texts, "__len__") and not isinstance(texts, str) and len(texts) == 0)
    return wrong_size or wrong_prompt or empty or call.get("precision", "float32") not in (*_PRECISIONS, None)


class _Plan:
    """A `_Plan` holds the arguments of a call of encode. Raises Unsupported for those that only the original takes."""

    def __init__(self, live: Any, texts: Any, call: dict[str, Any]) -> None:
        known = ("prompt_name", "prompt", "batch_size", "show_progress_bar", "output_value", "precision",
                 "convert_to_numpy", "convert_to_tensor", "device", "normalize_embeddings", "truncate_dim",
                 "chunk_size", "task")  # fmt: skip
        for name, value in call.items():
            if name not in known and value is not None:
                raise Unsupported(f"the argument {name}")
        device = call.get("device")
        if device is not None and (isinstance(device, (list, tuple)) or not _same_device(device, live.device)):
            raise Unsupported("a device other than the model's, or several devices")
        self.output_value = call.get("output_value", "sentence_embedding")
        if self.output_value not in ("sentence_embedding", "token_embeddings"):
            raise Unsupported(f"output_value={self.output_value!r}")
        self.single = isinstance(texts, str)
        if not self.single and (isinstance(texts, (dict, Tensor)) or not hasattr(texts, "__len__")):
            raise Unsupported(f"inputs in a {type(texts).__name__}")
        self.texts: list[str] = [texts] if self.single else getattr(texts, "tolist", lambda: list(texts))()
        if not all(type(text) is str for text in self.texts):
            raise Unsupported("inputs that are not all str")
        prompt, prompt_name = call.get("prompt"), call.get("prompt_name")
        if prompt is None:
            prompt_name = live.default_prompt_name if prompt_name is None else prompt_name
            prompt = None if prompt_name is None else live.prompts.get(prompt_name)
        elif prompt_name is not None:
            logger.warning(TWO_PROMPTS)
        self.prompt = prompt or ""
        self.precision = call.get("precision", "float32") or "float32"
        self.to_tensor = bool(call.get("convert_to_tensor", False))
        self.to_numpy = bool(call.get("convert_to_numpy", True)) and not self.to_tensor
        show = call.get("show_progress_bar")
        if show is None:
            show = logging.getLogger(PACKAGE).getEffectiveLevel() in (logging.INFO, logging.DEBUG)
        self.show = bool(show)
        truncate_dim = call.get("truncate_dim")
        self.truncate_dim = live.truncate_dim if truncate_dim is None else truncate_dim
        self.normalize = bool(call.get("normalize_embeddings", False))
        self.batch_size = call.get("batch_size")

    def run(self, pipeline: Pipeline) -> Any:
        """Runs the pipeline, and returns the output of `encode`."""
        if self.batch_size is not None:
            # The caller knows that as many tokens fit as the original would hold at once.
            most = min(self.batch_size * pipeline.max_seq_length, default_token_budget(pipeline.device))
            pipeline = replace(pipeline, token_budget=most)
        on_host = self.output_value == "sentence_embedding" and (self.to_numpy or self.precision != "float32")
        with _progress(self.show, len(self.texts)) as progress:
            request = Request(
                prompt=self.prompt,
                output_value=self.output_value,
                normalize=self.normalize,
                truncate_dim=self.truncate_dim,
                single=self.single,
                on_host=on_host,
                progress=progress,
            )
            windows = list(Run(pipeline, request).windows(self.texts))
        if self.output_value == "token_embeddings":
            items = [item for window in windows for item in window]
            return items[0] if self.single else items
        vectors = windows[0] if len(windows) == 1 and not windows[0].is_pinned() else torch.cat(windows)
        dtype = pipeline.model.dtype
        as_numpy = self.to_numpy or self.precision != "float32"
        # NumPy has no bfloat16: the original gives float32 as well.
        return self._finished(vectors if as_numpy and dtype == torch.bfloat16 else vectors.to(dtype))

    def _finished(self, vectors: Tensor) -> Any:
        """Converts (n, dim) vectors to the form that the call requests."""
        output: Any = vectors
        if self.precision != "float32":
            output = versions.quantize_embeddings(vectors.cpu().numpy(), self.precision)
        if self.to_tensor:
            output = torch.as_tensor(output)
        elif self.to_numpy and isinstance(output, Tensor):
            output = output.cpu().numpy()
        elif not self.to_numpy:
            output = list(torch.from_numpy(output) if isinstance(output, np.ndarray) else output)
        return output[0] if self.single else output


def _same_device(device: Any, present: torch.device) -> bool:
    """Tells whether the device argument of a call is the present device."""
    wanted = torch.device(device)
    return wanted.type == present.type and (wanted.index is None or wanted.index == present.index)


@contextmanager
def _progress(show: bool, total: int) -> Iterator[Callable[[int], Any] | None]:
    """Gives a function that counts finished texts on a progress bar, or None."""
    if not show:
        yield None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc="Encoding", unit="text") as bar:
        yield bar.update
