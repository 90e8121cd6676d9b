"""The choices of a user about how a model runs, in one place."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from fastbert.ops import Policy
from fastbert.ops.quantized import check_precision


@dataclass(frozen=True)
class Options:
    """The choices that all models share.

    backend: "auto", "triton", "cpu" or "torch", what may run the operations; fastbert.ops.dispatch says more. strict:
    whether what the backend cannot run raises, in the place of a fallback. batch_invariant: whether a text's output is
    the same to the bit alone, in any batch and in any order; it is strict. precision: None, "fp8" or "int8", in which
    the encoder's linears multiply. cuda_graphs: whether short batches on a GPU are launched as CUDA graphs, which
    changes no result. strict_ids: whether each call on a GPU waits until ids that are there already are known to be in
    their tables; else the next call, or `fastbert.wait_for_checks`, raises for them. Raises ValueError for a value, or
    two together, that nothing supports.
    """

    backend: str = "auto"
    strict: bool = False
    batch_invariant: bool = False
    precision: str | None = None
    cuda_graphs: bool = True
    strict_ids: bool = False

    def __post_init__(self) -> None:
        Policy(self.backend, self.strict, self.batch_invariant)  # which checks them
        precision = check_precision(self.precision)
        if self.batch_invariant and (precision == "fp8" or (precision is not None and self.backend == "triton")):
            raise ValueError(f"batch_invariant: not supported together with precision={precision!r} on Triton kernels")

    @property
    def policy(self) -> Policy:
        """The policy that operations ask for."""
        return Policy(self.backend, self.strict, self.batch_invariant)

    @classmethod
    def of(cls, options: Options | None, settings: dict[str, Any]) -> Options:
        """The options with these settings changed. Raises TypeError for a name that is no option."""
        for name in settings:
            if name not in OPTION_NAMES:
                raise TypeError(f"{name}: not an option; expected one of {', '.join(OPTION_NAMES)}")
        return replace(options or cls(), **settings)


OPTION_NAMES = tuple(field.name for field in fields(Options))
