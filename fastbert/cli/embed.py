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
        "vectors of texts, one a line",
        f"""An empty line is a text too: row i of the output belongs to line i. The output file appears under its name
when it is complete.

examples:
  fastbert embed texts.txt --model {MINILM} --output vectors.npy
  cut -f2 table.tsv | fastbert embed - --model ./my-model --output vectors.npy
  fastbert embed articles.jsonl --field abstract --model ./my-model --output vectors.jsonl
  fastbert embed texts.txt --model ./my-model --output - | head -1""",
    )
    parser.add_argument("input", nargs="?", default="-", help="text or JSONL file, UTF-8; - is standard input")
    parser.add_argument(
        "-o", "--output", required=True, help="file that ends in .npy or .jsonl; - is JSONL on standard output"
    )
    add_field_option(parser)
    parser.add_argument("--normalize", action="store_true", help="vectors of length 1")
    parser.add_argument("--max-length", type=positive_int, metavar="N", help="tokens of a text that are read")
    parser.add_argument("--batch-tokens", type=positive_int, metavar="N", help="tokens in a batch")
    parser.add_argument("--prompt", help="goes in front of each text")
    parser.add_argument("--prompt-name", metavar="NAME", help="the same, by its name in the model's settings")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Encodes the texts window by window and writes each window's vectors."""
    from fastbert.cli import models, texts
    from fastbert.text.files import check_output, open_output

    check_output(args.output)
    lines = texts.read(args.input, args.field)
    encoder = models.load_encoder(args)
    queue: deque[str] = deque()
    n_dimensions = encoder.get_embedding_dimension()
    with texts.progress_bar(args.input) as bar, open_output(args.output, n_dimensions) as write:
        for vectors in encoder.encode_stream(
            texts.remember(lines, queue),
            prompt_name=args.prompt_name,
            prompt=args.prompt,
            normalize_embeddings=args.normalize,
            progress=bar.update,
        ):
            write([queue.popleft() for _ in range(len(vectors))], vectors)
