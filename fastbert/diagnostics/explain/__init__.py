"""`fastbert.explain` tells what runs each part of a model, and why."""
