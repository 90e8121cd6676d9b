"""This script makes the page of a folder of results, and the numbers and the chart of the README and of docs/.

    python benchmarks/report.py                                 the newest folder in benchmarks/results
    python benchmarks/report.py benchmarks/results/FOLDER       index.md and index.html in that folder
    python benchmarks/report.py FOLDER --out page.html          only that page
    python benchmarks/report.py --readme                        rewrites docs/numbers.md, docs/speed.svg and README.md

A folder holds the JSON files of one device: benchmarks/results/<device>-<date>/.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import readme_chart
import readme_figures

from fastbert.bench.report import render_terminal, write_report
from fastbert.bench.results import Results
from fastbert.checkpoint.files import write_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def load(path: Path) -> Results:
    """Returns the results of a file, or all *.json files of a folder joined into one.

    Raises ValueError with the name of the file or folder in these cases: there is no file; a file is cut short, has
    another version or is no result file; or the files come from different devices.
    """
    if not path.is_dir():
        return Results.load(path)
    files = sorted(path.glob("*.json"))
    if not files:
        raise ValueError(f"{path}: no result files (*.json) in it")
    return combined({file.name: Results.load(file) for file in files}, str(path))


def combined(parts: dict[str, Results], where: str) -> Results:
    """Joins several results of one device. Notes get the name of their file, and different environments are joined.

    If two files have ceilings, those of the later file count.
    """
    devices = {name: part.environment.get("device") for name, part in parts.items()}
    if len(set(devices.values())) > 1:
        listed = ", ".join(f"{device} in {name}" for name, device in devices.items())
        raise ValueError(f"{where}: results of different devices: {listed}")
    environment: dict[str, Any] = {}
    ceilings: dict[str, float] = {}
    notes: dict[str, Any] = {}
    for name, part in parts.items():
        environment = _joined(environment, part.environment)
        ceilings |= part.ceilings
        notes |= {f"{Path(name).stem}: {key}": value for key, value in part.notes.items()}
    return Results(environment, [row for part in parts.values() for row in part.rows], ceilings, notes)


def _joined(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Joins two environments. Of dates it takes the later; of other differences it writes "this / that"."""
    joined = dict(one)
    for key, value in other.items():
        before = joined.get(key)
        if key not in joined or before == value:
            joined[key] = value
        elif isinstance(before, dict) and isinstance(value, dict):
            joined[key] = _joined(before, value)
        elif key == "date":
            joined[key] = max(str(before), str(value))
        elif str(value) not in str(before).split(" / "):
            joined[key] = f"{before} / {value}"
    return joined


def folders(results: Path = RESULTS) -> dict[Path, Results]:
    """Reads every folder of results."""
    return {folder: load(folder) for folder in sorted(results.glob("*/")) if any(folder.glob("*.json"))}


def newest(results: Path = RESULTS) -> Path:
    """Returns the folder with the latest results. Raises ValueError if there is none."""
    results_by_folder = folders(results)
    if not results_by_folder:
        raise ValueError(f"{results}: no folder with result files in it; run `make bench` first")
    return max(results_by_folder, key=lambda folder: str(results_by_folder[folder].environment.get("date")))


def write_pages(results: Results, out: Path) -> list[Path]:
    """Writes the page to `out` if that is named .md or .html, else to index.md and index.html in the folder `out`."""
    pages = [out] if out.suffix.lower() in (".md", ".html") else [out / "index.md", out / "index.html"]
    title = f"fastbert on {results.environment.get('device') or 'an unknown device'}"
    for page in pages:
        write_report(results, page, title=title)
    return pages


def write_readme(root: Path, results_by_folder: Mapping[Path, Results]) -> list[Path]:
    """Writes the table of docs/numbers.md, the chart docs/speed.svg and its caption in README.md. Returns the written
    files.
    """
    numbers, chart, readme = root / "docs" / "numbers.md", root / readme_chart.CHART, root / "README.md"
    readme_figures.rewrite(numbers, readme_figures.section(results_by_folder))
    headline = readme_chart.headline(results_by_folder)
    if headline is None:
        return [numbers]
    write_text(chart, headline.svg())
    readme_figures.rewrite(readme, headline.caption())
    return [numbers, chart, readme]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 for written, 1 for invalid results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="?", type=Path, metavar="RESULTS_DIR", help="default: the newest folder")
    parser.add_argument("--out", type=Path, metavar="PATH", help="page (.md, .html) or folder; default: RESULTS_DIR")
    parser.add_argument(
        "--readme", action="store_true", help="rewrite the numbers and the chart of README.md and docs/"
    )
    parser.add_argument("--terminal", action="store_true", help="print the ratios, write nothing")
    args = parser.parse_args(argv)
    try:
        if args.readme:
            for path in write_readme(ROOT, folders()):
                print(path.relative_to(ROOT))
            if args.results is None and args.out is None and not args.terminal:
                return 0
        folder = args.results or newest()
        results = load(folder)
        if args.terminal:
            print(render_terminal(results, summary_only=True), end="")
            return 0
        out = args.out or (folder if folder.is_dir() else folder.with_suffix(".html"))
        for page in write_pages(results, out):
            print(page)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
