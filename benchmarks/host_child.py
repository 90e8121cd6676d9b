"""A process measures the host's work for a batch on a GPU, with a driver that launches nothing, and prints JSON.

    python benchmarks/host_child.py [--seconds 20]

CPU tensors stand for those of a GPU of compute capability 9.0. Kernels are compiled for sm_90 and not run. Products of
cuBLAS, and copies of results, are replaced by the allocation of their outputs, because a call of PyTorch would only
queue them. The rest is the time of the host until everything is queued, without the calls of CUDA's driver, cuBLAS and
copies. Ids are on the host, where their values are checked.

Prints a list of {"workload", "model", "setting", "samples": seconds of one, "n": how many launches or layers one pass
has, "calls": Python calls of one pass}.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

SAMPLES = 30
clock = time.thread_time  # processor time; nothing here waits, so other programs of the machine do not count
LENGTHS = {
    "1x16": [16], "1x128": [128], "32x128": [128] * 32, "8x512": [512] * 8,
    "ragged": [7, 180, 33, 91, 12, 256, 64, 140, 5, 77, 201, 48],
}  # fmt: skip
# Batches with new lengths: the number of texts, and the least and the most tokens of a text.
NEW_LENGTHS = {"1 new text": (1, 5, 400), "12 new texts": (12, 5, 200), "32 new texts": (32, 60, 196)}
SIZES: dict[str, dict[str, int]] = {
    "BERT-base": {},
    "MiniLM": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
}
# Other families in their published sizes, except for the number of layers and of words: one layer is measured.
_BASE = {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 6, "vocab_size": 1000}
FAMILIES: dict[str, dict[str, Any]] = {
    "MPNet-base": {**_BASE, "model_type": "mpnet", "intermediate_size": 3072},
    "ModernBERT-base": {**_BASE, "model_type": "modernbert", "intermediate_size": 1152, "pad_token_id": 0},
    "Nomic-base": {**_BASE, "model_type": "nomic_bert", "intermediate_size": 3072},
    "DeBERTa-v3-base": {
        **_BASE, "model_type": "deberta-v2", "intermediate_size": 3072, "relative_attention": True,
        "position_buckets": 256, "share_att_key": True, "pos_att_type": ["p2c", "c2p"], "norm_rel_ebd": "layer_norm",
        "position_biased_input": False, "type_vocab_size": 0,
    },
}  # fmt: skip
BF16 = torch.bfloat16


class Replay:
    """A Replay is a captured graph that launches nothing, and notes when its launch was requested."""

    launched = 0.0

    def replay(self) -> None:
        Replay.launched = clock()


class StandIn:
    """A StandIn is a capturer without a device: it runs the captured function once, and the graph does nothing."""

    def capture(self, function: Callable[[], None]) -> Replay:
        function()
        return Replay()

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **options: None


def stand_for_a_gpu() -> Any:
    """Lets CPU tensors of this process stand for those of a GPU. Returns the driver."""
    import stand_in_driver

    from fastbert.ops import noting, packing, silent_writes

    packing.makes_later = lambda device: True
    driver = stand_in_driver.install()
    silent_writes.waits = lambda device: True  # as on a GPU, where the host does not check numbers,
    noting.possible_on = lambda device: True  # and kernels note wrong ids and weights
    torch.nn.functional.linear = _queued_linear  # type: ignore[assignment]
    Tensor.clone = _queued_clone  # type: ignore[method-assign]
    Tensor.copy_ = lambda self, *arguments, **options: self  # type: ignore[method-assign]
    return driver


def _queued_clone(tensor: Tensor, **options: Any) -> Tensor:
    return torch.empty_like(tensor, **options)


def _queued_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)


def calls_of(function: Callable[[], Any]) -> int:
    """Counts the calls of Python functions after a warm-up."""
    function()
    n_calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal n_calls
        n_calls += event == "call"

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return n_calls


def samples_of(function: Callable[[], Any], seconds: float) -> list[float]:
    """Returns the seconds of one call: means of a few calls each, for as many samples as the time allows."""
    for _ in range(3):
        function()
    started = clock()
    function()
    n_calls = max(1, int(seconds / SAMPLES / max(clock() - started, 1e-6)))
    samples = []
    for _ in range(SAMPLES):
        started = clock()
        for _ in range(n_calls):
            function()
        samples.append((clock() - started) / n_calls)
    return samples


def operations() -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Measures each operation on 128 tokens of BERT-base: through `fastbert.ops`, and its kernel alone."""
    from fastbert import ops
    from fastbert.ops import attention_plan, launched, packing

    policy, device = ops.Policy("triton", strict=True), torch.device("cpu")
    x, vector, up = torch.empty(128, 768, dtype=BF16), torch.empty(768, dtype=BF16), torch.empty(3072, 768, dtype=BF16)
    bias, qkv = torch.empty(3072, dtype=BF16), torch.empty(128, 2304, dtype=BF16)
    batch = packing.from_lengths([64, 64], device)
    plan = attention_plan.triton_plan(batch, BF16, 64, policy)
    product = launched.Product(up, bias, "gelu", True)
    after = x, vector, vector, 1e-12
    return {
        "linear + GELU": (
            lambda: ops.linear(x, up, bias, "gelu", policy=policy),
            lambda: launched.linear_activation(x, product),
        ),
        "attention": (
            lambda: ops.varlen_attention(qkv, batch, 12, policy=policy),
            lambda: launched.varlen_attention(qkv, batch, plan, 12, 0.125),
        ),
        "bias + residual + LayerNorm": (
            lambda: ops.bias_residual_layer_norm(x, vector, *after, policy=policy),
            lambda: launched.bias_residual_layer_norm(x, vector, *after),
        ),
    }


def model_of(name: str) -> Any:
    """Makes a model with random weights in bfloat16, in eval mode, outside of inference mode as users do."""
    import fastbert

    of_family = name in FAMILIES
    config = fastbert.BertConfig.from_dict(FAMILIES[name]) if of_family else fastbert.BertConfig(**SIZES[name])
    with torch.inference_mode(False):
        return fastbert.BertModel(config, add_pooling_layer=False, backend="triton", strict=True).eval().to(BF16)


def batch_of(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Returns ids (T,) and offsets (B + 1,) of a batch."""
    return torch.zeros(sum(lengths), dtype=torch.int64), torch.tensor([0, *lengths]).cumsum(0).int()


def measure(driver: Any, seconds: float) -> Iterator[dict[str, Any]]:
    """Measures everything in about so many seconds."""
    each = seconds / 28

    def entry(
        workload: str, model: str, setting: str, function: Callable[[], Any], n: int | None = None
    ) -> dict[str, Any]:
        function()
        driver.launches.clear()
        function()
        n_launches = len(driver.launches)
        samples = samples_of(function, each)
        driver.launches.clear()
        calls = calls_of(function)
        return {
            "workload": workload, "model": model, "setting": setting, "samples": samples, "n": n, "calls": calls,
            "launches": n_launches,
        }  # fmt: skip

    for name, (checked, alone) in operations().items():
        yield entry(name, "BERT-base", "operation", checked)
        yield entry(name, "BERT-base", "kernel alone", alone)
    for name in SIZES:
        model = model_of(name)
        yield from _plain(model, name, entry)
        yield from _replayed(model, name, each)
    for name in FAMILIES:
        yield _layer(model_of(name), name, entry)


def _layer(model: Any, name: str, entry: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """Measures a layer on the plain path, with 128 tokens in one text."""
    from fastbert.ops import packing
    from fastbert.ops.angles import rotations_of

    ids, offsets = batch_of([128])
    batch = packing.from_cu_seqlens(offsets, 128, torch.device("cpu"))
    rotations_of(batch).renew(batch.position_ids)
    x = torch.empty(128, model.config.hidden_size, dtype=BF16)
    layers = model.engine.modules.launched
    model.forward_packed(ids, offsets)
    n_layers = model.config.num_hidden_layers
    return entry("1x128", name, "layer, plain path", lambda: layers.run(model, x, batch, False), n_layers)


def _plain(model: Any, name: str, entry: Callable[..., dict[str, Any]]) -> Iterator[dict[str, Any]]:
    yield _layer(model, name, entry)
    for lengths in ("1x128", "32x128"):
        arguments = batch_of(LENGTHS[lengths])
        yield entry(lengths, name, "forward, plain path", lambda arguments=arguments: model.forward_packed(*arguments))


def _replayed(model: Any, name: str, seconds: float) -> Iterator[dict[str, Any]]:
    """Measures a replayed graph: the time until it is launched, and the whole time."""
    from fastbert.engine import capture

    capturer, without = StandIn(), capture.capturer
    capture.capturer = lambda device: capturer  # type: ignore[assignment, return-value]
    rng = random.Random(0)
    for lengths in [*LENGTHS, *NEW_LENGTHS]:
        batches: Iterator[tuple[Tensor, Tensor]]
        if lengths in LENGTHS:
            batches = itertools.repeat(batch_of(LENGTHS[lengths]))
            n_warm = 3
        else:
            n_texts, least, most = NEW_LENGTHS[lengths]
            batches = (batch_of([rng.randint(least, most) for _ in range(n_texts)]) for _ in itertools.count())
            n_warm = 200  # of which most buckets have a graph
        for arguments in itertools.islice(batches, n_warm):
            model.forward_packed(*arguments)
        before, whole = [], []
        until = clock() + 2 * seconds
        while len(whole) < 10 * SAMPLES or (clock() < until and len(whole) < 10_000):
            arguments = next(batches)
            Replay.launched = 0.0
            started = clock()
            model.forward_packed(*arguments)
            ended = clock()
            if Replay.launched:
                before.append(Replay.launched - started)
                whole.append(ended - started)
            elif lengths in LENGTHS:
                raise RuntimeError(f"{name} {lengths}: no graph was replayed")
        arguments = iter([next(batches), next(batches)])
        calls = calls_of(lambda arguments=arguments: model.forward_packed(*next(arguments)))
        for setting, values in (("replay, before the launch", before), ("replay, in all", whole)):
            groups = [values[i::SAMPLES] for i in range(SAMPLES)]
            yield {
                "workload": lengths, "model": name, "setting": setting, "n": None, "launches": 1,
                "samples": [statistics.median(group) for group in groups],
                "calls": calls if setting.endswith("all") else None,
            }  # fmt: skip
    capture.capturer = without


@torch.inference_mode()
def main(seconds: float) -> None:
    torch.set_num_threads(1)
    driver = stand_for_a_gpu()
    print(json.dumps(list(measure(driver, seconds))))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing, beside compiling (default: 20)")
    main(parser.parse_args().seconds)
