"""Kernels that are launched again by `direct` are those that Triton would launch, with the same arguments."""

from __future__ import annotations

from typing import Any

import pytest

from process_cases import run_beside_tests as run

COMPARE = """
import json, math, torch, stub_driver
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

stub = stub_driver.install()
calls = []
stub.load_binary = lambda name, code, *rest: ("module", (name, hash(code)), 32, 0, 1024)

def of(value):
    if isinstance(value, TensorDescriptor):
        return value.base.data_ptr(), tuple(value.shape), tuple(value.strides), tuple(value.block_shape)
    return value.data_ptr() if isinstance(value, torch.Tensor) else value

def launch(self, x, y, z, stream, function, metadata, told, enter, leave, *values):
    if enter is not None:  # as the compiled launcher does
        enter(told)
    values = [of(v) for v in values]
    calls.append(repr((x, y, z, function, metadata, values)))

stub.launcher_cls.__call__ = launch
from fastbert_kernels import attention, attention_bias, attention_window, configs, direct, disentangled, gated
from fastbert_kernels import gated_linear, gated_linear_persistent, launch as launching, layer_norm, linear
from fastbert_kernels import linear_persistent, rotary, sum_norm, work_list
from fastbert_kernels.disentangled_tiles import Distances

bf16, memory = torch.bfloat16, torch.zeros(1 << 20, dtype=torch.bfloat16)

def rows(n, k, offset=0, stride=None):
    return memory[offset:].as_strided((n, k), (stride or k, 1))

out = torch.zeros(1 << 20, dtype=torch.uint8)
launching.empty = lambda shape, like, dtype=None: out[: 2 * math.prod(shape)].view(like.dtype).view(shape)
weights = {(n, t): torch.zeros(n, dtype=t) for n in (48, 17) for t in (bf16, torch.float16)}

def norm(x, residual=None):
    weight = weights[x.shape[1], x.dtype]
    layer_norm.bias_residual_layer_norm_forward(x, None, residual, weight, weight, 1e-12)
cases = {
    "plain": lambda: norm(rows(16, 48)),
    "more rows": lambda: norm(rows(17, 48)),
    "one row": lambda: norm(rows(1, 48)),
    "odd address": lambda: norm(rows(16, 48, 1)),
    "odd stride": lambda: norm(rows(16, 48, 0, 49)),
    "stride of 1": lambda: norm(rows(16, 48, 0, 1)),
    "large stride": lambda: norm(rows(1, 48, 0, 1 << 40)),
    "residual": lambda: norm(rows(16, 48), rows(16, 48, 2048)),
    "odd residual": lambda: norm(rows(16, 48), rows(16, 48, 2049)),
    "float16": lambda: norm(rows(16, 48).view(torch.float16)),
    "other columns": lambda: norm(rows(16, 17)),
}
kernel = layer_norm._bias_residual_layer_norm_kernel
ours = kernel.direct

def attend(n_rows, n_heads, head_size, scale=0.25, offset=0):
    block_q = configs.attention_config(bf16, head_size, 90).block_sizes["BLOCK_Q"]
    tiles = lists.setdefault((n_rows, block_q), work_list.build_work_list([0, n_rows], block_q))
    attention.varlen_attention_forward(rows(n_rows, 3 * n_heads * head_size, offset), tiles, n_heads, scale)

def multiply(n_rows, n_cols, k_size, activation="gelu", residual=False, by_rows=False, offset=0):
    added = rows(n_rows, n_cols, 4096) if residual else None
    weight, bias = rows(n_cols, k_size, 8192 + offset), None if residual else rows(1, n_cols)[0]
    linear.linear_forward(rows(n_rows, k_size, 1 << 19), weight, bias, activation, added, by_rows=by_rows)

def multiply_and_gate(n_rows, n_cols, k_size, by_rows=False, offset=0):
    weight, bias = rows(2 * n_cols, k_size, 8192 + offset), rows(1, 2 * n_cols)[0]
    gated_linear.gated_linear_forward(rows(n_rows, k_size, 1 << 19), weight, bias, "gelu", by_rows)

def add_norm(n_rows, n_cols, keep=True, eps=1e-5, offset=0):
    vector = rows(1, n_cols)[0]
    sum_norm.sum_norm_forward(rows(n_rows, n_cols, 512 + offset), rows(n_rows, n_cols), vector, vector, eps, keep)

angles, lists = torch.zeros(64, 8), {}
def attend_with(n_rows, bias=0, columns=False, window=None):
    block_q = configs.attention_config(bf16, 16, 90).block_sizes["BLOCK_Q"]
    tiles = lists.setdefault((n_rows, block_q), work_list.build_work_list([0, n_rows], block_q))
    places = numbers[:n_rows] if columns else None
    bias = attention_bias.PositionBias(tables[bias], places) if bias else None
    window = None if window is None else attention_window.Window(window, reach[:n_rows] if columns else None)
    attention.varlen_attention_forward(rows(n_rows, 96), tiles, 2, 0.25, bias=bias, window=window)

def attend_apart(n_rows, low=0, columns=False, offset=0):
    tiles = lists.setdefault((n_rows, 64), work_list.build_work_list([0, n_rows], 64))
    places = numbers[:n_rows] if columns else None
    table = rows(16, 32, 4096)
    distances = Distances(table, table, numbers[:9], low, 16 - low, places)
    disentangled.disentangled_attention_forward(rows(n_rows, 96, offset), tiles, 2, 0.25, distances)

numbers, reach = torch.zeros(64, dtype=torch.int32), torch.zeros(64, 2, dtype=torch.int32)
tables = {n: torch.zeros(2, n) for n in (9, 17)}
others = [
    *((attend_with, sizes) for sizes in (
        (33, 9), (40, 9), (33, 17), (33, 9, True), (33, 0, False, 4), (40, 0, False, 4), (33, 0, False, 8),
        (33, 0, True, 4))),
    *((attend_apart, sizes) for sizes in (
        (33,), (40,), (33, 2), (33, 0, True), (33, 0, False, 8), (33, 0, False, 1))),
    *((attend, sizes) for sizes in ((33, 2, 16), (40, 2, 16), (33, 2, 16, 0.5), (33, 1, 20), (33, 2, 16, 0.25, 1))),
    *((multiply, sizes) for sizes in (
        (33, 128, 64), (700, 128, 64), (33, 64, 64), (33, 128, 64, "none", True), (33, 128, 64, "gelu", False, True),
        (60, 128, 64, "gelu", False, True), (33, 128, 64, "gelu", False, False, 1))),
    *((multiply_and_gate, sizes) for sizes in (
        (33, 64, 64), (700, 64, 64), (33, 32, 64), (33, 64, 64, True), (60, 64, 64, True), (33, 64, 64, False, 1))),
    *((add_norm, sizes) for sizes in ((9, 48), (10, 48), (9, 48, False), (9, 48, True, 1e-6), (9, 48, True, 1e-5, 1))),
    *((lambda n, place: rotary.rotary_forward(rows(n, 96), angles[:n], angles[:n], 2, place), sizes)
      for sizes in ((5, True), (6, True), (5, False))),
    *((lambda n, k, name: gated.gated_forward(rows(n, k), name), sizes)
      for sizes in ((5, 64, "gelu"), (6, 64, "gelu"), (5, 64, "gelu_tanh"), (5, 40, "gelu"))),
]
kernels = [kernel, attention._varlen_attention_kernel, linear._linear_kernel, gated._gated_kernel,
           disentangled._product_kernel, disentangled._disentangled_attention_kernel, gated_linear._gated_linear_kernel,
           gated_linear_persistent._gated_linear_persistent_kernel, linear_persistent._linear_persistent_kernel,
           rotary._rotary_kernel, sum_norm._sum_norm_kernel]
directs = [each.direct for each in kernels]

def all_cases():
    calls.clear()
    for case in cases.values():
        case()
    for function, arguments in others:
        function(*arguments)
    return list(calls)

through = [0]
run = type(kernel).run
def counting(self, *arguments, **options):
    through[0] += 1
    return run(self, *arguments, **options)
type(kernel).run = counting

for each in kernels:
    each.direct = None
expected = all_cases()
for each, before in zip(kernels, directs):
    each.direct = before
all_cases()
through[0] = 0
repeated = [0]
for each in directs:
    def counted(*arguments, repeat=each.repeat):
        answer = repeat(*arguments)
        repeated[0] += answer
        return answer
    each.repeat = counted
again = all_cases()
kernels = {known[1] for known in ours.compiled.values()}  # of LayerNorm
result = {"same": expected == again, "kernels": len(kernels), "through": through[0], "repeated": repeated[0]}

heard = []
hook = lambda metadata: heard.append(metadata.get()["name"])
knobs.runtime.launch_enter_hook.add(hook)
cases["plain"]()
result["hook"], result["through with a hook"] = len(heard), through[0]
knobs.runtime.launch_enter_hook.remove(hook)

for name, watch, end in (
    ("debug", lambda: setattr(knobs.runtime, "debug", True), lambda: setattr(knobs.runtime, "debug", False)),
    ("pre-run hook", lambda: kernel.pre_run_hooks.append(lambda *a, **k: None), kernel.pre_run_hooks.clear),
):
    through[0] = 0
    watch()
    cases["plain"]()
    end()
    result[name] = through[0]

direct.LIMIT = 3
ours.compiled.clear()
ours.repeats.clear()
sizes = []
for case in cases.values():
    case()
    sizes.append(max(len(ours.compiled), len(ours.repeats)))
result["most"] = max(sizes)
through[0] = 0
tile, configs.rowwise_config = configs.rowwise_config, lambda n: {**tile(n), "num_warps": 1}
cases["plain"]()
configs.rowwise_config = lambda n: {**tile(n), "launch_pdl": True}
cases["plain"]()
result["other options"] = through[0]
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(COMPARE, cache=tmp_path_factory.mktemp("cache"))


def test_same_kernels(result: dict[str, Any]) -> None:
    """Catches a kernel that was compiled for aligned addresses, other strides or another dtype than it is given."""
    assert result["same"] and result["kernels"] >= 6
    assert result["through"] == 0  # none of them went through Triton, so that this compared something
    assert result["repeated"] >= 44  # and most were not described again


def test_launch_hooks(result: dict[str, Any]) -> None:
    """Catches launches that a profiler does not hear of."""
    assert (result["hook"], result["through with a hook"]) == (1, 0)


@pytest.mark.parametrize("watcher", ["debug", "pre-run hook"])
def test_watchers(result: dict[str, Any], watcher: str) -> None:
    """Catches a launch that passes by what Triton would do for somebody who debugs or looks at it."""
    assert result[watcher] == 1


def test_options_and_bound(result: dict[str, Any]) -> None:
    """Catches a launch with the options of an earlier one, and kernels that are kept without end."""
    assert result["other options"] == 2 and result["most"] <= 3
