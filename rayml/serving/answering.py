"""What a gateway asks of the replicas of vLLM. A request whose replica was lost is sent to another."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NamedTuple, TypeVar

from fastapi import Response
from fastapi.responses import StreamingResponse
from ray.serve.handle import DeploymentHandle

from rayml.serving.errors import ApiError
from rayml.serving.http import as_api_error, chained, session, until_error
from rayml.serving.schema import ClassifyRequest

LOST = "replica_lost"
PAUSE_SECONDS = 0.2
R = TypeVar("R")


class Elsewhere(NamedTuple):
    """What vLLM cannot answer, and the learners have to."""

    reason: str


class Answering:
    """Args:
    handle: of the replicas.
    again_seconds: how long a lost request is sent anew.
    """

    def __init__(self, handle: DeploymentHandle, again_seconds: float):
        self.handle, self.again_seconds = handle, again_seconds

    async def classify(self, owner: str, adapter: str | None, asked: ClassifyRequest) -> dict[str, Any] | None:
        """Return the answers and the tokens that were read; None, where the learners have to answer."""

        async def once() -> Any:
            handle = self.handle.options(session_id=session(owner, adapter))
            return raised(await handle.classify.remote(owner, adapter, asked))

        found = await self._until_answered(once)
        return None if isinstance(found, Elsewhere) else found

    async def respond(self, owner: str, adapter: str | None, kind: str, body: bytes) -> Response | None:
        """Return what vLLM answers to completions, or to a chat; None, where the learners have to."""

        async def once() -> Any:
            handle = self.handle.options(stream=True, session_id=session(owner, adapter))
            told: Any = handle.respond.remote(owner, adapter, kind, body)
            first = raised(await anext(told))
            if first is not None:
                return first
            # An event is waited for: whoever was lost before it can still be replaced.
            return chained(raised(await anext(told)), each_raised(told))

        found = await self._until_answered(once)
        if isinstance(found, Elsewhere):
            return None
        if isinstance(found, str):
            return Response(found, media_type="application/json")
        headers = {"Cache-Control": "no-cache"}
        return StreamingResponse(until_error(found), media_type="text/event-stream", headers=headers)

    async def check(self, seconds: float) -> None:
        """Raise where no replica runs its model."""
        await self.handle.check.remote(seconds)

    async def _until_answered(self, once: Callable[[], Awaitable[R]]) -> R:
        until = time.monotonic() + self.again_seconds
        while True:
            try:
                return await once()
            except Exception as error:
                known = as_api_error(error)
                if known.code != LOST or time.monotonic() > until:
                    raise known from error
                await asyncio.sleep(PAUSE_SECONDS)


def raised(answer: Any) -> Any:
    """Return an answer, or raise the refusal that it is."""
    if isinstance(answer, ApiError):
        raise answer
    return answer


async def each_raised(told: Any) -> AsyncIterator[Any]:
    """Yield what is told; a refusal, or a replica that was lost, becomes an ApiError."""
    try:
        async for one in told:
            yield raised(one)
    except Exception as error:
        raise as_api_error(error) from error
