"""A model card is a README.md in the format of the Hugging Face hub. It contains only facts."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastbert.checkpoint.files import write_text
from fastbert.training.journal import FILE
from fastbert.training.report import PAGE, PICTURE, History
from fastbert.training.starting_model import SHAPES

CARD = "README.md"


def write_card(folder: str | os.PathLike[str], facts: Mapping[str, Any]) -> Path:
    """Writes README.md into the folder of a model; returns its path.

    facts: the facts about the run, with the names of the journal's first line; also seconds, tokens_seen, language (one
    or several codes) and mask_token. The card omits missing facts. The scores are from the last evaluation in the
    journal. The card shows the picture if it exists.
    """
    folder = Path(folder)
    history = History.read(folder) if (folder / FILE).exists() else History({}, (), (), {})
    parts = [
        _front_matter(facts),
        f"# {folder.resolve().name}",
        _summary(facts),
        "## Results",
        _results(history, facts),
        *([f"![Losses and accuracies of the run]({PICTURE})"] if (folder / PICTURE).exists() else []),
        "## Use",
        _use(facts),
        "## Training",
        _table(facts),
        *([f"[{PAGE}]({PAGE}) has the curve and each evaluation, [{FILE}]({FILE}) each number of the run."]
          if (folder / PAGE).exists() else []),
        "## What to expect",
        _limits(facts, history),
        "## License",
        "This card states no license. Whoever publishes the model has to choose one and to name it above "
        "(`license: ...`). The licenses of the text bear on that.",
    ]  # fmt: skip
    path = folder / CARD
    write_text(path, "\n\n".join(filter(None, parts)) + "\n")
    return path


def _front_matter(facts: Mapping[str, Any]) -> str:
    lines = ["---", "library_name: transformers", "pipeline_tag: fill-mask", "tags:"]
    lines += [f"- {tag}" for tag in (facts.get("model_type", "bert"), "fill-mask", "fastbert")]
    if language := facts.get("language"):
        lines += [
            "language:",
            *(f"- {json.dumps(code)}" for code in _listed(language)),
        ]  # "no" is a language, not false
    return "\n".join([*lines, "---"])


def _summary(facts: Mapping[str, Any]) -> str:
    objective = "masked tokens and next sentences" if facts.get("nsp") else "masked tokens"
    family = str(facts.get("model_type", "bert")).upper()
    sentence = f"A {family} encoder, pre-trained on raw text with fastbert, by {objective}."
    if _is_continued(facts):
        sentence += f" Training continued from `{facts['model_config']}`."
    return sentence


def _is_continued(facts: Mapping[str, Any]) -> bool:
    """Tells whether the run started from the weights of a checkpoint."""
    name = facts.get("model_config")
    return name is not None and name not in SHAPES and Path(name).suffix != ".json" and not Path(name).is_file()


def _results(history: History, facts: Mapping[str, Any]) -> str:
    if not history.evaluations:
        return "There was no evaluation on held-out documents."
    scores = history.evaluations[-1]
    rows = [("", "this model", "by frequency alone")]
    for key, name, form, baseline in (
        ("mlm_loss", "loss of masked tokens (nats)", "{:.3f}", facts.get("unigram_loss")),
        ("mlm_accuracy", "masked tokens predicted right", "{:.1%}", facts.get("unigram_accuracy")),
        ("nsp_loss", "loss of next sentences (nats)", "{:.3f}", None),
        ("nsp_accuracy", "pairs told apart, next or random", "{:.1%}", None),
    ):
        if scores.get(key) is not None:
            rows.append((name, form.format(scores[key]), "" if baseline is None else form.format(baseline)))
    documents = facts.get("held_out_documents")
    where = "On held-out documents" if documents is None else f"On {documents:,} held-out documents"
    note = (
        f"{where}, after step {scores['step']:,}. By frequency alone: a model that knows how frequent each token is, "
    )
    note += "and nothing of its neighbours."
    if scores.get("nsp_accuracy") is not None:
        note += " Guessing tells half of the pairs apart, at a loss of 0.693."
    return f"{_markdown_table(rows)}\n\n{note}"


def _use(facts: Mapping[str, Any]) -> str:
    mask = facts.get("mask_token", "[MASK]")
    text = f"""With transformers:

```python
from transformers import pipeline

pipeline("fill-mask", model="FOLDER")("A text with a {mask}.")
```

With fastbert:

```sh
fastbert fill-mask "A text with a {mask}." --model FOLDER
"""
    if facts.get("nsp"):
        text += 'fastbert next-sentence "A sentence." "Another one." --model FOLDER\n'
    return text + "```"


# Key, name, and the text after the value.
_ROWS = (
    ("files", "text: files", ""),
    ("documents", "text: documents", ""),
    ("corpus_tokens", "text: tokens", ""),
    ("corpus_hash", "text: hash of what was tokenised", ""),
    ("held_out_documents", "held-out documents", ""),
    ("mlm_probability", "tokens that are predicted", ""),
    ("whole_words", "whole words are masked", ""),
    ("nsp", "next sentences", ""),
    ("model_config", "began with", ""),
    ("parameters", "parameters", ""),
    ("layers", "layers", ""),
    ("hidden_size", "hidden size", ""),
    ("vocabulary", "vocabulary", " tokens"),
    ("max_length", "longest sequence", " tokens"),
    ("steps", "steps", ""),
    ("tokens_per_step", "tokens of a step, about", ""),
    ("tokens_seen", "tokens read in all", ""),
    ("epochs", "times the text was read", ""),
    ("learning_rate", "learning rate at the peak", ""),
    ("schedule", "schedule", ""),
    ("warmup", "warm-up (updates, or a share of all)", ""),
    ("weight_decay", "weight decay", ""),
    ("seed", "seed", ""),
    ("precision", "precision", ""),
    ("device", "device", ""),
    ("processes", "processes", ""),
    ("seconds", "duration", ""),
    ("versions", "versions", ""),
)


def _table(facts: Mapping[str, Any]) -> str:
    rows = [("", "")]
    rows += [(name, _value(key, facts[key]) + unit) for key, name, unit in _ROWS if facts.get(key) is not None]
    return _markdown_table(rows)


def _value(key: str, value: Any) -> str:
    if key == "seconds":
        hours, minutes = divmod(round(value / 60), 60)
        return f"{hours} h {minutes:02d} min" if hours else f"{value:.0f} s" if value < 120 else f"{minutes} min"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {each}" for name, each in value.items())
    if key == "mlm_probability":
        return f"{value:.1%}"
    if isinstance(value, int) and key != "seed":
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _limits(facts: Mapping[str, Any], history: History) -> str:
    earlier = f", besides what `{facts['model_config']}` had read" if _is_continued(facts) else ""
    points = [f"The model has read the text above and no other{earlier}. It can know no other language or subject."]
    if history.evaluations:
        points.append("The results are for the held-out documents. They say nothing of other text.")
    points.append("fastbert filtered nothing from the text, and does not look for bias in the model.")
    points.append("It fills masks. For vectors, classes or answers it has to be trained further on examples of those.")
    return "\n".join(f"- {point}" for point in points)


def _markdown_table(rows: Sequence[tuple[str, ...]]) -> str:
    head, *body = (f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value)
