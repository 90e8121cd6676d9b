"""The distribution: what a wheel holds, whether it runs where nothing else is installed, and PyPI's `kernels`."""

from __future__ import annotations

import ast
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from fastbert_kernels import cpu

ROOT = Path(__file__).resolve().parents[2]
NOT_SOURCE = {"build", "dist", "__pycache__"}
CALLERS_OWN = {"PYTHONPATH", "PYTHONHOME", "TRITON_INTERPRET", "USE_HUB_KERNELS"}
PIP = ["-m", "pip", "--disable-pip-version-check", "--quiet"]


def run(command: list[str | Path], cwd: Path, **variables: str) -> str:
    """Standard output of a command that must succeed, under none of the caller's settings of CALLERS_OWN."""
    environ = {name: value for name, value in os.environ.items() if name not in CALLERS_OWN}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**environ, **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@contextlib.contextmanager
def scratch_dir() -> Iterator[Path]:
    """A folder that goes as soon as it is done with: pytest keeps the last three of its own, and PyTorch is large."""
    with tempfile.TemporaryDirectory(prefix="fastbert-packaging-") as name:
        yield Path(name).resolve()


def source_files() -> list[Path]:
    """Every Python file of the checkout, outside hidden folders, environments and build outputs."""
    found = []
    for folder, subfolders, names in os.walk(ROOT):
        subfolders[:] = [
            name
            for name in subfolders
            if not name.startswith(".") and name not in NOT_SOURCE and not Path(folder, name, "pyvenv.cfg").exists()
        ]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(found)


@pytest.fixture(scope="module")
def wheel() -> Iterator[Path]:
    """A wheel made from an sdist made from a copy of the checkout, with a tuned table planted in the copy."""
    with scratch_dir() as scratch:
        copy = scratch / "checkout"
        copy.mkdir()
        for path in ROOT.iterdir():
            if path.is_file():
                shutil.copy(path, copy)
            elif path.name in ("fastbert", "kernels", "tests", "benchmarks"):
                shutil.copytree(path, copy / path.name, ignore=shutil.ignore_patterns(*NOT_SOURCE, "*.so"))
        tuned = copy / "kernels" / "fastbert_kernels" / "tuned"
        tuned.mkdir(exist_ok=True)
        (tuned / "planted_by_test.json").write_text("{}\n", encoding="utf-8")
        # This reads and runs the build system of pyproject.toml with the setuptools that the test extra brings.
        run([sys.executable, "-m", "build", "--no-isolation", "--outdir", scratch / "out", copy], cwd=scratch)
        (built,) = (scratch / "out").glob("*.whl")
        yield built


@pytest.fixture(scope="module")
def wheel_metadata(wheel: Path) -> Message:
    """The METADATA file of the wheel, as a message of headers."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode("utf-8"))


@pytest.mark.slow
def test_wheel_holds_the_two_packages_and_nothing_else(wheel: Path) -> None:
    """Catches a top-level `kernels`, `tests` or `benchmarks`, and data files or modules left out of the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    top_level = {name.split("/")[0] for name in names}
    assert {name for name in top_level if not name.endswith(".dist-info")} == {"fastbert", "fastbert_kernels"}
    expected = {
        path.relative_to(root).as_posix()
        for root, package in ((ROOT, "fastbert"), (ROOT / "kernels", "fastbert_kernels"))
        for pattern in ("*.py", "py.typed", "*.json")
        for path in (root / package).rglob(pattern)
    }
    assert {"fastbert/py.typed", "fastbert_kernels/py.typed"} <= expected
    assert expected - names == set()
    assert "fastbert_kernels/tuned/planted_by_test.json" in names


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None or cpu.unavailable() is not None, reason="no C++ kernels here")
def test_wheel_holds_the_kernels_for_cpus(wheel: Path) -> None:
    """Catches sources left out of the sdist, which an optional extension forgives, and a wheel for one Python alone."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {f"fastbert_kernels/cpu/{name}.x86_64.so" for name in cpu.VARIANTS} <= names
    assert wheel.name.split("-")[2:4] == ["cp310", "abi3"]


@pytest.mark.slow
def test_wheel_metadata(wheel_metadata: Message) -> None:
    """Catches a version that differs from the package's own, and a test or peer library among the dependencies."""
    version = runpy.run_path(str(ROOT / "fastbert" / "_version.py"))["__version__"]
    assert (wheel_metadata["Name"], wheel_metadata["Version"]) == ("fastbert", version)
    assert wheel_metadata["Requires-Python"] == ">=3.10"
    requirements = [Requirement(line) for line in wheel_metadata.get_all("Requires-Dist")]
    always = {one.name: str(one.marker or "") for one in requirements if "extra" not in str(one.marker)}
    assert always == {
        "torch": "",
        "triton": 'sys_platform == "linux"',
        "tokenizers": "",
        "safetensors": "",
        "numpy": "",
        "tqdm": "",
    }
    assert set(wheel_metadata.get_all("Provides-Extra")) == {"demo", "test", "bench"}


IMPORT_ALL = """
import importlib, json, pkgutil
import fastbert, fastbert_kernels
files = {package.__name__: package.__file__ for package in (fastbert, fastbert_kernels)}
modules = [
    found.name
    for package in (fastbert, fastbert_kernels)
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
    if not found.name.endswith(".__main__")
]
for name in modules:
    importlib.import_module(name)
print(json.dumps({"files": files, "modules": modules, "version": fastbert.__version__}))
"""


@pytest.mark.slow
def test_wheel_runs_in_a_clean_environment(wheel: Path, wheel_metadata: Message) -> None:
    """Catches a dependency that setup.py does not name, and imports that only work from the checkout."""
    with scratch_dir() as scratch:
        run([sys.executable, "-m", "venv", scratch / "venv"], cwd=scratch)
        python = scratch / "venv" / "bin" / "python"
        # constraints.txt leaves Triton to PyTorch, and a CPU build of PyTorch leaves it open.
        constraints = scratch / "constraints.txt"
        pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
        constraints.write_text(f"{pinned}\ntriton=={importlib.metadata.version('triton')}\n", encoding="utf-8")
        run([python, *PIP, "install", "--constraint", constraints, wheel], cwd=scratch)
        run([python, *PIP, "check"], cwd=scratch)

        result = json.loads(run([python, "-I", "-c", IMPORT_ALL], cwd=scratch))
        for name, file in result["files"].items():
            assert Path(file).resolve().is_relative_to(scratch / "venv"), f"{name} was imported from {file}"
        assert result["version"] == wheel_metadata["Version"]
        assert "fastbert.cli.main" in result["modules"]

        usage = run([scratch / "venv" / "bin" / "fastbert", "--help"], cwd=scratch)
        assert "usage: fastbert" in usage
        assert "embed" in usage


# Arguments, each possibly empty: a folder to put first on the path, and the version that `kernels` shall report.
# transformers takes a narrow range of versions and leaves any other one alone; with a version in that range it really
# imports from the package.
IMPORT_BERT = """
import importlib.metadata, importlib.util, json, sys
first, claim = sys.argv[1:]
if first:
    sys.path.insert(0, first)
if claim:
    version = importlib.metadata.version
    importlib.metadata.version = lambda name: claim if name == "kernels" else version(name)
spec = importlib.util.find_spec("kernels")
from transformers import BertModel
from transformers.utils import is_kernels_available
print(json.dumps({
    "model": BertModel.__module__,
    "available": is_kernels_available(),
    "origin": spec and spec.origin,
    "folders": list(spec.submodule_search_locations) if spec else [],
    "imported": getattr(sys.modules.get("kernels"), "__file__", None),
}))
"""


def import_bert(cwd: Path, path: list[Path | str], first: Path | str = "", claim: str = "") -> dict:
    """Import transformers' BertModel in a process of its own. The path is `first`, the folder it runs in, `path`."""
    joined = os.pathsep.join(map(str, path))
    command = [sys.executable, "-c", IMPORT_BERT, first, claim]
    return json.loads(run(command, cwd=cwd, PYTHONPATH=joined, HF_HUB_OFFLINE="1").splitlines()[-1])


@pytest.fixture(scope="module")
def pypi_kernels() -> Iterator[Path]:
    """A folder that holds PyPI's `kernels`; what it imports, the test environment has."""
    with scratch_dir() as scratch:
        target = ["--no-deps", "--constraint", ROOT / "constraints.txt", "--target", scratch / "site"]
        run([sys.executable, *PIP, "install", *target, "kernels"], cwd=scratch)
        yield scratch / "site"


@pytest.fixture(scope="module")
def accepted_version() -> str:
    """The lowest version of `kernels` that the installed transformers takes."""
    package = importlib.util.find_spec("transformers")
    assert package is not None and package.origin is not None
    table = runpy.run_path(str(Path(package.origin).with_name("dependency_versions_table.py")))
    (lowest,) = (one.version for one in Requirement(table["deps"]["kernels"]).specifier if one.operator == ">=")
    return lowest


@pytest.mark.slow
@pytest.mark.parametrize("path", [[], [".", "kernels"]], ids=["bare", "source-roots"])
def test_transformers_imports_from_the_root_without_pypi_kernels(path: list[str]) -> None:
    """Catches a `kernels/` that transformers takes for an installed package."""
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("kernels")
    result = import_bert(ROOT, [*path])
    assert result["model"] == "transformers.models.bert.modeling_bert"
    assert result["available"] is False
    assert result["origin"] is None and str(ROOT / "kernels") in result["folders"], "the folder was not in sight"


@pytest.mark.slow
@pytest.mark.parametrize("order", ["root-first", "installed-first"])
@pytest.mark.parametrize("claimed", [False, True], ids=["own-version", "accepted-version"])
def test_transformers_imports_from_the_root_with_pypi_kernels(
    pypi_kernels: Path, accepted_version: str, order: str, claimed: bool
) -> None:
    """Catches a `kernels/` that hides the installed package from transformers, whatever the order of the path."""
    claim = accepted_version if claimed else ""
    if order == "root-first":
        result = import_bert(ROOT, [".", "kernels", pypi_kernels], claim=claim)
    else:
        result = import_bert(ROOT, [".", "kernels"], first=pypi_kernels, claim=claim)
    assert result["model"] == "transformers.models.bert.modeling_bert"
    assert result["origin"] == str(pypi_kernels / "kernels" / "__init__.py")
    if claimed:
        assert result["available"] is True
        assert result["imported"] == result["origin"]


@pytest.mark.slow
def test_a_regular_package_kernels_would_be_noticed(pypi_kernels: Path, accepted_version: str, tmp_path: Path) -> None:
    """Catches a probe that proves nothing: where `kernels/` has an `__init__.py`, the same import must fail."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    with pytest.raises(AssertionError, match="ImportError"):
        import_bert(tmp_path, [".", pypi_kernels], claim=accepted_version)


def names_kernels(tree: ast.AST) -> Iterator[int]:
    """Lines of a module that import `kernels` or a part of it, by statement or by a literal name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""] if node.level == 0 else []
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = ast.unparse(node.func)
            names = [str(node.args[0].value)] if function.endswith(("import_module", "__import__")) else []
        else:
            continue
        if any(name.split(".")[0] == "kernels" for name in names):
            yield node.lineno


@pytest.mark.parametrize(
    "line", ["import os, kernels", "from kernels.a import b", "importlib.import_module('kernels.a')"]
)
def test_an_import_of_kernels_is_recognised(line: str) -> None:
    """Catches a blind spot of the search that the next test makes."""
    assert list(names_kernels(ast.parse(line))) == [1]
    assert not list(names_kernels(ast.parse(line.replace("kernels", "fastbert_kernels"))))


def test_nothing_imports_kernels() -> None:
    """Catches an import that would need, or find, something other than PyPI's package under the name `kernels`."""
    files = source_files()
    assert Path(__file__).resolve() in files
    offences = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in files
        for line in names_kernels(ast.parse(path.read_text(encoding="utf-8"), filename=str(path)))
    ]
    assert not offences, f"import fastbert_kernels, never kernels: {offences}"


@pytest.mark.parametrize("name", ["kernels/__init__.py", "tests/__init__.py", "conftest.py", "__init__.py"])
def test_no_file_puts_the_root_on_the_path(name: str) -> None:
    """Catches a file that makes `kernels` a regular package, or has pytest import from the repository root."""
    assert not (ROOT / name).exists(), f"{name} must not exist, see CONTRIBUTING.md"
