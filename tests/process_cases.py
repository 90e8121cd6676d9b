"""Code runs in a process of its own that compiles kernels, where the tests interpret them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from helpers import source_env


def run(code: str, *arguments: str, cache: Path, **env: str) -> Any:
    """What `code` prints as JSON, in a process of its own that compiles: the interpreter is off."""
    environment = source_env(TRITON_CACHE_DIR=str(cache), **env)
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def run_beside_tests(code: str, *arguments: str, cache: Path) -> Any:
    """What `code`, which may import from tests/, prints as JSON."""
    path = os.pathsep.join([source_env()["PYTHONPATH"], str(Path(__file__).resolve().parent)])
    return run(code, *arguments, cache=cache, PYTHONPATH=path)
