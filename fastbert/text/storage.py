"""Files are on a local disk, or at a URL such as s3://bucket/folder, which pyarrow opens."""

from __future__ import annotations

import importlib.util
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from fastbert.checkpoint.files import replacing

AHEAD_BYTES = 2**18  # bytes per request for a URL, because each request takes time


def is_url(path: str) -> bool:
    """Tells whether pyarrow opens a path."""
    return "://" in path


def join(folder: str, name: str) -> str:
    """Returns the path of a file in a folder."""
    return f"{folder.rstrip('/')}/{name}"


def need_pyarrow(path: str) -> None:
    """Raises ValueError, with the install command, if pyarrow is missing."""
    if importlib.util.find_spec("pyarrow") is None:
        raise ValueError(f"{path}: Parquet files and URLs need pyarrow: pip install pyarrow")


def open_file(path: str) -> BinaryIO:
    """Opens a file for reading, with random access."""
    if not is_url(path):
        return open(path, "rb")
    system, inner = _system(path)
    return cast(BinaryIO, system.open_input_file(inner))


def open_lines(path: str) -> BinaryIO:
    """Opens a file for reading lines, with random access."""
    if not is_url(path):
        return open(path, "rb")
    return io.BufferedReader(cast(io.RawIOBase, open_file(path)), AHEAD_BYTES)  # pyarrow's files cannot read lines


def files_in(path: str, suffixes: tuple[str, ...]) -> list[str]:
    """Returns the path of a file, or the sorted paths of the files in a folder that end in one of the suffixes.

    Hidden files are omitted. Raises FileNotFoundError if there is no file.
    """
    names = [path]
    if not is_url(path):
        if not os.path.exists(path):
            raise FileNotFoundError(f"input: there is no file {path!r}")
        if os.path.isdir(path):
            names = [os.path.join(path, name) for name in sorted(os.listdir(path))]
    else:
        from pyarrow.fs import FileSelector, FileType

        system, inner = _system(path)
        file_type = system.get_file_info(inner).type
        if file_type == FileType.NotFound:
            raise FileNotFoundError(f"input: there is no file {path!r}")
        if file_type == FileType.Directory:
            entries = system.get_file_info(FileSelector(inner))
            names = sorted(join(path, info.base_name) for info in entries if info.type == FileType.File)
    if names == [path]:
        return names
    wanted = [name for name in names if name.endswith(suffixes) and not os.path.basename(name).startswith((".", "_"))]
    if not wanted:
        raise FileNotFoundError(f"input: the folder {path!r} has no file that ends in {', '.join(suffixes)}")
    return wanted


def stamp(path: str) -> list[Any]:
    """Returns path, size in bytes and modification time in ns, which change when a file changes."""
    if not is_url(path):
        status = os.stat(path)
        return [os.path.abspath(path), status.st_size, status.st_mtime_ns]
    system, inner = _system(path)
    info = system.get_file_info(inner)
    return [path, info.size, info.mtime_ns]


def size_of(path: str) -> int:
    """Returns the size of a file in bytes."""
    return int(stamp(path)[1])


def names_in(folder: str) -> set[str]:
    """Returns the names in a folder; an empty set if there is no folder."""
    if not is_url(folder):
        return set(os.listdir(folder)) if os.path.isdir(folder) else set()
    from pyarrow.fs import FileSelector

    system, inner = _system(folder)
    return {info.base_name for info in system.get_file_info(FileSelector(inner, allow_not_found=True))}


def make_folder(folder: str) -> None:
    """Makes a folder and its parents, if they do not exist."""
    if not is_url(folder):
        os.makedirs(folder, exist_ok=True)
        return
    system, inner = _system(folder)
    system.create_dir(inner, recursive=True)


@contextmanager
def writing(path: str) -> Iterator[BinaryIO]:
    """Yields a file to write. It appears under its name when it is complete, and not after an error.

    An object store shows only complete objects. So an object is built in memory first, and sent as a whole.
    """
    if not is_url(path):
        with replacing(Path(path)) as temporary, open(temporary, "wb") as file:
            yield file
            file.flush()
        return
    buffer = io.BytesIO()
    yield buffer
    system, inner = _system(path)
    with system.open_output_stream(inner) as stream:
        stream.write(buffer.getbuffer())


def _system(path: str) -> tuple[Any, str]:
    """Returns pyarrow's filesystem of a URL, and the path in it."""
    need_pyarrow(path)
    from pyarrow.fs import FileSystem

    return FileSystem.from_uri(path)
