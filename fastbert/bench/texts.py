"""The texts for measurements are lines of a file, or docstrings of the standard library."""

from __future__ import annotations

import importlib
import inspect
import os
import warnings
from collections.abc import Sequence
from typing import TypeVar

from fastbert.text import files

Item = TypeVar("Item")

# Modules of the standard library with many docstrings, all fast to import.
_DOCUMENTED = (
    "argparse", "ast", "asyncio", "bdb", "calendar", "codecs", "collections", "concurrent.futures", "configparser",
    "contextlib", "csv", "ctypes", "datetime", "decimal", "difflib", "dis", "doctest", "email.message", "enum",
    "fractions", "ftplib", "functools", "gzip", "heapq", "hmac", "html.parser", "http.client", "http.server",
    "imaplib", "inspect", "io", "ipaddress", "itertools", "json", "locale", "logging", "mailbox", "math", "mimetypes",
    "multiprocessing", "optparse", "os", "pathlib", "pdb", "pickle", "pickletools", "platform", "poplib", "pprint",
    "profile", "random", "re", "sched", "secrets", "selectors", "shelve", "shutil", "smtplib", "socket",
    "socketserver", "ssl", "statistics", "string", "struct", "subprocess", "symtable", "tarfile", "tempfile",
    "textwrap", "threading", "timeit", "tokenize", "traceback", "types", "typing", "unittest", "unittest.mock",
    "urllib.parse", "urllib.request", "uuid", "warnings", "weakref", "xml.dom.minidom", "xml.etree.ElementTree",
    "xml.sax", "xmlrpc.client", "zipfile",
)  # fmt: skip


def docstrings() -> list[str]:
    """Returns docstrings of the standard library: real English text of very mixed length."""
    texts: dict[str, None] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated modules are used as well
        for name in _DOCUMENTED:
            try:
                module = importlib.import_module(name)
            except ImportError:  # some builds of Python lack parts of the standard library
                continue
            classes = [value for value in vars(module).values() if inspect.isclass(value)]
            for member in (module, *vars(module).values(), *(v for owner in classes for v in vars(owner).values())):
                text = getattr(member, "__doc__", None) if callable(member) or inspect.ismodule(member) else None
                if isinstance(text, str) and len(text) > 20:
                    texts[inspect.cleandoc(text)] = None
    return list(texts)


def read_texts(path: str | os.PathLike[str]) -> list[str]:
    """Returns the lines of a UTF-8 file, one text each, except blank ones.

    Raises ValueError, with the file name, if it is not UTF-8 or has no text, and OSError if it cannot be read.
    """
    texts = [text for text in files.read_texts(os.fspath(path)) if text.strip()]
    if not texts:
        raise ValueError(f"{os.fspath(path)}: holds no text")
    return texts


def spread(items: Sequence[Item], n: int) -> list[Item]:
    """Returns n of the items, or all if there are fewer, evenly spaced over the list."""
    n = min(n, len(items))
    return [items[i * len(items) // n] for i in range(n)]
