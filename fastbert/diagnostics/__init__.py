"""This package reports on a model: explain, verify and warm-up."""
