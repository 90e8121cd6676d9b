"""Runs the code blocks of pages in a process of its own, and writes what failed as JSON.

Usage: `python run_blocks.py FOLDER OUT MINILM PAGE ...`. FOLDER is the working directory. The models that the pages
name are made first, in a cache of the model hub (HF_HOME) and in FOLDER, and so are the user's files. MINILM is the
folder of the real weights.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from docs_pages import Block, blocks

WORDS = ["red", "green", "blue", "one", "two", "three", "fast", "slow", "rain", "sun"]
TEXTS = [
    f"A {WORDS[i % 10]} text of {WORDS[i * 3 % 10]} words, number {i}." + " And more." * (i % 5) for i in range(40)
]
ROWS = ["text,label", *(f'"{text}",{text.split()[1]}' for text in TEXTS[:20])]
QUESTIONS = [
    f'{{"question": "Which {word} words?", "context": "{text}"}}' for word, text in zip(WORDS, TEXTS, strict=False)
]
FILES = {
    "texts.txt": TEXTS,
    "queries.txt": TEXTS[:3],
    "reviews.txt": TEXTS[:5],
    "train.csv": ROWS,
    "questions.jsonl": QUESTIONS,
}
SETTINGS: dict[str, Any] = {"num_hidden_layers": 2, "intermediate_size": 512}


def hub_folder(name: str) -> Path:
    """Makes the folder in which the cache has the one snapshot of this model."""
    top, commit = Path(os.environ["HF_HOME"]) / "hub" / f"models--{name.replace('/', '--')}", "0" * 40
    (top / "refs").mkdir(parents=True)
    (top / "refs" / "main").write_text(commit)
    (top / "snapshots").mkdir()
    return top / "snapshots" / commit


def make_models(minilm: Path) -> None:
    """MiniLM under its own name and as ./my-model; small untrained models under the other names of the pages."""
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    for folder in (hub_folder("sentence-transformers/all-MiniLM-L6-v2"), Path("my-model")):
        shutil.copytree(minilm, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)

    def add(folder: Path, kind: str, **settings: Any) -> None:
        config = transformers.BertConfig.from_pretrained(minilm, **SETTINGS, **settings)
        getattr(transformers, kind)(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    add(hub_folder("google-bert/bert-base-uncased"), "BertForPreTraining")
    add(hub_folder("cross-encoder/ms-marco-MiniLM-L6-v2"), "BertForSequenceClassification", num_labels=1)
    splade = hub_folder("naver/splade-cocondenser-ensembledistil")
    add(splade, "BertForMaskedLM")
    kinds = "models.MLMTransformer", "sparse_encoder.models.SpladePooling"
    places = zip(("", "1_SpladePooling"), kinds, strict=True)
    modules = [{"path": path, "type": f"sentence_transformers.{kind}"} for path, kind in places]
    (splade / "modules.json").write_text(json.dumps(modules))
    colbert = hub_folder("colbert-ir/colbertv2.0")
    add(colbert, "BertModel")
    state = load_file(colbert / "model.safetensors")
    save_file(state | {"linear.weight": torch.randn(128, 384)}, colbert / "model.safetensors", {"format": "pt"})
    config = json.loads((colbert / "config.json").read_text())
    (colbert / "config.json").write_text(json.dumps({**config, "architectures": ["HF_ColBERT"]}))
    add(Path("my-classifier"), "BertForSequenceClassification", num_labels=2)
    add(Path("my-tagger"), "BertForTokenClassification", id2label={0: "O", 1: "B-PER", 2: "I-PER"})
    add(Path("my-reader"), "BertForQuestionAnswering")
    albert = transformers.AlbertConfig(
        vocab_size=100, embedding_size=16, hidden_size=32, num_attention_heads=2, intermediate_size=64
    )
    transformers.AlbertModel(albert).save_pretrained(hub_folder("albert/albert-base-v2"))


def run_python(block: Block, page: str, namespace: dict[str, Any]) -> None:
    """Executes the block, with the line numbers of the page."""
    exec(compile("\n" * (block.line - 1) + block.code, page, "exec"), namespace)


def run_commands(block: Block, page: str, namespace: dict[str, Any]) -> None:
    """Runs each line, which is a command of fastbert, with `> FILE` at its end perhaps."""
    from fastbert.cli import main

    for line in block.code.splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        output = None
        if len(words) > 2 and words[-2] == ">":
            *words, _, output = words
        if words[0] != "fastbert":
            raise ValueError(f"{line}: expected a command of fastbert, or a block that is marked as not run")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            code = main(words[1:])
        if code:
            raise RuntimeError(f"{line}: exit code {code}\n{printed.getvalue()}")
        if output is not None:
            Path(output).write_text(printed.getvalue(), encoding="utf-8")


RUNNERS: dict[str, Callable[[Block, str, dict[str, Any]], None]] = {"python": run_python, "sh": run_commands}


def run_page(page: Path) -> list[str]:
    """What went wrong, with the line of the page, up to the first block that failed."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.not_run:
            continue
        try:
            RUNNERS[block.language](block, page.name, namespace)
        except (Exception, SystemExit):
            return [f"{page.name}:{block.line}: {traceback.format_exc()}"]
    return []


def main() -> None:
    folder, out, minilm = (Path(argument).resolve() for argument in sys.argv[1:4])
    pages = [Path(argument).resolve() for argument in sys.argv[4:]]
    os.chdir(folder)
    make_models(minilm)
    for name, lines in FILES.items():
        Path(name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    failures = {}
    for page in pages:
        with contextlib.redirect_stdout(io.StringIO()):
            failures[page.as_posix()] = run_page(page)
    out.write_text(json.dumps(failures), encoding="utf-8")


if __name__ == "__main__":
    main()
