"""An operation makes few Python calls on its way to a launch, on a driver that launches nothing."""

from __future__ import annotations

import pytest

from process_cases import run_beside_tests as run

COUNT = """
import collections, importlib.util, json, sys, torch, stub_driver

stub_driver.install()
from fastbert import ops
from fastbert.ops import packing

policy, bf16 = ops.Policy("triton", strict=True), torch.bfloat16
x, w = torch.empty(128, 768, dtype=bf16), torch.empty(768, dtype=bf16)
up, bias = torch.empty(3072, 768, dtype=bf16), torch.empty(3072, dtype=bf16)
qkv, batch = torch.empty(128, 2304, dtype=bf16), packing.from_lengths([64, 64], torch.device("cpu"))
calls = {
    "layer_norm": lambda: ops.bias_residual_layer_norm(x, w, x, w, w, 1e-12, policy=policy),
    "linear": lambda: ops.linear(x, up, bias, "gelu", policy=policy),
    "attention": lambda: ops.varlen_attention(qkv, batch, 12, policy=policy),
    "pooling": lambda: ops.pool(x, batch.cu_seqlens, "mean", policy=policy),
}
counts = {}

def note(frame, event, argument):
    if event == "call":
        names[frame.f_code.co_name] += 1

with torch.inference_mode():
    for op, call in calls.items():
        call(), call()
        names = collections.Counter()
        sys.setprofile(note)
        try:
            call()
        finally:
            sys.setprofile(None)
        counts[op] = names.total(), names
print(json.dumps(counts))
"""


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, dict[str, int]]]:
    """The Python calls of each operation, and of what, when it is called for the third time."""
    return run(COUNT, cache=tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize(("op", "most"), [("layer_norm", 48), ("linear", 77), ("attention", 52), ("pooling", 45)])
def test_python_calls(op: str, most: int, counts: dict[str, tuple[int, dict[str, int]]]) -> None:
    """Catches something that every operation does anew on its way to the kernel, at some 0.1 to 1 us of the host."""
    total, names = counts[op]
    assert total <= most, names


def test_nothing_is_looked_up_again(counts: dict[str, tuple[int, dict[str, int]]]) -> None:
    """Catches a search for an installed package, the checks of a descriptor or of constants, at every call."""
    for op, (_, names) in counts.items():
        assert not names.keys() & {"find_spec", "from_tensor", "__ne__"}, op
