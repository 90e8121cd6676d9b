"""This module renames a checkpoint's tensors to the names that a model expects, and compares their shapes.

It knows names and shapes, not models. The model decides about missing tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

# Two names of one parameter.
_BIAS_TWINS = {
    "cls.predictions.bias": "cls.predictions.decoder.bias",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
# The config field that sets dimension 0 of a tensor, by the end of its name.
_ROWS = {
    "word_embeddings.weight": "vocab_size",
    "cls.predictions.bias": "vocab_size",
    "cls.predictions.decoder.bias": "vocab_size",
    "cls.predictions.decoder.weight": "vocab_size",
    "position_embeddings.weight": "max_position_embeddings",
    "token_type_embeddings.weight": "type_vocab_size",
    "classifier.weight": "num_labels",
    "classifier.bias": "num_labels",
    "classifier.out_proj.weight": "num_labels",
    "classifier.out_proj.bias": "num_labels",
}
_MISMATCHES_LISTED = 10


@dataclass
class Match:
    """A `Match` holds a checkpoint's tensors under the names that a model expects."""

    state: dict[str, torch.Tensor]
    missing: list[str]  # Names of the model, in its order.
    unexpected: list[str]  # Names of the checkpoint, in its order.
    # A part of `missing`: names whose tensor has another shape, with that shape and the expected one.
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)


def match(
    state: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Size],
    *,
    base_prefix: str = "bert.",
    ignore_mismatched: bool = False,
) -> Match:
    """Renames a checkpoint's tensors to the names of a model. ``expected`` maps these names to shapes.

    ``base_prefix`` is added or removed if only that gives a name of the model.

    ``cls.predictions.bias`` and ``cls.predictions.decoder.bias`` are one parameter. If the model expects one that the
    checkpoint lacks, it gets the other (the same tensor object). A twin without a place in the model is not unexpected
    if it holds the same numbers.

    A missing ``cls.predictions.decoder.weight`` stays missing: the model knows whether it is tied.

    Raises ValueError that lists the tensors with unexpected shapes. With ``ignore_mismatched`` they are left out
    instead.
    """
    matched = {name: tensor for name, tensor in state.items() if name in expected}
    unexpected: list[str] = []
    for name, tensor in state.items():
        if name in expected:
            continue
        other = name[len(base_prefix) :] if name.startswith(base_prefix) else base_prefix + name
        if other in expected and other not in matched:
            matched[other] = tensor
        else:
            unexpected.append(name)

    for name, twin in _BIAS_TWINS.items():
        if name in expected and name not in matched and twin in state:
            matched[name] = state[twin]
        if twin in unexpected and name in matched and _same(matched[name], state[twin]):
            unexpected.remove(twin)

    wrong = _mismatched(matched, expected)
    if wrong and not ignore_mismatched:
        _refuse_shapes(wrong)
    matched = {name: tensor for name, tensor in matched.items() if name not in wrong}
    return Match(
        state={name: matched[name] for name in expected if name in matched},
        missing=[name for name in expected if name not in matched],
        unexpected=unexpected,
        mismatched=wrong,
    )


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a is b or (a.dtype == b.dtype and torch.equal(a, b))


def _mismatched(
    matched: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Size]
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    return {
        name: (tuple(matched[name].shape), tuple(shape))
        for name, shape in expected.items()
        if name in matched and tuple(matched[name].shape) != tuple(shape)
    }


def _refuse_shapes(wrong: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
    lines = [f"{len(wrong)} tensor(s) of the checkpoint do not have the shape that the model expects:"]
    listed = list(wrong.items())[:_MISMATCHES_LISTED]
    lines += [f"  {name}: came {came}, expected {want}" for name, (came, want) in listed]
    if len(wrong) > _MISMATCHES_LISTED:
        lines.append(f"  and {len(wrong) - _MISMATCHES_LISTED} more")
    hints: dict[str, str] = {}
    for name, (came, want) in wrong.items():
        for ending, setting in _ROWS.items():
            if name.endswith(ending) and came and want and came[1:] == want[1:]:
                hints[setting] = f"{setting}: the checkpoint has {came[0]}, the model {want[0]}"
    raise ValueError("\n".join(lines + list(hints.values())))
