"""A `Peer` is an alternative to fastbert for a user, and `contest` compares peers with fastbert.

A peer gives its `obstacle` if it cannot run here, is prepared once for a workload, and runs it. Its output is compared
with the reference before it is timed. A peer that is wrong, fails or is missing is reported as such.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastbert.bench.measure import Timing, interleave, low_cosine, max_error, rms_error, speedup
from fastbert.bench.results import FAILED, MISSING, OK, WRONG, Row

logger = logging.getLogger("fastbert")

OURS = "fastbert"


class Peer:
    """A Peer is one competitor in one setting. Subclasses set `name` and define the methods.

    dtype: the data type of its computation, None for the contest's. needs: the parts of fastbert that must have passed
    their tests. gives_vectors: whether the output is one vector per text, whose cosine to the exact one is reported.
    """

    name: str
    gives_vectors = False
    needs: tuple[str, ...] = ()
    dtype: str | None = None

    def obstacle(self) -> str | None:
        """Returns the reason why this peer cannot run here (a missing package, device or feature), or None."""
        return None

    def prepare(self) -> None:
        """Loads, compiles and moves to the device, as a user does once. This time is reported separately."""

    def run(self, i: int) -> Any:
        """Runs one pass over input set i; the sets rotate."""
        raise NotImplementedError

    def output(self) -> torch.Tensor:
        """Returns the result of a run on input set 0, in the form of the contest's reference, for the check."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """Returns entries for `Row.extra`, after the first output: batch size, padding waste, a `note` for readers."""
        return {}

    def peak_bytes(self) -> int | None:
        """Returns the peak memory of a separate process with one run, for CPUs; None if it is not measured."""
        return None


def contest(
    peers: Sequence[Peer],
    row: Callable[[Peer], Row],
    reference: torch.Tensor,
    *,
    device: torch.device,
    eager: str,
    tokens: int | None = None,
    items: int | None = None,
    memory: bool = False,
    on_step: Callable[[str], None] | None = None,
    **timing: Any,
) -> list[Row]:
    """Prepares, checks and times peers in turns; the first is fastbert, to which the others are compared.

    row: makes the row for a peer. reference: the right result of `output`. A peer with an error above its bound is
    WRONG and not timed. `bound_of` needs the error of plain PyTorch; `eager` is the name of that peer. memory: on a
    CPU, also measure each peer's memory (`Peer.peak_bytes`); on a GPU that is always done. timing: arguments of
    `interleave`. Returns one row per peer, in order.
    """
    say = on_step or (lambda text: None)
    rows = {peer.name: row(peer) for peer in peers}
    checkable: list[Peer] = []
    for peer in peers:
        obstacle = peer.obstacle()
        if obstacle is not None:
            rows[peer.name].status, rows[peer.name].detail = MISSING, obstacle
            continue
        say(f"preparing {peer.name}")
        others_bytes = 0
        try:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                torch.cuda.reset_peak_memory_stats(device)
                others_bytes = torch.cuda.memory_allocated(device)  # memory of the earlier peers
            started = time.monotonic()
            peer.prepare()
            rows[peer.name].extra["prepare_seconds"] = time.monotonic() - started
            output = peer.output()
            rows[peer.name].error = rms_error(output, reference)
            rows[peer.name].extra |= {"max_error": max_error(output, reference), **peer.facts()}
            if peer.gives_vectors:
                rows[peer.name].extra["low_cosine"] = low_cosine(output, reference)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                rows[peer.name].peak_bytes = torch.cuda.max_memory_allocated(device) - others_bytes
        except Exception as error:  # any error of a peer is its result
            rows[peer.name].status, rows[peer.name].detail = FAILED, _first_line(error)
            logger.debug("%s failed", peer.name, exc_info=True)
            continue
        checkable.append(peer)
    right = []
    for peer in checkable:
        result = rows[peer.name]
        result.bound = bound_of(result, rows[eager].error)
        if result.error is not None and result.error <= result.bound:
            right.append(peer)
        else:
            result.status, result.detail = WRONG, f"error {result.error:.3g} above the bound {result.bound:.3g}"
    say("timing")
    timings = _time(right, rows, device, timing)
    ours = timings.get(peers[0].name)
    for name, measured in timings.items():
        rows[name].timed(measured, tokens, items)
        if ours is not None and name != peers[0].name:
            rows[name].compared(speedup(ours, measured))
    if memory and device.type == "cpu":
        for peer in right:
            if rows[peer.name].status == OK:
                say(f"memory of {peer.name}")
                _measure_memory(peer, rows[peer.name])
    return list(rows.values())


def _measure_memory(peer: Peer, row: Row) -> None:
    try:
        row.peak_bytes = peer.peak_bytes()
    except RuntimeError as error:
        row.detail = f"peak memory not measured: {_first_line(error)}"


def _time(peers: list[Peer], rows: dict[str, Row], device: torch.device, timing: dict[str, Any]) -> dict[str, Timing]:
    """Times the peers. A peer that raises during timing is FAILED, and the others are timed again."""
    while peers:
        current = ""

        def running(peer: Peer) -> Callable[[int], Any]:
            def run(i: int) -> Any:
                nonlocal current
                current = peer.name
                return peer.run(i)

            return run

        try:
            return interleave({peer.name: running(peer) for peer in peers}, device=device, **timing)
        except Exception as error:  # as above
            rows[current].status, rows[current].detail = FAILED, _first_line(error)
            peers = [peer for peer in peers if peer.name != current]
    return {}


def bound_of(row: Row, eager_error: float | None) -> float:
    """Returns the largest allowed RMS error. eager_error: plain PyTorch's in the same dtype, None if it did not run.

    fastbert must satisfy the numerical policy: 1.25 times plain PyTorch plus half an ulp. A peer may be less exact
    (others approximate GELU) but must compute the same function: 1 % in float32, 10 % in fewer bits. For a peer that
    quantises to 8 bits, as its makers recommend, the bound is 50 %; its error is reported beside its speed.
    """
    loose = {"float32": 0.01, "float64": 0.01, "int8": 0.5, "fp8": 0.5}.get(row.dtype, 0.1)
    if row.competitor != OURS or eager_error is None:
        return min(loose, 0.1) if row.competitor.startswith(OURS) else loose
    dtype = "bfloat16" if row.dtype in ("fp8", "int8") else row.dtype  # the data type of 8-bit linears' results
    return 1.25 * eager_error + 0.5 * torch.finfo(getattr(torch, dtype)).eps


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
