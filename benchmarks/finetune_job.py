"""A `Job` makes the runs of one part of finetune_report.py. It holds its data, time and folder, and the rows of its
table.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from public_data import data_files

ROOT = Path(__file__).resolve().parent.parent
CHILD = Path(__file__).resolve().with_name("finetune_child.py")
MODEL_NAME = "all-MiniLM-L6-v2"
FOR_STEPS = 0.75  # of the time of a part; the rest is for starting, tokenization, evaluation and baselines
PROBED, LEFT_OUT = 8, 2  # timed steps, and the number of first steps that do not count
QUICK = {"train": 160, "eval": 60}  # records
QUICK_STEPS = 3
Records = list[dict[str, Any]]


class Failed(RuntimeError):
    """A run has ended with an error. The message is the end of its output."""


def in_child(arguments: Sequence[str], threads: int) -> dict[str, Any]:
    """Runs `fastbert` with arguments in a fresh process. Returns the record of finetune_child.py."""
    record = Path(arguments[arguments.index("--output") + 1]).with_suffix(".record.json")
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, str(CHILD), str(record), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(threads)},
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise Failed(f"{shlex.join(arguments)}: {done.stderr.strip()[-600:]}")
    found: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    return found


@dataclass
class Run:
    """A Run is the result of one command: metrics.json, the record of its steps, and the folder of its model."""

    metrics: dict[str, Any]
    record: dict[str, Any]
    output: Path
    command: str

    def facts(self) -> dict[str, Any]:
        """Returns times of the run and its command, for a row."""
        steps = self.record["step_seconds"]
        return {
            "steps": len(steps),
            "step_seconds": statistics.median(steps),
            "training_seconds": self.record["training_seconds"],
            "seconds": self.record["seconds"],
            "peak_bytes": self.record["peak_bytes"],
            "command": self.command,
        }


@dataclass
class Job:
    """A Job makes runs. seconds: for the whole part. work: a folder for data and models. results: the folder that is
    kept.
    """

    name: str
    seconds: float
    work: Path
    results: Path
    model: str
    threads: int
    quick: bool = False
    run_command: Callable[[Sequence[str], int], dict[str, Any]] = in_child
    files: Callable[[str], Mapping[str, Path]] = data_files
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def records(self, name: str, part: str) -> Records:
        """Returns the records of a data set. Raises Unavailable if they cannot be fetched."""
        with open(self.files(name)[part], encoding="utf-8") as file:
            records = [json.loads(line) for line in file]
        every = math.ceil(len(records) / QUICK[part]) if self.quick else 1
        return records[::every]

    def write(self, name: str, records: Records) -> Path:
        """Writes records as JSON lines into the work folder."""
        path = self.work / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
        return path

    def once(self, name: str, task: str, options: Sequence[str]) -> Run:
        """Runs one command to the end, in a new folder of the work folder."""
        output = self.work / name
        shutil.rmtree(output, ignore_errors=True)
        arguments = ["finetune", task, "--model", self.model, "--output", str(output), "--no-progress", *options]
        record = self.run_command(arguments, self.threads)
        metrics = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
        return Run(metrics, record, output, self.without_paths(shlex.join(["fastbert", *arguments])))

    def train(self, task: str, train: Records, held: Records, *, batch_size: int, epochs: float,
              options: Sequence[str]) -> Run:  # fmt: skip
        """Trains for as many steps as the time of the part allows, for at most so many epochs.

        There is one evaluation, after the last step, so that the evaluation chooses nothing. metrics.json and the
        report are copied to the results.
        """
        data = ["--train", str(self.write("train", train)), "--batch-size", str(batch_size), *options]
        most = max(1, math.ceil(epochs * len(train) / batch_size))
        if self.quick:
            steps = min(QUICK_STEPS, most)
        else:
            probe = self.once("probe", task, [*data, "--steps", str(PROBED), "--eval-share", "0"])
            second = statistics.median(probe.record["step_seconds"][LEFT_OUT:])
            steps = min(most, max(PROBED, int(FOR_STEPS * self.seconds / second)))
            shutil.rmtree(probe.output)
        held_file = str(self.write("eval", held))
        run = self.once(
            "model", task,
            [*data, "--eval", held_file, "--steps", str(steps), "--evaluate-every", str(steps)],
        )  # fmt: skip
        self.keep(run, self.name)
        return run

    def keep(self, run: Run, name: str) -> None:
        """Copies metrics.json and the report of a run to the results, without paths of the machine."""
        folder = self.results / name
        folder.mkdir(parents=True, exist_ok=True)
        for file in ("metrics.json", "report.html"):
            (folder / file).write_text(self.without_paths((run.output / file).read_text("utf-8")), "utf-8")

    def without_paths(self, text: str) -> str:
        """Returns the text with file names instead of paths of the work folder, and with the model's public name."""
        return text.replace(f"{self.work}/", "").replace(self.model, MODEL_NAME)

    def row(self, task: str, data: str, metric: str, value: float, *, baseline: tuple[str, float] | None, bar: float,
            lower: bool = False, strict: bool = True, **facts: Any) -> None:  # fmt: skip
        """Adds a row. The value must exceed the bar, or reach it if not strict. lower: less is better."""
        ahead = bar - value if lower else value - bar
        reached = ahead > 0 if strict else ahead >= 0
        named = {"baseline": baseline[0], "baseline_value": baseline[1]} if baseline else {}
        relation = ("<" if lower else ">") if strict else ("≤" if lower else "≥")
        self.rows.append(
            {"part": self.name, "task": task, "data": data, "metric": metric, "value": value, **named, "bar": bar,
             "relation": relation, "reached": reached, "missed_by": 0.0 if reached else abs(ahead), **facts}
        )  # fmt: skip
