"""`fastbert info` prints versions and devices. With a model it prints the kernel of each operation, and the reason."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from collections.abc import Iterator
from typing import Any

from fastbert._version import __version__
from fastbert.cli.options import add_model_command

PACKAGES = ("triton", "tokenizers", "safetensors", "numpy", "transformers", "sentence-transformers")


def add(commands: Any) -> None:
    """Adds the subcommand."""
    parser = add_model_command(
        commands,
        "info",
        "versions and devices; with --model, the kernel of each operation and the reason for it",
        """examples:
  fastbert info
  fastbert info --model google-bert/bert-base-uncased --dtype bfloat16""",
        model_required=False,
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Prints the table of this machine, and for a model its shape and the output of `explain`."""
    for name, text in _machine(args):
        print(f"{name:<23}{text}")
    if args.model is None:
        return

    from fastbert.cli import models
    from fastbert.diagnostics.explain.entry import explain

    model, _ = models.load_any(args)
    print(f"\n{'checkpoint':<23}{args.model}")
    for line in _facts(model):
        print(f"{'':<23}{line}")
    print(f"\n{explain(model)}")


def _machine(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Yields names and values: versions, devices, and the available kernels."""
    import torch

    from fastbert.cli import models
    from fastbert.engine import cpu_encoder
    from fastbert.ops import dispatch

    yield from (("fastbert", __version__), ("python", platform.python_version()), ("torch", torch.__version__))
    for name in PACKAGES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield name, "not installed"
    yield "device", f"cpu, {torch.get_num_threads()} threads ({args.thread_limit.reason})"
    obstacle = cpu_encoder.bfloat16_obstacle()
    yield "bfloat16 on the CPU", "faster than float32: dtype='auto' takes it" if obstacle is None else obstacle
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        gpu = torch.cuda.get_device_properties(i)
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        yield "device", f"cuda:{i}, {gpu.name}, capability {gpu.major}.{gpu.minor}, {memory}"
    yield "C++ kernels", "; ".join(_cpp_kernels())
    device = models.device_of(args)
    obstacle = dispatch.triton_obstacle(device)
    yield "Triton kernels", f"on {device}" if obstacle is None else f"none on {device}: {obstacle}"


def _cpp_kernels() -> Iterator[str]:
    """Names the instructions that the C++ kernels use on this processor, and those that are missing."""
    from fastbert_kernels import cpu

    obstacle = cpu.obstacle()
    if obstacle is not None:
        yield f"none, PyTorch's own operations run on the CPU: {obstacle}"
        return
    yield f"{cpu.instructions()}, the best of those for this processor"
    if (obstacle := cpu.int8_obstacle()) is not None:
        yield f"none for int8: {obstacle}"


def _facts(model: Any) -> Iterator[str]:
    """Yields the class, the shape and the missing weights of a model, one line each."""
    from fastbert.models.pretrained import listed
    from fastbert.pipelines.sentence import SentenceEncoder

    bert, description = model, type(model).__name__
    if isinstance(model, SentenceEncoder):
        bert = model.model
        description += f", vectors of {model.get_embedding_dimension()}, {model.max_seq_length} tokens a text"
    config, n_parameters = bert.config, sum(p.numel() for p in model.parameters())
    if config.model_type != "bert":
        description += f", model type {config.model_type}"
    yield description
    shape = f"{config.num_hidden_layers} layers, hidden {config.hidden_size}, {config.num_attention_heads} heads"
    yield f"{shape}, {n_parameters:,} parameters"
    if bert.missing_names:
        yield f"lacks {listed(bert.missing_names)}"
