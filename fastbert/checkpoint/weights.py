"""This module reads and writes the weights of a checkpoint: safetensors or PyTorch files, whole or in shards."""

from __future__ import annotations

import json
import logging
import os
import re
import zipfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch

from fastbert.checkpoint.files import BIN, BIN_INDEX, SAFETENSORS, SAFETENSORS_INDEX, read_json, replacing, write_text

logger = logging.getLogger("fastbert")

_SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors")  # It follows "model", or "model.fp16".

# Buffers that old transformers versions stored beside the weights.
_STORED_BUFFER = re.compile(r"(.*\.)?embeddings\.(position_ids|token_type_ids)")


def read_state_dict(
    folder: str | os.PathLike[str], *, use_safetensors: bool | None = None, variant: str | None = None
) -> dict[str, torch.Tensor]:
    """Reads every weight that is stored in ``folder``, to the CPU, in its stored dtype, under today's names.

    Looks for model.safetensors.index.json, model.safetensors, pytorch_model.bin.index.json and pytorch_model.bin, in
    this order. With ``use_safetensors=True`` it looks for the first two only, with False for the last two only.
    ``variant`` is a part of the names, as "fp16" in model.fp16.safetensors and model.safetensors.index.fp16.json.

    ``LayerNorm.gamma`` / ``beta`` become ``weight`` / ``bias``. A leading ``module.`` is removed. Stored
    ``position_ids`` and ``token_type_ids`` buffers are dropped.

    Pickles are read with ``weights_only=True``. Tensors may be private mappings of the file: writing to them does not
    change it.

    Raises FileNotFoundError if there are no weights or a shard is missing. Raises ValueError if a file is truncated,
    corrupt or not a state dict, if a shard lacks a tensor that the index places in it, or if two stored names become
    one. Each message names the file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    formats = [(SAFETENSORS_INDEX, SAFETENSORS)] if use_safetensors is not False else []
    formats += [(BIN_INDEX, BIN)] if not use_safetensors else []
    looked_for: list[str] = []
    for index, single in ((folder / _varied(a, variant), folder / _varied(b, variant)) for a, b in formats):
        looked_for += [index.name, single.name]
        if index.is_file() and not (single.is_file() and _is_left_over(index)):
            return _under_todays_names(_read_sharded(index), index)
        if single.is_file():
            return _under_todays_names(_read_weights(single), single)
    raise FileNotFoundError(f"no weights in {folder}: looked for {', '.join(looked_for)}")


def _varied(name: str, variant: str | None) -> str:
    """Puts the variant before the ending of a file's name."""
    stem, _, ending = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{ending}"


def _is_left_over(index: Path) -> bool:
    """Tells whether all shards of an index are gone.

    This happens after transformers saved a single file over a sharded checkpoint.
    """
    if any((index.parent / shard).is_file() for shard in _weight_map(index).values()):
        return False
    logger.warning("%s: none of its shards is there; reading the single weights file beside it instead", index)
    return True


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: expected a non-empty object under 'weight_map'")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard or Path(shard).name != shard:
            raise ValueError(f"{index}: {name} is placed in {shard!r}, expected the name of a file in the same folder")
    return weight_map


def _read_sharded(index: Path) -> dict[str, torch.Tensor]:
    names_of: dict[str, list[str]] = {}
    for name, shard in _weight_map(index).items():
        names_of.setdefault(shard, []).append(name)
    missing = [shard for shard in names_of if not (index.parent / shard).is_file()]
    if missing:
        raise FileNotFoundError(f"{index} names {', '.join(missing)}, not found in {index.parent}")
    state: dict[str, torch.Tensor] = {}
    for shard, names in names_of.items():
        tensors = _read_weights(index.parent / shard)
        lacking = [name for name in names if name not in tensors]
        if lacking:
            raise ValueError(
                f"{index.parent / shard} lacks {lacking[0]} ({len(lacking)} such), although {index.name} names them"
            )
        state.update((name, tensors[name]) for name in names)
    return state


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    with open(path, "rb") as file:
        if file.read(24) == b"version https://git-lfs.":
            raise ValueError(f"{path} is a Git LFS pointer, not the weights: fetch them with 'git lfs pull'")
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_bin(path)


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path, device="cpu")
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error


def _read_bin(path: Path) -> dict[str, torch.Tensor]:
    try:
        # torch can map only its zip format. Files of versions before torch 1.6 are plain pickles.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except MemoryError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{path} is truncated, or not a PyTorch file with only tensors (weights_only=True): {reason}"
        ) from error
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds a {type(state).__name__}, expected a state dict (names to tensors)")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(
                f"{path} is not a state dict: {name!r} holds a {type(tensor).__name__}, expected names to tensors"
            )
    return {name: tensor.detach() for name, tensor in state.items()}


def _under_todays_names(state: dict[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    stored_names: dict[str, str] = {}
    for stored_name in state:
        name = stored_name.removeprefix("module.")
        if _STORED_BUFFER.fullmatch(name):
            continue
        name = re.sub(r"(?<=LayerNorm\.)gamma$", "weight", name)
        name = re.sub(r"(?<=LayerNorm\.)beta$", "bias", name)
        if name in stored_names:
            raise ValueError(
                f"{path} holds both {stored_names[name]} and {stored_name}, which are two names of one tensor"
            )
        stored_names[name] = stored_name
    return {name: state[stored_name] for name, stored_name in stored_names.items()}


def write_state_dict(
    state: Mapping[str, torch.Tensor],
    folder: str | os.PathLike[str],
    *,
    max_shard_size: int = 5 * 2**30,
    variant: str | None = None,
) -> None:
    """Writes ``state`` to ``folder`` as safetensors, in the layout of transformers' ``save_pretrained``.

    Up to ``max_shard_size`` bytes are one ``model.safetensors``. More are ``model-00001-of-0000N.safetensors`` … and
    ``model.safetensors.index.json``. Every name of ``state`` is written in full; the caller leaves out one of two tied
    tensors. ``variant`` is a part of the names, as in `read_state_dict`.

    Everything is written under temporary names first. So an interrupted save leaves no half-written file under a final
    name, and no index over shards of two saves. Safetensors files of a previous save that this one does not replace are
    removed at the end. ``pytorch_model*.bin``, which readers look at last, is not changed.

    Raises ValueError if ``state`` is empty or ``max_shard_size`` not positive, and TypeError for a value that is not a
    dense tensor with data.
    """
    if max_shard_size <= 0:
        raise ValueError(f"max_shard_size: got {max_shard_size}, expected a positive number of bytes")
    if not state:
        raise ValueError("state: got no tensors")
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_meta:
            description = (
                f"{tensor.layout} tensor on {tensor.device}" if isinstance(tensor, torch.Tensor) else type(tensor)
            )
            raise TypeError(f"state[{name!r}]: got {description}, expected a dense tensor with data")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)

    shards = _split(state, max_shard_size)
    sharded = len(shards) > 1
    single = _varied(SAFETENSORS, variant)
    stem = single.removesuffix(".safetensors")
    if sharded:
        paths = [folder / f"{stem}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    else:
        paths = [folder / single]
    index = folder / _varied(SAFETENSORS_INDEX, variant)
    with ExitStack() as pending:
        for path, names in zip(paths, shards, strict=True):
            _save_file({name: state[name] for name in names}, pending.enter_context(replacing(path)))
        if sharded and any(path.exists() for path in paths):
            # Until the new index exists, no reader may combine old and new shards with the same names.
            index.unlink(missing_ok=True)
    if sharded:
        weight_map = {name: path.name for path, names in zip(paths, shards, strict=True) for name in names}
        total = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_text(index, json.dumps(content, indent=2) + "\n")
    else:
        # The index is removed before its shards: readers look for an index before the single file.
        index.unlink(missing_ok=True)
    for path in folder.iterdir():
        is_shard = path.name.startswith(stem) and _SHARD.fullmatch(path.name.removeprefix(stem))
        if path not in paths and (path.name == single or is_shard):
            path.unlink()


def _split(state: Mapping[str, torch.Tensor], max_shard_size: int) -> list[list[str]]:
    """Divides the names among shards, in their order."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in state.items():
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and filled + size > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _save_file(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    alone: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        alone[name] = tensor.detach().to("cpu").contiguous()
        if alone[name].untyped_storage().data_ptr() in storages:
            # safetensors refuses tensors that share a storage.
            alone[name] = alone[name].clone()
        storages.add(alone[name].untyped_storage().data_ptr())
    save_file(alone, path, metadata={"format": "pt"})
