"""The driver for Triton that launches nothing, of the benchmarks, for processes that tests start."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from stand_in_driver import Driver as Driver  # noqa: E402
from stand_in_driver import install as install  # noqa: E402
