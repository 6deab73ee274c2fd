"""The adapters on an answerer's disk, each version under a name of its own.

vLLM identifies adapters, and prompts in its prefix cache, by the adapter's name, so a changed adapter must never reuse
an old name. vLLM also reads an adapter's files again after dropping it from memory, so they are never deleted while a
request uses the adapter.
"""

import asyncio
import contextlib
import shutil
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from rayml.adapter import Adapter
from rayml.algorithms.base import Algorithm
from rayml.lm.lora import A
from rayml.lm.peft_files import AdapterCard
from rayml.serving.adapter_cache import Key, fetch_adapter, start_task
from rayml.serving.adapter_files import AdapterConstraints
from rayml.serving.store import AdapterStore
from rayml.serving.work import Observe


@dataclass(frozen=True)
class Version:
    """An adapter as vLLM knows it."""

    adapter: Adapter
    """Without weights: its prompt and its labels."""
    name: str
    number: int
    """vLLM's `lora_int_id`."""
    folder: Path
    rank: int
    size: int
    """Bytes on disk."""

    def unanswered(self, most_rank: int) -> str:
        """Return why vLLM cannot answer with this adapter; "" if it can."""
        algorithm, card = self.adapter.algorithm, self.adapter.card
        if self.rank > most_rank:
            return f"its rank is {self.rank}, and answerers.lora_rank makes room for {most_rank}"
        if type(algorithm).answer is not Algorithm.answer or algorithm.keeps_states:
            return f"{algorithm.name} answers from hidden states"
        return "its options are scored by what they make of the input" if card.scoring == "channel" else ""


class Versions:
    """Args:
    adapter_of: makes an adapter without weights from its card.
    folder: for the copies; of this replica alone.
    most_bytes: of all copies together. Copies in use stay, whatever their size.
    drop: tells vLLM that an adapter is gone.
    """

    def __init__(
        self,
        store: AdapterStore,
        fits: AdapterConstraints,
        adapter_of: Callable[[AdapterCard], Adapter],
        folder: Path,
        most_bytes: int,
        drop: Callable[[Version], Awaitable[Any]],
        observe: Observe,
    ):
        self.store, self.fits, self.adapter_of, self.folder = store, fits, adapter_of, folder
        self.most_bytes, self.drop, self.observe = most_bytes, drop, observe
        self._held: OrderedDict[Key, Version] = OrderedDict()
        self._users: Counter[Key] = Counter()
        self._loading: dict[Key, asyncio.Task[Version]] = {}
        self._numbers = count(1)
        self._cleanup: asyncio.Task[None] | None = None

    @contextlib.asynccontextmanager
    async def use(self, owner: str, adapter: str) -> AsyncIterator[Version]:
        """Keep an adapter on the disk while a request uses it.

        Raises:
            ApiError: 404, there is no such adapter; or it was refused, with the reason.
        """
        key = owner, adapter
        self._users[key] += 1  # before it is loaded, so that it cannot be evicted in between
        try:
            yield await self._get(key)
        finally:
            self._users[key] -= 1
            if not self._users[key]:
                del self._users[key]
                self._cleanup = asyncio.create_task(self._evict())  # the request need not wait for it

    async def _get(self, key: Key) -> Version:
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        if key not in self._loading:
            start_task(self._loading, key, self._load(key))
        return await asyncio.shield(self._loading[key])

    async def _load(self, key: Key) -> Version:
        try:
            version = await asyncio.to_thread(self._read, key, next(self._numbers))
        finally:
            del self._loading[key]  # no await before it is held: it is never seen neither loading nor held
        self._held[key] = version
        self.observe("loads", 1)
        return version

    def _read(self, key: Key, number: int) -> Version:
        owner, adapter = key
        folder = self.folder / str(number)
        folder.mkdir(parents=True)
        try:
            weights, card, checksum = fetch_adapter(self.store, owner, adapter, folder, self.fits, self.observe)
        except BaseException:
            shutil.rmtree(folder)
            raise
        rank = max(weight.shape[0] for name, weight in weights.items() if name.endswith(A))
        size = sum(file.stat().st_size for file in folder.iterdir())
        return Version(self.adapter_of(card), f"{owner}/{adapter}/{checksum}", number, folder, rank, size)

    async def _evict(self) -> None:
        """Delete the least recently used copies, but none that is in use."""
        while sum(version.size for version in self._held.values()) > self.most_bytes:
            # Requests come and go while a copy is deleted, so this is computed anew for each.
            unused = [key for key in self._held if key not in self._users]
            if not unused:
                break
            version = self._held.pop(unused[0])
            await self.drop(version)
            await asyncio.to_thread(shutil.rmtree, version.folder)
            self.observe("evictions", 1)
        self.observe("cached_adapters", len(self._held))
