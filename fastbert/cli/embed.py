"""`fastbert embed` writes a vector for each text of a file."""

from __future__ import annotations

import argparse
from collections import deque
from typing import Any

from fastbert.cli.options import MINILM, add_field_option, add_model_command, positive_int


def add(commands: Any) -> None:
    """Adds the subcommand."""
    parser = add_model_command(
        commands,
        "embed",
        "vectors of texts, one text a line",
        f"""An empty line is also a text: row i of the output belongs to line i. The output file gets its name when it
is complete. An output without a suffix, or with a slash at its end, is a folder with one file for each input block.
With a folder, --resume or --ray, the input may be a folder of files, and with pyarrow Parquet files and URLs.

examples:
  fastbert embed texts.txt --model {MINILM} --output vectors.npy
  cut -f2 table.tsv | fastbert embed - --model ./my-model --output vectors.npy
  fastbert embed articles.jsonl --field abstract --model ./my-model --output vectors.jsonl
  fastbert embed texts.txt --model ./my-model --output - | head -1
  fastbert embed texts.txt --model ./my-model --output vectors.npy --workers 4 --resume
  fastbert embed articles.parquet --model ./my-model --output vectors --devices cuda:0,cuda:1
  fastbert embed --ray auto s3://bucket/articles s3://bucket/vectors --model ./my-model""",
    )
    parser.add_argument("input", nargs="?", default="-", help="text or JSONL file, UTF-8; - is standard input")
    parser.add_argument("place", nargs="?", metavar="output", help="the same as --output")
    parser.add_argument(
        "-o", "--output", help="file that ends in .npy or .jsonl, or a folder; - is JSONL on standard output"
    )
    add_field_option(parser)
    parser.add_argument("--normalize", action="store_true", help="scale vectors to length 1")
    parser.add_argument("--max-length", type=positive_int, metavar="N", help="greatest sequence length, in tokens")
    parser.add_argument("--batch-tokens", type=positive_int, metavar="N", help="greatest number of tokens in a batch")
    parser.add_argument("--prompt", help="text in front of each text")
    parser.add_argument("--prompt-name", metavar="NAME", help="name of a prompt in the model's settings")
    group = parser.add_argument_group("many devices")
    group.add_argument("--workers", type=positive_int, metavar="N", help="processes on the CPU, which share --threads")
    group.add_argument("--devices", metavar="LIST", help="devices with one process each: cuda:0,cuda:1")
    group.add_argument(
        "--resume", action="store_true", help="continue a stopped run that had --resume or a folder as output"
    )
    group.add_argument("--format", choices=("jsonl", "npy", "parquet"), help="format of the files in a folder")
    group.add_argument(
        "--ray", nargs="?", const="", metavar="ADDRESS",
        help="Ray cluster: host:port, ray://host:port, auto or local (default: RAY_ADDRESS, or local)",
    )  # fmt: skip
    group.add_argument(
        "--actors", type=positive_int, metavar="N", help="models on the cluster (default: one for each GPU)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Encodes the texts window by window, or block by block."""
    from fastbert.cli import embed_blocks

    _place_arguments(args)
    if args.output is None:
        args.usage_error("the following arguments are required: -o/--output")
    if args.workers is not None and args.devices is not None:
        args.usage_error("--workers and --devices: got both, expected one of them")
    if args.ray is not None or args.resume or embed_blocks.is_folder(args.output):
        embed_blocks.run(args)
        return
    if args.format is not None:
        args.usage_error(
            "--format: expected only with a folder as output; the suffix of an output file determines its format"
        )
    _stream(args)


def _stream(args: argparse.Namespace) -> None:
    """Encodes the texts window by window and writes each window's vectors."""
    from fastbert.cli import models, texts
    from fastbert.text.files import check_output, open_output

    check_output(args.output)
    lines = texts.read(args.input, args.field)
    with models.encoder_and_pool(args) as (encoder, pool):
        queue: deque[str] = deque()
        n_dimensions = encoder.get_embedding_dimension()
        with texts.progress_bar(args.input) as bar, open_output(args.output, n_dimensions) as write:
            for vectors in encoder.encode_stream(
                texts.remember(lines, queue),
                prompt_name=args.prompt_name,
                prompt=args.prompt,
                normalize_embeddings=args.normalize,
                progress=bar.update,
                pool=pool,
            ):
                write([queue.popleft() for _ in range(len(vectors))], vectors)


def _place_arguments(args: argparse.Namespace) -> None:
    """Puts input and output in their places, if --ray has taken the input for its address."""
    if args.ray and not (args.ray in ("auto", "local") or ":" in args.ray.removeprefix("ray://")) or _is_file(args.ray):
        args.ray, args.input, args.place = "", args.ray, args.input if args.input != "-" else args.place
    if args.place is not None:
        if args.output is not None:
            args.usage_error("output: named twice")
        args.output = args.place


def _is_file(address: str | None) -> bool:
    """Tells whether the value in the place of a cluster's address is a URL of files."""
    return address is not None and "://" in address and not address.startswith("ray://")
