"""The device "meta" stands for a GPU here: it has no numbers, so that whoever waits for one fails.

`install` lets models in plain Triton arithmetic run on it: kernels launch nothing, graphs replay nothing, and whatever
is on the host stays real. So tests count what would wait for a GPU, and time what the host does beside it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import fastbert

META = torch.device("meta")


class EmptyGraphs:
    """A capturer whose graphs replay nothing. launched: is called at each replay."""

    def __init__(self) -> None:
        self.captures = self.replays = 0
        self.launched: Callable[[], None] = lambda: None

    def begin(self, memory: Sequence[Tensor]) -> None: ...

    def end(self) -> None: ...

    def finish(self) -> None: ...

    def capture(self, function: Callable[[], None]) -> Any:
        self.captures += 1
        function()
        outer = self

        class Replay:
            def replay(self) -> None:
                outer.replays += 1
                outer.launched()

        return Replay()


def install(patch: Callable[[Any, str, Any], None], arch: int = 90) -> EmptyGraphs:
    """Lets the device "meta" stand for a GPU of this architecture. patch: `monkeypatch.setattr`, or `setattr`."""
    from fastbert.engine import capture
    from fastbert.ops import dispatch, noting, packing, silent_writes, tracing
    from fastbert_kernels import launch

    graphs = EmptyGraphs()
    transformed, obstacle = tracing.transformed, dispatch.triton_obstacle
    patch(capture, "capturer", lambda device: graphs if device.type == "meta" else None)
    patch(dispatch, "triton_obstacle", lambda device: None if device.type == "meta" else obstacle(device))
    patch(noting, "possible_on", lambda device: device.type == "meta")
    patch(packing, "takes_from_host", lambda device, tensor: device.type == "meta" and tensor.device.type == "cpu")
    patch(silent_writes, "waits", lambda device: device.type == "meta")
    patch(tracing, "transformed", lambda *tensors: transformed(*(t for t in tensors if not _is_meta(t))))
    importlib.import_module("torch._dynamo")  # which keeps this function when it is first imported: not ours, then
    autocast = torch.is_autocast_enabled
    patch(torch, "is_autocast_enabled", lambda *kinds: "meta" not in kinds and autocast(*kinds))
    patch(launch, "_recorded_arch", arch)
    patch(launch, "run", lambda *args, **arguments: None)
    return graphs


def _is_meta(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.is_meta


def bert(kind: Any = fastbert.BertModel, **sizes: Any) -> Any:
    """A model on the device, as BERT-base by default, in bfloat16."""
    arguments: dict[str, Any] = {} if kind is not fastbert.BertModel else {"add_pooling_layer": False}
    with META:
        model = kind(fastbert.BertConfig(**sizes), backend="triton", strict=True, **arguments)
    return model.eval().to(torch.bfloat16)
