"""This module loads models for the subcommands of `fastbert`, by the options that they share."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from fastbert.checkpoint.config import BertConfig
from fastbert.checkpoint.families import our_class
from fastbert.checkpoint.folder import resolve
from fastbert.models import tasks
from fastbert.models.bert import BertModel
from fastbert.models.pretrained import PreTrainedModel, listed
from fastbert.pipelines.cross import CrossEncoder
from fastbert.pipelines.entities import EntityRecognizer
from fastbert.pipelines.names import SENTENCE_TRANSFORMERS, full_name
from fastbert.pipelines.pool import Pool
from fastbert.pipelines.sentence import SentenceEncoder
from fastbert.text.tokenizer import Tokenizer

logger = logging.getLogger("fastbert")

Model = TypeVar("Model", bound=PreTrainedModel)

TASKS = {name for name in vars(tasks) if name.startswith("BertFor")}


def device_of(args: argparse.Namespace) -> torch.device:
    """Returns the device that --device names; by default the GPU if there is one."""
    return torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def loading_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the arguments that every from_pretrained takes."""
    names = ("dtype", "backend", "strict", "precision", "revision")
    return {"device": device_of(args), **{name: getattr(args, name) for name in names}}


def load_encoder(args: argparse.Namespace) -> SentenceEncoder:
    """Returns the sentence encoder of --model, with --batch-tokens and --max-length if a command has them."""
    token_budget = getattr(args, "batch_tokens", None)
    encoder = SentenceEncoder.from_pretrained(args.model, token_budget=token_budget, **loading_arguments(args))
    if getattr(args, "max_length", None) is not None:
        encoder.max_seq_length = args.max_length
    return encoder


@contextmanager
def encoder_and_pool(args: argparse.Namespace) -> Iterator[tuple[SentenceEncoder, Pool | None]]:
    """Returns the sentence encoder, and with --workers or --devices a pool of its processes."""
    devices = args.devices.split(",") if args.devices else ["cpu"] * (args.workers or 0)
    if devices:
        if args.device is not None and args.device != devices[0]:
            raise ValueError(f"--device: got {args.device!r} beside --workers or --devices, expected one of them")
        args.device = devices[0]
    encoder = load_encoder(args)
    if len(devices) < 2:
        yield encoder, None
        return
    with encoder.start_multi_process_pool(devices) as pool:
        yield encoder, pool


def folder_of(args: argparse.Namespace) -> Path:
    """Returns the folder of --model. A hub id is downloaded."""
    return resolve(full_name(args.model, SENTENCE_TRANSFORMERS), revision=args.revision)


def load_any(args: argparse.Namespace) -> tuple[torch.nn.Module, Path]:
    """Returns a SentenceEncoder, or the class that the checkpoint names, and the folder of a hub id."""
    name = full_name(args.model, SENTENCE_TRANSFORMERS)
    folder = resolve(name, revision=args.revision)
    modules = folder / "modules.json"
    if modules.is_file() and "Pooling" in modules.read_text(encoding="utf-8"):
        return load_encoder(args), folder
    class_name = our_class((BertConfig.from_pretrained(folder).architectures or ["BertModel"])[0])
    cls = getattr(tasks, class_name) if class_name in TASKS else BertModel
    return cls.from_pretrained(name, **loading_arguments(args)), folder


def load_task(cls: type[Model], head: str, args: argparse.Namespace) -> tuple[Model, Tokenizer]:
    """Returns a model whose head is in the checkpoint, and its tokenizer, which truncates texts to the model's
    positions.

    head: its name, for the error that a checkpoint without it raises.
    """
    logger.addFilter(_is_not_about_fresh_weights)
    try:
        model = cls.from_pretrained(args.model, **loading_arguments(args))
    finally:
        logger.removeFilter(_is_not_about_fresh_weights)
    if model.missing_names:
        raise ValueError(f"{args.model}: has no {head} head: it lacks {listed(model.missing_names)}")
    tokenizer = Tokenizer.from_pretrained(args.model, revision=args.revision)
    limit, positions = tokenizer.model_max_length, model.longest_text
    tokenizer.model_max_length = positions if limit is None else min(limit, positions)
    return model, tokenizer


def _is_not_about_fresh_weights(record: logging.LogRecord) -> bool:
    """Filters out the loader's warning about a missing head, which is an error here."""
    return "freshly initialised" not in record.msg


def load_served(source: str, args: argparse.Namespace) -> Any:
    """Returns a CrossEncoder, an EntityRecognizer or a SentenceEncoder, by the head of the checkpoint."""
    options = {**loading_arguments(args), "batch_invariant": args.batch_invariant}
    options["token_budget"] = args.batch_tokens
    folder = resolve(full_name(source, SENTENCE_TRANSFORMERS), revision=args.revision)
    config = folder / "config.json"
    names = BertConfig.from_pretrained(folder).architectures or [] if config.is_file() else []
    if any(name.endswith("ForSequenceClassification") for name in names):
        return CrossEncoder.from_pretrained(source, max_length=args.max_length, **options)
    if any(name.endswith("ForTokenClassification") for name in names):
        return EntityRecognizer.from_pretrained(source, max_length=args.max_length, **options)
    encoder = SentenceEncoder.from_pretrained(source, **options)
    if args.max_length is not None:
        encoder.max_seq_length = args.max_length
    return encoder
