"""This module keeps the last seen state of a model's modules and weights, and compares it before each use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.engine.block import features_of
from fastbert.engine.interface import EncoderModel
from fastbert.engine.listeners import everywhere, observer_obstacle
from fastbert.engine.snapshot import ModuleSnapshot
from fastbert.ops import tracing

GRADIENTS = "gradients are on (torch.no_grad or torch.inference_mode turns them off)"
TRAINING = "the model is in training mode"
# The types that an entry of a module's parameters may have, for code that takes their addresses.
_PLAIN_PARAMETERS = frozenset((*tracing.PLAIN, type(None)))


class EncoderState:
    """An `EncoderState` is the last seen state of one encoder's modules. snapshot: None before the first check.

    features: the features of layers beyond BERT's, None before `layer_features`, which sets the next two as well.
    beside: the activation of a layer's convolution, or None. projects: whether a linear projects the embeddings.
    """

    def __init__(self) -> None:
        self.snapshot: ModuleSnapshot | None = None
        self.features: list[str] | None = None
        self.beside: str | None = None
        self.projects = False
        self._n_silent_writes = 0

    def plain_modules(self, model: EncoderModel) -> bool:
        """Tells whether the encoder has only its own modules, in eval mode, and without hooks."""
        snapshot = self._looked_at(model)
        return snapshot.plain() and not everywhere()

    def plain_layers(self, model: EncoderModel) -> bool:
        """Tells whether the encoder has only its own modules, in any mode, and without hooks."""
        snapshot = self._looked_at(model)
        return snapshot.unheard() and not everywhere()

    def _looked_at(self, model: EncoderModel) -> ModuleSnapshot:
        """Returns the snapshot of the present modules."""
        snapshot = self.snapshot
        if snapshot is None or snapshot.roots != roots_of(model) or not snapshot.same_modules():
            snapshot = ModuleSnapshot(roots_of(model), model.own_modules)
            self.snapshot, self.features, self.beside, self._n_silent_writes = snapshot, None, None, 0
        return snapshot

    def layer_features(self, model: EncoderModel) -> list[str]:
        """Returns the names in `block.FEATURES` of the layers' features. Call it after `plain_modules`."""
        blocks = list(model.blocks())
        self.features = features_of(blocks)
        inside = getattr(model.embeddings, "embed_proj", None)
        self.projects = model.embeddings_project is not None or inside is not None
        self.beside = next((block.convolution.activation for block in blocks if block.convolution is not None), None)
        return self.features

    def plain_parameters(self) -> bool:
        """Tells whether the parameters are plain tensors with memory. Call it after `plain_modules`."""
        assert self.snapshot is not None
        return self.snapshot.parameter_types() <= _PLAIN_PARAMETERS

    def obstacles(self, model: EncoderModel, device: torch.device, in_own_graph: bool = False) -> Iterator[str]:
        """Yields every reason why running the operations as one call would have another visible result.

        in_own_graph: whether the engine itself captures the batch as a CUDA graph.
        """
        # A replica of DataParallel shares what it has with the others, and lasts for one call.
        if model.__dict__.get("_is_replica", False):
            yield "the model is a replica of DataParallel"
        observer = tracing.observed() if in_own_graph else observer_obstacle(device)
        if observer is not None:
            yield observer
        if not self.plain_modules(model):
            yield "a module of the encoder is an adapter, has hooks or a forward of its own, or is in training mode"

    def written_silently(self, model: EncoderModel) -> bool:
        """Tells whether weights were written to without PyTorch's count; derived tensors are then made again.

        On a GPU the host waits for it.
        """
        if torch.compiler.is_compiling() or observer_obstacle(model.device):
            return False
        self.plain_modules(model)  # which sees to the snapshot
        snapshot = self.snapshot
        assert snapshot is not None
        n_silent_writes = snapshot.silent_writes(snapshot.state())
        if n_silent_writes == self._n_silent_writes:
            return False
        self._n_silent_writes = n_silent_writes
        snapshot.invalidate()
        return True


def roots_of(model: Any) -> tuple[nn.Module | None, ...]:
    """Returns the parts of a model's encoder, None for a missing part."""
    modules = model._modules  # asked for directly, which a module's attributes are not
    return modules["embeddings"], modules.get("embeddings_project"), modules["encoder"]


def first_parameter(module: Any) -> Tensor:
    """Works as next(module.parameters()), without a generator for each module."""
    one = module
    while one is not None:  # down the first children, where most models have it
        for parameter in one._parameters.values():
            if parameter is not None:
                return parameter
        one = next(iter(one._modules.values()), None)
    waiting: list[nn.Module | None] = [module]
    while waiting:
        one = waiting.pop()
        if one is None:
            continue
        for parameter in one._parameters.values():
            if parameter is not None:
                return parameter
        waiting += reversed(one._modules.values())
    raise StopIteration


# What PyTorch's own properties call, which take long to find it. Where it is not there, the properties are read.
_C: Any = torch._C
_fp32_precision = getattr(_C, "_get_fp32_precision_getter", None)
_bf16_reduced = getattr(_C, "_get_cublas_allow_bf16_reduced_precision_reduction", None)
_fp16_reduced = getattr(_C, "_get_cublas_allow_fp16_reduced_precision_reduction", None)


def switches() -> tuple[Any, ...]:
    """Returns PyTorch's switches that influence the choice of kernels."""
    if _fp32_precision is not None and _bf16_reduced is not None and _fp16_reduced is not None:
        return _fp32_precision("cuda", "matmul") == "tf32", _bf16_reduced(), _fp16_reduced()
    return read_switches()


def read_switches() -> tuple[Any, ...]:
    """Returns the switches from PyTorch's properties: "tf32" as True, without other options of reduced precision."""
    from fastbert_kernels import launch

    matmul = torch.backends.cuda.matmul
    return (
        launch.dot_precision(torch.float32) == "tf32",
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_reduced_precision_reduction,
    )
