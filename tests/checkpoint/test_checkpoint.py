"""Weights and small files in Hugging Face layout: found, read, renamed, written."""

from __future__ import annotations

import itertools
import json
import logging
import os
import stat
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import torch
import transformers
from safetensors import safe_open

from fastbert.checkpoint.files import read_json, write_text
from fastbert.checkpoint.folder import resolve
from fastbert.checkpoint.match import Match, match
from fastbert.checkpoint.weights import read_state_dict, write_state_dict

TINY = transformers.BertConfig(
    vocab_size=101,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=37,
    max_position_embeddings=40,
)


@pytest.fixture(scope="module")
def mlm():
    """A small BertForMaskedLM of transformers with distinct numbers in every parameter."""
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(TINY).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


@pytest.fixture
def state():
    """Six tensors of 4 dtypes, 20 to 160 bytes."""
    torch.manual_seed(0)
    return {
        "embeddings.word_embeddings.weight": torch.randn(5, 8),
        "a.bias": torch.randn(5),
        "b.weight": torch.randn(4, 4, dtype=torch.bfloat16),
        "c.weight": torch.randn(4, 4, dtype=torch.float16),
        "d.weight": torch.randn(2, 4, dtype=torch.float64),
        "e.empty": torch.empty(0, 3),
    }


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name
        assert ours[name].device.type == "cpu" and not ours[name].requires_grad, name


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def shapes(state):
    return {name: tensor.shape for name, tensor in state.items()}


# resolve


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for the hub: it hands out a folder with the files that match, and records what was asked."""
    from huggingface_hub.utils import filter_repo_objects

    class Hub:
        def __init__(self):
            self.files: list[str] = []
            self.calls: list[dict] = []
            self.folder = tmp_path / "snapshot"

        def snapshot_download(self, repo_id, **kwargs):
            self.calls.append({"repo_id": repo_id, **kwargs})
            patterns = {key: kwargs[key] for key in ("allow_patterns", "ignore_patterns")}
            for name in filter_repo_objects(self.files, **patterns):
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                (self.folder / name).touch()
            return str(self.folder)

        def downloaded(self):
            return sorted(str(p.relative_to(self.folder)) for p in self.folder.rglob("*") if p.is_file())

    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


def test_local_folder_wins_over_the_hub(tmp_path, monkeypatch, hub):
    """A folder named like a hub id must be used, whatever kind of path names it."""
    (tmp_path / "owner/model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for src in ("owner/model", "owner/model/", "./owner/model", Path("owner/model"), tmp_path / "owner/model"):
        assert resolve(src).samefile(tmp_path / "owner/model")
    for src in ("~/owner/model", Path("~/owner/model")):
        assert resolve(src).samefile(tmp_path / "owner/model")
    assert hub.calls == []


@pytest.mark.parametrize(
    "src",
    [
        "./model",
        "../model",
        "/model",
        "~/model",
        "a/b/c",
        "model/",
        "a model",
        "a\\b",
        ".",
        "x--y",
        "a..b",
        "m\n",
        "\0",
        "x.git",
        Path("model"),
        Path("owner/model"),
        "m" * 300,
    ],
)
def test_what_is_no_hub_id_stays_here(tmp_path, monkeypatch, hub, src):
    """A mistyped path must not be sent to the hub."""
    monkeypatch.chdir(tmp_path)
    if src == ".":
        assert resolve(src).samefile(tmp_path)
    else:
        with pytest.raises(FileNotFoundError, match="no such folder, and it is not a hub id") as raised:
            resolve(src)
        assert repr(str(src)) in str(raised.value)
    assert hub.calls == []


def test_a_file_is_not_a_folder(tmp_path, monkeypatch, hub):
    """The name of an existing file must not be sent to the hub."""
    monkeypatch.chdir(tmp_path)
    Path("weights").touch()
    with pytest.raises(FileNotFoundError, match="src 'weights' is a file, expected the folder"):
        resolve("weights")
    assert hub.calls == []


def test_bad_src():
    """An empty string means the current folder to pathlib and must not mean it here."""
    with pytest.raises(ValueError, match="src: got an empty string"):
        resolve("")
    with pytest.raises(TypeError, match="src: got NoneType, expected a folder"):
        resolve(None)


@pytest.mark.parametrize("src", ["bert-base-uncased", "google-bert/bert-base-uncased", "a/b.c_d-1", "x"])
def test_hub_id(hub, src):
    """A hub id must be passed on as it is, with its revision."""
    hub.files = ["config.json", "model.safetensors"]
    assert resolve(src, revision="v2") == hub.folder
    assert [(call["repo_id"], call["revision"]) for call in hub.calls] == [(src, "v2")]


def test_bin_is_not_downloaded_beside_safetensors(hub):
    """Weights in formats that nothing reads would double the download."""
    hub.files = [
        "config.json",
        "vocab.txt",
        "1_Pooling/config.json",
        "2_Dense/model.safetensors",
        "model.safetensors",
        "3_Dense/pytorch_model.bin",
        "pytorch_model.bin",
        "tf_model.h5",
        "onnx/config.json",
        "README.md",
        "checkpoint-5/model.safetensors",
    ]
    resolve("owner/model")
    assert hub.downloaded() == [
        "1_Pooling/config.json",
        "2_Dense/model.safetensors",
        "3_Dense/pytorch_model.bin",
        "config.json",
        "model.safetensors",
        "vocab.txt",
    ]


@pytest.mark.parametrize(
    "weights",
    [
        ["pytorch_model.bin"],
        ["pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"],
        ["0_Transformer/pytorch_model.bin"],
        ["2_Dense/model.safetensors", "pytorch_model.bin"],
    ],
)
def test_bin_is_downloaded_where_there_is_no_safetensors(hub, weights):
    """An old repository must load too."""
    hub.files = ["config.json", "flax_model.msgpack", "training_args.bin", *weights]
    resolve("owner/model")
    assert hub.downloaded() == sorted(["config.json", *weights])


def test_sharded_safetensors_need_no_bin(hub):
    """The index, not only the single file, shows that the repository has safetensors."""
    hub.files = ["model.safetensors.index.json", "model-00001-of-00001.safetensors", "pytorch_model.bin"]
    resolve("owner/model")
    assert "pytorch_model.bin" not in hub.downloaded()


def test_no_weights_asked_for(hub):
    """Reading a tokenizer or a config must not fetch weights."""
    hub.files = ["config.json", "vocab.txt", "model.safetensors", "pytorch_model.bin"]
    resolve("owner/model", weights=False)
    assert hub.downloaded() == ["config.json", "vocab.txt"]


def test_hub_error_is_chained(monkeypatch, tmp_path):
    """Neither folder nor repository: the message says what was tried and the hub's own error is kept."""

    class RepositoryGone(Exception):
        pass

    def snapshot_download(*args, **kwargs):
        raise RepositoryGone("404 no such repository\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as raised:
        resolve("owner/model", revision="v9")
    assert str(raised.value) == (
        f"src 'owner/model': no folder of that name in {tmp_path}, and no download from the Hugging Face hub at "
        "revision 'v9': RepositoryGone: 404 no such repository"
    )
    assert isinstance(raised.value.__cause__, RepositoryGone)


def test_revision_of_a_local_folder_is_refused(tmp_path):
    """A revision that nothing looks at would load other weights than asked for."""
    with pytest.raises(ValueError, match="revision: got 'v1', but src .* is a local folder"):
        resolve(tmp_path, revision="v1")


def test_offline_in_a_fresh_process(tmp_path):
    """With HF_HUB_OFFLINE=1 the hub's cache is read and a miss is an error; the hub's client is not imported before."""
    repo = tmp_path / "hub/models--owner--model"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model.safetensors").touch()
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text("0" * 40)
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "from fastbert.checkpoint.folder import resolve\n"
        "import fastbert.checkpoint.config\n"
        "lazy = {'transformers', 'huggingface_hub', 'triton', 'safetensors', 'tokenizers', 'tqdm'}\n"
        "print(sorted((set(sys.modules) - before) & lazy))\n"
        "print(resolve('owner/model'))\n"
        "try: resolve('owner/absent')\n"
        "except FileNotFoundError as error: print(error)\n"
    )
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    env.pop("HF_HUB_CACHE", None)
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    imported, found, error = run.stdout.splitlines()
    assert imported == "[]"
    assert Path(found) == snapshot
    assert error.startswith("src 'owner/absent': no folder of that name in ")
    assert "LocalEntryNotFoundError" in error


# read_state_dict


def test_reads_what_transformers_saves(tmp_path, mlm):
    """Names, dtypes and numbers of a checkpoint of transformers; tied tensors are stored once."""
    mlm.save_pretrained(tmp_path)
    stored = {k: v for k, v in mlm.state_dict().items() if not k.startswith("cls.predictions.decoder.")}
    assert_same(read_state_dict(tmp_path), stored)


def test_reads_shards_of_transformers(tmp_path, mlm):
    """Every shard must be read, each tensor once."""
    mlm.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    stored = {k: v for k, v in mlm.state_dict().items() if not k.startswith("cls.predictions.decoder.")}
    assert_same(read_state_dict(tmp_path), stored)


def test_half_precision_keeps_its_dtype(tmp_path, mlm):
    """Casting is the model's job: the stored dtype must come through."""
    transformers.BertModel(TINY).to(torch.bfloat16).save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in read_state_dict(tmp_path).values()} == {torch.bfloat16}


@pytest.mark.parametrize("legacy", [False, True])
def test_old_bin(tmp_path, mlm, legacy):
    """gamma / beta, stored position_ids, parameters, tied copies and torch's old file format, as in 2019."""
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
    """The prefix of DataParallel and buffers at the top level must be recognised; other names are left as they are."""
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
    """Old and new name of a tensor in one file: neither may win in silence."""
    stored = {"LayerNorm.gamma": torch.ones(2), "LayerNorm.weight": torch.zeros(2)}
    safetensors.torch.save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors holds both LayerNorm.* and LayerNorm.*, two names of one"):
        read_state_dict(tmp_path)


def test_bin_shards(tmp_path, state):
    """Sharded pickles are read through their index."""
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
    """Safetensors come before pickles, and a sharded checkpoint before a single file of the same format."""
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
    """Saving one file over shards, transformers leaves the index behind: the single file is the right one."""
    transformers.BertModel(TINY).save_pretrained(tmp_path, max_shard_size="20KB")
    mlm.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists()
    with caplog.at_level(logging.WARNING, logger="fastbert"):
        assert "cls.predictions.bias" in read_state_dict(tmp_path)
    assert "none of its shards is there" in caplog.text


def test_writing_to_what_was_read_leaves_the_file_alone(tmp_path, state):
    """Files are mapped: in-place training on the tensors must not reach the disk."""
    write_state_dict(state, tmp_path / "st")
    (tmp_path / "bin").mkdir()
    torch.save(state, tmp_path / "bin/pytorch_model.bin")
    for folder in (tmp_path / "st", tmp_path / "bin"):
        for tensor in read_state_dict(folder).values():
            tensor.fill_(7)
        assert_same(read_state_dict(folder), state)


def test_missing_weights(tmp_path):
    """The message names the folder and every file that would have done."""
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
    """A download that broke off must be named, wherever it was cut, not read as a short file."""
    mlm.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    size = path.stat().st_size
    os.truncate(path, int(size * keep) if keep < 1 else keep)
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or not a safetensors file: ") as raised:
        read_state_dict(tmp_path)
    assert str(path) in str(raised.value)


def test_corrupt_safetensors(tmp_path):
    """Bytes that are no safetensors file must be named."""
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or not a safetensors file: "):
        read_state_dict(tmp_path)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("keep", [0, 1, 0.5, 0.99])
def test_truncated_bin(tmp_path, mlm, keep, legacy):
    """The same for pickles in both of torch's formats."""
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
    """A malicious pickle must be refused, not run."""
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Payload()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"holds tensors alone \(weights_only=True\)"):
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
    """A training checkpoint under the name of the weights must say what it holds."""
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=message):
        read_state_dict(tmp_path)


def test_missing_shard(tmp_path, mlm):
    """Every shard that is not there must be named, with the index that names it."""
    mlm.save_pretrained(tmp_path, max_shard_size="20KB")
    lost = sorted(tmp_path.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(FileNotFoundError, match=f"index.json names {lost.name}, not found in ") as raised:
        read_state_dict(tmp_path)
    assert str(tmp_path) in str(raised.value)


def test_truncated_shard(tmp_path, mlm):
    """The shard at fault must be named, not the index."""
    mlm.save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size // 2)
    with pytest.raises(ValueError, match=f"{shard.name} is truncated"):
        read_state_dict(tmp_path)


def test_shard_that_lacks_a_tensor(tmp_path, state):
    """Index and shard of two different saves must not pass as one checkpoint."""
    write_state_dict(state, tmp_path, max_shard_size=100)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["b.weight"] = content["weight_map"]["embeddings.word_embeddings.weight"]
    index.write_text(json.dumps(content))
    message = (
        r"model-00001-of-\d+\.safetensors lacks b\.weight \(1 such\), which model\.safetensors\.index\.json places"
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
    """A broken index must be named; one that points outside the folder must not be followed."""
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=message) as raised:
        read_state_dict(tmp_path)
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_lfs_pointer(tmp_path, name):
    """A repository cloned without Git LFS holds pointers, which deserve a better message than 'corrupt'."""
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (tmp_path / name).write_text(pointer)
    with pytest.raises(ValueError, match=f"{name} is a Git LFS pointer, not the weights"):
        read_state_dict(tmp_path)


# match


def test_match_exact(mlm):
    """Equal names in, equal names out, in the model's order, whatever the order of the file."""
    state = mlm.state_dict()
    shuffled = dict(reversed(list(state.items())))
    result = match(shuffled, shapes(state))
    assert isinstance(result, Match)
    assert list(result.state) == list(state)
    assert all(result.state[name] is state[name] for name in state)
    assert result.missing == result.unexpected == []


def test_match_prefix_both_ways(mlm):
    """A head's checkpoint into the bare model, the bare model's checkpoint into a head."""
    head = mlm.state_dict()
    base = mlm.bert.state_dict()
    into_base = match(head, shapes(base))
    assert list(into_base.state) == list(base) and into_base.missing == []
    assert into_base.unexpected == [name for name in head if name.startswith("cls.")]
    into_head = match(base, shapes(head))
    assert list(into_head.state) == ["bert." + name for name in base]
    assert into_head.missing == [name for name in head if name.startswith("cls.")]
    assert into_head.unexpected == []


def test_match_other_prefix():
    """The prefix is an argument, and only a whole prefix counts."""
    state = {"base.a": torch.zeros(1), "baseb": torch.zeros(1)}
    result = match(state, {"a": torch.Size([1]), "b": torch.Size([1])}, base_prefix="base.")
    assert list(result.state) == ["a"] and result.missing == ["b"] and result.unexpected == ["baseb"]


def test_match_exact_name_wins_over_prefix():
    """A checkpoint with both forms of a name: the exact one is taken, the other one reported."""
    state = {"bert.a": torch.zeros(1), "a": torch.ones(1)}
    result = match(state, {"a": torch.Size([1])})
    assert result.state["a"] is state["a"] and result.unexpected == ["bert.a"]


def test_match_missing_pooler_is_named(mlm):
    """A missing pooler must be reported by the model's names."""
    expected = shapes(transformers.BertModel(TINY).state_dict())
    assert match(mlm.state_dict(), expected).missing == ["pooler.dense.weight", "pooler.dense.bias"]


@pytest.mark.parametrize(
    ("stored", "lacking"),
    [
        ("cls.predictions.bias", "cls.predictions.decoder.bias"),
        ("cls.predictions.decoder.bias", "cls.predictions.bias"),
    ],
)
def test_match_bias_twins(mlm, stored, lacking):
    """Checkpoints store one of the decoder's two bias names; a model may expect one or both."""
    state = mlm.state_dict()
    del state[lacking]
    result = match(state, shapes(mlm.state_dict()))
    assert result.missing == [] and result.unexpected == []
    assert result.state[lacking] is state[stored]

    wants_one = shapes(mlm.state_dict())
    del wants_one[stored]
    result = match(state, wants_one)
    assert result.missing == [] and result.unexpected == []
    assert result.state[lacking] is state[stored]

    both = match(mlm.state_dict(), wants_one)
    assert both.missing == [] and both.unexpected == []


def test_match_bias_twins_that_differ():
    """Two different biases cannot be one parameter: the one without a place is reported."""
    state = {"cls.predictions.bias": torch.zeros(2), "cls.predictions.decoder.bias": torch.ones(2)}
    result = match(state, {"cls.predictions.bias": torch.Size([2])})
    assert result.unexpected == ["cls.predictions.decoder.bias"]
    result = match(state, shapes(state))
    assert result.state == state and result.unexpected == []


def test_match_leaves_the_decoder_weight_to_the_model(mlm):
    """Tying is decided by the config, which match does not see."""
    state = mlm.state_dict()
    del state["cls.predictions.decoder.weight"]
    assert match(state, shapes(mlm.state_dict())).missing == ["cls.predictions.decoder.weight"]


def test_match_does_not_fill_from_a_base_checkpoint(mlm):
    """A checkpoint without a head has no bias to fill from."""
    assert "cls.predictions.bias" in match(mlm.bert.state_dict(), shapes(mlm.state_dict())).missing


def test_match_lists_every_shape(mlm):
    """All mismatches in one message, by the model's names, with the setting that explains them."""
    config = transformers.BertConfig.from_dict({**TINY.to_dict(), "vocab_size": 7})
    with pytest.raises(ValueError) as raised:
        match(mlm.state_dict(), shapes(transformers.BertForMaskedLM(config).state_dict()))
    assert str(raised.value) == (
        "4 tensor(s) of the checkpoint do not have the shape that the model expects:\n"
        "  bert.embeddings.word_embeddings.weight: came (101, 32), expected (7, 32)\n"
        "  cls.predictions.bias: came (101,), expected (7,)\n"
        "  cls.predictions.decoder.weight: came (101, 32), expected (7, 32)\n"
        "  cls.predictions.decoder.bias: came (101,), expected (7,)\n"
        "vocab_size: the checkpoint has 101, the model 7"
    )


@pytest.mark.parametrize(
    ("setting", "value", "hint"),
    [
        ("num_labels", 5, "num_labels: the checkpoint has 2, the model 5"),
        ("max_position_embeddings", 24, "max_position_embeddings: the checkpoint has 40, the model 24"),
        ("type_vocab_size", 1, "type_vocab_size: the checkpoint has 2, the model 1"),
    ],
)
def test_match_hints(setting, value, hint):
    """The setting that explains a mismatch must be named."""
    came = transformers.BertForSequenceClassification(TINY).state_dict()
    config = transformers.BertConfig.from_dict(TINY.to_dict())
    setattr(config, setting, value)
    expected = shapes(transformers.BertForSequenceClassification(config).state_dict())
    with pytest.raises(ValueError, match="do not have the shape") as raised:
        match(came, expected)
    assert str(raised.value).endswith("\n" + hint)


def test_match_caps_the_list_and_hints_only_what_it_knows():
    """A wrong hidden size touches every tensor: ten are listed, the rest counted, and no setting is blamed wrongly."""
    came = {f"layer.{i}.weight": torch.zeros(3, 2) for i in range(14)} | {"word_embeddings.weight": torch.zeros(9, 2)}
    expected = {name: torch.Size([5, 4]) for name in came}
    with pytest.raises(ValueError) as raised:
        match(came, expected)
    lines = str(raised.value).splitlines()
    assert lines[0].startswith("15 tensor(s)")
    assert len(lines) == 12 and lines[-1] == "  and 5 more"


def test_match_checks_filled_and_renamed_tensors():
    """A tensor that got its name by prefix or by its twin must have the right shape too."""
    state = {"bert.a": torch.zeros(2), "cls.predictions.bias": torch.zeros(3)}
    expected = {"a": torch.Size([1]), "cls.predictions.decoder.bias": torch.Size([4])}
    with pytest.raises(ValueError) as raised:
        match(state, expected)
    assert "a: came (2,), expected (1,)" in str(raised.value)
    assert "cls.predictions.decoder.bias: came (3,), expected (4,)" in str(raised.value)


def test_match_scalar_against_vector():
    """A 0-d tensor has no rows to compare and must still be reported."""
    with pytest.raises(ValueError, match=r"classifier\.bias: came \(\), expected \(2,\)$"):
        match({"classifier.bias": torch.tensor(1.0)}, {"classifier.bias": torch.Size([2])})


# write_state_dict


def test_write_read_round_trip(tmp_path, state):
    """One file, marked as PyTorch's, that gives the same tensors back; the folder is made."""
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
    """Shards must keep to the size, except for one tensor above it, and hold every tensor once."""
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
    """The way back: transformers must find every tensor under its own name."""
    state = mlm.state_dict()
    del state["cls.predictions.decoder.weight"], state["cls.predictions.decoder.bias"]
    write_state_dict(state, tmp_path, max_shard_size=max_shard_size)
    TINY.save_pretrained(tmp_path)
    theirs, info = transformers.BertForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert_same({k: v.detach() for k, v in theirs.state_dict().items()}, mlm.state_dict())


def test_write_tensors_that_share_or_stride(tmp_path):
    """Slices of a fused matrix, a transpose, an expanded row and one tensor twice must be written whole, once each."""
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
    """Tensors mapped from the very file that is replaced must survive the save."""
    write_state_dict(state, tmp_path)
    read = read_state_dict(tmp_path)
    write_state_dict(read, tmp_path)
    write_state_dict(read, tmp_path, max_shard_size=100)
    assert_same(read_state_dict(tmp_path), state)
    assert_same(read, state)


def test_stale_files_are_removed(tmp_path, state):
    """Files of a previous save would be mixed with the new ones; files that are not ours must stay."""
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
    """A save that breaks off while writing must leave the old checkpoint and nothing else."""
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
    """Between the renames of two shards a reader must find old, new or nothing, never a mixture."""
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
                found = read_state_dict(folder)
            except FileNotFoundError:
                continue
            assert any(all(torch.equal(found[name], whole[name]) for name in state) for whole in (state, new))


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
    """A meta tensor or a number must be named before any file is touched."""
    with pytest.raises(TypeError, match=message):
        write_state_dict({"a": torch.zeros(1), "x": value}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_write_refuses_nonsense(tmp_path):
    """An empty state would delete the old weights; a size of zero has no meaning."""
    with pytest.raises(ValueError, match="state: got no tensors"):
        write_state_dict({}, tmp_path)
    with pytest.raises(ValueError, match="max_shard_size: got 0, expected a positive number of bytes"):
        write_state_dict({"a": torch.zeros(1)}, tmp_path, max_shard_size=0)


# small files


def test_read_json(tmp_path):
    """An object comes back; anything else is an error that names the file."""
    path = tmp_path / "x.json"
    with pytest.raises(FileNotFoundError, match=r"x\.json not found"):
        read_json(path)
    for text, message in (("{,}", "is not valid JSON"), ("3", "holds a JSON int, expected an object")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message) as raised:
            read_json(path)
        assert str(path) in str(raised.value)
    path.write_text('{"å": [1]}', encoding="utf-8")
    assert read_json(path) == {"å": [1]}


def test_write_text(tmp_path, monkeypatch):
    """A failed write keeps the old text and leaves no temporary file."""
    path = tmp_path / "x.txt"
    write_text(path, "å\n")
    assert path.read_bytes() == "å\n".encode()
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert path.read_bytes() == "å\n".encode() and files(tmp_path) == ["x.txt"]
