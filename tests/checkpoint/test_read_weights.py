"""Weights are read from every layout that Hugging Face has had."""

from __future__ import annotations

import json
import logging

import pytest
import safetensors.torch
import torch
import transformers

from checkpoint_cases import TINY, assert_same
from fastbert.checkpoint.weights import read_state_dict, write_state_dict


def test_reads_what_transformers_saves(tmp_path, mlm):
    """Catches a name, dtype or number of transformers' checkpoint that changes, or a tied tensor that is read twice."""
    mlm.save_pretrained(tmp_path)
    stored = {k: v for k, v in mlm.state_dict().items() if not k.startswith("cls.predictions.decoder.")}
    assert_same(read_state_dict(tmp_path), stored)


def test_reads_shards_of_transformers(tmp_path, mlm):
    """Catches a shard that is not read, or a tensor that is read twice."""
    mlm.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    stored = {k: v for k, v in mlm.state_dict().items() if not k.startswith("cls.predictions.decoder.")}
    assert_same(read_state_dict(tmp_path), stored)


def test_half_precision_keeps_its_dtype(tmp_path, mlm):
    """Catches a stored dtype that reading casts, which is the model's job."""
    transformers.BertModel(TINY).to(torch.bfloat16).save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in read_state_dict(tmp_path).values()} == {torch.bfloat16}


@pytest.mark.parametrize("legacy", [False, True])
def test_old_bin(tmp_path, mlm, legacy):
    """Catches a file of 2019 that does not load: gamma, beta, stored position_ids, tied copies, torch's old format."""
    state = mlm.state_dict(keep_vars=True)
    old = {
        k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
        for k, v in state.items()
    }
    assert sum(name.endswith("LayerNorm.gamma") for name in old) == 6
    old["bert.embeddings.position_ids"] = torch.arange(40)[None]
    old["bert.embeddings.token_type_ids"] = torch.zeros(1, 40, dtype=torch.int64)
    torch.save(old, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    assert_same(read_state_dict(tmp_path), mlm.state_dict())


def test_bare_and_parallel_names(tmp_path):
    """Catches DataParallel's prefix or a buffer at the top level that is not recognised, or another name changed."""
    stored = {
        "module.embeddings.LayerNorm.gamma": torch.ones(2),
        "module.embeddings.position_ids": torch.arange(3),
        "embeddings.token_type_ids": torch.arange(3),
        "my_embeddings.position_ids": torch.arange(3),
        "head.gamma": torch.ones(1),
        "submodule.module.weight": torch.zeros(1),
    }
    safetensors.torch.save_file(stored, tmp_path / "model.safetensors")
    names = {"embeddings.LayerNorm.weight", "my_embeddings.position_ids", "head.gamma", "submodule.module.weight"}
    assert read_state_dict(tmp_path).keys() == names


def test_two_names_of_one_tensor(tmp_path):
    """Catches an old and a new name of one tensor in a file, of which one wins in silence."""
    stored = {"LayerNorm.gamma": torch.ones(2), "LayerNorm.weight": torch.zeros(2)}
    safetensors.torch.save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"model.safetensors holds both LayerNorm.* and LayerNorm.*, which are two names"
    ):
        read_state_dict(tmp_path)


def test_bin_shards(tmp_path, state):
    """Catches sharded pickles that are not read through their index."""
    names = list(state)
    parts = {"pytorch_model-00001-of-00002.bin": names[:2], "pytorch_model-00002-of-00002.bin": names[2:]}
    for file, part in parts.items():
        torch.save({name: state[name] for name in part}, tmp_path / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same(read_state_dict(tmp_path), state)
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(FileNotFoundError, match="index.json names pytorch_model-00002-of-00002.bin, not found in "):
        read_state_dict(tmp_path)


def test_order_of_formats(tmp_path):
    """Catches pickles that win over safetensors, or a single file that wins over shards of the same format."""
    torch.save({"a": torch.tensor([1.0])}, tmp_path / "pytorch_model.bin")
    assert read_state_dict(tmp_path)["a"] == 1
    torch.save({"a": torch.tensor([2.0])}, tmp_path / "shard.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "shard.bin"}}')
    assert read_state_dict(tmp_path)["a"] == 2
    safetensors.torch.save_file({"a": torch.tensor([3.0])}, tmp_path / "model.safetensors")
    assert read_state_dict(tmp_path)["a"] == 3
    safetensors.torch.save_file({"a": torch.tensor([4.0])}, tmp_path / "shard.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "shard.safetensors"}}')
    assert read_state_dict(tmp_path)["a"] == 4


def test_left_over_index(tmp_path, mlm, caplog):
    """Catches a stale index that wins over the single file that transformers saved over its shards."""
    transformers.BertModel(TINY).save_pretrained(tmp_path, max_shard_size="20KB")
    mlm.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists()
    with caplog.at_level(logging.WARNING, logger="fastbert"):
        assert "cls.predictions.bias" in read_state_dict(tmp_path)
    assert "none of its shards is there" in caplog.text


def test_writing_to_what_was_read_leaves_the_file_alone(tmp_path, state):
    """Catches in-place training on mapped tensors that reaches the file on the disk."""
    write_state_dict(state, tmp_path / "st")
    (tmp_path / "bin").mkdir()
    torch.save(state, tmp_path / "bin/pytorch_model.bin")
    for folder in (tmp_path / "st", tmp_path / "bin"):
        for tensor in read_state_dict(folder).values():
            tensor.fill_(7)
        assert_same(read_state_dict(folder), state)
