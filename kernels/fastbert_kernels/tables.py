"""This module reads tables of block sizes and of GEMM choices: those in `tuned/`, and the one from `fastbert tune`.

A table is JSON:

    {
      "version": 1, "arch": 90, "device": "NVIDIA H100 80GB HBM3", "date": "2026-01-31", "source": "fastbert tune ...",
      "linear": {"float16": {"BLOCK_ROWS": 128, ...}, "float16/768x3072/gelu": {...}},
      "linear_persistent": {"float16": {...}, "float16/residual": {...}, ...}, "linear_specialized": {...},
      "gemm": {"float16/768x3072/gelu": {"kernel": "cublas", "ours": "linear_persistent"}},
      "quantized_linear": {"float8": {"BLOCK_ROWS": 128, ...}, "float8/768x3072/row-quantized": {...}},
      "quantized_linear_persistent": {...}, "quantized_linear_specialized": {...},
      "quantized_gemm": {"float8/768x3072/row-quantized": {"kernel": "quantized_linear"}},
      "quantized_gated_linear": {"float8/768x1152": {...}}, "quantized_gated_linear_persistent": {...},
      "quantized_gated_gemm": {"float8/768x1152": {"kernel": "quantized_gated_linear"}},
      "attention": {"float16/64": {"BLOCK_Q": 128, ...}},
      "few_rows": {"float16/3072x768/residual/128": {"kernel": "split_linear", "SPLITS": 4, "BLOCK_ROWS": 64, ...}},
      "dependent_launch": true
    }

`device` and `date` are null if nothing was measured. A key is a class of dtypes ("float16" for bf16 and fp16,
"float32"), then for a GEMM K x M and its epilogue, or for attention the head size of the tile. No key has the number of
tokens. `gemm` names the fastest kernel, and fastbert's fastest kernel for calls that must not use cuBLAS. Heuristics
decide for a shape without an entry. The epilogue "gated" is for 16- and 32-bit products with a gate. There M counts
both halves of the weight, and the kernels of `gated_linear` have the names of those without a gate. Keys of 8-bit
linears ("float8", "int8") have K x M and the columns that share a scale. Without an entry in `quantized_gemm` they use
the persistent kernel if there is a tile for it. Those with a gate have K x I, and no entry in the shipped tables:
`quantized_configs` has their tiles. Keys of `few_rows` end with the greatest number of rows for which they are valid,
see `few_rows`. `dependent_launch`: see `dependent`.

The user's table, in the cache folder under the name of the GPU, has priority over the shipped one.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

TABLE_VERSION = 1
TABLE_FOLDER = Path(__file__).parent / "tuned"
GEMMS = ("cublas", "linear", "linear_persistent", "linear_specialized")
QUANTIZED_GEMMS = ("quantized_linear", "quantized_linear_persistent", "quantized_linear_specialized")
QUANTIZED_GATED_GEMMS = ("quantized_gated_linear", "quantized_gated_linear_persistent")
GATED_COLS = 128  # columns of a gated 8-bit tile, which share a scale in the result
FEW_ROWS = ("cublas", "linear", "split_linear")
SPECIALIZED_WARPS = 4  # warps in a group: with other numbers Triton does not split, or splits wrongly
# The names that each entry must have. Further names are allowed.
_TILE = {"num_warps", "num_stages"}
_GEMM_TILE = _TILE | {"BLOCK_ROWS", "BLOCK_COLS", "BLOCK_K", "GROUP_ROWS"}
REQUIRED = {
    "linear": _GEMM_TILE,
    "linear_persistent": _GEMM_TILE,
    "quantized_linear": _GEMM_TILE,
    "linear_specialized": _GEMM_TILE,
    "quantized_linear_persistent": _GEMM_TILE,
    "quantized_linear_specialized": _GEMM_TILE,
    "quantized_gated_linear": _GEMM_TILE,
    "quantized_gated_linear_persistent": _GEMM_TILE,
    "attention": _TILE | {"BLOCK_Q", "BLOCK_K"},
}

logger = logging.getLogger("fastbert")

generation = 0  # The number of calls of `forget`, for caches of entries.
some_dependent = False  # Whether a table or a caller turned dependent launches on.
_chosen: Path | None = None  # The argument of `use_table`.
_to_call: set[Callable[[], Any]] = set()  # Functions that `forget` calls.


def cache_folder() -> Path:
    """Returns the folder that `fastbert tune` writes to: $XDG_CACHE_HOME/fastbert/tuned, by default in ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME")
    # By the XDG Base Directory Specification a relative path is invalid and must be ignored.
    return (Path(root) if root and os.path.isabs(root) else Path.home() / ".cache") / "fastbert" / "tuned"


def file_name(device_name: str) -> str:
    """Returns the file name of a GPU's table, such as "nvidia-h100-pcie.json" for "NVIDIA H100 PCIe"."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-") + ".json"


def gpus() -> list[tuple[str, int]]:
    """Returns (name, compute capability as one integer) of each GPU of this machine."""
    if not torch.cuda.is_available():
        return []
    facts = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [(fact.name, 10 * fact.major + fact.minor) for fact in facts]


@functools.cache
def read_table(path: Path) -> dict[str, Any]:
    """Reads one table. Raises ValueError, which names the file, if the file is not a table."""
    try:
        table = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable table of block sizes: {error}") from error
    if not isinstance(table, dict) or table.get("version") != TABLE_VERSION:
        raise ValueError(f"{path}: expected a table of block sizes of version {TABLE_VERSION}")
    global some_dependent
    if not isinstance(table.get("dependent_launch", False), bool):
        raise ValueError(f"{path}: dependent_launch: expected true or false, got {table['dependent_launch']!r}")
    some_dependent = some_dependent or table.get("dependent_launch", False)
    for op in (*REQUIRED, "gemm", "quantized_gemm", "quantized_gated_gemm", "few_rows"):
        for key, entry in _object(path, op, table.get(op, {})).items():
            _check_entry(path, op, key, _object(path, f"{op} -> {key}", entry))
    return table


def _object(path: Path, name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {name}: expected an object, got {value!r}")
    return value


def _check_entry(path: Path, op: str, key: str, entry: dict[str, Any]) -> None:
    if op == "gemm":
        if entry.get("kernel") not in GEMMS or entry.get("ours", "linear") not in GEMMS[1:]:
            raise ValueError(f"{path}: gemm -> {key}: expected kernel of {GEMMS} and ours of {GEMMS[1:]}, got {entry}")
    elif op in ("quantized_gemm", "quantized_gated_gemm"):
        kernels = QUANTIZED_GEMMS if op == "quantized_gemm" else QUANTIZED_GATED_GEMMS
        if entry.get("kernel") not in kernels:
            raise ValueError(f"{path}: {op} -> {key}: expected kernel of {kernels}, got {entry}")
    elif op == "few_rows":
        if entry.get("kernel") not in FEW_ROWS:
            raise ValueError(f"{path}: {op} -> {key}: expected kernel of {FEW_ROWS}, got {entry}")
        if entry["kernel"] != "cublas":
            required = "linear" if entry["kernel"] == "linear" else "split_linear"
            _check_entry(path, required, key, {name: size for name, size in entry.items() if name != "kernel"})
    elif "WARP_SPECIALIZE" in entry:
        raise ValueError(f"{path}: {op} -> {key}: WARP_SPECIALIZE: descriptors from the host would be compiled wrong")
    elif op.endswith("_specialized") and entry.get("num_warps") != SPECIALIZED_WARPS:
        raise ValueError(f"{path}: {op} -> {key}: expected num_warps = {SPECIALIZED_WARPS}, got {entry}")
    elif op in QUANTIZED_GATED_GEMMS and entry.get("BLOCK_COLS", GATED_COLS) != GATED_COLS:
        raise ValueError(f"{path}: {op} -> {key}: expected BLOCK_COLS = {GATED_COLS}, got {entry}")
    elif missing := REQUIRED.get(op, _GEMM_TILE | {"SPLITS"}) - entry.keys():
        raise ValueError(f"{path}: {op} -> {key}: lacks {', '.join(sorted(missing))}")
    elif wrong := [name for name, size in entry.items() if isinstance(size, bool) or not isinstance(size, int)]:
        raise ValueError(f"{path}: {op} -> {key}: expected whole numbers, got {wrong[0]} = {entry[wrong[0]]!r}")


def read_table_for(path: Path, device_name: str, arch: int) -> dict[str, Any]:
    """Reads a table made for one GPU. Raises ValueError, which names the file, if it was made for another."""
    table = read_table(path)
    made_for = table.get("device"), table.get("arch")
    if made_for != (device_name, arch):
        raise ValueError(
            f"{path}: made for {made_for[0]} (sm_{made_for[1]}), but this GPU is {device_name} (sm_{arch})"
        )
    return table


def use_table(path: str | os.PathLike[str] | None) -> None:
    """Uses this table for the GPU that it names, instead of the one in the cache. None restores the latter.

    Raises ValueError, naming the file, if it does not parse, is of another version, or names no GPU of this machine.
    """
    global _chosen
    if path is not None:
        path = Path(path)
        read_table.cache_clear()
        table = read_table(path)
        installed = gpus()
        if (table.get("device"), table.get("arch")) not in installed:
            names = ", ".join(f"{name} (sm_{arch})" for name, arch in installed) or "none"
            made_for = f"{table.get('device')} (sm_{table.get('arch')})"
            raise ValueError(f"{path}: made for {made_for}, but the GPUs of this machine are: {names}")
    _chosen = path
    forget()


def on_forget(call: Callable[[], Any]) -> None:
    """Registers a function that is called whenever tables are forgotten, for caches outside of this package."""
    _to_call.add(call)


def forget() -> None:
    """Drops all tables. The next use of a table reads it again."""
    global generation, some_dependent
    generation += 1
    some_dependent = False
    for cached in (read_table, _users_table, shipped_table, find, dependent_launch):
        cached.cache_clear()
    for call in tuple(_to_call):
        call()


@functools.cache
def _users_table(arch: int) -> tuple[Path, dict[str, Any]] | None:
    """Returns the user's table for this machine's GPU of the architecture, or None if there is none."""
    names = {name for name, capability in gpus() if capability == arch}
    if _chosen is not None and names:
        table = read_table(_chosen)
        if table["arch"] == arch and table["device"] in names:
            return _chosen, table
    for name in sorted(names):
        path = cache_folder() / file_name(name)
        if not path.exists():
            continue
        if len(names) > 1:
            # Callers only know the architecture, so that kernels need not know their device. So the GPU is ambiguous.
            logger.warning("%s: not used: this machine has different GPUs of sm_%d: %s", path, arch, sorted(names))
            return None
        try:
            return path, read_table_for(path, name, arch)
        except ValueError as error:
            logger.warning("%s; taking the table that ships instead (`fastbert tune` makes a new one)", error)
    return None


@functools.cache
def shipped_table(arch: int) -> tuple[Path, dict[str, Any]]:
    """Returns file and table of the nearest architecture that is not newer. Raises ValueError if the GPU is too old."""
    known = sorted(int(path.stem.removeprefix("sm_")) for path in TABLE_FOLDER.glob("sm_*.json"))
    nearest = max((a for a in known if a <= arch), default=None)
    if nearest is None:
        raise ValueError(f"no table of block sizes for compute capability {arch / 10}: there are {known}")
    path = TABLE_FOLDER / f"sm_{nearest}.json"
    return path, read_table(path)


@functools.cache
def dependent_launch(arch: int, shipped_only: bool) -> bool:
    """Tells whether kernels are launched dependently, by the first table with this setting; the default is no."""
    users = None if shipped_only else _users_table(arch)
    for _, table in filter(None, (users, shipped_table(arch))):
        if "dependent_launch" in table:
            return bool(table["dependent_launch"])
    return False


@functools.cache
def find(op: str, keys: tuple[str, ...], arch: int, shipped_only: bool) -> tuple[dict[str, Any], str] | None:
    """Returns the entry of the first key that a table has, and its source as text, or None if no table has one."""
    users = None if shipped_only else _users_table(arch)
    for path, table in filter(None, (users, shipped_table(arch))):
        for key in keys:
            if key in table.get(op, {}):
                measured = f"measured on {table['device']}, {table['date']}" if table["device"] else table["source"]
                name = f"tuned/{path.name}" if path.parent == TABLE_FOLDER else str(path)
                return dict(table[op][key]), f"{name} ({measured})"
    return None
