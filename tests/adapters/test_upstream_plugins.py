"""The plugin and the stand-ins of hub models, which run other libraries' tests on accelerated models, work."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

import accelerate_everything
import make_upstream_hub
from accelerate_cases import with_first_column
from family_cases import config_of_transformers, make_batch, run, their_class
from fastbert.adapters import counts
from fastbert.adapters.covered import COVERED


def test_plugin_accelerates_every_covered_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a class that the plugin leaves as it was, so that the tests of other libraries say nothing of us."""
    for kind in [*accelerate_everything.covered_classes(), accelerate_everything.AcceleratedState]:
        monkeypatch.setattr(kind, "__init__", kind.__init__)  # put back afterwards
    accelerate_everything.pytest_configure()
    for mapping in COVERED:
        model_type = mapping.family.model_type
        batch = with_first_column(make_batch(model_type))
        model = their_class(model_type, "BertForMaskedLM")(config_of_transformers(model_type)).eval()
        for each in (model, copy.deepcopy(model)):
            run(each, batch)
            assert counts(each) == {"fastbert": 1}
    lines: list[str] = []
    accelerate_everything.pytest_terminal_summary(SimpleNamespace(section=lines.append, write_line=lines.append))
    assert lines[1].split() == [str(2 * len(COVERED)), "fastbert"]


def test_stand_ins_are_found_by_their_names_on_the_hub(tmp_path: Path) -> None:
    """Catches a cache that huggingface_hub does not read, and weights that are all random."""
    hub = make_upstream_hub.Hub(tmp_path)
    for kind in ("BertModel", "BertForSequenceClassification"):
        hub.add_bert(f"someone/{kind}", kind, make_upstream_hub.SMALLER)
        where = {"cache_dir": tmp_path / "hub", "local_files_only": True}
        model = getattr(transformers, kind).from_pretrained(f"someone/{kind}", **where)
        query = getattr(model, "bert", model).encoder.layer[4].attention.self.query.weight
        assert torch.equal(query, hub.weights["encoder.layer.4.attention.self.query.weight"][:32, :32])
        assert transformers.AutoTokenizer.from_pretrained(f"someone/{kind}", **where).vocab_size == len(hub.wordpiece)
