"""The files that a path names, on this machine or in object storage, and what is in them."""

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
from rayml.tasks.formats.guess import TARGETS, guessed

Say = Callable[[str], None]
SUFFIXES = (
    *(".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv"),
    *conll.SUFFIXES,
)
"""Of the files that are read in a folder; `.txt` where there is none of these. A file that is named may end in any."""
PACKED = ".gz", ".zst", ".bz2", ".xz"
SHARD = re.compile(r"-\d+-of-\d+.*$")
PARTITION = re.compile(r"([^=]+)=(.*)")
NULL = "__HIVE_DEFAULT_PARTITION__"
SAVED = "dataset_info.json", "dataset_dict.json"
"""In a folder that `Dataset.save_to_disk` wrote, beside what it tells of the Arrow files in it."""
MOST_SHOWN = 5
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
    root: str = ""
    """The folder that was named: those above it say nothing of its rows. Of a file that was named, its own."""

    @property
    def place(self) -> str:
        """Where it lies, however it was named."""
        is_local = isinstance(self.filesystem, pyarrow.fs.LocalFileSystem)
        return os.path.abspath(self.path) if is_local else f"{self.filesystem.type_name}:{self.path}"

    @property
    def folders(self) -> tuple[str, ...]:
        """The names of the folders above it, without those that stand for a value of all rows in them."""
        return tuple(part for part in PurePosixPath(self.place).parent.parts if not PARTITION.fullmatch(part))

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
        """Its name without suffixes, and without the number of a shard; a part's is that of the whole, a folder."""
        stem = SHARD.sub("", os.path.splitext(self.unpacked_name)[0])
        in_folder = re.match(r"part-\d+", stem) or self.unpacked_name == "task.json"  # Spark's; BIG-bench's
        named = [value for name, value in partitions(PurePosixPath(self.path).parent) if name == "task" and value]
        whole = [*self.folders[-1:], *named]
        return whole[-1] if whole and (in_folder or self.columns) else stem

    @property
    def columns(self) -> dict[str, str | None]:
        """What its folders say of all its rows: `task=mail/lang=de/part-0.parquet`, as Hive lays tables out."""
        parts = PurePosixPath(self.path).parent.parts[len(PurePosixPath(self.root).parts) :]
        return dict(partitions(PurePosixPath(*parts))) if self.root else {}

    def told(self, own: Collection[str], named: Collection[str]) -> dict[str, str | None]:
        """Return those of its folders' columns that its rows lack: the task's, the target's, and those asked for.

        Args:
            own: its rows' columns.
            named: columns that were asked for.
        """
        has_target = "target" in own or "target" in guessed(own, {})
        lacking = {"task", *named, *(() if has_target else TARGETS)}
        there = {name.casefold() for name in own}
        return {
            name: value
            for name, value in self.columns.items()
            if {name, name.casefold()} & lacking and name.casefold() not in there
        }

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
        except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error, pyarrow.ArrowException) as error:
            raise DataError(f"{self.path}: cannot be read: {error}; write or copy the file anew") from error


def partitions(folder: PurePosixPath) -> list[tuple[str, str | None]]:
    """Return the columns and values that folders stand for."""
    found = [match.groups() for match in map(PARTITION.fullmatch, folder.parts) if match]
    return [(name, None if value == NULL else unquote(value)) for name, value in found]


def files(path: str, say: Say) -> list[File]:
    """Return the files that a path, folder, glob or URI names, in order.

    Args:
        say: told what is left out.

    Raises:
        DataError: there is none.
    """
    try:
        local = pyarrow.fs.LocalFileSystem(), os.path.expanduser(path)
        filesystem, inner = pyarrow.fs.FileSystem.from_uri(path) if "://" in path else local
        found, left = named(filesystem, inner)
    except DataError:
        raise
    except (OSError, ValueError) as error:  # pyarrow's are of both kinds
        raise DataError(f"{path}: cannot be read: {error}") from error
    if not found:
        deeper = f"; {path.rstrip('/')}/** looks into folders" if glob.has_magic(path) else ""
        raise DataError(f"{path}: no such file, and no file in it that ends in {', '.join(SUFFIXES)}{deeper}")
    if left:
        more = f" and {len(left) - MOST_SHOWN} more" * (len(left) > MOST_SHOWN)
        say(f"{path}: left out, by how they end: {', '.join(left[:MOST_SHOWN])}{more}; what is named itself is read")
    return found


def named(filesystem: pyarrow.fs.FileSystem, path: str) -> tuple[list[File], list[str]]:
    """Return the files that a path names: as it stands, brackets and all, as far as that is there; else as a glob. And
    the names of those that it names, too, but that end in what is left out beside the others.

    Raises:
        DataError: a data set that `Dataset.save_to_disk` wrote.
    """
    parts = path.rstrip("/").split("/")
    there = len(parts)
    while there and filesystem.get_file_info("/".join(parts[:there]) or "/").type == pyarrow.fs.FileType.NotFound:
        there -= 1
    pattern = "/".join(parts[there:])
    base = "/".join(parts[:there]) or ("/" if path.startswith("/") else ".")
    if pattern and not glob.has_magic(pattern):
        return [], []
    if filesystem.get_file_info(base).is_file:
        return ([] if pattern else [File(filesystem, base)]), []
    pattern, suffixes = pattern or "**", [SUFFIXES, (".txt",), *[("",)] * bool(pattern)]
    matches = re.compile(glob_translate(pattern)).match
    deep = "/" in pattern or "**" in pattern
    entries = filesystem.get_file_info(pyarrow.fs.FileSelector(base, recursive=deep))
    inside = {entry.path[len(base.rstrip("/")) + 1 :]: entry.path for entry in entries if entry.is_file}
    shown = {name: path for name, path in sorted(inside.items()) if matches(name) and not re.search(r"(^|/)\.", name)}
    saved = [PurePosixPath(path).parent for path in shown.values() if PurePosixPath(path).name in SAVED]
    if saved and any(path.endswith("state.json") for path in shown.values()):
        folder = min(saved, key=lambda folder: len(folder.parts))
        raise DataError(f"{folder}: a data set that `Dataset.save_to_disk` wrote; name it by itself: hf:{folder}")
    found = [File(filesystem, path, base) for path in shown.values()]
    by_suffix = ([file for file in found if file.suffix.endswith(some)] for some in suffixes)
    taken = next(filter(None, by_suffix), [])
    names = {PurePosixPath(file.path).name for file in found if file not in taken}
    return taken, sorted(name for name in names if taken and not name.startswith("_"))  # Spark's own


def task_names(found: Sequence[File]) -> list[str]:
    """Return what the tasks of files are called, where their rows do not say: as the file, with its suffix where others
    beside it differ in that alone; and where several folders have one of that name, with so many of the folders as tell
    them apart."""
    suffixes: dict[tuple[tuple[str, ...], str], set[str]] = {}
    for file in found:
        suffixes.setdefault((file.folders, file.stem), set()).add(file.suffix)
    names = [file.stem + file.suffix * (len(suffixes[file.folders, file.stem]) > 1) for file in found]
    folders: dict[str, set[tuple[str, ...]]] = {}
    for file, name in zip(found, names, strict=True):
        folders.setdefault(name, set()).add(file.folders)
    return ["/".join((*tail(file.folders, folders[name]), name)) for file, name in zip(found, names, strict=True)]


def tail(folder: tuple[str, ...], among: set[tuple[str, ...]]) -> tuple[str, ...]:
    """Return the last parts of a folder, as many as tell all of them apart; none of one alone."""
    longest = max(map(len, among))
    count = next(
        n for n in range(longest + 1) if n == longest or len({one[-n:] if n else () for one in among}) == len(among)
    )
    return folder[-count:] if count else ()
