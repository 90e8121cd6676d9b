"""A wheel holds what it should and runs by itself, and nothing imports PyPI's `kernels`."""

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
from helpers import minilm_folder

ROOT = Path(__file__).resolve().parents[2]
NOT_SHIPPED = {".cpp", ".h", ".so", ".md"}  # libraries have a test of their own, because they may be left out
NOT_SOURCE = {"build", "dist", "__pycache__"}
CALLERS_OWN = {"PYTHONPATH", "PYTHONHOME", "TRITON_INTERPRET", "USE_HUB_KERNELS"}
NO_COMPILER = dict.fromkeys(("CC", "CXX", "LDCXXSHARED"), "/bin/false")
PIP = ["-m", "pip", "--disable-pip-version-check", "--quiet"]

COMPILED = pytest.mark.skipif(
    shutil.which("g++") is None or cpu.obstacle() is not None, reason="no compiler, or no processor, for C++ kernels"
)


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
    paths = []
    for folder, subfolders, names in os.walk(ROOT):
        subfolders[:] = [
            name
            for name in subfolders
            if not name.startswith(".") and name not in NOT_SOURCE and not Path(folder, name, "pyvenv.cfg").exists()
        ]
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(paths)


# A g++ that reads what the sdist holds and then takes the libraries of the checkout, which the same sources gave.
QUICK_COMPILER = """#!/bin/sh
set -e
for word; do
    case "$previous" in -o) output=$word ;; esac
    previous=$word
done
case " $* " in
*" -shared "*) cp "{libraries}/$(basename "$output")" "$output" ;;
*" -mavx512bf16 "*) g++ "$@" -E ;;
*) : >"$output" ;;
esac
"""


def quick_compiler(folder: Path) -> Path:
    """A compiler for `built`: it fails where a source or a header is missing, and compiles nothing."""
    path = folder / "g++"
    path.write_text(QUICK_COMPILER.format(libraries=Path(cpu.__file__).parent), encoding="utf-8")
    path.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def built() -> Iterator[Path]:
    """A folder with an sdist and a wheel made from it. The source is a copy of the checkout with a planted table."""
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
        command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", scratch / "out", copy]
        run(command, cwd=scratch, CXX=str(quick_compiler(scratch)))
        yield scratch / "out"


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    """The wheel that the compilers of this machine give."""
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel_without_kernels(built: Path) -> Iterator[Path]:
    """The wheel that the same sdist gives where every compiler fails."""
    (sdist,) = built.glob("*.tar.gz")
    with scratch_dir() as scratch:
        run([sys.executable, "-m", "tarfile", "--extract", sdist, scratch], cwd=scratch)
        (source,) = scratch.iterdir()
        build = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", scratch / "out", source]
        run(build, cwd=scratch, **NO_COMPILER)
        (path,) = (scratch / "out").glob("*.whl")
        yield path


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
        for path in (root / package).rglob("*")
        if path.is_file() and path.suffix not in NOT_SHIPPED and "__pycache__" not in path.parts
    }
    assert {"fastbert/py.typed", "fastbert_kernels/py.typed"} <= expected
    assert expected - names == set()
    assert "fastbert_kernels/tuned/planted_by_test.json" in names


@COMPILED
@pytest.mark.slow
def test_wheel_holds_the_kernels_for_cpus(wheel: Path) -> None:
    """Catches sources left out of the sdist, which an optional extension forgives, and a wheel for one Python alone."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {f"fastbert_kernels/cpu/{name}.x86_64.so" for name in cpu.VARIANTS} <= names
    assert wheel.name.removesuffix(".whl").split("-")[2:] == ["py3", "none", "linux_x86_64"]


@pytest.mark.slow
def test_wheel_without_a_compiler(wheel: Path, wheel_without_kernels: Path) -> None:
    """Catches a wheel without kernels that claims a platform, and one that puts its files elsewhere."""
    assert wheel_without_kernels.name.removesuffix(".whl").split("-")[2:] == ["py3", "none", "any"]
    with zipfile.ZipFile(wheel) as with_kernels, zipfile.ZipFile(wheel_without_kernels) as archive:
        expected = {name for name in with_kernels.namelist() if not name.endswith(".so")}
        assert set(archive.namelist()) == expected
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/WHEEL"))
        assert "Root-Is-Purelib: true" in archive.read(name).decode("utf-8")


ENCODE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import fastbert, fastbert_kernels
from fastbert_kernels import cpu
encoder = fastbert.SentenceEncoder.from_pretrained(sys.argv[2])
print(json.dumps({
    "files": [fastbert.__file__, fastbert_kernels.__file__],
    "shape": list(encoder.encode(["A text.", "Another text, which is longer."]).shape),
    "unavailable": cpu.obstacle(),
    "explain": str(fastbert.explain(encoder)),
}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param("wheel", marks=COMPILED), "wheel_without_kernels"])
def test_wheel_encodes_where_there_is_no_compiler(kind: str, request: pytest.FixtureRequest) -> None:
    """Catches kernels compiled at the first use, or not loaded from a wheel, and a fallback that gives no reason."""
    with scratch_dir() as scratch:
        target = scratch / "site"
        run([sys.executable, *PIP, "install", "--no-deps", "--target", target, request.getfixturevalue(kind)], scratch)
        command = [sys.executable, "-c", ENCODE, target, minilm_folder()]
        result = json.loads(run(command, scratch, **NO_COMPILER, PATH=str(scratch)).splitlines()[-1])
    assert all(Path(file).is_relative_to(target) for file in result["files"]), result["files"]
    assert result["shape"] == [2, 384]
    if kind == "wheel":
        assert result["unavailable"] is None
    else:
        assert "has no C++ kernels" in result["unavailable"]
        assert result["unavailable"] in result["explain"]


@pytest.mark.slow
def test_wheel_metadata(wheel_metadata: Message) -> None:
    """Catches a version that differs from the package's own, and a test or peer library among the dependencies."""
    version = runpy.run_path(str(ROOT / "fastbert" / "_version.py"))["__version__"]
    assert (wheel_metadata["Name"], wheel_metadata["Version"]) == ("fastbert-engine", version)
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
    assert set(wheel_metadata.get_all("Provides-Extra")) == {"demo", "train", "serve", "ray", "test", "bench"}


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


def distributions(requirement: Requirement) -> dict[str, importlib.metadata.Distribution]:
    """What the test environment has of a requirement and of all that this one needs, by name."""
    found: dict[str, importlib.metadata.Distribution] = {}
    waiting, seen = [requirement], set()
    while waiting:
        one = waiting.pop()
        if (key := (one.name, *sorted(one.extras))) in seen:
            continue
        seen.add(key)
        found[one.name] = distribution = importlib.metadata.distribution(one.name)
        assert one.specifier.contains(distribution.version, prereleases=True), f"{one}: {distribution.version}"
        for line in distribution.requires or ():
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in ("", *one.extras)):
                waiting.append(needed)
    return found


@pytest.mark.slow
def test_wheel_runs_in_a_clean_environment(wheel: Path, wheel_metadata: Message) -> None:
    """Catches a dependency that setup.py does not name, and imports that only work from the checkout."""
    with scratch_dir() as scratch:
        run([sys.executable, "-m", "venv", "--without-pip", scratch / "venv"], cwd=scratch)
        python = scratch / "venv" / "bin" / "python"
        (site,) = (scratch / "venv" / "lib").glob("python*/site-packages")
        # Links to what the wheel asks for stand for its installation, which takes a minute.
        for line in wheel_metadata.get_all("Requires-Dist"):
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": "serve"}):
                for distribution in distributions(requirement).values():
                    for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
                        if not (site / top).exists():
                            (site / top).symlink_to(distribution.locate_file(top))
        run([sys.executable, *PIP, "--python", python, "install", "--no-deps", wheel], cwd=scratch)

        result = json.loads(run([python, "-I", "-c", IMPORT_ALL], cwd=scratch))
        for name, file in result["files"].items():
            assert Path(file).is_relative_to(scratch / "venv"), f"{name} was imported from {file}"
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
    """Catches a probe that proves nothing, because it passes where `kernels/` has an `__init__.py`."""
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
