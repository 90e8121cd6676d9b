"""`fastbert tokenizer train` learns a vocabulary from text."""

from __future__ import annotations

import argparse
from typing import Any

from fastbert.cli.options import add_command, add_message_options, add_reading_options, positive_int

SAMPLE_BYTES = 1_000_000_000
MOST_BYTES = 2**32 - 1  # the tokenizers library counts in 32 bits


def add(commands: Any) -> None:
    """Adds the subcommand."""
    parser = add_command(
        commands,
        "tokenizer",
        "learns a vocabulary from text",
        """example:
  fastbert tokenizer train --files corpus/ --vocab-size 30000 --output my-tokenizer""",
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    train = add_command(
        actions,
        "train",
        "learns a WordPiece vocabulary, as BERT has",
        """With --lowercase accents are removed too, except from text with Korean, because that would take Hangul
syllables apart. From text larger than --sample-bytes the command draws sentences, each with the same probability, and
prints the size of the sample. Tens of gigabytes would take days and overflow the counts.

examples:
  fastbert tokenizer train --files corpus/ --output my-tokenizer
  fastbert tokenizer train --files 'news/**/*.jsonl.gz' --field body --no-lowercase --output my-tokenizer""",
    )
    train.add_argument("--files", nargs="+", required=True, metavar="PATH", help="files, folders and globs of text")
    train.add_argument("--output", required=True, metavar="FOLDER", help="folder for the tokenizer")
    train.add_argument(
        "--vocab-size", type=positive_int, default=30000, metavar="N", help="size of the vocabulary (%(default)s)"
    )
    train.add_argument("--lowercase", action=argparse.BooleanOptionalAction, default=True, help="treat A as a")
    train.add_argument(
        "--strip-accents", action=argparse.BooleanOptionalAction,
        help="treat à as a (default: as --lowercase, but no if the text has Korean)",
    )  # fmt: skip
    train.add_argument(
        "--min-frequency", type=positive_int, default=2, metavar="N", help="least count of a merge (%(default)s)"
    )
    train.add_argument(
        "--sample-bytes", type=positive_int, default=SAMPLE_BYTES, metavar="N",
        help="learn from at most this many bytes of text (default: %(default)s)",
    )  # fmt: skip
    train.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the sample (default: %(default)s)")
    add_reading_options(train.add_argument_group("text"))
    add_message_options(train)
    train.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Learns a vocabulary and saves it. Prints its size, its sources, the share of [UNK] and the folder."""
    if args.sample_bytes > MOST_BYTES:
        args.usage_error(f"--sample-bytes: at most {MOST_BYTES}, as counts of the tokenizers library have 32 bits")
    import sys
    import tempfile
    from pathlib import Path

    from tqdm import tqdm

    from fastbert.text.tokenizer import Tokenizer
    from fastbert.training.data.encoding import Encoder
    from fastbert.training.data.sampling import draw
    from fastbert.training.data.sources import Counts, Reading, find_files, read_documents

    output = Path(args.output)
    if (output / "tokenizer.json").exists():
        raise FileExistsError(f"output: {args.output!r} holds a tokenizer already")
    files = find_files(args.files)
    counts = Counts()
    documents = read_documents(files, Reading(args.layout, args.field, args.errors), counts)
    total = sum(path.stat().st_size for path in files)
    shown = sys.stderr.isatty()
    with tempfile.TemporaryDirectory(prefix="fastbert-") as folder:
        path = Path(folder, "sample.txt")
        with tqdm(total=total, unit="B", unit_scale=True, desc="Reading", disable=not shown) as bar:

            def watched() -> Any:
                for document in documents:
                    yield document
                    bar.update(counts.read_bytes - bar.n)

            sample = draw(watched(), args.sample_bytes, args.seed, path)
        if not sample.sentences:
            raise ValueError(f"files: {len(files)} files of {total} bytes hold too little text to learn from")
        tokenizer = Tokenizer.train(
            path,
            vocab_size=args.vocab_size,
            lowercase=args.lowercase,
            strip_accents=args.strip_accents,
            min_frequency=args.min_frequency,
            show_progress=shown,
        )
        held_out, of = sample.held_out, f"{len(sample.held_out):,} held-out sentences"
        if not held_out:
            with path.open(encoding="utf-8") as lines:
                held_out, of = [line for line, _ in zip(lines, range(10_000), strict=False)], "text it was learnt from"
        ids = Encoder(tokenizer).encode(held_out).ids
    tokenizer.save_pretrained(output)
    unknown = int((ids == tokenizer.unk_token_id).sum()) / max(len(ids), 1)
    size = f"{tokenizer.vocab_size:,} tokens"
    if tokenizer.vocab_size < args.vocab_size:
        size += f", fewer than {args.vocab_size:,}: the text has no more that occur {args.min_frequency} times"
    part = "all but the held-out ones" if sample.whole else f"{sample.size / sample.all_size:.1%}, evenly drawn"
    print(f"vocabulary  {size}")
    print(f"text        {total:,} bytes read of {len(files):,} files, with {sample.all_size:,} bytes of sentences")
    print(f"learnt from {sample.sentences:,} of {sample.all_sentences:,} sentences, {sample.size:,} bytes ({part})")
    if counts.replaced_bytes:
        print(f"replaced    {counts.replaced_bytes:,} bytes that are not UTF-8, by U+FFFD")
    print(f"[UNK]       {unknown:.3%} of the tokens of {of}")
    print(f"saved       {output}")
