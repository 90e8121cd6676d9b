"""The models: one readable file for each family, and the parts that all of them share."""
