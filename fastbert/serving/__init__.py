"""Models of this package answer over HTTP: see README.md for the plan."""
