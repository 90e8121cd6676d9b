"""This module checks API keys. Requests need one if the server has keys."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterable
from pathlib import Path

VARIABLE = "FASTBERT_API_KEY"


class Keys:
    """A Keys holds the valid API keys. If it is empty, requests need no key."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests = [_digest(key) for key in keys]

    @classmethod
    def read(cls, file: str | os.PathLike[str] | None = None) -> Keys:
        """Reads the keys of a file, one per line, or the key in FASTBERT_API_KEY.

        Raises ValueError for a file without a key, because the server would then accept every request.
        """
        if file is None:
            return cls([key] if (key := os.environ.get(VARIABLE, "").strip()) else [])
        keys = [line.strip() for line in Path(file).read_text(encoding="utf-8-sig").splitlines()]
        if not any(keys):
            raise ValueError(f"{os.fspath(file)}: expected an API key, one a line")
        return cls(filter(None, keys))

    def __bool__(self) -> bool:
        return bool(self._digests)

    def allow(self, authorization: str) -> bool:
        """Tells whether a header "Bearer KEY" has one of the keys, in a time that does not depend on the keys."""
        scheme, _, key = authorization.partition(" ")
        digest = _digest(key.strip())
        matches = [hmac.compare_digest(digest, each) for each in self._digests]  # always compares all keys
        return scheme.lower() == "bearer" and any(matches)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
