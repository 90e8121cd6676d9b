"""The loops of compiled kernels have the instructions that decide their speed, as seen without a GPU."""

from __future__ import annotations

from typing import Any

import pytest

from process_cases import run_beside_tests as run

ATTENTION = """
import json, sys
import sass

loops_of = {}
for model, variant in (("extra", "D16"), ("minilm", "D32"), ("base", "D64"), ("extra", "D80"), ("extra", "D128")):
    kernel, _ = sass.planned(int(sys.argv[1]), "bf16", "attention", model, variant)
    loops_of[variant] = [
        [sass.counts(body, "LDGSTS"), sass.counts(body, "LDG.E"), sass.waits(body)] for body in sass.loops(kernel)
    ]
print(json.dumps(loops_of))
"""


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 86, 89, 90, 120])
def test_attention_copies_ahead(arch: int) -> None:
    """Catches a step of attention that waits for the copies which it has just begun, so that none is under way."""
    loops_of: dict[str, Any] = run(ATTENTION, str(arch), cache=None)
    for variant, loops in loops_of.items():
        assert len(loops) == 2, variant  # with and without a mask
        for copies, loads, waits in loops:
            assert copies > 0 and loads == 0, (variant, "keys and values go around the registers")
            # Two groups a step, one of keys and one of values.
            assert waits and min(waits) >= 2, (variant, "a wait for copies of the next step")


POOLING = """
import json, sys
import sass

loops_of = {}
for arch in (80, 90):
    for dtype in ("bf16", "fp32"):
        for mode in ("mean", "max", "weighted_mean"):
            (kernel,) = sass.planned(arch, dtype, "pooling", "base", mode)
            loops = sass.loops(kernel)
            names = "BAR", "SHFL", "LDS", "STS", "LDG.E.128"
            loops_of[f"{arch} {dtype} {mode}"] = [[sass.counts(body, name) for name in names] for body in loops]
print(json.dumps(loops_of))
"""


@pytest.mark.slow
def test_pooling_reduces_after_its_loops() -> None:
    """Catches threads that exchange sums, or wait for each other, at every block of rows instead of once at the end."""
    loops_of: dict[str, Any] = run(POOLING, cache=None)
    assert len(loops_of) == 12
    for name, loops in loops_of.items():
        assert len(loops) == 2, name  # of several blocks at a time, and of what is left
        for barriers, shuffles, loads, stores, reads in loops:
            assert barriers == shuffles == loads == stores == 0, name
            assert reads > 0, name
        # Rows of 128 columns in loads of 16 bytes, 128 threads: 4 blocks of 32 rows are 4 x 4 in 16 bits, 4 x 8 in 32.
        assert max(reads for *_, reads in loops) == (16 if "bf16" in name else 32), name
