#!/usr/bin/env bash
# Tests, ceilings, suites and peers on a machine with one NVIDIA GPU, from the sources, without installation or network.
# PYTHON names the interpreter (python3 by default); it must have PyTorch, Triton, transformers and pytest.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
command -v "$python" >/dev/null || {
    echo "error: '$python' not found. Name an interpreter that has PyTorch: PYTHON=/path/to/python3 $0 ..." >&2
    exit 2
}
# The kernels are compiled, never interpreted.
unset TRITON_INTERPRET
export PYTHONPATH="$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
exec "$python" "$root/benchmarks/gpu.py" "$@"
