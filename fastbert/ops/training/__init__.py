"""This package has operations with gradients, on packed tokens. A forward pass saves only the backward pass's inputs.

`kernels.py` defines the interface of a backend. `layer.py` runs a whole encoder layer as one autograd node.
`functions.py` has the single operations, for layers with adapters or hooks. Dropout masks are those of
`fastbert.ops.dropout`.
"""
