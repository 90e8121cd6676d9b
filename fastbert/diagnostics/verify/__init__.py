"""fastbert.verify: how far a model's numbers are from a float64 reference."""
