"""What the subcommands of `fastbert` do. Each takes the parsed arguments and prints to standard output."""

from __future__ import annotations

import argparse
import heapq
import importlib.metadata
import logging
import os
import platform
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch

from fastbert._version import __version__
from fastbert.checkpoint.config import BertConfig
from fastbert.checkpoint.families import our_class
from fastbert.checkpoint.folder import resolve
from fastbert.models import tasks
from fastbert.models.bert import BertModel
from fastbert.models.pretrained import PreTrainedModel, listed
from fastbert.ops import dispatch
from fastbert.pipelines.names import SENTENCE_TRANSFORMERS, full_name
from fastbert.pipelines.sentence import SentenceEncoder
from fastbert.text.files import STDIN, check_output, count_lines, open_output, read_texts
from fastbert.text.tokenizer import Tokenizer

logger = logging.getLogger("fastbert")

Model = TypeVar("Model", bound=PreTrainedModel)

CLASSIFY_BATCH = 64
HEADS = {name for name in vars(tasks) if name.startswith("BertFor")}


def embed(args: argparse.Namespace) -> None:
    check_output(args.output)
    texts = _read(args)
    encoder = _encoder(args)
    taken: deque[str] = deque()
    with _progress(args.input) as bar, open_output(args.output, encoder.get_embedding_dimension()) as write:
        for vectors in encoder.encode_stream(
            _remembered(texts, taken),
            prompt_name=args.prompt_name,
            prompt=args.prompt,
            normalize_embeddings=args.normalize,
            progress=bar.update,
        ):
            write([taken.popleft() for _ in range(len(vectors))], vectors)


def similarity(args: argparse.Namespace) -> None:
    if args.input is not None:
        texts = _read(args)
    encoder = _encoder(args)
    first = torch.from_numpy(encoder.encode(args.texts[:1], normalize_embeddings=True))
    if args.input is None:
        second = torch.from_numpy(encoder.encode(args.texts[1:], normalize_embeddings=True))
        print(f"{(first @ second.T).item():.6f}")
        return
    best: list[tuple[float, int, str]] = []  # (cosine, -line, text): a heap, the worst on top
    taken: deque[str] = deque()
    with _progress(args.input) as bar:
        number = 0
        lines = _remembered(texts, taken)
        for vectors in encoder.encode_stream(lines, normalize_embeddings=True, progress=bar.update):
            for cosine in (torch.from_numpy(vectors) @ first[0]).tolist():
                number += 1
                heapq.heappush(best, (cosine, -number, taken.popleft()))
                if len(best) > args.top_k:
                    heapq.heappop(best)
    for cosine, line, text in sorted(best, reverse=True):
        print(f"{cosine:.6f}\t{-line}\t{text}")


def fill_mask(args: argparse.Namespace) -> None:
    model, tokenizer = _with_head(tasks.BertForMaskedLM, "masked-language-model", args)
    if tokenizer.mask_token is None:
        raise ValueError(f"{args.model}: the tokenizer has no mask token")
    encoding = tokenizer([args.text], return_tensors="pt").to(model.device)
    is_mask = encoding.input_ids[0] == tokenizer.mask_token_id
    n_masks = int(is_mask.sum())
    if n_masks == 0:
        raise ValueError(
            f"text: expected {tokenizer.mask_token} in it, within the {tokenizer.model_max_length} tokens that are read"
        )
    with torch.inference_mode():
        probabilities = model(**encoding).logits[0, is_mask].float().softmax(-1)  # (masks, V)
    best = probabilities[:, : tokenizer.vocab_size].topk(min(args.top_k, tokenizer.vocab_size))
    for i, (values, ids) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True), start=1):
        if n_masks > 1:
            print(f"{tokenizer.mask_token} {i} of {n_masks}")
        for value, token in zip(values, tokenizer.convert_ids_to_tokens(ids), strict=True):
            print(f"{value:.6f}\t{token}")


def next_sentence(args: argparse.Namespace) -> None:
    model, tokenizer = _with_head(tasks.BertForNextSentencePrediction, "next-sentence", args)
    encoding = tokenizer([args.first], [args.second], return_tensors="pt").to(model.device)
    with torch.inference_mode():
        p_is_next = model(**encoding).p_is_next.item()
    print(f"p_is_next\t{p_is_next:.6f}\nis_next\t{p_is_next > 0.5}")


def classify(args: argparse.Namespace) -> None:
    texts = iter(args.texts) if args.input is None else _read(args)
    model, tokenizer = _with_head(tasks.BertForSequenceClassification, "classification", args)
    labels, problem = model.config.id2label, model.config.problem_type
    regression = problem == "regression" or (problem is None and len(labels) == 1)
    while batch := list(islice(texts, CLASSIFY_BATCH)):
        with torch.inference_mode():
            logits = model(**tokenizer(batch, padding=True, return_tensors="pt").to(model.device)).logits.float()
        if not regression:
            logits = logits.sigmoid() if problem == "multi_label_classification" else logits.softmax(-1)
        for row in logits.tolist():
            order = range(len(row)) if regression else sorted(range(len(row)), key=lambda i: -row[i])
            print("\t".join(f"{labels[i]}\t{row[i]:.6f}" for i in islice(order, args.top_k)))


def info(args: argparse.Namespace) -> None:
    rows = [("fastbert", __version__), ("python", platform.python_version()), ("torch", torch.__version__)]
    for name in ("triton", "tokenizers", "safetensors", "numpy", "transformers", "sentence-transformers"):
        try:
            rows.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((name, "not installed"))
    rows += [("device", text) for text in _devices()]
    why_not = dispatch.triton_obstacle(_device(args))
    rows.append(("kernels", "Triton, on this device" if why_not is None else f"PyTorch's own here: {why_not}"))
    for name, text in rows:
        print(f"{name:<23}{text}")
    if args.model is None:
        return

    from fastbert.diagnostics.explain.entry import explain

    model, _ = any_model(args)
    bert: Any = model.model if isinstance(model, SentenceEncoder) else model
    what = type(model).__name__
    if isinstance(model, SentenceEncoder):
        what += f", vectors of {model.get_embedding_dimension()}, {model.max_seq_length} tokens a text"
    config, n_parameters = bert.config, sum(p.numel() for p in model.parameters())
    shape = f"{config.num_hidden_layers} layers, hidden {config.hidden_size}, {config.num_attention_heads} heads"
    what += "" if config.model_type == "bert" else f", model type {config.model_type}"
    print(f"\n{'checkpoint':<23}{args.model}\n{'':<23}{what}\n{'':<23}{shape}, {n_parameters:,} parameters")
    if bert.missing_names:
        print(f"{'':<23}lacks {listed(bert.missing_names)}")
    print(f"\n{explain(model)}")


def any_model(args: argparse.Namespace) -> tuple[torch.nn.Module, Path]:
    """A SentenceEncoder, or the class that the checkpoint names, and the folder of a hub id."""
    name = full_name(args.model, SENTENCE_TRANSFORMERS)
    folder = resolve(name, revision=args.revision)
    modules = folder / "modules.json"
    if modules.is_file() and "Pooling" in modules.read_text(encoding="utf-8"):
        return _encoder(args), folder
    named = our_class((BertConfig.from_pretrained(folder).architectures or ["BertModel"])[0])
    return (getattr(tasks, named) if named in HEADS else BertModel).from_pretrained(name, **_how(args)), folder


def bench(args: argparse.Namespace) -> int:
    from fastbert.bench.run import run

    return run(args)


def tune(args: argparse.Namespace) -> int | None:
    from fastbert.tune import jobs as tune_jobs
    from fastbert.tune import search as tuning

    device = torch.device(args.device or "cuda")
    models = [(name, BertConfig.from_pretrained(resolve(name))) for name in args.models] or tune_jobs.default_models()
    tokens = args.tokens or tune_jobs.TOKENS
    why_not = None if args.arch is not None else tuning.unable(device)
    if why_not is not None:
        print(f"fastbert: there is nothing to tune here: {why_not}", file=sys.stderr)
        return 2

    from fastbert_kernels import launch, tables

    if args.arch is not None:
        name, arch = f"a GPU of compute capability {args.arch / 10}", args.arch
    else:
        name, arch = torch.cuda.get_device_name(device), launch.arch(device)
    if args.check is not None:
        tables.forget()
        tables.read_table_for(Path(args.check), name, arch)
        print(f"{args.check}: a table for this GPU, {name}")
        return None
    jobs = tune_jobs.jobs(models, [getattr(torch, dtype) for dtype in args.dtype], arch, args.only, args.precision)
    path = Path(args.out) if args.out is not None else tables.cache_folder() / tables.file_name(name)
    if args.dry_run:
        print(f"{name}: {len(jobs)} shapes, each at {', '.join(map(str, tokens))} tokens")
        for job in jobs:
            print(f"{job.what}, {job.op} {job.key}: {len(job.candidates)} candidates")
            for candidate in job.candidates:
                print(f"  {candidate}")
        print(f"the table would go to {path if args.arch is None else tables.cache_folder()}")
        return None
    tuning.check_writable(path)
    before = tuning.earlier(path, name, arch)
    with torch.cuda.device(device):
        outcomes = tuning.tune(jobs, device, tokens)
    tuning.write(tuning.table_of(outcomes, name, arch, tokens, before=before), path)
    print(f"written: {path}")
    return None


def demo(args: argparse.Namespace) -> None:
    from fastbert.cli import demo as demonstration

    demonstration.run(args.model, n_texts=args.texts, **_how(args))


def _read(args: argparse.Namespace) -> Iterator[str]:
    """The texts of args.input, whose absence shows now and not after a model is loaded."""
    if args.input == STDIN:
        if sys.stdin is None or sys.stdin.isatty():
            raise ValueError("input: name a file, or pipe texts in, one a line")
    elif not os.path.exists(args.input):
        raise FileNotFoundError(f"input: there is no file {args.input!r}")
    field = args.field
    if field is None and Path(args.input).suffix == ".jsonl":
        field = "text"
    return read_texts(args.input, field)


def _remembered(texts: Iterable[str], taken: deque[str]) -> Iterator[str]:
    """The texts, put down in `taken` too: vectors come back a window later."""
    for text in texts:
        taken.append(text)
        yield text


def _progress(path: str) -> Any:
    """A progress bar on standard error, if that is a terminal."""
    from tqdm import tqdm

    shown = sys.stderr.isatty()
    return tqdm(total=count_lines(path) if shown else None, unit="text", file=sys.stderr, disable=not shown)


def _device(args: argparse.Namespace) -> torch.device:
    return torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _devices() -> Iterable[str]:
    yield f"cpu, {torch.get_num_threads()} threads"
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        facts = torch.cuda.get_device_properties(i)
        yield f"cuda:{i}, {facts.name}, capability {facts.major}.{facts.minor}, {facts.total_memory / 2**30:.0f} GiB"


def _how(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that every from_pretrained takes."""
    names = ("dtype", "backend", "strict", "precision", "revision")
    return {"device": _device(args), **{name: getattr(args, name) for name in names}}


def _encoder(args: argparse.Namespace) -> SentenceEncoder:
    encoder = SentenceEncoder.from_pretrained(
        args.model, token_budget=getattr(args, "batch_tokens", None), **_how(args)
    )
    if getattr(args, "max_length", None) is not None:
        encoder.max_seq_length = args.max_length
    return encoder


def _with_head(cls: type[Model], head: str, args: argparse.Namespace) -> tuple[Model, Tokenizer]:
    """A model whose head the checkpoint has, and its tokenizer, which cuts texts to the model's positions."""
    logger.addFilter(_tells_no_fresh_weights)
    try:
        model = cls.from_pretrained(args.model, **_how(args))
    finally:
        logger.removeFilter(_tells_no_fresh_weights)
    if model.missing_names:
        raise ValueError(f"{args.model}: has no {head} head: it lacks {listed(model.missing_names)}")
    tokenizer = Tokenizer.from_pretrained(args.model, revision=args.revision)
    limit, positions = tokenizer.model_max_length, model.longest_text
    tokenizer.model_max_length = positions if limit is None else min(limit, positions)
    return model, tokenizer


def _tells_no_fresh_weights(record: logging.LogRecord) -> bool:
    """A filter for the loader's warning about a missing head, which is an error here."""
    return "freshly initialised" not in record.msg
