"""Reports on a model: explain, verify and warm-up."""
