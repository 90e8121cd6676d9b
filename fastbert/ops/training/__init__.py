"""This package holds operations with gradients on packed tokens. Forward passes save only data for the backward passes.

`kernels.py` has the interface of a backend. `layer.py` is a whole encoder layer as one node of autograd. `functions.py`
has the single operations, for layers with adapters or hooks. Masks of dropout are those of `fastbert.ops.dropout`.
"""
