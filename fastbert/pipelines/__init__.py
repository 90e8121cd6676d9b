"""Pipelines lead from texts to vectors and scores: tokenizing, batching, pooling, sentence-transformers' folders."""
