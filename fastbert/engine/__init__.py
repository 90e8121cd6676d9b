"""An engine runs an encoder: the arithmetic, and the launch around it. README.md beside this file says how to add one.

`Engine` is the one door for models; what it needs of them is in `interface`.
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
