"""The gateway: HTTP in front of the model's replicas. It checks keys and limits, resolves names, and loads no model."""

import asyncio
import io
import json
import logging
import threading
import time
import zipfile
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from rayml.lm.sampling import Sampling
from rayml.serving import pages
from rayml.serving.answering import AnswererClient
from rayml.serving.answers import ResponseBodies
from rayml.serving.errors import ApiError
from rayml.serving.http import (
    as_api_error,
    authenticate,
    body_schema,
    check_count,
    error_response,
    event_stream,
    handles,
    model_of,
    prepend,
    raise_refusal,
    raise_refusals,
    read_body,
    routing_key,
)
from rayml.serving.metrics import Metrics
from rayml.serving.names import Names
from rayml.serving.schema import (
    COMPLETION_TOKENS,
    AdapterRequest,
    ChatRequest,
    ClassifyRequest,
    CompletionRequest,
    parse,
)
from rayml.serving.settings import Serving
from rayml.serving.store import AdapterStore, DamagedError, Manifest, adapter_id, damaged_error

log = logging.getLogger("ray.serve")
DESCRIPTION = "Learn a task from a few examples, and ask it by name."
app = FastAPI(title="rayml", description=DESCRIPTION, docs_url=None, redoc_url=None)


@app.exception_handler(HTTPException)
async def _no_such_route(_request: Request, error: HTTPException) -> Response:
    return error_response(ApiError(error.status_code, str(error.detail)), retry_after=1)


@serve.ingress(app)
class Gateway:
    """A gateway replica.

    Args:
        model: the replicas that run our own model.
        base: what clients call the bare model.
        fingerprint: of the run; a part of every adapter's id.
        store: where adapters are kept.
        keys: the owner of each API key, by the key's SHA-256. If empty, no key is needed.
        answerers: the replicas of vLLM, if any. They answer what they can.
    """

    def __init__(
        self,
        model: DeploymentHandle,
        serving: Serving,
        base: str,
        fingerprint: str,
        store: str,
        keys: Mapping[str, str],
        answerers: DeploymentHandle | None = None,
    ):
        self.vllm = AnswererClient(answerers, serving.answerers.again_seconds) if answerers else None
        self.model, self.serving, self.limits = model, serving, serving.limits
        self.fingerprint, self.keys = fingerprint, keys
        self.store = AdapterStore(store)
        self.names = Names(base, self.store, serving.adapters.known_seconds)
        self.metrics = Metrics()
        self._readiness: tuple[float, asyncio.Future[str | None]] | None = None
        """When it was last checked, and the problem that was found, if any."""
        threading.Thread(target=self._sweep, daemon=True).start()

    def _sweep(self) -> None:
        while True:
            time.sleep(self.serving.adapters.sweep_seconds)
            try:
                self.store.sweep()
            except OSError:
                log.exception("expired adapters were not deleted")

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page(self) -> Response:
        """The playground."""
        return pages.playground()

    @app.get("/docs", include_in_schema=False)
    async def docs(self) -> Response:
        """The API's documentation for people."""
        return pages.docs(app.openapi())

    @app.get("/healthz")
    async def healthz(self) -> Response:
        """Whether the gateway answers."""
        return JSONResponse({"status": "ok"})

    @app.get("/readyz")
    async def readyz(self) -> Response:
        """Whether a replica runs the model."""
        # Anyone may ask this without a key, so all requests within a second share one check.
        if self._readiness is None or time.monotonic() > self._readiness[0] + 1:
            self._readiness = time.monotonic(), asyncio.ensure_future(self._find_problem())
        problem = await asyncio.shield(self._readiness[1])
        if problem:
            return error_response(ApiError(503, f"no replica is ready: {problem}"), retry_after=2)
        return JSONResponse({"status": "ready"})

    async def _find_problem(self) -> str | None:
        try:
            await asyncio.wait_for(self.model.check.remote(10.0), 15)
            if self.vllm:
                await asyncio.wait_for(self.vllm.check(10.0), 15)
        except Exception as error:
            return type(error).__name__
        return None

    @app.get("/v1/models")
    @handles("models")
    async def models(self, owner: str, request: Request, after: str = "") -> Response:
        """The base, and the adapters of this key, a thousand at a time as in `/v1/adapters`."""
        return await self._list(owner, after, self.names.model, first=[] if after else [self.names.model(None)])

    async def _list(
        self, owner: str, after: str, describe: Callable[[Manifest], dict[str, Any]], first: list[dict[str, Any]]
    ) -> Response:
        manifests, last_id = await asyncio.to_thread(self.store.page, owner, after)
        entries = [*first, *map(describe, manifests)]
        return JSONResponse({"object": "list", "data": entries, "has_more": bool(last_id), "last_id": last_id})

    @app.get("/v1/models/{model}")
    @handles("models")
    async def one_model(self, owner: str, request: Request, model: str) -> Response:
        """The base, or an adapter."""
        adapter = await self.names.adapter(owner, model)
        return JSONResponse(self.names.model(await self.names.find(owner, adapter) if adapter else None))

    @app.delete("/v1/models/{model}")
    @handles("models")
    async def delete_model(self, owner: str, request: Request, model: str) -> Response:
        """Delete an adapter, as OpenAI's clients delete a fine-tuned model."""
        adapter = await self.names.adapter(owner, model)
        if adapter is None:
            raise ApiError(403, "the base cannot be deleted, since it is served for all; adapters can", "model")
        await self.names.delete(owner, adapter)
        return JSONResponse({"id": model, "object": "model", "deleted": True})

    @app.post("/v1/embeddings", include_in_schema=False)
    @app.post("/v1/responses", include_in_schema=False)
    @handles("none")
    async def not_here(self, owner: str, request: Request) -> Response:
        """Name the routes that this server has instead."""
        routes = "/v1/chat/completions, /v1/completions, /v1/classify and /v1/adapters"
        raise ApiError(404, f"this server has no {request.url.path}; it has {routes}", code="no_such_route")

    @app.post("/v1/adapters", status_code=201, openapi_extra=body_schema(AdapterRequest))
    @handles("adapters")
    async def create(self, owner: str, request: Request) -> Response:
        """Learn an adapter from a few examples. 201; 200, if the same was learned before; 202, in the background."""
        body: AdapterRequest = parse(AdapterRequest, await read_body(request, self.limits))
        count = len(body.examples)
        if not 2 <= count <= self.limits.examples:
            raise ApiError(422, f"examples: {count} given; 2 to {self.limits.examples} are allowed", "examples")
        if body.steps is not None and body.steps > self.limits.steps:
            raise ApiError(422, f"steps: at most {self.limits.steps}", "steps")
        check_count("options", body.options, self.limits.options)
        content = [self.fingerprint, body.name, body.pairs, body.options, body.steps]
        content += [body.kind] if body.kind else []
        adapter = adapter_id(body.name, content)
        if body.background or "respond-async" in request.headers.get("prefer", ""):
            return await self._learn_in_background(owner, adapter, body)
        manifest, is_new = await self._call_replica("learn", owner, adapter, body)
        self.names.refresh(owner, body.name)
        return JSONResponse(self.names.ready(manifest), 201 if is_new else 200)

    @app.get("/v1/adapters")
    @handles("adapters")
    async def adapters(self, owner: str, request: Request, after: str = "") -> Response:
        """The adapters of this key in the order of their ids, a thousand at a time: `after` is `last_id`."""
        return await self._list(owner, after, self.names.ready, first=[])

    @app.get("/v1/adapters/{adapter}")
    @handles("adapters")
    async def adapter(self, owner: str, request: Request, adapter: str) -> Response:
        """One adapter, by its id or its name. For one that is being learned, the progress."""
        manifest = await asyncio.to_thread(self.store.find, owner, adapter)
        if manifest is None and (progress := await self._progress(owner, adapter)):
            return JSONResponse(progress)
        return JSONResponse(self.names.ready(manifest or await self.names.find(owner, adapter)))

    async def _learn_in_background(self, owner: str, adapter: str, body: AdapterRequest) -> Response:
        if await asyncio.to_thread(self.store.find, owner, adapter):
            manifest, _ = await self._call_replica("learn", owner, adapter, body)  # lets it live as long as asked for
            return JSONResponse(self.names.ready(manifest))
        await self._call_replica("begin", owner, adapter, body)
        headers = {"Location": f"/v1/adapters/{adapter}", "Preference-Applied": "respond-async", "Retry-After": "1"}
        return JSONResponse(self.names.learning(adapter), 202, headers)

    async def _progress(self, owner: str, adapter: str) -> dict[str, Any] | None:
        """Return the progress of an adaptation in the background; None if there is no such adaptation.

        An adaptation whose replica was lost is started again.
        """
        note = await asyncio.to_thread(self.store.read_request, owner, adapter)
        if note is None:
            return None
        if (failure := json.loads(note)).get("error"):
            return self.names.learning(adapter) | {"status": "failed"} | failure
        progress = await self._call_replica("progress", owner, adapter)
        if progress is None:
            await self._call_replica("begin", owner, adapter, parse(AdapterRequest, note))
        return self.names.learning(adapter) | (progress or {})

    @app.delete("/v1/adapters/{adapter}")
    @handles("adapters")
    async def delete(self, owner: str, request: Request, adapter: str) -> Response:
        """Delete an adapter."""
        deleted = await self.names.delete(owner, adapter)
        return JSONResponse({"id": deleted, "object": "adapter", "deleted": True})

    @app.get("/v1/adapters/{adapter}/download")
    @handles("download")
    async def download(self, owner: str, request: Request, adapter: str) -> Response:
        """The adapter's PEFT files, as a zip."""
        manifest = await self.names.find(owner, adapter)
        data = await asyncio.to_thread(self._zip, owner, manifest)
        headers = {"Content-Disposition": f'attachment; filename="{manifest.id}.zip"'}
        return Response(data, media_type="application/zip", headers=headers)

    def _zip(self, owner: str, manifest: Manifest) -> bytes:
        """Return a zip of an adapter's files, each as it was published."""
        buffer = io.BytesIO()
        try:
            with zipfile.ZipFile(buffer, "w") as file:
                for name in manifest.files:
                    file.writestr(name, self.store.read_verified(owner, manifest, name))
        except DamagedError as error:
            raise damaged_error(owner, manifest.id, error) from None
        return buffer.getvalue()

    @app.post("/v1/classify", openapi_extra=body_schema(ClassifyRequest))
    @handles("classify")
    async def classify(self, owner: str, request: Request) -> Response:
        """The label of each input, with probabilities."""
        body: ClassifyRequest = parse(ClassifyRequest, await read_body(request, self.limits))
        check_count("input", body.inputs, self.limits.inputs)
        check_count("options", body.options, self.limits.options)
        adapter = await self.names.adapter(owner, body.model)
        result = await self.vllm.classify(owner, adapter, body) if self.vllm else None
        result = result or await self._call_replica("classify", owner, adapter, body)
        answers = [{"index": index} | answer for index, answer in enumerate(result["answers"])]
        usage = {"prompt_tokens": result["tokens"], "total_tokens": result["tokens"]}
        return JSONResponse({"object": "list", "model": body.model, "data": answers, "usage": usage})

    @app.post("/v1/completions", openapi_extra=body_schema(CompletionRequest))
    @handles("completions")
    async def complete(self, owner: str, request: Request) -> Response:
        """Continue a prompt. An adapter takes the prompt for an input of its task."""
        return await self._generate(owner, request, "completions", CompletionRequest)

    @app.post("/v1/chat/completions", openapi_extra=body_schema(ChatRequest))
    @handles("chat")
    async def chat(self, owner: str, request: Request) -> Response:
        """Answer a conversation. An adapter takes it for an input of its task."""
        return await self._generate(owner, request, "chat", ChatRequest)

    async def _generate(
        self, owner: str, request: Request, kind: str, body_type: type[CompletionRequest] | type[ChatRequest]
    ) -> Response:
        raw_body = await read_body(request, self.limits)
        if self.vllm:  # it parses the body itself
            adapter = await self.names.adapter(owner, model_of(raw_body))
            if response := await self.vllm.respond(owner, adapter, kind, raw_body):
                return response
        body: CompletionRequest | ChatRequest = parse(body_type, raw_body)
        check_count("prompt", body.prompts, self.limits.inputs)
        sampling = self._sampling(body)
        adapter = await self.names.adapter(owner, body.model)
        replicas = self.model.options(stream=True, session_id=routing_key(owner, adapter))
        stream: Any = replicas.write.remote(owner, adapter, list(body.prompts), sampling)
        pieces = raise_refusals(stream)
        # Wait for the first piece: until it is here, an error still has a status of its own.
        first = await anext(pieces)
        bodies = ResponseBodies(body)
        if not body.stream:
            return JSONResponse(bodies.whole([first, *[piece async for piece in pieces]]))
        return event_stream(bodies.events(prepend(first, pieces), body.includes_usage))

    def _sampling(self, body: CompletionRequest | ChatRequest) -> Sampling:
        """Return how to sample. By default a completion is as long as OpenAI's, and a chat's answer as the limit."""
        limit = self.limits.max_tokens
        if body.most_tokens is not None and body.most_tokens > limit:
            raise ApiError(422, f"max_tokens: at most {limit}", "max_tokens")
        if len(body.stops) > 4:
            raise ApiError(422, "stop: at most 4", "stop")
        seed = self.serving.seed if body.seed is None else body.seed
        default_tokens = limit if isinstance(body, ChatRequest) else min(COMPLETION_TOKENS, limit)
        return Sampling(
            body.most_tokens or default_tokens,
            body.temperature,
            body.top_p,
            seed,
            body.stops,
            body.top_count,
            fits_context=body.most_tokens is None,
        )

    async def _call_replica(self, method: str, owner: str, adapter: str | None, *arguments: Any) -> Any:
        replicas = self.model.options(session_id=routing_key(owner, adapter))
        try:
            answer = await getattr(replicas, method).remote(owner, adapter, *arguments)
        except Exception as error:
            raise as_api_error(error) from error
        return raise_refusal(answer)

    async def respond(self, request: Request, route: str, handle: Callable[..., Awaitable[Response]]) -> Response:
        """Handle a request for its key's owner. Count it, and log one line, which holds no client's text."""
        began = time.perf_counter()
        try:
            response = await handle(owner=authenticate(request, self.keys))
        except Exception as error:
            api_error = as_api_error(error)
            if api_error.status == 500:
                log.exception("request failed")
            response = error_response(api_error, self.limits.retry_after_seconds)
        seconds = time.perf_counter() - began
        self.metrics.request(route, request.method, response.status_code, seconds)
        line = {"event": "request", "route": route, "method": request.method, "status": response.status_code}
        log.info(json.dumps(line | {"seconds": round(seconds, 4)}))
        return response
