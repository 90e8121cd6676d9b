"""This script times the input pipeline of pre-training, from text to packed, masked batches, on one core and on all.

    python benchmarks/input_pipeline.py [--out FILE.json] [--megabytes 8] [--rounds 3]

Each number of cores has its own process, which may use no other cores. Two parts are timed. Text to shards (reading,
splitting into sentences, tokenising, writing) happens once. Shards to batches (the plan, pairs, masks, packing) happens
beside every step. A document is some docstrings of the standard library, drawn from a seed, of about as many tokens as
in the synthetic corpus. Three words in a hundred are made up, since in running text some words are always new. Tokens
of batches count special tokens. A CPU second is one of any thread of the process, so other programs hardly change it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import statistics
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import workloads
from synthetic_corpus import SENTENCES_SIGMA

import models
from fastbert import Tokenizer
from fastbert.bench.measure import Timing
from fastbert.bench.peers import OURS
from fastbert.bench.report import render_terminal
from fastbert.bench.results import Results, Row, environment
from fastbert.bench.tables import si
from fastbert.bench.texts import docstrings
from fastbert.training.data.batch import Masking
from fastbert.training.data.loader import Loader
from fastbert.training.data.plan import BLOCK_STEPS, Plan
from fastbert.training.data.shards import Corpus
from fastbert.training.data.tokenizing import prepare, special_ids
from fastbert.training.settings import Settings

SUITE, SHARDS, BATCHES = "input", "text to shards", "shards to batches"
MAX_LENGTH, TOKENS_PER_BATCH = 512, 16_384  # as on a GPU
STEPS = 2 * BLOCK_STEPS  # that a round makes
TEXTS_OF_A_DOCUMENT = 5  # half of the documents have no more
MADE_UP = 0.03  # of all words


def write_text(path: Path, n_characters: int) -> None:
    """Writes documents with one sentence or more a line, and a blank line between documents."""
    texts = [lines for text in docstrings() if (lines := "\n".join(filter(str.strip, text.splitlines())))]
    draw, size = random.Random(workloads.SEED), 0
    with path.open("w", encoding="utf-8") as file:
        while size < n_characters:
            n_texts = max(1, round(draw.lognormvariate(math.log(TEXTS_OF_A_DOCUMENT), SENTENCES_SIGMA)))
            lines = "\n".join(draw.choices(texts, k=n_texts)).split("\n")
            size += file.write("\n".join(" ".join(_some_new(line.split(" "), draw)) for line in lines) + "\n\n")


def _some_new(words: list[str], draw: random.Random) -> list[str]:
    """Returns the words, and replaces some of them by random letters."""
    return [
        "".join(draw.choices(string.ascii_lowercase, k=draw.randint(4, 9)))
        if word and draw.random() < MADE_UP
        else word
        for word in words
    ]


class Clock:
    """A Clock holds the seconds of each round: wall time, and the time of the process's threads together."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []

    @contextmanager
    def round(self) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.seconds.append(time.perf_counter() - wall)
        self.cpu_seconds.append(time.process_time() - cpu)

    def of(self, n_tokens: int) -> dict[str, Any]:
        return {"tokens": n_tokens, "seconds": self.seconds, "cpu_seconds": statistics.median(self.cpu_seconds)}


def time_shards(text: Path, tokenizer: Tokenizer, cache: Path, rounds: int) -> tuple[Corpus, dict[str, Any]]:
    """Returns the corpus of a text, with its tokens and the seconds of each round."""
    clock = Clock()
    for _ in range(rounds):
        with clock.round():
            corpus = prepare([text], tokenizer, cache, rebuild=True, show_progress=False)
    return corpus, clock.of(corpus.n_tokens)


def time_batches(corpus: Corpus, tokenizer: Tokenizer, workers: int, rounds: int, steps: int = STEPS) -> dict[str, Any]:
    """Returns the tokens of so many steps, each of the default size, and the seconds of each round."""
    plan = Plan(
        corpus, seed=workloads.SEED, tokens_per_step=Settings.tokens_per_step,
        tokens_per_batch=min(TOKENS_PER_BATCH, Settings.tokens_per_step), max_length=MAX_LENGTH,
    )  # fmt: skip
    clock = Clock()
    for _ in range(rounds):
        with clock.round(), Loader(corpus, plan, special_ids(tokenizer), Masking(), workers=workers) as loader:
            n_tokens = sum(batch.n_tokens for step in itertools.islice(loader, steps) for batch in step.batches)
    return clock.of(n_tokens)


def child(cores: int, text: Path, folder: Path, rounds: int) -> None:
    """Runs in its own process, on so many cores, and prints the measurements as JSON."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    tokenizer = Tokenizer.from_pretrained(folder)
    with tempfile.TemporaryDirectory() as cache:
        corpus, shards = time_shards(text, tokenizer, Path(cache), rounds)
        batches = time_batches(corpus, tokenizer, cores if cores > 1 else 0, rounds)
    print(json.dumps({SHARDS: shards, BATCHES: batches}))


def measure(cores: int, text: Path, folder: Path, rounds: int) -> list[Row]:
    """Returns the rows of both parts on so many cores."""
    line = [sys.executable, __file__, "--child", str(cores), str(text), str(folder), "--rounds", str(rounds)]
    variables = {name: str(cores) for name in ("RAYON_NUM_THREADS", "OMP_NUM_THREADS")}
    done = subprocess.run(line, env={**os.environ, **variables}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr.strip() or f"exit code {done.returncode}")
    return rows_of(cores, json.loads(done.stdout.splitlines()[-1]))


def rows_of(cores: int, measured: dict[str, dict[str, Any]]) -> list[Row]:
    rows = []
    for workload, values in measured.items():
        seconds, tokens = values.pop("seconds"), values["tokens"]
        setting = f"{cores} core" + "s" * (cores > 1)
        row = Row(SUITE, workload, OURS, "uint16", extra={"setting": setting, "cores": cores, **values})
        row.timed(Timing(tuple(seconds)), tokens=tokens)
        a_core, a_cpu_second = tokens / statistics.median(seconds) / cores, tokens / values["cpu_seconds"]
        row.extra |= {"tokens_per_second_and_core": a_core, "tokens_per_cpu_second": a_cpu_second}
        row.extra["note"] = f"{si(a_core)} tokens/s a core, {si(a_cpu_second)} tokens a CPU second"
        rows.append(row)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="result file to write")
    parser.add_argument("--megabytes", type=float, default=8.0, help="of text (8)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", nargs=3, metavar=("CORES", "TEXT", "TOKENIZER"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        cores, text, folder = options.child
        child(int(cores), Path(text), Path(folder), options.rounds)
        return
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    results = Results({**environment(torch.device("cpu")), "cores": n_cores})
    folder = models.text_model()
    results.notes["tokenizer"] = models.text_model_name()
    with tempfile.TemporaryDirectory() as temporary:
        text = Path(temporary) / "text.txt"
        write_text(text, round(options.megabytes * 1e6))
        for cores in sorted({1, n_cores}):
            results.rows += measure(cores, text, folder, options.rounds)
    if options.out:
        results.save(options.out)
    print(render_terminal(results))


if __name__ == "__main__":
    main()
