"""This package holds kernels for CPUs, in C++: operations that PyTorch's own kernels run slowly on packed tokens.

The sources are compiled when fastbert is installed, once for each instruction set in VARIANTS. The libraries do not use
Python or PyTorch. They get memory, and functions of both, by address, and run on the threads of PyTorch's OpenMP.
Without a compiler, or on a processor without AVX2, `obstacle` gives the reason, and the caller uses PyTorch's
operations.

`python setup.py build_ext --inplace` compiles them in a checkout. An editable installation has done so.
"""

from fastbert_kernels.cpu.attention_training import (
    attention_backward,
    attention_training_forward,
)
from fastbert_kernels.cpu.batches import (
    ALL,
    Cutting,
    StaticIntegers,
    StaticList,
    TileChoice,
    fill_words,
    longest_of,
    suitable_tiles,
    work_list,
)
from fastbert_kernels.cpu.disentangled import disentangled_attention_backward, disentangled_attention_forward
from fastbert_kernels.cpu.dropout import (
    dropout_mask,
)
from fastbert_kernels.cpu.encoder import (
    MAX_HIDDEN,
    Encoder,
    EncoderConvolution,
    EncoderLayer,
    EncoderTables,
    Int8Encoder,
    Int8EncoderLayer,
    LayerTraits,
    encoder_forward,
    encoder_int8_forward,
)
from fastbert_kernels.cpu.gated import (
    gated_backward,
    gated_forward,
    rotary_backward,
    rotary_forward,
    window_bias,
    windowed_attention_forward,
)
from fastbert_kernels.cpu.int8 import (
    Int8Weight,
    linear_int8_forward,
    pack_int8,
    quantize_forward,
)
from fastbert_kernels.cpu.library import (
    VARIANTS,
    bfloat16_rate,
    has_amx,
    instructions,
    int8_obstacle,
    multiplies,
    obstacle,
)
from fastbert_kernels.cpu.linear_training import (
    weight_gradient,
)
from fastbert_kernels.cpu.objects import (
    ObjectRecord,
)
from fastbert_kernels.cpu.operations import (
    ACTIVATIONS,
    PositionBias,
    digest,
    ids_outside,
    linear_forward,
    pool_forward,
    varlen_attention_forward,
)
from fastbert_kernels.cpu.packing import (
    pack_transposed,
    pack_weight,
    pack_weights,
)
from fastbert_kernels.cpu.rows import (
    NormBackward,
    NormForward,
    activation_backward,
    dropout_forward,
    embedding_norm_forward,
    embedding_scatter,
    residual_norm_backward,
    residual_norm_forward,
)

__all__ = [
    "ACTIVATIONS", "ALL", "MAX_HIDDEN", "VARIANTS", "Cutting", "Encoder", "EncoderConvolution", "EncoderLayer",
    "EncoderTables", "Int8Encoder", "Int8EncoderLayer", "Int8Weight", "LayerTraits", "NormBackward", "NormForward",
    "ObjectRecord", "PositionBias", "StaticIntegers", "StaticList", "TileChoice", "activation_backward",
    "attention_backward", "attention_training_forward", "bfloat16_rate", "digest", "disentangled_attention_backward",
    "disentangled_attention_forward", "dropout_forward", "dropout_mask", "embedding_norm_forward", "embedding_scatter",
    "encoder_forward", "encoder_int8_forward", "fill_words", "gated_backward", "gated_forward", "has_amx",
    "ids_outside", "instructions", "int8_obstacle", "linear_forward", "linear_int8_forward", "longest_of", "multiplies",
    "obstacle", "pack_int8", "pack_transposed", "pack_weight", "pack_weights", "pool_forward", "quantize_forward",
    "residual_norm_backward", "residual_norm_forward", "rotary_backward", "rotary_forward", "suitable_tiles",
    "varlen_attention_forward", "weight_gradient", "window_bias", "windowed_attention_forward", "work_list",
]  # fmt: skip
