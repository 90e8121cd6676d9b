"""`fastbert bench`: fastbert beside what one would use instead, on the user's model, texts and device."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from fastbert.bench.peers import Peer
    from fastbert.bench.results import Results, Row
    from fastbert.bench.text import TextEncoder, TextTask

# With --help nobody waits for PyTorch: it is imported where it is needed.

FORMATS = (".html", ".md", ".json")
LIMIT = {"cpu": 300, "cuda": 4096}  # texts taken by default, at most
LEAST_TEXTS = 32
ROUNDS, SECONDS = 10, 60.0
PASSES = 15  # a pass of fastbert over the default texts, on a CPU, takes about this share of the time for timing
LATENCY_ROUNDS, LEAST_LATENCY_ROUNDS = 200, 20
MEMORY_NOTE = (
    "Peak memory on a GPU is what PyTorch's allocator held, without the other competitors' share. On a CPU it is all "
    "that a fresh process held which imports the library, loads the model and encodes all texts once."
)

EPILOG = """fastbert and transformers eager always take part: the one is what is measured, the other bounds its error.
Packages that are not installed are listed with that reason.

examples:
  fastbert bench ./my-model
  fastbert bench ./my-model --texts texts.txt --dtype bfloat16 --out report.html"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that `run` reads."""
    parser.add_argument("model", metavar="MODEL", help="folder in Hugging Face layout, or hub id")
    parser.add_argument("--texts", metavar="FILE", help="one a line, UTF-8 (default: docstrings of Python's library)")
    parser.add_argument(
        "--limit",
        type=_positive,
        metavar="N",
        help=f"texts taken, evenly (default: {LIMIT['cuda']} on a GPU, up to {LIMIT['cpu']} on a CPU)",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16 or float16 (default: the checkpoint's)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: the GPU if there is one)")
    parser.add_argument("--backend", default="auto", choices=("auto", "triton", "cpu", "torch"), help="of fastbert")
    parser.add_argument("--peers", metavar="NAME,...", help="only these competitors, by the names in the table")
    parser.add_argument(
        "--rounds", type=_positive, default=ROUNDS, metavar="N", help="over all texts, at most (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=SECONDS,
        metavar="S",
        help="no new round begins after that, once three are done (default: %(default)g)",
    )
    parser.add_argument(
        "--latency", action=argparse.BooleanOptionalAction, default=True, help="time single short texts too"
    )
    parser.add_argument(
        "--memory",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="on a CPU, encode all texts once more in a process of each competitor's own, for its peak memory",
    )
    parser.add_argument("--out", metavar="FILE", help="report .html or .md, or the results as .json")


def run(args: argparse.Namespace) -> int:
    """Measures, prints the tables to standard output and writes `--out`; 0 if fastbert's output was right, else 1.

    Raises ValueError or OSError for arguments that do not fit and files that cannot be read or written.
    """
    from fastbert.bench.report import render_terminal, write_report

    check_output(args.out)
    results = measure(args)
    print(render_terminal(results))
    if args.out is not None:
        if Path(args.out).suffix == ".json":
            results.save(args.out)
        else:
            write_report(results, args.out)
    return 0 if all(row.status == "ok" for row in results.rows if row.competitor == "fastbert") else 1


def check_output(path: str | None) -> None:
    """Raises ValueError or FileNotFoundError for an --out that could not be written after all the work."""
    if path is None:
        return
    if Path(path).suffix not in FORMATS:
        raise ValueError(f"out: got {path!r}, expected a name that ends in {', '.join(FORMATS)}")
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"out: there is no folder {str(Path(path).parent)!r}")


def measure(args: argparse.Namespace) -> Results:
    """The contests: all texts at once, and single short ones unless --no-latency."""
    from fastbert.bench import texts as sources
    from fastbert.bench.engines import EAGER
    from fastbert.bench.peers import OURS
    from fastbert.bench.results import Results, environment
    from fastbert.bench.text import Latency, TextTask, Throughput, text_encoders
    from fastbert.ops import dispatch

    if dispatch.interpreting():
        raise RuntimeError("TRITON_INTERPRET is set: nothing is timed under Triton's interpreter")
    found = sources.docstrings() if args.texts is None else sources.read_texts(args.texts)
    device = _device(args.device)
    taken = sources.spread(found, args.limit or LIMIT[device.type])
    task = TextTask(args.model, taken, dtype=args.dtype, device=device, backend=args.backend, revision=args.revision)
    encoders = chosen(text_encoders(task), args.peers, always=(OURS, EAGER))
    if args.limit is None and device.type == "cpu":
        task.use(sources.spread(found, affordable(task, args.seconds / PASSES)))

    n, name = len(task.texts), "docstrings" if args.texts is None else "texts"
    cut = f", {task.n_cut} of them cut to {task.exact.max_seq_length} tokens" if task.n_cut else ""
    notes = {
        "texts": f"{n:,} of {len(found):,}, evenly, from {args.texts or 'the docstrings of the standard library'}{cut}",
        "checked against float64": f"{len(task.checked)} texts, {int(task.lengths[task.checked].sum()):,} tokens",
        "memory": MEMORY_NOTE,
    }
    results = Results(environment(device), notes=notes)
    model = "/".join(Path(args.model).parts[-2:])
    results.rows += _contest(
        task, {"model": model, "setting": "throughput"}, f"{n:,} {name}, {task.n_tokens / n:.0f} tokens on average",
        [Throughput(encoder) for encoder in encoders], task.reference(),
        rounds=args.rounds, max_seconds=args.seconds, tokens=task.n_tokens, items=n, memory=args.memory,
    )  # fmt: skip
    if args.latency:
        short = task.short_texts()
        results.rows += _contest(
            task, {"model": model, "setting": "latency"},
            f"one text at a time, {task.token_lengths(short).mean():.0f} tokens on average",
            [Latency(encoder, short) for encoder in encoders], task.vectors(short),
            rounds=LATENCY_ROUNDS, min_rounds=LEAST_LATENCY_ROUNDS, max_seconds=args.seconds / 4, items=1,
        )  # fmt: skip
    return results


def _contest(
    task: TextTask, labels: dict[str, str], workload: str, peers: Sequence[Peer], reference: Tensor, *,
    rounds: int, **timing: Any,
) -> list[Row]:  # fmt: skip
    """A contest behind a progress bar. No warm-up: the check of the outputs has been one."""
    from fastbert.bench.engines import EAGER
    from fastbert.bench.peers import contest
    from fastbert.bench.results import Row
    from fastbert.bench.text import untold

    def row(peer: Peer) -> Row:
        return Row("text", workload, peer.name, peer.dtype or task.dtype, extra=dict(labels))

    with untold(), _progress(labels["setting"], (1 + bool(timing.get("memory"))) * len(peers) + rounds) as step:
        return contest(
            peers, row, reference, device=task.device, eager=EAGER, on_step=step, on_round=step, rounds=rounds,
            warmup=0, **timing,
        )  # fmt: skip


def affordable(task: TextTask, seconds: float) -> int:
    """How many texts, of those up to the default limit, fastbert encodes in about so many seconds."""
    from fastbert.bench.text import FEW, FastBert, seconds_of, untold
    from fastbert.bench.texts import spread

    few, encoder = spread(task.texts, FEW), FastBert(task)
    with untold():
        encoder.prepare()
        encoder.encode(few)
        pace = len(few) / seconds_of(encoder.encode, few)
    return max(LEAST_TEXTS, min(LIMIT["cpu"], int(pace * seconds)))


def chosen(encoders: Sequence[TextEncoder], names: str | None, *, always: Sequence[str]) -> list[TextEncoder]:
    """Those with a name in the comma-separated list, in any case of letters, and those that always take part."""
    if names is None:
        return list(encoders)
    known = {encoder.name.lower(): encoder for encoder in encoders}
    wanted = [name.strip().lower() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        expected = ", ".join(encoder.name for encoder in encoders)
        raise ValueError(f"peers: got {', '.join(map(repr, unknown))}, expected names among {expected}")
    return [encoder for encoder in encoders if encoder.name in always or encoder.name.lower() in wanted]


def _device(name: str | None) -> Any:
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type not in LIMIT:
        raise ValueError(f"device: got {name!r}, expected cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: got {name!r}, but PyTorch finds no NVIDIA GPU")
    return device


@contextmanager
def _progress(setting: str, total: int) -> Iterator[Callable[..., None]]:
    """A bar on standard error, if that is a terminal: called with what comes next, or with nothing after a round."""
    from tqdm import tqdm

    with tqdm(total=total, desc=setting, file=sys.stderr, disable=not sys.stderr.isatty(), leave=False) as bar:

        def step(what: str | None = None) -> None:
            if what is not None:
                bar.set_description(f"{setting}: {what}")
            bar.update()

        yield step


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text}")
    return value
