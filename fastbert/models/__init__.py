"""The models: one readable text a family, and what all of them share."""
