"""An engine computes BERT's hidden states from token ids in one way, set up as a careful user would.

Peers that start from texts and peers that start from ids use the same engines. B sequences, S the longest of them, T
tokens in total, H hidden.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.checkpoint.config import BertConfig

Batch = tuple[Any, ...]  # the input of an engine, on its device


@dataclass(frozen=True)
class Source:
    """A `Source` is the input of engines: the folder of a BERT checkpoint, a dtype and a device."""

    folder: Path
    dtype: torch.dtype
    device: torch.device

    @functools.cached_property
    def config(self) -> BertConfig:
        return BertConfig.from_pretrained(self.folder)

    def transformers(self, attention: str = "sdpa", dtype: torch.dtype | None = None) -> Any:
        """Returns transformers' model, without its pooler, in eval mode. dtype: by default the source's."""
        import transformers

        silence_transformers()
        without_pooler = {"add_pooling_layer": False} if self.config.family.pooler else {}
        model = transformers.AutoModel.from_pretrained(
            self.folder, dtype=dtype or self.dtype, attn_implementation=attention, **without_pooler
        )
        return model.to(self.device).eval()


@dataclass(frozen=True)
class Pool:
    """A `Pool` computes one float32 vector from the hidden states of a text.

    mode: "mean" or "cls". normalize: to length 1.
    """

    mode: str = "mean"
    normalize: bool = False

    def padded(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """Pools padded hidden states: (B, S, H), with a mask (B, S) nonzero at tokens, or None if all are -> (B, H)."""
        if self.mode == "cls":
            x = hidden[:, 0].float()
        elif mask is None:
            x = hidden.float().mean(1)
        else:
            x = (hidden.float() * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        return F.normalize(x, dim=1) if self.normalize else x

    def packed(self, hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Pools packed hidden states: (T, H), (B + 1,) -> (B, H)."""
        if self.mode == "cls":
            x = hidden[cu_seqlens[:-1].long()].float()
        else:
            x = torch.segment_reduce(hidden.float(), "mean", offsets=cu_seqlens.long(), axis=0)
        return F.normalize(x, dim=1) if self.normalize else x


class Engine:
    """An Engine is one program in one setting. Subclasses set `name` and define `load`, `batch`, `compute` and `valid`.

    pool: None for hidden states. varied: whether the sequences of a batch differ in length. dtype: the data type of the
    computation. warmups: the number of runs of a batch before it takes its usual time. batch_sizes: those to try, by
    type of device. needs: see `Peer`.
    """

    name: str
    needs: tuple[str, ...] = ()
    warmups = 1
    batch_sizes: ClassVar[dict[str, tuple[int, ...]]] = {"cpu": (8, 32), "cuda": (64, 256, 1024)}

    def __init__(self, source: Source, pool: Pool | None = None, varied: bool = True) -> None:
        self.source, self.pool, self.varied = source, pool, varied
        self.dtype = str(source.dtype).removeprefix("torch.")

    def obstacle(self) -> str | None:
        """Returns the reason why this engine cannot run here, or None."""
        return package_obstacle("transformers")

    def load(self) -> None:
        """Prepares the engine for batches."""
        raise NotImplementedError

    def batch(self, rows: Sequence[np.ndarray]) -> Batch:
        """Returns the ids of B sequences, one int64 array each, as input of the engine, on its device."""
        raise NotImplementedError

    def compute(self, *batch: Any) -> Tensor:
        """Returns (B, H) with a pool; otherwise the hidden states, (B, S, H) or (T, H)."""
        raise NotImplementedError

    def valid(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Returns the hidden states at tokens: (T, H)."""
        raise NotImplementedError

    def positions(self, batch: Batch) -> int:
        """Returns the number of computed positions of a batch, including padding."""
        return batch[0].numel()

    def to_device(self, array: np.ndarray) -> Tensor:
        """Copies an array without waiting for a GPU that is still busy with the previous batch."""
        tensor = torch.from_numpy(array)
        if self.source.device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self.source.device, non_blocking=True)


class Padded(Engine):
    """The engine pads batches to their longest sequence: ids and mask, both (B, S) int64. Subclasses define `hidden`.

    If all sequences are equally long, the mask is None, unless always_masked. pad_to: S is rounded up to a multiple of
    it.
    """

    always_masked = False
    pad_to = 1

    def hidden(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Computes hidden states: (B, S), (B, S) -> (B, S, H)."""
        raise NotImplementedError

    def batch(self, rows: Sequence[np.ndarray]) -> Batch:
        lengths = [len(row) for row in rows]
        width = max(lengths)
        if len(set(lengths)) > 1:
            width = min(-(-width // self.pad_to) * self.pad_to, self.source.config.max_length)
        ids, mask = np.zeros((len(rows), width), np.int64), np.zeros((len(rows), width), np.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
            mask[i, : len(row)] = 1
        if min(lengths) == width and not self.always_masked:
            return self.to_device(ids), None
        return self.to_device(ids), self.to_device(mask)

    @torch.inference_mode()
    def compute(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        return self._pooled(ids, mask)

    def _pooled(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        hidden = self.hidden(ids, mask)
        return hidden if self.pool is None else self.pool.padded(hidden, mask)

    def valid(self, hidden: Tensor, batch: Batch) -> Tensor:
        mask = batch[1]
        return hidden.flatten(0, 1) if mask is None else hidden[mask != 0]


class Packed(Engine):
    """The engine packs sequences: ids and positions, (T,) int64, offsets (B + 1,) int32, and the longest length."""

    def batch(self, rows: Sequence[np.ndarray]) -> Batch:
        lengths = [len(row) for row in rows]
        cu_seqlens = np.cumsum([0, *lengths], dtype=np.int32)
        positions = np.concatenate([np.arange(n) for n in lengths])
        return *map(self.to_device, (np.concatenate(rows), positions, cu_seqlens)), max(lengths)

    def hidden(self, ids: Tensor, positions: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        """Computes hidden states: -> (T, H)."""
        raise NotImplementedError

    @torch.inference_mode()
    def compute(self, ids: Tensor, positions: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        hidden = self.hidden(ids, positions, cu_seqlens, longest)
        return hidden if self.pool is None else self.pool.packed(hidden, cu_seqlens)

    def valid(self, hidden: Tensor, batch: Batch) -> Tensor:
        return hidden


class Transformers(Padded):
    """The engine runs transformers' model unchanged."""

    attention: str

    def load(self) -> None:
        self.model = self.source.transformers(self.attention)

    def hidden(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        return self.model(input_ids=ids, attention_mask=mask).last_hidden_state


class Eager(Transformers):
    name = "transformers eager"
    attention = "eager"


class SDPA(Transformers):
    name = "transformers SDPA"
    attention = "sdpa"


class Compiled(SDPA):
    """The engine runs transformers' model and pooling through torch.compile, with dynamic shapes if lengths vary.

    On a GPU it uses the mode max-autotune with CUDA graphs, one per shape, so lengths are padded to multiples of 64. If
    lengths vary, every batch of several sequences has a mask, because code without a mask would be compiled separately.
    On CPUs max-autotune and freezing take longer to compile and are not faster.
    """

    name = "transformers compiled"
    pad_to = 64
    batch_sizes: ClassVar[dict[str, tuple[int, ...]]] = {"cpu": (8, 32), "cuda": (256,)}

    def load(self) -> None:
        super().load()
        self.on_gpu = self.source.device.type == "cuda"
        self.warmups = 3 if self.on_gpu else 1  # for each shape: one plain run, one capture, then replays
        self.pad_to = 64 if self.on_gpu else 1
        # fullgraph: raises an error instead of running slow uncompiled code if there are too many shapes to compile.
        self.compiled = torch.compile(
            self._pooled, dynamic=self.varied, fullgraph=True, mode="max-autotune" if self.on_gpu else None
        )

    def batch(self, rows: Sequence[np.ndarray]) -> Batch:
        ids, mask = super().batch(rows)
        if mask is None and self.varied and len(rows) > 1:
            mask = torch.ones_like(ids)
        return ids, mask

    @torch.no_grad()
    def compute(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        if not self.on_gpu:
            return self.compiled(ids, mask)
        torch.compiler.cudagraph_mark_step_begin()
        out = self.compiled(ids, mask)
        return out if self.pool is None else out.clone()  # the next replay overwrites it


def silence_transformers() -> None:
    """Hides transformers' progress bars and its notes about unused weights."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def package_obstacle(package: str) -> str | None:
    """Returns the reason why a package cannot be used, or None if it is installed."""
    if importlib.util.find_spec(package.replace("-", "_")) is None:
        return f"the package {package} is not installed"
    return None


FLASH_PACKAGES = "flash-attn", "kernels"  # each provides FlashAttention-2; the second fetches it from the hub
HUB_FLASH = "kernels-community/flash-attn2"


@functools.cache
def flash_obstacle() -> str | None:
    """Returns the reason why transformers cannot run FlashAttention-2 here, or None after it is loaded.

    PyPI's kernels fetches it from the hub at its first use, which needs a network.
    """
    missing = [package_obstacle(package) for package in FLASH_PACKAGES]
    if all(missing):
        return "; ".join(str(reason) for reason in missing)
    if missing[0] is None:
        return None
    try:
        from transformers.modeling_flash_attention_utils import lazy_import_flash_attention

        lazy_import_flash_attention(HUB_FLASH)
    except Exception as error:  # no network, no build for this PyTorch: any error of the two libraries is the reason
        lines = str(error).strip().splitlines()
        return f"{HUB_FLASH} could not be loaded: {type(error).__name__}: {lines[0] if lines else ''}"[:300]
    return None


def flash_implementation() -> str:
    """Returns the name of FlashAttention-2 for transformers."""
    return "flash_attention_2" if package_obstacle(FLASH_PACKAGES[0]) is None else HUB_FLASH


TRANSFORMERS_ENGINES: tuple[type[Engine], ...] = (Eager, SDPA, Compiled)
EAGER = Eager.name  # plain PyTorch, whose error bounds fastbert's
