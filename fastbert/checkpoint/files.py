"""Weights and small files in Hugging Face layout: read a folder, rename what it holds, write it.

Knows names and shapes, not models: what a model does about a missing tensor is the model's to decide.
"""

from __future__ import annotations

import json
import logging
import os
import re
import uuid
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastbert.checkpoint.hub import BIN, BIN_INDEX, SAFETENSORS, SAFETENSORS_INDEX
from fastbert.checkpoint.hub import resolve as resolve

logger = logging.getLogger("fastbert")

_SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors")  # what follows "model", or "model.fp16"

# Buffers that old transformers versions stored beside the weights.
_STORED_BUFFER = re.compile(r"(.*\.)?embeddings\.(position_ids|token_type_ids)")

_BIAS_TWINS = {
    "cls.predictions.bias": "cls.predictions.decoder.bias",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
# The config field that sets dimension 0 of a tensor, by the end of its name.
_ROWS = {
    "word_embeddings.weight": "vocab_size",
    "cls.predictions.bias": "vocab_size",
    "cls.predictions.decoder.bias": "vocab_size",
    "cls.predictions.decoder.weight": "vocab_size",
    "position_embeddings.weight": "max_position_embeddings",
    "token_type_embeddings.weight": "type_vocab_size",
    "classifier.weight": "num_labels",
    "classifier.bias": "num_labels",
    "classifier.out_proj.weight": "num_labels",
    "classifier.out_proj.bias": "num_labels",
}
_MISMATCHES_LISTED = 10


@dataclass
class Match:
    """A checkpoint's tensors under the names a model expects.

    ``missing`` holds names of the model, in its order; ``unexpected`` holds names of the checkpoint, in its order.
    ``mismatched``, a part of ``missing``: names whose tensor has another shape, that shape and the expected one.
    """

    state: dict[str, torch.Tensor]
    missing: list[str]
    unexpected: list[str]
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)


def read_state_dict(
    folder: str | os.PathLike[str], *, use_safetensors: bool | None = None, variant: str | None = None
) -> dict[str, torch.Tensor]:
    """Every weight stored in ``folder``, on the CPU, in its stored dtype, under today's names.

    Looks for model.safetensors.index.json, model.safetensors, pytorch_model.bin.index.json and pytorch_model.bin, in
    this order; with ``use_safetensors`` True or False only for the first or the last two. ``variant``: a part of the
    names, as "fp16" in model.fp16.safetensors and model.safetensors.index.fp16.json.
    ``LayerNorm.gamma`` / ``beta`` become ``weight`` / ``bias``, a leading ``module.`` is removed, stored
    ``position_ids`` and ``token_type_ids`` buffers are dropped. Pickles are read with ``weights_only=True``. Tensors
    may be private mappings of the file: writing to them does not change it.

    Raises FileNotFoundError if there are no weights or a shard is missing, ValueError if a file is truncated, corrupt
    or not a state dict, if a shard lacks a tensor that the index places in it, or if two stored names become one. Each
    message names the file.
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
            return _canonical(_read_sharded(index), index)
        if single.is_file():
            return _canonical(_read_weights(single), single)
    raise FileNotFoundError(f"no weights in {folder}: looked for {', '.join(looked_for)}")


def _varied(name: str, variant: str | None) -> str:
    stem, _, ending = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{ending}"


def _is_left_over(index: Path) -> bool:
    """Whether all shards of an index are gone, as after transformers saved a single file over a sharded checkpoint."""
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
                f"{index.parent / shard} lacks {lacking[0]} ({len(lacking)} such), which {index.name} places in it"
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
        # torch can map only its zip format; files written before torch 1.6 are plain pickles.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except MemoryError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{path} is truncated, or not a PyTorch file that holds tensors alone (weights_only=True): {reason}"
        ) from error
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds a {type(state).__name__}, expected a state dict (names to tensors)")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(
                f"{path} is not a state dict: {name!r} holds a {type(tensor).__name__}, expected names to tensors"
            )
    return {name: tensor.detach() for name, tensor in state.items()}


def _canonical(state: dict[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    stored_name: dict[str, str] = {}
    for name in state:
        new = name.removeprefix("module.")
        if _STORED_BUFFER.fullmatch(new):
            continue
        new = re.sub(r"(?<=LayerNorm\.)gamma$", "weight", new)
        new = re.sub(r"(?<=LayerNorm\.)beta$", "bias", new)
        if new in stored_name:
            raise ValueError(f"{path} holds both {stored_name[new]} and {name}, two names of one tensor")
        stored_name[new] = name
    return {new: state[name] for new, name in stored_name.items()}


def match(
    state: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Size],
    *,
    base_prefix: str = "bert.",
    ignore_mismatched: bool = False,
) -> Match:
    """Rename a checkpoint's tensors to the names ``expected`` (name to shape) of a model.

    ``base_prefix`` is added or removed where only that finds a name. ``cls.predictions.bias`` and
    ``cls.predictions.decoder.bias`` are one parameter: where the model expects one that the checkpoint lacks, it gets
    the other (the same tensor object); a twin the model has no place for is not unexpected if it holds the same
    numbers. A missing ``cls.predictions.decoder.weight`` stays missing: whether it is tied is the model's to know.

    Raises ValueError that lists the tensors whose shape is not the expected one; with ``ignore_mismatched`` they are
    left out instead.
    """
    matched = {name: tensor for name, tensor in state.items() if name in expected}
    unexpected: list[str] = []
    for name, tensor in state.items():
        if name in expected:
            continue
        other = name[len(base_prefix) :] if name.startswith(base_prefix) else base_prefix + name
        if other in expected and other not in matched:
            matched[other] = tensor
        else:
            unexpected.append(name)

    for name, twin in _BIAS_TWINS.items():
        if name in expected and name not in matched and twin in state:
            matched[name] = state[twin]
        if twin in unexpected and name in matched and _same(matched[name], state[twin]):
            unexpected.remove(twin)

    wrong = _mismatched(matched, expected)
    if wrong and not ignore_mismatched:
        _refuse_shapes(wrong)
    matched = {name: tensor for name, tensor in matched.items() if name not in wrong}
    return Match(
        state={name: matched[name] for name in expected if name in matched},
        missing=[name for name in expected if name not in matched],
        unexpected=unexpected,
        mismatched=wrong,
    )


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a is b or (a.dtype == b.dtype and torch.equal(a, b))


def _mismatched(
    matched: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Size]
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    return {
        name: (tuple(matched[name].shape), tuple(shape))
        for name, shape in expected.items()
        if name in matched and tuple(matched[name].shape) != tuple(shape)
    }


def _refuse_shapes(wrong: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
    lines = [f"{len(wrong)} tensor(s) of the checkpoint do not have the shape that the model expects:"]
    listed = list(wrong.items())[:_MISMATCHES_LISTED]
    lines += [f"  {name}: came {came}, expected {want}" for name, (came, want) in listed]
    if len(wrong) > _MISMATCHES_LISTED:
        lines.append(f"  and {len(wrong) - _MISMATCHES_LISTED} more")
    hints: dict[str, str] = {}
    for name, (came, want) in wrong.items():
        for ending, setting in _ROWS.items():
            if name.endswith(ending) and came and want and came[1:] == want[1:]:
                hints[setting] = f"{setting}: the checkpoint has {came[0]}, the model {want[0]}"
    raise ValueError("\n".join(lines + list(hints.values())))


def write_state_dict(
    state: Mapping[str, torch.Tensor],
    folder: str | os.PathLike[str],
    *,
    max_shard_size: int = 5 * 2**30,
    variant: str | None = None,
) -> None:
    """Write ``state`` to ``folder`` as safetensors, in the layout of transformers' ``save_pretrained``.

    One ``model.safetensors`` up to ``max_shard_size`` bytes; above that ``model-00001-of-0000N.safetensors`` … and
    ``model.safetensors.index.json``. Every name passed is written in full: of tied tensors the caller drops one.
    Everything is written under temporary names first, so that an interrupted save leaves no half-written file under a
    final name and no index over shards of two saves. Safetensors files of a previous save that this one does not
    replace are removed at the end; ``pytorch_model*.bin``, which readers look at last, is left alone. ``variant``: a
    part of the names, as in `read_state_dict`.

    Raises ValueError if ``state`` is empty or ``max_shard_size`` not positive, TypeError for a value that is not a
    dense tensor with data.
    """
    if max_shard_size <= 0:
        raise ValueError(f"max_shard_size: got {max_shard_size}, expected a positive number of bytes")
    if not state:
        raise ValueError("state: got no tensors")
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_meta:
            what = f"{tensor.layout} tensor on {tensor.device}" if isinstance(tensor, torch.Tensor) else type(tensor)
            raise TypeError(f"state[{name!r}]: got {what}, expected a dense tensor with data")
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
            # Until the new index is there, no reader may take old and new shards of the same names for one set.
            index.unlink(missing_ok=True)
    if sharded:
        weight_map = {name: path.name for path, names in zip(paths, shards, strict=True) for name in names}
        total = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_text(index, json.dumps(content, indent=2) + "\n")
    else:
        # Before its shards: an index is read ahead of the single file.
        index.unlink(missing_ok=True)
    for path in folder.iterdir():
        is_shard = path.name.startswith(stem) and _SHARD.fullmatch(path.name.removeprefix(stem))
        if path not in paths and (path.name == single or is_shard):
            path.unlink()


def _split(state: Mapping[str, torch.Tensor], max_shard_size: int) -> list[list[str]]:
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


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object in a JSON file. FileNotFoundError or ValueError (not JSON, not an object) name the file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}, expected an object")
    return content


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 text file whole or not at all: ``path`` holds the old content or the new, never a part."""
    with replacing(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name in the folder of ``path``. It takes the place of ``path`` at the end, or goes if that fails."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        # safetensors makes its files readable by their owner alone, whatever the umask says.
        temporary.chmod(mode)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
