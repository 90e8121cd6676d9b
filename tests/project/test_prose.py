"""Docstrings are sentences: those of tests say what mistake they catch, and the others do not open with a fragment."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))

# A first word that opens a fragment: what the sentence is about stands somewhere else, or nowhere.
FRAGMENTS = ("Of ", "That ", "Where ", "Those ", "These ", "As ", "Ours")
PLACES = {
    **{f"fastbert/{path.parent.name}": path.parent for path in sorted((ROOT / "fastbert").glob("*/__init__.py"))},
    "kernels": ROOT / "kernels",
    "benchmarks": ROOT / "benchmarks",
}


def documented(source: str) -> Iterator[tuple[ast.AST, str]]:
    """(node, docstring) of the module, of each class and of each function that has one."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text is not None:
                yield node, text


def fragments(source: str) -> list[str]:
    """The first lines of docstrings that open with a fragment, with their places."""
    return [
        f"line {getattr(node, 'lineno', 1)}: {text.splitlines()[0]}"
        for node, text in documented(source)
        if text.startswith(FRAGMENTS)
    ]


def unclear_tests(source: str) -> list[str]:
    """The names of test functions whose docstring does not begin with "Catches "."""
    tests = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name.startswith("test_")
    ]
    return [test.name for test in tests if not (ast.get_docstring(test) or "").startswith("Catches ")]


def test_a_fragment_is_recognised() -> None:
    """Catches a search that overlooks a docstring of a module, a class, a method or a test."""
    source = (
        '"""Of modules."""\nclass A:\n    """As a class."""\n    def f(self):\n        """Where it is."""\n'
        'def g():\n    """A function."""\ndef h(): ...\n'
    )
    assert fragments(source) == ["line 1: Of modules.", "line 2: As a class.", "line 4: Where it is."]
    tests = 'def test_a():\n    """Catches it."""\ndef test_b():\n    """A b."""\ndef test_c(): ...\n'
    assert unclear_tests(tests) == ["test_b", "test_c"]


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_tests_say_what_they_catch(path: Path) -> None:
    """Catches a test of which nobody can say what mistake would make it fail."""
    assert unclear_tests(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("place", sorted(PLACES))
def test_docstrings_are_sentences(place: str) -> None:
    """Catches a docstring that opens with a fragment, such as "Of ..." or "Where ..."."""
    files = sorted(PLACES[place].rglob("*.py"))
    lines_of = {path.relative_to(ROOT).as_posix(): fragments(path.read_text(encoding="utf-8")) for path in files}
    assert {name: lines for name, lines in lines_of.items() if lines} == {}
