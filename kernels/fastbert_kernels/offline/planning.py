"""This module finds the distinct kernels that cases launch, as Triton's JIT would compile them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from fastbert_kernels import launch
from fastbert_kernels.offline.coverage import Case


@dataclass
class Kernel:
    """A `Kernel` is one kernel to compile, with the cases that launch it."""

    arch: int
    op: str
    dtype: str
    config: dict[str, int]
    source: Any
    options: dict[str, Any]
    models: list[str] = field(default_factory=list)
    variants: list[str] = field(default_factory=list)

    @property
    def tile(self) -> str:
        """Describes the block sizes, warps and stages in words."""
        blocks = "x".join(str(size) for name, size in self.config.items() if name.startswith("BLOCK_"))
        return f"{blocks} w{self.config['num_warps']} s{self.config['num_stages']}"

    @property
    def must_not_spill(self) -> bool:
        """Says whether a spill is a finding.

        TF32 runs with the block sizes made for IEEE float32, and no tile fits sizes that divide by nothing.
        """
        return self.dtype != "tf32" and self.models != ["odd"]

    @property
    def label(self) -> str:
        """Names the models and variants that launch the kernel."""
        return f"{'/'.join(self.models)} {','.join(self.variants)}"


def plan(archs: Iterable[int], chosen: Iterable[Case]) -> list[Kernel]:
    """Lists the distinct kernels that the cases launch on each architecture."""
    kernels: dict[Any, Kernel] = {}
    chosen = list(chosen)
    for arch in archs:
        for case in chosen:
            with launch.recording(arch) as launches, _tf32(case.dtype == "tf32"):
                case.call()
            for recorded in launches:
                source, options = specialize(recorded, GPUTarget("cuda", arch, 32))
                key = arch, case.op, case.dtype, source.hash(), str(options)
                kernel = kernels.setdefault(key, Kernel(arch, case.op, case.dtype, recorded.config, source, options))
                for names, name in ((kernel.models, case.model), (kernel.variants, case.variant)):
                    if name not in names:
                        names.append(name)
    return list(kernels.values())


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """Sets PyTorch's switch of TF32 inside."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def specialize(recorded: launch.Launch, target: GPUTarget) -> tuple[Any, dict[str, Any]]:
    """Returns the source and the compiler options that Triton's JIT would use for a launch, by the JIT's own rules."""
    backend = make_backend(target)
    kernel = recorded.kernel
    keywords = {**recorded.arguments, **recorded.config, "enable_fp_fusion": True}  # As `launch.run` does.
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, rest = bind(**keywords)
    options, signature, constexprs, attrs = kernel._pack_args(backend, keywords, bound, specialization, rest)
    return ASTSource(kernel, signature, constexprs, attrs), dict(options.__dict__)
