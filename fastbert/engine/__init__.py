"""An engine runs an encoder: it selects the arithmetic and its launch. README.md describes how to add an arithmetic.

`Engine` is the only interface for models; `interface` describes the part of a model that it uses.
"""

from fastbert.engine.block import Block, Convolution, Distances, EmbeddingTables, Linear, Norm
from fastbert.engine.choose import Engine
from fastbert.engine.interface import PackedInputs
from fastbert.engine.options import Options

__all__ = [
    "Block",
    "Convolution",
    "Distances",
    "EmbeddingTables",
    "Engine",
    "Linear",
    "Norm",
    "Options",
    "PackedInputs",
]
