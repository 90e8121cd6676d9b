"""This package serves models over HTTP. README.md describes its parts."""
