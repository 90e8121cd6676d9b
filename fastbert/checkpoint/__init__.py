"""This package reads and writes what is on disk: folders, files, configurations and weights of each family."""
