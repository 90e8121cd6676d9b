"""This plugin for pytest, `-p peft_offline`, keeps PEFT's tests from asking the hub for a model.

They turn HF_HUB_OFFLINE off then, and wait for a network that may not be there: docs/upstream-tests.md.
"""

from __future__ import annotations

import importlib


class Everything(dict[str, int]):
    """Counts of accesses in which every model is counted already."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> int:
        return 1


def pytest_configure() -> None:
    importlib.import_module("tests.testing_utils")._HUB_MODEL_ACCESSES = Everything()
