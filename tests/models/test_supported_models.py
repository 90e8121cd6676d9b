"""docs/supported-models.md says what is true, for checkpoints of random numbers in the published layout."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import fastbert
from fastbert import reference
from model_cases import assert_close
from published_cases import PUBLISHED, small

PAGE = Path(__file__).resolve().parents[2] / "docs" / "supported-models.md"
ROW = re.compile(r"^\| ([\w.-]+/[\w.-]+) \| `([\w-]+)` \| (yes) \|(.*?) \| (.+?) \| (.+?) \|$", re.MULTILINE)
ROWS = {match[1]: match.groups() for match in ROW.finditer(PAGE.read_text(encoding="utf-8"))}
IDS = torch.tensor([[2, 5, 6, 7, 8, 3], [2, 9, 3, 1, 1, 1]])
MASK = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])


class Restated:
    """What the reference computes with the weights of a model, for families that transformers does not have."""

    def __init__(self, model: Any) -> None:
        self.model, self.params = model, dict(model.named_parameters(remove_duplicate=False))

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor) -> Any:
        config, task = self.model.config, self.model.task
        if task == "SequenceClassification":
            logits = reference.head("sequence_classification", self.params, config, ids, mask)["logits"]
            return SimpleNamespace(logits=logits)
        state = reference.encode(self.params, config, ids, mask, prefix="bert.").last_hidden_state
        return SimpleNamespace(last_hidden_state=state)


def save_random(name: str, folder: Path) -> Any:
    """Writes a checkpoint of random numbers, and returns the model of transformers that made it."""
    config = small(name)
    deberta = name.startswith("microsoft/")  # whose weights have the newer head, which config.json does not say
    (architecture,) = config.get("architectures", ["DebertaV2ForMaskedLM" if deberta else "BertForMaskedLM"])
    if architecture.startswith("Jina"):
        torch.manual_seed(0)
        restated = getattr(fastbert, architecture.removeprefix("Jina"))(fastbert.BertConfig.from_dict(config)).eval()
        for parameter in restated.parameters():
            parameter.data.normal_(std=0.2)
        save_file(restated.state_for_file(), folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))
        return Restated(restated)
    stored = {"HF_ColBERT": "BertModel", "NewModel": "GteModel"}.get(architecture, architecture)
    # The hub's own settings of these two are not those of transformers, but ours are.
    own = config["model_type"] in ("new", "nomic_bert")
    settings = transformers.AutoConfig.for_model(**(fastbert.BertConfig.from_dict(config).to_dict() if own else config))
    settings.legacy = not deberta
    torch.manual_seed(0)
    model = getattr(transformers, stored)(settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    if architecture == "HF_ColBERT":
        state = {f"bert.{key}": tensor for key, tensor in load_file(folder / "model.safetensors").items()}
        save_file(state | {"linear.weight": torch.randn(16, 32)}, folder / "model.safetensors", {"format": "pt"})
    return model.double()


def test_the_table_has_every_case() -> None:
    """Catches a row that no test looks at, or one of the forty that is left out."""
    assert set(ROWS) == set(PUBLISHED) and len(ROWS) >= 40
    assert {name: row[1] for name, row in ROWS.items()} == {n: config["model_type"] for n, config in PUBLISHED.items()}


@pytest.mark.parametrize("name", ROWS)
def test_a_model_that_loads(name: str, tmp_path: Path) -> None:
    """Catches a published config.json or tensor that the class of the table cannot read, or reads otherwise.

    In float64, since a few logits near zero are not exact to five digits in float32.
    """
    theirs = save_random(name, tmp_path)
    classes = re.findall(r"`(\w+)`", ROWS[name][3])
    cls = next((cls for cls in classes if cls.startswith("Bert")), "BertModel")
    cls = "BertForMaskedLM" if name.startswith("naver/") else cls
    ours = getattr(fastbert, cls).from_pretrained(tmp_path, dtype=torch.float64).eval()
    with torch.no_grad():
        mine = ours(IDS, MASK)
        if cls == "BertModel":
            base = theirs.base_model if hasattr(theirs, "base_model") else theirs
            expected = base(IDS, MASK).last_hidden_state
            assert_close(name, mine.last_hidden_state[MASK > 0], expected[MASK > 0], 1e-5)
            return
        expected = theirs(IDS, MASK).logits
    per_token = mine.logits.dim() == 3
    assert_close(name, *((x[MASK > 0] if per_token else x) for x in (mine.logits, expected)), 1e-5)
    assert ours.missing_names == []
