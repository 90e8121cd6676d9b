"""The command `fastbert`; `main` is what runs it."""

from fastbert.cli.main import main as main
