"""This package trains heads on pre-trained encoders: readers, metrics, and code around transformers' Trainer."""
