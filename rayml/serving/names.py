"""The models as clients see them: `BASE`, and `BASE:ADAPTER` by an adapter's id, or by its name for the newest."""

import asyncio
import json
import time
from typing import Any

from rayml.serving.errors import ApiError
from rayml.serving.store import AdapterStore, Manifest

NOT_FOUND = "model_not_found"
MOST_CACHED = 100_000


class Names:
    """Resolves model names to adapters in the store, and describes both for the API.

    A resolved name is cached for a while, so that most requests read nothing from the store.

    Args:
        base: what clients call the bare model.
        known_seconds: how long a cached name is valid; another gateway's newer adapter may go unseen that long.
    """

    def __init__(self, base: str, store: AdapterStore, known_seconds: float):
        self.base, self.store, self.known_seconds = base, store, known_seconds
        self._created = int(time.time())
        self._cache: dict[tuple[str, str], tuple[float, str]] = {}
        """By owner and reference: when the entry expires, and the adapter's id."""

    async def adapter(self, owner: str, model: str) -> str | None:
        """Return the id of the adapter that `model` names; None for the base.

        Raises:
            ApiError: 404, there is no such model.
        """
        if model == self.base:
            return None
        if not model.startswith(f"{self.base}:"):
            raise ApiError(
                404, f"no model {model[:120]!r}; there is {self.base!r}, and {self.base}:ADAPTER", "model", NOT_FOUND
            )
        reference = model.removeprefix(f"{self.base}:")
        expires_at, adapter = self._cache.get((owner, reference), (0.0, ""))
        if time.monotonic() < expires_at:
            return adapter
        manifest = await self.find(owner, reference)
        if len(self._cache) > MOST_CACHED:
            self._cache.clear()
        self._cache[owner, reference] = time.monotonic() + self.known_seconds, manifest.id
        return manifest.id

    async def find(self, owner: str, reference: str) -> Manifest:
        """Return an adapter by its id or its name.

        Raises:
            ApiError: 404, there is no such adapter.
        """
        manifest = await asyncio.to_thread(self.store.find, owner, reference)
        if manifest is None:
            raise no_adapter_error(reference)
        return manifest

    def refresh(self, owner: str, name: str) -> None:
        """Forget what a name resolved to: there may be a newer adapter of that name."""
        self._cache.pop((owner, name), None)

    async def delete(self, owner: str, reference: str) -> str:
        """Delete an adapter, or one that failed to be learned in the background, and return its id.

        Raises:
            ApiError: 404, there is no such adapter; 409, it is still being learned.
        """
        manifest = await asyncio.to_thread(self.store.find, owner, reference)
        if manifest is None:
            request = await asyncio.to_thread(self.store.read_request, owner, reference)
            if request is None:
                raise no_adapter_error(reference)
            if "error" not in json.loads(request):
                raise ApiError(409, f"adapter {reference} is still being learned; delete it after that", "model")
        adapter = manifest.id if manifest else reference
        await asyncio.to_thread(self.store.delete, owner, adapter)
        self._cache = {key: entry for key, entry in self._cache.items() if entry[1] != adapter}
        return adapter

    def model(self, manifest: Manifest | None) -> dict[str, Any]:
        """Return the entry of an adapter, or of the base, in OpenAI's list of models."""
        if manifest is None:
            return {"id": self.base, "object": "model", "created": self._created, "owned_by": "rayml"}
        name, created = f"{self.base}:{manifest.id}", int(manifest.created_at)
        return {"id": name, "object": "model", "created": created, "owned_by": "rayml", "parent": self.base}

    def ready(self, manifest: Manifest) -> dict[str, Any]:
        """Return an adapter as the API shows it."""
        return {
            "id": manifest.id,
            "object": "adapter",
            "model": f"{self.base}:{manifest.id}",
            "name": manifest.name,
            "status": "ready",
            "created": int(manifest.created_at),
            "expires_at": manifest.expires_at and int(manifest.expires_at),
            "examples": manifest.examples,
            "steps": manifest.steps,
            "loss_before": manifest.loss_before,
            "loss_after": manifest.loss_after,
            "seconds": round(manifest.seconds, 3),
        }

    def learning(self, adapter: str) -> dict[str, Any]:
        """Return an adapter that is being learned, as the API shows it."""
        name, model = adapter.rpartition(".")[0], f"{self.base}:{adapter}"
        return {"id": adapter, "object": "adapter", "model": model, "name": name, "status": "learning"}


def no_adapter_error(reference: str) -> ApiError:
    return ApiError(404, f"no adapter {reference[:120]!r}", "model", NOT_FOUND)
