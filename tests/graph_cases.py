"""The tests of CUDA graphs share models in the rows of a bucket, and a stand-in that captures without a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fastbert
import fastbert.models.bert
from fastbert.ops import Policy
from helpers import cu_seqlens_of

SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 200,
}


LENGTHS = ([3, 7, 1], [20, 20, 20], [31], [32], [33], [0, 5, 0], [1], [60, 1, 2, 70, 1], [130, 3])


class StandIn:
    """A capturer that runs a function to capture it, and runs it again to replay it.

    It fails where two users hold the static memory at a time.
    """

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.captures, self.replays, self.busy = error, 0, 0, False
        self.errors: list[Exception] = []

    def begin(self, memory: Sequence[Tensor]) -> None:
        assert not self.busy and memory, "two users of the static memory at a time"
        self.busy = True

    def end(self) -> None:
        self.busy = False

    def finish(self) -> None:
        assert not self.busy

    def capture(self, function: Callable[[], None]) -> Any:
        if self.error is not None:
            raise self.error
        self.captures += 1
        function()
        outer = self

        class Replay:
            def replay(self) -> None:
                outer.replays += 1
                try:
                    function()
                except (RuntimeError, TypeError) as error:
                    # A graph runs what was captured; this runs the code of a model that may have changed since. What
                    # was launched in vain is not looked at, and a result that is would be the one before.
                    outer.errors.append(error)

        return Replay()


def make(device: torch.device, dtype: torch.dtype = torch.float32, kind: Any = fastbert.BertModel, **sizes: Any) -> Any:
    torch.manual_seed(1)
    model = kind(fastbert.BertConfig(**{**SIZES, **sizes}), backend="triton", strict=True)
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.3)
    return model.eval().to(device, dtype)


def packed(lengths: list[int], device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(ids, cu_seqlens) of random texts."""
    random = torch.Generator().manual_seed(seed)
    return torch.randint(1, 101, (sum(lengths),), generator=random).to(device), cu_seqlens_of(lengths, device)


def encode(model: Any, lengths: list[int], seed: int = 0) -> Tensor:
    with torch.no_grad():
        return model.forward_packed(*packed(lengths, model.device, seed))


def without_graphs(model: Any, lengths: list[int], seed: int = 0) -> Tensor:
    other = copy.deepcopy(model)
    other.cuda_graphs = False
    return encode(other, lengths, seed)


def scale_query(model: Any) -> None:
    with torch.no_grad():
        model.encoder.layer[1].attention.self.query.weight.mul_(2.0)


def scale_norm(model: Any) -> None:
    with torch.no_grad():
        model.encoder.layer[0].output.LayerNorm.weight.mul_(2.0)


def replace_parameter(model: Any) -> None:
    dense = model.encoder.layer[1].intermediate.dense
    dense.weight = nn.Parameter(dense.weight.detach() * 2)


def replace_module(model: Any) -> None:
    dense = nn.Linear(32, 64).to(model.device, model.dtype).eval()
    model.encoder.layer[0].intermediate.dense = dense


def take_a_bias(model: Any) -> None:
    model.encoder.layer[1].attention.self.query.bias = None


def write_data(model: Any) -> None:
    model.encoder.layer[0].output.dense.weight.data = model.encoder.layer[0].output.dense.weight.data * 2


def load(model: Any) -> None:
    model.load_state_dict({name: t * 1.5 for name, t in model.state_dict().items()})


CHANGES = [scale_query, scale_norm, replace_parameter, replace_module, take_a_bias, write_data, load]


class Doubling(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def add_adapter(model: Any) -> None:
    model.encoder.layer[0].attention.self.query = Doubling(32, 32).to(model.device)


def add_hook(model: Any) -> None:
    model.encoder.layer[0].output.register_forward_hook(lambda module, args, output: output * 2)


def patch_forward(model: Any) -> None:
    forward = model.encoder.layer[1].forward
    model.encoder.layer[1].forward = lambda *args: 2 * forward(*args)


def train_a_part(model: Any) -> None:
    model.policy = Policy("triton")
    model.encoder.layer[0].output.dropout.train()


def other_backend(model: Any) -> None:
    model.policy = Policy("torch")


def be_a_replica(model: Any) -> None:
    model._is_replica = True


UNSUITABLE = [add_adapter, add_hook, patch_forward, train_a_part, other_backend, be_a_replica]


def cheap(model: Any) -> list[int]:
    """Replaces the encoder by a copy of the ids; returns the list of the row counts of its calls."""
    rows: list[int] = []

    def encode_cheaply(model: Any, batch: Any, inputs: Any, keep_states: bool) -> list[Tensor]:
        rows.append(inputs.input_ids.shape[0])
        return [inputs.input_ids[:, None].expand(-1, 32).to(model.dtype)]

    model.engine.modules.run = model.engine.eight_bit.run = encode_cheaply
    return rows


def random_lengths(seed: int, most: int) -> list[int]:
    random = torch.Generator().manual_seed(seed)
    total = int(torch.randint(1, most, (1,), generator=random))
    lengths = []
    while total > 0:
        lengths.append(min(total, int(torch.randint(0, 200, (1,), generator=random))))
        total -= lengths[-1]
    return lengths


def real(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Any:
    return make(device, dtype, hidden_size=256, num_attention_heads=4, intermediate_size=1024)
