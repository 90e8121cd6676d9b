"""This module computes gradients for `verify`: the model's, plain PyTorch's and the float64 reference's.

The loss is a fixed scalar: the sum over tokens of w x, and over texts of u y, where x is the last hidden state and y
the pooled output. w and u are random normal numbers that depend only on the index of the text. All three run on the
same tokens. The model runs as in training, but without dropout.

B sequences, S the longest, T tokens, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastbert import reference
from fastbert.diagnostics.verify.bounds import (
    BOUND_IN_FLOAT64,
    BOUND_WITHOUT_EAGER,
    FACTOR,
    FACTOR_OF_ONE_PARAMETER_16,
    FACTOR_OF_ONE_PARAMETER_32,
    FLOOR_OF_GRADIENTS_16,
    FLOOR_OF_GRADIENTS_32,
)
from fastbert.diagnostics.verify.eager import eager_bert
from fastbert.diagnostics.verify.gradient_findings import ALL, GradientReport, GradientsReport
from fastbert.diagnostics.verify.rows import Row, chunks, padded
from fastbert.models.encoder import EncoderModel
from fastbert.models.inputs import Inputs

# The most texts of one step, in the user's order. The reference keeps all data for a backward pass in float64.
STEP_ROWS, STEP_TOKENS = 16, 1024
# A gradient below this share of its part's gradients is zero except for rounding. Its error is relative to the part's
# gradients. The bias of keys is such a parameter: it adds a constant to all scores of a query, and the softmax cancels
# it.
ZERO = 1e-9

Outputs = tuple[Tensor, Tensor | None]  # the last hidden states, (T, H), and the pooled output, (B, H)
Run = Callable[[Tensor, Tensor, Tensor], Outputs]  # from ids, mask and token type ids, (B, S)


@dataclass(frozen=True)
class Trained:
    """A `Trained` is a model whose gradients are compared.

    bert: the encoder whose parameters `run` uses. root: the module that is trained, or that contains it.
    """

    bert: EncoderModel
    root: nn.Module
    run: Run


def own(bert: EncoderModel) -> Trained:
    """Returns the `Trained` of a fastbert model, by its encoder."""

    def run(input_ids: Tensor, mask: Tensor, token_type_ids: Tensor) -> Outputs:
        inputs = Inputs(input_ids, mask, token_type_ids, output_attentions=False, output_hidden_states=False)
        encoded = bert.encode(inputs)
        return encoded.last_hidden_state, bert.pool(encoded)

    return Trained(bert, bert, run)


def called(live: nn.Module, bert: EncoderModel) -> Trained:
    """Returns the `Trained` of an accelerated encoder. bert: the fastbert encoder on its parameters."""
    segments = bert.config.family.token_types

    def run(input_ids: Tensor, mask: Tensor, token_type_ids: Tensor) -> Outputs:
        more = {"token_type_ids": token_type_ids} if segments else {}
        output = live(input_ids=input_ids, attention_mask=mask, return_dict=True, **more)
        return output.last_hidden_state[mask != 0], getattr(output, "pooler_output", None)

    return Trained(bert, live, run)


def compare_gradients(trained: Trained, rows: Sequence[Row], prefix: str, outer: Any = None) -> GradientsReport | None:
    """Compares the gradients of all parameters that require one. Returns None if no parameter does.

    prefix: the prefix of the names of parts. outer: the model for the names of parameters in the report, by default the
    encoder.
    """
    bert = trained.bert
    parameters = {name: p for name, p in bert.named_parameters() if p.requires_grad}
    if not parameters:
        return None
    measures = {name: torch.zeros(3, dtype=torch.float64, device="cpu") for name in parameters}
    missing, n_steps = set(parameters), 0
    with as_in_training(trained.root), torch.enable_grad():
        with_tokens = [i for i, (ids, _) in enumerate(rows) if len(ids)]
        for chunk in chunks(with_tokens, rows, STEP_ROWS, STEP_TOKENS):
            inputs, loss = padded([rows[i] for i in chunk]), _Loss(bert, rows, chunk)
            ours, eager, exact = (
                run(trained, parameters, inputs, loss) for run in (_own_gradients, _eager_gradients, _exact_gradients)
            )
            missing -= {name for name, gradient in ours.items() if gradient is not None}
            n_steps += 1
            for name, measure in measures.items():
                measure += _squares(ours[name], eager[name], exact[name], _padding_row(bert, name))
    names = {id(parameter): name for name, parameter in (outer or bert).named_parameters()}
    labels = {name: names.get(id(parameter), name) for name, parameter in parameters.items()}
    return GradientsReport(*_reports(measures, parameters, missing, labels, prefix), n_steps)


class _Loss:
    """A `_Loss` is the loss of the texts of one step, as gradients of the outputs."""

    def __init__(self, bert: EncoderModel, rows: Sequence[Row], chunk: Sequence[int]) -> None:
        width, dtype = bert.config.hidden_size, bert.dtype
        of_tokens, of_texts = [], []
        for i in chunk:
            generator = torch.Generator().manual_seed(i)
            numbers = torch.randn(len(rows[i][0]) + 1, width, generator=generator, device="cpu").to(dtype)
            of_tokens.append(numbers[1:])
            of_texts.append(numbers[0])
        self.of_tokens, self.of_texts = torch.cat(of_tokens), torch.stack(of_texts)

    def gradients(self, outputs: Outputs, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """Returns the gradients of the parameters, None for a parameter that no output depends on."""
        pairs = (outputs[0], self.of_tokens), (outputs[1], self.of_texts)
        chosen = [(output, weights.to(output)) for output, weights in pairs if output is not None]
        if not any(output.requires_grad for output, _ in chosen):
            return [None] * len(parameters)
        ends, weights = zip(*chosen, strict=True)
        return list(torch.autograd.grad(ends, parameters, weights, allow_unused=True))


Gradients = dict[str, Tensor | None]
Batch = tuple[Tensor, Tensor, Tensor]  # ids, mask and token type ids, (B, S) on the CPU


def _own_gradients(trained: Trained, parameters: Mapping[str, Tensor], inputs: Batch, loss: _Loss) -> Gradients:
    outputs = trained.run(*(x.to(trained.bert.device) for x in inputs))
    return dict(zip(parameters, loss.gradients(outputs, list(parameters.values())), strict=True))


def _eager_gradients(trained: Trained, parameters: Mapping[str, Tensor], inputs: Batch, loss: _Loss) -> Gradients:
    bert = trained.bert
    input_ids, mask, token_type_ids = (x.to(bert.device) for x in inputs)
    # New leaves on the same memory, because hooks on the model's parameters must not run.
    leaves = {name: p.detach().requires_grad_(p.requires_grad) for name, p in bert.named_parameters()}
    by_parameter = {id(p): leaves[name] for name, p in bert.named_parameters()}
    blocks = [block.mapped(lambda tensor: _on_leaves(tensor, by_parameter)) for block in bert.blocks()]
    states = eager_bert(leaves, blocks, bert.config, input_ids, mask, token_type_ids)
    pooled = states[-1][:, 0] if bert.pooler is not None else None
    outputs = states[len(bert.encoder.in_order)][mask != 0], pooled
    return dict(zip(parameters, loss.gradients(outputs, [leaves[name] for name in parameters]), strict=True))


def _on_leaves(tensor: Tensor, leaves: Mapping[int, Tensor]) -> Tensor:
    """Returns the leaf that replaces a parameter, by its id, or the corresponding view of the leaf."""
    base = tensor._base
    if base is None or id(base) not in leaves:
        return leaves.get(id(tensor), tensor)
    return leaves[id(base)].as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _exact_gradients(trained: Trained, parameters: Mapping[str, Tensor], inputs: Batch, loss: _Loss) -> Gradients:
    bert = trained.bert
    params = {name: p.detach().to("cpu", torch.float64) for name, p in bert.named_parameters()}
    leaves = [params[name].requires_grad_() for name in parameters]
    exact = reference.encode(params, bert.config, *inputs, output_attentions=False)
    outputs = exact.last_hidden_state[inputs[1] != 0], exact.pooler_output
    return dict(zip(parameters, loss.gradients(outputs, leaves), strict=True))


def _padding_row(bert: EncoderModel, name: str) -> int | None:
    """Returns the row of an embedding table that is never trained, or None."""
    module = bert.get_submodule(name.rpartition(".")[0])
    return module.padding_idx if isinstance(module, nn.Embedding) else None


def _squares(ours: Tensor | None, eager: Tensor | None, exact: Tensor | None, padding_row: int | None) -> Tensor:
    """Returns the squared errors of fastbert and of eager, and the squared reference, (3,)."""
    like = next((x for x in (exact, ours, eager) if x is not None), None)
    if like is None:
        return torch.zeros(3, dtype=torch.float64, device="cpu")
    zeros = torch.zeros(like.shape, dtype=torch.float64, device="cpu")
    a, b, c = (zeros if x is None else x.detach().to("cpu", torch.float64) for x in (ours, eager, exact))
    if padding_row is not None:
        keep = torch.arange(len(zeros)) != padding_row
        a, b, c = a[keep], b[keep], c[keep]
    return torch.stack([(a - c).square().sum(), (b - c).square().sum(), c.square().sum()])


def _reports(
    measures: Mapping[str, Tensor], parameters: Mapping[str, Tensor], missing: set[str], labels: Mapping[str, str],
    prefix: str,
) -> tuple[tuple[GradientReport, ...], tuple[GradientReport, ...], GradientReport]:  # fmt: skip
    """Returns the reports of parameters and of parts, in the order of the backward pass, and the report of all.

    labels: the names of parameters in the report.
    """
    names_of: dict[str, list[str]] = {}
    for name in reversed(list(parameters)):
        names_of.setdefault(_part(name), []).append(name)
    of_parameters: list[GradientReport] = []
    of_parts: list[GradientReport] = []
    for part, names in names_of.items():
        of_part = _part_report(f"{prefix}{part}", names, parameters, measures)
        of_parts.append(of_part)
        scale = math.sqrt(float(sum(measures[name][2] for name in names)) / of_part.n_values)
        for name in names:
            is_missing = name in missing
            report = _parameter_report(labels[name], of_part, parameters[name], measures[name], scale, is_missing)
            of_parameters.append(report)
    return tuple(of_parameters), tuple(of_parts), _part_report(ALL, list(parameters), parameters, measures)


def _part(name: str) -> str:
    """Returns the part of the model that a parameter belongs to: "encoder.layer.3", "embeddings", "pooler"."""
    words = name.split(".")
    return ".".join(words[:3]) if name.startswith("encoder.layer.") else words[0]


def _part_report(
    label: str, names: Sequence[str], parameters: Mapping[str, Tensor], measures: Mapping[str, Tensor]
) -> GradientReport:
    n_values = sum(parameters[name].numel() for name in names)
    ours, eager, scale = torch.stack([measures[name] for name in names]).sum(0).sqrt().tolist()
    error, eager_error = (x / (scale or 1.0) for x in (ours, eager))
    bound = _bound(eager_error, parameters[names[0]].dtype)
    return GradientReport(label, label, n_values, math.isfinite(error), _number(error), _number(eager_error), bound)


def _parameter_report(
    name: str, part: GradientReport, parameter: Tensor, squares: Tensor, scale_of_part: float, missing: bool
) -> GradientReport:
    n_values, dtype = parameter.numel(), parameter.dtype
    ours, eager, scale = (math.sqrt(float(x) / n_values) for x in squares)
    if scale <= ZERO * scale_of_part:
        scale = scale_of_part
    error, eager_error = (x / (scale or 1.0) for x in (ours, eager))
    bound = max(_bound(eager_error, dtype), part.bound)
    if dtype != torch.float64 and math.isfinite(eager_error):
        bound *= FACTOR_OF_ONE_PARAMETER_32 if dtype.itemsize > 2 else FACTOR_OF_ONE_PARAMETER_16
    is_finite = math.isfinite(error)
    values = _number(error), _number(eager_error), bound
    return GradientReport(name, part.name, n_values, is_finite, *values, missing=missing and error > 0)


def _bound(eager_error: float, dtype: torch.dtype) -> float:
    if dtype == torch.float64:
        return BOUND_IN_FLOAT64
    if not math.isfinite(eager_error):
        return BOUND_WITHOUT_EAGER
    floor = FLOOR_OF_GRADIENTS_32 if dtype.itemsize > 2 else FLOOR_OF_GRADIENTS_16
    return FACTOR * eager_error + floor * torch.finfo(dtype).eps


def _number(value: float) -> float:
    return value if math.isfinite(value) else math.nan


@contextmanager
def as_in_training(*roots: nn.Module) -> Iterator[None]:
    """Puts all modules into training mode with dropout probability 0, and restores the state afterwards.

    It also restores the states of PyTorch's generators. It does not call `train()`, which would clear tensors that
    modules derive from their weights.
    """
    modules = {module: module.training for root in roots for module in root.modules()}
    dropouts: dict[Any, float] = {module: module.p for module in modules if isinstance(module, nn.Dropout)}
    devices = {p.device for root in roots for p in root.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng([device.index or 0 for device in devices]):
        try:
            for module in modules:
                module.training = True
            for module in dropouts:
                module.p = 0.0
            yield
        finally:
            for module, p in dropouts.items():
                module.p = p
            for module, mode in modules.items():
                module.training = mode
