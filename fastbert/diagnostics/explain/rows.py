"""This module makes the rows of a report from recorded operations, and merges equal layers."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from fastbert.diagnostics.explain import above
from fastbert.diagnostics.explain.dry_run import N_SEQUENCES, N_TOKENS, Question, dry_run, recorder_for
from fastbert.diagnostics.explain.kernels import Kernel, compiled, kernel_of, short_texts
from fastbert.diagnostics.explain.model import backbone
from fastbert.diagnostics.explain.report import MODULE, OpReport
from fastbert.ops import recording
from fastbert.ops.dispatch import Decision
from fastbert.ops.recording import Record, Shape

_OPS = {"sum_norm": "layer_norm"}  # names of operations in a report
# Names of operations that are recorded with a precision.
_OPS_IN_8_BITS = {
    "linear": "quantized_linear",
    "gated": "quantized_linear",
    **_OPS,
    "rows": "quantize",
}
_LETTERS = {N_TOKENS: "T", N_SEQUENCES: "B"}
_LAYER = re.compile(r"(?P<list>(?:.*\.)?encoder\.layer)\.(?P<number>\d+)(?P<part>\..*)?")


def rows_that_run(question: Question, eight_bit: Decision | None) -> list[OpReport]:
    """Returns the operations of a model from a dry run, in the order in which they run.

    eight_bit: the result of `eight_bit_decision`.
    """
    dry = recorder_for(question)
    encoder, others = dry_run(question, dry, eight_bit)
    if above.is_unquantised(eight_bit):
        encoder = above.as_launched(backbone(question.model), encoder)
    with recording.recorded(dry):  # kernels are also looked up for a GPU that is not present
        rows, rest = rows_of(encoder, question.device), rows_of(others, question.device)
    if eight_bit is not None and eight_bit.backend == "cpu":
        rows = in_one_call(rows)
    return [*merged(rows), *(_of_module(row, question.outer) for row in rest)]


def _of_module(row: OpReport, outer: Any) -> OpReport:
    """Names the row of a module after the pooling by its class, in the place of what it adds and applies."""
    place, _, rest = row.module.partition(".")
    if place != "tail":
        return row
    number = rest.partition(".")[0]
    name, shapes = type(outer.tail[int(number)]).__name__.lower(), row.shapes.partition("), ")[0].rstrip(")") + ")"
    return dataclasses.replace(row, op=name, module=f"{place}.{number}", shapes=shapes)


def rows_of(records: Sequence[Record], device: torch.device) -> list[OpReport]:
    """Returns a row for each record, and two rows for an operation with two launches."""
    rows: list[OpReport] = []
    for record in records:
        if record.op == "elementwise":
            if not record.facts["function"].startswith("<"):
                rows[-1] = dataclasses.replace(rows[-1], shapes=f"{rows[-1].shapes}, then {record.facts['function']}")
            continue
        row = _row(record, rows[-1].module if record.op in ("bias_gelu", "gated") else record.module, device)
        rows.append(row)
        short = short_texts(record, device) if record.op == "attention" and record.backend != MODULE else None
        if short is not None and short.block_sizes is not None:
            shapes = f"{row.shapes}, of texts of up to {short.block_sizes['BLOCK_K']} tokens"
            rows.append(_with_kernel(dataclasses.replace(row, shapes=shapes), short))
    return rows


def _row(record: Record, module: str, device: torch.device) -> OpReport:
    name, _, precision = record.op.partition(" in ")
    op = _OPS_IN_8_BITS.get(name, name) if precision else _OPS.get(name, name)
    row = OpReport(
        op=op,
        module=module,
        shapes=shapes_of(record),
        backend=record.backend,
        kernel="",
        reason=record.reason,
        raises=record.raises,
        launches=1 if record.backend == "triton" else None,
    )
    if record.backend == MODULE:
        return dataclasses.replace(row, kernel=record.facts["class"])
    return _with_kernel(row, kernel_of(record, device))


def _with_kernel(row: OpReport, kernel: Kernel) -> OpReport:
    return dataclasses.replace(row, kernel=kernel.name, block_sizes=kernel.block_sizes, source=kernel.source)


def shapes_of(record: Record) -> str:
    """Returns the shapes of an operation, and what it adds and applies: "(T, 32) -> (T, 64), + bias, gelu"."""
    facts = record.facts
    precision = facts.get("precision", "")
    before, after = "(T,) ids" if record.before is None else _matrix(record.before), _matrix(record.after)
    name = record.op.partition(" in ")[0]
    if precision and name in ("linear", "gated"):
        before = f"{before} {precision}"
    if precision and facts["quantizes"]:
        after = (
            f"{after} {precision}"
            if name in ("linear", "gated", "attention", "rows")
            else f"{after} and {after} {precision}"
        )
    words = [f"{before} -> {after}", *_additions(record)]
    if record.backend != MODULE:
        if name == "attention":
            heads = facts["heads"]
            words.append(f"{heads} heads of {record.after[1] // heads}")
            if "window" in facts:
                words.append(f"within {facts['window']} columns")
            if "distances" in facts:
                words.append("terms of {} x {} distances".format(*facts["distances"]))
            if "position_bias" in record.facts:
                words.append("position bias")
        if name == "pooling":
            words.append(facts["mode"])
            words += ["L2 normalized"] if facts["normalize"] else []
            dtype = facts["out_dtype"]
            words += [] if dtype is None else [f"in {str(dtype).removeprefix('torch.')}"]
        if facts.get("activation", "none") != "none":
            words.append(facts["activation"])
        if facts.get("gated") or (precision and name == "gated"):
            words.append("gated")
    return ", ".join(words)


def _additions(record: Record) -> Iterator[str]:
    added = [f"+ {what}" for what in ("bias", "residual") if record.facts.get(what)]
    if added:
        yield " ".join(added)


def _matrix(shape: Shape) -> str:
    return f"({_LETTERS[shape[0]]}, {shape[1]})"


def in_one_call(rows: Sequence[OpReport]) -> list[OpReport]:
    """Returns the rows of an encoder in 8 bits as the C++ kernels for CPUs run them."""
    return [dataclasses.replace(row, backend="cpu", kernel=compiled(), source=None) for row in rows]


def merged(rows: Sequence[OpReport]) -> Iterator[OpReport]:
    """Yields the rows, with equal neighbouring layers merged. A layer that runs again counts as another layer."""
    places = [_LAYER.fullmatch(row.module) for row in rows]
    layers: Layers = []
    stored = None  # the number of the layer in the checkpoint
    for row, place in zip(rows, places, strict=True):
        row = row if place is None else dataclasses.replace(row, module=place["part"] or "")
        first = layers[-1][1][0] if layers else row
        if place is None:
            layers.append((None, []))
        elif place["number"] != stored or layers[-1][0] is None or (first.op, first.module) == (row.op, row.module):
            layers.append((sum(number is not None for number, _ in layers), []))
        stored = None if place is None else place["number"]
        layers[-1][1].append(row)
    prefix = next((place["list"] for place in places if place is not None), "")
    layers = _without_last_quantising(layers)
    for (numbered, same), group in itertools.groupby(layers, lambda layer: (layer[0] is not None, layer[1])):
        numbers = [number for number, _ in group]
        for row in same if numbered else same * len(numbers):
            span = f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else f"{numbers[0]}"
            yield dataclasses.replace(row, module=f"{prefix}.{span}{row.module}") if numbered else row


Layers = list[tuple[int | None, list[OpReport]]]  # rows by the number of their layer, None for rows outside of one


def _without_last_quantising(layers: Layers) -> Layers:
    """Makes the last layer in 8 bits equal to the others, although its output is not multiplied."""
    numbered = [rows for number, rows in layers if number is not None]
    if len(numbered) < 2 or numbered[0][-1] == numbered[-1][-1] or numbered[0][:-1] != numbered[-1][:-1]:
        return layers
    norm = numbered[0][-1]
    if norm.op != "layer_norm" or " and " not in norm.shapes:
        return layers
    matrices, _, added = norm.shapes.partition(", + ")
    noted = dataclasses.replace(norm, shapes=f"{matrices} (the last layer's without), + {added}")
    return [(number, rows if number is None else [*rows[:-1], noted]) for number, rows in layers]
