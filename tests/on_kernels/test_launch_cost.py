"""Operations and layers make few Python calls on their way to a launch, on a driver that launches nothing."""

from __future__ import annotations

import pytest

from process_cases import run_beside_tests as run

COUNT = """
import collections, json, sys, time, torch, stub_driver, host_child

driver = host_child.stand_for_a_gpu()
from fastbert import ops
from fastbert.ops import attention_plan, launched, packing
from fastbert.ops.disentangled import Positions

policy, bf16 = ops.Policy("triton", strict=True), torch.bfloat16
x, batch = torch.empty(128, 768, dtype=bf16), packing.from_lengths([64, 64], torch.device("cpu"))
calls = {"pooling": lambda: ops.pool(x, batch.cu_seqlens, "mean", policy=policy)}
for name, (checked, alone) in host_child.operations().items():
    calls[name], calls[name + ", kernel alone"] = checked, alone
qkv, table, rows = (torch.empty(*shape, dtype=bf16) for shape in ((128, 2304), (12, 65), (64, 768)))
positions, plan = Positions(rows, rows, (32, 64)), attention_plan.triton_plan(batch, bf16, 64, policy)
own = qkv, batch, plan, 12, 0.125
calls["attention with a bias, kernel alone"] = lambda: launched.varlen_attention(*own, table)
calls["attention in a window, kernel alone"] = lambda: launched.windowed_attention(*own, 16)
calls["disentangled attention, three kernels alone"] = lambda: launched.disentangled_attention(
    qkv, positions, batch, 12, 0.125, False
)
host_child.SIZES["small"] = {"num_hidden_layers": 4}
model = host_child.model_of("small")
layers = model.engine.modules.launched
ids, offsets = host_child.batch_of([64, 64])
calls["4 layers"] = lambda: layers.run(model, x, batch, False)
counts, seconds = {}, {}

def note(frame, event, argument):
    if event == "call":
        names[frame.f_code.co_name] += 1

with torch.inference_mode():
    model.forward_packed(ids, offsets)
    for op, call in calls.items():
        assert call() is not None
        call()
        names = collections.Counter()
        sys.setprofile(note)
        try:
            call()
        finally:
            sys.setprofile(None)
        counts[op] = names.total(), names
    for _ in range(30):
        started = time.thread_time()
        calls["4 layers"]()
        seconds[time.thread_time() - started] = None
print(json.dumps([counts, min(seconds) / 4]))
"""

MOST = {
    "linear + GELU": 71, "attention": 46, "bias + residual + LayerNorm": 44, "pooling": 38,
    "linear + GELU, kernel alone": 38, "attention, kernel alone": 22, "bias + residual + LayerNorm, kernel alone": 18,
    "attention with a bias, kernel alone": 24, "attention in a window, kernel alone": 24,
    "disentangled attention, three kernels alone": 60, "4 layers": 430,
}  # fmt: skip
BAR = 90e-6  # of the host, for a layer of BERT-base on a machine with nothing else to do


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, tuple[int, dict[str, int]]], float]:
    """The Python calls of each operation, and of what, when it is called for the third time; a layer's seconds."""
    counts, seconds = run(COUNT, cache=tmp_path_factory.mktemp("cache"))
    return counts, seconds


@pytest.mark.parametrize("op", MOST)
def test_python_calls(op: str, measured: tuple[dict[str, tuple[int, dict[str, int]]], float]) -> None:
    """Catches something that every operation does anew on its way to the kernel, at some 0.1 to 1 us of the host."""
    total, names = measured[0][op]
    assert total <= MOST[op], names


def test_nothing_is_looked_up_again(measured: tuple[dict[str, tuple[int, dict[str, int]]], float]) -> None:
    """Catches a search for an installed package, the checks of a descriptor or of constants, at every call."""
    for op, (_, names) in measured[0].items():
        assert not names.keys() & {"find_spec", "from_tensor", "__ne__"}, op
        if "alone" in op or "layers" in op:  # nor Triton's own way to a launch
            assert not names.keys() & {"compute_cache_key", "dynamic_func"}, op


def test_seconds_of_a_layer(measured: tuple[dict[str, tuple[int, dict[str, int]]], float]) -> None:
    """Catches a launch that takes many times as long, by whatever a count of calls does not see."""
    assert measured[1] < 6 * BAR
