"""Files and folders in object storage, by pyarrow, with the methods of `pathlib.Path`."""

import errno
import fnmatch
import hashlib
import io
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pyarrow
from pyarrow import fs

from rayml.errors import StorageError

REWRITE_SECONDS = 5
"""The least time between two writes of a growing file."""
BLOCK_BYTES = 32 * 2**20
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Remote:
    """A file or folder on a pyarrow filesystem, with the methods of `pathlib.Path` that runs use.

    Every method raises StorageError if the storage does not answer, or refuses. A missing file is a
    FileNotFoundError, as usual.
    """

    fs: fs.FileSystem
    path: str
    """Within the filesystem."""
    address: str
    """The URI without its query."""
    query: str
    """The filesystem's settings at the end of the URI, from the question mark on."""

    def __str__(self) -> str:
        return self.address + self.query

    def __truediv__(self, name: str) -> "Remote":
        return replace(self, path=f"{self.path}/{name}", address=f"{self.address}/{name}")

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def parent(self) -> "Remote":
        above, address = (text.rpartition("/")[0] for text in (self.path, self.address))
        return replace(self, path=above, address=address)

    def exists(self) -> bool:
        return self._type() != fs.FileType.NotFound

    def is_dir(self) -> bool:
        return self._type() == fs.FileType.Directory

    def _type(self) -> fs.FileType:
        with storage_errors(self):
            return self.fs.get_file_info(self.path).type

    def iterdir(self) -> Iterator["Remote"]:
        with storage_errors(self):
            infos = self.fs.get_file_info(fs.FileSelector(self.path, allow_not_found=True))
        return (self / info.base_name for info in infos)

    def glob(self, pattern: str) -> Iterator["Remote"]:
        """Yield the entries of this folder, not of those in it, that match a pattern."""
        return (entry for entry in self.iterdir() if fnmatch.fnmatch(entry.name, pattern))

    def mkdir(self, parents: bool = True, exist_ok: bool = True) -> None:
        with storage_errors(self):
            self.fs.create_dir(self.path, recursive=parents)

    def open(self, mode: str, buffering: int = -1) -> "GrowingFile":
        """Open to add lines (`a`)."""
        if mode != "a":
            raise ValueError(f"{self}: read_bytes() and write_bytes() are for mode {mode!r}")
        return GrowingFile(self)

    def sha256(self) -> str:
        """Return the checksum of a file. It is read in large blocks, since each is a request."""
        with storage_errors(self), self.fs.open_input_stream(self.path, buffer_size=BLOCK_BYTES) as file:
            digest = hashlib.sha256()
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
            return digest.hexdigest()

    def size_and_time(self) -> tuple[int, float]:
        """Return a file's size in bytes, and when it was written, in seconds."""
        with storage_errors(self):
            info = self.fs.get_file_info(self.path)
        if info.type == fs.FileType.NotFound:
            raise FileNotFoundError(errno.ENOENT, "no such file", str(self))
        return info.size, (info.mtime_ns or time.time_ns()) / 1e9

    def read_bytes(self) -> bytes:
        with storage_errors(self), self.fs.open_input_stream(self.path) as file:
            return file.read()

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def write_bytes(self, data: bytes) -> None:
        with storage_errors(self), self.fs.open_output_stream(self.path) as file:
            file.write(data)

    def write_text(self, text: str, encoding: str = "utf-8") -> None:
        self.write_bytes(text.encode(encoding))

    def touch(self) -> None:
        self.write_bytes(b"")

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            with storage_errors(self):
                self.fs.delete_file(self.path)
        except FileNotFoundError:
            if not missing_ok:
                raise


class GrowingFile(io.TextIOBase):
    """A growing text file in storage that takes whole objects only: now and then all of it is written again.

    That takes at most a hundredth of the time. If the storage does not answer, the lines wait for the next write.
    """

    def __init__(self, file: Remote):
        self.file, self.next_write = file, 0.0
        self.text = [file.read_text()] if file.exists() else []

    def write(self, text: str) -> int:
        self.text.append(text)
        if time.monotonic() >= self.next_write:
            self.flush()
        return len(text)

    def flush(self) -> None:
        started = time.monotonic()
        try:
            self.file.write_text("".join(self.text))
        except StorageError as error:
            log.warning("%s; tried again later", error)
        elapsed = time.monotonic() - started
        self.next_write = started + elapsed + max(REWRITE_SECONDS, 99 * elapsed)

    def close(self) -> None:
        if not self.closed:
            self.file.write_text("".join(self.text))
        super().close()


@contextmanager
def storage_errors(path: object) -> Iterator[None]:
    """Raise StorageError, with the path, if the storage does not answer, or refuses."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, pyarrow.ArrowException) as error:
        raise StorageError(f"{path}: {error}") from error
