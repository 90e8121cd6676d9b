"""Tables of block sizes are refused where an entry would run a kernel that is wrong, and say which."""

from __future__ import annotations

import json

import pytest

from fastbert_kernels import tables

TILE = {"BLOCK_ROWS": 64, "BLOCK_COLS": 64, "BLOCK_K": 64, "GROUP_ROWS": 8, "num_warps": 4, "num_stages": 3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"linear_persistent": {"float16": {**TILE, "WARP_SPECIALIZE": 1}}}, "descriptors from the host"),
        ({"quantized_linear_persistent": {"int8": {**TILE, "WARP_SPECIALIZE": 0}}}, "descriptors from the host"),
        ({"linear_specialized": {"float16": {**TILE, "num_warps": 8}}}, "expected num_warps = 4"),
        ({"quantized_linear_specialized": {"int8": {**TILE, "num_warps": 8}}}, "expected num_warps = 4"),
        ({"quantized_gated_linear": {"int8/32x32": TILE}}, "expected BLOCK_COLS = 128"),
        ({"quantized_gated_gemm": {"int8/32x32": {"kernel": "quantized_linear"}}}, "expected kernel of"),
        ({"few_rows": {"float16/32x32/gelu/64": {"kernel": "linear_persistent", **TILE}}}, "expected kernel of"),
        ({"few_rows": {"float16/32x32/residual/64": {"kernel": "split_linear", **TILE}}}, "lacks SPLITS"),
        ({"few_rows": {"float16/32x32/gelu/64": {"kernel": "linear", "BLOCK_ROWS": 64}}}, "lacks BLOCK_COLS"),
        ({"dependent_launch": 1}, "expected true or false"),
    ],
)
def test_refused(changes, message, tmp_path):
    """Catches an entry that would run specialised warps with descriptors of the host, or a tile without a size."""
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"version": 1, "arch": 90, "device": None, **changes}))
    with pytest.raises(ValueError, match=message) as raised:
        tables.read_table(path)
    assert str(path) in str(raised.value)


def test_accepted(tmp_path):
    """Catches a table of all that `fastbert tune` may write that is refused."""
    path = tmp_path / "table.json"
    split = {"kernel": "split_linear", "SPLITS": 4, **TILE}
    table = {
        "linear_persistent": {"float16/none": {**TILE, "FLATTEN": 0, "PROGRAMS": 2}},
        "linear_specialized": {"float16/32x32/gelu": TILE},
        "few_rows": {"float16/32x32/residual/64": split, "float16/32x32/residual/128": {"kernel": "cublas"}},
        "dependent_launch": True,
    }
    path.write_text(json.dumps({"version": 1, "arch": 90, "device": None, **table}))
    assert tables.read_table(path)["few_rows"]["float16/32x32/residual/64"] == split
