"""Small pre-training runs for tests: Python's own documentation as text, a tokenizer of it, and a small model."""

from __future__ import annotations

import ast
import functools
import json
import os
import pydoc_data.topics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fork_server
from fastbert import BertConfig, Tokenizer
from fastbert.training.journal import read_journal
from fastbert.training.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY = 1500
LONG_STEPS = 60
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
# Fields of a journal that say how fast a run was, and not what it computed.
TIMINGS = {"tokens_per_second", "waiting", "seconds"}


@functools.cache
def folder() -> Path:
    """A folder with text.jsonl, tokenizer/ and model.json, once for each process."""
    place = Path(tempfile.mkdtemp(prefix="fastbert-pretraining-"))
    topics = [text for _, text in sorted(pydoc_data.topics.topics.items()) if len(text) > 400]
    lines = (json.dumps({"text": text}) + "\n" for text in topics)
    (place / "text.jsonl").write_text("".join(lines), encoding="utf-8")
    tokenizer = Tokenizer.train(topics, vocab_size=VOCABULARY)
    tokenizer.save_pretrained(place / "tokenizer")
    config = BertConfig(vocab_size=tokenizer.vocab_size, max_position_embeddings=64, **SMALL)
    (place / "model.json").write_text(json.dumps(config.to_dict()), encoding="utf-8")
    return place


@functools.cache
def docstrings() -> tuple[str, ...]:
    """The docstrings of the top modules of Python's library, of 80 characters and more."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts: list[str] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        texts += filter(None, (ast.get_docstring(node) for node in nodes if isinstance(node, kinds)))
    return tuple(text for text in texts if len(text) >= 80)


def settings(output: Path, **changed: Any) -> Settings:
    """A run of 12 steps of 2 batches, with an evaluation and a checkpoint now and then."""
    place = folder()
    fields: dict[str, Any] = {
        "text": (str(place / "text.jsonl"),),
        "tokenizer": str(place / "tokenizer"),
        "output": str(output),
        "cache": str(place / "cache"),
        "model_config": str(place / "model.json"),
        "max_length": 64,
        "steps": 12,
        "tokens_per_step": 1024,
        "tokens_per_batch": 512,
        "evaluation_tokens": 1024,
        "evaluation_share": 0.05,
        "evaluate_every": 6,
        "checkpoint_every": 4,
        "log_every": 2,
        "learning_rate": 1e-3,
        "precision": "fp32",
        "device": "cpu",
        "workers": 1,
        "progress": False,
        "tensorboard": False,
    }
    return Settings(**{**fields, **changed})


def arguments(settings: Settings) -> list[str]:
    """The settings as options of the command."""
    options: list[str] = []
    for name, value in settings.as_dict().items():
        option = "--" + name.replace("_", "-")
        default = Settings.__dataclass_fields__[name].default
        if value is None or value == default or value == list(default if isinstance(default, tuple) else ()):
            continue
        if isinstance(value, bool):
            options.append(option if value else option.replace("--", "--no-", 1))
        else:
            options += [option, *map(str, value if isinstance(value, list) else [value])]
    return options


def environment(**changed: str) -> dict[str, str]:
    """The environment of a process that imports from the checkout and has one thread."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **changed}


def command(settings: Settings, processes: int | None = None) -> list[str]:
    """The command line of a run, by torchrun where a number of processes is named."""
    start = [sys.executable, "-m"]
    if processes is not None:
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    return [*start, "fastbert.training.pretrain", *arguments(settings)]


def run(
    settings: Settings, processes: int | None = None, *, as_a_user: bool = False
) -> subprocess.CompletedProcess[str]:
    """A run in processes of its own: forks of one that has imported PyTorch, or new ones, as a user starts it."""
    line, options = command(settings, processes), {"env": environment(), "timeout": 300}
    if as_a_user:
        done = subprocess.run(line, capture_output=True, text=True, **options)
    else:
        done = fork_server.run(line, **options)
    assert done.returncode == 0, done.stderr
    return done


def weights(folder: Path | str) -> bytes:
    """The bytes of a model's weights."""
    return (Path(folder) / "model.safetensors").read_bytes()


def journal(folder: Path | str) -> list[dict[str, Any]]:
    """The lines of a journal, without what depends on the speed of the machine."""
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in read_journal(Path(folder))]


def long_settings(output: Path, **changed: Any) -> Settings:
    """Short steps with a checkpoint after each, so that half of the time is spent in writing them."""
    fields = {"steps": LONG_STEPS, "tokens_per_step": 256, "tokens_per_batch": 128, "evaluate_every": 7,
              "checkpoint_every": 1, "evaluation_tokens": 256, "resume": True}  # fmt: skip
    return settings(output, **{**fields, **changed})


def start(settings: Settings) -> subprocess.Popen[str]:
    """Starts a run in a process of its own, and does not wait for it."""
    return fork_server.start(
        command(settings), env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def last_step(output: Path) -> int:
    """The last step in the journal, 0 where there is none."""
    try:
        return max((line["step"] for line in read_journal(output)), default=0)
    except FileNotFoundError:
        return 0


def wait_until(is_so: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120.0) -> None:
    """Waits until something is so, or the process has ended."""
    end = time.monotonic() + seconds
    while not is_so() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)
