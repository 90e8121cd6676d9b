"""`FiniteGuard` stops training at the first NaN or infinity, and names the step and the source."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from fastbert.training.replay import Call, counts_of, first_in_forward, first_parameter

MOST_CALLS = 256  # the largest number of calls to keep between two checks
LEAST_SCALE = 1.0
_WRAPPERS = nn.DataParallel, nn.parallel.DistributedDataParallel


class FiniteGuard:
    """A `FiniteGuard` checks the training steps in a `with` statement, or until `close`.

    model: the model that each step calls; with DistributedDataParallel, the model inside. least_scale: with a
    GradScaler, a gradient may sometimes overflow, and then the scale decreases. An overflow below this scale is an
    error.

        with FiniteGuard(model) as guard:
            for batch in batches:
                loss = model(**batch).loss
                loss.backward()
                guard.check(loss)
                optimizer.step()
                optimizer.zero_grad()

    In each step the guard reads the gradients once, saves the state of the random generators, and waits for the device
    once. If a value is not finite, the guard repeats the calls since the last check, module by module, with the same
    dropout. So call `check` before the optimizer changes the weights.
    """

    def __init__(self, model: nn.Module, *, least_scale: float = LEAST_SCALE) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        self.model: nn.Module = model.module if isinstance(model, _WRAPPERS) else model
        self.least_scale, self.step = least_scale, 0
        self._calls: deque[Call] = deque(maxlen=MOST_CALLS)
        self._losses: list[Tensor] = []
        # The names of parameters and the norms of their gradients, after the last backward pass.
        self._names: list[str] = []
        self._norms: Tensor | None = None
        self._is_queued = self._is_replaying = False
        self._handles = [
            self.model.register_forward_pre_hook(self._before, with_kwargs=True),
            self.model.register_forward_hook(self._after),
        ]

    def __enter__(self) -> FiniteGuard:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Removes the guard from the model."""
        for handle in self._handles:
            handle.remove()
        self._forget()

    def check(self, loss: Tensor | None = None, *, step: int | None = None, scaler: Any = None) -> None:
        """Raises FloatingPointError if the loss or a gradient of this step is not finite.

        Call it after `backward` and before the optimizer's step; without a backward pass, it checks only the loss.
        loss: by default the `loss` of each model output since the last check, if the outputs have one. step: the step
        number for the message, by default the number of this call, counted from 1. scaler: the GradScaler, if there is
        one.
        """
        self.step = self.step + 1 if step is None else step
        losses = self._losses if loss is None else [loss.detach()]
        scale = None if scaler is None or not scaler.is_enabled() else float(scaler.get_scale())
        values = list(losses)
        if self._norms is not None and (scale is None or scale < self.least_scale):
            values.append(self._norms)
        if not _finite(values):
            raise self._error(losses, scale)
        self._forget()

    def _forget(self) -> None:
        self._calls.clear()
        self._losses, self._norms, self._is_queued = [], None, False

    # Hooks

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module.training and not self._is_replaying:
            device = next((p.device for p in module.parameters()), torch.device("cpu"))
            self._calls.append(Call.about_to_run(args, kwargs, device))

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not module.training or self._is_replaying:
            return
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if isinstance(loss, Tensor):
            self._losses.append(loss.detach())
        for value in _values(output):
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(self._in_backward)

    def _in_backward(self, grad: Tensor) -> None:
        """Registers a check of the gradients at the end of the current backward pass."""
        if not self._is_queued:
            self._is_queued = True
            Variable._execution_engine.queue_callback(self._after_backward)

    def _after_backward(self) -> None:
        """Computes the norm of each gradient on the device, before gradients are clipped."""
        self._is_queued = False
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        values = {name: grad._values() if grad.is_sparse else grad for name, grad in gradients.items()}
        values = {name: value for name, value in values.items() if value.numel()}
        if values:
            self._names, self._norms = list(values), _norms(list(values.values()))

    # The source

    def _error(self, losses: list[Tensor], scale: float | None) -> FloatingPointError:
        source = first_parameter(self.model) or self._in_forward() or self._beyond_forward(losses)
        note = "" if scale is None else f"; the scale of the loss is {scale:g}"
        self.close()
        return FloatingPointError(f"step {self.step}: {source}{note}")

    def _in_forward(self) -> str | None:
        self._is_replaying = True
        try:
            for call in self._calls:
                if (source := first_in_forward(getattr(self.model, "_orig_mod", self.model), call)) is not None:
                    return source
        except Exception as error:  # the loss is still not finite
            return f"the loss or a gradient is not finite, and the forward pass, made again, raises {error!r}"
        finally:
            self._is_replaying = False
        return None

    def _beyond_forward(self, losses: list[Tensor]) -> str:
        if not _finite(losses):
            counts = next(counts for loss in losses if (counts := counts_of(loss)) is not None)
            return f"the loss is the first that is not finite: {counts}; all outputs of modules are finite"
        assert self._norms is not None
        norms = dict(zip(self._names, self._norms.tolist(), strict=True))
        # Modules are created in the order of the forward pass.
        name = next(name for name in reversed(self._names) if not math.isfinite(norms[name]))
        return f"the gradient of {name} is the first that is not finite in the backward pass: its norm is {norms[name]}"


def _values(output: Any) -> Iterable[Any]:
    """Returns the fields of a model's output."""
    if isinstance(output, Mapping):
        return output.values()
    if hasattr(output, "to_tuple"):
        output = output.to_tuple()
    return output if isinstance(output, (list, tuple)) else (output,)


def _norms(gradients: list[Tensor]) -> Tensor:
    """Returns the norm of each gradient, computed in float32 or wider, as float32 on the device of the first."""
    norms: list[Tensor] = [torch.empty(0)] * len(gradients)
    for dtype in {gradient.dtype for gradient in gradients}:
        places = [i for i, gradient in enumerate(gradients) if gradient.dtype == dtype]
        wide = torch.float32 if dtype.itemsize < 4 else None
        of_dtype = torch._foreach_norm([gradients[i] for i in places], 2, dtype=wide)
        for i, norm in zip(places, of_dtype, strict=True):
            norms[i] = norm
    return torch.stack([norm.to(norms[0].device, torch.float32) for norm in norms])


def _finite(tensors: list[Tensor]) -> bool:
    """Tells whether all values are finite. It waits for the device once."""
    if not tensors:
        return True
    device = tensors[0].device
    return bool(torch.stack([torch.isfinite(tensor).all().to(device) for tensor in tensors]).all())
