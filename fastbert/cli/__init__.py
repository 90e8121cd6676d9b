"""The command `fastbert` runs `main`."""

from fastbert.cli.main import main as main
