"""A checkpoint is found in a folder or on the hub."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest

from fastbert.checkpoint.folder import resolve


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
    """Catches a folder named like a hub id that is not used, for some kind of path."""
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
    """Catches a mistyped path that is sent to the hub."""
    monkeypatch.chdir(tmp_path)
    if src == ".":
        assert resolve(src).samefile(tmp_path)
    else:
        with pytest.raises(FileNotFoundError, match="no such folder, and it is not a hub id") as raised:
            resolve(src)
        assert repr(str(src)) in str(raised.value)
    assert hub.calls == []


def test_a_file_is_not_a_folder(tmp_path, monkeypatch, hub):
    """Catches the name of an existing file that is sent to the hub."""
    monkeypatch.chdir(tmp_path)
    Path("weights").touch()
    with pytest.raises(FileNotFoundError, match="src 'weights' is a file, expected the folder"):
        resolve("weights")
    assert hub.calls == []


def test_bad_src():
    """Catches an empty string that means the current folder, as it does to pathlib."""
    with pytest.raises(ValueError, match="src: got an empty string"):
        resolve("")
    with pytest.raises(TypeError, match="src: got NoneType, expected a folder"):
        resolve(None)


@pytest.mark.parametrize("src", ["bert-base-uncased", "google-bert/bert-base-uncased", "a/b.c_d-1", "x"])
def test_hub_id(hub, src):
    """Catches a hub id or a revision that is changed on its way to the hub."""
    hub.files = ["config.json", "model.safetensors"]
    assert resolve(src, revision="v2") == hub.folder
    assert [(call["repo_id"], call["revision"]) for call in hub.calls] == [(src, "v2")]


def test_bin_is_not_downloaded_beside_safetensors(hub):
    """Catches a download that is twice as large for weights in formats that nothing reads."""
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
    """Catches an old repository, without safetensors, that does not load."""
    hub.files = ["config.json", "flax_model.msgpack", "training_args.bin", *weights]
    resolve("owner/model")
    assert hub.downloaded() == sorted(["config.json", *weights])


def test_sharded_safetensors_need_no_bin(hub):
    """Catches a repository of sharded safetensors that counts as one without."""
    hub.files = ["model.safetensors.index.json", "model-00001-of-00001.safetensors", "pytorch_model.bin"]
    resolve("owner/model")
    assert "pytorch_model.bin" not in hub.downloaded()


def test_no_weights_asked_for(hub):
    """Catches a tokenizer or a config whose reading fetches weights."""
    hub.files = ["config.json", "vocab.txt", "model.safetensors", "pytorch_model.bin"]
    resolve("owner/model", weights=False)
    assert hub.downloaded() == ["config.json", "vocab.txt"]


def test_hub_error_is_chained(monkeypatch, tmp_path):
    """Catches a message that does not say what was tried, or that loses the hub's own error."""

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
    """Catches a revision of a local folder that is ignored, so that other weights load than were asked for."""
    with pytest.raises(ValueError, match="revision: got 'v1', but src .* is a local folder"):
        resolve(tmp_path, revision="v1")


def test_offline_in_a_fresh_process(tmp_path):
    """Catches HF_HUB_OFFLINE=1 that does not read the hub's cache, or the hub's client imported before it is needed."""
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
    imported, resolved, error = run.stdout.splitlines()
    assert imported == "[]"
    assert Path(resolved) == snapshot
    assert error.startswith("src 'owner/absent': no folder of that name in ")
    assert "LocalEntryNotFoundError" in error
