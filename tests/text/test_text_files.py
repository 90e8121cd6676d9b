"""Files of texts are counted and read line by line."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastbert.text.files import count_lines, read_texts


@pytest.mark.parametrize(("content", "n"), [(b"", 0), (b"a", 1), (b"a\n", 1), (b"\n\n", 2), (b"a\nb", 2)])
def test_count_lines(tmp_path: Path, content: bytes, n: int) -> None:
    """Catches a count that differs from the number of texts that are read."""
    file = tmp_path / "texts"
    file.write_bytes(content)
    assert count_lines(str(file)) == n == len(list(read_texts(str(file))))
