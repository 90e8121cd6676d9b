"""transformers' Trainer writes our models as `save_pretrained` does: under the family's names, with a config.json.

Trainer checks `isinstance(model, transformers.PreTrainedModel)`, which is false for our models. Then it would write the
bare state dict: no config.json, our names, and an error for tied weights. The method that does this is `Trainer._save`.
It is wrapped when the first of our models is made, if `transformers.trainer` is imported, or later at its import. For
other models it does the same as before. Loading needs no such change: see `PreTrainedModel.load_state_dict`.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import sys
from typing import Any

TRAINER = "transformers.trainer"

_wrapped = False


def install(ours: type) -> None:
    """Wraps Trainer._save for models of the class `ours`, now or when the Trainer is imported; once in a process."""
    global _wrapped
    if _wrapped:
        return
    _wrapped = True
    module = sys.modules.get(TRAINER)
    if module is not None and hasattr(module, "Trainer"):
        wrap(module.Trainer, ours)
    else:
        sys.meta_path.insert(0, _Finder(ours))


def wrap(trainer: Any, ours: type) -> None:
    """Lets `_save` of this Trainer class write models of the class `ours` as `save_pretrained` does."""
    original = trainer._save

    @functools.wraps(original)
    def _save(self: Any, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> Any:
        model = self.accelerator.unwrap_model(self.model)
        model = getattr(model, "_orig_mod", model)
        if not isinstance(model, ours):
            return original(self, output_dir, state_dict)
        result = original(self, output_dir, model.state_for_file(state_dict))  # type: ignore[attr-defined]
        if self.args.should_save:
            model.save_config(self.args.output_dir if output_dir is None else output_dir)  # type: ignore[attr-defined]
        return result

    trainer._save = _save


class _Finder(importlib.abc.MetaPathFinder):
    """A _Finder finds transformers.trainer in the normal way, and wraps its Trainer after the import."""

    def __init__(self, ours: type) -> None:
        self.ours = ours

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != TRAINER:
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.ours)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: Any, ours: type) -> None:
        self.loader, self.ours = loader, ours

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: Any) -> Any:
        return self.loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        self.loader.exec_module(module)
        if hasattr(module, "Trainer"):
            wrap(module.Trainer, self.ours)
