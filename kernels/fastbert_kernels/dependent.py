"""Dependent launches let a kernel start while the one before it on the stream still runs, on compute capability 9.0 on.

A kernel launched so (`launch_pdl`) waits inside, before it reads or writes anything that another kernel may touch, and
then allows its successor to start. What overlaps is the launch and the start of its programs, about a microsecond a
kernel. Three rules make it safe:

- Every program of such a kernel waits. Its end thus says that all kernels before it have ended, too.
- Nothing in global memory is read or written before the wait, not even a weight, which a kernel may just have made.
- Where the option is off, under the interpreter and on older architectures nothing of it is compiled.

CUDA graphs keep these edges when they capture such launches. The option is off until a GPU has shown that it pays: a
table says so ("dependent_launch"), or `use`.

Source: NVIDIA, "CUDA C++ Programming Guide", section "Programmatic dependent launch and synchronization"; PTX ISA,
`griddepcontrol`.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl
from triton.language.extra import cuda

from fastbert_kernels import launch, tables
from fastbert_kernels.jit import jit

MIN_ARCH = 90
_chosen: bool | None = None  # The argument of use.


@jit
def wait_for_predecessor(PDL: tl.constexpr):
    """Waits until all that was launched before has ended, then lets the next kernel start. Nothing unless PDL."""
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()


def use(on: bool | None) -> None:
    """Launches the kernels of linears and LayerNorm dependently, or not; None goes back to what tables say.

    A CUDA graph keeps what was on when it was captured.
    """
    global _chosen
    _chosen = on
    tables.forget()  # which calls _remind


def _remind() -> None:
    tables.some_dependent = bool(_chosen)


tables.on_forget(_remind)


def options(config: dict[str, int], arch: int) -> dict[str, Any]:
    """Returns the config of a launch on the architecture, with the two options of a dependent one where that is on.

    Launchers ask only if `tables.some_dependent`, so that the question costs nothing otherwise.
    """
    on = tables.dependent_launch(arch, launch.recorded is not None) if _chosen is None else _chosen
    if not on or arch < MIN_ARCH or launch.interpreted():
        return config
    return {**config, "PDL": True, "launch_pdl": True}
