"""What the gateway needs of HTTP: keys, bodies, refusals, streams, and what /docs shows.

A module of its own, since Serve pickles an ingress class while its module is still being read.
"""

import asyncio
import hashlib
import hmac
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

from rayml.serving.answers import Written, event
from rayml.serving.errors import ApiError, busy
from rayml.serving.schema import Body
from rayml.serving.settings import Limits
from rayml.serving.store import owner_of

LOST = RayError, DeploymentUnavailableError, ReplicaUnavailableError


def takes(kind: type[Body]) -> dict[str, Any]:
    """Return what /docs shows of a request's body; we read it ourselves, so as to refuse it in OpenAI's shape."""
    schema = kind.model_json_schema()
    shown = inlined(schema, schema.get("$defs", {}))
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": shown}}}}


def inlined(schema: Any, definitions: dict[str, Any]) -> Any:
    """Return a JSON schema with its definitions in place of what points to them."""
    if isinstance(schema, list):
        return [inlined(part, definitions) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return inlined(definitions[schema["$ref"].rsplit("/", 1)[-1]], definitions)
    return {key: inlined(part, definitions) for key, part in schema.items() if key != "$defs"}


def model_of(body: bytes) -> str:
    """Return the `model` that a body asks for, whatever else is in it.

    Raises:
        ApiError: 400, it is no JSON object, or names no model.
    """
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is no JSON") from None
    if not isinstance(values, dict) or not isinstance(values.get("model"), str):
        raise ApiError(400, "model: a text is missing", "model", "missing")
    return values["model"]


def owner_of_request(request: Request, keys: Mapping[str, str]) -> str:
    """Return whose key a request carries.

    Args:
        keys: the owner of each key, by the key's SHA-256; none, and all are one owner.

    Raises:
        ApiError: 401, none of these keys.
    """
    if not keys:
        return owner_of(None)
    kind, _, key = request.headers.get("authorization", "").partition(" ")
    digest = hashlib.sha256(key.encode()).hexdigest()
    owners = [owner for one, owner in keys.items() if hmac.compare_digest(digest, one)]  # time tells nothing
    if kind.lower() != "bearer" or not owners:
        raise ApiError(401, "send one of this server's keys: Authorization: Bearer KEY", code="invalid_api_key")
    return owners[0]


async def read_body(request: Request, limits: Limits) -> bytes:
    """Read a body, as far as it may go, for as long as it may take.

    Raises:
        ApiError: 413, it is too long; 408, too slow.
    """
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.body_bytes:
                    raise ApiError(413, f"the body is longer than {limits.body_bytes} bytes", code="body_too_long")
    except TimeoutError:
        raise ApiError(408, f"the body was not whole after {limits.body_seconds:g} s", code="timeout") from None
    return bytes(body)


def session(owner: str, adapter: str | None) -> str:
    """Return what requests are routed by: those for one adapter go to one replica, as long as it is not busy."""
    return f"{owner}/{adapter}" if adapter else ""


def refusal(error: ApiError, retry_after: int) -> Response:
    headers = {"Retry-After": str(retry_after)} if error.status in (429, 503) else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body(), error.status, headers)


def as_api_error(error: Exception) -> ApiError:
    """Return what to answer when a request failed, here or in a replica."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, ApiError):
        return cause
    if isinstance(cause, BackPressureError):
        return busy("all replicas are busy, and too many requests wait")
    if isinstance(cause, OSError):
        return ApiError(503, "the store of adapters does not answer; send the request again", code="storage")
    if isinstance(cause, LOST) or (isinstance(error, RayError) and not isinstance(error, RayTaskError)):
        return ApiError(503, "the replica was lost; send the request again", code="replica_lost")
    return ApiError(500, f"{type(cause).__name__}; the server's log has more", code="internal")


async def translated(written: Any) -> Written:
    """Yield what a replica wrote; what it refused, or what was lost on the way, becomes an ApiError."""
    try:
        async for piece in written:
            if isinstance(piece, ApiError):
                raise piece
            yield piece
    except Exception as error:
        raise as_api_error(error) from error


async def chained(first: Any, rest: Written) -> Written:
    yield first
    async for piece in rest:
        yield piece


async def until_error(events: AsyncIterator[str]) -> AsyncIterator[str]:
    """Yield events; the status is sent already, so an error is the last of them."""
    try:
        async for one in events:
            yield one
    except ApiError as error:
        yield event(error.body())
