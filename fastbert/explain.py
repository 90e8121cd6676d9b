"""What would run, and why: for every operation of a model its backend, kernel, block sizes and fallback reason.

Nothing runs on data. `explain` asks the same questions that the operations ask when they run.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from fastbert.model import BertAddNorm, BertLayer, BertModel, BertPooler, is_plain
from fastbert.ops import Policy, attention, dispatch, embedding, gelu, layer_norm, linear, pooling
from fastbert.ops.dispatch import Decision
from fastbert.pretrained import PreTrainedModel

__all__ = ["OpReport", "Report", "explain"]

_HEADS = ("cls.seq_relationship", "classifier", "qa_outputs")
_MODULE = "module"  # stands for a backend where a module is called as it is


@dataclass(frozen=True)
class OpReport:
    """One operation. `module` is where it stands in the model, a range of layers together: "encoder.layer.0-5".

    shapes: in words, T packed tokens and B sequences. backend: "triton", "cpu", "torch", or "module" for a module that
    is called as it is. kernel: what that backend runs. block_sizes: of a Triton kernel, warps and stages among them.
    source: where the choice of GEMM and the block sizes came from. reason: why the backend asked for does not run it;
    `raises` says that strict=True makes this an error.
    """

    op: str
    module: str
    shapes: str
    backend: str
    kernel: str
    block_sizes: dict[str, int] | None = None
    source: str | None = None
    reason: str | None = None
    raises: bool = False


@dataclass(frozen=True)
class Report:
    """What `explain` found: the operations in the order in which they run. `str(report)` is a table."""

    model: str
    device: str
    dtype: str
    backend: str
    strict: bool
    rows: tuple[OpReport, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The same as dicts, lists, strings, numbers and None, for JSON."""
        d = dataclasses.asdict(self)
        return {**d, "rows": list(d["rows"]), "notes": list(d["notes"])}

    def __str__(self) -> str:
        remarks: dict[str, int] = {}  # remark -> its number, so that one that many rows share is printed once
        table = [("op", "module", "shapes", "backend", "kernel", "")]
        for row in self.rows:
            numbers = [f"[{remarks.setdefault(text, len(remarks) + 1)}]" for text in _remarks(row)]
            table.append((row.op, row.module, row.shapes, row.backend, row.kernel, " ".join(numbers)))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
        strict = ", strict" if self.strict else ""
        head = f"{self.model} on {self.device}, {self.dtype}, backend {self.backend!r}{strict}"
        numbered = [f"[{number}] {text}" for text, number in remarks.items()]
        return "\n".join([head, "", *(line.rstrip() for line in lines), "", *numbered, *self.notes]).rstrip()


def _remarks(row: OpReport) -> Iterator[str]:
    if row.reason is not None:
        what = "raises BackendError" if row.raises else "not what was asked for"
        yield row.reason if row.backend == _MODULE else f"{what}: {row.reason}"
    if row.block_sizes is not None:
        yield f"{' '.join(f'{name}={size}' for name, size in row.block_sizes.items())}: {row.source}"
    elif row.source is not None:
        yield row.source


def explain(
    model: Any,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
    strict: bool | None = None,
    arch: int | None = None,
) -> Report:
    """Which backend and kernel would run each operation of the model, with which block sizes, and why.

    model: a BertModel, a model with a head, a SentenceEncoder, or a module that wraps one. The model's device, dtype,
    backend, strictness and training mode count, and autocast where it is on; the keywords ask what would be if one of
    the first four were another. arch: compute capability of a GPU as one integer, 90 for 9.0, which need not be there;
    its block sizes are shown on a machine without any.

    Raises TypeError for what is no such model, ValueError for a device that is not there or an arch that is none.
    Never raises or logs because of a fallback: under strict, `raises` of its row says that running would.
    """
    inner = find_model(model)
    policy = Policy(
        inner.policy.backend if backend is None else backend, inner.policy.strict if strict is None else strict
    )
    where = _device(inner.device if device is None and arch is None else torch.device(device or "cuda"), arch)
    dtype = inner.dtype if dtype is None else dtype
    rows = tuple(_Explainer(inner, policy, where, dtype, arch).rows(model))
    notes = []
    if inner.config.extra.get("output_attentions"):
        notes.append("config.output_attentions is set: the slow reference path runs instead, padded and unfused")
    if dtype == torch.float32 and where.type == "cuda":
        tf32 = torch.backends.cuda.matmul.allow_tf32
        notes.append(f"float32 multiplies in {'TF32' if tf32 else 'IEEE float32'} (PyTorch's own switch)")
    capability = "" if arch is None else f" of compute capability {arch / 10}"
    return Report(
        type(model).__name__, f"{where}{capability}", str(dtype).removeprefix("torch."), policy.backend,
        policy.strict, rows, tuple(notes),
    )  # fmt: skip


def find_model(model: Any) -> PreTrainedModel:
    """The model of this library that was given, or that is inside: of a SentenceEncoder or of a wrapper module."""
    inner = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    if isinstance(inner, nn.Module):
        for module in inner.modules():
            if isinstance(module, PreTrainedModel):
                return module
    raise TypeError(f"model: expected a BertModel, a model with a head or a SentenceEncoder, got {type(model).__name__}")


def _device(device: torch.device, arch: int | None) -> torch.device:
    if arch is not None:
        if isinstance(arch, bool) or not isinstance(arch, int) or not 30 <= arch < 1000:
            raise ValueError(f"arch: expected a compute capability as one integer, 90 for 9.0, got {arch!r}")
        if device.type != "cuda":
            raise ValueError(f"arch: asks about a GPU, but device is {str(device)!r}")
    elif device.type == "cuda":
        n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= n_gpus:
            hint = "arch=90, for example, asks about a GPU that is not there"
            raise ValueError(f"device: got {str(device)!r}, but this machine has {n_gpus} GPUs; {hint}")
    elif device.type == "meta":
        raise ValueError("device: the model is on 'meta', where nothing runs; pass device= or arch=")
    return device


@dataclass(frozen=True)
class _Operand:
    """Stands for a tensor where an op asks what it has in its way: `dispatch.dtype_obstacle` looks at these two."""

    dtype: torch.dtype
    device: torch.device


class _Explainer:
    """Walks through a model as its forward does, and asks at each op."""

    def __init__(
        self, model: PreTrainedModel, policy: Policy, device: torch.device, dtype: torch.dtype, arch: int | None
    ) -> None:
        self.model, self.policy, self.device, self.dtype, self.arch = model, policy, device, dtype, arch
        self.config = model.config
        self.cast = None if dtype == model.dtype else dtype
        self.hidden: Any = _Operand(dtype, device)  # the (T, H) that layers pass on

    def operand(self, tensor: torch.Tensor | None) -> Any:
        """What the tensor would be on the device and in the dtype asked about."""
        return None if tensor is None else _Operand(self.cast or tensor.dtype, self.device)

    def decide(self, op: str, obstacle: str | None) -> Decision:
        if self.arch is None or self.policy.backend not in ("auto", "triton"):
            return dispatch.decide(op, self.policy, self.device, obstacle)
        # A GPU that need not be there: dispatch cannot look at it.
        unavailable = None
        if importlib.util.find_spec("triton") is None:
            unavailable = "the package triton is not installed"
        elif self.arch < 80:
            unavailable = f"the kernels need compute capability 8.0, and this GPU has {self.arch / 10}"
        reason = unavailable or obstacle
        return Decision(op, "triton") if reason is None else Decision(op, "torch", reason)

    def block_sizes(self, config: str, *args: Any) -> tuple[dict[str, int], str]:
        """The block sizes that a function of fastbert_kernels.launch gives, and in words where they came from."""
        from fastbert_kernels import launch

        if config in ("linear_config", "attention_config"):
            args = (*args, launch.arch(self.device) if self.arch is None else self.arch)
        found = getattr(launch, config)(*args)
        if isinstance(found, launch.Config):
            return found.block_sizes, found.source
        return found, f"formula of fastbert_kernels.launch.{config}"

    def row(
        self,
        module: str,
        shapes: str,
        decision: Decision,
        kernels: Mapping[str, str],
        config: tuple[Any, ...],
        kernel: str | None = None,
        choice: str | None = None,
    ) -> OpReport:
        """The row of an op that is dispatched. config: a function of launch and its arguments but for arch."""
        block_sizes, source = None, None
        if decision.backend == "triton":
            block_sizes, source = self.block_sizes(*config)
            source = source if choice is None else f"{source}; {choice}"
        return OpReport(
            decision.op, module, shapes, decision.backend,
            kernel or kernels.get(decision.backend, kernels["torch"]), block_sizes, source,
            decision.reason, decision.reason is not None and self.policy.strict,
        )  # fmt: skip

    def gemm(self, name: str, module: nn.Module, shapes: str) -> OpReport:
        """A linear without an activation: PyTorch's GEMM on every backend, so that there is nothing to fall back to."""
        if not is_plain(module):
            return self.called(name, module, shapes)
        backend = self.decide("linear", dispatch.dtype_obstacle(self.hidden)).backend
        kernel = linear.KERNELS["torch"] + (" (cuBLAS)" if self.device.type == "cuda" else "")
        choice = linear.gemm_kernel(self.dtype, "none")[1] if backend == "triton" else None
        return OpReport("linear", name, shapes, backend, kernel, source=choice)

    def called(self, name: str, module: nn.Module, shapes: str) -> OpReport:
        kind = type(module)
        if kind is nn.Linear:
            reason = "the module has forward hooks, so it is called rather than its weight used"
        else:
            reason = "the module is no plain torch.nn.Linear, so it is called rather than its weight used"
        return OpReport("linear", name, shapes, _MODULE, f"{kind.__module__}.{kind.__qualname__}", reason=reason)

    def rows(self, given: Any) -> Iterator[OpReport]:
        bert: BertModel = self.model if isinstance(self.model, BertModel) else self.model.get_submodule("bert")  # type: ignore[assignment]
        prefix = "" if bert is self.model else "bert."
        yield self.embeddings(f"{prefix}embeddings", bert)
        yield from self.encoder(f"{prefix}encoder.layer", bert)
        if bert.pooler is not None:
            yield from self.pooler(f"{prefix}pooler", bert.pooler)
        if bert is not self.model:
            yield from self.head()
        if given is not self.model and not isinstance(given, nn.Module):
            yield from self.sentence(given)

    def embeddings(self, name: str, bert: BertModel) -> OpReport:
        part, h = bert.embeddings, self.config.hidden_size
        norm = part.LayerNorm
        tensors = [
            table.weight for table in (part.word_embeddings, part.token_type_embeddings, part.position_embeddings)
        ]
        why_not = embedding.obstacle(h, *map(self.operand, (*tensors, norm.weight, norm.bias)))
        decision = self.decide("embedding", why_not)
        return self.row(name, f"(T,) ids -> (T, {h})", decision, embedding.KERNELS, ("rowwise_config", h))

    def encoder(self, name: str, bert: BertModel) -> Iterator[OpReport]:
        """The layers, neighbours that run alike together."""
        explained = [list(self.layer(layer)) for layer in bert.encoder.layer]  # type: ignore[arg-type]
        for rows, group in itertools.groupby(range(len(explained)), lambda i: explained[i]):
            same = list(group)
            numbers = f"{same[0]}-{same[-1]}" if len(same) > 1 else f"{same[0]}"
            yield from (dataclasses.replace(row, module=f"{name}.{numbers}.{row.module}") for row in rows)

    def layer(self, layer: BertLayer) -> Iterator[OpReport]:
        h, i, part = self.config.hidden_size, self.config.intermediate_size, layer.attention.self
        projections = {"query": part.query, "key": part.key, "value": part.value}
        if all(is_plain(projection) for projection in projections.values()):
            names = "attention.self.query+key+value"
            yield self.gemm(names, part.query, f"(T, {h}) -> (T, {3 * h}), + bias")
        else:
            for name, projection in projections.items():
                yield self.gemm(f"attention.self.{name}", projection, f"(T, {h}) -> (T, {h}), + bias")
        n_heads, d = self.config.num_attention_heads, self.config.head_size
        why_not = attention.obstacle(d, self.hidden, part.dropout.p if part.training else 0.0)
        shapes = f"(T, {3 * h}) -> (T, {h}), {n_heads} heads of {d}"
        config = ("attention_config", self.dtype, d)
        yield self.row("attention.self", shapes, self.decide("attention", why_not), attention.KERNELS, config)
        yield from self.add_norm("attention.output", layer.attention.output, h)
        intermediate = layer.intermediate
        shape = f"(T, {h}) -> (T, {i})"
        yield from self.dense("intermediate.dense", intermediate.dense, intermediate.activation, shape)
        yield from self.add_norm("output", layer.output, i)

    def add_norm(self, name: str, part: BertAddNorm, in_features: int) -> Iterator[OpReport]:
        """LayerNorm(dropout(dense(x)) + residual), as ops.linear_residual_layer_norm does it."""
        h, norm, dense, x = self.config.hidden_size, part.LayerNorm, part.dense, self.hidden
        plain = is_plain(dense)
        tensors = (dense.weight, dense.bias) if plain else ()
        operands = map(self.operand, (*tensors, norm.weight, norm.bias))
        dropout_p = part.dropout.p if part.training else 0.0
        decision = self.decide("layer_norm", layer_norm.obstacle(h, x, *operands, dropout_p=dropout_p))
        bias_later = plain and decision.backend == "triton"
        shapes = f"(T, {in_features}) -> (T, {h})"
        yield self.gemm(f"{name}.dense", dense, shapes if bias_later else f"{shapes}, + bias")
        shapes = f"(T, {h}) -> (T, {h}), {'+ bias ' if bias_later else ''}+ residual"
        yield self.row(f"{name}.LayerNorm", shapes, decision, layer_norm.KERNELS, ("rowwise_config", h))

    def dense(self, name: str, module: nn.Linear, activation: str, shape: str) -> Iterator[OpReport]:
        """activation(module(x)), as fastbert.model.dense does it."""
        if activation == "none":
            yield self.gemm(name, module, f"{shape}, + bias")
            return
        no_kernel, config = gelu.activation_obstacle(activation), ("elementwise_config", int(module.out_features))
        shapes = f"{shape}, + bias, {activation}"
        if not is_plain(module):
            yield self.called(name, module, f"{shape}, + bias")
            decision = self.decide("bias_gelu", dispatch.dtype_obstacle(self.hidden) or no_kernel)
            yield self.activation(name, activation, decision, config)
            return
        operands = self.hidden, self.operand(module.weight), self.operand(module.bias)
        decision = self.decide("linear", dispatch.dtype_obstacle(*operands) or no_kernel)
        kernel, choice = linear.gemm_kernel(self.dtype, activation)
        if decision.backend != "triton":
            applied = "relu" if activation == "relu" else "gelu"
            kernel = f"{linear.KERNELS['torch']}, torch.nn.functional.{applied}"
            yield self.row(name, shapes, decision, linear.KERNELS, config, kernel=kernel)
        elif kernel == "fastbert":
            config = ("linear_config", self.dtype)
            yield self.row(name, shapes, decision, linear.KERNELS, config, choice=choice)
        else:
            row = self.gemm(name, module, shape)
            yield dataclasses.replace(row, source=choice)
            yield self.activation(name, f"+ bias, {activation}", dataclasses.replace(decision, op="bias_gelu"), config)

    def activation(self, name: str, what: str, decision: Decision, config: tuple[Any, ...]) -> OpReport:
        width = config[1]
        return self.row(name, f"(T, {width}) -> (T, {width}), {what}", decision, gelu.KERNELS, config)
