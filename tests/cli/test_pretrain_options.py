"""Each setting of pre-training is an option, on both command lines."""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from fastbert.cli.main import main
from fastbert.training import options
from fastbert.training.settings import Settings
from fastbert.training.starting_model import SHAPES
from helpers import source_env

NEEDED = ["--text", "a.txt", "b/", "--tokenizer", "t", "--output", "o"]
FIELDS = [field.name for field in dataclasses.fields(Settings)]
# A value for each field, as a word and as it is then set, besides switches.
WORDS: dict[str, tuple[str, Any]] = {
    "layout": ("files", "files"), "field": ("body", "body"), "errors": ("replace", "replace"), "cache": ("c", "c"),
    "evaluation_text": ("e.txt", ("e.txt",)), "evaluation_share": ("0.2", 0.2), "model_config": ("large", "large"),
    "max_length": ("128", 128), "mlm_probability": ("0.3", 0.3), "short_probability": ("0", 0.0),
    "dropout": ("0.0", 0.0), "steps": ("7", 7), "epochs": ("1.5", 1.5), "tokens_per_step": ("64", 64),
    "sequences_per_step": ("8", 8), "tokens_per_batch": ("32", 32), "seed": ("3", 3), "learning_rate": ("5e-5", 5e-5),
    "weight_decay": ("0", 0.0), "beta1": ("0.8", 0.8), "beta2": ("0.98", 0.98), "epsilon": ("1e-8", 1e-8),
    "clip": ("0", 0.0), "schedule": ("trapezoid", "trapezoid"), "warmup": ("100", 100.0), "decay": ("0.2", 0.2),
    "precision": ("bf16", "bf16"), "evaluate_every": ("5", 5), "evaluation_tokens": ("99", 99),
    "checkpoint_every": ("6", 6), "keep": ("1", 1), "log_every": ("2", 2), "workers": ("0", 0),
    "device": ("cpu", "cpu"),
}  # fmt: skip


def option(name: str) -> str:
    return "--" + name.replace("_", "-")


def test_every_setting_has_an_option() -> None:
    """Catches a setting that no option reaches, an option without one, and one that is in two groups."""
    listed = [name for group in options.HELP.values() for name in group]
    assert sorted(listed) == sorted(FIELDS)


def test_defaults_are_those_of_the_settings() -> None:
    """Catches an option with a default of its own."""
    assert options.parse(NEEDED) == Settings(text=("a.txt", "b/"), tokenizer="t", output="o")


@pytest.mark.parametrize("name", [name for name in FIELDS if name not in ("text", "tokenizer", "output")])
def test_an_option_sets_its_field(name: str) -> None:
    """Catches an option that sets nothing, another field, or a value of another type."""
    field = next(field for field in dataclasses.fields(Settings) if field.name == name)
    before = dataclasses.asdict(options.parse(NEEDED))
    if name in WORDS:
        word, value = WORDS[name]
        argv = [option(name), word]
    else:
        value = not field.default
        argv = [option(name) if value else "--no-" + option(name)[2:]]
    after = dataclasses.asdict(options.parse([*NEEDED, *argv]))
    assert after == {**before, name: value} and type(after[name]) is type(value)
    assert after != before


def test_help_states_every_default() -> None:
    """Catches an option of whose default --help says nothing, or something else."""
    parser = argparse.ArgumentParser()
    options.add_arguments(parser)
    texts = {action.dest: action.help or "" for action in parser._actions}
    for field in dataclasses.fields(Settings):
        if field.default is not dataclasses.MISSING and field.default is not False:
            assert texts[field.name].count("(default: ") == 1, field.name
    for name, text in (("seed", "0"), ("learning_rate", "0.0001"), ("tokens_per_step", "32768"), ("nsp", "yes")):
        assert texts[name].endswith(f"(default: {text})")
    parser.format_help()  # which fails over a stray % sign


def test_help_names_every_shape() -> None:
    """Catches a shape that --model-config takes and nobody hears of."""
    text = options.HELP["model and objective"]["model_config"][1]
    assert text.startswith(", ".join(list(SHAPES)[:-1]) + " or " + list(SHAPES)[-1] + ";")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: --text, --tokenizer, --output"),
        ([*NEEDED, "--steps", "many"], "argument --steps: invalid int value"),
        ([*NEEDED, "--schedule", "cosine"], "argument --schedule: invalid choice"),
        ([*NEEDED, "--mlm-probability", "1.5"], "mlm_probability: expected a number from 1e-06 to 1, got 1.5"),
    ],
)
def test_wrong_usage(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a value that no run can have and that is found out after an hour of tokenising."""
    with pytest.raises(SystemExit) as stop:
        options.parse(argv)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_the_command_runs_the_settings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a command that loses options on the way, and an exit code that hides a signal or an error."""
    seen: list[Settings] = []

    def run(settings: Settings) -> SimpleNamespace:
        seen.append(settings)
        return SimpleNamespace(signal=15 if settings.resume else None)

    module = ModuleType("fastbert.training.pretrain")
    module.pretrain = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fastbert.training.pretrain", module)
    assert main(["pretrain", *NEEDED, "--steps", "7"]) == 0
    assert main(["pretrain", *NEEDED, "--resume"]) == 143
    assert seen == [options.parse([*NEEDED, "--steps", "7"]), options.parse([*NEEDED, "--resume"])]
    assert main(["pretrain", *NEEDED, "--keep", "0"]) == 1
    assert "error: keep: expected an int of at least 1, got 0" in capsys.readouterr().err


def test_options_do_not_wait_for_libraries() -> None:
    """Catches `fastbert --help` that imports PyTorch or NumPy by way of the options of pre-training."""
    code = "import sys, fastbert.cli.pretrain; print(sorted({'torch', 'numpy', 'tqdm'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], env=source_env(), capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr
