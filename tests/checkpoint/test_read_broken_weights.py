"""Weights that are missing, cut short, corrupt or malicious are refused by name."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from fastbert.checkpoint.weights import read_state_dict, write_state_dict


def test_missing_weights(tmp_path):
    """Catches a message that does not name the folder and every file that would have done."""
    with pytest.raises(FileNotFoundError) as raised:
        read_state_dict(tmp_path)
    assert str(raised.value) == (
        f"no weights in {tmp_path}: looked for model.safetensors.index.json, model.safetensors, "
        "pytorch_model.bin.index.json, pytorch_model.bin"
    )
    with pytest.raises(FileNotFoundError, match="absent is not a folder"):
        read_state_dict(tmp_path / "absent")


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999])
def test_truncated_safetensors(tmp_path, mlm, keep):
    """Catches a download that broke off and that is read as a short file, or not named."""
    mlm.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    size = path.stat().st_size
    os.truncate(path, int(size * keep) if keep < 1 else keep)
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or not a safetensors file: ") as raised:
        read_state_dict(tmp_path)
    assert str(path) in str(raised.value)


def test_corrupt_safetensors(tmp_path):
    """Catches bytes that are no safetensors file and that are not named."""
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or not a safetensors file: "):
        read_state_dict(tmp_path)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("keep", [0, 1, 0.5, 0.99])
def test_truncated_bin(tmp_path, mlm, keep, legacy):
    """Catches a truncated pickle, in either of torch's formats, that is not named."""
    path = tmp_path / "pytorch_model.bin"
    torch.save(mlm.state_dict(), path, _use_new_zipfile_serialization=not legacy)
    os.truncate(path, int(path.stat().st_size * keep) if keep < 1 else keep)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is truncated, or not a PyTorch file") as raised:
        read_state_dict(tmp_path)
    assert str(path) in str(raised.value)


class Payload:
    """An object whose unpickling would run code."""

    def __reduce__(self):
        return (os.mkdir, ("unpickled",))


def test_bin_runs_no_code(tmp_path, monkeypatch):
    """Catches a malicious pickle that is run."""
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Payload()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"a PyTorch file with only tensors \(weights_only=True\)"):
        read_state_dict(tmp_path)
    assert not Path("unpickled").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(1)], r"pytorch_model\.bin holds a list, expected a state dict"),
        ({"model": {"a": torch.zeros(1)}}, r"pytorch_model\.bin is not a state dict: 'model' holds a dict"),
        ({"a": torch.zeros(1), "step": 3}, r"pytorch_model\.bin is not a state dict: 'step' holds a int"),
        ({3: torch.zeros(1)}, r"pytorch_model\.bin is not a state dict: 3 holds a Tensor"),
    ],
)
def test_bin_that_is_no_state_dict(tmp_path, content, message):
    """Catches a training checkpoint under the name of the weights whose error does not say what it holds."""
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=message):
        read_state_dict(tmp_path)


def test_missing_shard(tmp_path, mlm):
    """Catches a missing shard that is not named together with the index that names it."""
    mlm.save_pretrained(tmp_path, max_shard_size="20KB")
    lost = sorted(tmp_path.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(FileNotFoundError, match=f"index.json names {lost.name}, not found in ") as raised:
        read_state_dict(tmp_path)
    assert str(tmp_path) in str(raised.value)


def test_truncated_shard(tmp_path, mlm):
    """Catches a broken shard whose error names the index instead."""
    mlm.save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size // 2)
    with pytest.raises(ValueError, match=f"{shard.name} is truncated"):
        read_state_dict(tmp_path)


def test_shard_that_lacks_a_tensor(tmp_path, state):
    """Catches index and shard of two different saves that pass as one checkpoint."""
    write_state_dict(state, tmp_path, max_shard_size=100)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["b.weight"] = content["weight_map"]["embeddings.word_embeddings.weight"]
    index.write_text(json.dumps(content))
    message = (
        r"model-00001-of-\d+\.safetensors lacks b\.weight \(1 such\), although model\.safetensors\.index\.json names"
    )
    with pytest.raises(ValueError, match=message):
        read_state_dict(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "index.json is not valid JSON"),
        ("[]", "index.json holds a JSON list, expected an object"),
        ("{}", "index.json: expected a non-empty object under 'weight_map'"),
        ('{"weight_map": {}}', "index.json: expected a non-empty object under 'weight_map'"),
        ('{"weight_map": {"a": 3}}', "index.json: a is placed in 3, expected the name of a file"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "a is placed in '../x.safetensors', expected the name of a file"),
        ('{"weight_map": {"a": ""}}', "index.json: a is placed in '', expected the name of a file"),
    ],
)
def test_broken_index(tmp_path, content, message):
    """Catches a broken index that is not named, or one that points outside the folder and is followed."""
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=message) as raised:
        read_state_dict(tmp_path)
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_lfs_pointer(tmp_path, name):
    """Catches a Git LFS pointer that is called corrupt instead of a pointer."""
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (tmp_path / name).write_text(pointer)
    with pytest.raises(ValueError, match=f"{name} is a Git LFS pointer, not the weights"):
        read_state_dict(tmp_path)
