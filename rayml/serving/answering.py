"""The gateway's client of the vLLM replicas. It resends a request whose replica was lost to another one."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, TypeVar

from fastapi import Response
from ray.serve.handle import DeploymentHandle

from rayml.serving.http import as_api_error, event_stream, prepend, raise_refusal, raise_refusals, routing_key
from rayml.serving.schema import ClassifyRequest

LOST = "replica_lost"
PAUSE_SECONDS = 0.2
R = TypeVar("R")


class LearnerAnswers(NamedTuple):
    """An answerer returns this in place of an answer: vLLM cannot give it, so a learner has to."""

    reason: str


class AnswererClient:
    """Args:
    handle: of the vLLM replicas.
    again_seconds: how long a lost request is sent again.
    """

    def __init__(self, handle: DeploymentHandle, again_seconds: float):
        self.handle, self.again_seconds = handle, again_seconds

    async def classify(self, owner: str, adapter: str | None, body: ClassifyRequest) -> dict[str, Any] | None:
        """Return the answers and the number of tokens that were read; None if a learner has to answer."""

        async def send() -> Any:
            handle = self.handle.options(session_id=routing_key(owner, adapter))
            return raise_refusal(await handle.classify.remote(owner, adapter, body))

        answer = await self._until_answered(send)
        return None if isinstance(answer, LearnerAnswers) else answer

    async def respond(self, owner: str, adapter: str | None, kind: str, body: bytes) -> Response | None:
        """Return vLLM's response to a request for completions or chat; None if a learner has to answer."""

        async def send() -> Any:
            handle = self.handle.options(stream=True, session_id=routing_key(owner, adapter))
            stream: Any = handle.respond.remote(owner, adapter, kind, body)
            first = raise_refusal(await anext(stream))
            if first is not None:
                return first
            # None announces events. Wait for the first one: until it is here, another replica can take over.
            return prepend(raise_refusal(await anext(stream)), raise_refusals(stream))

        answer = await self._until_answered(send)
        if isinstance(answer, LearnerAnswers):
            return None
        if isinstance(answer, str):
            return Response(answer, media_type="application/json")
        return event_stream(answer)

    async def check(self, seconds: float) -> None:
        """Raise if no replica runs its model."""
        await self.handle.check.remote(seconds)

    async def _until_answered(self, send: Callable[[], Awaitable[R]]) -> R:
        deadline = time.monotonic() + self.again_seconds
        while True:
            try:
                return await send()
            except Exception as error:
                api_error = as_api_error(error)
                if api_error.code != LOST or time.monotonic() > deadline:
                    raise api_error from error
                await asyncio.sleep(PAUSE_SECONDS)
