"""The files that a path names, on this machine or in object storage, and what is in them."""

import bz2
import glob
import gzip
import lzma
import os
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from urllib.parse import unquote

import pyarrow.fs
from fsspec.utils import glob_translate

from rayml.errors import DataError

SUFFIXES = (
    *(".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv"),
    *(".conll", ".conllu", ".bio", ".bmes", ".iob", ".iob2"),
)
"""Of the files that are read in a folder; `.txt` where there is none of these. A file that is named may end in any."""
PACKED = ".gz", ".zst", ".bz2", ".xz"
SHARD = re.compile(r"-\d+-of-\d+.*$")
UNPACKED: dict[bytes, Callable[[bytes], bytes]] = {
    b"\x1f\x8b": gzip.decompress,
    b"\x28\xb5\x2f\xfd": lambda data: pyarrow.CompressedInputStream(pyarrow.BufferReader(data), "zstd").read(),
    b"BZh": bz2.decompress,
    b"\xfd7zXZ": lzma.decompress,
}
"""What unpacks a file, by its first bytes."""


@dataclass(frozen=True)
class File:
    """A file with rows."""

    filesystem: pyarrow.fs.FileSystem
    path: str

    @property
    def suffix(self) -> str:
        """What it ends in, beside what says that it is packed."""
        return os.path.splitext(self.unpacked_name)[1].lower()

    @property
    def unpacked_name(self) -> str:
        name = PurePosixPath(self.path).name
        return os.path.splitext(name)[0] if name.endswith(PACKED) else name

    @property
    def stem(self) -> str:
        """Its name without suffixes, and without the number of a shard."""
        stem = SHARD.sub("", os.path.splitext(self.unpacked_name)[0])
        in_folder = re.match(r"part-\d+", stem) or self.unpacked_name == "task.json"  # Spark's; BIG-bench's
        return PurePosixPath(self.path).parent.name or stem if in_folder else stem

    @property
    def columns(self) -> dict[str, str]:
        """What its folders say of all its rows: `task=mail/lang=de/part-0.parquet`, as Hive lays tables out."""
        pairs = (part.partition("=") for part in PurePosixPath(self.path).parent.parts)
        return {name: unquote(value) for name, equals, value in pairs if name and equals}

    def read(self) -> bytes:
        """Return its bytes, unpacked.

        Raises:
            DataError: it cannot be read, or unpacked.
        """
        try:
            with self.filesystem.open_input_stream(self.path, compression=None) as stream:
                data = stream.read()
            unpack = next((unpack for start, unpack in UNPACKED.items() if data.startswith(start)), bytes)
            return unpack(data)
        except (OSError, EOFError, lzma.LZMAError, zlib.error, pyarrow.ArrowException) as error:
            raise DataError(f"{self.path}: cannot be read: {error}; write or copy the file anew") from error


def files(path: str) -> list[File]:
    """Return the files that a path, folder, glob or URI names, in order.

    Raises:
        DataError: there is none.
    """
    try:
        local = pyarrow.fs.LocalFileSystem(), os.path.expanduser(path)
        filesystem, inner = pyarrow.fs.FileSystem.from_uri(path) if "://" in path else local
        found = named(filesystem, inner)
    except (OSError, ValueError) as error:  # pyarrow's are of both kinds
        raise DataError(f"{path}: cannot be read: {error}") from error
    if not found:
        deeper = f"; {path.rstrip('/')}/** looks into folders" if glob.has_magic(path) else ""
        raise DataError(f"{path}: no such file, and no file in it that ends in {', '.join(SUFFIXES)}{deeper}")
    return [File(filesystem, name) for name in found]


def named(filesystem: pyarrow.fs.FileSystem, path: str) -> list[str]:
    """Return the files that a path names: as it stands, brackets and all, as far as that is there; else as a glob."""
    parts = path.rstrip("/").split("/")
    there = len(parts)
    while there and filesystem.get_file_info("/".join(parts[:there]) or "/").type == pyarrow.fs.FileType.NotFound:
        there -= 1
    pattern = "/".join(parts[there:])
    base = "/".join(parts[:there]) or ("/" if path.startswith("/") else ".")
    if pattern and not glob.has_magic(pattern):
        return []
    if filesystem.get_file_info(base).is_file:
        return [] if pattern else [base]
    pattern, suffixes = pattern or "**", [SUFFIXES, (".txt",), *[("",)] * bool(pattern)]
    matches = re.compile(glob_translate(pattern)).match
    deep = "/" in pattern or "**" in pattern
    entries = filesystem.get_file_info(pyarrow.fs.FileSelector(base, recursive=deep))
    inside = {entry.path[len(base.rstrip("/")) + 1 :]: entry.path for entry in entries if entry.is_file}
    shown = [path for name, path in sorted(inside.items()) if matches(name) and not re.search(r"(^|/)\.", name)]
    by_suffix = ([path for path in shown if File(filesystem, path).suffix.endswith(some)] for some in suffixes)
    return next(filter(None, by_suffix), [])


def task_names(found: Sequence[File]) -> list[str]:
    """Return what the tasks of files are called, where their rows do not say: as the file, and where several folders
    have one of that name, with so many of the folders as tell them apart."""
    folders: dict[str, set[tuple[str, ...]]] = {}
    parents = [PurePosixPath(file.path).parent.parts for file in found]
    for file, parent in zip(found, parents, strict=True):
        folders.setdefault(file.stem, set()).add(parent)
    return [
        "/".join((*tail(parent, folders[file.stem]), file.stem)) for file, parent in zip(found, parents, strict=True)
    ]


def tail(folder: tuple[str, ...], among: set[tuple[str, ...]]) -> tuple[str, ...]:
    """Return the last parts of a folder, as many as tell all of them apart; none of one alone."""
    longest = max(map(len, among))
    count = next(
        n for n in range(longest + 1) if n == longest or len({one[-n:] if n else () for one in among}) == len(among)
    )
    return folder[-count:] if count else ()
