"""What would run, and why: for every operation of a model its backend, kernel, block sizes and fallback reason.

Nothing runs on data. `explain` asks the same questions that the operations ask when they run.
T packed tokens, B sequences.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import itertools
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastbert import cpu_encoder, graphs, quantized
from fastbert.model import BertAddNorm, BertLayer, BertModel, BertPooler, BertSelfAttention, is_bare, is_plain
from fastbert.ops import Policy, attention, dispatch, embedding, gelu, layer_norm, packed_linear, pooling
from fastbert.ops.dispatch import Decision
from fastbert.ops.linear import KERNELS as LINEAR_KERNELS
from fastbert.ops.linear import gemm_kernel
from fastbert.ops.quantized import DTYPES as QUANTIZED_DTYPES
from fastbert.ops.quantized import KERNELS as QUANTIZED_KERNELS
from fastbert.ops.quantized import OUT_GROUP
from fastbert.pretrained import PreTrainedModel, resolve_dtype
from fastbert.sentence import SentenceEncoder
from fastbert.sentence_layout import POOLING_MODES, Normalize
from fastbert_kernels import cpu

__all__ = ["OpReport", "Report", "explain"]

PACKED = "where no gradients are needed"
_MODULE = "module"  # stands for a backend where a module is called as it is


@dataclass(frozen=True)
class OpReport:
    """One operation. module: where it stands in the model, equal layers together: "encoder.layer.0-5.output.dense".

    shapes: in words. backend: "triton", "cpu", "torch", or "module" for a module that is called as it is. kernel: what
    that backend runs. block_sizes: of a Triton kernel, with its warps and stages. source: where the block sizes and the
    choice of GEMM came from. reason: why it is not the backend asked for, or why the module is called; `raises` says
    that strict=True makes a BackendError of it. launches: of kernels on a GPU, each time; None where PyTorch decides.
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
    launches: int | None = None

    def remarks(self) -> Iterator[str]:
        if self.reason is not None:
            fallback = "raises BackendError: " if self.raises else "falls back: "
            yield self.reason if self.backend == _MODULE else fallback + self.reason
        if self.block_sizes is not None:
            yield f"{' '.join(f'{name}={size}' for name, size in self.block_sizes.items())}: {self.source}"
        elif self.source is not None:
            yield self.source


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
    batch_invariant: bool = False
    precision: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The same as dicts, lists, strings, numbers and None, for JSON."""
        rows = [dataclasses.asdict(row) for row in self.rows]
        return {**dataclasses.asdict(self), "rows": rows, "notes": list(self.notes)}

    def __str__(self) -> str:
        remarks: dict[str, int] = {}  # remark -> its number; what many rows share is printed once
        table = [("op", "module", "shapes", "backend", "kernel", "")]
        for row in self.rows:
            numbers = [f"[{remarks.setdefault(remark, len(remarks) + 1)}]" for remark in row.remarks()]
            kernel = row.kernel.replace("torch.nn.functional.", "F.")
            table.append((row.op, row.module, row.shapes, row.backend, kernel, " ".join(numbers)))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
        head = f"{self.model} on {self.device}, {self.dtype}, backend {self.backend!r}{', strict' * self.strict}"
        head += ", batch-invariant" * self.batch_invariant
        head += f", precision {self.precision!r}" if self.precision is not None else ""
        numbered = [f"[{number}] {remark}" for remark, number in remarks.items()]
        return "\n".join([head, "", *(line.rstrip() for line in lines), "", *numbered, *self.notes]).rstrip()


def explain(
    model: Any,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    backend: str | None = None,
    strict: bool | None = None,
    arch: int | None = None,
) -> Report:
    """Which backend and kernel would run each operation of the model, with which block sizes, and why.

    model: a BertModel, a model with a head, a SentenceEncoder, or a module that wraps one. Its device, dtype, backend,
    strictness and training mode count, and autocast where it is on; the keywords ask what would be if the first four
    were others. arch: compute capability of a GPU as one integer, 90 for 9.0, which need not be there.

    Raises TypeError for what is no such model, ValueError for a device that is not there or an argument that is none.
    Neither raises nor logs because of a fallback: under strict, `raises` of its row says that running would.
    """
    inner = find_model(model)
    wanted = inner.policy
    policy = Policy(
        wanted.backend if backend is None else backend,
        wanted.strict if strict is None else strict,
        wanted.batch_invariant,
    )
    where = _device(inner.device if device is None and arch is None else torch.device(device or "cuda"), arch)
    cast = None if dtype is None else resolve_dtype(dtype, inner.config, {})
    explainer = _Explainer(inner, policy, where, cast, arch)
    rows = tuple(explainer.rows(model))
    dtype = inner.dtype if cast is None else cast
    notes = []
    if explainer.eight_bit is not None and explainer.eight_bit.reason is not None:
        unquantised = explainer.eight_bit.backend == quantized.UNQUANTISED
        instead = "falls back to the unquantised path" if unquantised else "falls back to the C++ kernels for CPUs"
        instead = "running raises BackendError" if policy.strict else instead
        notes.append(f"precision {inner.precision!r}: {instead}: {explainer.eight_bit.reason}")
    if inner.precision is not None and inner.training:
        notes.append(f"precision {inner.precision!r} is for inference: running in training mode raises RuntimeError")
    if inner.config.extra.get("output_attentions"):
        instead = "running raises BackendError" if policy.strict else "the slow reference path runs instead"
        notes.append(f"config.output_attentions is set, and fused attention keeps no probabilities: {instead}")
    notes += _launch_notes(rows, inner, where)
    in_int8 = explainer.eight_bit is not None and explainer.eight_bit.backend == "cpu"
    notes += _one_call(inner, policy, where, dtype, in_int8)
    if dtype == torch.float32 and where.type == "cuda":
        notes.append(f"float32 multiplies in {float32_precision()}: PyTorch's own switch")
    return Report(
        model=type(model).__name__,
        device=str(where) if arch is None else f"{where} of compute capability {arch / 10}",
        dtype=str(dtype).removeprefix("torch."),
        backend=policy.backend,
        strict=policy.strict,
        rows=rows,
        notes=tuple(notes),
        batch_invariant=policy.batch_invariant,
        precision=inner.precision,
    )


def _launch_notes(rows: Iterable[OpReport], model: PreTrainedModel, device: torch.device) -> Iterator[str]:
    """How many kernels the encoder launches, and whether as one. Where cuBLAS splits a GEMM along K it adds another."""
    n_layers, in_layers, others = model.config.num_hidden_layers, 0, 0
    for row in rows:
        _, in_layer, name = row.module.partition("encoder.layer.")
        if not in_layer and row.op != "embedding":
            continue
        if row.launches is None:
            return
        if in_layer:
            first, _, last = name.partition(".")[0].partition("-")
            in_layers += row.launches * (int(last or first) - int(first) + 1)
        else:
            others += row.launches
    yield f"launches: {in_layers / n_layers:.3g} kernels a layer, {in_layers + others} from ids to last hidden state"
    if device.type != "cuda":
        return
    with torch.no_grad():
        bert = backbone(model)
        why_not = bert.graph_obstacle() if bert.device == device else bert.graphs_refused()
    if why_not is None and not bert.cuda_graphs:
        why_not = "the model's cuda_graphs is False"
    inside = f"a batch of up to {graphs.LARGEST} tokens is one launch, without gradients"
    yield f"CUDA graphs: {inside if why_not is None else f'none: {why_not}'}"


def _one_call(
    model: PreTrainedModel, policy: Policy, device: torch.device, dtype: torch.dtype, in_int8: bool
) -> Iterator[str]:
    """Whether the encoder's operations on a CPU run in one call. in_int8: as precision="int8" runs there."""
    if device.type != "cpu":
        return
    bert = backbone(model)
    why_not = None if in_int8 else cpu_encoder.obstacle(model.config, dtype, policy, device)
    if not in_int8 and why_not is None and bert.device == device and bert.dtype == dtype:
        with torch.no_grad():
            why_not = bert.cpu_encoder_obstacle()
    inside = "without gradients, the encoder's operations run in one call of fastbert_kernels.cpu"
    yield f"one call: {inside if why_not is None else f'no: {why_not}'}"


def find_model(model: Any) -> PreTrainedModel:
    """The model of this library that was given, or that is inside: of a SentenceEncoder or of a wrapper module."""
    if isinstance(model, nn.Module):
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                return module
    expected = "a BertModel, a model with a head or a SentenceEncoder"
    raise TypeError(f"model: expected {expected}, got {type(model).__name__}")


def backbone(model: PreTrainedModel) -> BertModel:
    """The encoder: the model itself, or `bert` of a model with a head."""
    bert = model if isinstance(model, BertModel) else model.get_submodule("bert")
    assert isinstance(bert, BertModel)
    return bert


def prefix_of(module: nn.Module, inside: nn.Module) -> str:
    """What stands before the names of the module's parameters in `inside`, such as "bert."."""
    name = next(name for name, found in inside.named_modules() if found is module)
    return f"{name}." if name else ""


def float32_precision() -> str:
    """How CUDA multiplies float32, as PyTorch's switch says; from PyTorch 2.9 on it has a new name."""
    matmul = torch.backends.cuda.matmul
    tf32 = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "TF32" if tf32 else "IEEE float32"


def _device(device: torch.device, arch: int | None) -> torch.device:
    if arch is not None:
        if isinstance(arch, bool) or not isinstance(arch, int) or not 30 <= arch < 1000:
            raise ValueError(f"arch: expected a compute capability as one integer, 90 for 9.0, got {arch!r}")
        if device.type != "cuda":
            raise ValueError(f"arch: asks about an NVIDIA GPU, but device is {str(device)!r}")
    elif device.type == "cuda":
        n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= n_gpus:
            hint = "arch=90, for example, asks about one that is not there"
            raise ValueError(f"device: got {str(device)!r}, but there are {n_gpus} GPUs; {hint}")
    elif device.type == "meta":
        raise ValueError("device: the model is on 'meta', where nothing runs; pass device= or arch=")
    return device


@dataclass(frozen=True)
class _Operand:
    """Stands for a tensor where an op is asked what is in its way: `dispatch.dtype_obstacle` looks at these two."""

    dtype: torch.dtype
    device: torch.device


class _Explainer:
    """Walks through a model as its forward does, and asks at each op.

    cast: the dtype asked about, None for that of each parameter. arch: that of a GPU which need not be there, or None.
    """

    def __init__(
        self, model: PreTrainedModel, policy: Policy, device: torch.device, cast: torch.dtype | None, arch: int | None
    ) -> None:
        self.model, self.policy, self.device, self.cast, self.arch = model, policy, device, cast, arch
        self.config = model.config
        self.dtype = cast or model.dtype
        self.hidden: Any = _Operand(self.dtype, device)  # the (T, H) that layers pass on
        self.stacked: dict[nn.Module, int] = {}  # the first of projections that are multiplied as one -> how many
        # What would run the encoder in 8 bits, None where nothing asks for that.
        self.eight_bit: Decision | None = None
        if model.precision is not None:
            self.eight_bit = quantized.decide(backbone(model), policy, device, self.dtype, arch)

    def rows(self, given: Any) -> Iterator[OpReport]:
        bert = backbone(self.model)
        prefix = prefix_of(bert, given)
        if self.eight_bit is not None and self.eight_bit.backend != quantized.UNQUANTISED:
            yield from self.quantized(prefix, bert, self.eight_bit.backend)
        else:
            yield from self.embeddings(f"{prefix}embeddings", bert)
            yield from self.encoder(f"{prefix}encoder.layer", bert)
        if isinstance(given, SentenceEncoder):  # which has no use for BERT's own pooler
            yield from self.sentence(given)
            return
        if bert.pooler is not None:
            yield from self.pooler(f"{prefix}pooler", bert.pooler)
        if bert is not self.model:
            yield from self.head(prefix_of(self.model, given))

    def embeddings(self, name: str, bert: BertModel) -> Iterator[OpReport]:
        part, h, shapes = bert.embeddings, self.config.hidden_size, f"(T,) ids -> (T, {self.config.hidden_size})"
        words: nn.Module = part.word_embeddings
        bare = is_bare(words, nn.Embedding)
        if not bare:
            reason = "the module is called as it is: it is an adapter, or has hooks"
            yield OpReport("embedding", f"{name}.word_embeddings", shapes, _MODULE, _class_of(words), reason=reason)
        tables = [table.weight for table in (part.token_type_embeddings, part.position_embeddings)]
        tables.append(part.word_embeddings.weight if bare else self.hidden)
        operands = map(self.operand, (*tables, part.LayerNorm.weight, part.LayerNorm.bias))
        decision = self.decide("embedding", embedding.obstacle(h, *operands))
        yield self.row(name, shapes, decision, embedding.KERNELS, ("rowwise_config", h))

    def encoder(self, name: str, bert: BertModel) -> Iterator[OpReport]:
        """The layers, neighbours that run alike together."""
        layers = [list(self.layer(layer)) for layer in bert.encoder.layer if isinstance(layer, BertLayer)]
        for rows, group in itertools.groupby(range(len(layers)), lambda i: layers[i]):
            first, *others = group
            numbers = f"{first}-{others[-1]}" if others else f"{first}"
            yield from (dataclasses.replace(row, module=f"{name}.{numbers}.{row.module}") for row in rows)

    def quantized(self, prefix: str, bert: BertModel, backend: str) -> Iterator[OpReport]:
        """Embeddings and layers as fastbert.quantized.encode runs them; all layers run alike."""
        config, precision = self.config, bert.precision or ""
        h, i, d, last = config.hidden_size, config.intermediate_size, config.head_size, config.num_hidden_layers - 1
        q = f"(T, {h}) {precision}"
        layers = f"{prefix}encoder.layer.{f'0-{last}' if last else '0'}"

        def row(op: str, module: str, shapes: str, kernels: Mapping[str, str], *sizes: Any) -> OpReport:
            found = self.row(module, shapes, Decision(op, backend), kernels, sizes)
            if backend != "cpu":
                return found
            return dataclasses.replace(found, kernel=f"fastbert_kernels.cpu, {cpu.instructions()}")

        def gemm(module: str, shapes: str, group: int | None) -> OpReport:
            sizes = "quantized_linear_config", QUANTIZED_DTYPES[precision], group
            return row("quantized_linear", f"{layers}.{module}", shapes, QUANTIZED_KERNELS, *sizes)

        rowwise = "rowwise_config", h
        ids = f"(T,) ids -> (T, {h}) and {q}"
        yield row("embedding", f"{prefix}embeddings", ids, embedding.KERNELS, *rowwise)
        yield gemm("attention.self.query+key+value", f"{q} -> (T, {3 * h}), + bias", None)
        shapes = f"(T, {3 * h}) -> {q}, {config.num_attention_heads} heads of {d}"
        sizes = "attention_config", self.dtype, d
        yield row("attention", f"{layers}.attention.self", shapes, attention.KERNELS, *sizes)
        yield gemm("attention.output.dense", f"{q} -> (T, {h})", d if d < h else None)
        shapes = f"(T, {h}) -> (T, {h}) and {q}, + bias + residual"
        yield row("layer_norm", f"{layers}.attention.output.LayerNorm", shapes, layer_norm.KERNELS, *rowwise)
        activation = quantized.layers_of(bert)[0].intermediate.activation
        yield gemm("intermediate.dense", f"{q} -> (T, {i}) {precision}, + bias, {activation}", None)
        yield gemm("output.dense", f"(T, {i}) {precision} -> (T, {h})", OUT_GROUP if i > OUT_GROUP else None)
        shapes = shapes.replace(q, f"{q} (the last layer's without)")
        yield row("layer_norm", f"{layers}.output.LayerNorm", shapes, layer_norm.KERNELS, *rowwise)

    def layer(self, layer: BertLayer) -> Iterator[OpReport]:
        h, i, part = self.config.hidden_size, self.config.intermediate_size, layer.attention.self
        projections = {"query": part.query, "key": part.key, "value": part.value}
        if all(is_plain(projection) for projection in projections.values()):
            name = f"attention.self.{'+'.join(projections)}"
            self.stacked[part.query] = 3
            yield self.gemm(name, part.query, f"(T, {h}) -> (T, {3 * h}), + bias")
        else:
            for name, projection in projections.items():
                yield self.gemm(f"attention.self.{name}", projection, f"(T, {h}) -> (T, {h}), + bias")
        n_heads, d = self.config.num_attention_heads, self.config.head_size
        why_not = attention.obstacle(d, self.hidden, part.dropout.p if part.training else 0.0)
        shapes = f"(T, {3 * h}) -> (T, {h}), {n_heads} heads of {d}"
        config = ("attention_config", self.dtype, d)
        yield self.attention_row(shapes, self.decide("attention", why_not), config, part)
        yield from self.add_norm("attention.output", layer.attention.output, h)
        up = layer.intermediate
        yield from self.dense("intermediate.dense", up.dense, up.activation, f"(T, {h}) -> (T, {i})", i)
        yield from self.add_norm("output", layer.output, i)

    def attention_row(
        self, shapes: str, decision: Decision, config: tuple[Any, ...], part: BertSelfAttention
    ) -> OpReport:
        """The row of varlen_attention: on the cpu backend the C++ kernel, or why not."""
        row = self.row("attention.self", shapes, decision, attention.KERNELS, config)
        if decision.backend != "cpu":
            return row
        dropout_p = part.dropout.p if part.training else 0.0
        why_not = attention.cpu_obstacle(self.config.head_size, self.hidden, dropout_p)
        if why_not is None:
            return dataclasses.replace(row, kernel=f"fastbert_kernels.cpu, {cpu.instructions()}")
        return dataclasses.replace(row, source=f"PyTorch's: {why_not}")

    def add_norm(self, name: str, part: BertAddNorm, in_features: int) -> Iterator[OpReport]:
        """LayerNorm(dropout(dense(x)) + residual), as fastbert.model.BertAddNorm does it."""
        dense: nn.Module = part.dense
        plain = is_plain(dense)
        tensors = [dense.weight, dense.bias] if is_plain(dense) else []
        norm = self.norm(f"{name}.LayerNorm", part.LayerNorm, tensors, part.dropout.p if part.training else 0.0)
        bias_later = plain and norm.backend == "triton"
        shapes = f"(T, {in_features}) -> (T, {self.config.hidden_size})"
        which, choice = self.chosen(dense, "none", residual=True) if bias_later else ("cublas", None)
        if which == "fastbert":
            decision = Decision("linear", norm.backend)
            with_residual = f"{shapes}, + bias + residual"
            yield self.our_gemm(f"{name}.dense", with_residual, decision, dense, "residual", choice)
            yield norm
            return
        row = self.gemm(f"{name}.dense", dense, shapes if bias_later else f"{shapes}, + bias", (choice,))
        if row.source == PACKED and not (part.training and part.dropout.p):
            yield dataclasses.replace(row, shapes=f"{shapes}, + bias + residual")
            yield norm
            return
        yield row
        yield dataclasses.replace(norm, shapes=f"{norm.shapes}, {'+ bias ' if bias_later else ''}+ residual")

    def norm(self, name: str, norm: nn.LayerNorm, tensors: list[Tensor], dropout_p: float = 0.0) -> OpReport:
        h = self.config.hidden_size
        operands = map(self.operand, (*tensors, norm.weight, norm.bias))
        why_not = layer_norm.obstacle(h, self.hidden, *operands, dropout_p=dropout_p)
        decision = self.decide("layer_norm", why_not)
        return self.row(name, f"(T, {h}) -> (T, {h})", decision, layer_norm.KERNELS, ("rowwise_config", h))

    def dense(self, name: str, module: nn.Module, activation: str, shapes: str, width: int) -> Iterator[OpReport]:
        """activation(module(x)) for an activation that is not "none", as fastbert.model.dense does it."""
        plain = is_plain(module)
        tensors = [module.weight, module.bias] if is_plain(module) else []
        why_not = dispatch.dtype_obstacle(self.hidden, *map(self.operand, tensors))
        decision = self.decide("linear" if plain else "bias_gelu", why_not or gelu.activation_obstacle(activation))
        on_triton = decision.backend == "triton"
        which, choice = self.chosen(module, activation) if plain and on_triton else ("cublas", None)
        both = f"{shapes}, + bias, {activation}"
        if which == "fastbert":
            yield self.our_gemm(name, both, decision, module, activation, choice)
        elif plain and not on_triton:
            row = self.row(name, both, decision, LINEAR_KERNELS, ())
            if self.packs(decision):
                kernel = str(packed_linear.kernel(self.dtype))
                yield dataclasses.replace(row, kernel=kernel, source=PACKED)
                return
            applied = "torch.nn.functional.relu" if activation == "relu" else "torch.nn.functional.gelu"
            yield dataclasses.replace(row, kernel=f"{LINEAR_KERNELS['torch']}, {applied}")
        else:
            yield self.gemm(name, module, shapes if plain else f"{shapes}, + bias", (choice,))
            shapes = f"(T, {width}) -> (T, {width}), {'+ bias, ' * plain}{activation}"
            decision = dataclasses.replace(decision, op="bias_gelu")
            yield self.row(name, shapes, decision, gelu.KERNELS, ("elementwise_config", width))

    def pool(self, name: str, what: str) -> OpReport:
        h = self.config.hidden_size
        decision = self.decide("pooling", pooling.obstacle(h, self.hidden))
        return self.row(name, f"(T, {h}) -> (B, {h}), {what}", decision, pooling.KERNELS, ("pooling_config", h))

    def pooler(self, name: str, pooler: BertPooler) -> Iterator[OpReport]:
        h = self.config.hidden_size
        yield self.pool(name, "cls")
        yield self.gemm(f"{name}.dense", pooler.dense, f"(B, {h}) -> (B, {h}), + bias, then tanh")

    def sentence(self, encoder: SentenceEncoder) -> Iterator[OpReport]:
        modes, tail = encoder.pooling.modes, list(enumerate(encoder.tail))
        normalized = len(modes) == 1 and bool(tail) and isinstance(tail[0][1], Normalize)
        for mode in modes:
            yield self.pool("pooling", f"{POOLING_MODES[mode]}{', L2 normalized' * normalized}, in float32")
        for i, module in tail[1:] if normalized else tail:
            name, shapes = type(module).__name__.lower(), "(B, ...) -> (B, ...)"
            kernels = {"dense": LINEAR_KERNELS, "layernorm": layer_norm.KERNELS, "normalize": pooling.KERNELS}
            if self.policy.batch_invariant and name in kernels:  # as fastbert.sentence_layout.apply does it
                yield OpReport(name, f"tail.{i}", shapes, "triton", kernels[name]["triton"])
            else:
                yield OpReport(name, f"tail.{i}", shapes, _MODULE, _class_of(module))

    def head(self, prefix: str) -> Iterator[OpReport]:
        h = self.config.hidden_size
        modules: dict[str, Any] = dict(self.model.named_modules())
        name = "cls.predictions.transform"
        if name in modules:
            dense, norm, activation = modules[f"{name}.dense"], modules[f"{name}.LayerNorm"], modules[name].activation
            yield from self.dense(f"{prefix}{name}.dense", dense, activation, f"(T, {h}) -> (T, {h})", h)
            yield self.norm(f"{prefix}{name}.LayerNorm", norm, [])
        # Without a pooler, the classifier and the two outputs of question answering are of tokens.
        pooled = "B" if backbone(self.model).pooler is not None else "T"
        rows = {"cls.predictions.decoder": "T", "cls.seq_relationship": "B", "classifier": pooled, "qa_outputs": pooled}
        for name, n in rows.items():
            if name in modules:
                width = getattr(modules[name], "out_features", "?")
                yield self.gemm(f"{prefix}{name}", modules[name], f"({n}, {h}) -> ({n}, {width}), + bias")

    def operand(self, tensor: Tensor | None) -> Any:
        """What the tensor would be on the device and in the dtype asked about."""
        return None if tensor is None else _Operand(self.cast or tensor.dtype, self.device)

    def decide(self, op: str, obstacle: str | None) -> Decision:
        if self.arch is None or self.policy.backend not in ("auto", "triton"):
            return dispatch.decide(op, self.policy, self.device, obstacle)
        # The GPU need not be there: dispatch could not look at it.
        unavailable = None
        if importlib.util.find_spec("triton") is None:
            unavailable = "the package triton is not installed"
        elif self.arch < 80:
            unavailable = f"the kernels need compute capability 8.0, and this GPU has {self.arch / 10}"
        reason = unavailable or obstacle
        return Decision(op, "triton") if reason is None else Decision(op, "torch", reason)

    def row(
        self, module: str, shapes: str, decision: Decision, kernels: Mapping[str, str], config: tuple[Any, ...]
    ) -> OpReport:
        """An op that is dispatched. config: a function of fastbert_kernels.launch, and its arguments but for arch."""
        block_sizes, source = self.block_sizes(*config) if decision.backend == "triton" else (None, None)
        return OpReport(
            op=decision.op,
            module=module,
            shapes=shapes,
            backend=decision.backend,
            kernel=kernels.get(decision.backend, kernels["torch"]),
            block_sizes=block_sizes,
            source=source,
            reason=decision.reason,
            raises=decision.reason is not None and self.policy.strict,
            launches=1 if decision.backend == "triton" else None,
        )

    def block_sizes(self, config: str, *args: Any) -> tuple[dict[str, int], str]:
        """The block sizes of a kernel, and in words where they came from."""
        from fastbert_kernels import launch

        if config in ("linear_config", "attention_config", "quantized_linear_config"):
            args = (*args, launch.arch(self.device) if self.arch is None else self.arch)
        found = getattr(launch, config)(*args)
        if isinstance(found, launch.Config):
            return dict(found.block_sizes), found.source
        return dict(found), f"formula of fastbert_kernels.launch.{config}"

    def our_gemm(
        self, name: str, shapes: str, decision: Decision, module: nn.Module, epilogue: str, choice: str | None
    ) -> OpReport:
        from fastbert_kernels import launch

        arch = launch.arch(self.device) if self.arch is None else self.arch
        gemm = launch.gemm(self.dtype, arch, self.gemm_shape(module), epilogue)
        sizes, source = dict(gemm.config.block_sizes), f"{choice}; {gemm.config.source}"
        kernel = f"fastbert_kernels.{gemm.ours}"
        return OpReport(
            decision.op, name, shapes, decision.backend, kernel, block_sizes=sizes, source=source, launches=1
        )

    def packs(self, decision: Decision) -> bool:
        """Whether the weights are packed, as fastbert.ops.linear asks."""
        return decision.backend == "cpu" and packed_linear.unavailable(self.dtype) is None

    def gemm_shape(self, module: nn.Module) -> tuple[int, int]:
        """(K, M) of the product; that of the three projections, which are one, if the module is the first of them."""
        weight: Any = module.weight
        return weight.shape[1], weight.shape[0] * self.stacked.get(module, 1)

    def chosen(self, module: nn.Module, activation: str, residual: bool = False) -> tuple[str, str]:
        """The GEMM that the triton backend takes, and why, as fastbert.ops.linear asks."""
        from fastbert_kernels import launch

        arch = launch.arch(self.device) if self.arch is None else self.arch
        how = {"residual": residual, "batch_invariant": self.policy.batch_invariant}
        return gemm_kernel(self.dtype, activation, self.gemm_shape(module), arch=arch, **how)

    def gemm(self, name: str, module: nn.Module, shapes: str, library: tuple[str | None] | None = None) -> OpReport:
        """A linear without an activation: where it is not our GEMM, PyTorch's, without a fallback to speak of.

        library: why it is PyTorch's, where that is settled.
        """
        if not is_plain(module):
            plain_linear = "it is without a bias, has hooks or a forward of its own"
            why = plain_linear if type(module) is nn.Linear else "it is not a plain torch.nn.Linear"
            reason = f"the module is called as it is: {why}"
            raises = self.policy.batch_invariant
            return OpReport("linear", name, shapes, _MODULE, _class_of(module), reason=reason, raises=raises)
        tensors = map(self.operand, (module.weight, module.bias))
        decision = self.decide("linear", dispatch.dtype_obstacle(self.hidden, *tensors))
        source = None if library is None else library[0]
        if library is None and decision.backend == "triton":
            which, choice = self.chosen(module, "none")
            if which == "fastbert":
                return self.our_gemm(name, shapes, decision, module, "none", choice)
            source = choice
        if self.packs(decision):
            kernel = str(packed_linear.kernel(self.dtype))
            return OpReport("linear", name, shapes, decision.backend, kernel, source=PACKED)
        kernel = LINEAR_KERNELS["torch"] + (" (cuBLAS)" if self.device.type == "cuda" else "")
        refused = library is None and self.policy.batch_invariant
        why_not = decision.reason if refused else None
        launches = 1 if decision.backend == "triton" else None
        return OpReport(
            "linear", name, shapes, decision.backend, kernel, source=source, launches=launches, reason=why_not,
            raises=refused,
        )  # fmt: skip


def _class_of(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


# `fastbert.explain` is a public function and this module: importing the module binds its name in the package.
class _CallableModule(types.ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Report:
        return explain(*args, **kwargs)


__signature__ = inspect.signature(explain)
sys.modules[__name__].__class__ = _CallableModule
