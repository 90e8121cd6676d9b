"""`Options` holds the choices of a user about how a model runs."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from fastbert.ops import Policy
from fastbert.ops.quantized import check_precision


@dataclass(frozen=True)
class Options:
    """An `Options` holds the choices that all models share.

    backend: "auto", "triton", "cpu" or "torch", the code that may run the operations (fastbert.ops.dispatch). strict:
    whether a fallback is an error. batch_invariant: whether the bits of a text's output must not depend on the other
    texts of the batch; there is no fallback. precision: None, "fp8" or "int8", the operands of the encoder's linears.
    cuda_graphs: whether short batches on a GPU run as CUDA graphs, with the same results. strict_ids: whether each call
    on a GPU waits for the check of ids that are already there; otherwise the next call, or
    `fastbert.wait_for_checks`, raises. Raises ValueError for an unsupported value or combination.
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
        """Returns the policy for operations."""
        return Policy(self.backend, self.strict, self.batch_invariant)

    @classmethod
    def of(cls, options: Options | None, settings: dict[str, Any]) -> Options:
        """Returns the options with these settings changed. Raises TypeError for an unknown name."""
        for name in settings:
            if name not in OPTION_NAMES:
                raise TypeError(f"{name}: not an option; expected one of {', '.join(OPTION_NAMES)}")
        return replace(options or cls(), **settings)


OPTION_NAMES = tuple(field.name for field in fields(Options))
