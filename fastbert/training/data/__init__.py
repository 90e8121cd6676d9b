"""This package turns text on disk into the batches of a pre-training run."""
