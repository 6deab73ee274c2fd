"""Find the files that a path names, on this machine or in object storage, and read them."""

import bz2
import glob
import gzip
import lzma
import os
import re
import zlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from urllib.parse import unquote

import pyarrow.fs
from fsspec.utils import glob_translate

from rayml.errors import DataError
from rayml.tasks.formats import conll
from rayml.tasks.formats.guess import TARGETS, guess_columns

Say = Callable[[str], None]
SUFFIXES = (
    *(".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv"),
    *conll.SUFFIXES,
)
"""Files in a folder are read if they end so, or in `.txt` if none does. A file that is named itself may end in any."""
PACKED = ".gz", ".zst", ".bz2", ".xz"
SHARD = re.compile(r"-\d+-of-\d+.*$")
PARTITION = re.compile(r"([^=]+)=(.*)")
NULL = "__HIVE_DEFAULT_PARTITION__"
SAVE_TO_DISK_FILES = "dataset_info.json", "dataset_dict.json"
"""`Dataset.save_to_disk` writes these beside its Arrow files."""
MAX_SHOWN = 5
UNPACK: dict[bytes, Callable[[bytes], bytes]] = {
    b"\x1f\x8b": gzip.decompress,
    b"\x28\xb5\x2f\xfd": lambda data: pyarrow.CompressedInputStream(pyarrow.BufferReader(data), "zstd").read(),
    b"BZh": bz2.decompress,
    b"\xfd7zXZ": lzma.decompress,
}
"""Decompression by a file's first bytes."""


@dataclass(frozen=True)
class File:
    """A file with rows."""

    filesystem: pyarrow.fs.FileSystem
    path: str
    root: str = ""
    """The folder that the user named; folders above it say nothing about the rows. "" if the file itself was named."""

    @property
    def location(self) -> str:
        """The same for one file, however it was named."""
        is_local = isinstance(self.filesystem, pyarrow.fs.LocalFileSystem)
        return os.path.abspath(self.path) if is_local else f"{self.filesystem.type_name}:{self.path}"

    @property
    def folders(self) -> tuple[str, ...]:
        """The names of the folders above it, without Hive's partitions."""
        return tuple(part for part in PurePosixPath(self.location).parent.parts if not PARTITION.fullmatch(part))

    @property
    def suffix(self) -> str:
        """In lower case, without that of a compressed file."""
        return os.path.splitext(self.unpacked_name)[1].lower()

    @property
    def unpacked_name(self) -> str:
        name = PurePosixPath(self.path).name
        return os.path.splitext(name)[0] if name.endswith(PACKED) else name

    @property
    def stem(self) -> str:
        """Its name without suffixes and shard number; for one part of a data set, the folder's name."""
        stem = SHARD.sub("", os.path.splitext(self.unpacked_name)[0])
        is_part = re.match(r"part-\d+", stem) or self.unpacked_name == "task.json"  # Spark's; BIG-bench's
        tasks = [value for name, value in partitions(PurePosixPath(self.path).parent) if name == "task" and value]
        names = [*self.folders[-1:], *tasks]
        return names[-1] if names and (is_part or self.partition_columns) else stem

    @property
    def partition_columns(self) -> dict[str, str | None]:
        """Columns and values in the names of its folders, as Hive writes them: `task=mail/lang=de/part-0.parquet`."""
        parts = PurePosixPath(self.path).parent.parts[len(PurePosixPath(self.root).parts) :]
        return dict(partitions(PurePosixPath(*parts))) if self.root else {}

    def missing_columns(self, keys: Collection[str], wanted: Collection[str]) -> dict[str, str | None]:
        """Return those of the partition columns that its rows lack: the task, the target, and wanted ones.

        Args:
            keys: the columns of its rows.
            wanted: columns that the user named.
        """
        has_target = "target" in keys or "target" in guess_columns(keys, {})
        needed = {"task", *wanted, *(() if has_target else TARGETS)}
        present = {key.casefold() for key in keys}
        return {
            name: value
            for name, value in self.partition_columns.items()
            if {name, name.casefold()} & needed and name.casefold() not in present
        }

    def read(self) -> bytes:
        """Return its bytes, decompressed.

        Raises:
            DataError: it cannot be read, or decompressed.
        """
        try:
            with self.filesystem.open_input_stream(self.path, compression=None) as stream:
                data = stream.read()
            unpack = next((unpack for start, unpack in UNPACK.items() if data.startswith(start)), bytes)
            return unpack(data)
        except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error, pyarrow.ArrowException) as error:
            raise DataError(f"{self.path}: cannot be read: {error}; write or copy the file anew") from error


def partitions(folder: PurePosixPath) -> list[tuple[str, str | None]]:
    """Return the columns and values in the names of Hive's folders."""
    pairs = [match.groups() for match in map(PARTITION.fullmatch, folder.parts) if match]
    return [(name, None if value == NULL else unquote(value)) for name, value in pairs]


def find_files(path: str, say: Say) -> list[File]:
    """Return the files that a path, folder, glob or URI names, sorted.

    Args:
        say: called with a message about files that are left out.

    Raises:
        DataError: there is none.
    """
    if not path.strip():
        raise DataError("the path of the data is empty; name a file, or . for this folder")
    try:
        local = pyarrow.fs.LocalFileSystem(), os.path.expanduser(path)
        filesystem, inner = pyarrow.fs.FileSystem.from_uri(path) if "://" in path else local
        found, left_out = match_files(filesystem, inner)
    except DataError:
        raise
    except (OSError, ValueError) as error:  # pyarrow's are of both kinds
        raise DataError(f"{path}: cannot be read: {error}") from error
    if not found:
        deeper = f"; {path.rstrip('/')}/** looks into folders" if glob.has_magic(path) else ""
        raise DataError(f"{path}: no such file, and no file in it that ends in {', '.join(SUFFIXES)}{deeper}")
    if left_out:
        more = f" and {len(left_out) - MAX_SHOWN} more" * (len(left_out) > MAX_SHOWN)
        say(f"{path}: left out, by how they end: {', '.join(left_out[:MAX_SHOWN])}{more}; name a file to read it")
    return found


def match_files(filesystem: pyarrow.fs.FileSystem, path: str) -> tuple[list[File], list[str]]:
    """Return the files that a path names, and the names of matches that are left out for their suffix.

    As much of the path as exists is taken literally, brackets and all. The rest is a glob.

    Raises:
        DataError: a data set that `Dataset.save_to_disk` wrote.
    """
    parts = path.rstrip("/").split("/")
    depth = len(parts)
    while depth and filesystem.get_file_info("/".join(parts[:depth]) or "/").type == pyarrow.fs.FileType.NotFound:
        depth -= 1
    pattern = "/".join(parts[depth:])
    base = "/".join(parts[:depth]) or ("/" if path.startswith("/") else ".")
    if pattern and not glob.has_magic(pattern):
        return [], []
    if filesystem.get_file_info(base).is_file:
        return ([] if pattern else [File(filesystem, base)]), []
    suffix_groups: list[tuple[str, ...]] = [SUFFIXES, (".txt",), *[("",)] * bool(pattern)]
    pattern = pattern or "**"
    matches = re.compile(glob_translate(pattern)).match
    recursive = "/" in pattern or "**" in pattern
    entries = filesystem.get_file_info(pyarrow.fs.FileSelector(base, recursive=recursive))
    inside = {entry.path[len(base.rstrip("/")) + 1 :]: entry.path for entry in entries if entry.is_file}
    paths = [path for name, path in sorted(inside.items()) if matches(name) and not re.search(r"(^|/)\.", name)]
    saved = [PurePosixPath(path).parent for path in paths if PurePosixPath(path).name in SAVE_TO_DISK_FILES]
    if saved and any(path.endswith("state.json") for path in paths):
        folder = min(saved, key=lambda folder: len(folder.parts))
        raise DataError(f"{folder}: a data set that `Dataset.save_to_disk` wrote; name it by itself: hf:{folder}")
    files = [File(filesystem, path, base) for path in paths]
    by_suffix = ([file for file in files if file.suffix.endswith(suffixes)] for suffixes in suffix_groups)
    chosen = next(filter(None, by_suffix), [])
    others = {PurePosixPath(file.path).name for file in files if file not in chosen}
    return chosen, sorted(name for name in others if chosen and not name.startswith("_"))  # `_` files are Spark's own


def task_names(files: Sequence[File]) -> list[str]:
    """Return the task of each file's rows, for rows that name none.

    It is the file's stem; with its suffix where files differ in that alone; and with as many folders as tell apart
    files of one name.
    """
    suffixes: dict[tuple[tuple[str, ...], str], set[str]] = {}
    for file in files:
        suffixes.setdefault((file.folders, file.stem), set()).add(file.suffix)
    names = [file.stem + file.suffix * (len(suffixes[file.folders, file.stem]) > 1) for file in files]
    folders: dict[str, set[tuple[str, ...]]] = {}
    for file, name in zip(files, names, strict=True):
        folders.setdefault(name, set()).add(file.folders)
    return [
        "/".join((*distinct_tail(file.folders, folders[name]), name)) for file, name in zip(files, names, strict=True)
    ]


def distinct_tail(folder: tuple[str, ...], folders: set[tuple[str, ...]]) -> tuple[str, ...]:
    """Return the last parts of a folder, as many as tell all folders apart; none if there is only one folder."""
    longest = max(map(len, folders))
    for count in range(longest):
        if len({parts[-count:] if count else () for parts in folders}) == len(folders):
            return folder[-count:] if count else ()
    return folder
