"""This package holds Triton kernels for packed (unpadded) BERT encoders.

Each module holds one fused operation: its kernels and the function that launches them. Tensors are packed: `(T, H)` for
the `T` tokens of all sequences one after the other. `cu_seqlens` (int32, `(B + 1,)`, starts at 0, ends at T) marks
where each sequence begins. This package does not validate user input, fall back or use autograd: `fastbert.ops` does
that. Importing this package does not import triton; its modules do.
"""

from fastbert_kernels.distribution import check_imported

check_imported()
