"""Files and folders of a run, on this machine or in object storage.

A file is replaced in one step, so that neither a reader nor a crash ever leaves half of it.
"""

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyarrow import fs

from rayml.errors import StorageError
from rayml.runs.remote import Remote, storage_errors

AnyPath = Path | Remote
SETTLED_SECONDS = 5
"""File times are coarse: a file that changed less than this ago may change again, and keep its size and time."""
_checksums: dict[tuple[str, int, float], str] = {}


def filesystem(path: str) -> tuple[fs.FileSystem, str]:
    """Return the pyarrow filesystem of a folder or a URI (`s3://`, `gs://`, `hdfs://`, `file://`), and the path in it.

    Raises:
        OSError, ValueError: pyarrow knows no such filesystem, or cannot reach it.
    """
    if "://" in path:
        return fs.FileSystem.from_uri(path)
    return fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(path))


def parse_path(path: str | AnyPath) -> AnyPath:
    """Return the file or folder that a path or a URI names, such as `runs/first` or `s3://bucket/runs/first`.

    Raises:
        StorageError: pyarrow knows no such filesystem, or cannot reach it.
    """
    if isinstance(path, Remote):
        return path
    if "://" not in str(path):
        return Path(path).expanduser().absolute()
    address, mark, query = str(path).partition("?")
    with storage_errors(path):
        store, inner = fs.FileSystem.from_uri(str(path))
    if isinstance(store, fs.LocalFileSystem):
        return Path(inner)
    if not inner:
        raise StorageError(f"{path}: names no bucket")
    return Remote(store, inner.rstrip("/"), address.rstrip("/"), mark + query)


def checksum(file: AnyPath) -> str:
    """Return the SHA-256 of a file. It is cached until the file's size or time changes."""
    if isinstance(file, Remote):
        size, changed = file.size_and_time()
    else:
        status = file.stat()
        size, changed = status.st_size, status.st_mtime
    key = str(file), size, changed
    digest = _checksums.get(key) or _read_checksum(file)
    if time.time() - changed > SETTLED_SECONDS:
        _checksums[key] = digest
    return digest


def _read_checksum(file: AnyPath) -> str:
    if isinstance(file, Remote):
        return file.sha256()
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def list_matching(folder: AnyPath, pattern: str) -> list[AnyPath]:
    """Return a folder's entries that match a pattern, sorted by name."""
    return sorted(folder.glob(pattern), key=lambda path: path.name)


def write_atomically(file: AnyPath, text: str) -> None:
    """Write a file in one step: a reader, or a crash, sees either the old or the new content."""
    if isinstance(file, Remote):
        file.write_text(text)
        return
    part = file.with_name(f"{file.name}.{os.getpid()}.part")  # another process may write the same file
    part.write_text(text, encoding="utf-8")
    os.replace(part, file)


@contextmanager
def local_copy(folder: AnyPath) -> Iterator[Path]:
    """Yield a local folder with a folder's files: the folder itself if it is local."""
    if isinstance(folder, Path):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="rayml-") as copy:
        with storage_errors(folder):
            fs.copy_files(folder.path, copy, folder.fs, fs.LocalFileSystem())
        yield Path(copy)


def copy_folder(folder: Path, to: AnyPath) -> None:
    """Copy the files of a local folder."""
    if isinstance(to, Path):
        for file in filter(Path.is_file, folder.rglob("*")):
            copy = to / file.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
        return
    with storage_errors(to):
        fs.copy_files(str(folder), to.path, fs.LocalFileSystem(), to.fs)


@contextmanager
def local_output(folder: AnyPath) -> Iterator[Path]:
    """Yield the path of a local folder to be made, which then becomes `folder`, or is copied there.

    A local `folder` is whole, or is not there at all: it is made beside, and renamed at the end.
    """
    if isinstance(folder, Path):
        part = folder.with_name(folder.name + ".part")
        remove(part)  # of a process that was killed
        try:
            yield part
            part.rename(folder)
        finally:
            remove(part)
        return
    with tempfile.TemporaryDirectory(prefix="rayml-") as temporary:
        local = Path(temporary, folder.name)
        yield local
        copy_folder(local, folder)


def remove(folder: AnyPath) -> None:
    """Remove a folder and its content, if it exists."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
    elif folder.exists():
        with storage_errors(folder):
            folder.fs.delete_dir(folder.path)
