"""From texts to vectors and scores: tokenizing, batching, pooling and the folders of sentence-transformers."""
