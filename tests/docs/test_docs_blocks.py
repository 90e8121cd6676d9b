"""The code blocks of README.md and docs/ run, on the packaged MiniLM weights, without a network and without a GPU.

docs/README.md says how a page is run, and how a block is marked that cannot be.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import docs_pages as pages
import pytest

import helpers

# Installing twice, commands that take minutes or rewrite a page, other libraries' tests, containers, Ray, Ray Serve.
MOST_NOT_RUN = 8
RUN = [page for page in pages.PAGES if any(not block.not_run for block in pages.blocks(page))]


@pytest.fixture(scope="module")
def failures(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What failed, by page. One process runs all pages, because importing the libraries takes most of its time."""
    folder = tmp_path_factory.mktemp("blocks")
    out = folder / "failures.json"
    script = Path(__file__).parent / "run_blocks.py"
    env = helpers.source_env(
        HF_HOME=str(folder / "hub"), HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", XDG_CACHE_HOME=str(folder / "cache")
    )
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, script, folder, out, minilm, *RUN], env=env, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=pages.name)
def test_code_of_the_page_runs(page: Path, failures: dict[str, list[str]]) -> None:
    """Catches an example that no longer works as it is written."""
    assert not failures[page.as_posix()], failures[page.as_posix()][0]


@pytest.mark.parametrize("page", pages.PAGES, ids=pages.name)
def test_every_block_is_one_that_is_run_or_says_why_not(page: Path) -> None:
    """Catches a block in a language that nobody runs, without a mark."""
    for block in pages.blocks(page):
        assert block.not_run or block.language in ("python", "sh"), f"{page.name}:{block.line}: {block.language!r}"


def test_few_blocks_are_not_run() -> None:
    """Catches a block that is marked as not run because it does not work."""
    marked = [f"{page.name}: {block.not_run}" for page in pages.PAGES for block in pages.blocks(page) if block.not_run]
    assert len(marked) <= MOST_NOT_RUN, marked
