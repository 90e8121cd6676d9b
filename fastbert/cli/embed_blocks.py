"""`fastbert embed` works block by block if it can be resumed, writes to a folder, or runs on a Ray cluster."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from fastbert.text import blocks, storage
from fastbert.text.files import STDIN, check_output

PARTS = ".parts"  # ends the name of the folder that holds blocks until they become one file


def is_folder(output: str) -> bool:
    """Tells whether an output is a folder of files: a URL, or a name that ends in a slash or has no suffix."""
    return output != STDIN and (storage.is_url(output) or output.endswith("/") or not os.path.splitext(output)[1])


def run(args: argparse.Namespace) -> None:
    """Makes the files of all blocks that are not done, and joins them if one file was requested."""
    from fastbert.cli import models
    from fastbert.pipelines.bulk import BlockEncoder, encode_blocks, join_parts

    job, plan = _prepare(args)
    parts = job.parts
    parts.begin(args.resume)
    done = parts.done()
    todo = [block for block in plan if block.index not in done]
    if done:
        print(f"fastbert: {len(done)} of {len(plan)} blocks are done already", file=sys.stderr)
    whole = not is_folder(args.output)
    dimension = 0
    if args.ray is not None and todo:
        from fastbert.serving import ray_embed

        with _bar(len(todo), "block") as bar:
            counts = ray_embed.embed_blocks(
                args.ray, str(models.folder_of(args)), _loading(args), args.max_length, job, todo, args.actors,
                args.threads, lambda counts: bar.update(1),
            )  # fmt: skip
        counts.warn(args.max_length)
    elif todo or whole:
        with models.encoder_and_pool(args) as (encoder, pool), _bar(None, "text") as bar:
            dimension = encoder.get_embedding_dimension()
            counts = encode_blocks(BlockEncoder(encoder, job, pool), todo, bar.update)
            counts.warn(encoder.max_seq_length)
    parts.finish()
    if whole:
        join_parts(parts, args.output, dimension)


def _prepare(args: argparse.Namespace) -> tuple[Any, list[blocks.Block]]:
    """Returns the job, and all blocks of the input."""
    from fastbert.cli import models
    from fastbert.pipelines.bulk import BulkJob

    if args.input == STDIN or args.output == STDIN:
        raise ValueError("--resume, --ray and folders: expected files, which can be read again, and not standard input")
    folder, suffix = args.output, args.format
    if is_folder(args.output):
        folder = args.output if storage.is_url(args.output) else os.path.abspath(args.output)
    else:
        check_output(args.output)
        if args.ray is not None:
            raise ValueError(f"output: got {args.output!r}, expected a folder with --ray, to which all nodes write")
        folder, suffix = args.output + PARTS, os.path.splitext(args.output)[1].removeprefix(".")
    files = storage.files_in(args.input, blocks.INPUTS)
    files = [path if storage.is_url(path) else os.path.abspath(path) for path in files]
    plan = blocks.plan(files)
    parquet = blocks.is_parquet(files[0])
    key = args.field or ("text" if parquet or files[0].endswith(".jsonl") else None)
    suffix = suffix or ("parquet" if parquet else "jsonl")
    if suffix == "parquet":
        storage.need_pyarrow("--format parquet")
    options = {
        name: getattr(args, name) for name in ("prompt", "prompt_name", "normalize", "max_length", "batch_tokens")
    }
    loading = {name: getattr(args, name) for name in ("dtype", "backend", "precision")}
    fingerprint = {
        "input": [storage.stamp(path) for path in files],
        "model": blocks.model_fingerprint(models.folder_of(args)),
        "options": {**options, **loading, "field": key, "format": suffix},
    }
    parts = blocks.Parts(folder, suffix, len(plan), fingerprint)
    return BulkJob(parts, key, args.prompt, args.prompt_name, args.normalize), plan


def _loading(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the loading arguments of the model for every node."""
    names = ("dtype", "backend", "strict", "precision")
    return {"token_budget": args.batch_tokens, **{name: getattr(args, name) for name in names}}


def _bar(total: int | None, unit: str) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit=unit, file=sys.stderr, disable=not sys.stderr.isatty())
