"""Adapters on shared storage: what every replica, and every replica to come, serves from.

    ROOT/OWNER/ID/{adapter_config.json, adapter_model.safetensors, rayml.json, manifest.json}

The manifest is written last and in one piece: an adapter is there when its manifest is. Before that, a lesson that is
learned in the background has its request there, `lesson.json`.
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
LESSON = "lesson.json"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}\.[0-9a-f]{16}")
PUBLIC = "public"
UNNAMED = "adapter"
"""What an id begins with that was given no name: those are asked for by their ids alone."""
ORPHAN_SECONDS = 3600
log = logging.getLogger(__name__)


class DamagedError(RunError):
    """Files of an adapter are not what was published: nobody's fault who asks for it."""


class Manifest(BaseModel):
    """What is known of an adapter beside its files. Times are seconds since 1970."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    name: str
    created_at: float
    expires_at: float | None
    examples: int
    steps: int
    loss_before: float | None
    loss_after: float | None
    seconds: float
    files: dict[str, str] = {}
    """SHA-256 of each."""

    @property
    def expired(self) -> bool:
        return self.expires_at is not None and self.expires_at < time.time()


def adapter_id(name: str, content: Any) -> str:
    """Return `NAME.HASH`: the same content gives the same id, always and everywhere."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=True)
    return f"{name}.{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def owner_of(api_key: str | None) -> str:
    """Return whose adapters a key without a name sees; without keys, all are everyone's."""
    return hashlib.sha256(api_key.encode()).hexdigest()[:16] if api_key else PUBLIC


def damaged(owner: str, adapter: str, error: DamagedError) -> ApiError:
    """Log that an adapter's files are damaged, and return what the client is told: it is the server's fault."""
    log.error("adapter %s of %s is damaged in the store: %s", adapter, owner, error)
    return ApiError(500, f"adapter {adapter} is damaged in the server's store", "model", "adapter_damaged")


class AdapterStore:
    """Args: root: a folder, or a URI (`s3://bucket/path`, `gs://`, `file://`).

    Every method may raise OSError: the storage does not answer. That is not the same as an adapter that is not there.

    Raises:
        ConfigError: the root cannot be made or reached.
    """

    def __init__(self, root: str):
        self.root = root
        try:
            self.fs, self.path = filesystem(root)
            self.fs.create_dir(self.path, recursive=True)
        except (OSError, ValueError) as error:
            raise ConfigError(f"store: {root!r} cannot be used: {error}") from error

    def publish(self, owner: str, manifest: Manifest, folder: Path) -> Manifest:
        """Copy an adapter's folder here; it is seen by all when it is whole. Returns the manifest with checksums."""
        found = self._manifest(owner, manifest.id)
        if found and not found.expired:  # somebody else was quicker
            return found
        there = f"{self.path}/{owner}/{manifest.id}"
        self.fs.create_dir(there, recursive=True)
        present = [name for name in FILES if (folder / name).exists()]
        for name in present:
            self._write_whole(f"{there}/{name}", (folder / name).read_bytes())
        # Two replicas may publish the same adapter at once, with weights that differ in the last bit. Either will do,
        # but the manifest has to speak of those that stayed.
        sums = self._checksums(owner, manifest.id, present)
        while True:
            whole = manifest.model_copy(update={"files": sums})
            self._write_whole(f"{there}/{MANIFEST}", whole.model_dump_json().encode())
            now = self._checksums(owner, manifest.id, present)
            if now == sums:
                with contextlib.suppress(FileNotFoundError):  # most were not learned in the background
                    self.fs.delete_file(f"{there}/{LESSON}")
                return whole
            sums = now

    def renew(self, owner: str, manifest: Manifest, expires_at: float | None) -> Manifest:
        """Let an adapter live until then; None: for ever."""
        renewed = manifest.model_copy(update={"expires_at": expires_at})
        self._write_whole(f"{self.path}/{owner}/{manifest.id}/{MANIFEST}", renewed.model_dump_json().encode())
        return renewed

    def _checksums(self, owner: str, adapter: str, names: list[str]) -> dict[str, str]:
        return {name: hashlib.sha256(self.read(owner, adapter, name)).hexdigest() for name in names}

    def find(self, owner: str, reference: str) -> Manifest | None:
        """Return the adapter of that id, or the newest of that name; None if there is none, or it has expired."""
        if ID.fullmatch(reference):
            ids = [reference]
        elif NAME.fullmatch(reference) and reference != UNNAMED:
            ids = [adapter for adapter in self._ids(owner) if adapter.rpartition(".")[0] == reference]
        else:
            return None
        return max(self._manifests(owner, ids), key=lambda manifest: manifest.created_at, default=None)

    def page(self, owner: str, after: str = "", most: int = 1000) -> tuple[list[Manifest], str | None]:
        """Return an owner's adapters in the order of their ids, from the one behind `after` on.

        Returns:
            at most `most` of them, and what the next page comes after; None, if this was the last.
        """
        ids = sorted(i for i in self._ids(owner) if i > after)
        return self._manifests(owner, ids[:most]), ids[most - 1] if len(ids) > most else None

    def _manifests(self, owner: str, ids: list[str]) -> list[Manifest]:
        if len(ids) == 1:
            found = [self._manifest(owner, ids[0])]
        else:
            with ThreadPoolExecutor(32) as pool:  # on object storage each takes its time
                found = list(pool.map(lambda adapter: self._manifest(owner, adapter), ids))
        return [manifest for manifest in found if manifest and not manifest.expired]

    def count(self, owner: str) -> int:
        """Return how many adapters an owner has, expired ones that were not swept yet among them."""
        return len(self._ids(owner))

    def fetch(self, owner: str, manifest: Manifest, folder: Path, most_bytes: int = 1 << 40) -> None:
        """Copy an adapter's files into a local folder.

        Raises:
            DamagedError: a file is gone, or is not what was published.
            RunError: one is larger than `most_bytes`.
            OSError: the storage does not answer.
        """
        for name in manifest.files:
            size = self.fs.get_file_info(f"{self.path}/{owner}/{manifest.id}/{name}").size or 0
            if size > most_bytes:
                raise RunError(f"{name} has {size} bytes; at most {most_bytes}")
            (folder / name).write_bytes(self.verified(owner, manifest, name))

    def verified(self, owner: str, manifest: Manifest, name: str) -> bytes:
        """Return a file of an adapter, as it was published; raises as `fetch` does."""
        data = self.read(owner, manifest.id, name)
        if hashlib.sha256(data).hexdigest() != manifest.files[name]:
            raise DamagedError(f"{name} is not what was published (its checksum differs)")
        return data

    def read(self, owner: str, adapter: str, name: str) -> bytes:
        if name not in FILES:
            raise RunError(f"{name[:120]!r} is no file of an adapter")
        try:
            with self.fs.open_input_stream(f"{self.path}/{owner}/{adapter}/{name}") as file:
                return file.read()
        except FileNotFoundError:
            raise DamagedError(f"{name} is gone") from None

    def begin(self, owner: str, adapter: str, request: bytes) -> None:
        """Note what is to be learned in the background, so that whoever asks for it can go on with it."""
        there = f"{self.path}/{owner}/{adapter}"
        self.fs.create_dir(there, recursive=True)
        self._write_whole(f"{there}/{LESSON}", request)

    def begun(self, owner: str, adapter: str) -> bytes | None:
        """Return what `begin` noted; None, if there is no such lesson."""
        if not ID.fullmatch(adapter):
            return None
        try:
            with self.fs.open_input_stream(f"{self.path}/{owner}/{adapter}/{LESSON}") as file:
                return file.read()
        except FileNotFoundError:
            return None

    def owners(self) -> list[str]:
        """Return who has adapters here."""
        found = self.fs.get_file_info(fs.FileSelector(self.path))
        return sorted(
            info.base_name for info in found if info.type == fs.FileType.Directory and self._ids(info.base_name)
        )

    def move(self, owner: str, adapter: str, to: str) -> None:
        """Give an adapter to another owner, who has it before the first loses it.

        Raises:
            DamagedError: its files are not what was published.
        """
        manifest = self._manifest(owner, adapter)
        if manifest is None:
            raise RunError(f"{owner} has no adapter {adapter}")
        with tempfile.TemporaryDirectory() as folder:
            self.fetch(owner, manifest, Path(folder))
            self.publish(to, manifest, Path(folder))
        self.delete(owner, adapter)

    def delete(self, owner: str, adapter: str) -> None:
        """Take an adapter away: the manifest first, so that nobody finds half of one."""
        there = f"{self.path}/{owner}/{adapter}"
        with contextlib.suppress(FileNotFoundError):  # somebody else was first
            self.fs.delete_file(f"{there}/{MANIFEST}")
        with contextlib.suppress(FileNotFoundError):
            self.fs.delete_dir(there)

    def sweep(self) -> None:
        """Delete what has expired."""
        for owner in self.owners():
            for adapter in self._ids(owner):
                manifest = self._manifest(owner, adapter)
                if manifest.expired if manifest else self._is_orphan(owner, adapter):
                    self.delete(owner, adapter)

    def _is_orphan(self, owner: str, adapter: str) -> bool:
        """Return whether a folder without a manifest is what somebody left who died while publishing."""
        files = self.fs.get_file_info(fs.FileSelector(f"{self.path}/{owner}/{adapter}", allow_not_found=True))
        newest = max((info.mtime_ns or 0 for info in files), default=0) / 1e9
        return newest < time.time() - ORPHAN_SECONDS and MANIFEST not in {info.base_name for info in files}

    def _ids(self, owner: str) -> list[str]:
        selector = fs.FileSelector(f"{self.path}/{owner}", allow_not_found=True)
        return [info.base_name for info in self.fs.get_file_info(selector) if ID.fullmatch(info.base_name)]

    def _manifest(self, owner: str, adapter: str) -> Manifest | None:
        try:
            with self.fs.open_input_stream(f"{self.path}/{owner}/{adapter}/{MANIFEST}") as file:
                found = Manifest.model_validate_json(file.read())
        except FileNotFoundError:
            return None
        except ValueError as error:
            log.warning("adapter %s/%s: its manifest cannot be read: %s", owner, adapter, error)
            return None
        return found if found.id == adapter else None

    def _write_whole(self, path: str, data: bytes) -> None:
        part = f"{path}.{uuid.uuid4().hex}.part"
        with self.fs.open_output_stream(part) as file:
            file.write(data)
        self.fs.move(part, path)


def every(store: AdapterStore, owner: str) -> Iterator[Manifest]:
    """Yield all adapters of an owner."""
    after: str | None = ""
    while after is not None:
        found, after = store.page(owner, after)
        yield from found
