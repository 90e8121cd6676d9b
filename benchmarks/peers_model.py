"""Peers of the model level go from token ids to hidden states. The task and its reference are here too.

All take the same ids, already on the device, each in its own form: packed, or padded batch by batch.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peers_cpu
import peers_torch
import torch
import workloads
from torch import Tensor

from fastbert import BertModel, reference
from fastbert.bench.engines import TRANSFORMERS_ENGINES, Batch, Engine, Packed, Padded, Source
from fastbert.bench.exact import choose_checked
from fastbert.bench.peers import OURS, Peer
from fastbert.ops.quantized import device_obstacle

N_INPUTS = 2  # sets of ids, which rotate


class ModelTask:
    """A ModelTask is a BERT checkpoint, and batches of sequences with these lengths and random ids.

    folder: as in transformers; batches: the lengths of each batch, in order. dtype: the dtype in which fastbert
    computes.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        batches: Sequence[Sequence[int]],
        *,
        dtype: str | torch.dtype,
        device: str | torch.device,
    ) -> None:
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        self.source = Source(Path(folder), dtype, torch.device(device))
        self.batches = [tuple(lengths) for lengths in batches]
        config = self.source.config
        longest = max(map(max, self.batches))
        if longest > config.max_position_embeddings:
            raise ValueError(
                f"batches: got a sequence of {longest}, but the model has {config.max_position_embeddings} positions"
            )

    @property
    def n_tokens(self) -> int:
        """Counts the valid tokens of a pass over all batches."""
        return sum(map(sum, self.batches))

    @property
    def n_sequences(self) -> int:
        return sum(map(len, self.batches))

    @property
    def varied(self) -> bool:
        """Tells whether some batch needs padding, or batches differ in shape."""
        return len({(len(lengths), n) for lengths in self.batches for n in lengths}) > 1

    @functools.cached_property
    def inputs(self) -> list[list[list[np.ndarray]]]:
        """Returns the ids of each input set, batch and sequence."""
        vocab_size, sets = self.source.config.vocab_size, []
        for number in range(N_INPUTS):
            ids = iter(workloads.token_ids([n for lengths in self.batches for n in lengths], vocab_size, number))
            sets.append([[next(ids) for _ in lengths] for lengths in self.batches])
        return sets

    @functools.cached_property
    def checked(self) -> list[list[int]]:
        """Returns the sequences of each batch that the reference covers."""
        places = [(b, i) for b, lengths in enumerate(self.batches) for i in range(len(lengths))]
        lengths = [self.batches[b][i] for b, i in places]
        numbers: list[list[int]] = [[] for _ in self.batches]
        for b, i in (places[k] for k in choose_checked(lengths, self.source.config, self.source.device)):
            numbers[b].append(i)
        return numbers

    @torch.no_grad()
    def reference(self) -> Tensor:
        """Returns the hidden states of the checked sequences of input set 0, one after the other: (T', H) float64."""
        model = BertModel.from_pretrained(self.source.folder)
        params = {name: p.to(self.source.device, torch.float64) for name, p in model.named_parameters()}
        states = []
        for rows, chosen in zip(self.inputs[0], self.checked, strict=True):
            for i in chosen:
                ids = torch.from_numpy(rows[i])[None].to(self.source.device)
                encoded = reference.encode(params, model.config, ids, output_attentions=False)
                states.append(encoded.last_hidden_state[0].cpu())
        return torch.cat(states)


class FastBert(Engine):
    """This engine is fastbert.BertModel."""

    def obstacle(self) -> str | None:
        return None

    def load(self) -> None:
        source = self.source
        self.model = BertModel.from_pretrained(source.folder, dtype=source.dtype, device=source.device)


class FastBertPacked(FastBert, Packed):
    """This engine is forward_packed, with the offsets on the host."""

    name = OURS

    def batch(self, rows: Sequence[np.ndarray]) -> Batch:
        ids, positions, _, longest = super().batch(rows)
        return ids, positions, torch.tensor([0, *map(len, rows)]).cumsum(0).int(), longest

    def hidden(self, ids: Tensor, positions: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        return self.model.forward_packed(ids, cu_seqlens)


class FastBertInt8(FastBertPacked):
    """This is forward_packed with int8 linears in the encoder. backend: strict, so that no fallback is timed in its
    name.
    """

    name, precision, backend = f"{OURS} int8", "int8", "triton"
    needs = ("quantized",)

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.dtype = self.precision

    def obstacle(self) -> str | None:
        return device_obstacle(self.precision, self.source.device)

    def load(self) -> None:
        source, arguments = self.source, {"precision": self.precision, "backend": self.backend, "strict": True}
        self.model = BertModel.from_pretrained(source.folder, dtype=source.dtype, device=source.device, **arguments)


class FastBertFp8(FastBertInt8):
    """This is `FastBertInt8` in fp8."""

    name, precision = f"{OURS} fp8", "fp8"


class FastBertPadded(FastBert, Padded):
    """Here fastbert replaces transformers' model, with padded inputs and outputs."""

    name = "fastbert padded"

    def hidden(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        return self.model(ids, mask).last_hidden_state


class Hidden(Peer):
    """A Hidden is an engine on all batches of a task. Its output has the sequences of `ModelTask.reference`."""

    def __init__(self, task: ModelTask, engine: type[Engine], **settings: Any) -> None:
        self.task = task
        self.engine = engine(task.source, varied=task.varied, **settings)
        self.name, self.dtype, self.needs = self.engine.name, self.engine.dtype, self.engine.needs
        self.inputs: list[list[Batch]] = []

    def obstacle(self) -> str | None:
        return self.engine.obstacle()

    def prepare(self) -> None:
        self.engine.load()
        self.inputs = [[self.engine.batch(rows) for rows in batches] for batches in self.task.inputs]
        self.engine.compute(*self.inputs[0][0])  # this compiles everything

    def run(self, i: int) -> Tensor:
        for batch in self.inputs[i % len(self.inputs)]:
            hidden = self.engine.compute(*batch)
        return hidden

    def output(self) -> Tensor:
        for _ in range(self.engine.warmups - 1):
            self.run(0)
        states = []
        for lengths, chosen, batch in zip(self.task.batches, self.task.checked, self.inputs[0], strict=True):
            hidden = self.engine.valid(self.engine.compute(*batch), batch).split(lengths)
            # These are copies, since a graph's next replay overwrites its output.
            states += [hidden[i].to("cpu", torch.float32, copy=True) for i in chosen]
        return torch.cat(states)

    def facts(self) -> dict[str, Any]:
        computed = sum(self.engine.positions(batch) for batch in self.inputs[0])
        return {"padding_waste": 1.0 - self.task.n_tokens / computed}


def model_peers(task: ModelTask) -> list[Hidden]:
    """Returns fastbert, transformers eager and all others for the task's device and dtype."""
    engines = [FastBertPacked, *TRANSFORMERS_ENGINES, FastBertPadded, *peers_torch.engines(task.source.device)]
    if task.source.device.type == "cuda" and task.source.dtype.itemsize == 2:
        engines += [FastBertInt8, FastBertFp8]
    if task.source.device.type == "cpu":
        engines += peers_cpu.engines(task.source.dtype)
    if task.source.config.family.text != "bert":  # the other engines convert BERT's layers only
        kept = FastBertPacked, *TRANSFORMERS_ENGINES, peers_cpu.OpenVINO
        engines = [engine for engine in engines if issubclass(engine, kept)]
    return [Hidden(task, engine) for engine in engines]
