"""This package works on embeddings after the encoder: it quantises and searches them."""
