"""Launches take block sizes from tables, can be recorded, and run on the device of their tensors."""

from __future__ import annotations

import json

import pytest
import torch

from fastbert_kernels import configs, launch, tables

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("arch", sorted(launch.SHARED_MEMORY))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_table_answers(arch, dtype):
    """Catches a table that lacks a head size or a dtype, found out while serving."""
    assert f"sm_{arch}.json" in configs.linear_config(dtype, arch).source
    for head_size in range(configs.MIN_HEAD_SIZE, configs.MAX_HEAD_SIZE + 1):
        sizes = configs.attention_config(dtype, head_size, arch).block_sizes
        assert head_size <= sizes["BLOCK_D"] < 2 * max(head_size, 16)
        assert all(sizes[name] & (sizes[name] - 1) == 0 for name in ("BLOCK_Q", "BLOCK_K", "BLOCK_D", "num_warps"))


def test_tables_say_where_they_come_from():
    """Catches a table that passes a guess off as a measurement."""
    for path in tables.TABLE_FOLDER.glob("*.json"):
        table = tables.read_table(path)
        assert table["arch"] == int(path.stem.removeprefix("sm_"))
        assert (table["device"] is None) == (table["date"] is None)
        assert table["device"] is not None or "not timed" in table["source"]


def test_nearest_table():
    """Catches a GPU without a table of its own that gets one of a newer architecture, or an error that names none."""
    assert "sm_90.json" in configs.linear_config(torch.float16, 90).source
    assert "sm_100.json" in configs.linear_config(torch.float16, 103).source
    assert "sm_120.json" in configs.linear_config(torch.float16, 121).source
    with pytest.raises(ValueError, match="no table of block sizes for compute capability 7.5"):
        configs.linear_config(torch.float16, 75)


@pytest.mark.parametrize("content", ["{", "[]", '{"version": 99}', ""])
def test_bad_table(content, tmp_path):
    """Catches a table of another version, or one that does not parse, read by half."""
    path = tmp_path / "sm_90.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="sm_90.json: "):
        tables.read_table(path)


def test_measured_table_names_device_and_date(tmp_path, monkeypatch, request):
    """Catches a report that does not say on what the block sizes were measured."""
    sizes = {"BLOCK_ROWS": 64, "BLOCK_COLS": 64, "BLOCK_K": 32, "GROUP_ROWS": 8, "num_warps": 4, "num_stages": 3}
    table = {
        "version": 1,
        "arch": 90,
        "device": "H100",
        "date": "2026-01-02",
        "source": "",
        "linear": {"float16": sizes},
    }
    (tmp_path / "sm_90.json").write_text(json.dumps(table))
    monkeypatch.setattr(tables, "TABLE_FOLDER", tmp_path)
    monkeypatch.setattr(tables, "gpus", list)
    request.addfinalizer(tables.forget)
    tables.forget()
    config = configs.linear_config(torch.bfloat16, 90)
    assert config.block_sizes == sizes and config.source == "tuned/sm_90.json (measured on H100, 2026-01-02)"
    with pytest.raises(ValueError, match="sm_90.json: no entry 'attention' -> 'float16/64'"):
        configs.attention_config(torch.bfloat16, 64, 90)


@pytest.mark.parametrize("n_cols", [1, 7, 96, 384, 768, 1024, 3000, 4096])
def test_row_formulas(n_cols):
    """Catches a tile that does not hold a whole row, or has more threads than elements to give them."""
    for config in (configs.rowwise_config(n_cols), configs.whole_row_config(n_cols)):
        assert config["BLOCK_COLS"] >= n_cols and config.get("BLOCK_ROWS", 1) >= 1
        assert 1 <= config["num_warps"] <= 8
    config = configs.pooling_config(n_cols)
    assert config["BLOCK_COLS"] < 2 * n_cols and config["BLOCK_ROWS"] * config["BLOCK_COLS"] == 4096


def test_recording_lists_instead_of_running():
    """Catches an offline report of something else than what is launched."""
    from fastbert_kernels.gelu import bias_gelu_forward

    x = torch.randn(4, 32)
    with launch.recording(90) as launches:
        assert launch.arch(torch.device("cpu")) == 90
        bias_gelu_forward(x, None, "gelu")
        with pytest.raises(RuntimeError, match="does not nest"), launch.recording(80):
            pass
    assert len(launches) == 1 and launches[0].arguments["x_ptr"] is x and launches[0].grid == (1, 1)
    assert launch.arch(torch.device("cpu")) == launch.MIN_ARCH


def test_tokens_do_not_make_kernels(device):
    """Catches a token count in a block size or a specialisation, so that a new length compiles while serving."""
    from fastbert_kernels import attention, embedding, gelu, layer_norm, linear, work_list

    seen = []
    for n in (1, 16, 17, 4096):
        x, w = torch.empty(n, 64, device="meta"), torch.empty(64, device="meta")
        ids = torch.empty(n, dtype=torch.int64, device="meta")
        with launch.recording(90) as launches:
            layer_norm.bias_residual_layer_norm_forward(x, w, x, w, w, 1e-5)
            gelu.bias_gelu_forward(x, w, "gelu")
            linear.linear_forward(x, torch.empty(64, 64, device="meta"), w, "gelu")
            half = x.bfloat16()  # by the persistent kernel
            linear.linear_forward(half, torch.empty(64, 64, device="meta").bfloat16(), w.bfloat16(), "gelu", half)
            embedding.embedding_layer_norm_forward(ids, ids, ids, x, x, x, w, w, 1e-5)
            tiles = work_list.build_work_list([0, n], 64)
            qkv = torch.empty(n, 192, device="meta")
            attention.varlen_attention_forward(qkv, tiles, 2, 0.2)
        seen.append(
            [
                {
                    **entry.config,
                    **{k: v for k, v in entry.arguments.items() if isinstance(v, int | str | float) and k != "n_rows"},
                }
                for entry in launches
            ]
        )
    assert all(launches == seen[0] for launches in seen)


@pytest.mark.gpu
def test_device_of_the_tensors():
    """Catches a kernel that runs on the current device instead of that of its tensors."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    from fastbert_kernels.gelu import bias_gelu_forward

    x = torch.randn(64, 128, device="cuda:1")
    with torch.cuda.device(0):
        out = bias_gelu_forward(x, None, "gelu")
    assert out.device == x.device
    assert torch.allclose(out, torch.nn.functional.gelu(x), atol=1e-6)
