"""`wait_for_checks` raises an error if a batch so far had ids outside their table."""

from __future__ import annotations

from typing import Any

from fastbert.diagnostics.explain.entry import backbone, find_model

__all__ = ["wait_for_checks"]


def wait_for_checks(model: Any) -> None:
    """Waits until a model's batches so far have run, and raises IndexError if one had ids outside their table.

    A call does not wait for the check of ids that are already on the GPU. If an id is outside its table, the kernel
    reads the nearest row of the table and records the id. The next call then raises, with the number of the batch.
    Call this function after the last call. With `strict_ids=True`, and on a CPU, each call raises its own error, and
    this function does nothing.

    model: a BertModel, a model with a head, a pipeline, or a module that wraps one. Raises TypeError for another kind
    of model.
    """
    backbone(find_model(model)).wait_for_checks()
