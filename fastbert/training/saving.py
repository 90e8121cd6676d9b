"""A checkpoint of a run is a model folder that also contains the state of the optimiser and of the run."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastbert.checkpoint.files import read_json, write_text
from fastbert.text.tokenizer import Tokenizer
from fastbert.training.data.plan import Cursor
from fastbert.training.distributed import Processes, is_sharded
from fastbert.training.loop import State
from fastbert.training.optimizer import load_optimizer_state, optimizer_state
from fastbert.training.settings import MAY_DIFFER

logger = logging.getLogger("fastbert")

OPTIMIZER, STATE, RUN = "optimizer.pt", "state.json", "run.json"


@dataclasses.dataclass(frozen=True)
class Saved:
    """A `Saved` holds the content of a checkpoint, on the host of the first process.

    tensors: the weights of a sharded model, else None. optimizer: the optimiser's state; without FSDP, None on
    processes other than the first.
    """

    model: Any
    tensors: dict[str, torch.Tensor] | None
    optimizer: dict[str, Any] | None
    tokenizer: Tokenizer

    @classmethod
    def of(cls, model: Any, optimizer: torch.optim.Optimizer, tokenizer: Tokenizer, processes: Processes) -> Saved:
        """Collects the content of a checkpoint. With FSDP all processes must call it."""
        if is_sharded(model):
            tensors, state = _whole(model, optimizer)
            return cls(model, tensors, state, tokenizer)
        return cls(model, None, optimizer_state(optimizer, model) if processes.is_first else None, tokenizer)

    def write_model(self, folder: Path) -> None:
        """Writes the model and its tokenizer, in the format of transformers and fastbert."""
        self.model.save_pretrained(folder, state_dict=self.tensors)
        self.tokenizer.save_pretrained(folder)

    def write(self, folder: Path, state: State) -> None:
        """Writes the whole checkpoint."""
        self.write_model(folder)
        torch.save(self.optimizer, folder / OPTIMIZER)
        fields = {**dataclasses.asdict(state), "cursor": state.cursor.as_dict()}
        write_text(folder / STATE, json.dumps(fields, indent=2) + "\n")


def load(folder: Path, model: Any, optimizer: torch.optim.Optimizer) -> State:
    """Loads the weights and the optimiser's state of a checkpoint into a model and its optimiser, bit for bit."""
    stored = type(model).from_pretrained(folder, dtype="float32", device="cpu")
    if is_sharded(model):
        _load_whole(model, optimizer, stored, folder)
    else:
        model.load_state_dict(stored.state_dict())
        load_optimizer_state(optimizer, model, torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True))
    fields = read_json(folder / STATE)
    return State(**{**fields, "cursor": Cursor.from_dict(fields["cursor"])})


def _whole(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the complete tensors of a sharded model, and its optimiser's state in the form of `optimizer_state`."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    tensors, content = get_state_dict(model, optimizer, options=options)
    state = content.get("state", {})  # only the first process has it
    return tensors, {"names": list(state), "state": state}


def _load_whole(model: nn.Module, optimizer: torch.optim.Optimizer, stored: nn.Module, folder: Path) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_state_dict

    options = StateDictOptions(full_state_dict=True)
    content = get_optimizer_state_dict(model, optimizer, options=options)
    state = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)["state"]
    content = {"state": state, "param_groups": content["param_groups"]}
    set_state_dict(model, optimizer, model_state_dict=stored.state_dict(), optim_state_dict=content, options=options)


def write_run(output: Path, run: dict[str, Any]) -> None:
    """Writes the facts of a run: its settings, and the identity of its data and model."""
    write_text(output / RUN, json.dumps(run, indent=2, ensure_ascii=False) + "\n")


def check_same_run(output: Path, run: dict[str, Any]) -> None:
    """Raises ValueError, with each difference, if a run that resumes differs from the original run."""
    stored, run = read_json(output / RUN), json.loads(json.dumps(run))
    differences = []
    for name in sorted({*stored["settings"], *run["settings"]} - MAY_DIFFER):
        before, now = stored["settings"].get(name), run["settings"].get(name)
        if before != now:
            differences.append(f"{name} was {before!r} and is {now!r}")
    for name, before in stored.items():
        if name not in ("settings", "processes") and run.get(name) != before:
            differences.append(_difference(name, before, run.get(name)))
    if stored["processes"] != run["processes"]:
        logger.warning(
            "the run began with %d processes and continues with %d: the data is the same, the last bits are not",
            stored["processes"], run["processes"],
        )  # fmt: skip
    if differences:
        raise ValueError(
            f"resume: this is not the run that began in {output}: {'; '.join(differences)}. Name the same values, or "
            "another output; a checkpoint there can be the model_config of a new run."
        )


def _difference(name: str, before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        return "; ".join(f"{name}: {key} was {before.get(key)!r} and is {now.get(key)!r}" for key in keys)
    return f"{name} was {before!r} and is {now!r}"
