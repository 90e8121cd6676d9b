"""This package compiles the kernels for GPUs that are not there, and reports what the compiler made of them.

    python -m fastbert_kernels.offline --arch 80 90          exit code 0: clean, 1: findings, 2: could not run

It runs the launchers themselves inside `launch.recording`. So every kernel is compiled for the arguments, the
specialisation and the block sizes of a real launch. These are findings:

- code that does not compile;
- registers spilled to local memory (in TF32, and for the sizes that divide by nothing, "odd", spills are shown and are
  no finding);
- more shared or tensor memory than a thread block may have;
- a warp-specialised kernel that takes a tensor descriptor from the host;
- a matrix kernel (linear, attention) without a tensor-core instruction; in 8 bits, one without an 8-bit tensor-core
  instruction; in IEEE float32, whose products are fused multiply-adds by definition, one with such an instruction.

Registers and stack come from cuobjdump, and instructions from nvdisasm. Both are in Triton's package.
"""

from fastbert_kernels.offline.command import main
from fastbert_kernels.offline.compiling import Result, compile_all, compile_kernel
from fastbert_kernels.offline.coverage import Case, cases
from fastbert_kernels.offline.planning import Kernel, plan, specialize
from fastbert_kernels.offline.printing import report

__all__ = ["Case", "Kernel", "Result", "cases", "compile_all", "compile_kernel", "main", "plan", "report", "specialize"]
