"""fastbert.explain: what runs each part of a model, and why."""
