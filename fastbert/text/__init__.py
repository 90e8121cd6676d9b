"""This package makes token ids of text, and text of token ids."""
