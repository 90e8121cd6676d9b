"""The check that `fastbert` is ours: another project of that name on PyPI installs a package `fastbert` too."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
VERSION = runpy.run_path(str(ROOT / "fastbert" / "_version.py"))["__version__"]
# What `import fastbert` runs. The copies of it need no PyTorch.
OURS = (
    "fastbert/__init__.py",
    "fastbert/_version.py",
    "fastbert/fastbert/__init__.py",
    "kernels/fastbert_kernels/__init__.py",
    "kernels/fastbert_kernels/distribution.py",
)
# The files of fastbert 0.2.2 that matter, with its own import lines; 0.0.1 has the same ones.
THEIRS = {
    "fastbert/__init__.py": "import os, sys\nfrom .config import *\nfrom .fastbert import FastBERT\n",
    "fastbert/config.py": "__version__ = '0.2.2'\nFILES_DIR = ''\n",
    "fastbert/fastbert.py": "from .config import *\nclass FastBERT: pass\n",
}
METADATA = {
    "METADATA": "Metadata-Version: 2.1\nName: fastbert\nVersion: 0.2.2\nSummary: The pipy version of FastBERT\n",
    "top_level.txt": "fastbert\n",
}
OURS_UNDER_THE_OLD_NAME = {
    "METADATA": "Metadata-Version: 2.4\nName: fastbert\nVersion: 0.1.0\n",
    "top_level.txt": "fastbert\nfastbert_kernels\n",
    "entry_points.txt": "[console_scripts]\nfastbert = fastbert.cli:main\n",
}
DIST_INFO = "fastbert-0.2.2.dist-info"
CURE = "pip uninstall fastbert"
IMPORT = "import fastbert; print(fastbert.__version__)"


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def install_ours(site: Path) -> None:
    for name in OURS:
        target = site / name.removeprefix("kernels/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)


def install_theirs(site: Path) -> None:
    write(site, THEIRS)
    write(site / DIST_INFO, METADATA)


def run(code: str, *path: Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs `code` with the folders of `path`, and no site-packages."""
    return subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))},
        cwd=cwd or path[0],
        capture_output=True,
        text=True,
        timeout=60,
    )


def error(code: str, *path: Path, cwd: Path | None = None) -> str:
    """The last line of the ImportError that `code` must end with."""
    done = run(code, *path, cwd=cwd)
    last = done.stderr.strip().rpartition("\n")[2]
    assert done.returncode == 1 and last.startswith("ImportError: "), done
    return last


def warning(*path: Path) -> str:
    """What `import fastbert`, which must give ours, writes to stderr."""
    done = run(IMPORT, *path)
    assert (done.returncode, done.stdout) == (0, f"{VERSION}\n"), done
    return done.stderr


def test_ours_alone_is_silent(tmp_path: Path) -> None:
    """Catches a check that takes our own files or metadata for the other project's."""
    install_ours(tmp_path)
    write(
        tmp_path / "fastbert_engine-0.1.0.dist-info", {**OURS_UNDER_THE_OLD_NAME, "METADATA": "Name: fastbert-engine"}
    )
    assert warning(tmp_path) == ""
    assert run("import fastbert.fastbert, fastbert_kernels", tmp_path).returncode == 0


@pytest.mark.parametrize("code", [IMPORT, "import fastbert._version", "from fastbert import FastBERT"])
@pytest.mark.parametrize("last", ["theirs", "ours"])
def test_both_in_one_folder_are_an_error(tmp_path: Path, last: str, code: str) -> None:
    """Catches an order of installation in which Python takes a mixture of both, or says nothing of it."""
    for install in (install_ours, install_theirs) if last == "theirs" else (install_theirs, install_ours):
        install(tmp_path)
    message = error(code, tmp_path)
    assert CURE in message and "--force-reinstall" in message
    assert str(tmp_path) in message


def test_theirs_earlier_on_the_path_is_an_error_once_ours_runs(tmp_path: Path) -> None:
    """Catches silence where the other project hides ours, as it hides an editable installation."""
    install_theirs(tmp_path / "site")
    install_ours(tmp_path / "checkout")
    path = tmp_path / "site", tmp_path / "checkout"
    assert run("from fastbert import FastBERT", *path).returncode == 0, "nothing of ours runs"
    message = error("import fastbert, fastbert_kernels", *path)
    assert CURE in message and str(tmp_path / "site" / "fastbert" / "__init__.py") in message
    assert run("import fastbert_kernels", *path).returncode == 0, "the kernels need no fastbert"


def test_theirs_later_on_the_path_is_a_warning(tmp_path: Path) -> None:
    """Catches a checkout on PYTHONPATH that the other project in site-packages would break."""
    install_ours(tmp_path / "checkout")
    install_theirs(tmp_path / "site")
    text = warning(tmp_path / "checkout", tmp_path / "site")
    assert "another project" in text and "0.2.2" in text
    assert str(tmp_path / "site") in text and str(tmp_path / "checkout") in text


@pytest.mark.parametrize("files", [METADATA, {"RECORD": ""}], ids=["metadata", "nearly-empty"])
def test_metadata_without_files(tmp_path: Path, files: dict[str, str]) -> None:
    """Catches a crash over what is left of an installation, and an `uninstall` to come that would delete our files."""
    install_ours(tmp_path / "site")
    write(tmp_path / "other" / DIST_INFO, files)
    version = "0.2.2" if files is METADATA else "(version unknown)"
    assert version in warning(tmp_path / "site", tmp_path / "other")
    write(tmp_path / "site" / DIST_INFO, files)
    message = error(IMPORT, tmp_path / "site")
    assert version in message and CURE in message


@pytest.mark.parametrize("folder", ["fastbert-0.1.0.dist-info", "fastbert.egg-info"])
@pytest.mark.parametrize("left_out", ["", "top_level.txt", "entry_points.txt"])
@pytest.mark.parametrize("same", [True, False], ids=["same-folder", "other-folder"])
def test_ours_under_the_old_name_is_silent(tmp_path: Path, folder: str, left_out: str, same: bool) -> None:
    """Catches an older installation of ours, or the egg-info of a checkout, taken for the other project."""
    install_ours(tmp_path / "checkout")
    files = {name: text for name, text in OURS_UNDER_THE_OLD_NAME.items() if name != left_out}
    write((tmp_path / "checkout" if same else tmp_path / "site") / folder, files)
    assert warning(tmp_path / "checkout", tmp_path / "site") == ""


def test_our_init_file_deleted_with_theirs(tmp_path: Path) -> None:
    """Catches silence after `pip uninstall fastbert`, which deletes the `__init__.py` that both had written."""
    install_ours(tmp_path)
    (tmp_path / "fastbert" / "__init__.py").unlink()
    message = error("import fastbert, fastbert_kernels", tmp_path)
    assert "no __init__.py" in message and "--force-reinstall" in message


def test_python_run_inside_the_package(tmp_path: Path) -> None:
    """Catches `fastbert/fastbert`, found from inside of `fastbert`, taken for the package itself."""
    install_ours(tmp_path)
    message = error("import fastbert", tmp_path, cwd=tmp_path / "fastbert")
    assert "another folder" in message
