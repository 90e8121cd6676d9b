"""Dependent launches let a kernel start while the one before it on the stream still runs (compute capability >= 9.0).

Such a kernel (`launch_pdl`) waits inside, before it reads or writes any memory that another kernel may use, and then
lets the next kernel start. The launch and the start of its programs overlap, about a microsecond for each kernel. Three
rules make it safe:

- Every program of such a kernel waits. So when it ends, all kernels before it have ended, too.
- Nothing in global memory is read or written before the wait, not even a weight, which a kernel may just have made.
- If the option is off, under the interpreter, and on older architectures, no such code is compiled.

CUDA graphs keep these edges when they capture such launches. The option is off unless a table ("dependent_launch") or
`use` turns it on, because a GPU must first show that it is faster.

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
_chosen: bool | None = None  # The argument of `use`.


@jit
def wait_for_predecessor(PDL: tl.constexpr):
    """Waits until all that was launched before has ended, then lets the next kernel start. Nothing unless PDL."""
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()


def use(on: bool | None) -> None:
    """Turns dependent launches of linears and LayerNorm on or off. None restores the choice of the tables.

    A CUDA graph keeps the setting from its capture.
    """
    global _chosen
    _chosen = on
    tables.forget()  # calls _remind


def _remind() -> None:
    tables.some_dependent = bool(_chosen)


tables.on_forget(_remind)


def options(config: dict[str, int], arch: int) -> dict[str, Any]:
    """Returns the config of a launch on the architecture, with the options of a dependent launch if it is on.

    Launchers call it only if `tables.some_dependent`, so that it costs nothing otherwise.
    """
    on = tables.dependent_launch(arch, launch.recorded is not None) if _chosen is None else _chosen
    if not on or arch < MIN_ARCH or launch.interpreted():
        return config
    return {**config, "PDL": True, "launch_pdl": True}
