"""This module reads class weights for a loss: from a rule, from names with numbers, or from a JSON file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch


RULES = "none", "balanced"


def parse(value: Any) -> str | dict[str, float]:
    """Returns "none", "balanced", or weights by name.

    value: one of these words, a mapping, "NAME=W,NAME=W", or the path of a .json file with an object. Raises TypeError
    or ValueError for any other value, and for weights that are not numbers >= 0; OSError for a missing file.
    """
    if isinstance(value, str) and value in RULES:
        return value
    if isinstance(value, str):
        value = _of_file(value) if value.endswith(".json") else _of_text(value)
    if not isinstance(value, Mapping):
        raise TypeError(f"class_weights: got {type(value).__name__}, expected none, balanced, or weights by name")
    if not value:
        raise ValueError("class_weights: there are no weights; expected NAME=W")
    weights = {}
    for name, weight in value.items():
        try:
            number = math.nan if isinstance(weight, bool) else float(weight)
        except (TypeError, ValueError):
            number = math.nan
        if not (math.isfinite(number) and number >= 0):
            raise ValueError(f"class_weights: got {weight!r} for {str(name)!r}, expected a number from 0 on")
        weights[str(name)] = number
    return weights


def _of_text(text: str) -> dict[str, Any]:
    weights: dict[str, Any] = {}
    for pair in text.split(","):
        name, equals, weight = pair.rpartition("=")
        name = name.strip()
        if not (equals and name):
            raise ValueError(f"class_weights: got {pair!r}, expected none, balanced, NAME=W,NAME=W or a .json file")
        if name in weights:
            raise ValueError(f"class_weights: {name!r} is named twice")
        weights[name] = weight.strip()
    return weights


def _of_file(path: str) -> Any:
    try:
        value = json.loads(Path(path).expanduser().read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"class_weights: {path} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"class_weights: {path} holds a JSON {type(value).__name__}, expected an object of numbers")
    return value


def weights_of(rule: str | Mapping[str, float], names: Sequence[str], counts: Sequence[int]) -> np.ndarray | None:
    """Returns the weight of each class in a loss, (C,) float32; None for "none".

    "balanced": N / (C n), as in scikit-learn, for a class with n of N examples; 1 if n is 0. A mapping gives weights by
    name; the other classes have weight 1. Raises ValueError for unknown names, and for weights below 0.
    """
    import numpy as np

    if isinstance(rule, str):
        if rule not in RULES:
            raise ValueError(f"class_weights: got {rule!r}, expected 'none', 'balanced', or weights by name")
        n = np.array(counts, np.float64)
        balanced = np.where(n > 0, n.sum() / (len(n) * np.maximum(n, 1)), 1.0)
        return None if rule == "none" else balanced.astype(np.float32)
    if other := sorted(set(rule) - set(names)):
        raise ValueError(f"class_weights: {other} are no classes; there are {list(names)}")
    if bad := {name: w for name, w in rule.items() if not (math.isfinite(w) and w >= 0)}:
        raise ValueError(f"class_weights: got {bad}, expected numbers from 0 on")
    return np.array([rule.get(name, 1.0) for name in names], np.float32)


def weighted_cross_entropy(weights: np.ndarray) -> Any:
    """Returns a compute_loss_func for the Trainer: a cross entropy with the class weight of each label.

    weights: (C,) float32. Labels of -100 are ignored. The sum is divided by the number of labels in the whole update,
    so the losses of its batches add up.
    """
    import torch

    of_names = torch.from_numpy(weights)

    def weighted(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        logits = outputs.logits.float().flatten(0, -2)
        loss = torch.nn.functional.cross_entropy(
            logits, labels.flatten(), of_names.to(logits.device), reduction="sum", ignore_index=-100
        )
        return loss / ((labels != -100).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)

    return weighted
