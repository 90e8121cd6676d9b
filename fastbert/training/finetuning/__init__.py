"""This package trains heads on pre-trained encoders: readers, metrics and glue around transformers' Trainer."""
