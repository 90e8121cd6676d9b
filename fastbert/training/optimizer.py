"""This module creates AdamW for BERT, which decays only the matrices, and saves its state by parameter name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

# The devices on which AdamW(fused=True) runs in PyTorch 2.8 to 2.13.
FUSED_DEVICES = {"cuda", "cpu", "xpu", "mps"}


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Returns two groups for an optimizer: the matrices, with weight decay, and the biases and norms, without.

    A parameter has no weight decay if it has fewer than two dimensions or belongs to a LayerNorm. A tied weight is in a
    group once; a frozen parameter is in no group. Both groups exist even if one is empty. Raises ValueError for a model
    without trainable parameters.
    """
    norms = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.LayerNorm) or "LayerNorm" in type(module).__name__
        for parameter in module.parameters(recurse=False)
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("model: it has no parameter to train, expected one with requires_grad")
    matrices = [p for p in trained if p.ndim >= 2 and id(p) not in norms]
    matrix_ids = set(map(id, matrices))
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) not in matrix_ids], "weight_decay": 0.0},
    ]


def make_optimizer(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
) -> torch.optim.AdamW:
    """Creates AdamW for the groups of `parameter_groups`, by default with BERT's constants.

    It is fused (one kernel for many parameters) if PyTorch supports that on the device of the parameters. Raises
    ValueError as `parameter_groups` and AdamW do.
    """
    groups = [group for group in parameter_groups(model, weight_decay) if group["params"]]
    fused = all(
        p.device.type in FUSED_DEVICES and torch.is_floating_point(p) for group in groups for p in group["params"]
    )
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=fused)


def optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """Returns the state for `load_optimizer_state`: the state of each parameter, by its name in the model.

    The tensors are the optimizer's own tensors, not copies. Names do not change with the order of the groups, but
    PyTorch's numbers do. torch.load reads the saved result with weights_only=True.
    """
    names = _names(optimizer, model)
    state = {name: dict(optimizer.state[p]) for name, p in names.items() if p in optimizer.state}
    return {"names": list(names), "state": state}


def load_optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module, state: Mapping[str, Any]) -> None:
    """Loads a state of `optimizer_state` into the optimizer, as copies on the devices of the parameters.

    Raises ValueError, with the names or shapes, if they differ from those of the model; the optimizer is then
    unchanged.
    """
    names = _names(optimizer, model)
    if set(state["names"]) != set(names):
        extra, missing = sorted(set(state["names"]) - set(names)), sorted(set(names) - set(state["names"]))
        raise ValueError(f"state: the model lacks its parameters {extra[:5]}, and it lacks the model's {missing[:5]}")
    for name, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, torch.Tensor) and value.ndim and value.shape != names[name].shape:
                expected = tuple(names[name].shape)
                raise ValueError(f"state: {key} of {name} has the shape {tuple(value.shape)}, expected {expected}")
    # PyTorch numbers the parameters of all groups consecutively, and moves each value to the device of its parameter.
    content = optimizer.state_dict()
    name_of = {id(p): name for name, p in names.items()}
    order = [name_of[id(p)] for group in optimizer.param_groups for p in group["params"]]
    content["state"] = {
        i: {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in values.items()}
        for i, name in enumerate(order)
        if (values := state["state"].get(name)) is not None
    }
    optimizer.load_state_dict(content)


def _names(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the optimizer's parameters by name, in the order of the model."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    names = {name: p for name, p in model.named_parameters() if id(p) in held}
    if len(names) != len(held):
        raise ValueError(f"optimizer: {len(held) - len(names)} of its {len(held)} parameters are not of this model")
    return names
