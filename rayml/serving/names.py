"""What clients call the models: `BASE`, and `BASE:ADAPTER` by an adapter's id or its name, whose newest is meant."""

import asyncio
import time
from typing import Any

from rayml.serving.errors import ApiError
from rayml.serving.store import AdapterStore, Manifest

NOT_FOUND = "model_not_found"
MOST_KNOWN = 100_000


class Names:
    """Finds adapters in the store by name. What was found stays known for a while, so that a query reads nothing.

    Args:
        base: what clients call the bare model.
        known_seconds: how long another gateway's newer adapter of a name may go unseen.
    """

    def __init__(self, base: str, store: AdapterStore, known_seconds: float):
        self.base, self.store, self.known_seconds = base, store, known_seconds
        self._created = int(time.time())
        self._known: dict[tuple[str, str], tuple[float, str]] = {}

    async def adapter(self, owner: str, model: str) -> str | None:
        """Return the id of the adapter that `model` names; None for the base.

        Raises:
            ApiError: 404, there is none.
        """
        base, colon, reference = model.partition(":")
        if base != self.base:
            raise ApiError(
                404, f"no model {model[:120]!r}; there is {self.base!r}, and {self.base}:ADAPTER", "model", NOT_FOUND
            )
        if not colon:
            return None
        known = self._known.get((owner, reference))
        if known and time.monotonic() < known[0]:
            return known[1]
        manifest = await self.find(owner, reference)
        if len(self._known) > MOST_KNOWN:
            self._known.clear()
        self._known[owner, reference] = time.monotonic() + self.known_seconds, manifest.id
        return manifest.id

    async def find(self, owner: str, reference: str) -> Manifest:
        """Return an adapter by its id or its name.

        Raises:
            ApiError: 404, there is none.
        """
        manifest = await asyncio.to_thread(self.store.find, owner, reference)
        if manifest is None:
            raise ApiError(404, f"no adapter {reference[:120]!r}", "model", NOT_FOUND)
        return manifest

    def renewed(self, owner: str, name: str) -> None:
        """Look a name up again: another adapter is the newest of it now."""
        self._known.pop((owner, name), None)

    async def forget(self, owner: str, manifest: Manifest) -> None:
        """Delete an adapter."""
        await asyncio.to_thread(self.store.delete, owner, manifest.id)
        self._known = {key: known for key, known in self._known.items() if known[1] != manifest.id}

    def entry(self, manifest: Manifest | None) -> dict[str, Any]:
        """Return what OpenAI's list of models says of an adapter, or of the base."""
        if manifest is None:
            return {"id": self.base, "object": "model", "created": self._created, "owned_by": "rayml"}
        name, created = f"{self.base}:{manifest.id}", int(manifest.created_at)
        return {"id": name, "object": "model", "created": created, "owned_by": "rayml", "parent": self.base}
