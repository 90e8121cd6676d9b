"""The scripts of examples/ run as a user runs them, offline, on the packaged MiniLM weights."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastbert
import helpers

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PRINTS = {  # a line, or a part of one, that shows that the script did what it is about
    "classify": "weather Will it snow tomorrow?",
    "drop_in": "1 attentions are requested",
    "encode": "4 sentences, vectors of shape (4, 384)",
    "exact": "batch-invariant:",
    "own_loop": "31.1% avoided",
    "search": "float64",
}


def run(name: str, *arguments: str | Path) -> str:
    """Standard output of a script that must succeed, in a process of its own."""
    env = helpers.source_env(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, EXAMPLES / f"{name}.py", *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_run() -> None:
    """Catches a script that was added without a test, and one that is gone."""
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(PRINTS)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PRINTS))
def test_example_runs(name: str, minilm: Path) -> None:
    """Catches a script that no longer works, or that prints something else than what it is about."""
    assert PRINTS[name] in run(name)


@pytest.mark.slow
def test_search_reranks_with_a_cross_encoder(minilm: Path, tmp_path: Path) -> None:
    """Catches the part of search.py that does not run by default."""
    config = fastbert.BertConfig.from_pretrained(minilm, num_hidden_layers=1, num_labels=1)
    torch.manual_seed(0)
    fastbert.BertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    fastbert.Tokenizer.from_pretrained(minilm).save_pretrained(tmp_path / "model")
    texts = tmp_path / "texts.txt"
    texts.write_text("One text.\n\nAnother text.\n", encoding="utf-8")
    printed = run("search", "Which?", "--file", texts, "--model", minilm, "--cross-encoder", tmp_path / "model")
    assert {line[6:] for line in printed.splitlines()[1:]} == {"One text.", "Another text."}


@pytest.mark.parametrize("name", sorted(PRINTS))
def test_example_is_short_and_says_what_it_shows(name: str) -> None:
    """Catches a script that is too long to be read at once, or that does not say how it is called."""
    source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(source)) or ""
    assert f"python examples/{name}.py" in docstring
    assert len(source.splitlines()) <= 45


@pytest.mark.slow
def test_korean_text_becomes_a_model(tmp_path: Path) -> None:
    """Catches the example that pre-trains, which is a shell script, with an option that is no longer there."""
    texts = tmp_path / "text.txt"
    lines = [f"문장 {i}은 파일을 엽니다.\n그리고 문서 {i}를 저장합니다.\n나는 커피를 좋아한다.\n" for i in range(40)]
    texts.write_text("\n".join(lines), encoding="utf-8")
    env = helpers.source_env(
        PYTHON=sys.executable, STEPS="2", VOCABULARY="300", SHAPE="tiny", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1",
        FASTBERT_CACHE=str(tmp_path / "cache"),
    )  # fmt: skip
    env.pop("TRITON_INTERPRET", None)
    command = ["sh", EXAMPLES / "pretrain_korean" / "run.sh", tmp_path / "out", texts]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "p_is_next" in done.stdout
    assert fastbert.BertForPreTraining.from_pretrained(tmp_path / "out" / "model").config.hidden_size == 128
