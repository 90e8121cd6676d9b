"""Code runs in a process of its own that compiles kernels, where the tests interpret them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import fork_server
from helpers import source_env


def run(code: str, *arguments: str, cache: Path | None, **env: str) -> Any:
    """What `code` prints as JSON, in a process of its own that compiles: the interpreter is off.

    cache: the folder of Triton's cache; None for the user's, where the offline report finds what was compiled.
    """
    environment = source_env(**env) if cache is None else source_env(TRITON_CACHE_DIR=str(cache), **env)
    environment.pop("TRITON_INTERPRET", None)
    line = [sys.executable, "-c", code, *arguments]
    done = fork_server.run(line, env=environment, modules=fork_server.COMPILER, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def run_beside_tests(code: str, *arguments: str, cache: Path | None) -> Any:
    """What `code`, which may import from tests/, prints as JSON."""
    path = os.pathsep.join([source_env()["PYTHONPATH"], str(Path(__file__).resolve().parent)])
    return run(code, *arguments, cache=cache, PYTHONPATH=path)
