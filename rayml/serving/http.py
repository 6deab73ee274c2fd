"""HTTP helpers of the gateway: API keys, request bodies, error responses, streams, and schemas for /docs.

They are not in gateway.py because Serve pickles an ingress class while its module is still being imported.
"""

import asyncio
import hashlib
import hmac
import inspect
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sized
from functools import partial, wraps
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from starlette.requests import ClientDisconnect

from rayml.serving.answers import event
from rayml.serving.errors import ApiError, busy_error
from rayml.serving.schema import Body
from rayml.serving.settings import Limits
from rayml.serving.store import owner_of

LOST = RayError, DeploymentUnavailableError, ReplicaUnavailableError
T = TypeVar("T")


def handles(route: str) -> Callable[[Callable[..., Awaitable[Response]]], Callable[..., Awaitable[Response]]]:
    """Make an endpoint of a gateway's method. `Gateway.respond` calls the method, with the `owner` of the request.

    Args:
        route: its name in metrics and in the log.
    """

    def decorate(method: Callable[..., Awaitable[Response]]) -> Callable[..., Awaitable[Response]]:
        @wraps(method)
        async def endpoint(self: Any, request: Request, **parameters: Any) -> Response:
            return await self.respond(request, route, partial(method, self, request=request, **parameters))

        # FastAPI takes the parameters from the signature, and must not look for the owner among the client's.
        signature = inspect.signature(method)
        parameters = [parameter for name, parameter in signature.parameters.items() if name != "owner"]
        endpoint.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return endpoint

    return decorate


def body_schema(body_type: type[Body]) -> dict[str, Any]:
    """Return the schema of a request body for /docs. FastAPI is not given the type itself: it would refuse a wrong
    body in its own format, not in OpenAI's."""
    schema = body_type.model_json_schema()
    inlined = inline_references(schema, schema.get("$defs", {}))
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": inlined}}}}


def inline_references(schema: Any, definitions: dict[str, Any]) -> Any:
    """Return a JSON schema with every `$ref` replaced by its definition."""
    if isinstance(schema, list):
        return [inline_references(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return inline_references(definitions[schema["$ref"].rsplit("/", 1)[-1]], definitions)
    return {key: inline_references(value, definitions) for key, value in schema.items() if key != "$defs"}


def model_of(body: bytes) -> str:
    """Return the `model` of a request body, whatever its other fields are.

    Raises:
        ApiError: 400, it is not a JSON object, or names no model.
    """
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not JSON") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("model"), str):
        raise ApiError(400, "model: missing, or not a text", "model", "missing")
    return fields["model"]


def authenticate(request: Request, owners: Mapping[str, str]) -> str:
    """Return the owner of the API key that a request carries.

    Args:
        owners: the owner of each key, by the key's SHA-256. Without any, no key is needed, and all clients are one
            owner.

    Raises:
        ApiError: 401, the request has none of these keys.
    """
    if not owners:
        return owner_of(None)
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    digest = hashlib.sha256(key.encode()).hexdigest()
    # Compared in constant time, with every key, so that the response time reveals nothing about them.
    matches = [owner for known_digest, owner in owners.items() if hmac.compare_digest(digest, known_digest)]
    if scheme.lower() != "bearer" or not matches:
        raise ApiError(401, "send one of this server's keys: Authorization: Bearer KEY", code="invalid_api_key")
    return matches[0]


async def read_body(request: Request, limits: Limits) -> bytes:
    """Read a request body within the limits on its size and on the time it takes.

    Raises:
        ApiError: 413, it is too long; 408, it is too slow; 400, the client left.
    """
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.body_bytes:
                    raise ApiError(413, f"the body is longer than {limits.body_bytes} bytes", code="body_too_long")
    except TimeoutError:
        message = f"the body was not complete after {limits.body_seconds:g} s"
        raise ApiError(408, message, code="timeout") from None
    except ClientDisconnect:  # nobody reads this error, but it must not count as one of the server's
        raise ApiError(400, "the client left before its body was complete", code="disconnected") from None
    return bytes(body)


def check_count(field: str, values: Sized | None, limit: int) -> None:
    if values is not None and not 1 <= len(values) <= limit:
        raise ApiError(422, f"{field}: {len(values)} given; 1 to {limit} are allowed", field)


def routing_key(owner: str, adapter: str | None) -> str:
    """Return Serve's session id: requests with the same one go to the same replica, as long as it is not full."""
    return f"{owner}/{adapter}" if adapter else ""


def error_response(error: ApiError, retry_after: int) -> Response:
    headers = {"Retry-After": str(retry_after)} if error.status in (429, 503) else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body(), error.status, headers)


def as_api_error(error: Exception) -> ApiError:
    """Return the ApiError for any exception that a request ended with, here or in a replica."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, ApiError):
        return cause
    if isinstance(cause, BackPressureError):
        return busy_error("all replicas are busy, and too many requests wait")
    if isinstance(cause, OSError):
        return ApiError(503, "the store of adapters does not answer; send the request again", code="storage")
    if isinstance(cause, LOST) or (isinstance(error, RayError) and not isinstance(error, RayTaskError)):
        return ApiError(503, "the replica was lost; send the request again", code="replica_lost")
    return ApiError(500, f"{type(cause).__name__}; the server's log has more", code="internal")


def raise_refusal(answer: T) -> T:
    """Return a replica's answer. A refusal, which replicas return as a value, is raised."""
    if isinstance(answer, ApiError):
        raise answer
    return answer


async def raise_refusals(answers: AsyncIterator[T]) -> AsyncIterator[T]:
    """Yield what a replica streams. Refusals, and every other failure, are raised as an ApiError."""
    try:
        async for answer in answers:
            yield raise_refusal(answer)
    except Exception as error:
        raise as_api_error(error) from error


async def prepend(first: T, rest: AsyncIterator[T]) -> AsyncIterator[T]:
    yield first
    async for item in rest:
        yield item


def event_stream(events: AsyncIterator[str]) -> Response:
    headers = {"Cache-Control": "no-cache"}
    return StreamingResponse(_with_error_event(events), media_type="text/event-stream", headers=headers)


async def _with_error_event(events: AsyncIterator[str]) -> AsyncIterator[str]:
    """Yield server-sent events. An error becomes the last of them, since the status 200 was sent already."""
    try:
        async for item in events:
            yield item
    except ApiError as error:
        yield event(error.body())
