"""The adapters that an answerer has on its disk, each version under a name of its own.

vLLM tells adapters, and prompts in its prefix cache, apart by names: what changed must never come under an old one. It
also reads an adapter again after dropping it from memory, so no file of one that is being asked is ever deleted.
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
from rayml.serving.adapter_cache import Key, fetched
from rayml.serving.adapter_files import Fits
from rayml.serving.store import AdapterStore


@dataclass(frozen=True)
class Version:
    """An adapter as vLLM knows it."""

    adapter: Adapter
    """Without weights: how it is asked, and its labels."""
    name: str
    number: int
    """vLLM's `lora_int_id`."""
    folder: Path
    rank: int
    size: int
    """Bytes on disk."""

    def unanswered(self, most_rank: int) -> str:
        """Return why vLLM cannot answer with it; "" where it can."""
        algorithm, card = self.adapter.algorithm, self.adapter.card
        if self.rank > most_rank:
            return f"its rank is {self.rank}, and answerers.lora_rank makes room for {most_rank}"
        if type(algorithm).answer is not Algorithm.answer or algorithm.keeps_states:
            return f"{algorithm.name} answers from hidden states"
        return "its options are scored by what they make of the input" if card.scoring == "channel" else ""


class Versions:
    """Args:
    adapter_of: makes of a card what an adapter is asked by.
    folder: of this replica alone.
    most_bytes: of all copies together; those in use stay whatever their size.
    drop: tells vLLM that an adapter is gone.
    """

    def __init__(
        self,
        store: AdapterStore,
        fits: Fits,
        adapter_of: Callable[[AdapterCard], Adapter],
        folder: Path,
        most_bytes: int,
        drop: Callable[[Version], Awaitable[Any]],
        observe: Callable[[str, float], None],
    ):
        self.store, self.fits, self.adapter_of, self.folder = store, fits, adapter_of, folder
        self.most_bytes, self.drop, self.observe = most_bytes, drop, observe
        self._held: OrderedDict[Key, Version] = OrderedDict()
        self._used: Counter[Key] = Counter()
        self._loading: dict[Key, asyncio.Task[Version]] = {}
        self._numbers = count(1)
        self._cleaning: asyncio.Task[None] | None = None

    @contextlib.asynccontextmanager
    async def use(self, owner: str, adapter: str) -> AsyncIterator[Version]:
        """Hold an adapter on the disk for as long as it is asked.

        Raises:
            ApiError: 404, there is none; or it was refused, and why.
        """
        key = owner, adapter
        self._used[key] += 1  # before it is loaded, so that no other drives it out meanwhile
        try:
            yield await self._get(key)
        finally:
            self._used[key] -= 1
            if not self._used[key]:
                del self._used[key]
                self._cleaning = asyncio.create_task(self._make_room())  # whoever asked need not wait for it

    async def _get(self, key: Key) -> Version:
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        if key not in self._loading:
            self._loading[key] = asyncio.create_task(self._load(key))
            self._loading[key].add_done_callback(look_at)
        return await asyncio.shield(self._loading[key])

    async def _load(self, key: Key) -> Version:
        try:
            version = await asyncio.to_thread(self._read, key, next(self._numbers))
        finally:
            del self._loading[key]  # in one breath with the next line: it is being loaded, or held, or neither
        self._held[key] = version
        self.observe("loads", 1)
        return version

    def _read(self, key: Key, number: int) -> Version:
        owner, adapter = key
        folder = self.folder / str(number)
        folder.mkdir(parents=True)
        try:
            weights, card, version = fetched(self.store, owner, adapter, folder, self.fits, self.observe)
        except BaseException:
            shutil.rmtree(folder)
            raise
        rank = max(weight.shape[0] for name, weight in weights.items() if name.endswith(A))
        size = sum(file.stat().st_size for file in folder.iterdir())
        return Version(self.adapter_of(card), f"{owner}/{adapter}/{version}", number, folder, rank, size)

    async def _make_room(self) -> None:
        """Delete the copies that were asked longest ago, but none that is being asked."""
        while sum(version.size for version in self._held.values()) > self.most_bytes:
            # Others go on while one is deleted: what is in use is looked at again for each.
            unused = [key for key in self._held if key not in self._used]
            if not unused:
                break
            version = self._held.pop(unused[0])
            await self.drop(version)
            await asyncio.to_thread(shutil.rmtree, version.folder)
            self.observe("evictions", 1)
        self.observe("cached_adapters", len(self._held))


def look_at(task: asyncio.Task) -> None:
    """Look at a task's error: asyncio logs what nobody saw, and it may quote clients."""
    if not task.cancelled():
        task.exception()
