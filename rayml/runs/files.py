"""Files and folders of a run: of this machine, or of object storage.

A file is written whole or not at all: a reader, or a crash, sees the old one or the new one.
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
from rayml.runs.remote import Remote, answering

AnyPath = Path | Remote
SETTLED_SECONDS = 5
"""After its last change a file's size and time tell it from what it may yet become: clocks of files are coarse."""
_checksums: dict[tuple[str, int, float], str] = {}


def filesystem(path: str) -> tuple[fs.FileSystem, str]:
    """Return the pyarrow filesystem of a folder or a URI (`s3://`, `gs://`, `hdfs://`, `file://`), and the path in it.

    Raises:
        OSError, ValueError: pyarrow knows no such filesystem, or cannot reach it.
    """
    return (
        fs.FileSystem.from_uri(path)
        if "://" in path
        else (fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(path)))
    )


def as_path(path: str | AnyPath) -> AnyPath:
    """Return the place that a path or a URI names, such as `runs/first` or `s3://bucket/runs/first`.

    Raises:
        StorageError: pyarrow knows no such filesystem, or cannot reach it.
    """
    if isinstance(path, Remote):
        return path
    if "://" not in str(path):
        return Path(path).expanduser().absolute()
    address, mark, query = str(path).partition("?")
    with answering(path):
        found, inner = fs.FileSystem.from_uri(str(path))
    if isinstance(found, fs.LocalFileSystem):
        return Path(inner)
    if not inner:
        raise StorageError(f"{path}: names no bucket")
    return Remote(found, inner.rstrip("/"), address.rstrip("/"), mark + query)


def checksum(file: AnyPath) -> str:
    """Return the SHA-256 of a file. One that this process knows, and that has not changed since, is not read again."""
    if isinstance(file, Remote):
        size, changed = file.size_and_time()
    else:
        status = file.stat()
        size, changed = status.st_size, status.st_mtime
    key = str(file), size, changed
    found = _checksums.get(key) or _read_checksum(file)
    if time.time() - changed > SETTLED_SECONDS:
        _checksums[key] = found
    return found


def _read_checksum(file: AnyPath) -> str:
    if isinstance(file, Remote):
        return file.sha256()
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def listed(folder: AnyPath, pattern: str) -> list[AnyPath]:
    """Return what lies in a folder and is named so, by name."""
    return sorted(folder.glob(pattern), key=lambda found: found.name)


def write_whole(file: AnyPath, text: str) -> None:
    """Write a file so that a reader, or a crash, sees the old one or the new one."""
    if isinstance(file, Remote):
        file.write_text(text)
        return
    part = file.with_name(file.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, file)


@contextmanager
def local_copy(folder: AnyPath) -> Iterator[Path]:
    """Yield a folder of this machine with a folder's files: the folder itself, if it lies here."""
    if isinstance(folder, Path):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="rayml-") as here:
        with answering(folder):
            fs.copy_files(folder.path, here, folder.fs, fs.LocalFileSystem())
        yield Path(here)


def deliver(folder: Path, to: AnyPath) -> None:
    """Copy the files of a folder of this machine."""
    if isinstance(to, Path):
        for file in filter(Path.is_file, folder.rglob("*")):
            copy = to / file.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
        return
    with answering(to):
        fs.copy_files(str(folder), to.path, fs.LocalFileSystem(), to.fs)


@contextmanager
def made_here(folder: AnyPath) -> Iterator[Path]:
    """Yield the path of a folder to make on this machine, which then goes to `folder`: that itself, if it lies here.

    Where making it fails, nothing of it stays.
    """
    if isinstance(folder, Path):
        try:
            yield folder
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return
    with tempfile.TemporaryDirectory(prefix="rayml-") as above:
        made = Path(above, folder.name)
        yield made
        deliver(made, folder)


def remove(folder: AnyPath) -> None:
    """Remove a folder with all that is in it, if it is there."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
    elif folder.exists():
        with answering(folder):
            folder.fs.delete_dir(folder.path)
