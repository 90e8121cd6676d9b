"""This module checks that the package `fastbert` is the one of the distribution fastbert-engine.

On PyPI the distribution `fastbert` is another project. It also installs a package `fastbert`, so the two overwrite each
other's files, and pip gives no warning. The check is in this package, because the other project has no package of this
name.

The states and their results:

- Both are in one folder: an error at `import fastbert`, in either order of installation. If the other one is the later,
  Python runs its `fastbert/__init__.py`, which imports `fastbert.fastbert`, where this project calls this module.
- The other one is earlier on the path and hides this project (an editable installation is always later than
  site-packages): its code does not run at `import fastbert`. An error at the first import of `fastbert_kernels`.
- The other one is later on the path, as with a checkout on PYTHONPATH: this project works, and a warning is logged.
- There is an installation of this project under its old name `fastbert`: no error and no warning.
"""

from __future__ import annotations

import importlib.metadata
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger("fastbert")

NAME = "fastbert-engine"
OTHER = "The distribution 'fastbert' on PyPI is another project, which installs a package of the same name"
CURE = f"Run `pip uninstall fastbert`, then install {NAME} again with `pip install --force-reinstall --no-deps`"


def check_imported() -> None:
    """Raises ImportError if `fastbert` was imported and is not the package of fastbert-engine."""
    package = sys.modules.get("fastbert")
    # fastbert-engine's package sets its version before it imports anything else. The other package has no version.
    if package is not None and not hasattr(package, "__version__"):
        origin = getattr(package, "__file__", None)
        folders = ", ".join(map(str, getattr(package, "__path__", ())))
        source = origin or f"the folder {folders}, which has no __init__.py"
        raise ImportError(f"`import fastbert` took {source}, not the package of {NAME}. {OTHER}. {CURE}.")


def check_installed(package_folder: str) -> None:
    """Raises ImportError if the other project is in the same folder as this one. Logs a warning if it is elsewhere.

    package_folder: the folder of the package `fastbert` that is imported.
    """
    site = Path(package_folder).resolve().parent
    for version, folder in _installations_of_the_other():
        if folder == site:
            raise ImportError(f"fastbert {version} and {NAME} are both installed in {site}. {OTHER}. {CURE}.")
        logger.warning(
            "%s. Version %s of it is installed in %s; this process takes the package of %s in %s.",
            OTHER, version, folder, NAME, site,
        )  # fmt: skip


def _installations_of_the_other() -> Iterator[tuple[str, Path]]:
    """Yields version and folder of each distribution on the path that is named `fastbert` and is the other project."""
    for installed in importlib.metadata.distributions(name="fastbert"):
        names = (installed.read_text(file) or "" for file in ("top_level.txt", "entry_points.txt"))
        if not any("fastbert_kernels" in text or "fastbert.cli" in text for text in names):
            # `installed.version` fails for a folder that has lost its metadata.
            text = installed.read_text("METADATA") or installed.read_text("PKG-INFO") or ""
            version = re.search(r"^Version: *(\S+)", text, re.MULTILINE)
            yield version[1] if version else "(version unknown)", Path(str(installed.locate_file(""))).resolve()
