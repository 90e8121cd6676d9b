"""The loops of attention's training have the instructions that decide their speed, as seen without a GPU."""

from __future__ import annotations

from typing import Any

import pytest

from process_cases import run_beside_tests as run

LOOPS = """
import json, sys
import sass

found = []
for kernel in sass.planned(int(sys.argv[1]), "bf16", "attention", "base", "D64 training"):
    body = sass.loops(kernel)[0]  # of whole blocks
    names = "LDGSTS", "LDG.E", "IMAD.WIDE.U32", "LDL", "STL"
    found.append([kernel.config["BLOCK_Q"] * kernel.config["BLOCK_K"] // (32 * kernel.config["num_warps"])])
    found[-1] += [sass.counts(body, name) for name in names] + [sass.waits(body)]
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 86, 90])
def test_training_copies_ahead_and_draws_once(arch: int) -> None:
    """Catches a step that waits for its own copies, and masks that threads draw once for each of them that needs it."""
    loops: list[Any] = run(LOOPS, str(arch), cache=None)
    assert len(loops) == 3
    for scores, copies, loads, products, *spills, waits in loops:
        assert copies > 0 and loads == 0 and spills == [0, 0]
        assert waits and min(waits) >= 2, "a wait for copies of the next step"
        # A group of eight scores takes 9 products of Philox, and a thread has one group for eight scores that it holds.
        # In a tile of 32 queries, which sm_86 needs so as not to spill, two threads draw the same group.
        groups = max(scores, 32) // 8
        assert products <= 9 * groups + 8  # a few are of addresses
