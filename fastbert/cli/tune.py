"""`fastbert tune` times the kernels on this GPU and keeps the fastest in a table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastbert.cli.options import add_command, add_message_options, positive_int

if TYPE_CHECKING:
    from fastbert.tune.jobs import Job


def add(commands: Any) -> None:
    """Adds the subcommand."""
    parser = add_command(
        commands,
        "tune",
        "measures the kernels on this GPU for the shapes of your models, and keeps the fastest in a table",
        """The table is a file in the cache ($XDG_CACHE_HOME/fastbert/tuned, by default under ~/.cache) with the name of
the GPU. Every later process reads it. Entries for other shapes stay. Without a GPU the exit code is 2.

examples:
  fastbert tune                          measures the shapes of all-MiniLM-L6-v2, BERT-base and BERT-large
  fastbert tune ./my-model --dry-run     prints the list of measurements""",
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help="folders in Hugging Face layout, or hub ids")
    parser.add_argument("--tokens", nargs="+", type=positive_int, metavar="N", help="token counts to measure")
    parser.add_argument(
        "--dtype", nargs="+", choices=("bfloat16", "float16", "float32"), default=["bfloat16"],
        help="data types; bfloat16 and float16 share the entries of a table (default: bfloat16)",
    )  # fmt: skip
    parser.add_argument(
        "--precision", nargs="+", choices=("fp8", "int8"), default=(), help="also 8-bit linears, if the GPU has them"
    )
    parser.add_argument("--only", nargs="+", choices=("gemm", "attention"), default=(), help="only these kernels")
    parser.add_argument("--device", help="cuda, cuda:1 (default: the current GPU)")
    parser.add_argument("--out", metavar="FILE", help="file for the table, instead of the cache")
    parser.add_argument("--dry-run", action="store_true", help="print the list of measurements, and measure nothing")
    parser.add_argument(
        "--arch", type=positive_int, metavar="N", help="with --dry-run: a compute capability, 90 for 9.0"
    )
    parser.add_argument("--check", metavar="FILE", help="only say whether this table is for this GPU")
    add_message_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Tunes, or only checks a table, or only prints the planned timings. Returns 2 without a GPU."""
    if args.arch is not None and not args.dry_run:
        args.usage_error("--arch: expected only with --dry-run")
    import torch

    from fastbert.checkpoint.config import BertConfig
    from fastbert.checkpoint.folder import resolve
    from fastbert.tune import jobs, search

    device = torch.device(args.device or "cuda")
    models = [(name, BertConfig.from_pretrained(resolve(name))) for name in args.models] or jobs.default_models()
    tokens = args.tokens or jobs.TOKENS
    obstacle = None if args.arch is not None else search.device_obstacle(device)
    if obstacle is not None:
        print(f"fastbert: there is nothing to tune here: {obstacle}", file=sys.stderr)
        return 2

    from fastbert_kernels import launch, tables

    if args.arch is not None:
        gpu, arch = f"a GPU of compute capability {args.arch / 10}", args.arch
    else:
        gpu, arch = torch.cuda.get_device_name(device), launch.arch(device)
    if args.check is not None:
        tables.forget()
        tables.read_table_for(Path(args.check), gpu, arch)
        print(f"{args.check}: a table for this GPU, {gpu}")
        return 0
    dtypes = [getattr(torch, dtype) for dtype in args.dtype]
    shapes = jobs.jobs_of(models, dtypes, arch, args.only, args.precision)
    path = Path(args.out) if args.out is not None else tables.cache_folder() / tables.file_name(gpu)
    if args.dry_run:
        _print_jobs(shapes, gpu, tokens)
        print(f"the table would go to {path if args.arch is None else tables.cache_folder()}")
        return 0
    search.check_writable(path)
    old_table = search.read_earlier(path, gpu, arch)
    with torch.cuda.device(device):
        outcomes = search.tune(shapes, device, tokens)
    search.write(search.table_of(outcomes, gpu, arch, tokens, before=old_table), path)
    print(f"written: {path}")
    return 0


def _print_jobs(jobs: Sequence[Job], gpu: str, tokens: Sequence[int]) -> None:
    """Prints each shape with its candidates."""
    print(f"{gpu}: {len(jobs)} shapes, each at {', '.join(map(str, tokens))} tokens, those for few rows at their own")
    for job in jobs:
        print(f"{job.title}, {job.op} {job.key}: {len(job.candidates)} candidates")
        for candidate in job.candidates:
            print(f"  {candidate}")
