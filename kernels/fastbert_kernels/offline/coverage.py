"""This module lists the launches that the offline report compiles: its cases."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch

from fastbert_kernels import (
    attention,
    attention_specialized,
    configs,
    cross_entropy,
    embedding,
    gelu,
    launch,
    layer_norm,
    linear,
    pooling,
    quantized_configs,
    quantized_linear,
    samples,
)
from fastbert_kernels.work_list import N_COLUMNS, WorkList

# Sizes (H, I, N) of models. "odd" has rows that no vector load can read and a K that is no multiple of any block.
MODELS = {"base": (768, 3072, 12), "large": (1024, 4096, 16), "minilm": (384, 1536, 12), "odd": (90, 250, 3)}
# "tf32" is float32 with torch.backends.cuda.matmul.allow_tf32 set.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
# Dtypes of the operands of 8-bit linears. The kernels that make such operands read bf16.
EIGHT_BIT = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
MIN_ARCH = {"fp8": 89}
# Head sizes beyond those of the models: the smallest, the largest, and three that are padded to the next tile.
HEAD_SIZES = (16, 24, 48, 80, 128)
OPS = ("layer_norm", "gelu", "gated", "rotary", "linear", "embedding", "pooling", "attention", "disentangled",
       "quantized_linear", "unpack",
       "cross_entropy")  # fmt: skip
# Classes of a language model's head: BERT's, a number that 16 divides, and XLM-RoBERTa's.
VOCABULARIES = (30522, 32000, 250002)

COVERAGE = """\
default  every kernel on every architecture. bf16: the three models with each linear of a layer (where a persistent
         kernel is the default, for base also the other one), LayerNorm, embedding and mean pooling with normalisation;
         for base also LayerNorm and embedding without their optional inputs and the other pooling modes; attention
         with head sizes 16, 32, 64, 80 and 128, each also with the tile of batch-invariant mode's short texts, for base
         and minilm with the small tile and, on sm_90, with warps that only fetch keys; both passes of cross entropy
         over 30,522 classes, under "base". fp32 and fp16: linear and attention of base and minilm, and on sm_80 and
         sm_90 the other kernels, of base. fp8 (from sm_89 on) and int8: each linear of a layer of base and minilm
         (where a persistent kernel is the default, for base also the other one), and LayerNorm, embedding and attention
         that quantise; on sm_80 and sm_90 also those of large, and a linear after heads of 80. Training: dropout +
         residual + LayerNorm, embedding, activation, pooling, attention with dropout and the linear that saves its
         pre-activation, forward and backward; of base also with a float32 stream; on sm_80 and sm_90 also attention
         with head sizes 16, 80 and 128. Of families with rotary positions, in the sizes of ModernBERT-base: gates
         forward and backward, products with a gate, rotation, embeddings without positions, norms without bias, sums
         with their norms, and attention within a window; in fp8 and int8 products with a gate, sums, rows, embeddings
         and windows.
         Attention with MPNet's position bias, forward and backward, in bf16. Of base in bf16 and fp8, on sm_90: linears
         for few rows, split and launched dependently, and the candidates of `fastbert tune`. Disentangled attention in
         the sizes of DeBERTa-v3-base, in bf16 also with head sizes 16, 32, 80 and 128, for inference and for training.
         The kernels that pack small batches, under bf16, and those that bring rows back to their places.
--all    every dtype, TF32 too, every combination of optional inputs, activations and pooling modes, int32 ids, head
         sizes 24 and 48, a model whose sizes divide by nothing ("odd"), and other numbers of classes."""


@dataclass(frozen=True)
class Case:
    """A `Case` is one call of a launcher."""

    op: str
    model: str
    dtype: str
    variant: str
    archs: frozenset[int] | None  # Where the default run has it: everywhere (None), on some, or nowhere (empty).
    call: Callable[[], object] = field(repr=False)


def cases(dtype: str) -> Iterator[Case]:
    """Lists every case of one dtype (a key of DTYPES or EIGHT_BIT)."""
    if dtype in EIGHT_BIT:
        yield from eight_bit_cases(dtype)
        return
    everywhere, some, nowhere = None, frozenset({80, 90}), frozenset[int]()
    torch_dtype, bf16 = DTYPES[dtype], dtype == "bf16"
    n_rows, n_seqs = 64, 2
    ids, ids32 = torch.zeros(n_rows, dtype=torch.int64), torch.zeros(n_rows, dtype=torch.int32)
    cu_seqlens = torch.zeros(n_seqs + 1, dtype=torch.int32)
    work_list = WorkList(torch.zeros((n_seqs, N_COLUMNS), dtype=torch.int32), ids32)
    notes = embedding.Notes(torch.zeros(4, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), 1)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch_dtype)

    def attend(n_heads: int, head_size: int) -> Callable[[], object]:
        qkv = tensor(n_rows, 3 * n_heads * head_size)
        arguments = qkv, work_list, n_heads, 0.125
        return partial(attention.varlen_attention_forward, *arguments, short_list=work_list)  # It launches two kernels.

    def attend_in(config: dict[str, int] | None, n_heads: int, head_size: int) -> Callable[[], object]:
        """config: None for the small tile of the architecture."""
        tiles = WorkList(work_list.tiles, ids32[:0])  # none of several sequences
        qkv = tensor(n_rows, 3 * n_heads * head_size)

        def attend() -> object:
            sizes = configs.small_tile(launch.arch(qkv.device)) if config is None else config
            sizes = {**sizes, "BLOCK_D": head_size}
            return attention.varlen_attention_forward(qkv, tiles, n_heads, 0.125, config=sizes)

        return attend

    for model, (h, i, n_heads) in MODELS.items():
        case = partial(Case, model=model, dtype=dtype)
        matrix = nowhere if model == "odd" or dtype == "tf32" or (model == "large" and not bf16) else everywhere
        for name, n_cols, k, activation in (
            ("qkv", 3 * h, h, "none"),
            ("out", h, h, "none"),
            ("up+gelu", i, h, "gelu"),
            ("up+gelu_tanh", i, h, "gelu_tanh"),
            ("down", h, i, "none"),
        ):
            x, weight = tensor(n_rows, k), tensor(n_cols, k)
            archs = nowhere if activation == "gelu_tanh" and model != "base" else matrix
            call = partial(linear.linear_forward, x, weight, tensor(n_cols), activation)
            yield case("linear", variant=name, archs=archs, call=call)
            call = partial(linear.linear_forward, x, weight, None, activation)
            yield case("linear", variant=f"{name}-bias", archs=nowhere, call=call)
            # Where linear_forward takes the persistent kernel, the other one serves tensors without a descriptor.
            if dtype in ("bf16", "fp16"):
                fallback = frozenset({90, 100}) if name in ("qkv", "up+gelu") and model == "base" else nowhere
                call = partial(pointer_kernel, x, weight, tensor(n_cols), activation)
                yield case("linear", variant=f"{name} by pointers", archs=fallback, call=call)
            if activation == "none" and name != "qkv":
                added = tensor(n_rows, n_cols)
                call = partial(linear.linear_forward, x, weight, tensor(n_cols), activation, added)
                yield case("linear", variant=f"{name}+residual", archs=matrix, call=call)
                call = partial(linear.linear_forward, x, weight, None, activation, added)
                yield case("linear", variant=f"{name}-bias+residual", archs=nowhere, call=call)
        d = h // n_heads
        yield case("attention", variant=f"D{d}", archs=matrix, call=attend(n_heads, d))
        if dtype == "bf16" and model in ("base", "minilm"):
            # Where `attention_config` has a larger tile.
            archs = frozenset({80, 90, 100}) if model == "base" else everywhere
            yield case("attention", variant=f"D{d} small", archs=archs, call=attend_in(None, n_heads, d))
            for sizes in attention_specialized.tiles():
                variant = f"D{d} specialized {sizes['BLOCK_K']}"
                archs = frozenset({attention_specialized.ARCH})
                yield case("attention", variant=variant, archs=archs, call=attend_in(sizes, n_heads, d))
        if dtype == "tf32":
            continue

        rows = everywhere if bf16 else some if model == "base" else nowhere
        rows = nowhere if model == "odd" else rows
        more = everywhere if bf16 and model == "base" else nowhere
        x, weight = tensor(n_rows, h), tensor(h)
        for bias, residual in ((weight, x), (None, x), (weight, None), (None, None)):
            inputs = {"bias": bias, "residual": residual}
            variant = "+".join(name for name, tensor in inputs.items() if tensor is not None)
            call = partial(layer_norm.bias_residual_layer_norm_forward, x, bias, residual, weight, weight, 1e-12)
            archs = rows if variant in ("bias+residual", "") else nowhere  # A GEMM that adds both leaves none.
            yield case("layer_norm", variant=variant or "plain", archs=archs, call=call)
        for activation in ("gelu", "gelu_tanh"):
            for bias in (tensor(i), None):
                variant, archs = activation + ("" if bias is not None else "-bias"), nowhere if bias is None else rows
                call = partial(gelu.bias_gelu_forward, tensor(n_rows, i), bias, activation)
                yield case("gelu", variant=variant, archs=archs, call=call)
        for variant, input_ids, token_type_ids, position_ids, archs in (
            ("ids", ids, ids, ids, rows),
            ("int32 ids", ids32, ids32, ids32, nowhere),
            ("embeds", None, ids, ids, more),
            ("without segments", ids, None, ids, more),
        ):
            word = x if input_ids is None else tensor(1000, h)
            tables = word, None if token_type_ids is None else tensor(2, h), tensor(512, h)
            call = partial(
                embedding.embedding_layer_norm_forward,
                *(input_ids, token_type_ids, position_ids, *tables, weight, weight, 1e-12),
            )
            yield case("embedding", variant=variant, archs=archs, call=call)
            if variant in ("ids", "without segments"):
                call = partial(call, notes=notes)
                yield case("embedding", variant=f"{variant}, noted", archs=archs, call=call)
        if model == "base":
            before = torch.zeros(n_rows, dtype=torch.int32 if torch_dtype == torch.float32 else torch.int16)
            compare = partial(samples.compare_samples, ids, before, notes)
            yield case("embedding", variant="samples of weights", archs=rows, call=compare)
        for mode in pooling.MODES if model != "large" else ("mean",):
            for normalize in (False, True):
                archs = rows if mode == "mean" and normalize else more if not normalize else nowhere
                variant = mode + ("+norm" if normalize else "")
                call = partial(pooling.pool_forward, x, cu_seqlens, mode, normalize, torch.float32)
                yield case("pooling", variant=variant, archs=archs, call=call)
                if torch_dtype != torch.float32 and model == "base":
                    call = partial(pooling.pool_forward, x, cu_seqlens, mode, normalize, torch_dtype)
                    yield case("pooling", variant=f"{variant} to {dtype}", archs=nowhere, call=call)
    if dtype != "tf32":
        yield from cross_entropy_cases(dtype)
    for head_size in HEAD_SIZES:
        archs = everywhere if bf16 and head_size in (16, 80, 128) else nowhere
        yield Case("attention", "extra", dtype, f"D{head_size}", archs, attend(2, head_size))


def cross_entropy_cases(dtype: str) -> Iterator[Case]:
    """Lists both passes of cross entropy in one dtype."""
    labels, statistics = torch.zeros(64, dtype=torch.int64), torch.empty(64)
    default = None if dtype == "bf16" else frozenset({80, 90})
    for n_classes in VOCABULARIES:
        width = -(-n_classes // 16) * 16
        logits = torch.empty(64, width, dtype=DTYPES[dtype])
        for bias in (torch.empty(width, dtype=DTYPES[dtype]), None):
            archs = default if n_classes == VOCABULARIES[0] and bias is not None else frozenset[int]()
            case = partial(Case, "cross_entropy", "base", dtype, archs=archs)
            classes = f"{n_classes}{'' if bias is not None else '-bias'}"
            for smoothing in (0.0, 0.1):
                forward = partial(cross_entropy.cross_entropy_forward, logits, bias, labels, n_classes, -100, smoothing)
                yield case(f"{classes}{'+smoothing' if smoothing else ''}", call=forward)
            numbers = statistics, statistics, statistics
            backward = partial(cross_entropy.cross_entropy_backward, logits, bias, labels, *numbers, n_classes)
            yield case(f"{classes} backward", call=backward)


def eight_bit_cases(dtype: str) -> Iterator[Case]:
    """Lists every case of a key of EIGHT_BIT."""
    n_rows, n_seqs, q_dtype = 64, 2, EIGHT_BIT[dtype]
    ids, ids32 = torch.zeros(n_rows, dtype=torch.int64), torch.zeros(n_rows, dtype=torch.int32)
    work_list = WorkList(torch.zeros((n_seqs, N_COLUMNS), dtype=torch.int32), ids32)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16)

    def eight_bit(n_rows: int, n_cols: int, n_groups: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.empty((n_rows, n_cols), dtype=q_dtype), torch.empty((n_rows, n_groups))

    for model, (h, i, n_heads) in MODELS.items():
        if model == "odd":
            continue
        archs = frozenset({80, 90}) if model == "large" else None
        case = partial(Case, model=model, dtype=dtype, archs=archs)
        d, x, weight = h // n_heads, tensor(n_rows, h), tensor(h)
        for name, n_cols, k, group, bias, activation, again in (
            ("qkv", 3 * h, h, h, tensor(3 * h), "none", False),
            ("out", h, h, d, None, "none", False),
            ("up+gelu", i, h, h, tensor(i), "gelu", True),
            ("down", h, i, quantized_linear.OUT_GROUP, None, "none", False),
        ):
            operand, matrix = eight_bit(n_rows, k, -(-k // group)), eight_bit(n_cols, k)
            out_scale = eight_bit(n_rows, 1, -(-n_cols // quantized_linear.OUT_GROUP))[1] if again else None
            to = q_dtype if again else torch.bfloat16
            call = partial(
                quantized_linear.quantized_linear_forward,
                *(*operand, group, matrix[0], matrix[1].flatten(), bias, activation, to, out_scale),
            )
            yield case("quantized_linear", variant=name, call=call)
            # Where quantized_linear_forward takes the persistent kernel, the other serves tensors without a descriptor.
            fallback = frozenset({90, 100}) if name in ("qkv", "up+gelu") and model == "base" else frozenset[int]()
            call = partial(_pointer_kernel_8_bit, call)
            yield Case("quantized_linear", model, dtype, f"{name} by pointers", fallback, call)
        call = partial(
            layer_norm.bias_residual_layer_norm_forward, x, weight, x, weight, weight, 1e-12, eight_bit(n_rows, h)
        )
        yield case("layer_norm", variant="bias+residual", call=call)
        tables = tensor(1000, h), tensor(2, h), tensor(512, h), weight, weight
        call = partial(embedding.embedding_layer_norm_forward, ids, ids, ids, *tables, 1e-12, eight_bit(n_rows, h))
        yield case("embedding", variant="ids", call=call)
        arguments = tensor(n_rows, 3 * h), work_list, n_heads, 0.125, eight_bit(n_rows, h, n_heads)
        yield case("attention", variant=f"D{d}", call=partial(attention.varlen_attention_forward, *arguments))
        if model in ("base", "minilm"):  # Where `attention_config` has a larger tile, as in bf16.
            some = frozenset({80, 90, 100}) if model == "base" else None
            yield Case("attention", model, dtype, f"D{d} small", some, partial(_in_small_tiles, d, *arguments))
    for head_size in (48, 80):  # These groups are no step of K.
        k = 4 * head_size
        operand, (data, scale) = eight_bit(n_rows, k, 4), eight_bit(256, k)
        heads = *operand, head_size, data, scale.flatten(), None, "none", torch.bfloat16
        call = partial(quantized_linear.quantized_linear_forward, *heads)
        some = frozenset({80, 90}) if head_size == 80 else frozenset[int]()
        yield Case("quantized_linear", "extra", dtype, f"out of D{head_size}", some, call)


def _in_small_tiles(
    head_size: int,
    qkv: torch.Tensor,
    work_list: WorkList,
    n_heads: int,
    scale: float,
    quantized: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Calls attention in the small tile of the architecture."""
    config = {**configs.small_tile(launch.arch(qkv.device)), "BLOCK_D": head_size}
    return attention.varlen_attention_forward(qkv, work_list, n_heads, scale, quantized, config)


def pointer_kernel(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, activation: str, pre: torch.Tensor | None = None
) -> torch.Tensor:
    """Calls the kernel that takes pointers, whatever the tables say."""
    arch, shape = launch.arch(x.device), (x.shape[1], weight.shape[0])
    config = configs.linear_config(x.dtype, arch, shape, activation).block_sizes
    out = x.new_empty(len(x), len(weight))
    return linear.linear_pointer_forward(x, weight, bias, activation, None, config, out, pre)


def _pointer_kernel_8_bit(call: partial[torch.Tensor]) -> torch.Tensor:
    """Repeats a call of quantized_linear_forward by the kernel that takes pointers, whatever the tables say."""
    x, x_scale, group, weight, weight_scale, bias, activation, dtype, out_scale = call.args
    arch = launch.arch(x.device)
    config = quantized_configs.quantized_linear_config(x.dtype, group if group < x.shape[1] else None, arch).block_sizes
    return quantized_linear.quantized_linear_pointer_forward(
        x, x_scale, group, weight, weight_scale, bias, activation, config,
        torch.empty((len(x), len(weight)), dtype=dtype), out_scale, quantized_linear.sums_outside(x.dtype, arch),
    )  # fmt: skip
