"""The oracle: the encoder of each family and each fused operation in short, plain PyTorch.

Every other path of the library is judged by this package, and this package by transformers in float64. It is written
to be read: padded `(B, S)` layout for the model, plain loops over sequences for packed operations, no fused operation
and no device code. Any float dtype works; float64 is what numbers are judged by. In 16-bit dtypes each intermediate is
rounded. It shares no code with fastbert.ops.
"""

from fastbert.reference.bert import BertReference, bert, default_positions
from fastbert.reference.dropout import Dropout
from fastbert.reference.encoders import encode
from fastbert.reference.heads import TASKS, head
from fastbert.reference.mpnet import mpnet, relative_position_bucket
from fastbert.reference.ops import (
    POOLING_MODES,
    bias_gelu,
    bias_residual_layer_norm,
    embedding_layer_norm,
    gelu,
    layer_norm,
    linear,
    linear_cross_entropy,
    pool,
    varlen_attention,
)

__all__ = [
    "POOLING_MODES",
    "TASKS",
    "BertReference",
    "Dropout",
    "bert",
    "bias_gelu",
    "bias_residual_layer_norm",
    "default_positions",
    "embedding_layer_norm",
    "encode",
    "gelu",
    "head",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "mpnet",
    "pool",
    "relative_position_bucket",
    "varlen_attention",
]
