"""`wait_for_checks` asks whether any batch so far had ids beyond their table."""

from __future__ import annotations

from typing import Any

from fastbert.diagnostics.explain.entry import backbone, find_model

__all__ = ["wait_for_checks"]


def wait_for_checks(model: Any) -> None:
    """Waits until a model's batches so far have run, and raises IndexError if one had ids beyond their table.

    On a GPU no call waits for a look at ids that are there already: kernels read the nearest row of the table in their
    place and note it, and the next call raises, with the number of the batch. After the last call, this function does.
    With `strict_ids=True` each call waits and raises, and on a CPU it raises anyway; there is nothing to wait for then.

    model: a BertModel, a model with a head, a pipeline, or a module that wraps one. Raises TypeError for another kind
    of model.
    """
    backbone(find_model(model)).wait_for_checks()
