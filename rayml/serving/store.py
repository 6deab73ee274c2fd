"""Adapters on shared storage, from which all replicas serve.

    ROOT/OWNER/ID/{adapter_config.json, adapter_model.safetensors, rayml.json, manifest.json}

The manifest is written last, and atomically: an adapter exists once its manifest does. While an adapter is learned in
the background, its folder holds the request, `request.json`.
"""

import contextlib
import hashlib
import json
import logging
import re
import tempfile
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pyarrow import fs
from pydantic import BaseModel, ConfigDict

from rayml.errors import ConfigError, RunError
from rayml.runs.files import filesystem
from rayml.serving.adapter_files import FILES
from rayml.serving.errors import ApiError

MANIFEST = "manifest.json"
REQUEST = "request.json"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}\.[0-9a-f]{16}")
PUBLIC = "public"
UNNAMED = "adapter"
"""The name of adapters that were given none. They are found by their ids alone."""
ORPHAN_SECONDS = 3600
log = logging.getLogger(__name__)


class DamagedError(RunError):
    """An adapter's files are not those that were published. The client that asks for it is not at fault."""


class Manifest(BaseModel):
    """What is known about an adapter besides its files. Times are seconds since 1970."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    name: str
    created_at: float
    expires_at: float | None = None
    examples: int = 0
    steps: int = 0
    loss_before: float | None = None
    loss_after: float | None = None
    seconds: float = 0
    files: dict[str, str] = {}
    """The SHA-256 of each file, by its name."""

    @property
    def expired(self) -> bool:
        return self.expires_at is not None and self.expires_at < time.time()


def adapter_id(name: str, content: Any) -> str:
    """Return `NAME.HASH`. The same content has the same id, always and everywhere."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=True)
    return f"{name}.{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def owner_of(api_key: str | None) -> str:
    """Return the owner of the adapters of a key without a name; None: of those that are made without any key."""
    return hashlib.sha256(api_key.encode()).hexdigest()[:16] if api_key else PUBLIC


def damaged_error(owner: str, adapter: str, error: DamagedError) -> ApiError:
    """Log that an adapter's files are damaged, and return the client's error: it is the server's fault."""
    log.error("adapter %s of %s is damaged in the store: %s", adapter, owner, error)
    return ApiError(500, f"adapter {adapter} is damaged in the server's store", "model", "adapter_damaged")


class AdapterStore:
    """The adapters of a server, by owner.

    Args:
        root: a folder, or a URI (`s3://bucket/path`, `gs://`, `file://`).
        create: whether the folder is made if there is none.

    Every method may raise OSError, if the storage does not answer. That is not the same as an adapter that is missing.

    Raises:
        ConfigError: the root cannot be made or reached, or is not there.
    """

    def __init__(self, root: str, create: bool = True):
        self.root = root
        try:
            self.fs, self.path = filesystem(root)
            if create:
                self.fs.create_dir(self.path, recursive=True)
            elif self.fs.get_file_info(self.path).type != fs.FileType.Directory:
                raise FileNotFoundError("no folder is there")
        except (OSError, ValueError) as error:
            raise ConfigError(f"store: {root!r} cannot be used: {error}") from error

    def publish(self, owner: str, manifest: Manifest, folder: Path) -> Manifest:
        """Copy an adapter's folder into the store, and return the manifest with checksums.

        Others see the adapter once it is complete.
        """
        existing = self._manifest(owner, manifest.id)
        if existing and not existing.expired:  # another replica was quicker
            return existing
        target = self._folder(owner, manifest.id)
        self.fs.create_dir(target, recursive=True)
        names = [name for name in FILES if (folder / name).exists()]
        for name in names:
            self._write_whole(f"{target}/{name}", (folder / name).read_bytes())
        # Two replicas may publish the same adapter at once, with weights that differ in the last bit. Either may win,
        # but the manifest has to match the files that stay.
        checksums = self._checksums(owner, manifest.id, names)
        while True:
            published = manifest.model_copy(update={"files": checksums})
            self._write_manifest(owner, published)
            checksums_now = self._checksums(owner, manifest.id, names)
            if checksums_now == checksums:
                return published
            checksums = checksums_now

    def renew(self, owner: str, manifest: Manifest, expires_at: float | None) -> Manifest:
        """Change when an adapter expires; None: never."""
        renewed = manifest.model_copy(update={"expires_at": expires_at})
        self._write_manifest(owner, renewed)
        return renewed

    def find(self, owner: str, reference: str) -> Manifest | None:
        """Return the adapter with that id, or the newest with that name; None if there is none, or it has expired."""
        if ID.fullmatch(reference):
            ids = [reference]
        elif NAME.fullmatch(reference) and reference != UNNAMED:
            ids = [adapter for adapter in self._ids(owner) if adapter.rpartition(".")[0] == reference]
        else:
            return None
        return max(self._manifests(owner, ids), key=lambda manifest: manifest.created_at, default=None)

    def page(self, owner: str, after: str = "", most: int = 1000) -> tuple[list[Manifest], str | None]:
        """Return at most `most` of an owner's adapters, in the order of their ids, those after the id `after`.

        Returns:
            the adapters, and the `after` of the next page; None if this is the last page.
        """
        ids = sorted(adapter for adapter in self._ids(owner) if adapter > after)
        return self._manifests(owner, ids[:most]), ids[most - 1] if len(ids) > most else None

    def count(self, owner: str) -> int:
        """Return how many adapters an owner has, including expired ones that were not deleted yet."""
        return len(self._ids(owner))

    def fetch(self, owner: str, manifest: Manifest, folder: Path, most_bytes: int = 1 << 40) -> None:
        """Copy an adapter's files into a local folder.

        Raises:
            DamagedError: a file is gone, or is not the one that was published.
            RunError: a file is larger than `most_bytes`.
            OSError: the storage does not answer.
        """
        for name in manifest.files:
            size = self.fs.get_file_info(f"{self._folder(owner, manifest.id)}/{name}").size or 0
            if size > most_bytes:
                raise RunError(f"{name} has {size} bytes; at most {most_bytes}")
            (folder / name).write_bytes(self.read_verified(owner, manifest, name))

    def read_verified(self, owner: str, manifest: Manifest, name: str) -> bytes:
        """Return the content of an adapter's file, checked against its checksum. Raises as `fetch` does."""
        data = self.read(owner, manifest.id, name)
        if hashlib.sha256(data).hexdigest() != manifest.files[name]:
            raise DamagedError(f"{name} is not what was published (its checksum differs)")
        return data

    def read(self, owner: str, adapter: str, name: str) -> bytes:
        if name not in FILES:
            raise RunError(f"{name[:120]!r} is not a file of an adapter")
        data = self._read(owner, adapter, name)
        if data is None:
            raise DamagedError(f"{name} is gone")
        return data

    def write_request(self, owner: str, adapter: str, request: bytes) -> None:
        """Save the request of an adaptation in the background, so that any replica can start it again."""
        folder = self._folder(owner, adapter)
        self.fs.create_dir(folder, recursive=True)
        self._write_whole(f"{folder}/{REQUEST}", request)

    def read_request(self, owner: str, adapter: str) -> bytes | None:
        """Return what `write_request` saved; None if there is nothing."""
        return self._read(owner, adapter, REQUEST) if ID.fullmatch(adapter) else None

    def delete_request(self, owner: str, adapter: str) -> None:
        """Delete what `write_request` saved, if anything."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.delete_file(f"{self._folder(owner, adapter)}/{REQUEST}")

    def owners(self) -> list[str]:
        """Return all who have adapters in the store."""
        folders = [
            info.base_name
            for info in self.fs.get_file_info(fs.FileSelector(self.path))
            if info.type == fs.FileType.Directory
        ]
        return sorted(owner for owner in folders if self._ids(owner))

    def move(self, owner: str, adapter: str, to: str) -> None:
        """Give an adapter to another owner. It is copied before it is deleted.

        Raises:
            DamagedError: its files are not those that were published.
        """
        manifest = self._manifest(owner, adapter)
        if manifest is None:
            raise RunError(f"{owner} has no adapter {adapter}")
        if to == owner:
            return  # the copy is the original, and must not be deleted
        with tempfile.TemporaryDirectory() as folder:
            self.fetch(owner, manifest, Path(folder))
            self.publish(to, manifest, Path(folder))
        self.delete(owner, adapter)

    def delete(self, owner: str, adapter: str) -> None:
        """Delete an adapter: its manifest first, so that nobody finds an incomplete one."""
        folder = self._folder(owner, adapter)
        with contextlib.suppress(FileNotFoundError):  # another replica was quicker
            self.fs.delete_file(f"{folder}/{MANIFEST}")
        with contextlib.suppress(FileNotFoundError):
            self.fs.delete_dir(folder)

    def sweep(self) -> None:
        """Delete expired adapters, and what was left behind by replicas that died while publishing."""
        for owner in self.owners():
            for adapter in self._ids(owner):
                manifest = self._manifest(owner, adapter)
                if manifest.expired if manifest else self._is_orphan(owner, adapter):
                    self.delete(owner, adapter)

    def _is_orphan(self, owner: str, adapter: str) -> bool:
        """Return whether a folder has no manifest, and nobody has written to it for long."""
        files = self.fs.get_file_info(fs.FileSelector(self._folder(owner, adapter), allow_not_found=True))
        newest = max((info.mtime_ns or 0 for info in files), default=0) / 1e9
        return newest < time.time() - ORPHAN_SECONDS and MANIFEST not in {info.base_name for info in files}

    def _folder(self, owner: str, adapter: str) -> str:
        return f"{self.path}/{owner}/{adapter}"

    def _ids(self, owner: str) -> list[str]:
        selector = fs.FileSelector(f"{self.path}/{owner}", allow_not_found=True)
        return [info.base_name for info in self.fs.get_file_info(selector) if ID.fullmatch(info.base_name)]

    def _manifests(self, owner: str, ids: list[str]) -> list[Manifest]:
        if len(ids) == 1:
            manifests = [self._manifest(owner, ids[0])]
        else:
            with ThreadPoolExecutor(32) as pool:  # object storage takes a while for each file
                manifests = list(pool.map(lambda adapter: self._manifest(owner, adapter), ids))
        return [manifest for manifest in manifests if manifest and not manifest.expired]

    def _manifest(self, owner: str, adapter: str) -> Manifest | None:
        try:
            data = self._read(owner, adapter, MANIFEST)
            manifest = Manifest.model_validate_json(data) if data is not None else None
        except ValueError as error:
            log.warning("adapter %s/%s: its manifest cannot be read: %s", owner, adapter, error)
            return None
        return manifest if manifest and manifest.id == adapter else None

    def _checksums(self, owner: str, adapter: str, names: list[str]) -> dict[str, str]:
        return {name: hashlib.sha256(self.read(owner, adapter, name)).hexdigest() for name in names}

    def _read(self, owner: str, adapter: str, name: str) -> bytes | None:
        try:
            with self.fs.open_input_stream(f"{self._folder(owner, adapter)}/{name}") as file:
                return file.read()
        except FileNotFoundError:
            return None

    def _write_manifest(self, owner: str, manifest: Manifest) -> None:
        path = f"{self._folder(owner, manifest.id)}/{MANIFEST}"
        self._write_whole(path, manifest.model_dump_json().encode())

    def _write_whole(self, path: str, data: bytes) -> None:
        """Write a file so that nobody sees a part of it."""
        part = f"{path}.{uuid.uuid4().hex}.part"
        with self.fs.open_output_stream(part) as file:
            file.write(data)
        self.fs.move(part, path)


def all_manifests(store: AdapterStore, owner: str) -> Iterator[Manifest]:
    """Yield all adapters of an owner."""
    after: str | None = ""
    while after is not None:
        manifests, after = store.page(owner, after)
        yield from manifests
