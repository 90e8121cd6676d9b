"""Operations with gradients, on packed tokens: forward passes that save what the backward passes need, and no more.

`kernels.py` says what a backend offers. `layer.py` is a whole encoder layer as one node of autograd; `functions.py` has
the single operations, for layers with adapters or hooks. Masks of dropout are those of `fastbert.ops.dropout`.
"""
