"""Weights are written in Hugging Face layout, and an interrupted save leaves no mixture."""

from __future__ import annotations

import itertools
import os
import stat
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from safetensors import safe_open

from checkpoint_cases import TINY, assert_same, files
from fastbert.checkpoint.files import read_json
from fastbert.checkpoint.weights import read_state_dict, write_state_dict


def test_write_read_round_trip(tmp_path, state):
    """Catches a tensor that does not come back, a file without PyTorch's mark, or a folder that is not made."""
    folder = tmp_path / "a/b"
    write_state_dict(state, folder)
    assert files(folder) == ["model.safetensors"]
    assert_same(read_state_dict(folder), state)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((folder / "model.safetensors").stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("max_shard_size", [1, 100, 200, 284, 285, 10**6])
def test_write_shards(tmp_path, state, max_shard_size):
    """Catches a shard above the size with more than one tensor, or a tensor that is stored twice or not at all."""
    total = sum(tensor.nbytes for tensor in state.values())
    write_state_dict(state, tmp_path, max_shard_size=max_shard_size)
    assert_same(read_state_dict(tmp_path), state)
    assert (files(tmp_path) == ["model.safetensors"]) == (total <= max_shard_size)
    if total > max_shard_size:
        index = read_json(tmp_path / "model.safetensors.index.json")
        assert index["metadata"]["total_size"] == total
        assert index["weight_map"].keys() == state.keys()
        shards = sorted(set(index["weight_map"].values()))
        assert shards == [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        assert files(tmp_path) == sorted([*shards, "model.safetensors.index.json"])
        sizes = [[state[name].nbytes for name in state if index["weight_map"][name] == shard] for shard in shards]
        assert all(len(size) == 1 or sum(size) <= max_shard_size for size in sizes)
        # No shard stops before the next tensor would overfill it.
        assert all(sum(size) + following[0] > max_shard_size for size, following in itertools.pairwise(sizes))


@pytest.mark.parametrize("max_shard_size", [5 * 2**30, 20_000])
def test_transformers_reads_what_we_write(tmp_path, mlm, max_shard_size):
    """Catches a tensor that transformers does not find under its own name."""
    state = mlm.state_dict()
    del state["cls.predictions.decoder.weight"], state["cls.predictions.decoder.bias"]
    write_state_dict(state, tmp_path, max_shard_size=max_shard_size)
    TINY.save_pretrained(tmp_path)
    theirs, info = transformers.BertForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert_same({k: v.detach() for k, v in theirs.state_dict().items()}, mlm.state_dict())


def test_write_tensors_that_share_or_stride(tmp_path):
    """Catches slices, a transpose, an expanded row or one tensor under two names that are not written whole."""
    fused = torch.arange(24.0).reshape(6, 4)
    state = {
        "q": fused[:2],
        "k": fused[2:4],
        "transposed": fused.T,
        "expanded": torch.ones(1, 4).expand(3, 4),
        "parameter": torch.nn.Parameter(fused),
        "twice": fused,
        "scalar": torch.tensor(3.0),
    }
    write_state_dict(state, tmp_path)
    assert_same(read_state_dict(tmp_path), {name: tensor.detach() for name, tensor in state.items()})
    assert (tmp_path / "model.safetensors").stat().st_size < 4 * sum(t.numel() for t in state.values()) + 1000


def test_save_over_the_files_that_were_read(tmp_path, state):
    """Catches tensors mapped from the very file that is replaced and that do not survive the save."""
    write_state_dict(state, tmp_path)
    read = read_state_dict(tmp_path)
    write_state_dict(read, tmp_path)
    write_state_dict(read, tmp_path, max_shard_size=100)
    assert_same(read_state_dict(tmp_path), state)
    assert_same(read, state)


def test_stale_files_are_removed(tmp_path, state):
    """Catches files of an earlier save that are mixed with the new ones, or files of others that are removed."""
    others = ["pytorch_model.bin", "model.onnx", "adapter_model.safetensors", "model-final.safetensors", "config.json"]
    for name in others:
        (tmp_path / name).touch()
    new = {name: tensor + 1 for name, tensor in state.items()}
    write_state_dict(state, tmp_path, max_shard_size=1)
    for max_shard_size in (100, 10**6, 1, 100):
        write_state_dict(new, tmp_path, max_shard_size=max_shard_size)
        assert_same(read_state_dict(tmp_path), new)
        fresh = tmp_path / f"fresh{max_shard_size}"
        write_state_dict(new, fresh, max_shard_size=max_shard_size)
        assert [name for name in files(tmp_path) if not name.startswith("fresh")] == sorted(files(fresh) + others)


@pytest.mark.parametrize("max_shard_size", [100, 10**6])
def test_interrupted_while_writing(tmp_path, state, monkeypatch, max_shard_size):
    """Catches a save that breaks off while writing and leaves something else than the old checkpoint."""
    write_state_dict(state, tmp_path, max_shard_size=max_shard_size)
    before = files(tmp_path)
    save_file = safetensors.torch.save_file
    calls = []

    def interrupted(tensors, path, metadata):
        calls.append(path)
        save_file(tensors, path, metadata)
        if len(calls) == len([name for name in before if name.endswith(".safetensors")]):
            os.truncate(path, 10)
            raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_state_dict({name: tensor + 1 for name, tensor in state.items()}, tmp_path, max_shard_size=max_shard_size)
    assert calls and files(tmp_path) == before
    assert_same(read_state_dict(tmp_path), state)


def test_interrupted_while_renaming(tmp_path, state, monkeypatch):
    """Catches a mixture of old and new shards that a reader finds between two renames."""
    new = {name: tensor + 1 for name, tensor in state.items()}
    count = len(set(_weight_files(tmp_path / "probe", state)))
    for old_size, new_size in ((100, 100), (100, 10**6), (10**6, 100), (1, 100)):
        for stop_at in range(count + 1):
            folder = tmp_path / f"{old_size}-{new_size}-{stop_at}"
            write_state_dict(state, folder, max_shard_size=old_size)
            replaced = []

            def replace(source, target, stop_at=stop_at, replaced=replaced, replace=os.replace):
                if len(replaced) == stop_at:
                    raise KeyboardInterrupt
                replaced.append(target)
                replace(source, target)

            with monkeypatch.context() as patch:
                patch.setattr(os, "replace", replace)
                try:
                    write_state_dict(new, folder, max_shard_size=new_size)
                except KeyboardInterrupt:
                    assert not [name for name in files(folder) if name.endswith(".tmp")]
            try:
                read = read_state_dict(folder)
            except FileNotFoundError:
                continue
            assert any(all(torch.equal(read[name], whole[name]) for name in state) for whole in (state, new))


def _weight_files(folder: Path, state) -> list[str]:
    write_state_dict(state, folder, max_shard_size=100)
    return files(folder)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, r"state\['x'\]: got <class 'int'>, expected a dense tensor"),
        (torch.empty(2, device="meta"), r"state\['x'\]: got torch.strided tensor on meta, expected a dense tensor"),
        (torch.eye(2).to_sparse(), r"state\['x'\]: got torch.sparse_coo tensor on cpu, expected a dense tensor"),
    ],
)
def test_write_refuses_what_has_no_data(tmp_path, value, message):
    """Catches a meta tensor or a number that is not named before a file is touched."""
    with pytest.raises(TypeError, match=message):
        write_state_dict({"a": torch.zeros(1), "x": value}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_write_refuses_nonsense(tmp_path):
    """Catches an empty state that deletes the old weights, or a shard size of zero."""
    with pytest.raises(ValueError, match="state: got no tensors"):
        write_state_dict({}, tmp_path)
    with pytest.raises(ValueError, match="max_shard_size: got 0, expected a positive number of bytes"):
        write_state_dict({"a": torch.zeros(1)}, tmp_path, max_shard_size=0)
