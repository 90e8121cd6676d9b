"""Engines of servers are competitors here, called in this process: vLLM's and TensorRT-LLM's encoders.

Both take token ids. So transformers tokenizes for them, as for the other peers, and truncates texts in the same way.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastbert.bench.engines import package_obstacle
from fastbert.bench.text_encoders import TextEncoder, pooling_obstacle, tokenized

NO_GPU = "needs an NVIDIA GPU"
MEMORY = 0.3  # the share of the GPU's memory that vLLM may take, beside the other competitors


def import_obstacle(package: str, module: str) -> str | None:
    """Returns the reason why a package is not installed or cannot be imported, or None.

    Both packages are built for one PyTorch and one CUDA, and fail in many ways with others.
    """
    if (missing := package_obstacle(package)) is not None:
        return missing
    try:
        __import__(module)
    except Exception as error:  # any exception of its libraries is the reason
        lines = str(error).strip().splitlines()
        return f"{package} cannot be imported: {type(error).__name__}: {lines[0] if lines else ''}"[:300]
    return None


def vllm_of(folder: Path, dtype: str, longest: int) -> Any:
    """Returns vLLM's engine on a folder, for pooling, without a cache of earlier results.

    Source: docs.vllm.ai, "Pooling Models", and `EngineArgs`.
    """
    from vllm import LLM

    return LLM(
        model=str(folder), runner="pooling", dtype=dtype, max_model_len=longest, enable_prefix_caching=False,
        gpu_memory_utilization=MEMORY, disable_log_stats=True,
    )  # fmt: skip


class VllmEmbeddings(TextEncoder):
    """This is vLLM's `LLM.embed`. It makes its own batches, and pools by the folder of sentence-transformers."""

    name = "vLLM"

    def obstacle(self) -> str | None:
        if self.task.device.type != "cuda":
            return NO_GPU
        return pooling_obstacle(self.task) or import_obstacle("vllm", "vllm")

    def load(self) -> None:
        import transformers

        self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.task.layout.transformer)
        self.engine = vllm_of(self.task.folder, self.dtype, self.task.max_seq_length)

    def encode(self, texts: list[str]) -> Tensor:
        prompts = [{"prompt_token_ids": ids} for ids in tokenized(self.task, self.tokenizer, texts)]
        outputs = self.engine.embed(prompts, use_tqdm=False)
        vectors = np.array([output.outputs.embedding for output in outputs], np.float32)
        return torch.from_numpy(vectors)[:, : self.task.layout.truncate_dim]

    def facts(self) -> dict[str, Any]:
        return {"padding_waste": 0.0}
