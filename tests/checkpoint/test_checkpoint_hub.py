"""The hub's client is asked for the right parts and formats of a repository, with the right arguments."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from fastbert.checkpoint.folder import resolve
from fastbert.checkpoint.weights import read_state_dict

FILES = [
    "config.json",
    "model.safetensors",
    "pytorch_model.bin",
    "part/config.json",
    "part/model.safetensors",
    "part/pytorch_model.bin",
    "checkpoint-5/config.json",
    "checkpoint-5/pytorch_model.bin",
]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in that hands out a folder with the files that match, and records what it was asked."""
    from huggingface_hub.utils import filter_repo_objects

    calls: list[dict] = []
    folder = tmp_path / "snapshot"

    def snapshot_download(repo_id, *, allow_patterns, ignore_patterns, **options):
        calls.append(options)
        for name in filter_repo_objects(FILES, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls, folder


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_arguments_of_the_client_reach_it(hub, tmp_path):
    """Catches a token, a cache or "stay offline" that is taken and forgotten."""
    calls, _ = hub
    resolve("owner/model", cache_dir=tmp_path, token=False, local_files_only=True, force_download=True, weights=False)
    assert calls == [
        {"revision": None, "cache_dir": tmp_path, "token": False, "local_files_only": True, "force_download": True}
    ]


def test_subfolder_of_a_repository(hub):
    """Catches a subfolder that downloads the whole repository, or one that the patterns leave out."""
    _, folder = hub
    assert resolve("owner/model", subfolder="part") == folder / "part"
    assert names(folder) == ["part/config.json", "part/model.safetensors"]
    assert resolve("owner/model", subfolder="checkpoint-5/") == folder / "checkpoint-5"
    assert names(folder / "checkpoint-5") == ["config.json", "pytorch_model.bin"]


def test_format_of_weights(hub):
    """Catches use_safetensors=False that downloads safetensors, and True that falls back to pickles."""
    _, folder = hub
    resolve("owner/model", use_safetensors=False)
    assert names(folder) == ["config.json", "part/config.json", "pytorch_model.bin"]
    (folder / "pytorch_model.bin").unlink()
    resolve("owner/model", subfolder="checkpoint-5", use_safetensors=True)
    assert "checkpoint-5/pytorch_model.bin" not in names(folder)


def test_subfolder_of_a_local_folder(tmp_path):
    """Catches a subfolder that is ignored, that may lead elsewhere, or whose absence is told late."""
    (tmp_path / "a/b").mkdir(parents=True)
    assert resolve(tmp_path, subfolder="a/b") == tmp_path / "a/b"
    assert resolve(tmp_path, subfolder="") == resolve(tmp_path, subfolder=None) == tmp_path
    with pytest.raises(FileNotFoundError, match="has no folder 'c'"):
        resolve(tmp_path, subfolder="c")
    with pytest.raises(ValueError, match="subfolder: got '../x', expected a folder inside src"):
        resolve(tmp_path, subfolder="../x")


def test_variant_and_format_of_local_weights(tmp_path):
    """Catches a variant that silently reads the files without it."""
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "model.fp16.safetensors")
    torch.save({"a": torch.full((1,), 2.0)}, tmp_path / "pytorch_model.bin")
    assert read_state_dict(tmp_path)["a"] == 0
    assert read_state_dict(tmp_path, variant="fp16")["a"] == 1
    assert read_state_dict(tmp_path, use_safetensors=False)["a"] == 2
    with pytest.raises(FileNotFoundError, match="looked for model.safetensors.index.x.json, model.x.safetensors, pyt"):
        read_state_dict(tmp_path, variant="x")
    with pytest.raises(FileNotFoundError, match="looked for pytorch_model.bin.index.fp16.json"):
        read_state_dict(tmp_path, variant="fp16", use_safetensors=False)
