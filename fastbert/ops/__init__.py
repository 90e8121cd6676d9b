"""This package holds the fused operations of an encoder on packed tokens. One function serves all backends."""

from fastbert.ops import quantized, quantized_parts
from fastbert.ops.attention import prepare as prepare_attention
from fastbert.ops.attention import varlen_attention
from fastbert.ops.cross_entropy import linear_cross_entropy
from fastbert.ops.disentangled import disentangled_attention
from fastbert.ops.dispatch import AUTO, BACKENDS, BackendError, Policy
from fastbert.ops.dropout import of_batch as dropout_of
from fastbert.ops.elementwise import elementwise
from fastbert.ops.embedding import check_ids, embedding_layer_norm, seen_within
from fastbert.ops.gated import gated
from fastbert.ops.gated_linear import gated_linear
from fastbert.ops.gelu import ACTIVATIONS, bias_gelu
from fastbert.ops.labels import IGNORED, check_labels, labelled_rows, mean_cross_entropy, readable
from fastbert.ops.layer_norm import bias_residual_layer_norm, norm_queries_and_keys
from fastbert.ops.linear import linear, linear_residual_layer_norm
from fastbert.ops.packed_linear import forget as forget_packed
from fastbert.ops.pooling import pool
from fastbert.ops.rotary import rotary, rotations

__all__ = [
    "ACTIVATIONS",
    "AUTO",
    "BACKENDS",
    "IGNORED",
    "BackendError",
    "Policy",
    "bias_gelu",
    "bias_residual_layer_norm",
    "check_ids",
    "check_labels",
    "disentangled_attention",
    "dropout_of",
    "elementwise",
    "embedding_layer_norm",
    "forget_packed",
    "gated",
    "gated_linear",
    "labelled_rows",
    "linear",
    "linear_cross_entropy",
    "linear_residual_layer_norm",
    "mean_cross_entropy",
    "norm_queries_and_keys",
    "pool",
    "prepare_attention",
    "quantized",
    "quantized_parts",
    "readable",
    "rotary",
    "rotations",
    "seen_within",
    "varlen_attention",
]
