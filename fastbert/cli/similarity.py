"""`fastbert similarity` prints the cosine of two texts, or the lines of a file that are nearest to a text."""

from __future__ import annotations

import argparse
import heapq
from collections import deque
from typing import Any

from fastbert.cli.options import MINILM, add_field_option, add_model_command, positive_int


def add(commands: Any) -> None:
    """Adds the subcommand."""
    parser = add_model_command(
        commands,
        "similarity",
        "cosine similarity of two texts, or the lines of a file that are nearest to a text",
        f"""The output for two texts is their cosine. With --file, it is a line for each of the nearest texts: cosine,
line number and text.

examples:
  fastbert similarity "A cat sleeps." "A dog is asleep." --model {MINILM}
  fastbert similarity "How do I reset it?" --file faq.txt --top-k 3 --model ./my-model""",
    )
    parser.add_argument("texts", nargs="+", metavar="TEXT", help="two texts, or one text with --file")
    parser.add_argument("--file", dest="input", help="texts to search, one a line; - is standard input")
    add_field_option(parser)
    parser.add_argument(
        "--top-k", type=positive_int, default=5, metavar="N", help="texts to print (default: %(default)s)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Prints one cosine, or a line for each of the nearest texts."""
    if len(args.texts) != (2 if args.input is None else 1):
        args.usage_error("expected two texts, or one text and --file")
    import torch

    from fastbert.cli import models, texts

    lines = None if args.input is None else texts.read(args.input, args.field)
    encoder = models.load_encoder(args)
    first = torch.from_numpy(encoder.encode(args.texts[:1], normalize_embeddings=True))
    if lines is None:
        second = torch.from_numpy(encoder.encode(args.texts[1:], normalize_embeddings=True))
        print(f"{(first @ second.T).item():.6f}")
        return
    nearest: list[tuple[float, int, str]] = []  # (cosine, -line, text): a heap, the worst on top
    queue: deque[str] = deque()
    with texts.progress_bar(args.input) as bar:
        number = 0
        remembered = texts.remember(lines, queue)
        for vectors in encoder.encode_stream(remembered, normalize_embeddings=True, progress=bar.update):
            for cosine in (torch.from_numpy(vectors) @ first[0]).tolist():
                number += 1
                heapq.heappush(nearest, (cosine, -number, queue.popleft()))
                if len(nearest) > args.top_k:
                    heapq.heappop(nearest)
    for cosine, line, text in sorted(nearest, reverse=True):
        print(f"{cosine:.6f}\t{-line}\t{text}")
