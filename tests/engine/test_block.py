"""A layer's description as data has the sizes of the model that it is taken from."""

from __future__ import annotations

from fastbert import BertConfig, BertModel
from fastbert.engine.block import product_shapes


def test_shapes_of_products_are_those_of_the_layers() -> None:
    """Catches sizes that tuning and benchmarks take for a layer's, and that no layer of the model has."""
    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80)
    for block in BertModel(config).blocks():
        shapes = {
            name: (sum(linear.weight.shape[0] for linear in linears), linears[0].weight.shape[1])
            for name, linears in block.products().items()
        }
        assert shapes == product_shapes(32, 80)
        assert block.fuse_qkv().weight.shape == shapes["qkv"]
