"""`fastbert.verify` measures the errors of a model against a float64 reference."""
