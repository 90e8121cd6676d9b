"""Fixtures of the command line: models in folders, and a file of texts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from cli_cases import TEXTS, save_models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Folders with tiny random models, by what they are for."""
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """A file with a text a line."""
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(TEXTS) + "\n")
    return file
