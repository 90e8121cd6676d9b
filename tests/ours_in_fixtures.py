"""This plugin for pytest, `-p ours_in_fixtures`, puts our encoders into sentence-transformers' fixtures.

It shows what code written for SentenceTransformer and CrossEncoder meets in SentenceEncoder and CrossEncoder:
docs/upstream-tests.md.
"""

from __future__ import annotations

import functools

import pytest
import torch

import fastbert


def pytest_collection_finish(session: pytest.Session) -> None:
    """Exchanges the classes that `tests/conftest.py` of the checkout has imported."""
    for plugin in session.config.pluginmanager.get_plugins():
        if getattr(plugin, "__file__", None) == str(session.config.rootpath / "tests" / "conftest.py"):
            # Not "auto", which is bfloat16 on some CPUs: the tests compare with what theirs gives.
            in_float32 = {"dtype": torch.float32}
            plugin.SentenceTransformer = functools.partial(fastbert.SentenceEncoder.from_pretrained, **in_float32)
            plugin.CrossEncoder = functools.partial(fastbert.CrossEncoder.from_pretrained, **in_float32)
            return
    raise pytest.UsageError("ours_in_fixtures: found no tests/conftest.py; run pytest in the checkout")
