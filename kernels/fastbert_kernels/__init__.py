"""This package holds Triton kernels for packed (unpadded) BERT encoders.

Each module holds one fused operation: its kernels and the function that launches them. Tensors come in
packed: `(T, H)` for `T` tokens of all sequences one after the other, with `cu_seqlens` (int32, `(B + 1,)`,
starts at 0, ends at T) marking where each sequence begins. Nothing here validates user input, falls back or
knows autograd: `fastbert.ops` does that. Importing this package does not import triton; its modules do.
"""

from fastbert_kernels.distribution import check_imported

check_imported()
