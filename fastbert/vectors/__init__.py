"""Embeddings after the encoder: quantization and exact search."""
