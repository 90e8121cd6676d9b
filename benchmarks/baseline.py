"""`committed` finds the baseline of new results. By default it is the newest committed results of the same device.

Committed results are read from git's last commit. So `make bench` may overwrite the files of the same day.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import report

from fastbert.bench.results import Results


def committed(new: Path, results: Path = report.RESULTS) -> tuple[str, Results]:
    """Returns name and content of the baseline for `new`, a result file or a folder of them.

    Raises ValueError outside a git checkout, or without committed results of this device that differ from the new ones.
    """
    now = report.load(new)
    device = now.environment.get("device")
    try:
        names = _git(results, "ls-tree", "-r", "--name-only", "HEAD", "--", ".").splitlines()
    except (OSError, subprocess.SubprocessError) as error:
        raise ValueError(f"{results}: committed results could not be read from git: {error}") from error
    folders: dict[str, dict[str, Results]] = {}
    for name in names:
        if name.endswith(".json") and "/" in name:
            content = _git(results, "show", f"HEAD:./{name}")
            folders.setdefault(name.rpartition("/")[0], {})[name] = Results.parse(content, f"HEAD:{name}")
    candidates = {folder: report.combined(parts, folder) for folder, parts in folders.items()}
    candidates = {
        folder: then
        for folder, then in candidates.items()
        if then.environment.get("device") == device and then.environment.get("date") != now.environment.get("date")
    }
    if not candidates:
        raise ValueError(f"there are no committed results of {device!r} beside {new}: name the results to compare with")
    newest = max(candidates, key=lambda folder: str(candidates[folder].environment.get("date")))
    return f"{newest} as committed", candidates[newest]


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
