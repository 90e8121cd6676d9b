"""`measure` runs the contests of `fastbert bench`: all texts at once, and single short ones."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from fastbert.bench import texts as text_sources
from fastbert.bench.devices import choose_device
from fastbert.bench.engines import EAGER
from fastbert.bench.options import LIMIT, BenchOptions
from fastbert.bench.peers import OURS, Peer, contest
from fastbert.bench.results import Results, Row, environment
from fastbert.bench.text_encoders import FastBert, TextEncoder, seconds_of, text_encoders
from fastbert.bench.text_peers import FEW, Latency, Throughput
from fastbert.bench.text_task import TextTask, known_warnings_hidden
from fastbert.ops import dispatch

LEAST_TEXTS = 32
PASSES = 15  # on a CPU, a pass of fastbert over the default texts takes about 1 / PASSES of the timing budget
LATENCY_ROUNDS, LEAST_LATENCY_ROUNDS = 200, 20
MEMORY_NOTE = (
    "Peak memory on a GPU is what PyTorch's allocator held, without the other competitors' share. On a CPU it is all "
    "that a fresh process held which imports the library, loads the model and encodes all texts once."
)


def measure(options: BenchOptions) -> Results:
    """Returns the results of one contest in throughput and one in latency.

    Raises ValueError or OSError for invalid options and for files that cannot be read.
    """
    if dispatch.interpreting():
        raise RuntimeError("TRITON_INTERPRET is set: nothing is measured in Triton's interpreter; unset it")
    all_texts = text_sources.docstrings() if options.texts is None else text_sources.read_texts(options.texts)
    device = choose_device(options.device)
    task = TextTask(
        options.model, text_sources.spread(all_texts, options.limit or LIMIT[device.type]), dtype=options.dtype,
        device=device, backend=options.backend, revision=options.revision,
    )  # fmt: skip
    encoders = choose_encoders(text_encoders(task), options.peers, always=(OURS, EAGER))
    if options.limit is None and device.type == "cpu":
        task.use(text_sources.spread(all_texts, affordable(task, options.seconds / PASSES)))

    n, name = len(task.texts), "docstrings" if options.texts is None else "texts"
    cut = f", {task.n_cut} of them cut to {task.exact.max_seq_length} tokens" if task.n_cut else ""
    source = options.texts or "the docstrings of the standard library"
    notes = {
        "texts": f"{n:,} of {len(all_texts):,}, evenly, from {source}{cut}",
        "checked against float64": f"{len(task.checked)} texts, {int(task.lengths[task.checked].sum()):,} tokens",
        "memory": MEMORY_NOTE,
    }
    results = Results(environment(device), notes=notes)
    model = "/".join(Path(options.model).parts[-2:])
    results.rows += _contest(
        task, {"model": model, "setting": "throughput"}, f"{n:,} {name}, {task.n_tokens / n:.0f} tokens on average",
        [Throughput(encoder) for encoder in encoders], task.reference(),
        rounds=options.rounds, max_seconds=options.seconds, tokens=task.n_tokens, items=n, memory=options.memory,
    )  # fmt: skip
    if options.latency:
        short = task.short_texts()
        results.rows += _contest(
            task, {"model": model, "setting": "latency"},
            f"one text at a time, {task.token_lengths(short).mean():.0f} tokens on average",
            [Latency(encoder, short) for encoder in encoders], task.vectors(short),
            rounds=LATENCY_ROUNDS, min_rounds=LEAST_LATENCY_ROUNDS, max_seconds=options.seconds / 4, items=1,
        )  # fmt: skip
    return results


def _contest(
    task: TextTask, labels: dict[str, str], workload: str, peers: Sequence[Peer], reference: Tensor, *,
    rounds: int, **timing: Any,
) -> list[Row]:  # fmt: skip
    """Runs a contest with a progress bar. There is no warm-up, because the check of the outputs has run everything."""

    def row(peer: Peer) -> Row:
        return Row("text", workload, peer.name, peer.dtype or task.dtype, extra=dict(labels))

    n_steps = (1 + bool(timing.get("memory"))) * len(peers) + rounds
    with known_warnings_hidden(), _progress(labels["setting"], n_steps) as step:
        return contest(
            peers, row, reference, device=task.device, eager=EAGER, on_step=step, on_round=step, rounds=rounds,
            warmup=0, **timing,
        )  # fmt: skip


def affordable(task: TextTask, seconds: float) -> int:
    """Returns the number of texts, up to the default limit, that fastbert encodes in about this time."""
    few, encoder = text_sources.spread(task.texts, FEW), FastBert(task)
    with known_warnings_hidden():
        encoder.prepare()
        encoder.encode(few)
        pace = len(few) / seconds_of(encoder.encode, few)
    return max(LEAST_TEXTS, min(LIMIT["cpu"], int(pace * seconds)))


def choose_encoders(encoders: Sequence[TextEncoder], names: str | None, *, always: Sequence[str]) -> list[TextEncoder]:
    """Returns the encoders that a comma-separated list names, ignoring case, and those that always take part."""
    if names is None:
        return list(encoders)
    known = {encoder.name.lower(): encoder for encoder in encoders}
    wanted = [name.strip().lower() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        expected = ", ".join(encoder.name for encoder in encoders)
        raise ValueError(f"peers: got {', '.join(map(repr, unknown))}, expected names among {expected}")
    return [encoder for encoder in encoders if encoder.name in always or encoder.name.lower() in wanted]


@contextmanager
def _progress(setting: str, total: int) -> Iterator[Callable[..., None]]:
    """Shows a bar on standard error, if that is a terminal.

    Call the result with the next step, or without after a round.
    """
    from tqdm import tqdm

    with tqdm(total=total, desc=setting, file=sys.stderr, disable=not sys.stderr.isatty(), leave=False) as bar:

        def step(what: str | None = None) -> None:
            if what is not None:
                bar.set_description(f"{setting}: {what}")
            bar.update()

        yield step
