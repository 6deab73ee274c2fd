"""The adapters in a replica's memory. The least recently used are evicted when they take too many bytes."""

import asyncio
import logging
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from rayml.adapter import Adapter
from rayml.algorithms.inner_loop import Params
from rayml.errors import RunError
from rayml.lm.peft_files import WEIGHTS, AdapterCard
from rayml.serving.adapter_files import AdapterConstraints, read_adapter
from rayml.serving.errors import ApiError
from rayml.serving.store import AdapterStore, DamagedError, Manifest, damaged_error
from rayml.serving.work import Observe

log = logging.getLogger(__name__)
Key = tuple[str, str]
"""An adapter's owner and id."""
T = TypeVar("T")


class AdapterCache:
    """Adapters by (owner, id). A request keeps its adapter, even if that is evicted meanwhile.

    Args:
        adapter_of: makes an adapter on the served model from its weights and its card.
        most_bytes: of all adapters together. The newest stays, whatever its size.
    """

    def __init__(
        self,
        store: AdapterStore,
        fits: AdapterConstraints,
        most_bytes: int,
        adapter_of: Callable[[Params, AdapterCard], Adapter],
        observe: Observe,
    ):
        self.store, self.fits, self.most_bytes = store, fits, most_bytes
        self.adapter_of, self.observe = adapter_of, observe
        self._held: OrderedDict[Key, Adapter] = OrderedDict()
        self._loading: dict[Key, asyncio.Task[Adapter]] = {}
        self._bytes = 0
        self._pool = ThreadPoolExecutor(8, "rayml-store")  # so that slow storage delays nothing else

    async def get(self, owner: str, adapter: str) -> Adapter:
        """Return an adapter. It is read from the store if it is not in memory.

        Raises:
            ApiError: 404, there is no such adapter; 422, it was refused, with the reason; 500, it is damaged.
        """
        key = owner, adapter
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        if key not in self._loading:
            start_task(self._loading, key, self._load(key))
        return await asyncio.shield(self._loading[key])

    def hold(self, owner: str, adapter: str, loaded: Adapter) -> None:
        key = owner, adapter
        self._bytes += loaded.size - (self._held[key].size if key in self._held else 0)
        self._held[key] = loaded
        self._held.move_to_end(key)
        while self._bytes > self.most_bytes and len(self._held) > 1:
            _, evicted = self._held.popitem(last=False)
            self._bytes -= evicted.size
            self.observe("evictions", 1)
        self.observe("cached_adapters", len(self._held))
        self.observe("cached_bytes", self._bytes)

    async def _load(self, key: Key) -> Adapter:
        loaded = await asyncio.get_running_loop().run_in_executor(self._pool, self._read, *key)
        self.observe("loads", 1)
        self.hold(*key, loaded)
        return loaded

    def _read(self, owner: str, adapter: str) -> Adapter:
        with tempfile.TemporaryDirectory() as folder:
            weights, card, _ = fetch_adapter(self.store, owner, adapter, Path(folder), self.fits, self.observe)
        return self.adapter_of(weights, card)


def fetch_adapter(
    store: AdapterStore, owner: str, adapter: str, folder: Path, fits: AdapterConstraints, observe: Observe
) -> tuple[Params, AdapterCard, str]:
    """Copy an adapter's files into a folder and check them; return its weights, its card, and its weights' SHA-256.

    Raises:
        ApiError: 404, there is no such adapter; 422, it was refused, with the reason; 500, its files are damaged.
    """
    try:
        manifest = _fetch(store, owner, adapter, folder, fits.most_bytes)
        return *read_adapter(folder, fits), manifest.files[WEIGHTS]
    except DamagedError as error:
        raise damaged_error(owner, adapter, error) from None
    except RunError as error:
        log.error("adapter %s of %s refused: %s", adapter, owner, error)
        observe("refused", 1)
        raise ApiError(422, f"adapter {adapter} was refused: {error}", "model", "adapter_refused") from None


def _fetch(store: AdapterStore, owner: str, adapter: str, folder: Path, most_bytes: int) -> Manifest:
    for pause in (0.2, 1.0, None):
        manifest = store.find(owner, adapter)
        if manifest is None:
            raise ApiError(404, f"no adapter {adapter}", "model", "model_not_found")
        try:
            store.fetch(owner, manifest, folder, most_bytes)
            return manifest
        except DamagedError:  # maybe two replicas are publishing it at this moment
            if pause is None:
                raise
            time.sleep(pause)
    raise AssertionError("unreachable")


def start_task(tasks: dict[Key, asyncio.Task[T]], key: Key, coroutine: Coroutine[Any, Any, T]) -> None:
    """Run a coroutine as a task, which is in `tasks` until it is done."""
    task = tasks[key] = asyncio.create_task(coroutine)

    def forget(_: asyncio.Task[T]) -> None:
        if tasks.get(key) is task:
            del tasks[key]
        if not task.cancelled():
            task.exception()  # otherwise asyncio would log the error, which may quote a client's texts

    task.add_done_callback(forget)
