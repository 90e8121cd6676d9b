"""This package converts text on disk to packed batches of token ids."""
