"""The operations of a model in the order in which they run, and for each what the operations ask when they run.

T packed tokens, B sequences.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastbert import adapters
from fastbert.checkpoint.activations import OTHERS
from fastbert.diagnostics.explain.report import MODULE, OpReport
from fastbert.engine import quantized
from fastbert.engine.listeners import is_bare, is_plain, is_plain_norm
from fastbert.models.bert import BertAddNorm, BertLayer, BertModel, BertPooler, BertSelfAttention
from fastbert.models.embeddings import BertEmbeddings
from fastbert.models.heads import FirstTokenHead
from fastbert.models.pretrained import PreTrainedModel
from fastbert.ops import Policy, attention, dispatch, embedding, gelu, layer_norm, packed_linear, pooling
from fastbert.ops.dispatch import Decision
from fastbert.ops.linear import KERNELS as LINEAR_KERNELS
from fastbert.ops.linear import gemm_kernel
from fastbert.ops.quantized import DTYPES as QUANTIZED_DTYPES
from fastbert.ops.quantized import KERNELS as QUANTIZED_KERNELS
from fastbert.ops.quantized import OUT_GROUP
from fastbert.pipelines.modules import Normalize
from fastbert.pipelines.pipeline import POOLING_MODES
from fastbert.pipelines.sentence import SentenceEncoder
from fastbert_kernels import cpu

PACKED = "where no gradients are needed"


def find_model(model: Any) -> PreTrainedModel:
    """The model of this library that was given, or that is inside: of a SentenceEncoder, of a wrapper module, or of an
    accelerated model, whose encoder has one that shares its parameters."""
    for module in adapters.modules(model):
        if isinstance(module, PreTrainedModel):
            return module
    encoder = adapters.encoder_in(model)
    if encoder is not None:
        return encoder
    expected = "a BertModel, a model with a head or a SentenceEncoder, or an accelerated model"
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
    """How CUDA multiplies float32, as PyTorch's switch says."""
    return "TF32" if dispatch.tf32_allowed() else "IEEE float32"


@dataclass(frozen=True)
class _Operand:
    """Stands for a tensor where an op is asked what is in its way: `dispatch.dtype_obstacle` looks at these two."""

    dtype: torch.dtype
    device: torch.device


class Explainer:
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
        part, h = bert.embeddings, self.config.embedding_width
        shapes = f"(T,) ids -> (T, {h})"
        words: nn.Module = part.word_embeddings
        bare = is_bare(words, nn.Embedding)
        if not bare:
            reason = "the module is called as it is: it is an adapter, or has hooks"
            yield OpReport("embedding", f"{name}.word_embeddings", shapes, MODULE, _class_of(words), reason=reason)
        if not part.is_plain():
            reason = "a table, the LayerNorm or the dropout is called as it is: it is an adapter, or has hooks"
            yield OpReport("embedding", name, shapes, MODULE, _class_of(part), reason=reason)
        else:
            yield self.fused_embeddings(name, shapes, part, bare)
        if bert.embeddings_project is not None:
            shapes = f"(T, {h}) -> (T, {self.config.hidden_size}), + bias"
            yield self.gemm(f"{name}_project", bert.embeddings_project, shapes)

    def fused_embeddings(self, name: str, shapes: str, part: BertEmbeddings, bare: bool) -> OpReport:
        """The row of the sum of three tables and its LayerNorm. bare: whether a kernel reads the words' table."""
        h = self.config.embedding_width
        tables = [part.position_embeddings.weight]
        if part.token_type_embeddings is not None:
            tables.append(part.token_type_embeddings.weight)
        tables.append(part.word_embeddings.weight if bare else self.hidden)
        operands = map(self.operand, (*tables, part.LayerNorm.weight, part.LayerNorm.bias))
        decision = self.decide("embedding", embedding.obstacle(h, *operands))
        return self.row(name, shapes, decision, embedding.KERNELS, ("rowwise_config", h))

    def encoder(self, name: str, bert: BertModel) -> Iterator[OpReport]:
        """The layers, neighbours that run alike together."""
        layers = [list(self.layer(layer)) for layer in bert.encoder.layer if isinstance(layer, BertLayer)]
        for rows, group in itertools.groupby(range(len(layers)), lambda i: layers[i]):
            first, *others = group
            numbers = f"{first}-{others[-1]}" if others else f"{first}"
            yield from (dataclasses.replace(row, module=f"{name}.{numbers}.{row.module}") for row in rows)

    def quantized(self, prefix: str, bert: BertModel, backend: str) -> Iterator[OpReport]:
        """Embeddings and layers as fastbert.engine.quantized.encode runs them; all layers run alike."""
        config, precision = self.config, bert.precision or ""
        h, i, d, last = config.hidden_size, config.intermediate_size, config.head_size, config.num_hidden_layers - 1
        q = f"(T, {h}) {precision}"
        layers = f"{prefix}encoder.layer.{f'0-{last}' if last else '0'}"

        def row(op: str, module: str, shapes: str, kernels: Mapping[str, str], *sizes: Any) -> OpReport:
            found = self.row(module, shapes, Decision(op, backend), kernels, sizes)
            if backend != "cpu":
                return found
            return dataclasses.replace(found, kernel=f"fastbert_kernels.cpu, {cpu.instructions()}")

        def gemm(module: str, shapes: str, shape: tuple[int, int], group: int | None, again: bool = False) -> OpReport:
            dtype = QUANTIZED_DTYPES[precision]
            sizes = "quantized_linear_config", dtype, group
            found = row("quantized_linear", f"{layers}.{module}", shapes, QUANTIZED_KERNELS, *sizes)
            if backend != "triton":
                return found
            from fastbert_kernels import configs, launch

            arch = launch.arch(self.device) if self.arch is None else self.arch
            how = configs.quantized_gemm(dtype, arch, shape, group, dtype if again else self.dtype)
            source = "; ".join(filter(None, (how.choice_source, how.config.source)))
            kernel, tile = f"fastbert_kernels.{how.ours}", dict(how.config.block_sizes)
            return dataclasses.replace(found, kernel=kernel, block_sizes=tile, source=source)

        rowwise = "rowwise_config", h
        ids = f"(T,) ids -> (T, {h}) and {q}"
        yield row("embedding", f"{prefix}embeddings", ids, embedding.KERNELS, *rowwise)
        yield gemm("attention.self.query+key+value", f"{q} -> (T, {3 * h}), + bias", (h, 3 * h), None)
        shapes = f"(T, {3 * h}) -> {q}, {config.num_attention_heads} heads of {d}"
        sizes = "attention_config", self.dtype, d
        yield row("attention", f"{layers}.attention.self", shapes, attention.KERNELS, *sizes)
        yield gemm("attention.output.dense", f"{q} -> (T, {h})", (h, h), d if d < h else None)
        shapes = f"(T, {h}) -> (T, {h}) and {q}, + bias + residual"
        yield row("layer_norm", f"{layers}.attention.output.LayerNorm", shapes, layer_norm.KERNELS, *rowwise)
        activation = next(bert.blocks()).activation
        shapes = f"{q} -> (T, {i}) {precision}, + bias, {activation}"
        yield gemm("intermediate.dense", shapes, (h, i), None, again=True)
        group = OUT_GROUP if i > OUT_GROUP else None
        yield gemm("output.dense", f"(T, {i}) {precision} -> (T, {h})", (i, h), group)
        shapes = f"(T, {h}) -> (T, {h}) and {q} (the last layer's without), + bias + residual"
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
        decision = self.decide("attention", why_not)
        row = self.attention_row(shapes, decision, ("attention_config", self.dtype, d), part)
        yield row
        short = self.short_texts(d) if row.backend == "triton" and self.policy.batch_invariant else None
        if short is not None:
            shapes = f"{shapes}, of texts of up to {short[0]['BLOCK_K']} tokens"
            yield dataclasses.replace(row, shapes=shapes, block_sizes=short[0], source=short[1])
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
        return self.refused(dataclasses.replace(row, source=f"PyTorch's: {why_not}"), why_not)

    def add_norm(self, name: str, part: BertAddNorm, in_features: int) -> Iterator[OpReport]:
        """LayerNorm(dropout(dense(x)) + residual), as fastbert.models.bert.BertAddNorm does it."""
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
        if not is_plain_norm(norm):
            reason = "the module is called as it is: it is an adapter, or has hooks"
            return OpReport("layer_norm", name, "(T, H) -> (T, H)", MODULE, _class_of(norm), reason=reason)
        h = norm.weight.shape[0]
        operands = map(self.operand, (*tensors, norm.weight, norm.bias))
        why_not = layer_norm.obstacle(h, self.hidden, *operands, dropout_p=dropout_p)
        decision = self.decide("layer_norm", why_not)
        row = self.row(name, f"(T, {h}) -> (T, {h})", decision, layer_norm.KERNELS, ("rowwise_config", h))
        return self.refused(row, dispatch.training_obstacle(dropout_p))

    def dense(self, name: str, module: nn.Module, activation: str, shapes: str, width: int) -> Iterator[OpReport]:
        """activation(module(x)) for an activation that is not "none", as fastbert.models.bert.dense does it."""
        if activation in OTHERS:
            yield self.gemm(name, module, f"{shapes}, + bias")
            decision = self.decide("bias_gelu", gelu.activation_obstacle(activation))
            row = self.row(name, f"(T, {width}) -> (T, {width})", decision, gelu.KERNELS, ("elementwise_config", width))
            yield dataclasses.replace(row, shapes=f"{row.shapes}, {activation}", kernel=f"PyTorch's, {activation}")
            return
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
            if self.packs(decision, module):
                kernel = str(packed_linear.kernel(self.dtype, self.policy.batch_invariant))
                yield dataclasses.replace(row, kernel=kernel, source=PACKED)
                return
            applied = "torch.nn.functional.relu" if activation == "relu" else "torch.nn.functional.gelu"
            row = dataclasses.replace(row, kernel=f"{LINEAR_KERNELS['torch']}, {applied}")
            yield self.refused(row, self.no_product(module))
        else:
            yield self.gemm(name, module, shapes if plain else f"{shapes}, + bias", (choice,))
            shapes = f"(T, {width}) -> (T, {width}), {'+ bias, ' * plain}{activation}"
            decision = dataclasses.replace(decision, op="bias_gelu")
            yield self.row(name, shapes, decision, gelu.KERNELS, ("elementwise_config", width))

    def pool(self, name: str, what: str) -> OpReport:
        h = self.config.hidden_size
        decision = self.decide("pooling", pooling.obstacle(h, self.hidden))
        mode, sums = what.split(",")[0].split(" ")[0], what.endswith("in float32")
        blocks = "one_row_pooling_config" if mode in ("cls", "last") else "pooling_config"
        row = self.row(name, f"(T, {h}) -> (B, {h}), {what}", decision, pooling.KERNELS, (blocks, h))
        exact = mode in pooling.EXACT and "normalized" not in what
        if decision.backend != "cpu" or not sums or exact:
            return row
        why_not = pooling.cpu_obstacle(self.hidden.dtype)
        if why_not is None and (mode in pooling.MEANS or self.policy.batch_invariant):
            return dataclasses.replace(row, kernel=f"fastbert_kernels.cpu, {cpu.instructions()}", source=PACKED)
        return self.refused(row, why_not)

    def pooler(self, name: str, pooler: BertPooler) -> Iterator[OpReport]:
        h = self.config.hidden_size
        yield self.pool(name, "cls")
        yield self.gemm(f"{name}.dense", pooler.dense, f"(B, {h}) -> (B, {h}), + bias, then tanh")

    def sentence(self, encoder: SentenceEncoder) -> Iterator[OpReport]:
        modes, tail = encoder.pooling.modes, list(enumerate(encoder.tail))
        normalized = len(modes) == 1 and bool(tail) and isinstance(tail[0][1], Normalize)
        for mode in modes:
            yield self.pool("pooling", f"{POOLING_MODES[mode]}{', L2 normalized' * normalized}, in float32")
        width = self.config.hidden_size * len(modes)
        for i, module in tail[1:] if normalized else tail:
            settings: dict[str, Any] = getattr(module, "settings", dict)()
            before, width = width, settings.get("out_features", width)
            name, shapes = type(module).__name__.lower(), f"(B, {before}) -> (B, {width})"
            kernels = {"dense": LINEAR_KERNELS, "layernorm": layer_norm.KERNELS, "normalize": pooling.KERNELS}
            if self.policy.batch_invariant and name in kernels:  # as fastbert.pipelines.modules.apply does it
                on_cpu = self.device.type == "cpu" and self.policy.backend != "triton"
                kernel = f"fastbert_kernels.cpu, {cpu.instructions()}" if on_cpu else kernels[name]["triton"]
                if on_cpu and name == "layernorm":
                    kernel = layer_norm.KERNELS["torch"]
                yield OpReport(name, f"tail.{i}", shapes, "cpu" if on_cpu else "triton", kernel)
            else:
                yield OpReport(name, f"tail.{i}", shapes, MODULE, _class_of(module))

    def head(self, prefix: str) -> Iterator[OpReport]:
        h, e = self.config.hidden_size, self.config.embedding_width
        modules: dict[str, Any] = dict(self.model.named_modules())
        name = "cls.predictions.transform"
        if name in modules:
            dense, norm, activation = modules[f"{name}.dense"], modules[f"{name}.LayerNorm"], modules[name].activation
            yield from self.dense(f"{prefix}{name}.dense", dense, activation, f"(T, {h}) -> (T, {e})", e)
            yield self.norm(f"{prefix}{name}.LayerNorm", norm, [])
        if isinstance(modules.get("classifier"), FirstTokenHead):
            yield from self.first_token(f"{prefix}classifier", modules["classifier"])
            return
        # Without a pooler, the classifier and the two outputs of question answering are of tokens.
        pooled = "B" if backbone(self.model).pooler is not None else "T"
        rows = {"cls.predictions.decoder": "T", "cls.seq_relationship": "B", "classifier": pooled, "qa_outputs": pooled}
        for name, n in rows.items():
            if name in modules:
                width = getattr(modules[name], "out_features", "?")
                columns = e if name == "cls.predictions.decoder" else h
                yield self.gemm(f"{prefix}{name}", modules[name], f"({n}, {columns}) -> ({n}, {width}), + bias")

    def first_token(self, name: str, head: FirstTokenHead) -> Iterator[OpReport]:
        h, width = self.config.hidden_size, getattr(head.out_proj, "out_features", "?")
        yield self.pool(name, "cls")
        shapes = f"(B, {h}) -> (B, {h})"
        if head.activation == "gelu":
            yield from self.dense(f"{name}.dense", head.dense, "gelu", shapes, h)
        else:
            yield self.gemm(f"{name}.dense", head.dense, f"{shapes}, + bias, then {head.activation}")
        yield self.gemm(f"{name}.out_proj", head.out_proj, f"(B, {h}) -> (B, {width}), + bias")

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
        """An op that is dispatched. config: a function of fastbert_kernels.configs, and its arguments but for arch."""
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
        from fastbert_kernels import configs, launch

        if config in ("linear_config", "attention_config", "quantized_linear_config"):
            args = (*args, launch.arch(self.device) if self.arch is None else self.arch)
        found = getattr(configs, config)(*args)
        if isinstance(found, configs.Config):
            return dict(found.block_sizes), found.source
        return dict(found), f"formula of fastbert_kernels.configs.{config}"

    def short_texts(self, head_size: int) -> tuple[dict[str, int], str] | None:
        """Block sizes, and their source, of attention's second launch, for short texts; None where there is none."""
        from fastbert_kernels import configs, launch

        arch = launch.arch(self.device) if self.arch is None else self.arch
        found = configs.short_attention_config(self.dtype, head_size, arch)
        return None if found is None else (dict(found.block_sizes), found.source)

    def our_gemm(
        self, name: str, shapes: str, decision: Decision, module: nn.Module, epilogue: str, choice: str | None
    ) -> OpReport:
        from fastbert_kernels import configs, launch

        arch = launch.arch(self.device) if self.arch is None else self.arch
        gemm = configs.gemm(self.dtype, arch, self.gemm_shape(module), epilogue)
        sizes, source = dict(gemm.config.block_sizes), f"{choice}; {gemm.config.source}"
        kernel = f"fastbert_kernels.{gemm.ours}"
        return OpReport(
            decision.op, name, shapes, decision.backend, kernel, block_sizes=sizes, source=source, launches=1
        )

    def packs(self, decision: Decision, module: nn.Module) -> bool:
        """Whether the weights are packed, as fastbert.ops.linear asks."""
        if self.policy.batch_invariant:
            return decision.backend == "cpu" and self.no_product(module) is None
        return decision.backend == "cpu" and not module.training and packed_linear.unavailable(self.dtype) is None

    def no_product(self, module: nn.Module) -> str | None:
        """Why a batch-invariant policy has no kernel for this linear on a CPU, or None."""
        return packed_linear.no_invariant_product(self.dtype, self.gemm_shape(module)[0])

    def refused(self, row: OpReport, why_not: str | None) -> OpReport:
        """The row, which raises where the policy is batch-invariant and its op not, on the cpu backend."""
        if why_not is None or not self.policy.batch_invariant or row.backend == "triton":
            return row
        return dataclasses.replace(row, reason=f"batch_invariant: {why_not}", raises=True)

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
            return OpReport("linear", name, shapes, MODULE, _class_of(module), reason=reason, raises=raises)
        tensors = map(self.operand, (module.weight, module.bias))
        decision = self.decide("linear", dispatch.dtype_obstacle(self.hidden, *tensors))
        source = None if library is None else library[0]
        if library is None and decision.backend == "triton":
            which, choice = self.chosen(module, "none")
            if which == "fastbert":
                return self.our_gemm(name, shapes, decision, module, "none", choice)
            source = choice
        if self.packs(decision, module):
            kernel = str(packed_linear.kernel(self.dtype, self.policy.batch_invariant))
            return OpReport("linear", name, shapes, decision.backend, kernel, source=PACKED)
        kernel = LINEAR_KERNELS["torch"] + (" (cuBLAS)" if self.device.type == "cuda" else "")
        refused = library is None and self.policy.batch_invariant
        why_not = decision.reason if refused else None
        launches = 1 if decision.backend == "triton" else None
        row = OpReport(
            "linear", name, shapes, decision.backend, kernel, source=source, launches=launches, reason=why_not,
            raises=refused,
        )  # fmt: skip
        return self.refused(row, self.no_product(module)) if decision.backend == "cpu" else row


def _class_of(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
