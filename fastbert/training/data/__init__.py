"""Text on disk becomes packed batches of token ids."""
